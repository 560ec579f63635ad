"""The package itself: its metadata, its layers, its pinned versions, its commands."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from catkin_pkg.package import parse_package

import spanvla_ros

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'spanvla_ros'
MINORS = ('3.10', '3.11', '3.12', '3.13')

MESSAGE_PACKAGES = {
    'builtin_interfaces',
    'diagnostic_msgs',
    'geometry_msgs',
    'lifecycle_msgs',
    'nav_msgs',
    'rcl_interfaces',
    'rosgraph_msgs',
    'sensor_msgs',
    'std_msgs',
    'std_srvs',
    'trajectory_msgs',
    'visualization_msgs',
}
# Used where installed and asked for; nobody has to have them.
OPTIONAL_MESSAGES = {
    'autoware_planning_msgs',
    'autoware_internal_planning_msgs',
    'autoware_adapi_v1_msgs',
    'ackermann_msgs',
    'carla_msgs',
}
TORCH_HOMES = (
    'model/backbone/',
    'model/expert.py',
    'model/policy.py',
    'model/heads.py',
    'runtime/torch_',
    'runtime/export',
    'training/',
)
TRANSFORMERS_HOMES = ('model/backbone/', 'training/')


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def tops_of(path: Path) -> set[str]:
    return {name.partition('.')[0] for name in imports_of(path)}


def modules() -> list[tuple[str, Path]]:
    found = [(path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob('*.py')]
    assert len(found) > 20
    return found


@pytest.fixture(scope='module')
def setup_arguments():
    """What setup.py hands to setuptools."""
    seen = {}
    original, folder = setuptools.setup, Path.cwd()
    setuptools.setup = lambda **arguments: seen.update(arguments)
    os.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / 'setup.py'))
    finally:
        setuptools.setup = original
        os.chdir(folder)
    return SimpleNamespace(**seen)


def test_package_xml_is_an_ament_python_package():
    package = parse_package(str(ROOT))
    assert package.package_format == 3
    assert package.get_build_type() == 'ament_python'
    assert re.fullmatch(r'[^@\s]+@[^@\s]+\.[a-z]{2,}', package.maintainers[0].email)
    assert package.licenses == ['Apache-2.0']


def test_package_xml_declares_all_that_ros_code_imports():
    declared = {depend.name for depend in parse_package(str(ROOT)).exec_depends}
    assert {'rclpy', 'cv_bridge', 'python3-opencv', 'python3-numpy'} <= declared
    assert 'python3-transforms3d' in declared
    used = set().union(*(tops_of(path) for name, path in modules() if name.startswith('ros/')))
    assert used & MESSAGE_PACKAGES <= declared


def test_one_version_everywhere(setup_arguments):
    assert parse_package(str(ROOT)).version == spanvla_ros.__version__
    assert setup_arguments.version == spanvla_ros.__version__


def test_every_console_script_has_its_function(setup_arguments):
    scripts = setup_arguments.entry_points['console_scripts']
    assert {script.split(' = ')[0] for script in scripts} == {
        'spanvla',
        'planner_node',
        'guardian_node',
        'follower_node',
        'recorder_node',
        'town_node',
        'carla_node',
        'autoware_node',
        'bridge_node',
        'replay_node',
    }
    for script in scripts:
        module, function = script.split(' = ')[1].split(':')
        spec = importlib.util.find_spec(module)
        assert spec is not None, script
        defined = {
            node.name
            for node in ast.parse(Path(spec.origin).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert function in defined, script


def test_scripts_go_where_ros2_run_looks():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    assert parser['develop']['script_dir'] == '$base/lib/spanvla_ros'
    assert parser['install']['install_scripts'] == '$base/lib/spanvla_ros'
    assert (ROOT / 'resource' / 'spanvla_ros').exists()


def test_launch_files_parameters_and_models_are_installed(setup_arguments):
    installed = {
        f'{target}/{Path(name).name}'
        for target, names in setup_arguments.data_files
        for name in names
    }
    assert 'share/ament_index/resource_index/packages/spanvla_ros' in installed
    assert 'share/spanvla_ros/package.xml' in installed
    for top in ('launch', 'config', 'models'):
        for path in (ROOT / top).rglob('*'):
            if path.is_file() and 'engines' not in path.parts:
                assert f'share/spanvla_ros/{path.relative_to(ROOT).as_posix()}' in installed


def test_the_demo_needs_neither_torch_nor_transformers(setup_arguments):
    extras = setup_arguments.extras_require
    asked = [*setup_arguments.install_requires]
    for extra in ('ros', 'onnx', 'town'):
        asked += extras[extra]
    names = {re.split(r'[\[<>=!~ ]', requirement)[0].lower() for requirement in asked}
    assert not names & {'torch', 'torchvision', 'transformers', 'accelerate'}


def test_no_extra_shadows_the_opencv_of_a_vehicle(setup_arguments):
    extras = setup_arguments.extras_require
    onboard = [*setup_arguments.install_requires, *extras['gpu'], *extras['onnx']]
    assert not [requirement for requirement in onboard if requirement.startswith('opencv')]
    assert any(r.startswith('opencv-python>') for r in extras['desktop'])
    everywhere = [r for requirements in extras.values() for r in requirements]
    assert not [r for r in everywhere if r.startswith('torchvision')]


def test_onnxruntime_comes_from_one_of_two_extras(setup_arguments):
    extras = setup_arguments.extras_require
    assert any(r.startswith('onnxruntime-gpu') for r in extras['gpu'])
    assert not any(re.match(r'onnxruntime\b(?!-gpu)', r) for r in extras['gpu'])
    assert 'tensorrt>=10.3' in extras['gpu']


def test_no_package_index_is_named():
    indexes = re.compile(r'\b(pypi|pythonhosted|pytorch|huggingface)\.(org|co)\b')
    tops = ('.ci', 'config', 'docs', 'launch', 'spanvla_ros', 'test')
    paths = [path for top in tops for path in (ROOT / top).rglob('*')]
    for path in (*paths, *ROOT.glob('*.*')):
        if path.suffix in ('.py', '.md', '.yaml', '.toml', '.cfg', '.txt', '.xml', '.rst'):
            assert not indexes.search(path.read_text()), path


@pytest.mark.parametrize('minor', MINORS)
def test_constraints_pin_what_the_extras_ask_for(minor, setup_arguments):
    lines = (ROOT / '.ci' / f'constraints-{minor}.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if line and not line.startswith('#'))
    extras = setup_arguments.extras_require
    asked = [*setup_arguments.install_requires]
    for extra in ('ros', 'onnx', 'town', 'train', 'dev'):
        asked += extras[extra]
    names = {re.split(r'[\[<>=!~ ]', requirement)[0].lower() for requirement in asked}
    assert names <= set(pins)
    assert not {name for name in pins if name.startswith(('nvidia', 'torchvision'))}


def test_the_layers_hold():
    command = [str(Path(sys.executable).with_name('lint-imports')), '--no-cache']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_no_layer_rule_has_an_exception():
    text = (ROOT / 'pyproject.toml').read_text()
    assert 'ignore_imports' not in text
    assert 'unmatched_ignore' not in text


def test_safety_stands_on_types_geometry_numpy_and_the_standard_library():
    allowed = {*sys.stdlib_module_names, 'numpy', 'jaxtyping'}
    homes = ('spanvla_ros.types', 'spanvla_ros.geometry', 'spanvla_ros.safety')
    for name, path in modules():
        if not name.startswith('safety/'):
            continue
        assert tops_of(path) <= {*allowed, 'spanvla_ros'}, name
        own = {module for module in imports_of(path) if module.startswith('spanvla_ros')}
        assert all(module.startswith(homes) for module in own), name


def test_ros_packages_are_imported_under_ros_only():
    ros = {'rclpy', *MESSAGE_PACKAGES, *OPTIONAL_MESSAGES}
    for name, path in modules():
        if not name.startswith('ros/'):
            assert not tops_of(path) & ros, name


def test_cv_bridge_is_asked_for_in_one_place():
    users = [name for name, path in modules() if 'cv_bridge' in tops_of(path)]
    assert all(name.startswith('ros/') or name == 'messages.py' for name in users)


@pytest.mark.parametrize(
    ('package', 'homes'), [('torch', TORCH_HOMES), ('transformers', TRANSFORMERS_HOMES)]
)
def test_heavy_libraries_stay_at_home(package, homes):
    for name, path in modules():
        if not name.startswith(homes):
            assert package not in tops_of(path), name


def test_the_reader_of_a_drive_believes_nothing_it_is_told():
    forbidden = tuple(
        f'spanvla_ros.{part}' for part in ('safety', 'runtime', 'model', 'ros', 'town')
    )
    for name, path in modules():
        if name.startswith('report/'):
            assert not {m for m in imports_of(path) if m.startswith(forbidden)}, name


@pytest.mark.parametrize('module', ['spanvla_ros.town.lockstep', 'spanvla_ros.replay'])
def test_town_and_replay_run_without_torch(module):
    code = (
        f'import sys, {module}\n'
        'sys.exit(", ".join({"torch", "transformers", "rclpy"} & set(sys.modules)) or 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_and_functions_stay_small():
    for name, path in modules():
        text = path.read_text()
        assert text.count('\n') <= 500, name
        assert path.stem not in ('utils', 'helpers', 'common', 'misc', 'manager'), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 75, f'{name}: {node.name}'


def test_the_tree_in_the_readme_is_true():
    readme = ROOT / 'README.md'
    if not readme.exists():
        return
    named = re.findall(
        r'`((?:spanvla_ros|config|launch|models|docs|test|\.ci)/[\w./-]*)`', readme.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]
