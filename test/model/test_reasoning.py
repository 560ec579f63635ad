"""Decisions read off trajectories of known motion, and the grammar's way there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.model.prompt import UNKNOWN, build_tokenizer
from spanvla_ros.model.reasoning import (
    BEHAVIOURS,
    KINDS,
    LATERAL,
    LONGITUDINAL,
    Component,
    Decision,
    agreement,
    meta_action,
    mirrored,
    parse_components,
    parse_decision,
    retold,
    write_reasoning,
)

TIMES = np.arange(0.5, 5.1, 0.5)
decisions = st.builds(Decision, st.sampled_from(LONGITUDINAL), st.sampled_from(LATERAL))
components = st.builds(
    Component, st.sampled_from(KINDS), st.floats(0, 200), st.sampled_from(BEHAVIOURS)
)


def driven(speed, accel=0.0, curvature=0.0, times=TIMES):
    """Poses on an arc at constant acceleration, standing once stopped."""
    until = np.minimum(times, speed / -accel) if accel < 0 else times
    s = speed * until + 0.5 * accel * until**2
    yaw = curvature * s
    if curvature == 0.0:
        return np.stack([s, 0 * s, yaw], axis=-1)
    return np.stack([np.sin(yaw) / curvature, (1 - np.cos(yaw)) / curvature, yaw], axis=-1)


@pytest.mark.parametrize(
    ('speed', 'accel', 'word'),
    [
        (8.0, 0.0, 'maintain'),
        (8.0, 0.1, 'maintain'),
        (8.0, -0.1, 'maintain'),
        (5.0, 0.8, 'accelerate'),
        (0.0, 1.0, 'accelerate'),
        (8.0, -1.0, 'decelerate'),
        (8.0, -2.0, 'stop'),
        (0.0, 0.0, 'stop'),
        (0.3, 0.0, 'stop'),
    ],
)
def test_longitudinal_words(speed, accel, word):
    assert meta_action(TIMES, driven(speed, accel), speed) == Decision(word, 'keep lane')


def test_slowing_down_for_a_while_is_a_deceleration():
    speed = 8.0 - 3.5 * np.sin(np.pi * np.arange(0.25, 5, 0.5) / 5) ** 2
    s = np.cumsum(0.5 * speed)
    poses = np.stack([s, 0 * s, 0 * s], axis=-1)
    assert meta_action(TIMES, poses, 8.0).longitudinal == 'decelerate'


@pytest.mark.parametrize('rate', [2, 10])
@pytest.mark.parametrize(
    ('radius', 'word'),
    [(12.0, 'turn left'), (-12.0, 'turn right'), (200.0, 'keep lane'), (-200.0, 'keep lane')],
)
def test_turns_are_told_from_curves(rate, radius, word):
    times = np.arange(1, 5 * rate + 1) / rate
    assert meta_action(times, driven(6.0, 0.0, 1 / radius, times), 6.0).lateral == word


def test_a_turn_that_has_begun_counts_where_it_was_commanded():
    poses = driven(2.0, 0.0, 1 / 25)
    assert meta_action(TIMES, poses, 2.0).lateral == 'keep lane'
    assert meta_action(TIMES, poses, 2.0, 'left').lateral == 'turn left'
    assert meta_action(TIMES, poses, 2.0, 'right').lateral == 'keep lane'


@pytest.mark.parametrize('bend', [0.0, 1 / 600, -1 / 600])
def test_lane_changes_are_offsets_from_the_road_ahead(bend):
    share = TIMES / 5
    offset = 3.5 * (share - np.sin(2 * np.pi * share) / (2 * np.pi))
    poses = driven(10.0, 0.0, bend)
    poses[:, 1] += offset
    assert meta_action(TIMES, poses, 10.0).lateral == 'change left'
    poses[:, 1:] *= -1
    assert meta_action(TIMES, poses, 10.0).lateral == 'change right'


@given(st.floats(0, 15), st.floats(-3, 2), st.floats(-0.1, 0.1), st.integers(0, 999))
def test_a_mirrored_trajectory_has_the_mirrored_decision(speed, accel, curvature, seed):
    poses = driven(speed, accel, curvature)
    poses = poses + np.random.default_rng(seed).normal(0, 0.02, poses.shape)
    decision = meta_action(TIMES, poses, speed)
    other = meta_action(TIMES, poses * [1, -1, -1], speed)
    assert str(other) == mirrored(str(decision))


@given(st.lists(components, max_size=6), decisions)
def test_written_reasoning_is_short_in_vocabulary_and_names_its_decision(seen, decision):
    text = write_reasoning(seen, decision)
    assert len(text.split()) <= 28
    assert parse_decision(text) == decision
    encoded = build_tokenizer().encode(text)
    assert len(encoded.ids) == len(text.split())
    assert UNKNOWN not in encoded.tokens
    assert mirrored(mirrored(text)) == text


def test_nearest_components_come_first_and_the_cause_explains():
    seen = [
        Component('green light', 62.0, 'ahead'),
        Component('lead vehicle', 13.1, 'braking'),
        Component('pedestrian', 8.0, 'waiting'),
        Component('curve', 90.0, 'left'),
    ]
    text = write_reasoning(seen, Decision('decelerate', 'keep lane'))
    assert text == (
        'pedestrian 10 m waiting , lead vehicle 15 m braking , green light 60 m ahead ; '
        'decelerate , keep lane ; because lead vehicle braking'
    )
    assert write_reasoning([], Decision('maintain', 'keep lane')) == (
        'road clear ; maintain , keep lane ; because road clear'
    )


@given(st.lists(components, max_size=6), decisions, decisions)
def test_a_retold_reasoning_is_the_one_written_for_that_decision(seen, decision, other):
    assert retold(write_reasoning(seen, other), decision) == write_reasoning(seen, decision)


def test_components_are_read_back_and_the_cause_is_not_one_of_them():
    text = 'lead vehicle 15 m braking ; decelerate , keep lane ; because lead vehicle 9 m ahead'
    assert parse_components(text) == (Component('lead vehicle', 15.0, 'braking'),)
    assert parse_components('road clear ; maintain , keep lane ; because road clear') == ()
    assert retold(text, Decision('accelerate', 'turn left')) == (
        'lead vehicle 15 m braking ; accelerate , turn left ; because road clear'
    )


@pytest.mark.parametrize('text', ['', 'stop', 'lead vehicle 5 m', 'halt , keep lane', 'stop keep'])
def test_text_without_decision(text):
    assert parse_decision(text) is None
    assert agreement(text, TIMES, driven(5.0), 5.0) is None


def test_agreement_compares_words_with_motion():
    stop = 'red light 20 m ahead ; stop , keep lane ; because red light ahead'
    assert agreement(stop, TIMES, driven(8.0, -2.0), 8.0) is True
    assert agreement(stop, TIMES, driven(8.0), 8.0) is False
    edge = driven(8.0, -0.15)
    assert agreement('x ; maintain , keep lane ; y', TIMES, edge, 8.0) is True
    assert agreement('x ; decelerate , keep lane ; y', TIMES, edge, 8.0) is True


@pytest.mark.parametrize(
    ('turn_rad', 'words', 'agrees'),
    [
        # The border between keeping the lane and a turn stands at 0.52 rad.
        (0.45, 'turn left', True),
        (0.45, 'keep lane', True),
        (0.36, 'turn left', False),
        (0.60, 'keep lane', True),
        (0.75, 'keep lane', False),
        (0.45, 'turn right', False),
    ],
)
def test_words_beside_a_border_agree_with_both_sides(turn_rad, words, agrees):
    way = driven(6.0, curvature=turn_rad / 30.0)
    assert agreement(f'x ; maintain , {words} ; y', TIMES, way, 6.0) is agrees


@pytest.mark.parametrize(('final_mps', 'stop', 'slow'), [(0.8, True, True), (1.4, False, True)])
def test_a_crawl_is_nearly_a_stop(final_mps, stop, slow):
    # The speed over the last half second is that at its middle.
    way = driven(6.0, (final_mps - 6.0) / (TIMES[-1] - 0.25))
    assert agreement('x ; stop , keep lane ; y', TIMES, way, 6.0) is stop
    assert agreement('x ; decelerate , keep lane ; y', TIMES, way, 6.0) is slow


def test_words_outside_the_grammar_are_refused():
    with pytest.raises(ValueError, match='grammar'):
        Component('ufo', 1.0, 'ahead')
    with pytest.raises(ValueError, match='decision'):
        Decision('fly', 'keep lane')
