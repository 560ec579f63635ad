"""The rig file against the ros-bridge's own way of reading it."""

import json
import math

import pytest

from spanvla_ros import cli
from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.rig import rig_faults, rig_objects

CAMERAS = (
    CameraSpec('front', 224, 112, 60.0, 1.5, 0.1, 1.6, 0.0, 5.0),
    CameraSpec('front_left', 224, 112, 70.0, 1.2, 0.4, 1.5, 55.0),
)
AHEAD_M = 1.4


def make():
    return rig_objects(CAMERAS, 'hero', 'vehicle.tesla.model3', AHEAD_M, 2)


def unreal_pose(spawn: dict) -> tuple[float, ...]:
    """Where CARLA puts a sensor: ros-bridge e9063d9, `create_spawn_point` takes the numbers as a
    ROS pose in degrees, and `ros_pose_to_carla_transform` returns `carla.Location(x, -y, z)` and
    `carla.Rotation(roll=degrees(roll), pitch=-degrees(pitch), yaw=-degrees(yaw))`.
    """
    return (spawn['x'], -spawn['y'], spawn['z'], spawn['roll'], -spawn['pitch'], -spawn['yaw'])


def sensors(rig: dict) -> dict:
    return {item['id']: item for item in rig['objects'][-1]['sensors']}


def test_cameras_stand_where_the_model_has_them():
    # In Unreal y is to the right, yaw turns right and pitch looks up; measured from the origin.
    front = sensors(make())['front']
    assert unreal_pose(front['spawn_point']) == pytest.approx((0.1, -0.1, 1.6, 0, -5, 0))
    left = sensors(make())['front_left']
    assert unreal_pose(left['spawn_point']) == pytest.approx((-0.2, -0.4, 1.5, 0, 0, -55))


def test_pictures_have_the_models_field_of_view():
    """ros-bridge e9063d9, camera.py: `fx = width / (2.0 * math.tan(fov * math.pi / 360.0))`."""
    for camera in CAMERAS:
        found = sensors(make())[camera.name]
        focal = found['image_size_x'] / (2.0 * math.tan(found['fov'] * math.pi / 360.0))
        assert focal == pytest.approx(2 * camera.focal_px)
        assert (found['image_size_x'], found['image_size_y']) == (448, 224)


def test_the_topics_of_the_bridge_are_those_the_nodes_read():
    """ros-bridge e9063d9, config/objects.json: pseudo sensors with the ids `odometry`,
    `speedometer`, `tf`, which name the topics below /carla/<role>.
    """
    kinds = {item['type']: item['id'] for item in make()['objects'][-1]['sensors']}
    assert kinds['sensor.pseudo.odom'] == 'odometry'
    assert kinds['sensor.pseudo.speedometer'] == 'speedometer'
    assert make()['objects'][-1]['id'] == 'hero'


def test_what_is_written_fits():
    assert rig_faults(make(), CAMERAS, 'hero', AHEAD_M) == []


@pytest.mark.parametrize(
    ('camera', 'change', 'words'),
    [
        ('front', {'fov': 90.0}, 'front: fov is 90'),
        ('front', {'image_size_y': 300}, 'not of the shape 224x112'),
        ('front', {'image_size_x': 112, 'image_size_y': 56}, 'fewer than'),
        ('front_left', {'spawn_point': {'x': -0.2, 'y': 0.4, 'z': 1.5, 'yaw': -55.0}}, 'yaw'),
        ('front', {'type': 'sensor.camera.depth'}, 'no sensor.camera.rgb'),
        ('front', {'id': 'rgb_front'}, 'front: no sensor.camera.rgb of that id'),
    ],
)
def test_what_does_not_fit_is_named(camera, change, words):
    rig = make()
    sensors(rig)[camera].update(change)
    faults = rig_faults(rig, CAMERAS, 'hero', AHEAD_M)
    assert len(faults) == 1
    assert words in faults[0]


def test_a_camera_at_the_wrong_origin_is_named():
    faults = rig_faults(make(), CAMERAS, 'hero', 0.0)
    assert [fault.split(':')[0] for fault in faults] == ['front', 'front_left']
    assert all('x is' in fault for fault in faults)


def test_the_command_writes_and_checks(tmp_path, capsys):
    out = tmp_path / 'rig' / 'objects.json'
    assert cli.main(['rig', '--out', str(out), '--role-name', 'hero']) == 0
    content = json.loads(out.read_text())
    cameras = load_model_dir(shipped_model_dir()).config.cameras
    assert [c.name for c in cameras] == list(sensors(content))[: len(cameras)]
    assert cli.main(['rig', '--check', str(out), '--role-name', 'hero']) == 0
    assert cli.main(['rig', '--check', str(out), '--role-name', 'ego_vehicle']) == 1
    assert 'give --role-name' in capsys.readouterr().out
    assert (
        cli.main(['rig', '--check', str(out), '--role-name', 'hero', '--origin-ahead-m', '0']) == 1
    )


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        ([], 'give --out FILE or --check FILE'),
        (['--check', 'nowhere.json'], 'No such file'),
        (['--out', 'x.json', '--scale', '0'], 'whole number'),
    ],
)
def test_bad_input_is_one_sentence(words, said, capsys):
    assert cli.main(['rig', *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    'text',
    [
        '{',
        '[]',
        '{"objects": 3}',
        '{"objects": [3]}',
        '{"objects": [{"id": "ego_vehicle", "sensors": [3]}]}',
        '{"objects": [{"id": "ego_vehicle", "sensors": [{"id": "front", "spawn_point": 3}]}]}',
        '{"objects": [{"id": "ego_vehicle", "sensors": [{"id": "front", "fov": "wide"}]}]}',
    ],
)
def test_a_file_that_is_no_rig_is_one_sentence(text, tmp_path, capsys):
    path = tmp_path / 'objects.json'
    path.write_text(text)
    assert cli.main(['rig', '--check', str(path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
