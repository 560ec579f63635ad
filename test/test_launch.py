"""Launch files, profiles and the policy: they parse, and all they name exists."""

from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spanvla_ros.ros.parameters import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / 'launch').glob('*.launch.xml'))
# Cameras are named by the model, and the guardian's plan comes from the planner beside it.
INPUTS = {
    'guardian': {'odometry', 'route'},
    'planner': {'odometry', 'acceleration', 'route', 'command'},
    'shadow': {'odometry', 'acceleration', 'route', 'command'},
    'follower': {'odometry', 'vehicle_info'},
    'recorder': {'odometry', 'acceleration', 'route', 'command'},
}
DDS = '{http://www.eprosima.com}'


@pytest.fixture(params=FILES, ids=[path.name for path in FILES])
def file(request):
    return request.param


def test_all_four_are_there():
    assert {f.name.split('.')[0] for f in FILES} == {'vehicle', 'replay', 'carla', 'demo'}


def test_nodes_and_parameters_exist(file):
    for node in ElementTree.parse(file).iter('node'):
        name, executable = node.get('name'), node.get('exec')
        assert (ROOT / 'spanvla_ros' / 'ros' / f'{executable}.py').is_file()
        known = {entry.name for entry in fields(SETTINGS[name])} | {'use_sim_time'}
        assert {p.get('name') for p in node.iter('param') if p.get('name')} <= known


def test_arguments_are_declared_explained_and_offered(file):
    tree, text = ElementTree.parse(file), file.read_text()
    declared = {arg.get('name'): arg for arg in tree.getroot().findall('arg')}
    assert all(arg.get('description') for arg in declared.values())
    used = {part.split(')')[0] for part in text.split('$(var ')[1:]}
    assert used == set(declared)
    for include in tree.iter('include'):
        target = ROOT / 'launch' / include.get('file').rsplit('/', 1)[1]
        offered = {arg.get('name') for arg in ElementTree.parse(target).getroot().findall('arg')}
        assert {arg.get('name') for arg in include.findall('arg')} <= offered


def test_files_named_exist(file):
    for part in file.read_text().split('$(find-pkg-share spanvla_ros)/')[1:]:
        name = part.split('"')[0]
        names = [name.replace('$(var dds)', dds) for dds in ('shm', 'udp', 'default')]
        assert all((ROOT / n).exists() for n in names), name


def test_every_input_of_the_vehicle_has_its_argument():
    for node in ElementTree.parse(ROOT / 'launch' / 'vehicle.launch.xml').iter('node'):
        remaps = {item.get('from'): item.get('to') for item in node.iter('remap')}
        for name in INPUTS[node.get('name')]:
            assert remaps[f'input/{name}'] == f'$(var {name})'
        given = {item.get('name'): item.get('value') for item in node.iter('param')}
        if 'output_frame' in {entry.name for entry in fields(SETTINGS[node.get('name')])}:
            assert given['output_frame'] == '$(var output_frame)'


def test_the_recorder_hears_what_the_planner_sees_and_the_vehicle_is_told():
    nodes = ElementTree.parse(ROOT / 'launch' / 'vehicle.launch.xml').iter('node')
    remaps = {
        node.get('name'): {item.get('from'): item.get('to') for item in node.iter('remap')}
        for node in nodes
    }
    heard = remaps['recorder']
    assert remaps['planner'].items() <= heard.items()
    assert heard['output/twist'] == remaps['follower']['output/twist']


def test_nothing_of_the_shadow_reaches_the_guardian():
    nodes = ElementTree.parse(ROOT / 'launch' / 'vehicle.launch.xml').iter('node')
    shadow = next(node for node in nodes if node.get('name') == 'shadow')
    remaps = {item.get('from'): item.get('to') for item in shadow.iter('remap')}
    for topic in ('plan', 'output/reasoning', 'output/overlay/compressed'):
        assert remaps[topic].startswith('shadow/')
    assert shadow.get('if') == '$(var shadow)'


def test_profiles_differ_in_their_shared_memory():
    def transports(name):
        tree = ElementTree.parse(ROOT / 'config' / f'fastdds_{name}.xml')
        assert len(list(tree.iter(f'{DDS}participant'))) == 1
        return {
            entry.find(f'{DDS}type').text: entry.findtext(f'{DDS}segment_size')
            for entry in tree.iter(f'{DDS}transport_descriptor')
        }

    assert transports('shm') == {'SHM': str(256 * 2**20), 'UDPv4': None}
    assert transports('udp') == {'UDPv4': None}
    assert transports('default') == {}


def test_the_policy_names_each_node_of_the_vehicle_and_its_inputs():
    policy = ElementTree.parse(ROOT / 'config' / 'sros2' / 'policy.xml')
    profiles = {profile.get('node'): profile for profile in policy.iter('profile')}
    assert set(profiles) == set(INPUTS)
    for node, profile in profiles.items():
        heard = {
            topic.text
            for topics in profile.findall('topics')
            if topics.get('subscribe') == 'ALLOW'
            for topic in topics
        }
        assert {f'input/{name}' for name in INPUTS[node]} <= heard


def test_the_service_ends_its_nodes_by_sigint():
    lines = (ROOT / 'config' / 'systemd' / 'spanvla.service').read_text().splitlines()
    assert {'KillSignal=SIGINT', 'KillMode=mixed', 'TimeoutStopSec=10'} <= set(lines)
