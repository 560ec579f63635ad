"""`spanvla init`: what it writes for a rig is what the nodes read."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from drives import town_drive
from rigs import record, write

from spanvla_ros import cli
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.ros.parameters import SETTINGS
from spanvla_ros.runtime.virtual_camera import model_mount, read_rig


@pytest.fixture(scope='module')
def drive():
    return town_drive('lane_keeping', 2, TOWN_CAMERAS, seconds=1.0)


def parameters(folder) -> dict[str, dict[str, object]]:
    content = yaml.safe_load((folder / 'rig.param.yaml').read_text())
    found = {}
    for path, parts in content.items():
        node = path.removeprefix('/**/')
        found[node] = parts['ros__parameters']
        assert set(found[node]) <= set(SETTINGS[node].__dataclass_fields__)
    return found


def test_a_rig_with_names_and_transforms(drive, tmp_path, capsys):
    bag = write(record(drive, transforms=True), tmp_path / 'bag')
    out = tmp_path / 'rig'
    assert cli.main(['init', '--bag', str(bag), '--out', str(out)]) == 0
    mounts = read_rig(out / 'rig.yaml')
    for camera in TOWN_CAMERAS:
        wanted = model_mount(camera)
        np.testing.assert_allclose(mounts[camera.name].place_m, wanted.place_m, atol=1e-3)
        np.testing.assert_allclose(
            mounts[camera.name].base_from_optical, wanted.base_from_optical, atol=1e-4
        )
    planner = parameters(out)['planner']
    assert planner == {
        'output_frame': 'odom',
        'extrinsics': 'file',
        'rig_file': str(out / 'rig.yaml'),
    }
    shown = capsys.readouterr().out
    assert 'front_left:=/cam/front_left' in shown
    assert 'odometry:=/odom route:=/route' in shown
    assert 'output_frame' not in shown.splitlines()[-1]


def test_names_that_say_nothing_are_told_by_their_mounts(drive, tmp_path):
    rig = record(drive, transforms=True)
    numbers = {'front': 'cam2', 'front_left': 'cam0', 'front_right': 'cam1'}
    for event in rig.events:
        for name, number in numbers.items():
            # The longest name first would be `front`, a part of the two others.
            event.topic = event.topic.replace(f'/cam/{name}/', f'/rig/{number}/')
        event.topic = event.topic.replace('/image/', '/image_raw/')
        if event.topic == '/odom':
            event.frame = 'map'
    rig.offers = {event.topic: (True, False) for event in rig.events}
    out = tmp_path / 'rig'
    assert cli.main(['init', '--bag', str(write(rig, tmp_path / 'bag')), '--out', str(out)]) == 0
    found = parameters(out)
    topics = dict(pair.split('=') for pair in found['planner']['camera_topics'])
    assert topics == {name: f'/rig/{number}/image_raw' for name, number in numbers.items()}
    assert {found[node]['output_frame'] for node in ('planner', 'guardian', 'follower')} == {'map'}
    assert 'front:=/rig/cam2' in (out / 'rig.param.yaml').read_text()


def test_without_transforms_it_names_what_it_cannot_know(drive, tmp_path, capsys):
    rig = record(drive)
    rig.events = [event for event in rig.events if 'front_right' not in event.topic]
    bag, out = write(rig, tmp_path / 'bag'), tmp_path / 'rig'
    assert cli.main(['init', '--bag', str(bag), '--out', str(out)]) == 0
    assert not (out / 'rig.yaml').exists()
    assert 'extrinsics' not in parameters(out)['planner']
    assert 'No topic was found for camera front_right' in (out / 'rig.param.yaml').read_text()
    assert 'front_right: none found' in capsys.readouterr().out
    # What stands there is somebody's work.
    assert cli.main(['init', '--bag', str(bag), '--out', str(out)]) == 2
    assert 'exists already' in capsys.readouterr().err


def test_a_bag_without_odometry_is_one_sentence(drive, tmp_path, capsys):
    rig = record(drive)
    rig.events = [event for event in rig.events if event.topic != '/odom']
    out = tmp_path / 'rig'
    assert cli.main(['init', '--bag', str(write(rig, tmp_path / 'bag')), '--out', str(out)]) == 2
    assert 'no odometry was heard' in capsys.readouterr().err
    assert not out.exists()
