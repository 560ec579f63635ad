from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanvla_ros.safety.checks import (
    PlanContext,
    Reason,
    check_motion,
    check_plan,
    knots,
    route_offsets,
)
from spanvla_ros.safety.fallback import hard_stop
from spanvla_ros.types import Trajectory, Vehicle

SECOND = 1_000_000_000


@pytest.fixture
def judge(make_ego, vehicle):
    def judge(plan, **changes):
        values = {
            'now_ns': SECOND + 100_000_000,
            'ego': make_ego(stamp_ns=SECOND, speed=plan.speed_mps),
            'frame_id': 'odom',
            'vehicle': vehicle,
            'max_age_s': 1.0,
        }
        rejection = check_plan(plan, PlanContext(**(values | changes)))
        if rejection is None:
            return None
        assert rejection.detail
        return rejection.reason

    return judge


def moved(plan, change):
    """The plan with its poses changed in place by `change`."""
    poses = plan.trajectory.poses.copy()
    change(poses)
    return replace(plan, trajectory=replace(plan.trajectory, poses=poses))


def timed(plan, times_s):
    times_s = np.asarray(times_s, dtype=np.float64)
    poses = plan.trajectory.poses[: len(times_s)]
    return replace(plan, trajectory=Trajectory(SECOND, 'odom', times_s, poses))


@pytest.mark.parametrize('count_spacing', [(10, 0.5), (50, 0.1), (51, 0.1)])
@pytest.mark.parametrize(
    ('speed', 'accel', 'curvature'),
    [(8, 0, 0), (0, 0, 0), (0, 2, 0.04), (15, -3, 0.01), (5, 0, -0.15), (10, -7, 0), (1, -1, 0.2)],
)
def test_plans_a_vehicle_can_drive_are_accepted(
    judge, make_plan, speed, accel, curvature, count_spacing
):
    count, spacing_s = count_spacing
    plan = make_plan(
        speed=float(speed),
        accel=float(accel),
        curvature=curvature,
        count=count,
        spacing_s=spacing_s,
    )
    assert judge(plan) is None


def test_waypoint_noise_is_tolerated(judge, make_plan):
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        plan = make_plan(
            speed=rng.uniform(0, 15),
            accel=rng.uniform(-1.5, 1.0),
            curvature=rng.uniform(-0.02, 0.02),
        )
        noise = rng.normal(0.0, 0.05, (10, 2))
        noisy = moved(plan, lambda poses, noise=noise: poses[:, :2].__iadd__(noise))
        refused += judge(noisy) is not None
    assert refused == 0


def test_times(judge, make_plan):
    plan = make_plan()
    assert judge(timed(plan, [0.5, 1.0, 1.5])) is Reason.TIMES
    assert judge(timed(plan, [-0.5, 0.5, 1.0, 2.0])) is Reason.TIMES
    assert judge(timed(plan, [0.5, 1.0, 2.1, 2.5])) is Reason.TIMES
    assert judge(timed(plan, [0.5, 0.51, 1.5, 2.5])) is Reason.TIMES
    assert judge(timed(plan, [0.3, 0.6, 0.9, 1.2])) is Reason.TIMES
    assert judge(make_plan(count=21, speed=1.0)) is Reason.TIMES
    assert judge(make_plan(count=201, spacing_s=0.025, speed=1.0)) is Reason.TIMES
    assert judge(make_plan(count=200, spacing_s=0.025, speed=1.0)) is None


def straight(make_plan, times_s, speed=8.0, later_mps=8.0):
    """At a steady speed to the first waypoint, at another from there."""
    times_s = np.asarray(times_s, dtype=np.float64)
    poses = np.zeros((len(times_s), 3))
    poses[:, 0] = speed * times_s[0] + later_mps * (times_s - times_s[0])
    return replace(make_plan(speed=speed), trajectory=Trajectory(SECOND, 'odom', times_s, poses))


@pytest.mark.parametrize('first_s', [-100.0, -1e-9, 5e-324, 1e-9, 0.0199, 1.01, 3.0, 9.0])
def test_a_first_waypoint_in_the_past_at_once_or_far_ahead_is_refused(judge, make_plan, first_s):
    for times_s in (first_s + 0.5 * np.arange(10), first_s + 0.1 * np.arange(50)):
        assert judge(straight(make_plan, times_s)) is Reason.TIMES


@pytest.mark.parametrize('spacing_s', [0.1, 0.5])
@pytest.mark.parametrize('first_s', [0.0, 0.02, 0.05, 0.2, 0.3, 0.5, 1.0])
def test_a_first_waypoint_soon_after_the_picture_is_accepted(judge, make_plan, first_s, spacing_s):
    times_s = first_s + spacing_s * np.arange(round(5.0 / spacing_s))
    assert judge(straight(make_plan, times_s)) is None


@pytest.mark.parametrize('first_s', [0.02, 0.1, 0.2, 0.5])
def test_an_early_first_waypoint_does_not_hide_a_wrong_start(judge, make_plan, first_s):
    times_s = first_s + 0.5 * np.arange(10)
    assert judge(straight(make_plan, times_s, speed=12.0, later_mps=1.0)) is not None
    slow = straight(make_plan, times_s, speed=0.1, later_mps=0.1)
    assert judge(replace(slow, speed_mps=12.0)) is Reason.START_SPEED


def test_frame(judge, make_plan):
    assert judge(make_plan(), frame_id='map') is Reason.FRAME


def test_age(judge, make_plan):
    plan = make_plan()
    assert judge(plan, now_ns=SECOND + SECOND) is None
    assert judge(plan, now_ns=SECOND + SECOND + 1) is Reason.STALE_IMAGE
    assert judge(plan, now_ns=SECOND - SECOND // 10) is None
    assert judge(plan, now_ns=SECOND - SECOND // 10 - 1) is Reason.FROM_FUTURE


def test_order(judge, make_plan):
    newer = make_plan(stamp_ns=SECOND + 1)
    assert judge(make_plan(), previous=newer) is Reason.OUT_OF_ORDER
    assert judge(newer, previous=make_plan()) is None


def test_too_far(judge, make_plan):
    plan = make_plan()
    assert judge(moved(plan, lambda p: p.__setitem__((9, 0), 141.0))) is Reason.TOO_FAR
    assert judge(moved(plan, lambda p: p.__setitem__((3, 1), 1.7e308))) is Reason.TOO_FAR
    assert judge(replace(plan, origin=(0.0, -1e200, 0.0))) is Reason.TOO_FAR


def test_start_position(judge, make_plan, make_ego):
    plan = make_plan()
    assert judge(plan, ego=make_ego(y_m=1.3)) is None
    assert judge(plan, ego=make_ego(y_m=1.4)) is Reason.START_POSITION
    assert judge(plan, ego=make_ego(x_m=-4.5)) is Reason.START_POSITION
    assert judge(plan, ego=make_ego(x_m=4.5)) is Reason.START_POSITION


def test_start_is_judged_where_the_plan_should_be_by_now(judge, make_plan, make_ego):
    ego = make_ego(stamp_ns=SECOND + 500_000_000, x_m=4.0)
    late = {'now_ns': SECOND + 600_000_000}
    assert judge(make_plan(), ego=ego, **late) is None
    assert judge(make_plan(), ego=replace(ego, x_m=-1.0), **late) is Reason.START_POSITION


def test_start_heading(judge, make_plan, make_ego):
    assert judge(make_plan(), ego=make_ego(yaw_rad=0.5)) is None
    assert judge(make_plan(), ego=make_ego(yaw_rad=0.7)) is Reason.START_HEADING


@pytest.mark.parametrize(('speed', 'reason'), [(0.9, None), (1.1, Reason.ALL_EQUAL)])
def test_all_equal_while_moving(judge, make_plan, make_ego, speed, reason):
    assert judge(make_plan(speed=0.0), ego=make_ego(speed=speed)) is reason


def test_start_speed(judge, make_plan, make_ego):
    assert judge(make_plan(), ego=make_ego(speed=5.2)) is None
    assert judge(make_plan(), ego=make_ego(speed=4.8)) is Reason.START_SPEED
    assert judge(make_plan(), ego=make_ego(speed=12.8)) is None
    assert judge(make_plan(), ego=make_ego(speed=13.2)) is Reason.START_SPEED


def test_reversal(judge, make_plan):
    def back_at_the_end(poses):
        poses[9, 0] = poses[8, 0] - 0.8

    slow = make_plan(speed=1.0)
    assert judge(moved(slow, back_at_the_end)) is Reason.REVERSAL
    assert judge(moved(slow, lambda p: p[:, 0].__imul__(-1.0))) is Reason.REVERSAL


def test_heading_against_motion(judge, make_plan):
    assert judge(moved(make_plan(), lambda p: p.__setitem__((9, 2), 2.0))) is Reason.HEADING
    assert judge(moved(make_plan(), lambda p: p.__setitem__((9, 2), 1e9))) is Reason.HEADING


def test_speed(judge, make_plan):
    assert judge(make_plan(speed=21.5)) is None
    assert judge(make_plan(speed=19.0, accel=2.0)) is Reason.SPEED


def test_acceleration(judge, make_plan):
    assert judge(make_plan(speed=2.0, accel=3.5)) is None
    assert judge(make_plan(speed=2.0, accel=5.5, count=6)) is Reason.ACCELERATION

    def surge(poses):
        poses[5:, 0] += 2.0 * np.arange(1, 6) ** 1.5

    assert judge(moved(make_plan(speed=2.0), surge)) is Reason.ACCELERATION

    def wall(poses):
        poses[2:, 0] = poses[2, 0]

    assert judge(moved(make_plan(speed=14.0), wall)) is Reason.ACCELERATION


def test_jerk(judge, make_plan):
    weak = Vehicle(max_accel_mps2=8.0, max_decel_mps2=12.0)

    def kick(poses):
        poses[4:7, 0] += np.array([3.0, 6.0, 3.0])

    plan = moved(make_plan(speed=8.0), kick)
    assert judge(plan, vehicle=weak) is Reason.JERK


def test_curvature(judge, make_plan):
    assert judge(make_plan(speed=2.0, curvature=0.25)) is None
    assert judge(make_plan(speed=3.0, curvature=0.7)) is Reason.CURVATURE


def test_lateral_acceleration(judge, make_plan):
    assert judge(make_plan(speed=10.0, curvature=0.05)) is None
    assert judge(make_plan(speed=10.0, curvature=0.085)) is Reason.LATERAL_ACCELERATION


def test_steering_rate(judge, make_plan):
    slow = Vehicle(max_steering_rate_radps=0.05)

    def weave(poses):
        side = np.array([0, 0, 0, 1, -1, 1, -1, 1, -1, 1]) * 0.35
        poses[:, 1] += side

    plan = moved(make_plan(speed=7.0), weave)
    assert judge(plan, vehicle=replace(slow, max_lateral_accel_mps2=20.0)) is Reason.STEERING_RATE


def test_short_segments_have_no_direction(judge, make_plan):
    def dance(poses):
        poses[:, :2] = 0.1 * np.array([[(-1) ** i, (-1) ** (i // 2)] for i in range(10)])
        poses[:, :2] -= poses[0, :2]

    assert judge(moved(make_plan(speed=0.0), dance)) in (None, Reason.REVERSAL)
    assert judge(make_plan(speed=0.2)) is None


def test_continuity(judge, make_plan):
    swerve = make_plan(speed=10.0, curvature=0.05, stamp_ns=SECOND + 1)
    straight = make_plan(speed=10.0)
    assert judge(swerve, previous=straight) is None

    def sidestep(poses):
        poses[1:, 1] += 7.0

    loose = Vehicle(max_lateral_accel_mps2=5.0, max_steering_rate_radps=99.0)
    aside = moved(make_plan(speed=10.0, stamp_ns=SECOND + 1), sidestep)
    assert judge(aside, previous=straight, vehicle=loose) in (
        Reason.DISCONTINUITY,
        Reason.LATERAL_ACCELERATION,
        Reason.CURVATURE,
        Reason.HEADING,
    )
    far = make_plan(speed=10.0, start=(-3.0, 0.0, 0.0), accel=-4.0, stamp_ns=SECOND + 1)
    ahead = make_plan(speed=10.0, start=(4.0, 0.0, 0.0), accel=2.0)
    assert judge(ahead, previous=None) is None
    assert judge(far, previous=ahead) is Reason.DISCONTINUITY


def test_corridor(judge, make_plan):
    ahead = np.array([[-10.0, 0.0], [20.0, 0.0]])
    beside = np.array([[-10.0, 5.5], [20.0, 5.5]])
    assert judge(make_plan(), route=ahead) is None
    assert judge(make_plan(), route=beside) is None
    assert judge(make_plan(curvature=-0.02), route=beside) is Reason.CORRIDOR
    assert judge(make_plan(curvature=0.02), route=ahead) is Reason.CORRIDOR


@given(st.floats(-200, 200), st.floats(-50, 50), st.floats(0.0, 6.0), st.integers(2, 12))
def test_route_offsets_of_a_straight_route(along_m, left_m, yaw_rad, count):
    direction = np.array([np.cos(yaw_rad), np.sin(yaw_rad)])
    normal = np.array([-direction[1], direction[0]])
    route = np.linspace(-50.0, 150.0, count)[:, None] * direction
    clamped = min(max(along_m, -149.0), 249.0)
    point = clamped * direction + left_m * normal
    assert route_offsets(route, point[None])[0] == pytest.approx(left_m, abs=1e-6)


@settings(max_examples=60)
@given(count=st.integers(4, 60), spacing_s=st.floats(0.02, 1.0))
def test_knots_are_about_half_a_second_apart_and_keep_both_ends(make_plan, count, spacing_s):
    plan = make_plan(count=count, spacing_s=spacing_s)
    times_s, poses = knots(plan)
    assert times_s[0] == 0.0
    assert tuple(poses[0]) == plan.origin
    assert times_s[-1] == plan.trajectory.times_s[-1]
    assert (np.diff(times_s) > 0).all()
    assert np.diff(times_s).max() <= max(0.8, spacing_s + 1e-9)


def test_a_plan_that_repeats_the_present_at_time_zero(judge, make_plan):
    plan = make_plan(count=11)
    times_s = plan.trajectory.times_s - 0.5
    poses = np.concatenate([[plan.origin], plan.trajectory.poses[:-1]])
    plan = replace(plan, trajectory=Trajectory(SECOND, 'odom', times_s, poses))
    assert knots(plan)[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert judge(plan) is None


@pytest.mark.parametrize(
    'times_s',
    [
        [0.02, 0.04, 0.06, 0.08, 1.0, 2.0],
        [0.0, 0.02, 0.04, 0.06, 1.0, 2.0],
        [0.02, 0.04, 0.06, 0.5, 1.4, 2.3],
    ],
)
def test_waypoints_too_uneven_to_be_judged_are_refused(judge, make_plan, times_s):
    assert judge(timed(make_plan(), times_s)) is Reason.TIMES


class TestMotion:
    """What goes out is judged by the poses; each fault is made by hand."""

    @pytest.fixture
    def motion(self, make_ego, vehicle):
        ego = make_ego(speed=8.0, yaw_rate_radps=0.4)
        return hard_stop(ego, 'odom', vehicle)

    @pytest.fixture
    def reason(self, motion, make_ego, vehicle):
        def reason(change, **limits):
            poses = motion.trajectory.poses.copy()
            change(poses)
            broken = replace(motion, trajectory=replace(motion.trajectory, poses=poses))
            rejection = check_motion(broken, make_ego(speed=8.0), replace(vehicle, **limits))
            return None if rejection is None else rejection.reason

        return reason

    def test_sound(self, reason):
        assert reason(lambda p: None) is None

    def test_not_finite(self, reason):
        assert reason(lambda p: p.__setitem__((20, 1), np.nan)) is Reason.NOT_FINITE

    def test_start(self, reason):
        assert reason(lambda p: p.__setitem__((0, 0), 0.01)) is Reason.START_POSITION

    def test_slip(self, reason):
        assert reason(lambda p: p[1:, 1].__iadd__(0.1)) is Reason.HEADING

    def test_reversal(self, reason):
        def back(poses):
            poses[:] = 0.0
            poses[1:, 0] = -0.01

        assert reason(back) is Reason.REVERSAL

    @staticmethod
    def surge(poses):
        times_s = 0.1 * np.arange(51)
        poses[:] = 0.0
        poses[:, 0] = 8.0 * times_s + times_s**2

    def test_speed(self, reason):
        assert reason(self.surge, max_speed_mps=17.0) is Reason.SPEED
        assert reason(self.surge, max_speed_mps=18.0) is None

    def test_acceleration(self, reason):
        assert reason(lambda p: None, max_decel_mps2=6.0) is Reason.ACCELERATION

        assert reason(self.surge, max_accel_mps2=1.8) is Reason.ACCELERATION

    def test_steering(self, reason):
        assert reason(lambda p: None, max_steering_rad=0.1) is Reason.CURVATURE

    def test_lateral_acceleration(self, reason):
        assert reason(lambda p: None, max_lateral_accel_mps2=2.5) is Reason.LATERAL_ACCELERATION

    def test_steering_rate(self, reason):
        def snake(poses):
            heading = 0.01 * (-1.0) ** np.arange(51)
            heading[0] = 0.0
            poses[:] = 0.0
            poses[:, 2] = heading
            middle = 0.5 * (heading[1:] + heading[:-1])
            poses[1:, 0] = np.cumsum(0.8 * np.cos(middle))
            poses[1:, 1] = np.cumsum(0.8 * np.sin(middle))

        assert reason(snake) is Reason.STEERING_RATE
