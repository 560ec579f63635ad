"""`spanvla drive` as a user runs it, and what it does when the planner is killed."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from report.drive_bag import small_drive
from rosbags.highlevel import AnyReader

from spanvla_ros import cli
from spanvla_ros.geometry import box_corners
from spanvla_ros.report.drive_summary import summarise
from spanvla_ros.ros import drive as drive_command
from spanvla_ros.town.roads import LANE_WIDTH_M
from spanvla_ros.town.scenarios import make_world
from spanvla_ros.types import Vehicle

ROOT = Path(__file__).resolve().parents[2]


def spanvla(*words: str) -> list[str]:
    code = 'import sys; from spanvla_ros.cli import main; sys.exit(main())'
    return [sys.executable, '-c', code, *words]


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (('--seconds', '0'), '--seconds 0'),
        (('--camera-hz', '500'), '--camera-hz'),
        (('--scenario', 'moon'), 'choose from'),
        (('--seed', '-1'), '--seed'),
        (('--set', 'planner.colour=red'), 'planner has'),
        (('--set', 'nonsense'), 'NODE.PARAMETER=VALUE'),
        (('--set', 'planner.camera_topics=[a'), 'not a YAML value'),
        (('--model', '/nowhere'), '/nowhere'),
        (('--vehicle', '/nowhere.yaml'), '/nowhere.yaml'),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(words, sentence, tmp_path, capsys):
    out = tmp_path / 'out'
    assert cli.main(['drive', '--out', str(out), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count('\n') == 1
    assert not out.exists()


@pytest.mark.slow
def test_a_node_that_refuses_its_parameters_is_why_nothing_was_driven(tmp_path, capfd):
    assert cli.main(['drive', '--out', str(tmp_path / 'out'), '--backend', 'abacus']) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert 'the planner node ended with status 2' in said
    assert "backend is 'abacus'; choose from auto" in said


def test_the_vehicle_reaches_every_node_and_the_summary(tmp_path, toy_model):
    vehicle = tmp_path / 'wide.yaml'
    vehicle.write_text('width_m: 14.0')
    words = ['--model', str(toy_model), '--vehicle', str(vehicle)]
    parser = cli.command_parser('drive', drive_command)
    options = parser.parse_args([*words, '--out', str(tmp_path)])
    drive = drive_command.Drive(options, tmp_path, 1)
    for name in ('guardian', 'follower', 'town'):
        assert drive.nodes[name].parameters['vehicle_file'] == str(vehicle)
    recording = small_drive().write(tmp_path / 'bag')
    # The second car stands 6 m beside the way.
    assert summarise(recording)['collisions'] == 1
    assert drive_command.report(recording, drive, '') == 0
    assert json.loads((tmp_path / 'summary.json').read_text())['collisions'] == 2


def child_of(parent: int, module: str) -> int | None:
    for entry in Path('/proc').iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / 'cmdline').read_bytes().split(b'\0')
            above = int((entry / 'stat').read_text().rpartition(')')[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if above == parent and module.encode() in words:
            return int(entry.name)
    return None


def told_speed_mps(log: Path) -> float:
    """The speed in the newest progress line of a drive."""
    found = re.findall(r'([0-9.]+) m/s', log.read_text(errors='replace'))
    return float(found[-1]) if found else 0.0


def wait_for(met, seconds: float, each=lambda: time.sleep(0.05)) -> None:
    end_s = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end_s
        each()


@dataclass
class Told:
    """Arrival of outputs, of states, and of odometry with its pose and speed."""

    outputs_ns: np.ndarray
    states: list[tuple[int, dict]]
    odometry_ns: np.ndarray
    poses: np.ndarray
    speeds_mps: np.ndarray


def read(path: Path) -> Told:
    outputs, states, odometry = [], [], []
    with AnyReader([path]) as reader:
        for connection, received_ns, raw in reader.messages():
            name = connection.topic.removeprefix('/spanvla/')
            if name == 'output/trajectory':
                outputs.append(received_ns)
            elif name == 'output/state':
                message = reader.deserialize(raw, connection.msgtype)
                states.append((received_ns, json.loads(message.data)))
            elif name == 'input/odometry':
                message = reader.deserialize(raw, connection.msgtype)
                pose, speed = message.pose.pose, message.twist.twist.linear.x
                yaw = 2.0 * math.atan2(pose.orientation.z, pose.orientation.w)
                odometry.append((received_ns, pose.position.x, pose.position.y, yaw, speed))
    table = np.array([row[1:] for row in odometry])
    arrivals = np.array([row[0] for row in odometry])
    return Told(np.array(outputs), states, arrivals, table[:, :3], table[:, 3])


def lane_room_m(told: Told, at: int, seed: int) -> float:
    """How far the corners of the car at odometry `at` lie within the lane it started in."""
    corridor, vehicle = make_world('lane_keeping', seed).corridor, Vehicle()
    s_m, lane_m = corridor.locate(*told.poses[0, :2], 40.0)
    x, y, yaw = told.poses[at]
    reach_m = vehicle.rear_axle_to_center_m
    middle = (x + reach_m * math.cos(yaw), y + reach_m * math.sin(yaw), yaw)
    driven_m = float(np.hypot(*np.diff(told.poses[: at + 1, :2], axis=0).T).sum())
    offsets = [
        corridor.locate(*corner, s_m + driven_m)[1] - lane_m
        for corner in box_corners(middle, vehicle.length_m, vehicle.width_m)
    ]
    return 0.5 * LANE_WIDTH_M - max(abs(offset) for offset in offsets)


@pytest.mark.slow
def test_a_killed_planner_stops_the_car_and_comes_back(tmp_path):
    out, log, seed = tmp_path / 'out', tmp_path / 'progress.txt', 0
    words = ('--seconds', '40', '--scenario', 'lane_keeping', '--seed', str(seed))
    with open(log, 'wb') as progress:
        drive = subprocess.Popen(
            spanvla('drive', *words, '--out', str(out)), cwd=ROOT, stderr=progress
        )
    wait_for(lambda: told_speed_mps(log) > 4.0, 120.0)
    kills_ns: list[int] = []

    def kill():
        # Again and again, before the next one has loaded its model: the car has to do without.
        pid = child_of(drive.pid, 'spanvla_ros.ros.planner_node')
        if pid is not None:
            kills_ns.append(time.time_ns())
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)

    wait_for(lambda: told_speed_mps(log) == 0.0, 30.0, kill)
    assert drive.wait(120) == 0
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['restarts']['planner'] == len(kills_ns) > 1
    told = read(out / 'drive.mcap')
    moving_ns, last_ns = told.odometry_ns[np.argmax(told.speeds_mps > 0.1)], told.odometry_ns[-1]
    outputs_ns = told.outputs_ns[(told.outputs_ns > moving_ns) & (told.outputs_ns < last_ns)]
    assert np.diff(outputs_ns).max() <= 100_000_000

    standing = (told.odometry_ns > kills_ns[0]) & (told.speeds_mps < 0.02)
    assert standing.any()
    stood = int(np.argmax(standing))
    assert lane_room_m(told, stood, seed) > 0.0
    before = told.speeds_mps[(told.odometry_ns > kills_ns[0])][:stood]
    assert before[0] > 3.0
    during = [state for at, state in told.states if kills_ns[0] < at < told.odometry_ns[stood]]
    assert 'FALLBACK' in [state['state'] for state in during]
    assert {state['state'] for state in during} <= {'OK', 'DEGRADED', 'FALLBACK'}
    assert any('comfortable_stop' in state['reasons'] for state in during)

    after = [state['state'] for at, state in told.states if kills_ns[-1] < at < last_ns]
    assert any(state in ('OK', 'DEGRADED') for state in after)
    assert told.speeds_mps[stood:].max() > 2.0
    assert math.dist(told.poses[-1, :2], told.poses[stood, :2]) > 5.0


def test_nodes_of_a_killed_drive_end_by_themselves(domain, tmp_path):
    code = (
        'import sys, time; from pathlib import Path; '
        'from spanvla_ros.ros.children import NodeProcess, private_environment; '
        f'log = Path({str(tmp_path)!r}); '
        f'node = NodeProcess("recorder", {{"out": str(log / "x.mcap")}}, '
        f'private_environment({domain}, log), log); '
        'node.start(); print(node.process.pid, flush=True); time.sleep(60)'
    )
    starter = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    deadline_s = time.monotonic() + 20
    while not (tmp_path / 'x.part').exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    while Path(f'/proc/{pid}').exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not Path(f'/proc/{pid}').exists()
    assert (tmp_path / 'x.mcap').exists()
