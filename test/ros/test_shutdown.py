"""SIGINT and SIGTERM end every node, and a whole drive, in order and in time.

The nodes are cut by their own timer 2.8 s after the signal, with another status than 0: a status
of 0 says that they ended by then. On a machine that others load a node may miss that once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_messages import TYPES, empty
from rosbags.rosbag2 import StoragePlugin, Writer
from trajectory_msgs.msg import MultiDOFJointTrajectory

from spanvla_ros.report.recording import read_recording
from spanvla_ros.ros import process as process_module
from spanvla_ros.ros.children import NAMESPACE, NodeProcess
from spanvla_ros.ros.drive import NODES

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / 'test' / 'data' / 'opendrive' / 'shapes.xodr'
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TRIES = 3


def parameters(name: str, folder: Path, model: Path) -> dict[str, object]:
    """What each node needs to run at all."""
    return {
        'planner': {'model_dir': str(model)},
        'recorder': {'out': str(folder / f'{time.monotonic_ns()}.mcap')},
        'bridge': {'map': str(long_road(folder)), 'route_m': 200.0},
        'replay': {'bag': str(folder / 'bag'), 'at_end': 'stay', 'clock': False},
    }.get(name, {})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shutdown')
    with Writer(folder / 'bag', version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection('/elsewhere', 'std_msgs/msg/Bool', typestore=TYPES)
        for k in range(5):
            writer.write(
                connection, k, TYPES.serialize_cdr(empty('std_msgs/msg/Bool'), 'std_msgs/msg/Bool')
            )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    'name',
    ['guardian', 'follower', 'recorder', 'planner', 'town', 'carla', 'bridge', 'replay'],
)
def test_a_node_ends_in_order(bus, launch, toy_model, folder, name, number):
    heard = bus.listen('output/trajectory', MultiDOFJointTrajectory, 50)
    for _ in range(TRIES):
        heard.clear()
        bus.lines.clear()
        process = launch(name, **parameters(name, folder, toy_model))
        if ended(bus, process, number, lambda: name != 'guardian' or len(heard) > 5) == 0:
            break
    assert process.exit_status == 0, process.last_line()
    if name == 'guardian':
        bus.spin(0.3)
        last = heard[-1].points
        assert last[0].velocities[0].linear.x > 4.0
        assert last[-1].velocities[0].linear.x == 0.0


def ended(bus, process: NodeProcess, number: signal.Signals, works: Callable[[], bool]) -> int:
    """The exit status of a node that was heard on `/diagnostics`, and then told to go."""
    prefix = f'{NAMESPACE.strip("/")}/{process.name}: '

    def up() -> bool:
        assert process.exit_status is None, process.last_line()
        return works() and any(line.startswith(prefix) for line in bus.lines)

    bus.wait(
        up, lambda: bus.publish('input/odometry', bus.odometry(speed_mps=5.0), 50), seconds=120.0
    )
    process.process.send_signal(number)
    # Again, as a terminal and a launch file both send one.
    process.process.send_signal(signal.SIGINT)
    return process.process.wait(60.0)


def long_road(folder: Path) -> Path:
    """A map with a lane that is long enough for a route."""
    text = MAP.read_text()
    start = text.index('  <road name="1"')
    road = text[start : text.index('</road>', start) + 7].replace('60', '400')
    path = folder / 'long.xodr'
    path.write_text(f'<OpenDRIVE>{road}</OpenDRIVE>')
    return path


def test_a_shutdown_that_hangs_is_cut(tmp_path):
    """Not even a thread of its own could: the interpreter's lock is held for ever."""
    code = (
        'import ctypes, os, signal, sys\n'
        'from rclpy.node import Node\n'
        'from spanvla_ros.ros import process\n'
        'process.HARD_EXIT_S = 0.3\n'
        'class Stuck(Node):\n'
        '    def close(self):\n'
        '        ctypes.PyDLL(None).pause()\n'
        'def make():\n'
        '    node = Stuck("stuck")\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        '    return node\n'
        'sys.exit(process.run_node(make))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == -signal.SIGALRM
    assert process_module.HARD_EXIT_S < 3.0


def test_a_refused_start_that_hangs_at_its_end_is_cut(tmp_path):
    code = (
        'import ctypes, sys\n'
        'from spanvla_ros.ros import process\n'
        'from spanvla_ros.types import SpanvlaError\n'
        'process.HARD_EXIT_S = 0.3\n'
        'process.rclpy.try_shutdown = ctypes.PyDLL(None).pause\n'
        'def make():\n'
        '    raise SpanvlaError("why")\n'
        'sys.exit(process.run_node(make))\n'
    )
    words = [sys.executable, '-c', code]
    done = subprocess.run(words, check=False, timeout=60, cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGALRM
    assert done.stderr == b'why\n'


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS, ids=lambda number: number.name)
def test_a_drive_ends_all_its_nodes(tmp_path, number):
    code = 'import sys; from spanvla_ros.cli import main; sys.exit(main())'
    for attempt in range(TRIES):
        out, log = tmp_path / str(attempt), tmp_path / f'{attempt}.txt'
        words = ['drive', '--seconds', '300', '--scenario', 'mix', '--out', str(out)]
        with open(log, 'wb') as progress:
            drive = subprocess.Popen(
                [sys.executable, '-c', code, *words], cwd=ROOT, stderr=progress
            )
        end_s = time.monotonic() + 180.0
        while b'driving' not in log.read_bytes() and time.monotonic() < end_s:
            time.sleep(0.2)
        time.sleep(2.0)
        drive.send_signal(number)
        time.sleep(0.1)
        drive.send_signal(signal.SIGINT)
        try:
            # It reports what it drove; it did not come to its end.
            assert drive.wait(240) == 1
        finally:
            drive.kill()
            drive.wait()
        summary = json.loads((out / 'summary.json').read_text())
        assert summary['broke_off'] == 'interrupted'
        assert set(summary['exit_status']) == set(NODES)
        if not any(summary['exit_status'].values()):
            break
    assert summary['exit_status'] == dict.fromkeys(NODES, 0)
    last = read_recording(out / 'drive.mcap').outputs[-1]
    assert last.speeds_mps[-1] == 0.0
