from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanvla_ros.safety.checks import check_motion, knots
from spanvla_ros.safety.fallback import comfortable_stop, follow_plan, hard_stop, usable
from spanvla_ros.safety.rollout import reference
from spanvla_ros.safety.state import GuardianOutput

SECOND = 1_000_000_000


def as_output(motion):
    reasons = ('standing',) if motion.stands else ('why',)
    return GuardianOutput(
        motion.trajectory,
        motion.speeds_mps,
        motion.accels_mps2,
        motion.yaw_rates_radps,
        'FALLBACK',
        reasons,
        0.0,
    )


@st.composite
def wild_states(draw):
    """Any finite odometry the guardian lets in."""
    wide = st.floats(-100.0, 100.0)
    return {
        'x_m': draw(st.floats(-1e7, 1e7)),
        'y_m': draw(st.floats(-1e7, 1e7)),
        'yaw_rad': draw(st.floats(-1e3, 1e3)),
        'speed': draw(wide),
        'accel_mps2': draw(wide),
        'yaw_rate_radps': draw(wide),
        'steering_rad': draw(wide),
    }


plans = st.fixed_dictionaries(
    {
        'speed': st.floats(0.0, 25.0),
        'accel': st.floats(-8.0, 3.0),
        'curvature': st.floats(-0.3, 0.3),
    }
)


def path_of(plan):
    times_s, poses = knots(plan)
    return reference(plan.trajectory.stamp_ns, times_s, poses, plan.speed_mps)


@settings(max_examples=150, deadline=None)
@given(state=wild_states())
def test_a_hard_stop_is_always_valid(complain, make_ego, vehicle, state):
    ego = make_ego(**state)
    motion = hard_stop(ego, 'odom', vehicle)
    assert complain(as_output(motion), ego, vehicle) == ''
    assert check_motion(motion, ego, vehicle) is None


@settings(max_examples=150, deadline=None)
@given(state=wild_states(), shape=plans, away=st.tuples(*[st.floats(-20, 20)] * 2))
def test_stops_and_plans_are_valid_from_any_state(
    complain, make_ego, make_plan, vehicle, state, shape, away
):
    ego = make_ego(**state)
    start = (state['x_m'] + away[0], state['y_m'] + away[1], state['yaw_rad'])
    path, profile = path_of(make_plan(start=start, **shape))
    for motion in (
        follow_plan(ego, 'odom', vehicle, path, profile),
        comfortable_stop(ego, 'odom', vehicle, path),
        hard_stop(ego, 'odom', vehicle, path),
    ):
        assert complain(as_output(motion), ego, vehicle) == ''
        assert check_motion(motion, ego, vehicle) is None


@settings(max_examples=100, deadline=None)
@given(speed=st.floats(0.5, 20.0))
def test_stopping_distances_are_those_of_the_decelerations(make_ego, make_plan, vehicle, speed):
    ego = make_ego(speed=speed)
    path, _ = path_of(make_plan(speed=20.0))
    gentle = comfortable_stop(ego, 'odom', vehicle, path)
    hard = hard_stop(ego, 'odom', vehicle)
    # Half a step of the sampling at most goes on top.
    expected = min(5.0, speed / vehicle.max_decel_mps2)
    assert hard.trajectory.poses[-1, 0] == pytest.approx(speed * expected / 2, abs=0.06)
    assert hard.speeds_mps[-1] == 0.0
    stop_s = min(5.0, speed / vehicle.comfort_decel_mps2)
    distance = speed * stop_s - 0.5 * vehicle.comfort_decel_mps2 * stop_s**2
    assert gentle.trajectory.poses[-1, 0] == pytest.approx(distance, abs=0.06)


def test_the_comfortable_stop_does_not_pass_where_the_plan_meant_to_stop(
    make_ego, make_plan, vehicle
):
    path, _ = path_of(make_plan(speed=10.0, accel=-5.0))
    motion = comfortable_stop(make_ego(speed=10.0), 'odom', vehicle, path)
    assert motion.speeds_mps[-1] == 0.0
    assert motion.trajectory.poses[-1, 0] == pytest.approx(10.0, abs=0.3)


def test_the_comfortable_stop_stays_on_a_curved_path(make_ego, make_plan, vehicle):
    path, _ = path_of(make_plan(speed=8.0, curvature=0.06))
    ego = make_ego(speed=8.0, yaw_rate_radps=0.48)
    motion = comfortable_stop(ego, 'odom', vehicle, path)
    radius = np.hypot(motion.trajectory.poses[:, 0], motion.trajectory.poses[:, 1] - 1 / 0.06)
    assert np.abs(radius - 1 / 0.06).max() < 0.15


def test_a_hard_stop_without_a_path_keeps_the_curve(make_ego, vehicle):
    motion = hard_stop(make_ego(speed=6.0, yaw_rate_radps=0.6), 'odom', vehicle)
    moving = motion.speeds_mps > 0.5
    ratio = motion.yaw_rates_radps[moving] / motion.speeds_mps[moving]
    assert ratio == pytest.approx(np.full(moving.sum(), 0.1), abs=1e-6)


def test_an_ego_that_rolls_backwards_is_held(make_ego, vehicle):
    motion = hard_stop(make_ego(speed=-3.0), 'odom', vehicle)
    assert motion.stands


def test_a_path_is_usable_near_it_and_along_it(make_ego, make_plan):
    path, _ = path_of(make_plan())
    ego = make_ego(x_m=5.0)
    assert usable(path, ego)
    assert not usable(None, ego)
    assert usable(path, replace(ego, y_m=1.9))
    assert not usable(path, replace(ego, y_m=2.1))
    assert not usable(path, replace(ego, yaw_rad=1.1))
