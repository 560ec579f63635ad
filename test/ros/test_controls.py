"""The follower's back-ends: which message on which topic, and what happens without its package.

The classes of packages without a wheel are made by rosbags, which no publisher takes: a stand-in
node collects what is published.
"""

import time

import pytest
from foreign_messages import Desk, empty, install, round_trip
from geometry_msgs.msg import Twist
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from spanvla_ros.controls import CarlaCar
from spanvla_ros.ros.controls import CONTROLS
from spanvla_ros.ros.follower_node import FILL_IN_S
from spanvla_ros.ros.parameters import FollowerSettings
from spanvla_ros.types import DriveCommand, SpanvlaError

LEFT = DriveCommand(8.0, 0.4, 1.0, 0.2, reason='following')
STAMP_NS = 12_345_678_901


def test_the_parameter_offers_what_is_there():
    entry = FollowerSettings.__dataclass_fields__['control']
    assert set(entry.metadata['choices']) == set(CONTROLS)
    assert entry.default == 'twist'


def test_a_twist_goes_out_on_its_topic():
    desk = Desk()
    CONTROLS['twist'](desk, CarlaCar()).send(LEFT, 8.0, STAMP_NS)
    assert desk.topics['output/twist'][0] is Twist
    assert desk.sent[0].linear.x == 8.0
    assert desk.sent[0].angular.z == 0.4


def test_ackermann_with_and_without_a_stamp(monkeypatch):
    install(monkeypatch, 'ackermann_msgs')
    desk = Desk()
    for name in ('ackermann', 'ackermann_stamped'):
        CONTROLS[name](desk, CarlaCar()).send(LEFT, 8.0, STAMP_NS)
    bare, stamped = (round_trip(message) for message in desk.sent)
    assert bare.steering_angle == pytest.approx(0.2)
    assert stamped.drive.speed == pytest.approx(8.0)
    assert stamped.header.frame_id == 'base_link'
    assert stamped.header.stamp.nanosec == 345_678_901


def test_carla_gets_its_control_and_tells_its_full_lock(monkeypatch):
    """ros-bridge e9063d9, ego_vehicle.py: `vehicle_control_cmd` is subscribed with
    `qos_profile=10`, `vehicle_info` published with `QoSProfile(depth=10, durability=
    DurabilityPolicy.TRANSIENT_LOCAL)`.
    """
    install(monkeypatch, 'carla_msgs')
    desk = Desk()
    control = CONTROLS['carla'](desk, CarlaCar(full_lock_rad=1.0))
    profile = desk.topics['output/vehicle_control'][1]
    assert (profile.depth, profile.reliability) == (10, ReliabilityPolicy.RELIABLE)
    info_profile = desk.topics['input/vehicle_info'][1]
    assert info_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    control.send(LEFT, 8.0, STAMP_NS)
    assert round_trip(desk.sent[-1]).steer == pytest.approx(-0.2)
    info = empty('carla_msgs/msg/CarlaEgoVehicleInfo')
    desk.callbacks['input/vehicle_info'](info)
    assert 'full_lock_rad' in desk.warnings[0]
    wheel = empty('carla_msgs/msg/CarlaEgoVehicleInfoWheel')
    wheel.max_steer_angle = 0.5
    info.wheels.append(wheel)
    desk.callbacks['input/vehicle_info'](info)
    control.send(LEFT, 8.0, STAMP_NS)
    assert round_trip(desk.sent[-1]).steer == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ('name', 'package'),
    [('ackermann', 'ackermann_msgs'), ('ackermann_stamped', 'ackermann_msgs'),
     ('carla', 'carla_msgs')],
)  # fmt: skip
def test_a_missing_package_is_one_sentence(name, package):
    with pytest.raises(SpanvlaError, match=f'control is {name} but {package} is not installed'):
        CONTROLS[name](Desk(), CarlaCar())


def test_the_process_ends_with_the_sentence(launch):
    process = launch('follower', control='carla')
    process.wait(60.0)
    assert process.exit_status == 2
    assert 'carla_msgs is not installed' in process.last_line()


@pytest.fixture(scope='module')
def answering(bus, launch):
    """A follower that answers each odometry, as a synchronous simulator asks."""
    launch('follower', trigger='odometry')
    twists = bus.listen('output/twist', Twist)
    bus.wait(lambda: len(twists) > 1, lambda: None, 60.0)
    return twists


def fill_ins(seconds: float) -> int:
    """The most commands that silence can have called for, with some that were still on the way."""
    return int(seconds / FILL_IN_S) + 3


def test_one_command_answers_each_odometry(bus, answering):
    bus.wait(lambda: bus.node.count_subscribers('input/odometry') > 0, lambda: None, 60.0)
    bus.spin(0.5)
    begin, begin_s = len(answering), time.monotonic()
    for _ in range(15):
        bus.publish('input/odometry', bus.odometry(), 50)
        bus.spin(0.05)
    bus.wait(lambda: len(answering) - begin >= 15, lambda: None, 60.0)
    # The schedule of 30 commands a second would have sent twice as many.
    assert len(answering) - begin <= 15 + fill_ins(time.monotonic() - begin_s)


def test_silence_is_filled_before_the_bridge_gives_up(bus, answering):
    """ros-bridge e9063d9, bridge.py: `VEHICLE_CONTROL_TIMEOUT = 1.`"""
    assert FILL_IN_S < 1.0
    begin, begin_s = len(answering), time.monotonic()
    bus.wait(lambda: len(answering) > begin + 2, lambda: None, 60.0)
    assert len(answering) - begin <= fill_ins(time.monotonic() - begin_s)
