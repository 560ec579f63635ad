"""The follower over real DDS: twists along a trajectory, the brake without one."""

import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from geometry_msgs.msg import Twist
from trajectory_msgs.msg import MultiDOFJointTrajectory

from spanvla_ros.ros.publish import TrajectoryMessage
from spanvla_ros.safety.fallback import hard_stop
from spanvla_ros.safety.rollout import TIMES_S
from spanvla_ros.safety.state import GuardianOutput
from spanvla_ros.types import EgoState, Trajectory, Vehicle

STEADY_MPS = 6.0


def steady(stamp_ns: int, radius_m: float = 1e9, frame_id: str = 'odom') -> GuardianOutput:
    along = STEADY_MPS * TIMES_S
    turn = along / radius_m
    poses = np.stack([radius_m * np.sin(turn), radius_m * (1 - np.cos(turn)), turn], axis=1)
    ones = np.ones(51)
    return GuardianOutput(
        Trajectory(stamp_ns, frame_id, TIMES_S, poses),
        STEADY_MPS * ones,
        0.0 * ones,
        STEADY_MPS / radius_m * ones,
        'OK',
        (),
        0.0,
    )


class Follow:
    def __init__(self, bus, launch):
        self.bus, self.follower = (
            bus,
            launch('follower', odometry_timeout_s=0.5, trajectory_timeout_s=0.5),
        )
        self.twists = bus.listen('output/twist', Twist)
        self.fill = TrajectoryMessage().fill

    def odometry(self):
        self.bus.publish('input/odometry', self.bus.odometry(speed_mps=STEADY_MPS), 50)

    def both(self, **shape):
        self.odometry()
        output = steady(self.bus.now_ns, **shape)
        self.bus.publish('output/trajectory', self.fill(output), 1)

    def until_braking(self, feed, reason):
        shown = f'braking: {reason}'
        self.bus.wait(lambda: self.bus.shows('follower: command', shown), feed)
        assert self.twists[-1].linear.x == 0.0

    def until_following(self, **shape):
        begin = len(self.twists)
        self.bus.wait(
            lambda: len(self.twists) > begin and self.twists[-1].linear.x > 5.0,
            lambda: self.both(**shape),
        )


@pytest.fixture(scope='module')
def follow(bus, launch):
    return Follow(bus, launch)


@pytest.fixture(autouse=True)
def alive(follow):
    yield
    assert follow.follower.exit_status is None


def test_it_brakes_from_the_first_moment_on(follow):
    follow.bus.wait(lambda: len(follow.twists) > 5, lambda: None)
    assert all(twist.linear.x == 0.0 for twist in follow.twists)
    follow.until_braking(follow.odometry, 'no_trajectory')
    nobody = 'nobody publishes /spanvla/output/trajectory'
    assert follow.bus.shows('follower: output/trajectory', nobody)


def test_it_follows(follow):
    follow.until_following()
    assert follow.twists[-1].linear.x == pytest.approx(STEADY_MPS, abs=0.3)
    assert follow.twists[-1].angular.z == pytest.approx(0.0, abs=0.02)
    follow.bus.wait(
        lambda: follow.bus.lines['spanvla/follower: command'].message == 'following', follow.both
    )


def test_it_turns(follow):
    follow.until_following(radius_m=20.0)
    for _ in range(20):
        follow.both(radius_m=20.0)
        follow.bus.spin(0.05)
    # The odometry of this test turns not at all, so the follower asks for somewhat more.
    assert 0.2 < follow.twists[-1].angular.z < 0.6


def test_without_a_trajectory_it_brakes(follow):
    follow.until_following()
    follow.until_braking(follow.odometry, 'trajectory_timeout')


def test_without_odometry_it_brakes(follow):
    follow.until_following()

    def trajectory_only():
        follow.bus.publish('output/trajectory', follow.fill(steady(follow.bus.now_ns)), 1)

    follow.until_braking(trajectory_only, 'odometry_timeout')


def broken(message: MultiDOFJointTrajectory, part: str) -> MultiDOFJointTrajectory:
    if part == 'nan':
        message.points[7].transforms[0].translation.x = math.nan
    elif part == 'empty':
        message.points = []
    elif part == 'frame':
        message.header.frame_id = 'map'
    return message


@pytest.mark.parametrize(
    ('part', 'words'),
    [('nan', 'not finite'), ('empty', 'at least two'), ('frame', 'is not output_frame')],
)
def test_a_bad_trajectory_is_refused_and_reported(follow, part, words):
    follow.until_following()

    def feed():
        follow.odometry()
        message = TrajectoryMessage().fill(steady(follow.bus.now_ns))
        follow.bus.publish('output/trajectory', broken(message, part), 1)

    follow.bus.wait(lambda: follow.bus.shows('follower: output/trajectory', words), feed)
    follow.until_braking(feed, 'trajectory_timeout')


def test_odometry_that_is_no_number_is_reported(follow):
    def feed():
        follow.both()
        follow.bus.publish('input/odometry', follow.bus.odometry(x_m=math.nan), 50)

    follow.bus.wait(lambda: follow.bus.shows('follower: input/odometry', 'not finite'), feed)
    assert follow.twists[-1].linear.x > 0.0


def test_stamps_that_run_backwards_brake(follow):
    follow.until_following()
    follow.bus.shift_ns = -5_000_000_000
    try:
        follow.until_braking(follow.both, 'trajectory_timeout')
    finally:
        follow.bus.shift_ns = 0
    follow.until_following()


def test_its_last_word_is_the_brake(launch, follow):
    follow.until_following()
    follow.follower.interrupt()
    follow.bus.wait(lambda: follow.follower.exit_status is not None, follow.both)
    # In time or cut: that is held by test_shutdown.py, which tries again on a busy machine.
    assert follow.follower.exit_status in (0, -signal.SIGALRM)
    follow.bus.spin(0.2)
    assert follow.twists[-1].linear.x == 0.0
    follow.follower.start()
    follow.until_following()


def test_the_process_holds_no_model_code(follow):
    code = (
        'import json, sys, spanvla_ros.ros.follower_node\n'
        'print(json.dumps([n for n in ("torch", "onnxruntime", "cv2") if n in sys.modules]))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(follow.follower.environment),
    )
    assert json.loads(done.stdout) == []


def test_a_stop_is_a_trajectory_it_can_read(follow):
    """The hard stop of the guardian, through the message, to a braking twist."""

    def feed():
        ego = EgoState(follow.bus.now_ns, 0.0, 0.0, 0.0, STEADY_MPS)
        motion = hard_stop(ego, 'odom', Vehicle())
        output = GuardianOutput(
            motion.trajectory,
            motion.speeds_mps,
            motion.accels_mps2,
            motion.yaw_rates_radps,
            'FAULT',
            ('made up',),
            0.0,
        )
        follow.odometry()
        follow.bus.publish('output/trajectory', follow.fill(output), 1)

    begin = len(follow.twists)
    follow.bus.wait(
        lambda: len(follow.twists) > begin + 5 and follow.twists[-1].linear.x < STEADY_MPS - 1.5,
        feed,
    )
