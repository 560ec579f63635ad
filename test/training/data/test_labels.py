"""Presence bits and facts against counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.model.reasoning import Component, Decision
from spanvla_ros.town.elements import GREEN, PEDESTRIAN, RED, VEHICLE
from spanvla_ros.training.data.labels import needs_thought, presence, visible_facts
from spanvla_ros.training.data.shards import FACTS

CRUISE = Decision('maintain', 'keep lane')


def test_one_pixel_marks_its_class_in_its_own_token_only():
    classes = np.zeros((3, 112, 224), np.uint8)
    classes[1, 57, 29] = RED
    shown = presence(classes)
    assert shown.shape == (96, 7)
    # Camera 1, third row of four, second column of eight.
    assert np.argwhere(shown).tolist() == [[32 + 2 * 8 + 1, RED - 1]]


@given(st.integers(0, 2**32 - 1))
def test_presence_equals_looking_cell_by_cell(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 8, (2, 56, 84)).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.98] = 0
    expected = [
        [(classes[c, y : y + 28, x : x + 28] == kind).any() for kind in range(1, 8)]
        for c in range(2)
        for y in (0, 28)
        for x in (0, 28, 56)
    ]
    np.testing.assert_array_equal(presence(classes), expected)


def test_pictures_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='28 px'):
        presence(np.zeros((1, 100, 224), np.uint8))


def test_facts_keep_only_what_is_in_the_picture():
    facts = np.arange(1, 15, dtype=np.float32)
    nothing = np.zeros((96, 7), bool)
    light, person = slice(3, 6), slice(6, 8)
    kept = visible_facts(facts, nothing)
    assert not kept[light].any()
    assert not kept[person].any()
    np.testing.assert_array_equal(kept[:3], facts[:3])
    np.testing.assert_array_equal(kept[8:], facts[8:])
    for kind, columns in ((RED, light), (GREEN, light), (PEDESTRIAN, person)):
        shown = nothing.copy()
        shown[5, kind - 1] = True
        np.testing.assert_array_equal(visible_facts(facts, shown)[columns], facts[columns])
    assert FACTS[light] == ('red', 'green', 'light_inverse_distance')
    assert FACTS[person] == ('pedestrian_on_road', 'pedestrian_inverse_distance')
    assert VEHICLE == 3


@pytest.mark.parametrize(
    ('components', 'decision', 'slow'),
    [
        ((), CRUISE, False),
        ((), Decision('accelerate', 'keep lane'), False),
        ((), Decision('stop', 'keep lane'), True),
        ((), Decision('maintain', 'change left'), True),
        ((Component('green light', 20.0, 'ahead'),), CRUISE, False),
        ((Component('red light', 50.0, 'ahead'),), CRUISE, True),
        ((Component('lead vehicle', 50.0, 'steady'),), CRUISE, False),
        ((Component('lead vehicle', 20.0, 'steady'),), CRUISE, True),
        ((Component('lead vehicle', 50.0, 'braking'),), CRUISE, True),
        ((Component('pedestrian', 40.0, 'waiting'),), CRUISE, True),
        ((Component('curve', 10.0, 'left'),), CRUISE, True),
    ],
)
def test_a_hazard_or_a_manoeuvre_asks_for_thought(components, decision, slow):
    assert needs_thought(components, decision) is slow
