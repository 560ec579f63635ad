"""Drive commands in foreign messages, field by field, against what their definitions say."""

import math

import pytest
from foreign_messages import empty, round_trip
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.controls import (
    CarlaCar,
    CarlaControl,
    carla_control,
    fill_ackermann,
    fill_carla_control,
    fill_twist,
    read_full_lock,
    set_stamp,
)
from spanvla_ros.types import DriveCommand, SpanvlaError

STAMP_NS = 12_345_678_901
LEFT = DriveCommand(8.0, 0.4, 1.0, 0.2, reason='following')
CAR = CarlaCar()


def test_a_twist_is_speed_and_yaw_rate():
    message = round_trip(fill_twist(empty('geometry_msgs/msg/Twist'), LEFT))
    assert (message.linear.x, message.linear.y, message.linear.z) == (8.0, 0.0, 0.0)
    assert (message.angular.x, message.angular.y, message.angular.z) == (0.0, 0.0, 0.4)


def test_an_ackermann_drive_steers_left_in_radians():
    """ackermann_msgs 843a4836: "Positive yaw is to the left", "desired virtual angle (radians)",
    "desired forward speed (m/s)", "Zero acceleration means change speed as quickly as possible".
    """
    message = round_trip(fill_ackermann(empty('ackermann_msgs/msg/AckermannDrive'), LEFT))
    assert message.steering_angle == pytest.approx(0.2)
    assert message.speed == pytest.approx(8.0)
    assert (message.steering_angle_velocity, message.acceleration, message.jerk) == (0, 0, 0)


def test_no_ackermann_brake_can_become_throttle():
    """ros-bridge e9063d9, carla_ackermann_control_node.py, `set_target_accel`: `numpy.clip(
    target_accel, -max_decel, max_accel)` keeps the sign of `acceleration`; above `min_accel` it
    is followed whatever the speed. A brake sent as a magnitude would accelerate.
    """
    braking = DriveCommand(3.0, 0.0, -4.0, 0.0, reason='following')
    message = fill_ackermann(empty('ackermann_msgs/msg/AckermannDrive'), braking)
    assert message.acceleration <= 0.0


def test_a_stamped_header_holds_the_nanoseconds():
    message = empty('ackermann_msgs/msg/AckermannDriveStamped')
    set_stamp(message.header, STAMP_NS)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (12, 345_678_901)


def test_carla_steers_right_with_a_positive_number():
    """ros-bridge e9063d9, carla_ackermann_control_node.py: `self.info.target.steering_angle =
    -target_steering_angle` and `output.steer = target.steering_angle / max_steering_angle`;
    carla_control_physics.py: "70 degrees is the default max steering angle of a car".
    """
    assert carla_control(LEFT, 8.0, CAR).steer == pytest.approx(-0.2 / math.radians(70.0))
    right = DriveCommand(8.0, -0.4, 1.0, -2.0)
    assert carla_control(right, 8.0, CAR).steer == 1.0


def test_the_pedals_are_those_of_the_bridges_own_physics():
    """carla_control_physics.py e9063d9: max acceleration "default: 3.0 m/s^2", max deceleration
    "default: 8 m/s^2", engine brake 500.0 N, mass 1500 kg, rolling resistance 0.01, air density
    1.184, drag area 0.3 * 2.37.
    """
    speed_mps = 15.0
    resistance = 0.01 * 9.81 + 0.5 * 1.184 * 0.3 * 2.37 * speed_mps**2 / 1500.0
    held = carla_control(DriveCommand(15.0, 0.0, 0.0, 0.0, reason='following'), speed_mps, CAR)
    assert held.throttle == pytest.approx(resistance / 3.0, abs=1e-3)
    assert held.brake == 0.0
    slow = carla_control(DriveCommand(12.0, 0.0, -4.0, 0.0, reason='following'), speed_mps, CAR)
    assert slow.throttle == 0.0
    assert slow.brake == pytest.approx((4.0 - resistance - 500.0 / 1500.0) / 8.0, abs=1e-3)
    # The engine alone brakes this much.
    coasting = DriveCommand(14.0, 0.0, -resistance - 0.2, 0.0, reason='following')
    assert carla_control(coasting, speed_mps, CAR) == CarlaControl(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    'command',
    [
        DriveCommand(0.0, 0.0, -7.0, 0.0, braking=True, reason='no_trajectory'),
        DriveCommand(0.0, 0.0, -7.0, 0.0, braking=True, reason='shutdown'),
        DriveCommand(5.0, 0.0, math.nan, 0.0, reason='following'),
    ],
)
def test_an_emergency_is_the_whole_pedal(command):
    assert carla_control(command, 10.0, CAR) == CarlaControl(0.0, 0.0, 1.0)


def test_a_halted_car_is_held():
    hold = DriveCommand(0.0, 0.0, -2.5, 0.0, braking=True, reason='standing')
    assert carla_control(hold, 0.02, CAR).brake == 1.0
    assert 0.0 < carla_control(hold, 1.0, CAR).brake < 0.5


numbers = st.floats(-1e6, 1e6) | st.sampled_from([math.inf, -math.inf, math.nan])


@given(numbers, numbers, numbers, st.booleans())
def test_whatever_is_asked_carla_gets_numbers_in_range(accel, steering, speed, braking):
    command = DriveCommand(1.0, 0.0, accel, steering, braking=braking)
    control = carla_control(command, speed, CAR)
    message = fill_carla_control(empty('carla_msgs/msg/CarlaEgoVehicleControl'), control, 0)
    back = round_trip(message)
    # ros-carla-msgs 081fdcd, CarlaEgoVehicleControl.msg: "0. <= throttle <= 1.",
    # "-1. <= steer <= 1.", "0. <= brake <= 1."
    assert 0.0 <= back.throttle <= 1.0
    assert -1.0 <= back.steer <= 1.0
    assert 0.0 <= back.brake <= 1.0
    assert back.throttle == 0.0 or back.brake == 0.0


def test_a_carla_control_message_field_by_field():
    control = CarlaControl(0.25, -0.5, 0.0)
    message = empty('carla_msgs/msg/CarlaEgoVehicleControl')
    message.reverse, message.gear, message.manual_gear_shift = True, 3, True
    back = round_trip(fill_carla_control(message, control, STAMP_NS))
    assert (back.header.stamp.sec, back.header.stamp.nanosec) == (12, 345_678_901)
    assert (back.throttle, back.steer, back.brake) == (0.25, -0.5, 0.0)
    assert (back.hand_brake, back.reverse, back.manual_gear_shift) == (False, False, False)
    assert back.gear == 0


def test_full_lock_is_that_of_the_wheels_that_turn():
    """ros-bridge e9063d9, ego_vehicle.py: `wheel_info.max_steer_angle = math.radians(
    wheel.max_steer_angle)`.
    """
    info = empty('carla_msgs/msg/CarlaEgoVehicleInfo')
    for angle in (1.2, 1.2, 0.0, 0.0):
        wheel = empty('carla_msgs/msg/CarlaEgoVehicleInfoWheel')
        wheel.max_steer_angle = angle
        info.wheels.append(wheel)
    assert read_full_lock(round_trip(info)) == pytest.approx(1.2)
    info.wheels = []
    with pytest.raises(SpanvlaError, match='full_lock_rad'):
        read_full_lock(info)
