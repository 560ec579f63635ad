"""Bootstrap intervals against closed forms and against a plain resampling loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.training.intervals import NOTHING, mean_of, ratio_of


def test_the_interval_of_many_independent_rows_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = mean_of(values, range(4000))
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(4000)
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)
    assert found.count == 4000


def test_rows_of_one_drive_count_as_one():
    values = np.repeat(np.random.default_rng(2).normal(0.0, 1.0, 50), 20)
    alone = mean_of(values, range(1000))
    together = mean_of(values, np.repeat(np.arange(50), 20))
    assert together.mean == pytest.approx(alone.mean)
    width = (together.high - together.low) / (alone.high - alone.low)
    assert width == pytest.approx(np.sqrt(20), rel=0.15)


def test_ratios_are_sums_over_sums():
    found = ratio_of([1.0, 0.0, 0.0], [0.5, 1.0, 2.5], ['a', 'b', 'c'])
    assert found.mean == pytest.approx(0.25)
    assert found.low == 0.0
    assert found.high <= 2.0


def test_nothing_gives_nothing():
    assert mean_of([], []) == NOTHING
    assert ratio_of([0.0], [0.0], ['a']) == NOTHING


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_the_interval_lies_within_the_values_and_is_the_same_every_time(values):
    found = mean_of(values, range(len(values)))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == mean_of(values, range(len(values)))


def test_equals_a_plain_loop_over_resampled_drives():
    rng = np.random.default_rng(5)
    drives = rng.integers(0, 8, 60)
    values = rng.normal(size=60) + drives
    ours = mean_of(values, drives)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(drives == d) for d in rng.integers(0, 8, 8)])
        means.append(values[rows].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    assert ours.low == pytest.approx(low, abs=0.25)
    assert ours.high == pytest.approx(high, abs=0.25)
