import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from spanvla_ros import cli
from spanvla_ros.replay.bag import Wish, find_topics
from spanvla_ros.types import SpanvlaError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / 'shared' / 'real'
TYPES = get_typestore(Stores.LATEST)
CAMERAS = ('front', 'front_left', 'front_right')
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason='../shared is not here')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    path = ROOT / 'test' / 'runtime' / 'conftest.py'
    spec = importlib.util.spec_from_file_location('toy_model', path)
    toy = importlib.util.module_from_spec(spec)
    sys.modules['toy_model'] = toy
    spec.loader.exec_module(toy)
    return toy.build_toy(tmp_path_factory.mktemp('models') / 'toy').path


def message(kind: str, **fields: object) -> object:
    return TYPES.types[kind](**fields)


def header(stamp_ns: int, frame_id: str) -> object:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    stamp = message('builtin_interfaces/msg/Time', sec=seconds, nanosec=nanoseconds)
    return message('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)


def pose(x: float, y: float, yaw: float) -> object:
    turn = {'x': 0.0, 'y': 0.0, 'z': math.sin(yaw / 2), 'w': math.cos(yaw / 2)}
    return message(
        'geometry_msgs/msg/Pose',
        position=message('geometry_msgs/msg/Point', x=x, y=y, z=0.0),
        orientation=message('geometry_msgs/msg/Quaternion', **turn),
    )


def vector(x: float = 0.0, z: float = 0.0) -> object:
    return message('geometry_msgs/msg/Vector3', x=x, y=0.0, z=z)


def odometry(stamp_ns: int, x: float, speed_mps: float) -> object:
    zeros = np.zeros(36)
    twist = message('geometry_msgs/msg/Twist', linear=vector(speed_mps), angular=vector())
    return message(
        'nav_msgs/msg/Odometry',
        header=header(stamp_ns, 'odom'),
        child_frame_id='base_link',
        pose=message(
            'geometry_msgs/msg/PoseWithCovariance', pose=pose(x, 0.0, 0.0), covariance=zeros
        ),
        twist=message('geometry_msgs/msg/TwistWithCovariance', twist=twist, covariance=zeros),
    )


def route(frame_id: str = 'odom') -> object:
    poses = [
        message(
            'geometry_msgs/msg/PoseStamped',
            header=header(0, frame_id),
            pose=pose(15.0 * i, 0.0, 0.0),
        )
        for i in range(20)
    ]
    return message('nav_msgs/msg/Path', header=header(0, frame_id), poses=poses)


def compressed(stamp_ns: int, picture: np.ndarray) -> object:
    _, data = cv2.imencode('.jpg', picture)
    return message(
        'sensor_msgs/msg/CompressedImage',
        header=header(stamp_ns, 'camera'),
        format='jpeg',
        data=data.ravel(),
    )


def write_bag(folder: Path, content: list[tuple[str, str, int, object]]) -> Path:
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, kind, stamp_ns, item in content:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=TYPES)
            data = item if isinstance(item, bytes) else TYPES.serialize_cdr(item, kind)
            writer.write(connections[topic], stamp_ns, data)
    return folder


def straight_drive(pictures: list[np.ndarray], hz: float, speed_mps: float = 8.0) -> list:
    """Pictures at a rate, odometry of a straight drive at 50 Hz, and its route."""
    begin_ns = 1_000_000_000
    seconds = len(pictures) / hz
    content = [('/route', 'nav_msgs/msg/Path', begin_ns, route())]
    for k in range(round(seconds * 50)):
        stamp_ns = begin_ns + round(k / 50 * 1e9)
        item = odometry(stamp_ns, speed_mps * k / 50, speed_mps)
        content.append(('/odom', 'nav_msgs/msg/Odometry', stamp_ns, item))
    for k, picture in enumerate(pictures):
        stamp_ns = begin_ns + round(k / hz * 1e9)
        kind = 'sensor_msgs/msg/CompressedImage'
        content.append(('/cam/compressed', kind, stamp_ns, compressed(stamp_ns, picture)))
    return sorted(content, key=lambda entry: entry[2])


def grey(count: int) -> list[np.ndarray]:
    return [np.full((56, 112, 3), 100 + k, np.uint8) for k in range(count)]


def replay(bag: Path, model: Path, out: Path, *more: str) -> int:
    words = ['replay', str(bag), '--model', str(model), '--backend', 'onnxruntime']
    return cli.main([*words, '--out', str(out), *more])


def results(out: Path) -> tuple[dict, list[dict]]:
    summary = json.loads((out / 'summary.json').read_text())
    lines = (out / 'trajectories.jsonl').read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


@needs_real
def test_a_real_drive_is_planned_twice_the_same(model, tmp_path, capsys):
    for name in ('a', 'b'):
        assert replay(REAL / 'kitti_drive', model, tmp_path / name) == 0
    assert 'replay: 51 of 51 pictures planned' in capsys.readouterr().out
    summary, lines = results(tmp_path / 'a')
    text = (tmp_path / 'a' / 'trajectories.jsonl').read_bytes()
    assert text == (tmp_path / 'b' / 'trajectories.jsonl').read_bytes()
    assert summary['trajectories_sha256'] == hashlib.sha256(text).hexdigest()
    assert summary['plans'] == len(lines) >= 48
    # Two cameras of the model are not on this car, and the first second and a half has no past.
    assert {line['state'] for line in lines} == {'DEGRADED'}
    assert summary['reasons']['camera_missing:front_left'] == len(lines)
    assert 10 <= summary['reasons']['history_short'] <= 20
    assert summary['topics']['route'] == '/route'
    first = lines[0]
    assert first['frame_id'] == 'odom'
    assert np.array(first['poses']).shape == (len(first['times_s']), 3)
    assert all(np.diff([line['stamp_ns'] for line in lines]) > 0)
    page = (tmp_path / 'a' / 'index.html').read_text()
    assert 'src="http' not in page
    assert 'data:image/jpeg' in page


def test_without_the_announced_path_plans_say_so(model, tmp_path):
    content = [e for e in straight_drive(grey(8), 10.0) if e[0] != '/route']
    assert replay(write_bag(tmp_path / 'bag', content), model, tmp_path / 'out') == 0
    summary, lines = results(tmp_path / 'out')
    assert summary['topics']['route'] is None
    assert all('route_missing' in line['reasons'] for line in lines)


@needs_real
def test_real_colour_video_with_a_made_up_drive(model, tmp_path):
    video = cv2.VideoCapture(str(REAL / 'highway_colour.mp4'))
    pictures = []
    while len(pictures) < 30:
        good, picture = video.read()
        assert good
        pictures.append(picture)
    video.release()
    bag = write_bag(tmp_path / 'bag', straight_drive(pictures, 25.0, 20.0))
    assert replay(bag, model, tmp_path / 'out') == 0
    summary, lines = results(tmp_path / 'out')
    assert summary['pictures'] == 30
    assert len(lines) == 30


@needs_real
def test_a_bag_without_a_camera_is_one_sentence(model, tmp_path, capsys):
    assert replay(REAL / 'carla_town01_recording', model, tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert 'no camera topic' in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_cameras_are_drawn_for_a_bag_without_and_said_to_be(model, tmp_path, capsys):
    drive = [item for item in straight_drive(grey(20), 10.0) if item[0] != '/cam/compressed']
    bag = write_bag(tmp_path / 'bag', drive)
    town = ROOT / 'test' / 'data' / 'opendrive' / 'shapes.xodr'
    assert replay(bag, model, tmp_path / 'out', '--draw-cameras', str(town)) == 0
    label = 'drawn by spanvla_ros from shapes.xodr, not recorded'
    assert label in capsys.readouterr().out
    summary, lines = results(tmp_path / 'out')
    # Odometry at 50 Hz for 2 s, a picture each 0.1 s, of all cameras of the model.
    assert summary['pictures'] == 20
    assert summary['pictures_drawn_from'] == {
        'map': 'shapes.xodr',
        'map_sha256': hashlib.sha256(town.read_bytes()).hexdigest(),
    }
    assert set(summary['topics']['images']) == set(CAMERAS)
    assert lines
    assert not any(reason.startswith('camera_missing') for reason in summary['reasons'])
    assert (tmp_path / 'out' / 'index.html').read_text().count(label) > 10


def test_drawn_cameras_beside_recorded_ones_are_refused(model, tmp_path, capsys):
    bag = write_bag(tmp_path / 'bag', straight_drive(grey(5), 10.0))
    town = ROOT / 'test' / 'data' / 'opendrive' / 'shapes.xodr'
    assert replay(bag, model, tmp_path / 'out', '--draw-cameras', str(town)) == 2
    assert 'for a bag without cameras' in capsys.readouterr().err


def test_odometry_of_another_origin_is_moved_to_the_rear_axle(model, tmp_path):
    bag = write_bag(tmp_path / 'bag', straight_drive(grey(5), 10.0))
    poses = []
    for ahead_m in ('0', '1.5'):
        assert replay(bag, model, tmp_path / ahead_m, '--origin-ahead-m', ahead_m) == 0
        poses.append(results(tmp_path / ahead_m)[1][0]['poses'][0])
    assert poses[0][0] - poses[1][0] == pytest.approx(1.5, abs=1e-3)


@pytest.mark.slow
@needs_real
def test_a_real_carla_recording_is_planned_on_drawn_cameras(model, tmp_path):
    words = ['--draw-cameras', str(REAL / 'Town01.xodr'), '--origin-ahead-m', '1.4']
    assert replay(REAL / 'carla_town01_recording', model, tmp_path / 'out', *words) == 0
    summary, _ = results(tmp_path / 'out')
    assert summary['topics']['route'] == '/carla/hero/waypoints'
    assert summary['pictures'] >= 240
    assert summary['pictures_drawn_from']['map'] == 'Town01.xodr'


def test_errors_of_a_constant_drive_are_those_of_the_plans(model, tmp_path):
    speed_mps = 8.0
    bag = write_bag(tmp_path / 'bag', straight_drive(grey(70), 10.0, speed_mps))
    assert replay(bag, model, tmp_path / 'out') == 0
    summary, lines = results(tmp_path / 'out')
    last_s = 1.0 + 349 / 50
    errors, finals = [], []
    for line in lines:
        at_s = line['stamp_ns'] / 1e9 + np.array(line['times_s'])
        truth = np.stack([speed_mps * (at_s - 1.0), np.zeros_like(at_s)], axis=1)
        off = np.hypot(*(np.array(line['poses'])[:, :2] - truth).T)
        errors += off[at_s <= last_s].tolist()
        finals += [off[-1]] if at_s[-1] <= last_s else []
    assert summary['ade_m'] == pytest.approx(np.mean(errors), abs=1e-4)
    assert summary['fde_m'] == pytest.approx(np.mean(finals), abs=1e-4)
    assert summary['open_loop']['full_plans'] == len(finals)


def test_bad_messages_are_counted_not_fatal(model, tmp_path):
    content = straight_drive(grey(10), 10.0)
    broken = content[-1][2] - 50_000_000
    torn = compressed(broken, grey(1)[0])
    torn.data = torn.data[: len(torn.data) // 2]
    nan = odometry(broken, float('nan'), 8.0)
    content += [
        ('/cam/compressed', 'sensor_msgs/msg/CompressedImage', broken, torn),
        ('/odom', 'nav_msgs/msg/Odometry', broken, nan),
        ('/odom', 'nav_msgs/msg/Odometry', broken, b'\x00\x01\x00\x00' + b'\xff' * 40),
        ('/odom', 'nav_msgs/msg/Odometry', broken, b''),
    ]
    bag = write_bag(tmp_path / 'bag', sorted(content, key=lambda entry: entry[2]))
    assert replay(bag, model, tmp_path / 'out') == 0
    refused = ' '.join(results(tmp_path / 'out')[0]['refused_inputs'])
    assert 'truncated JPEG' in refused
    assert 'position holds a number that is not finite' in refused
    assert 'its bytes are no nav_msgs/msg/Odometry' in refused


def test_nothing_but_torch_free_modules_is_loaded(model, tmp_path):
    bag = write_bag(tmp_path / 'bag', straight_drive(grey(5), 10.0))
    words = ['replay', str(bag), '--model', str(model), '--out', str(tmp_path / 'out')]
    code = (
        'import sys; from spanvla_ros.cli import main; '
        f'assert main({words!r}) == 0; '
        "bad = {'torch', 'transformers', 'rclpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


class Topic:
    def __init__(self, topic: str, kind: str) -> None:
        self.topic = topic
        self.msgtype = {
            'image': 'sensor_msgs/msg/Image',
            'jpeg': 'sensor_msgs/msg/CompressedImage',
            'info': 'sensor_msgs/msg/CameraInfo',
            'odom': 'nav_msgs/msg/Odometry',
            'path': 'nav_msgs/msg/Path',
        }[kind]


def found(topics: list[tuple[str, str]], wish: Wish | None = None):
    return find_topics([Topic(*t) for t in topics], wish or Wish({}), CAMERAS, 'bag')


def test_cameras_are_matched_by_name_and_our_outputs_left_out():
    topics = found(
        [
            ('/spanvla/input/front/image', 'image'),
            ('/spanvla/input/front/camera_info', 'info'),
            ('/spanvla/input/front_left/image', 'image'),
            ('/spanvla/output/overlay/compressed', 'jpeg'),
            ('/spanvla/output/path', 'path'),
            ('/spanvla/input/route', 'path'),
            ('/odom', 'odom'),
        ]
    )
    assert topics.images == {
        'front': '/spanvla/input/front/image',
        'front_left': '/spanvla/input/front_left/image',
    }
    assert topics.infos == {'front': '/spanvla/input/front/camera_info'}
    assert topics.route == '/spanvla/input/route'


@pytest.mark.parametrize(
    ('topics', 'wish', 'sentence'),
    [
        ([('/a', 'image'), ('/b', 'image'), ('/o', 'odom')], Wish({}), '--camera front=TOPIC'),
        ([('/a', 'image')], Wish({}), 'no odometry topic'),
        ([('/a', 'image'), ('/o', 'odom'), ('/p', 'odom')], Wish({}), 'choose with --odometry'),
        ([('/a', 'image'), ('/o', 'odom')], Wish({'rear': '/a'}), 'the model has front'),
        ([('/a', 'image'), ('/o', 'odom')], Wish({'front': '/z'}), 'no image topic of that name'),
        ([('/a', 'image'), ('/o', 'odom')], Wish({'front_left': '/a'}), 'times the plans'),
        ([('/a', 'image'), ('/o', 'odom')], Wish({}, '/z'), '--odometry /z'),
        ([('/a', 'image'), ('/o', 'odom')], Wish({}, '', '/o'), '--route /o'),
    ],
)
def test_what_is_missing_or_ambiguous_is_named(topics, wish, sentence):
    with pytest.raises(SpanvlaError, match=sentence):
        found(topics, wish)


def test_a_bag_that_breaks_off_is_one_sentence(model, tmp_path, capsys):
    folder = tmp_path / 'bag'
    writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        topics = {}
        for topic, kind, stamp_ns, item in straight_drive(grey(4), 10.0):
            if topic not in topics:
                topics[topic] = writer.add_connection(topic, kind, typestore=TYPES)
            writer.write(topics[topic], stamp_ns, TYPES.serialize_cdr(item, kind))
    data = bytearray((folder / 'bag.mcap').read_bytes())
    begin = data.index(b'\x28\xb5\x2f\xfd')
    data[begin + 40 : begin + 60] = bytes(20)
    (folder / 'bag.mcap').write_bytes(data)
    for words in (['replay', str(folder), '--model', str(model), '--out', str(tmp_path / 'out')],
                  ['doctor', '--bag', str(folder)]):  # fmt: skip
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert f'{folder}: damaged (' in error
        assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_bag_that_is_none_is_one_sentence(model, tmp_path, capsys):
    (tmp_path / 'x.mcap').write_bytes(b'no bag')
    for name in ('x.mcap', 'nowhere'):
        assert replay(tmp_path / name, model, tmp_path / 'out') == 2
        assert capsys.readouterr().err.count('\n') == 1
