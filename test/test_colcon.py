"""colcon builds the package in a clean workspace, and what it installs starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = ('.*', 'out', 'build', 'dist', '__pycache__', '*.egg-info', 'engines', 'test')
COLCON = shutil.which('colcon')


@pytest.mark.slow
@pytest.mark.skipif(COLCON is None, reason='colcon is not installed')
@pytest.mark.parametrize('words', [(), ('--symlink-install',)], ids=['copied', 'linked'])
def test_a_clean_workspace_builds_and_what_it_installs_starts(tmp_path, words):
    source = tmp_path / 'src' / 'spanvla_ros'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    done = colcon(tmp_path, 'build', *words)
    assert done.returncode == 0, done.stderr
    assert '1 package finished' in done.stdout
    prefix = tmp_path / 'install' / 'spanvla_ros'

    # As an ament package, or `ros2 launch` would not find it.
    index = prefix / 'share' / 'ament_index' / 'resource_index' / 'packages'
    assert (index / 'spanvla_ros').exists()
    share = prefix / 'share' / 'spanvla_ros'
    assert any((share / 'hook').glob('ament_prefix_path*'))
    for folder in ('launch', 'config', 'models'):
        written = {p.relative_to(source / folder) for p in files(source / folder)}
        assert written == {p.relative_to(share / folder) for p in files(share / folder)}
    nodes = {p.stem for p in (source / 'spanvla_ros' / 'ros').glob('*_node.py')}
    installed = {p.name for p in (prefix / 'lib' / 'spanvla_ros').iterdir()}
    assert installed == nodes | {'spanvla'}

    # The installed command finds the installed model, from a folder that is neither.
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    line = f'. {tmp_path}/install/local_setup.sh && {prefix}/lib/spanvla_ros/spanvla doctor'
    told = subprocess.run(
        ['bash', '-c', f'{line} --seconds 0 --json'],
        cwd=elsewhere, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert 'model_broken' not in {f['id'] for f in json.loads(told.stdout)['findings']}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob('*') if path.is_file()]


def environment() -> dict[str, str]:
    """Without this checkout on the path, and without a ROS domain of the tests."""
    hidden = ('AMENT_PREFIX_PATH', 'ROS_DOMAIN_ID')
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    others = [p for p in kept.get('PYTHONPATH', '').split(os.pathsep) if p not in ('', str(ROOT))]
    return kept | {'PYTHONPATH': os.pathsep.join(others)}


def colcon(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH']))
    return subprocess.run(
        [sys.executable, COLCON, *words],
        cwd=workspace,
        env=environment() | {'PATH': path},
        capture_output=True,
        text=True,
        check=False,
    )
