"""Messages against the roll-out they were made from, and against transforms3d."""

import json
import math

import numpy as np
import pytest
from transforms3d.quaternions import quat2mat

from spanvla_ros.messages import read_trajectory
from spanvla_ros.ros.publish import (
    STATE_COLORS,
    TrajectoryMessage,
    marker_message,
    path_message,
    state_json,
)
from spanvla_ros.safety.fallback import hard_stop
from spanvla_ros.safety.state import STARTING, STATES, Counts, GuardianOutput
from spanvla_ros.types import EgoState, Vehicle

STAMP_NS = 1_700_000_000_123_456_789


@pytest.fixture
def output():
    ego = EgoState(STAMP_NS, 3.0, -4.0, 3.0, 9.0, 0.0, 0.4)
    motion = hard_stop(ego, 'odom', Vehicle())
    return GuardianOutput(
        motion.trajectory,
        motion.speeds_mps,
        motion.accels_mps2,
        motion.yaw_rates_radps,
        'FALLBACK',
        ('no_plan', 'hard_stop'),
        0.0123456,
    )


def test_a_trajectory_survives_its_message(output):
    back = read_trajectory(TrajectoryMessage().fill(output))
    assert back.stamp_ns == STAMP_NS
    assert back.frame_id == 'odom'
    assert back.times_s == pytest.approx(output.trajectory.times_s)
    assert back.poses == pytest.approx(output.trajectory.poses, abs=1e-12)


def test_velocities_and_accelerations_are_the_slopes_of_the_poses(output):
    message = TrajectoryMessage().fill(output)
    x, y = (
        np.array([getattr(p.transforms[0].translation, axis) for p in message.points])
        for axis in 'xy'
    )
    moving = slice(1, 10)
    for values, axis in ((x, 'x'), (y, 'y')):
        told = np.array([getattr(p.velocities[0].linear, axis) for p in message.points])
        assert told[moving] == pytest.approx(np.gradient(values, 0.1)[moving], abs=0.05)
        change = np.array([getattr(p.accelerations[0].linear, axis) for p in message.points])
        assert change[moving] == pytest.approx(np.gradient(told, 0.1)[moving], abs=0.25)
    assert message.points[0].velocities[0].angular.z == pytest.approx(0.4)


def test_rotations_are_unit_quaternions_about_z(output):
    for point, yaw in zip(
        TrajectoryMessage().fill(output).points, output.trajectory.poses[:, 2], strict=True
    ):
        q = point.transforms[0].rotation
        turned = quat2mat([q.w, q.x, q.y, q.z]) @ [1.0, 0.0, 0.0]
        assert turned == pytest.approx([math.cos(yaw), math.sin(yaw), 0.0])


def test_a_refilled_message_holds_nothing_of_the_last_one(output):
    maker = TrajectoryMessage()
    maker.fill(output)
    ego = EgoState(STAMP_NS + 1, 0.0, 0.0, 0.0, 0.0)
    motion = hard_stop(ego, 'map', Vehicle())
    second = GuardianOutput(
        motion.trajectory,
        motion.speeds_mps,
        motion.accels_mps2,
        motion.yaw_rates_radps,
        'STANDBY',
        ('disabled',),
        0.0,
    )
    assert maker.fill(second) == TrajectoryMessage().fill(second)


def test_the_path_is_stamped_pose_by_pose(output):
    message = path_message(output)
    assert message.header.frame_id == 'odom'
    last = message.poses[-1]
    assert last.header.stamp.sec * 10**9 + last.header.stamp.nanosec == STAMP_NS + 5 * 10**9
    assert last.pose.position.x == output.trajectory.poses[-1, 0]
    assert last.pose.orientation.z == pytest.approx(math.sin(output.trajectory.poses[-1, 2] / 2))


def test_markers_show_line_box_and_words(output):
    line, box, words = marker_message(output, Vehicle()).markers
    assert len(line.points) == 51
    assert box.pose.position.x == pytest.approx(3.0 + 1.461 * math.cos(3.0))
    assert box.scale.x == 5.176
    assert words.text == 'FALLBACK no_plan hard_stop'
    assert len({marker.id for marker in (line, box, words)}) == 3


def test_every_state_that_is_published_has_a_colour():
    assert set(STATE_COLORS) == set(STATES) - {STARTING}


def test_state_without_a_plan(output):
    content = json.loads(state_json(output, None, Counts(3, (('plan:jerk', 2),)), STAMP_NS + 5))
    assert content['state'] == 'FALLBACK'
    assert content['reasons'] == ['no_plan', 'hard_stop']
    assert content['refused'] == {'plan:jerk': 2}
    assert content['plans_accepted'] == 3
    assert content['kv_stamp_ns'] is None
    assert content['stamp_ns'] == STAMP_NS + 5
    assert content['odometry_age_s'] == 0.0123
