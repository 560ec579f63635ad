"""`spanvla drive` as a user runs it, and what it does when the planner is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from report.drive_bag import small_drive
from rosbags.highlevel import AnyReader

from spanvla_ros import cli
from spanvla_ros.report.drive_summary import summarise
from spanvla_ros.ros import drive as drive_command

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


def read(path: Path) -> tuple[np.ndarray, list[tuple[int, dict]], list[tuple[int, float]]]:
    """Arrival of outputs, states and speeds."""
    outputs, states, speeds = [], [], []
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
                speeds.append((received_ns, message.twist.twist.linear.x))
    return np.array(outputs), states, speeds


@pytest.mark.slow
def test_a_killed_planner_stops_the_car_and_comes_back(toy_model, tmp_path):
    out = tmp_path / 'out'
    words = ('--seconds', '25', '--scenario', 'lane_keeping', '--model', str(toy_model))
    drive = subprocess.Popen(spanvla('drive', *words, '--out', str(out)), cwd=ROOT)
    deadline_s = time.monotonic() + 60
    pid, part = None, out / 'drive.part' / 'drive.part.mcap'
    while time.monotonic() < deadline_s and not (pid and part.exists()):
        pid = child_of(drive.pid, 'spanvla_ros.ros.planner_node')
        time.sleep(0.2)
    assert pid is not None
    time.sleep(12.0)
    killed_ns = time.time_ns()
    os.kill(pid, signal.SIGKILL)
    assert drive.wait(90) == 0
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['restarts']['planner'] == 1
    outputs, states, speeds = read(out / 'drive.mcap')
    last_ns = speeds[-1][0]
    gaps_ms = np.diff(outputs[outputs < last_ns]) / 1e6
    assert gaps_ms.max() <= 100.0
    after = [state for at, state in states if killed_ns < at < last_ns]
    assert any(state['state'] == 'FALLBACK' for state in after)
    back = next(i for i, state in enumerate(after) if state['state'] == 'FALLBACK')
    assert any(state['state'] in ('OK', 'DEGRADED') for state in after[back:])
    driven = [speed for at, speed in speeds if at > killed_ns]
    assert min(driven) < max(speed for at, speed in speeds if at < killed_ns)
    assert all(math.isfinite(speed) for speed in driven)


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
