"""The parameter file, the launch files and the declared parameters say the same."""

from dataclasses import fields
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.node import Node
from rclpy.parameter import Parameter

from spanvla_ros.ros import parameter_files
from spanvla_ros.ros.parameter_files import parameter_page, parameter_yaml
from spanvla_ros.ros.parameters import SETTINGS, PlannerSettings, TownSettings, declare
from spanvla_ros.types import SpanvlaError

ROOT = Path(__file__).resolve().parents[2]


def test_parameter_file_and_reference_are_current():
    again = 'run: python -m spanvla_ros.ros.parameter_files'
    assert (ROOT / parameter_files.YAML_FILE).read_text() == parameter_yaml(), again
    assert (ROOT / parameter_files.PAGE_FILE).read_text() == parameter_page(), again


@pytest.mark.parametrize('node', SETTINGS)
def test_the_parameter_file_holds_the_defaults(node):
    content = yaml.safe_load((ROOT / 'config' / 'spanvla.param.yaml').read_text())
    written = content[f'/**/{node}']['ros__parameters']
    expected = {
        entry.name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for entry in fields(SETTINGS[node])
    }
    assert written == expected
    for name, value in written.items():
        assert type(value) is type(expected[name])


@pytest.mark.parametrize(('name', 'simulated'), [('carla', True), ('jetson', None)])
def test_an_overlay_sets_parameters_that_exist(name, simulated):
    content = yaml.safe_load((ROOT / 'config' / f'{name}.param.yaml').read_text())
    for node, parts in content.items():
        kind = {entry.name: entry for entry in fields(SETTINGS[node.removeprefix('/**/')])}
        written = parts['ros__parameters']
        assert written.pop('use_sim_time', None) is simulated
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


@pytest.mark.parametrize(
    ('argument', 'word'),
    [('overlay_hz:=.nan', 'overlay_hz'), ('missing_camera:=black', 'choose from')],
)
def test_what_ros_would_let_through_is_refused(context, argument, word):
    node = node_with(context, '-p', argument)
    with pytest.raises(SpanvlaError, match=word):
        declare(node, PlannerSettings)
    node.destroy_node()


def test_a_running_node_applies_live_values_and_refuses_the_rest(context):
    node = node_with(context)
    told = []
    declare(node, PlannerSettings, told.append)

    def set_(*pairs):
        return node.set_parameters_atomically([Parameter(n, value=v) for n, v in pairs])

    assert set_(('overlay_hz', 5.0), ('reason_slice_ms', 4.0)).successful
    assert (told[-1].overlay_hz, told[-1].reason_slice_ms) == (5.0, 4.0)
    for name, value in (
        ('backend', 'torch'),
        ('overlay_hz', 99.0),
        ('overlay_hz', float('nan')),
        ('overlay_hz', 'fast'),
    ):
        result = set_(('sync_wait_ms', 3.0), (name, value))
        assert not result.successful
        assert result.reason
    assert len(told) == 1
    assert node.get_parameter('sync_wait_ms').value == 8.0
    assert set_(('vision_every', 2)).successful
    assert (told[-1].overlay_hz, told[-1].vision_every) == (5.0, 2)
    node.destroy_node()
