"""What the doctor says of a machine: environments made up, the real one asked once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from catkin_pkg.package import parse_package

from spanvla_ros import cli
from spanvla_ros.doctor import command, machine, middleware
from spanvla_ros.doctor.findings import CATALOG, SEVERITIES, Finding, found, sorted_findings
from spanvla_ros.model.checkpoint import shipped_model_dir

ROOT = Path(__file__).resolve().parents[2]


def ids(findings) -> list[str]:
    return [finding.id for finding in findings]


def test_this_machine_has_what_the_tests_need(capsys, monkeypatch):
    for name in ('ROS_DOMAIN_ID', 'RMW_IMPLEMENTATION'):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(['doctor', '--seconds', '0', '--json']) == 0
    findings = json.loads(capsys.readouterr().out)['findings']
    assert all(set(f) == {'id', 'severity', 'what', 'fix'} for f in findings)
    assert all(f['severity'] in SEVERITIES and f['id'] in CATALOG for f in findings)
    assert 'ros_missing' not in [f['id'] for f in findings]


def test_a_blocking_finding_ends_with_1_and_is_printed_with_its_fix(capsys, monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', '300')
    assert cli.main(['doctor', '--seconds', '0']) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "block domain_invalid: ROS_DOMAIN_ID is '300'"
    assert shown[1] == '      fix: export ROS_DOMAIN_ID=0'
    assert shown[-1].startswith('doctor: 1 block, ')


def test_findings_come_worst_first_and_once():
    a, b, c = (Finding(name, level, '', '') for name, level in
               (('a', 'info'), ('b', 'block'), ('c', 'warn')))  # fmt: skip
    assert sorted_findings([a, b, a, c]) == [b, c, a]


@pytest.mark.parametrize(
    ('version', 'wrong'), [((3, 9), True), ((3, 10), False), ((3, 13), False), ((3, 14), True)]
)
def test_the_python_must_be_a_supported_one(version, wrong):
    assert bool(list(machine.check_python(version))) is wrong


def without(monkeypatch, *names: str) -> None:
    real = machine.installed
    monkeypatch.setattr(machine, 'installed', lambda n: n not in names and real(n))


def test_a_missing_library_blocks_with_its_lines(monkeypatch):
    without(monkeypatch, 'cv2', 'tokenizers', 'torch')
    findings = {f.what.partition(' ')[0]: f for f in machine.check_packages()}
    assert findings['cv2'].severity == findings['tokenizers'].severity == 'block'
    assert 'pip install opencv-python-headless' in findings['cv2'].fix
    assert 'sudo apt install python3-opencv' in findings['cv2'].fix
    assert findings['tokenizers'].fix == 'pip install tokenizers'
    assert findings['torch'].severity == 'info'


def test_without_any_engine_nothing_can_plan(monkeypatch):
    without(monkeypatch, *machine.BACKENDS)
    assert 'no_backend' in ids(machine.check_packages())


def test_missing_messages_are_named_by_their_apt_packages(monkeypatch):
    without(monkeypatch, 'nav_msgs', 'std_srvs')
    (finding,) = machine.check_ros({'ROS_DISTRO': 'jazzy'})
    assert finding.id == 'ros_missing'
    assert 'sudo apt install ros-jazzy-nav-msgs ros-jazzy-std-srvs,' in finding.fix


def test_a_sourced_ros_of_another_python_is_told_apart(monkeypatch, tmp_path):
    without(monkeypatch, 'rclpy')
    (tmp_path / 'lib' / 'python3.12' / 'site-packages' / 'rclpy').mkdir(parents=True)
    environment = {'ROS_DISTRO': 'jazzy', 'AMENT_PREFIX_PATH': str(tmp_path)}
    (finding,) = machine.check_ros(environment)
    assert finding.id == 'ros_python'
    assert 'python3.12' in finding.fix


def test_a_model_that_differs_from_its_manifest_blocks(tmp_path):
    assert not list(machine.check_model(''))
    copy = tmp_path / 'model'
    shutil.copytree(shipped_model_dir(), copy)
    (copy / 'normalization.json').write_text('{}')
    (finding,) = machine.check_model(str(copy))
    assert (finding.id, finding.severity) == ('model_broken', 'block')
    assert 'normalization.json' in finding.what
    assert ids(machine.check_model(str(tmp_path / 'nowhere'))) == ['model_broken']


def test_no_gpu_never_blocks(tmp_path, monkeypatch):
    (finding,) = machine.check_gpu(jetson=False, root=tmp_path)
    assert (finding.id, finding.severity) == ('no_gpu', 'info')
    (tmp_path / 'dev').mkdir()
    (tmp_path / 'dev' / 'nvidia0').touch()
    without(monkeypatch, 'tensorrt', 'onnxruntime')
    (finding,) = machine.check_gpu(jetson=False, root=tmp_path)
    assert (finding.id, finding.severity) == ('gpu_unused', 'info')


def test_threads_cores_and_governor(tmp_path):
    one = dict.fromkeys(machine.THREADS, '1')
    assert not list(machine.check_cpu(one, 4, tmp_path))
    assert ids(machine.check_cpu({}, 4, tmp_path)) == ['threads']
    assert ids(machine.check_cpu(one, 1, tmp_path)) == ['few_cores']
    folder = tmp_path / 'sys/devices/system/cpu/cpu0/cpufreq'
    folder.mkdir(parents=True)
    (folder / 'scaling_governor').write_text('powersave\n')
    assert ids(machine.check_cpu(one, 4, tmp_path)) == ['cpu_governor']
    (folder / 'scaling_driver').write_text('intel_pstate\n')
    assert not list(machine.check_cpu(one, 4, tmp_path))


def test_a_jetson_is_told_by_its_files(tmp_path):
    assert not machine.is_jetson(tmp_path)
    (tmp_path / 'proc/device-tree').mkdir(parents=True)
    (tmp_path / 'proc/device-tree/model').write_bytes(b'NVIDIA Jetson AGX Orin Developer Kit\0')
    assert machine.is_jetson(tmp_path)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('NV Power Mode: MAXN\n0\n', []),
        ('NV Power Mode: MAXN_SUPER\n2\n', []),
        ('NV Power Mode: MODE_30W\n2\n', ['power_mode']),
        ('', ['power_unknown']),
    ],
)
def test_the_power_mode_is_read_off_nvpmodel(text, expected):
    assert ids(machine.judge_power_mode(text)) == expected


def test_the_shipped_profile_is_large_and_the_default_is_not(tmp_path):
    shipped = {'FASTDDS_DEFAULT_PROFILES_FILE': str(middleware.profile_path())}
    assert middleware.segment_bytes(shipped) == 256 << 20
    # The largest picture of common cameras, 3840x2160 rgb8, goes through; 4.3 MB does not
    # through the default segment.
    assert middleware.largest_picture_bytes(shipped) > 3840 * 2160 * 3
    assert middleware.largest_picture_bytes({}) < 1600 * 900 * 3
    assert middleware.largest_picture_bytes({'RMW_IMPLEMENTATION': 'rmw_cyclonedds_cpp'}) is None
    assert not list(middleware.check_middleware(shipped, tmp_path / 'none'))
    assert ids(middleware.check_middleware({})) == ['dds_profile_unset']
    assert not list(middleware.check_middleware({'FASTDDS_BUILTIN_TRANSPORTS': 'LARGE_DATA'}))


def test_a_profile_that_is_not_there_or_too_large_for_the_machine(tmp_path, monkeypatch):
    lost = {'FASTDDS_DEFAULT_PROFILES_FILE': str(tmp_path / 'no.xml')}
    assert ids(middleware.check_middleware(lost)) == ['dds_profile_missing']
    huge = tmp_path / 'huge.xml'
    text = middleware.profile_path().read_text()
    huge.write_text(re.sub(r'<segment_size>\d+', f'<segment_size>{1 << 50}', text))
    profile = {'FASTDDS_DEFAULT_PROFILES_FILE': str(huge)}
    assert ids(middleware.check_middleware(profile, tmp_path)) == ['shm_small']


def test_middlewares_that_are_missing_or_others(tmp_path):
    other = {'RMW_IMPLEMENTATION': 'rmw_cyclonedds_cpp', 'AMENT_PREFIX_PATH': str(tmp_path)}
    assert ids(middleware.check_middleware(other)) == ['rmw_missing', 'rmw_other']
    index = tmp_path / 'share/ament_index/resource_index/packages'
    index.mkdir(parents=True)
    (index / 'rmw_cyclonedds_cpp').touch()
    assert ids(middleware.check_middleware(other)) == ['rmw_other']


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, []),
        ({'ROS_DOMAIN_ID': '42'}, []),
        ({'ROS_DOMAIN_ID': 'x'}, ['domain_invalid']),
        ({'ROS_DOMAIN_ID': '233'}, ['domain_invalid']),
        ({'ROS_DOMAIN_ID': '150'}, ['domain_high']),
        ({'ROS_AUTOMATIC_DISCOVERY_RANGE': 'OFF'}, ['discovery_off']),
        ({'ROS_LOCALHOST_ONLY': '1'}, ['discovery_local']),
        ({'ROS_STATIC_PEERS': '10.0.0.2'}, ['discovery_server']),
    ],
)
def test_discovery(environment, expected):
    assert ids(middleware.check_discovery(environment)) == expected


def test_messages_and_apt_packages_are_those_of_package_xml():
    declared = {depend.name for depend in parse_package(str(ROOT)).exec_depends}
    assert set(machine.MESSAGES) <= declared
    apt = {package.apt for package in machine.NEEDED if package.apt}
    assert apt == {name for name in declared if name.startswith('python3-')}


def test_the_pip_line_of_the_docs_holds_all_that_apt_does_not():
    text = (ROOT / 'docs' / 'bring-your-own-rig.md').read_text()
    line = re.search(r'^pip install (.+)$', text, re.M)
    assert {p.pip for p in machine.NEEDED if not p.apt} <= set(line.group(1).split())


def test_a_broken_model_keeps_the_doctor_from_nothing_else(tmp_path, monkeypatch, capsys):
    graph = found('graph_empty', 'nobody there')
    monkeypatch.setattr(command, 'listen', lambda seconds, specs: [graph])
    assert cli.main(['doctor', '--model', str(tmp_path / 'nowhere'), '--seconds', '1']) == 1
    said = capsys.readouterr().out
    assert 'block model_broken: ' in said
    assert 'graph_empty: nobody there' in said
