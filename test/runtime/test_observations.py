"""Alignment in time and along the route, against drives whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.geometry import local_from_world, sample_polyline
from spanvla_ros.model.config import ModelConfig, with_settings
from spanvla_ros.runtime.observations import ObservationBuilder, command_from_route, observation_of
from spanvla_ros.types import CameraFrame, EgoState, Plan, Route, SpanvlaError, Trajectory

NS = 1_000_000_000
RADIUS_M, SPEED = 40.0, 8.0
IMAGE = np.zeros((112, 224, 3), np.uint8)


def ns(seconds):
    return round(seconds * NS)


def truth(t):
    """A circle to the left, driven at constant speed."""
    yaw = SPEED * t / RADIUS_M
    x, y = RADIUS_M * math.sin(yaw), RADIUS_M * (1 - math.cos(yaw))
    return EgoState(ns(t), x, y, math.remainder(yaw, 2 * math.pi), SPEED, 0.0, SPEED / RADIUS_M)


def straight_route(length=200.0, command='follow'):
    points = np.stack([np.arange(-20.0, length, 12.0), np.zeros(len(np.arange(-20, length, 12)))])
    return Route(0, 'odom', points.T, command)


def builder_with(egos, frames_at=(), config=None, names=None):
    config = config or ModelConfig()
    builder = ObservationBuilder(config)
    for ego in egos:
        assert builder.add_ego(ego) == ''
    for stamp in frames_at:
        for name in names or config.camera_names:
            builder.add_frame(CameraFrame(name, ns(stamp), IMAGE))
    return builder


def drive(until=3.0, rate=50, start=0.0):
    count = round((until - start) * rate) + 1
    return [truth(start + i / rate) for i in range(count)]


def standing(stamps, speed=0.0):
    return [EgoState(ns(t), speed * t, 0.0, 0.0, speed) for t in stamps]


def test_history_is_resampled_to_the_model_times():
    builder = builder_with(drive(), [2.713])
    seen = builder.build(ns(2.713))
    assert seen.degraded == ('route_missing',)
    assert seen.history_valid.all()
    for row, lag in enumerate((1.5, 1.0, 0.5)):
        expected = local_from_world(truth(2.713).pose, truth(2.713 - lag).pose)
        np.testing.assert_allclose(seen.history[row], expected, atol=2e-3)
    np.testing.assert_allclose(seen.ego.pose, truth(2.713).pose, atol=2e-3)


def test_history_is_right_where_yaw_wraps():
    half_turn_s = math.pi * RADIUS_M / SPEED
    builder = builder_with(drive(half_turn_s + 0.5), [half_turn_s])
    seen = builder.build(ns(half_turn_s))
    assert abs(abs(seen.ego.yaw_rad) - math.pi) < 1e-3
    np.testing.assert_allclose(seen.history[:, 2], [-0.3, -0.2, -0.1], atol=1e-3)


def test_short_history_is_extrapolated_and_marked():
    builder = builder_with(drive(3.0, start=2.2), [3.0])
    seen = builder.build(ns(3.0))
    assert 'history_short' in seen.degraded
    assert seen.history_valid.tolist() == [False, False, True]
    expected = local_from_world(truth(3.0).pose, truth(1.5).pose)
    np.testing.assert_allclose(seen.history[0], expected, atol=0.01)


def test_odometry_that_starts_with_the_picture_gives_an_observation():
    builder = builder_with(drive(1.0, start=1.0), [1.0])
    seen = builder.build(ns(1.0))
    assert not seen.history_valid.any()
    assert 'history_short' in seen.degraded


def test_a_gap_in_the_odometry_marks_what_falls_into_it():
    egos = [e for e in drive() if not 1.3 < e.stamp_ns / NS < 1.8]
    seen = builder_with(egos, [2.5]).build(ns(2.5))
    assert 'history_gap' in seen.degraded
    assert seen.history_valid.tolist() == [True, False, True]


def test_a_jump_of_the_odometry_cuts_the_history():
    egos = drive(2.0) + [
        replace(truth(2.0 + i / 50), x_m=truth(2.0 + i / 50).x_m + 5.0) for i in range(1, 41)
    ]
    seen = builder_with(egos, [2.8]).build(ns(2.8))
    assert 'odometry_jump' in seen.degraded
    assert seen.history_valid.tolist() == [False, False, True]
    later = builder_with(
        egos
        + [replace(truth(2.8 + i / 50), x_m=truth(2.8 + i / 50).x_m + 5.0) for i in range(1, 60)],
        [3.9],
    ).build(ns(3.9))
    assert later.degraded == ('route_missing',)


def test_nearest_pictures_within_tolerance_else_the_camera_is_missing():
    builder = builder_with(drive())
    builder.add_frame(CameraFrame('front', ns(2.0), IMAGE))
    builder.add_frame(CameraFrame('front_left', ns(1.96), IMAGE))
    builder.add_frame(CameraFrame('front_left', ns(2.03), IMAGE))
    builder.add_frame(CameraFrame('front_right', ns(1.94), IMAGE))
    seen = builder.build(ns(2.0))
    assert seen.frames[1][0].stamp_ns == ns(2.03)
    assert seen.frames[2] == (None,)
    assert 'camera_missing:front_right' in seen.degraded


def test_frames_per_camera_are_taken_at_their_lag_oldest_first():
    config = with_settings(ModelConfig(), frames_per_camera=3)
    builder = builder_with(drive(), [2.0 - k / 10 for k in range(12, -1, -1)], config)
    seen = builder.build(ns(2.0))
    assert [f.stamp_ns for f in seen.frames[0]] == [ns(1.0), ns(1.5), ns(2.0)]
    few = builder_with(drive(), [1.5, 2.0], config).build(ns(2.0))
    assert few.frames[0][0] is None
    assert 'frames_short:front' in few.degraded


def test_without_anchor_picture_or_ego_there_is_no_observation():
    builder = builder_with(drive(), [2.0], names=['front_left'])
    assert builder.build(ns(2.0)) is None
    assert builder.refusal == 'anchor_image_missing'
    builder = builder_with([], [2.0])
    assert builder.build(ns(2.0)) is None
    assert builder.refusal == 'ego_missing'
    builder = builder_with(drive(1.0), [2.0])
    assert builder.build(ns(2.0)) is None
    assert builder.refusal == 'ego_stale'


def test_a_picture_newer_than_the_odometry_moves_the_ego_on():
    seen = builder_with(drive(2.0), [2.1]).build(ns(2.1))
    np.testing.assert_allclose(seen.ego.pose, truth(2.1).pose, atol=0.01)
    assert 'ego_extrapolated' in seen.degraded


def test_bad_numbers_strangers_and_repeats_are_refused_with_their_reason():
    builder = builder_with(drive(1.0), [1.0])
    assert builder.add_ego(replace(truth(1.1), x_m=math.nan)) == 'ego_not_finite'
    assert builder.add_ego(replace(truth(1.1), yaw_rate_radps=math.inf)) == 'ego_not_finite'
    assert builder.add_ego(truth(1.0)) == 'ego_out_of_order'
    assert builder.add_frame(CameraFrame('roof', ns(1.1), IMAGE)) == 'camera_unknown'
    assert builder.add_frame(CameraFrame('front', ns(1.0), IMAGE)) == 'image_out_of_order'
    assert builder.set_route(Route(0, 'odom', np.array([[0.0, np.nan]]))) == 'route_not_finite'
    with pytest.raises(SpanvlaError, match='command'):
        builder.set_command('fly')


def test_a_clock_running_backwards_starts_afresh():
    builder = builder_with(drive(3.0), [3.0])
    assert builder.add_ego(truth(0.0)) == ''
    assert builder.resets == 1
    builder.add_frame(CameraFrame('front', ns(0.0), IMAGE))
    seen = builder.build(ns(0.0))
    assert not seen.history_valid.any()
    assert builder.build(ns(3.0)) is None


def test_acceleration_is_derived_where_odometry_gives_none():
    def braking(t):
        speed = 10.0 - 2.0 * t
        return EgoState(ns(t), 10.0 * t - t * t, 0.0, 0.0, speed)

    builder = builder_with([braking(i / 50) for i in range(101)], [2.0])
    assert builder.build(ns(2.0)).ego.accel_mps2 == pytest.approx(-2.0, abs=0.05)
    given_one = [replace(braking(i / 50), accel_mps2=-1.5) for i in range(101)]
    assert builder_with(given_one, [2.0]).build(ns(2.0)).ego.accel_mps2 == pytest.approx(-1.5)


def test_the_route_is_cut_by_projection_and_given_every_15_m():
    builder = builder_with(standing(np.arange(0, 2, 0.02), 5.0), [1.9])
    builder.set_route(straight_route())
    seen = builder.build(ns(1.9))
    np.testing.assert_allclose(seen.route[:, 0], [15, 30, 45, 60, 75], atol=1e-9)
    np.testing.assert_allclose(seen.route[:, 1], 0, atol=1e-9)
    assert seen.degraded == ()
    assert seen.command == 'follow'


def test_a_short_route_goes_straight_on_and_is_marked():
    builder = builder_with(standing(np.arange(0, 2, 0.02)), [1.9])
    builder.set_route(Route(0, 'odom', np.array([[-5.0, 0.0], [20.0, 0.0], [20.0, 10.0]])))
    seen = builder.build(ns(1.9))
    np.testing.assert_allclose(seen.route[-1], [20, 55], atol=1e-9)
    assert seen.degraded == ('route_short',)
    assert seen.command == 'left'


@pytest.mark.parametrize(
    ('points', 'reason'),
    [
        (np.zeros((0, 2)), 'route_empty'),
        (np.zeros((4, 2)), 'route_empty'),
        (np.array([[-90.0, 0.0], [-10.0, 0.0]]), 'route_behind'),
        (np.array([[100.0, 1.0], [-100.0, 1.0]]), 'route_behind'),
        (np.array([[-100.0, 70.0], [100.0, 70.0]]), 'route_far'),
    ],
)
def test_a_useless_route_is_named_and_left_out(points, reason):
    builder = builder_with(standing(np.arange(0, 2, 0.02)), [1.9])
    builder.set_route(Route(0, 'odom', points))
    seen = builder.build(ns(1.9))
    assert seen.route is None
    assert seen.degraded == (reason,)


def test_a_route_that_crosses_itself_is_followed_in_order():
    # A loop: east 100 m, back around, crossing the start again going north at x = 50.
    corners = [(0, 0), (100, 0), (100, 50), (50, 50), (50, -100)]
    points = sample_polyline(np.array(corners, float), np.arange(0.0, 350.0, 10.0))
    route = Route(0, 'odom', points)
    builder = ObservationBuilder(ModelConfig())
    for i in range(200):
        t = i / 20
        builder.add_ego(EgoState(ns(t), 0.2 + 10.0 * t, 0.3, 0.0, 10.0))
        builder.add_frame(CameraFrame('front', ns(t), IMAGE))
        builder.set_route(route)
        seen = builder.build(ns(t))
        if seen.ego.x_m < 80:
            assert seen.route[0, 1] == pytest.approx(-0.3, abs=0.01)


def test_commands_explicit_then_announced_then_inferred():
    builder = builder_with(standing(np.arange(0, 2, 0.02)), [1.9])
    builder.set_route(straight_route(command='right'))
    assert builder.build(ns(1.9)).command == 'right'
    builder.set_command('stop')
    assert builder.build(ns(1.9)).command == 'stop'
    builder.set_command(None)
    builder.set_route(straight_route())
    assert builder.build(ns(1.9)).command == 'follow'


@given(st.floats(-1.0, 1.0), st.integers(0, 10_000))
def test_route_noise_on_gentle_roads_infers_no_turn_and_mirrors(bend, seed):
    along = np.arange(15.0, 76.0, 15.0)
    route = np.stack([along, 0.5 * 0.002 * bend * along**2], axis=-1)
    route += np.random.default_rng(seed).normal(0, 0.7, route.shape)
    assert command_from_route(route) == 'follow'
    corner = np.stack([np.minimum(along, 25), np.maximum(along - 25, 0)], axis=-1)
    assert command_from_route(corner) == 'left'
    assert command_from_route(corner * [1.0, -1.0]) == 'right'


def test_a_record_needs_its_own_pictures():
    plan = Plan(
        1, Trajectory(5, 'odom', np.array([0.5, 1.0]), np.zeros((2, 3))), (1.0, 2.0, 0.5),
        (5, None, 5), 5, 'off', 5, history=((0.0, 0.0, 0.0),), history_valid=(False,),
    )  # fmt: skip
    frame = CameraFrame('front', 5, IMAGE)
    seen = observation_of(plan, ((frame,), (None,), (frame,)))
    np.testing.assert_array_equal(seen.ego.pose, [1.0, 2.0, 0.5])
    with pytest.raises(SpanvlaError, match='needs pictures'):
        observation_of(plan, ((frame,), (frame,), (frame,)))


def side_camera_falls_silent(policy):
    """A camera whose last picture is 0.2 s old, under a policy."""
    builder = ObservationBuilder(ModelConfig(), missing_camera=policy, last_valid_max_age_s=0.25)
    for ego in drive():
        builder.add_ego(ego)
    for stamp, names in ((1.8, ('front', 'front_left', 'front_right')), (2.0, ('front',))):
        for name in names:
            builder.add_frame(CameraFrame(name, ns(stamp), IMAGE))
    builder.add_frame(CameraFrame('front_right', ns(2.0), IMAGE))
    return builder


def test_a_missing_camera_is_masked_stood_in_for_or_refuses_the_plan():
    masked = side_camera_falls_silent('mask').build(ns(2.0))
    assert masked.frames[1] == (None,)
    assert 'camera_missing:front_left' in masked.degraded
    late = side_camera_falls_silent('last_valid')
    seen = late.build(ns(2.0))
    assert seen.frames[1][0].stamp_ns == ns(1.8)
    assert 'camera_late:front_left' in seen.degraded
    late.add_frame(CameraFrame('front', ns(2.1), IMAGE))
    assert late.build(ns(2.1)).frames[1] == (None,)
    dropped = side_camera_falls_silent('drop')
    assert dropped.build(ns(2.0)) is None
    assert dropped.refusal == 'camera_missing:front_left'
    dropped.add_frame(CameraFrame('front_left', ns(2.01), IMAGE))
    assert dropped.build(ns(2.0)) is not None
    # The anchor itself is never stood in for.
    assert late.build(ns(2.2)) is None
    with pytest.raises(SpanvlaError, match='missing_camera'):
        ObservationBuilder(ModelConfig(), missing_camera='black')
