"""The carla node over real DDS: the bridge's topics in, ours out."""

import math

import pytest
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float32

# ros-bridge e9063d9: odometry and speedometer `qos_profile=10`; carla_waypoint_publisher.py:
# `QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)`.
BRIDGE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
WAIT_S = 60.0


class Carla:
    def __init__(self, bus, launch):
        self.bus = bus
        # Latched before the node is there, as the bridge's route may be.
        self.waypoints([(0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (2.0, 0.0)])
        self.node = launch('carla', role_name='hero', origin_ahead_m=1.5)
        self.odometries = bus.listen('input/odometry', Odometry, BEST_EFFORT)
        self.routes = bus.listen('input/route', PathMessage, LATCHED)

    def waypoints(self, points, frame_id='map'):
        message = PathMessage()
        message.header.frame_id = frame_id
        for x, y in points:
            pose = PoseStamped()
            pose.pose.position.x, pose.pose.position.y = x, y
            pose.pose.orientation.w = 1.0
            message.poses.append(pose)
        self.bus.publish('/carla/hero/waypoints', message, LATCHED)

    def odometry(self, frame_id='map', speed_mps=10.0):
        message = self.bus.odometry(speed_mps=speed_mps)
        message.header.frame_id, message.child_frame_id = frame_id, 'hero'
        message.pose.pose.position.x, message.pose.pose.position.y = 100.0, -50.0
        message.pose.pose.orientation.z = math.sin(math.pi / 4)
        message.pose.pose.orientation.w = math.cos(math.pi / 4)
        self.bus.publish('/carla/hero/odometry', message, BRIDGE)


@pytest.fixture(scope='module')
def carla(bus, launch):
    return Carla(bus, launch)


def test_odometry_that_nobody_publishes_is_told(carla):
    line = 'carla: /carla/hero/odometry'
    nobody = 'nobody publishes /carla/hero/odometry'
    carla.bus.wait(lambda: carla.bus.shows(line, nobody), lambda: None, WAIT_S)


def test_odometry_comes_out_at_the_rear_axle(carla):
    carla.bus.wait(lambda: carla.odometries, carla.odometry, WAIT_S)
    message = carla.odometries[-1]
    assert message.header.frame_id == 'map'
    assert message.child_frame_id == 'base_link'
    # Facing north, the axle lies south of the origin.
    assert message.pose.pose.position.x == pytest.approx(100.0)
    assert message.pose.pose.position.y == pytest.approx(-51.5)
    assert message.twist.twist.linear.x == 10.0


def test_latched_waypoints_become_the_route(carla):
    carla.bus.wait(lambda: carla.routes, carla.odometry, WAIT_S)
    places = [pose.pose.position.x for pose in carla.routes[-1].poses]
    assert places == [0.0, 1.0, 2.0]
    assert carla.routes[-1].header.frame_id == 'map'


def test_a_frame_that_is_not_the_map_is_refused(carla):
    carla.bus.wait(
        lambda: carla.bus.shows('carla: /carla/hero/odometry', "frame 'odom' is not 'map'"),
        lambda: carla.odometry('odom'),
        WAIT_S,
    )


def test_a_speedometer_in_kmh_is_named(carla):
    def feed():
        carla.odometry()
        carla.bus.publish('/carla/hero/speedometer', Float32(data=36.0), BRIDGE)

    carla.bus.wait(lambda: carla.bus.shows('carla: /carla/hero/speedometer', 'km/h'), feed, WAIT_S)


def test_stamps_of_another_clock_are_named(carla):
    carla.bus.shift_ns = -1_000_000_000_000
    try:
        carla.bus.wait(
            lambda: carla.bus.shows('carla: /carla/hero/odometry', 'set use_sim_time'),
            carla.odometry,
            WAIT_S,
        )
    finally:
        carla.bus.shift_ns = 0
    assert carla.node.exit_status is None
