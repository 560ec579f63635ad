"""The launch files under the real `ros2 launch`, which comes from apt and not as a wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spanvla_ros.ros.children import private_environment

ROOT = Path(__file__).resolve().parents[2]
ROS2 = shutil.which('ros2')
INSTALLED = ROS2 is not None and all(
    importlib.util.find_spec(name) for name in ('ros2launch', 'launch_ros', 'launch_xml')
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason='ros2 launch is not installed'),
]
TRIES = 3


@pytest.fixture(scope='module')
def prefix(tmp_path_factory) -> Path:
    """An install prefix as colcon leaves it, whose programs are those of this checkout."""
    prefix = tmp_path_factory.mktemp('prefix')
    share, programs = prefix / 'share' / 'spanvla_ros', prefix / 'lib' / 'spanvla_ros'
    index = prefix / 'share' / 'ament_index' / 'resource_index' / 'packages'
    for folder in (share, programs, index):
        folder.mkdir(parents=True)
    (index / 'spanvla_ros').touch()
    # Launch files are looked for below the share folder, through no linked folders.
    for name in ('launch', 'config', 'models'):
        shutil.copytree(ROOT / name, share / name, ignore=shutil.ignore_patterns('engines'))
    for path in (ROOT / 'spanvla_ros' / 'ros').glob('*_node.py'):
        program = programs / path.stem
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} -m spanvla_ros.ros.{path.stem} "$@"\n'
        )
        program.chmod(0o755)
    return prefix


@pytest.fixture
def environment(prefix, domain, tmp_path) -> dict[str, str]:
    made = private_environment(domain, tmp_path)
    # A drive's nodes watch their parent; here that is the launch process.
    made.pop('SPANVLA_PARENT_PID')
    others = [p for p in made.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    return made | {
        'AMENT_PREFIX_PATH': os.pathsep.join((str(prefix), *others)),
        'PYTHONPATH': os.pathsep.join((str(ROOT), made.get('PYTHONPATH', ''))),
    }


def hear_sigint() -> None:
    """What a shell started in the background inherits SIGINT ignored, and launch goes by that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize('name', ['vehicle', 'replay', 'carla', 'demo'])
def test_a_launch_file_parses_and_shows_its_arguments(environment, tmp_path, name):
    done = subprocess.run(
        [ROS2, 'launch', 'spanvla_ros', f'{name}.launch.xml', '--show-args'],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'log_level'" in done.stdout
    assert 'no description given' not in done.stdout.lower()


@pytest.mark.parametrize(
    ('name', 'words', 'nodes'),
    [
        ('demo', ('scenario:=lane_keeping',), 4),
        ('vehicle', ('record:=true', 'shadow:=true', 'dds:=udp'), 5),
    ],
)
def test_nodes_come_up_and_sigint_ends_them_in_order(environment, tmp_path, name, words, nodes):
    for attempt in range(TRIES):
        log = tmp_path / f'{attempt}.txt'
        with open(log, 'wb') as output:
            launch = subprocess.Popen(
                [ROS2, 'launch', 'spanvla_ros', f'{name}.launch.xml', *words,
                 f'out:={tmp_path}/{attempt}.mcap'],
                env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=hear_sigint,
            )  # fmt: skip
        try:
            end_s = time.monotonic() + 180.0
            while log.read_text().count(': active') < 1 + ('shadow:=true' in words):
                assert launch.poll() is None, log.read_text()
                assert time.monotonic() < end_s, log.read_text()
                time.sleep(0.2)
            time.sleep(1.0)
            launch.send_signal(signal.SIGINT)
            assert launch.wait(30) == 0
        finally:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)
                launch.wait()
        said = log.read_text()
        assert said.count('process started with pid') == nodes
        if said.count('process has finished cleanly') == nodes:
            break
    assert said.count('process has finished cleanly') == nodes, said
