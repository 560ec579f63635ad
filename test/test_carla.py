"""CARLA's ego topics: where the rear axle is, which unit a speed has, and a real recording."""

import math
from pathlib import Path

import numpy as np
import pytest
from foreign_messages import TYPES, empty, round_trip
from hypothesis import given
from hypothesis import strategies as st
from rosbags.highlevel import AnyReader
from transforms3d.euler import euler2mat, euler2quat

from spanvla_ros.carla import speedometer_fault, thin_route, to_rear_axle
from spanvla_ros.messages import read_image, read_odometry

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'real'
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason='../shared is not here')
angles = st.floats(-math.pi, math.pi)
tilts = st.floats(-0.3, 0.3)


@given(angles, tilts, tilts, st.floats(-3.0, 3.0), st.floats(-1.0, 1.0))
def test_the_rear_axle_lies_behind_the_origin(yaw, pitch, roll, ahead, yaw_rate):
    message = empty('nav_msgs/msg/Odometry')
    at = message.pose.pose.position
    at.x, at.y, at.z = 10.0, -20.0, 0.5
    q = message.pose.pose.orientation
    q.w, q.x, q.y, q.z = euler2quat(yaw, pitch, roll, 'rzyx')
    message.twist.twist.linear.x = 5.0
    message.twist.twist.angular.z = yaw_rate
    message.pose.covariance = message.twist.covariance = np.zeros(36)
    moved = round_trip(to_rear_axle(message, ahead))
    behind = np.array([10.0, -20.0, 0.5]) - euler2mat(yaw, pitch, roll, 'rzyx') @ [ahead, 0, 0]
    place = moved.pose.pose.position
    assert np.array([place.x, place.y, place.z]) == pytest.approx(behind, abs=1e-9)
    # A rigid body: the velocity of a point is v + w x r, and r is (-ahead, 0).
    assert moved.twist.twist.linear.x == 5.0
    assert moved.twist.twist.linear.y == pytest.approx(-yaw_rate * ahead)
    assert moved.child_frame_id == 'base_link'


@pytest.mark.parametrize(
    ('speedometer', 'odometry', 'words'),
    [
        (10.0, 10.2, ''),
        (0.4, 0.0, ''),
        (36.0, 10.0, 'it is in km/h'),
        (10.0, 5.0, 'another vehicle or frame'),
        (-10.0, 10.0, 'another vehicle or frame'),
        (5.0, 0.0, 'another vehicle or frame'),
        (math.nan, 10.0, 'not a number'),
    ],
)
def test_a_speedometer_is_in_metres_per_second(speedometer, odometry, words):
    """ros-bridge e9063d9, speedometer_sensor.py: `speed = np.dot(vel_np, orientation)` of
    `get_velocity()`, which is in m/s.
    """
    fault = speedometer_fault(speedometer, odometry)
    assert words in fault
    assert bool(words) == bool(fault)


def test_repeated_waypoints_are_left_out():
    points = np.array([[0, 0], [1, 0], [1, 0], [1.1, 0], [np.nan, 0], [2, 0], [2, 1]], float)
    assert thin_route(points) == [0, 1, 5, 6]
    assert thin_route(np.zeros((0, 2))) == []


def test_the_bridges_picture_is_read():
    """ros-bridge e9063d9, camera.py, RgbCamera: `return carla_image_data_array, 'bgra8'`."""
    message = empty('sensor_msgs/msg/Image')
    message.width, message.height, message.step, message.encoding = 2, 1, 8, 'bgra8'
    message.data = np.array([10, 20, 30, 255, 40, 50, 60, 255], np.uint8)
    frame = read_image(round_trip(message), 'front')
    assert frame.image.tolist() == [[[30, 20, 10], [60, 50, 40]]]


@needs_real
def test_a_real_recording_is_right_handed_and_in_metres_per_second():
    """Positions, yaw and body twist of a real CARLA drive agree in REP-103's axes."""
    with AnyReader([REAL / 'carla_town01_recording'], default_typestore=TYPES) as reader:
        wanted = [c for c in reader.connections if c.topic == '/carla/hero/odometry']
        egos = [
            read_odometry(reader.deserialize(raw, c.msgtype))
            for c, _, raw in reader.messages(wanted)
        ]
    times = np.array([ego.stamp_ns for ego in egos]) / 1e9
    places = np.array([[ego.x_m, ego.y_m] for ego in egos])
    yaw = np.unwrap([ego.yaw_rad for ego in egos])
    speed = np.array([ego.speed_mps for ego in egos])
    step = np.gradient(places, times, axis=0)
    fast = (speed > 5.0) & (np.hypot(*step.T) > 5.0)
    assert fast.sum() > 200
    off = np.angle(np.exp(1j * (np.arctan2(step[fast, 1], step[fast, 0]) - yaw[fast])))
    assert np.median(np.abs(off)) < 0.02
    assert np.median(np.abs(np.hypot(*step[fast].T) / speed[fast] - 1.0)) < 0.05
