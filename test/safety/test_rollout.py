import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanvla_ros.safety.rollout import (
    MIN_PIECE_M,
    TIMES_S,
    Path,
    Profile,
    monotone_slopes,
    present_steering,
    reference,
    roll_out,
    steering_limit,
)

SECOND = 1_000_000_000


def circle_knots(radius_m, spacing_m, count):
    angle = spacing_m / radius_m * np.arange(count)
    return np.stack([radius_m * np.sin(angle), radius_m * (1 - np.cos(angle))], axis=1)


@pytest.mark.parametrize(('radius_m', 'spacing_m'), [(12.0, 3.0), (30.0, 4.0), (200.0, 7.5)])
def test_a_path_stays_on_the_circle_its_knots_lie_on(radius_m, spacing_m):
    path = Path.through(circle_knots(radius_m, spacing_m, 11), 0.0)
    reach = np.hypot(path.points[:, 0], path.points[:, 1] - radius_m)
    assert np.abs(reach - radius_m).max() < 0.02 * spacing_m
    assert path.length_m == pytest.approx(10 * 2 * radius_m * math.sin(spacing_m / radius_m / 2))


def test_a_path_goes_straight_on_beyond_both_ends():
    path = Path.through(np.array([[1.0, 1.0], [1.0, 3.0]]), math.pi / 2)
    assert path.at(5.0) == pytest.approx((1.0, 6.0))
    assert path.at(-2.0) == pytest.approx((1.0, -1.0))
    assert path.at(1.5) == pytest.approx((1.0, 2.5))


def test_a_single_knot_is_a_metre_ahead():
    path = Path.through(np.array([[2.0, 0.0]]), math.pi)
    assert path.length_m == 1.0
    assert path.at(1.0) == pytest.approx((1.0, 0.0))


@given(st.floats(-3, 14), st.floats(-4, 4), st.floats(-3, 3))
def test_offset_from_a_straight_path(along_m, left_m, turn_rad):
    path = Path.through(np.array([[0.0, 0.0], [4.0, 0.0], [10.0, 0.0]]), 0.0)
    found = path.offset(along_m, left_m, turn_rad)
    assert found == pytest.approx((along_m, left_m, abs(turn_rad)), abs=1e-9)


def test_heading_difference_takes_the_short_way_round():
    path = Path.through(np.array([[0.0, 0.0], [-9.0, 0.0]]), math.pi)
    assert path.offset(-3.0, 0.0, -math.pi + 0.1)[2] == pytest.approx(0.1)


def test_a_knot_where_the_path_turns_back_has_a_finite_tangent():
    path = Path.through(np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]), 0.0)
    assert np.isfinite(path.points).all()


rising = st.lists(st.floats(0.0, 8.0), min_size=3, max_size=12)


@given(rising, st.floats(-2.0, 20.0), st.floats(0.1, 1.0))
def test_profiles_never_fall_and_pass_their_knots(steps, first_mps, span_s):
    along = np.concatenate([[0.0], np.cumsum(steps)])
    times_s = span_s * np.arange(len(along))
    profile = Profile(0, times_s, along, monotone_slopes(times_s, along, first_mps))
    fine_s = np.linspace(-0.2, times_s[-1] + 1.0, 500)
    found, speeds = profile.sample(fine_s)
    assert (np.diff(found) >= -1e-9).all()
    assert (speeds >= 0).all()
    assert profile.sample(times_s)[0] == pytest.approx(along, abs=1e-9)
    # The speed is the slope of the distance.
    inside = (fine_s > 0.01) & (fine_s < times_s[-1] - 0.01)
    later, _ = profile.sample(fine_s + 1e-5)
    sooner, _ = profile.sample(fine_s - 1e-5)
    slope = (later - sooner) / 2e-5
    assert speeds[inside] == pytest.approx(slope[inside], abs=5e-3)


def test_beyond_its_end_a_profile_goes_on_at_its_last_speed():
    times_s = np.array([0.0, 1.0, 2.0, 3.0])
    along = np.array([0.0, 4.0, 8.0, 12.0])
    profile = Profile(0, times_s, along, monotone_slopes(times_s, along, 4.0))
    found, speeds = profile.sample(np.array([4.0]))
    assert found == pytest.approx([16.0])
    assert speeds == pytest.approx([4.0])


def test_a_standing_plan_that_jitters_neither_turns_nor_creeps(make_ego, vehicle):
    rng = np.random.default_rng(3)
    poses = np.zeros((11, 3))
    poses[:, :2] = rng.uniform(-0.1, 0.1, (11, 2))
    poses[0] = 0.0
    path, profile = reference(SECOND, 0.5 * np.arange(11), poses, 0.0)
    motion = roll_out(make_ego(speed=0.0), 'odom', vehicle, path, profile)
    assert np.abs(motion.trajectory.poses[:, 0]).max() < MIN_PIECE_M
    assert np.abs(motion.trajectory.poses[:, 2]).max() < 0.02


@pytest.mark.parametrize(
    ('speed', 'accel', 'curvature'), [(8.0, 0.0, 0.05), (5.0, 1.0, 0.0), (10.0, -2.0, 0.02)]
)
def test_a_good_plan_comes_out_as_it_went_in(
    make_plan, make_ego, vehicle, speed, accel, curvature
):
    plan = make_plan(speed=speed, accel=accel, curvature=curvature)
    fine = make_plan(speed=speed, accel=accel, curvature=curvature, count=50, spacing_s=0.1)
    poses = np.concatenate([[plan.origin], plan.trajectory.poses])
    times_s = np.append(0.0, plan.trajectory.times_s)
    path, profile = reference(SECOND, times_s, poses, speed)
    ego = make_ego(speed=speed, yaw_rate_radps=speed * curvature)
    motion = roll_out(ego, 'odom', vehicle, path, profile)
    gap = motion.trajectory.poses[1:, :2] - fine.trajectory.poses[:, :2]
    assert np.hypot(*gap.T).max() < 0.45
    expected = np.maximum(speed + accel * TIMES_S, 0.0)
    assert np.abs(motion.speeds_mps - expected).max() < 0.5


def test_a_retimed_plan_goes_on_from_where_it_should_be(make_plan, make_ego, vehicle):
    plan = make_plan(speed=8.0)
    poses = np.concatenate([[plan.origin], plan.trajectory.poses])
    times_s = np.append(0.0, plan.trajectory.times_s)
    path, profile = reference(SECOND, times_s, poses, 8.0)
    later = make_ego(stamp_ns=SECOND + 900_000_000, x_m=7.2, speed=8.0)
    motion = roll_out(later, 'odom', vehicle, path, profile)
    assert motion.trajectory.poses[:, 0] == pytest.approx(7.2 + 8.0 * TIMES_S, abs=0.05)


def test_an_offset_ego_joins_the_path_without_overshoot(make_plan, make_ego, vehicle):
    plan = make_plan(speed=8.0)
    poses = np.concatenate([[plan.origin], plan.trajectory.poses])
    times_s = np.append(0.0, plan.trajectory.times_s)
    path, profile = reference(SECOND, times_s, poses, 8.0)
    motion = roll_out(make_ego(speed=8.0, y_m=1.0), 'odom', vehicle, path, profile)
    side = motion.trajectory.poses[:, 1]
    assert side[0] == 1.0
    assert side.min() > -0.15
    assert abs(side[-1]) < 0.05


def test_too_fast_in_a_tight_curve_does_not_speed_up(make_ego, vehicle):
    ego = make_ego(speed=9.0, yaw_rate_radps=0.55)
    times_s = 0.5 * np.arange(11)
    along = 9.0 * times_s + 0.7 * times_s**2
    profile = Profile(SECOND, times_s, along, monotone_slopes(times_s, along, 9.0))
    path = Path.through(circle_knots(14.0, 4.0, 12), 0.0)
    motion = roll_out(ego, 'odom', vehicle, path, profile)
    lateral = np.abs(motion.yaw_rates_radps) * motion.speeds_mps
    assert lateral.max() <= vehicle.max_lateral_accel_mps2 * 1.001
    assert motion.speeds_mps.max() <= 9.0 + 1e-9


@settings(max_examples=200)
@given(st.floats(-5, 100), st.floats(-100, 100), st.floats(-100, 100))
def test_present_steering_is_within_what_the_vehicle_can(make_ego, vehicle, speed, rate, wheel):
    ego = make_ego(speed=speed, yaw_rate_radps=rate, steering_rad=wheel)
    found = present_steering(ego, vehicle)
    assert abs(found) <= vehicle.max_steering_rad
    curvature = math.tan(found) / vehicle.wheelbase_m
    assert abs(curvature) * max(speed, 0.0) ** 2 <= vehicle.max_lateral_accel_mps2 * (1 + 1e-9)
    assert found * (rate if speed > 1.0 else wheel) >= 0.0


def test_steering_limit():
    from spanvla_ros.types import Vehicle

    vehicle = Vehicle()
    assert steering_limit(0.0, vehicle) == vehicle.max_steering_rad
    at_20 = math.atan(3.089 * 5.0 / 400.0)
    assert steering_limit(20.0, vehicle) == pytest.approx(at_20)
    assert steering_limit(20.0, vehicle, 0.5) == pytest.approx(math.atan(3.089 * 2.5 / 400.0))
