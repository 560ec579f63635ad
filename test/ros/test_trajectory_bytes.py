"""The table on the bytes of a trajectory against rclpy's own serialization."""

import numpy as np
import pytest
from geometry_msgs.msg import Transform, Twist
from rclpy.serialization import deserialize_message, serialize_message
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from spanvla_ros.messages import MessageError, read_trajectory
from spanvla_ros.ros.publish import TrajectoryMessage
from spanvla_ros.ros.trajectory_bytes import ROW, rows_of, trajectory_of_bytes
from spanvla_ros.safety.fallback import hard_stop
from spanvla_ros.safety.state import GuardianOutput
from spanvla_ros.types import EgoState, Vehicle

STAMP_NS = 1_700_000_000_123_456_789


def output(frame_id: str, seed: int) -> GuardianOutput:
    x_m, y_m, yaw_rad, speed_mps, yaw_rate_radps = np.random.default_rng(seed).uniform(-3, 3, 5)
    ego = EgoState(STAMP_NS + seed, x_m, y_m, yaw_rad, abs(speed_mps) * 5, yaw_rate_radps * 0.1)
    motion = hard_stop(ego, frame_id, Vehicle())
    return GuardianOutput(
        motion.trajectory,
        motion.speeds_mps,
        motion.accels_mps2,
        motion.yaw_rates_radps,
        'FALLBACK',
        ('hard_stop',),
        0.0,
    )


# Each length of the frame's name moves the table to another offset.
@pytest.mark.parametrize('frame_id', ['', 'a', 'odom', 'map_01', 'a_longer', 'frame/är'])
def test_the_bytes_are_those_of_the_message(frame_id):
    maker, plain = TrajectoryMessage(), TrajectoryMessage()
    for seed in range(3):
        drawn = output(frame_id, seed)
        expected = plain.fill(drawn)
        data = maker.serialized(drawn)
        got = deserialize_message(data, MultiDOFJointTrajectory)
        assert got.header == expected.header
        assert got.joint_names == expected.joint_names
        ours, theirs = rows_of(data), rows_of(serialize_message(expected))
        assert ours is not None
        assert theirs is not None
        for name in ROW.names:
            if name != 'transforms' and not name.startswith('pad'):
                assert ours[0][name] == pytest.approx(theirs[0][name], abs=1e-13), name
        # The table is where rclpy finds the numbers.
        for point, row in zip(got.points, ours[0], strict=True):
            turn, velocity, change = (
                point.transforms[0],
                point.velocities[0],
                point.accelerations[0],
            )
            assert [turn.translation.x, turn.translation.y] == row['place'][:2].tolist()
            assert [turn.rotation.z, turn.rotation.w] == row['rotation'][2:].tolist()
            assert [velocity.linear.x, velocity.angular.z] == [row['linear'][0], row['angular'][2]]
            assert change.linear.y == row['linear_change'][1]
            since = point.time_from_start
            assert [since.sec, since.nanosec] == [row['sec'], row['nanosec']]


@pytest.mark.parametrize('frame_id', ['odom', 'map', 'a_longer', 'frame/är'])
def test_it_reads_what_the_message_reader_reads(frame_id):
    message = TrajectoryMessage().fill(output(frame_id, 7))
    expected, got = read_trajectory(message), trajectory_of_bytes(serialize_message(message))
    assert (got.stamp_ns, got.frame_id) == (expected.stamp_ns, expected.frame_id)
    assert (got.times_s == expected.times_s).all()
    assert (got.poses == expected.poses).all()


def point(transforms: int, velocities: int) -> MultiDOFJointTrajectoryPoint:
    turn = Transform()
    turn.rotation.w = 1.0
    return MultiDOFJointTrajectoryPoint(
        transforms=[turn] * transforms, velocities=[Twist()] * velocities
    )


def test_points_of_another_shape_go_through_rclpy():
    message = MultiDOFJointTrajectory()
    message.header.frame_id = 'odom'
    message.points = [point(1, 0), point(1, 2), point(1, 1)]
    for second, entry in enumerate(message.points):
        entry.time_from_start.sec = second
    data = serialize_message(message)
    assert rows_of(data) is None
    assert trajectory_of_bytes(data).times_s.tolist() == [0.0, 1.0, 2.0]
    message.points[1].transforms = []
    with pytest.raises(MessageError, match='a point with 0 transforms'):
        trajectory_of_bytes(serialize_message(message))


@pytest.mark.parametrize('points', [0, 1])
def test_too_few_points_are_refused(points):
    message = TrajectoryMessage().fill(output('odom', 1))
    message.points = message.points[:points]
    with pytest.raises(MessageError, match='at least two'):
        trajectory_of_bytes(serialize_message(message))


def test_a_number_that_is_not_finite_is_refused():
    message = TrajectoryMessage().fill(output('odom', 1))
    message.points[3].transforms[0].translation.x = float('nan')
    with pytest.raises(MessageError, match='not finite'):
        trajectory_of_bytes(serialize_message(message))


def test_no_cut_of_the_bytes_is_a_table():
    data = bytes(serialize_message(TrajectoryMessage().fill(output('odom', 1))))
    for length in range(len(data)):
        assert rows_of(data[:length]) is None


@pytest.mark.parametrize('data', [b'', b'\x00\x01\x00\x00', bytes(range(40))])
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(MessageError, match='no message'):
        trajectory_of_bytes(data)
