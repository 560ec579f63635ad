"""The nodes on the wheels of another ROS distribution, and on two at once over real DDS.

`SPANVLA_OTHER_PYTHON` names the interpreter of the second environment; docs/drive.md says how to
make one.
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from spanvla_ros import cli
from spanvla_ros.ros import drive as drive_command
from spanvla_ros.ros.children import private_domain

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get('SPANVLA_OTHER_PYTHON', '')
WORDS = ['--seconds', '20', '--scenario', 'mix', '--seed', '1', '--camera-hz', '5']
# Not ages are asked for here, and a busy machine makes all of them old.
for patience in (
    'guardian.plan_fresh_s=2.0',
    'guardian.plan_max_age_s=3.0',
    'guardian.odometry_timeout_s=2.0',
    'follower.trajectory_timeout_s=2.0',
    'follower.odometry_timeout_s=2.0',
):
    WORDS += ['--set', patience]
# What the wheels of ROS hand to the processes that one of theirs starts.
OF_OUR_WHEELS = ('_ROS_WHEELS_BOOTSTRAP_COMPLETE', 'LD_LIBRARY_PATH', 'AMENT_PREFIX_PATH')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason='SPANVLA_OTHER_PYTHON names no second environment'),
]


def others(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a process of the other interpreter."""
    kept = {name: value for name, value in environment.items() if name not in OF_OUR_WHEELS}
    return {**kept, 'PYTHONPATH': str(ROOT)}


@pytest.fixture(scope='module', autouse=True)
def other_version() -> str:
    code = 'from importlib.metadata import version; print(version("ros-rclpy"))'
    done = subprocess.run(
        [OTHER, '-c', code], env=others(dict(os.environ)), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = done.stdout.strip()
    assert found != version('ros-rclpy'), f'{OTHER} has the wheels of this environment'
    return found


def check(out: Path) -> dict[str, Any]:
    """A drive that planned and ended in order."""
    summary = json.loads((out / 'summary.json').read_text())
    print({name: summary[name] for name in ('plan_hz', 'states', 'distance_m', 'versions')})  # noqa: T201
    assert summary['broke_off'] == ''
    assert set(summary['exit_status'].values()) == {0}
    assert set(summary['restarts'].values()) == {0}
    assert summary['plans'] > 5
    assert summary['invalid_trajectories'] == 0
    assert summary['states'].get('OK', 0.0) > 0.0
    assert summary['distance_m'] > 5.0
    return summary


def test_a_drive_on_the_other_wheels_alone(tmp_path):
    code = 'import sys; from spanvla_ros.cli import main; sys.exit(main())'
    done = subprocess.run(
        [OTHER, '-c', code, 'drive', *WORDS, '--out', str(tmp_path)],
        env=others(dict(os.environ)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(tmp_path)


@pytest.mark.parametrize('theirs', [('town', 'recorder'), ('planner', 'guardian', 'follower')])
def test_a_drive_across_the_two(tmp_path, theirs):
    parser = cli.command_parser('drive', drive_command)
    options = parser.parse_args([*WORDS, '--out', str(tmp_path)])
    with private_domain() as domain:
        drive = drive_command.Drive(options, tmp_path, domain)
        for name in theirs:
            node = drive.nodes[name]
            node.python, node.environment = OTHER, others(dict(node.environment))
        failure = drive.run()
    assert drive_command.report(tmp_path / 'drive.mcap', drive, failure) == 0
    check(tmp_path)
