"""A damaged bag is read as far as it goes or refused in one sentence; nothing else comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report import drive_bag
from report.drive_bag import MS, START_NS, TYPES
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from spanvla_ros.doctor.command import rig_of_bag
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.report.bags import open_bag
from spanvla_ros.report.recording import read_recording
from spanvla_ros.types import SpanvlaError

MODES = {
    'storage': (StoragePlugin.MCAP, CompressionMode.STORAGE),
    'message': (StoragePlugin.MCAP, CompressionMode.MESSAGE),
    'file': (StoragePlugin.MCAP, CompressionMode.FILE),
    'plain': (StoragePlugin.MCAP, CompressionMode.NONE),
    'sqlite': (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
}
DAMAGES = 16


def write(folder: Path, mode: str) -> Path:
    """A third of a second of a drive."""
    storage, compression = MODES[mode]
    writer = Writer(folder, version=9, storage_plugin=storage)
    if compression is not CompressionMode.NONE:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        kinds = {
            '/spanvla/input/odometry': 'nav_msgs/msg/Odometry',
            '/spanvla/output/trajectory': 'trajectory_msgs/msg/MultiDOFJointTrajectory',
            '/spanvla/plan': 'std_msgs/msg/String',
            '/spanvla/input/route': 'nav_msgs/msg/Path',
        }
        topics = {
            name: writer.add_connection(name, kind, typestore=TYPES)
            for name, kind in kinds.items()
        }
        for k in range(6):
            at_ns, x = START_NS + 50 * k * MS, 0.4 * k
            for (name, kind), message in zip(
                kinds.items(),
                (
                    drive_bag.odometry(at_ns, x, 0.0, 0.0, 8.0),
                    drive_bag.trajectory(at_ns, np.zeros((4, 3)), 0.1, 8.0),
                    drive_bag.text(drive_bag.plan(at_ns, x, k)),
                    drive_bag.route([(0.0, 0.0), (5.0, 0.0)]),
                ),
                strict=True,
            ):
                writer.write(topics[name], at_ns, TYPES.serialize_cdr(message, kind))
    return folder


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A copy that was cut off, ends in nothing, or has flipped bytes."""
    kind, at = rng.random(), rng.randrange(len(data))
    if kind < 0.15:
        return data[:at]
    if kind < 0.25:
        return data[:at] + bytes(len(data) - at)
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        flipped[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(flipped)


@pytest.mark.parametrize('mode', MODES)
def test_whatever_is_damaged_it_is_read_or_one_sentence(tmp_path, mode):
    bag = write(tmp_path / 'bag', mode)
    assert len(read_recording(bag).plans) == 6
    rng = random.Random(mode)
    whole = {file: file.read_bytes() for file in sorted(bag.iterdir())}
    often = [*whole, *(file for file in whole if file.suffix != '.yaml')]
    said = []
    for number in range(DAMAGES):
        file = rng.choice(often)
        file.write_bytes(damaged(whole[file], rng))
        said.append(sentence(read_recording if number % 2 else look, bag))
        file.write_bytes(whole[file])
    refused = [text for text in said if text]
    assert len(refused) > DAMAGES / 3
    assert all(str(bag) in text and '\n' not in text for text in refused)


def look(bag: Path) -> None:
    rig_of_bag(str(bag), TOWN_CAMERAS)


def sentence(read: Callable[[Path], object], bag: Path) -> str:
    try:
        read(bag)
    except SpanvlaError as error:
        return str(error)
    return ''


def test_damaged_zstd_is_named_with_its_file_and_what_mends_it(tmp_path):
    file = write(tmp_path / 'bag', 'storage') / 'bag.mcap'
    data = bytearray(file.read_bytes())
    begin = data.index(b'\x28\xb5\x2f\xfd')
    data[begin + 40 : begin + 60] = bytes(20)
    file.write_bytes(data)
    for path in (file, file.parent):
        with pytest.raises(
            SpanvlaError, match=rf'{path}: damaged \(.*Zstandard.*; record or copy'
        ):
            read_recording(path)
    (file.parent / 'metadata.yaml').unlink()
    with pytest.raises(SpanvlaError, match='not a readable ROS 2 bag'):
        read_recording(file.parent)


def test_what_the_reader_of_a_message_raises_is_its_own(tmp_path):
    def stumble(path: Path) -> None:
        with open_bag(path) as bag:
            for _ in bag.messages(bag.connections):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble(write(tmp_path / 'bag', 'storage'))


def test_a_damaged_definition_does_not_change_a_message(tmp_path):
    file = write(tmp_path / 'bag', 'plain') / 'bag.mcap'
    renamed = file.read_bytes().replace(b'string child_frame_id', b'string child_frame_ix')
    file.write_bytes(renamed)
    assert read_recording(file).odometry.shape == (6, 5)


def test_no_connections_are_no_messages(tmp_path):
    with open_bag(write(tmp_path / 'bag', 'storage')) as bag:
        assert list(bag.messages([])) == []
        assert len(list(bag.messages(bag.connections))) == 24
