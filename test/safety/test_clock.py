import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.safety.clock import CLOCK_BACKWARDS, CLOCK_GAP, ClockWatch


@pytest.mark.parametrize(
    ('shown', 'expected'),
    [
        ([5, 5, 6], [None, None, None]),
        ([20_000_000, 0], [None, None]),
        ([20_000_001, 0], [None, CLOCK_BACKWARDS]),
        ([0, 2_000_000_000], [None, None]),
        ([0, 2_000_000_001], [None, CLOCK_GAP]),
        ([9 * 10**9, 1, 2], [None, CLOCK_BACKWARDS, None]),
    ],
)
def test_jumps_are_told_from_running(shown, expected):
    watch = ClockWatch(2.0)
    assert [watch.observe(now_ns) for now_ns in shown] == expected
    assert watch.jumps == sum(kind is not None for kind in expected)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_each_step_is_judged_by_itself(shown):
    watch = ClockWatch(1.0)
    assert watch.observe(shown[0]) is None
    for before, now in itertools.pairwise(shown):
        jumped = watch.observe(now) is not None
        assert jumped == (now < before - 20_000_000 or now > before + 10**9)
