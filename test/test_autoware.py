"""Autoware's messages field by field, against a motion whose numbers are worked out by hand."""

import math

import numpy as np
import pytest
from foreign_messages import empty, round_trip
from transforms3d.quaternions import quat2mat

from spanvla_ros.autoware import (
    MODE_AUTONOMOUS,
    MRM_STATES,
    Motion,
    fill_candidates,
    fill_trajectory,
    read_engaged,
    read_mrm,
    read_route_places,
)
from spanvla_ros.messages import read_acceleration, read_odometry
from spanvla_ros.types import SpanvlaError, Trajectory

STAMP_NS = 12_345_678_901
RADIUS_M = 20.0
SPEED_MPS = 8.0


def turning() -> Motion:
    """A left turn at constant speed, each 0.1 s a point."""
    times_s = np.arange(51) * 0.1
    turn = SPEED_MPS * times_s / RADIUS_M
    poses = np.stack([RADIUS_M * np.sin(turn), RADIUS_M * (1 - np.cos(turn)), turn], axis=1)
    ones = np.ones(51)
    return Motion(
        Trajectory(STAMP_NS, 'map', times_s, poses),
        SPEED_MPS * ones,
        -0.5 * ones,
        SPEED_MPS / RADIUS_M * ones,
    )


def point():
    return empty('autoware_planning_msgs/msg/TrajectoryPoint')


def test_a_trajectory_field_by_field():
    message = fill_trajectory(empty('autoware_planning_msgs/msg/Trajectory'), point, turning())
    back = round_trip(message)
    assert back.header.frame_id == 'map'
    assert (back.header.stamp.sec, back.header.stamp.nanosec) == (12, 345_678_901)
    assert len(back.points) == 51
    there = back.points[25]
    assert (there.time_from_start.sec, there.time_from_start.nanosec) == (2, 500_000_000)
    yaw = SPEED_MPS * 2.5 / RADIUS_M
    assert there.pose.position.x == pytest.approx(RADIUS_M * math.sin(yaw))
    # A left turn leads to positive y with a positive heading rate.
    assert there.pose.position.y == pytest.approx(RADIUS_M * (1 - math.cos(yaw)))
    q = there.pose.orientation
    assert quat2mat([q.w, q.x, q.y, q.z])[:, 0] == pytest.approx([math.cos(yaw), math.sin(yaw), 0])
    assert there.heading_rate_rps == pytest.approx(0.4)
    assert there.longitudinal_velocity_mps == pytest.approx(SPEED_MPS)
    assert there.acceleration_mps2 == pytest.approx(-0.5)
    zeros = (there.lateral_velocity_mps, there.front_wheel_angle_rad, there.rear_wheel_angle_rad)
    assert zeros == (0.0, 0.0, 0.0)


def test_candidates_name_their_generator():
    candidate = fill_trajectory(
        empty('autoware_internal_planning_msgs/msg/CandidateTrajectory'), point, turning()
    )
    message = fill_candidates(
        empty('autoware_internal_planning_msgs/msg/CandidateTrajectories'),
        candidate,
        empty('autoware_internal_planning_msgs/msg/GeneratorInfo'),
        'spanvla',
        np.arange(16, dtype=np.uint8),
    )
    back = round_trip(message)
    (one,), (info,) = back.candidate_trajectories, back.generator_info
    assert one.generator_id.uuid.tolist() == info.generator_id.uuid.tolist() == list(range(16))
    assert info.generator_name.data == 'spanvla'
    assert one.header.frame_id == 'map'
    assert len(one.points) == 51


def test_the_maneuvers_words_are_those_of_the_definition():
    """autoware_adapi_msgs 35a7aeb, MrmState.msg: `NORMAL = 1`, `MRM_OPERATING = 2`, ..."""
    message = empty('autoware_adapi_v1_msgs/msg/MrmState')
    for name, word in (
        ('UNKNOWN', 'unknown'),
        ('NORMAL', 'normal'),
        ('MRM_OPERATING', 'operating'),
        ('MRM_SUCCEEDED', 'succeeded'),
        ('MRM_FAILED', 'failed'),
    ):
        message.state = getattr(message, name)
        assert read_mrm(round_trip(message)) == word
        assert word in MRM_STATES
    message.state = 9
    with pytest.raises(SpanvlaError, match='9 is none of the states'):
        read_mrm(message)


def test_engaged_is_autonomous_and_in_control():
    """autoware_adapi_msgs 35a7aeb, OperationModeState.msg: `AUTONOMOUS = 2`."""
    message = empty('autoware_adapi_v1_msgs/msg/OperationModeState')
    assert message.AUTONOMOUS == MODE_AUTONOMOUS
    for mode in range(5):
        for control in (False, True):
            message.mode, message.is_autoware_control_enabled = mode, control
            assert read_engaged(round_trip(message)) == (mode == message.AUTONOMOUS and control)


def path(xs, frame_id='map'):
    message = empty('autoware_planning_msgs/msg/Path')
    message.header.frame_id = frame_id
    for x in xs:
        entry = empty('autoware_planning_msgs/msg/PathPoint')
        entry.pose.position.x, entry.pose.position.y = float(x), 5.0
        message.points.append(entry)
    return message


def lanelet_route(x, frame_id='map'):
    message = empty('autoware_planning_msgs/msg/LaneletRoute')
    message.header.frame_id = frame_id
    message.goal_pose.position.x, message.goal_pose.position.y = float(x), 5.0
    return message


def test_a_route_is_the_path_up_to_the_goal():
    frame_id, places = read_route_places(round_trip(path([0, 0.2, 2, 4, 6, 8])))
    assert frame_id == 'map'
    assert places.tolist() == [[0, 5], [2, 5], [4, 5], [6, 5], [8, 5]]
    _, places = read_route_places(path(range(0, 20, 2)), lanelet_route(9.3))
    assert places[-1].tolist() == [9.3, 5.0]
    assert (np.diff(places[:, 0]) > 0.5).all()
    assert places[-2].tolist() == [8.0, 5.0]
    # A goal beyond the path does not end it.
    _, places = read_route_places(path(range(0, 20, 2)), lanelet_route(500))
    assert places[-1].tolist() == [18.0, 5.0]
    assert len(read_route_places(path([]), lanelet_route(1))[1]) == 0


def test_a_goal_elsewhere_or_no_number_is_refused():
    with pytest.raises(SpanvlaError, match="its goal is in 'odom', the path in 'map'"):
        read_route_places(path([0, 2]), lanelet_route(1, 'odom'))
    with pytest.raises(SpanvlaError, match='not finite'):
        read_route_places(path([0, math.nan]))


def test_kinematic_state_and_acceleration_are_read_as_they_come():
    """`/localization/kinematic_state` is a nav_msgs/Odometry in `map`, its twist in `base_link`;
    `/localization/acceleration` an AccelWithCovarianceStamped in `base_link`.
    """
    state = empty('nav_msgs/msg/Odometry')
    state.header.frame_id, state.child_frame_id = 'map', 'base_link'
    state.pose.covariance = state.twist.covariance = np.zeros(36)
    state.pose.pose.position.x = 89_000.5
    state.pose.pose.orientation.z = state.pose.pose.orientation.w = math.sqrt(0.5)
    state.twist.twist.linear.x, state.twist.twist.angular.z = 6.0, -0.1
    ego = read_odometry(round_trip(state))
    assert (ego.x_m, ego.speed_mps, ego.yaw_rate_radps) == (89_000.5, 6.0, -0.1)
    assert ego.yaw_rad == pytest.approx(math.pi / 2)
    accel = empty('geometry_msgs/msg/AccelWithCovarianceStamped')
    accel.accel.covariance = np.zeros(36)
    accel.accel.accel.linear.x = -1.25
    assert read_acceleration(round_trip(accel)) == -1.25
