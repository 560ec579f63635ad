"""Filters, fits and aggregations against independent truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import savgol_filter

from spanvla_ros.scoring import comfort, metrics, simulation
from spanvla_ros.scoring.two_stage import (
    SecondStagePair,
    TwoStageGroup,
    second_stage_weights,
    two_stage_epdms,
)
from spanvla_ros.types import SpanvlaError


@pytest.mark.parametrize(
    ('size', 'window', 'order', 'derivative'),
    [(41, 8, 2, 0), (41, 15, 2, 1), (41, 41, 2, 0), (41, 41, 2, 1), (55, 8, 2, 0), (36, 5, 3, 2)],
)
def test_filters_are_scipys(size, window, order, derivative):
    signal = np.random.default_rng(size + window).normal(size=(3, size))
    theirs = savgol_filter(signal, window, order, deriv=derivative, delta=0.1)
    ours = signal @ comfort.savgol_matrix(size, window, order, derivative).T
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def official_curvature(yaw: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """The regularised fit in curvature and its rates, as the definition states it."""
    size = simulation.STEPS
    design = np.tril(np.ones((size, size))) * speed[:, None] * 0.01
    design[:, 0] = speed * 0.1
    weights = np.diag([1e-10] + [1e-2] * (size - 1))
    turned = np.diff(yaw)
    solved = np.linalg.solve(design.T @ design + weights, design.T @ turned)
    return solved[0] + np.concatenate([[0.0], np.cumsum(solved[1:] * 0.1)])


def test_the_curvature_fit_is_the_dense_least_squares_fit():
    rng = np.random.default_rng(0)
    yaw = np.cumsum(rng.normal(scale=0.02, size=41))
    speed = rng.uniform(0.5, 15.0, size=40)
    ours = simulation._fit_curvature(yaw[:, None], speed[:, None])[:, 0]
    np.testing.assert_allclose(ours, official_curvature(yaw, speed), atol=1e-9)


def test_a_constant_plan_is_tracked_exactly_and_zero_speed_stays():
    start = np.zeros((2, 11))
    start[0, simulation.VX] = 7.0
    plans = np.zeros((2, 41, 3))
    plans[0, :, 0] = 0.7 * np.arange(41)
    states = simulation.simulate(plans, start)
    np.testing.assert_allclose(states[0, :, 0], 0.7 * np.arange(41), atol=0.05)
    np.testing.assert_allclose(states[1], 0.0, atol=1e-12)


poses = st.tuples(st.floats(-4.0, 4.0), st.floats(-4.0, 4.0), st.floats(-3.2, 3.2))
sizes = st.tuples(st.floats(0.1, 4.0), st.floats(0.1, 2.0))


@given(a=poses, b=poses, size_a=sizes, size_b=sizes)
def test_boxes_overlap_as_polygons_do(a, b, size_a, size_b):
    def polygon(pose, size):
        x, y, yaw = pose
        cos, sin = math.cos(yaw), math.sin(yaw)
        corners = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
        return shapely.Polygon(
            [
                (
                    x + i * size[0] * cos - j * size[1] * sin,
                    y + i * size[0] * sin + j * size[1] * cos,
                )
                for i, j in corners
            ]
        )

    one, other = polygon(a, size_a), polygon(b, size_b)
    gap = one.distance(other) if not one.intersects(other) else -1.0
    near_touch = abs(gap) < 1e-6 or one.intersection(other).area < 1e-6 > 0 >= gap
    ours = metrics._boxes_overlap(
        np.array([[a[0] - b[0], a[1] - b[1]]]),
        *(np.array([v]) for v in (a[2], *size_a, b[2], *size_b)),
    )[0]
    if not near_touch:
        assert ours == one.intersects(other)


def test_progress_rules_differ_as_published():
    raw, gate = np.array([20.0, 4.0, 30.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    v1 = metrics.ego_progress_v1(10.0, raw, gate)
    v2 = metrics.ego_progress_v2(10.0, raw, gate)
    np.testing.assert_allclose(v1, [1.0, 0.4, 0.0, 0.0])
    np.testing.assert_allclose(v2, [1.0, 0.4, 1.0, 0.0])
    # A reference that breaks a rule drops out; below 5 m everyone has arrived.
    np.testing.assert_allclose(metrics.ego_progress_v1(0.0, raw, gate), [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(metrics.ego_progress_v2(0.0, raw, gate), [1.0, 1.0, 1.0, 1.0])


def test_second_stage_weights_by_hand():
    # Squared distances 0 and 0.2 with variance 0.1: weights 1 and 1/e, normalised.
    weights = second_stage_weights((1.0, 2.0), [(1.0, 2.0), (1.0, 2.0 + math.sqrt(0.2))])
    np.testing.assert_allclose(weights, [1.0 / (1.0 + math.exp(-1)), 1.0 / (1.0 + math.e)])
    np.testing.assert_allclose(second_stage_weights((0.0, 0.0), [(90.0, 0.0)] * 4), [0.25] * 4)


def test_two_stage_score_by_hand():
    far = (100.0, 100.0)
    pairs = (
        SecondStagePair(now=1.0, before=0.2, start_now=(0.0, 0.0), start_before=(5.0, 5.0)),
        SecondStagePair(now=0.0, before=0.6, start_now=far, start_before=far),
    )
    first = TwoStageGroup(0.8, 0.5, (0.0, 0.0), (0.0, 0.0), pairs)
    # now: weights 1 and 0, 0.8 * 1.0; before: both too far, so equal, 0.5 * 0.4.
    assert two_stage_epdms([first]) == pytest.approx((0.8 + 0.2) / 2.0)
    second = TwoStageGroup(0.0, 1.0, (0.0, 0.0), far, pairs)
    # now: 0; before: weights 0 and 1, 1.0 * 0.6.
    assert two_stage_epdms([first, second]) == pytest.approx((0.5 + 0.3) / 2.0)
    with pytest.raises(SpanvlaError, match='second-stage pair'):
        two_stage_epdms([TwoStageGroup(1.0, 1.0, (0.0, 0.0), (0.0, 0.0), ())])


def test_savgol_matrix_is_shared_between_calls():
    assert comfort.savgol_matrix(41, 8, 2, 0) is comfort.savgol_matrix(41, 8, 2, 0)
