"""Source path, normalisation and Euler loop against closed forms."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import (
    Normalization,
    arc,
    decode_trajectory,
    encode_trajectory,
    euler,
    fit_curvature,
    history_source,
    load_normalization,
    source_path,
    start_state,
    time_features,
    write_normalization,
)
from spanvla_ros.types import EgoState, Observation, SpanvlaError

CONFIG = ModelConfig()
TIMES, PAST = CONFIG.times_s, CONFIG.history_times_s
speeds = st.floats(0.5, 15.0)
curvatures = st.floats(-0.1, 0.1)


def observation(speed, history, valid=(True, True, True), yaw_rate=0.0):
    return Observation(
        stamp_ns=0,
        frames=(),
        ego=EgoState(0, 0.0, 0.0, 0.0, speed, 0.0, yaw_rate),
        history=history,
        history_valid=np.array(valid),
        route=None,
    )


@given(speeds, curvatures)
def test_an_arc_is_what_a_bicycle_drives(speed, curvature):
    state, track = np.zeros(3), []
    step = 0.5 / 500
    for i in range(5000):
        middle = state[2] + 0.5 * step * speed * curvature
        state = state + step * speed * np.array([np.cos(middle), np.sin(middle), curvature])
        if i % 500 == 499:
            track.append(state)
    np.testing.assert_allclose(arc(speed, curvature, TIMES), track, atol=1e-3)


@given(st.floats(3.0, 15.0), curvatures)
def test_the_driven_curvature_is_found(speed, curvature):
    past = arc(speed, curvature, PAST)
    found = fit_curvature(past, speed, speed * curvature)
    assert found == pytest.approx(curvature, rel=0.1, abs=1e-6)
    source = history_source(observation(speed, past, yaw_rate=speed * curvature), TIMES)
    exact = arc(speed, curvature, TIMES)
    assert np.abs(source - exact)[:4].max() < 0.6


@given(speeds, curvatures, st.integers(0, 999))
def test_the_source_mirrors(speed, curvature, seed):
    past = arc(speed, curvature, PAST) + np.random.default_rng(seed).normal(0, 0.05, (3, 3))
    mirror = np.array([1.0, -1.0, -1.0])
    one = history_source(observation(speed, past, yaw_rate=0.1), TIMES)
    other = history_source(observation(speed, past * mirror, yaw_rate=-0.1), TIMES)
    np.testing.assert_allclose(other, one * mirror, atol=1e-9)


@given(st.floats(0.0, 0.3), st.integers(0, 999))
def test_near_standstill_noise_makes_no_curve(speed, seed):
    past = np.random.default_rng(seed).normal(0, 0.05, (3, 3))
    source = history_source(observation(speed, past), TIMES)
    assert np.abs(source[:, 1]).max() < 0.25
    assert np.isfinite(source).all()


def test_standing_still_the_source_stands():
    assert not history_source(observation(0.0, np.zeros((3, 3))), TIMES).any()


def test_poses_not_valid_are_not_used():
    nonsense = np.full((3, 3), 9.0)
    straight = history_source(observation(5.0, nonsense, (False,) * 3), TIMES)
    np.testing.assert_allclose(straight, arc(5.0, 0.0, TIMES))


def test_sources_by_name():
    seen = observation(5.0, arc(5.0, 0.05, PAST), yaw_rate=0.25)
    np.testing.assert_allclose(source_path('constant_velocity', seen, TIMES)[-1], [25, 0, 0])
    assert not source_path('gaussian', seen, TIMES).any()
    assert source_path('history', seen, TIMES)[-1, 1] > 5
    with pytest.raises(SpanvlaError, match='source'):
        source_path('oracle', seen, TIMES)
    assert not start_state('history', 10).any()
    assert np.array_equal(start_state('gaussian', 10, 3), start_state('gaussian', 10, 3))
    assert start_state('gaussian', 2000).std() == pytest.approx(1.0, abs=0.05)


@given(st.integers(0, 999))
def test_normalising_and_back(seed):
    rng = np.random.default_rng(seed)
    poses = rng.normal(0, [20, 5, 1], (10, 3))
    source = rng.normal(0, [20, 5, 1], (10, 3))
    std = rng.uniform(0.1, 5, (10, 3))
    x = encode_trajectory(poses, source, std)
    back = decode_trajectory(x, source, std)
    np.testing.assert_allclose(back[:, :2], poses[:, :2], atol=1e-4)
    np.testing.assert_allclose(np.sin(back[:, 2] - poses[:, 2]), 0, atol=1e-5)
    np.testing.assert_allclose(decode_trajectory(0 * x, source, std)[:, :2], source[:, :2])


@pytest.mark.parametrize('steps', [1, 2, 5, 50])
def test_euler_of_a_linear_field(steps):
    x = euler(lambda x, t: 2.0 * x, np.ones(3, np.float32), steps)
    np.testing.assert_allclose(x, (1 + 2 / steps) ** steps, rtol=1e-5)
    x = euler(lambda x, t: np.full(3, t, np.float32), np.zeros(3, np.float32), steps)
    np.testing.assert_allclose(x, (steps - 1) / (2 * steps), rtol=1e-5)


def test_time_features_tell_times_apart():
    table = np.stack([time_features(t) for t in np.linspace(0, 1, 51)])
    assert table.shape == (51, 128)
    assert table.dtype == np.float32
    assert np.abs(table).max() <= 1.0
    gaps = np.linalg.norm(table[:, None] - table[None], axis=-1) + 99 * np.eye(51)
    assert gaps.min() > 1.0


def test_the_normalisation_file(tmp_path):
    std = np.random.default_rng(0).uniform(0.1, 3, (10, 3))
    write_normalization(tmp_path, Normalization('history', std))
    again = load_normalization(tmp_path, CONFIG)
    assert np.array_equal(again.std, std)
    for change, words in (
        ({'std': [[1.0]]}, '10 x 3'),
        ({'std': np.zeros((10, 3)).tolist()}, 'positive'),
        ({'source': 'gaussian'}, 'gaussian'),
    ):
        content = {'source': 'history', 'std': std.tolist(), **change}
        (tmp_path / 'normalization.json').write_text(json.dumps(content))
        with pytest.raises(SpanvlaError, match=words):
            load_normalization(tmp_path, CONFIG)
    huge = json.dumps({'source': 'history', 'std': [[10**400] * 3] * 10}).encode()
    for content in (b'', b'[', b'[]', b'\xff', b'[' * 100_000, b'{"std": null}', b'{}', huge):
        (tmp_path / 'normalization.json').write_bytes(content)
        with pytest.raises(SpanvlaError, match=r'normalization\.json: .*; train or fetch'):
            load_normalization(tmp_path, CONFIG)
