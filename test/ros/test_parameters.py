"""The parameter file, the launch files and the declared parameters say the same."""

from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import rclpy
import yaml
from rclpy.node import Node

from spanvla_ros.ros import parameters
from spanvla_ros.ros.parameters import PlannerSettings, TownSettings, declare
from spanvla_ros.types import SpanvlaError

ROOT = Path(__file__).resolve().parents[2]
NODES = ('planner', 'guardian', 'follower', 'recorder', 'town', 'carla', 'bridge', 'replay')


def settings_of(node: str) -> type:
    return getattr(parameters, f'{node.capitalize()}Settings')


@pytest.mark.parametrize('node', NODES)
def test_the_parameter_file_holds_the_defaults(node):
    content = yaml.safe_load((ROOT / 'config' / 'spanvla.param.yaml').read_text())
    written = content[f'/**/{node}']['ros__parameters']
    kind = settings_of(node)
    expected = {
        entry.name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for entry in fields(kind)
    }
    assert written == expected
    for name, value in written.items():
        assert type(value) is type(expected[name])


def test_the_carla_overlay_sets_parameters_that_exist():
    content = yaml.safe_load((ROOT / 'config' / 'carla.param.yaml').read_text())
    for node, parts in content.items():
        kind = {entry.name: entry for entry in fields(settings_of(node.removeprefix('/**/')))}
        written = parts['ros__parameters']
        assert written.pop('use_sim_time') is True
        for name, value in written.items():
            assert type(value) is type(kind[name].default)
            assert value in (kind[name].metadata['choices'] or (value,))
            assert value != kind[name].default


@pytest.fixture
def context(domain):
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain, args=[])
    yield context
    context.try_shutdown()


def node_with(context, *arguments: str) -> Node:
    return rclpy.create_node('planner', context=context, cli_args=['--ros-args', *arguments])


def test_the_parameter_file_reaches_the_node(context):
    node = node_with(context, '--params-file', str(ROOT / 'config' / 'spanvla.param.yaml'))
    assert declare(node, PlannerSettings) == PlannerSettings()
    node.destroy_node()


@pytest.mark.parametrize(
    ('kind', 'argument', 'word'),
    [
        (PlannerSettings, 'backend:=abacus', 'choose from'),
        (PlannerSettings, 'sync_wait_ms:=1000.0', 'sync_wait_ms'),
        (PlannerSettings, 'steps:=many', 'steps'),
        (TownSettings, 'camera_hz:=0.1', 'camera_hz'),
    ],
)
def test_a_bad_value_is_one_sentence(context, kind, argument, word):
    node = node_with(context, '-p', argument)
    with pytest.raises(SpanvlaError, match=word):
        declare(node, kind)
    node.destroy_node()


@pytest.mark.parametrize('name', ['demo', 'vehicle'])
def test_launch_files_set_parameters_that_exist(name):
    tree = ElementTree.parse(ROOT / 'launch' / f'{name}.launch.xml')
    for node in tree.iter('node'):
        known = {entry.name for entry in fields(settings_of(node.get('name')))} | {'use_sim_time'}
        named = {param.get('name') for param in node.iter('param') if param.get('name')}
        assert named <= known
        assert node.get('exec') == f'{node.get("name")}_node'


# Cameras are named by the model, and the guardian's plan comes from the planner beside it.
INPUTS = {
    'guardian': {'odometry', 'acceleration', 'route'},
    'planner': {'odometry', 'acceleration', 'route', 'command'},
    'follower': {'odometry'},
    'recorder': {'odometry', 'acceleration', 'route', 'command'},
}


def test_every_input_of_the_vehicle_has_its_argument():
    tree = ElementTree.parse(ROOT / 'launch' / 'vehicle.launch.xml')
    for node in tree.iter('node'):
        remaps = {item.get('from'): item.get('to') for item in node.iter('remap')}
        for name in INPUTS[node.get('name')]:
            assert remaps[f'input/{name}'] == f'$(var {name})'
        if 'output_frame' in {entry.name for entry in fields(settings_of(node.get('name')))}:
            given = {item.get('name'): item.get('value') for item in node.iter('param')}
            assert given['output_frame'] == '$(var output_frame)'


@pytest.mark.parametrize('name', ['demo', 'vehicle'])
def test_launch_arguments_are_declared_and_explained(name):
    path = ROOT / 'launch' / f'{name}.launch.xml'
    tree = ElementTree.parse(path)
    declared = {arg.get('name'): arg for arg in tree.getroot().findall('arg')}
    assert all(arg.get('description') for arg in declared.values())
    text = path.read_text()
    for part in text.split('$(var ')[1:]:
        assert part.split(')')[0] in declared
    for include in tree.iter('include'):
        target = include.get('file').rsplit('/', 1)[1]
        offered = {
            arg.get('name')
            for arg in ElementTree.parse(ROOT / 'launch' / target).getroot().findall('arg')
        }
        assert {arg.get('name') for arg in include.findall('arg')} <= offered
