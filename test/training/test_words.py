"""Words on held-out moments: what is counted, with a planner that says what it is told to say."""

from dataclasses import replace

import numpy as np
import pytest
from random_rows import random_rows

from spanvla_ros.runtime.reasoner import Reasoning
from spanvla_ros.training.words import measures, named, speak

LEAD = 'lead vehicle 15 m braking ; decelerate , keep lane ; because lead vehicle braking'
LIGHT = 'red light 30 m ahead , curve 10 m left ; stop , keep lane ; because red light ahead'


class Parrot:
    """Says what it sees written on the first picture, or always the same."""

    def __init__(self, sayings, deaf=None):
        self.sayings, self.deaf, self.seen = sayings, deaf, None

    def reset(self):
        self.seen = None

    def plan(self, observation):
        assert observation.reasoning == ''
        self.seen = observation

    def reason_slice(self, budget_ms):
        number = int(self.seen.frames[0][0].image[0, 0, 0])
        text = self.sayings[number] if self.deaf is None else self.deaf
        thinking = 'slow' if text else 'fast'
        agrees = True if text else None
        return Reasoning(self.seen.stamp_ns, text, thinking, 5, agreement=agrees)


def test_only_what_a_picture_tells_is_named():
    assert named(LEAD) == {'lead vehicle'}
    assert named(LIGHT) == {'red light'}
    assert named('road clear ; accelerate , keep lane ; because green light ahead') == set()
    assert named('') == set()


@pytest.fixture
def rows():
    found = random_rows(3, 0)
    written = []
    for number, row in enumerate(found):
        seen = row.sample.observation
        frame = seen.frames[0][0]
        image = np.full_like(frame.image, number)
        frames = ((replace(frame, image=image),), *seen.frames[1:])
        text = (LEAD, LIGHT, '')[number]
        sample = replace(
            row.sample, observation=replace(seen, frames=frames, reasoning='x'), reasoning=text
        )
        written.append(replace(row, sample=sample))
    return written


def test_a_text_from_the_picture_follows_the_picture(rows):
    found = measures(Parrot((LEAD, LIGHT, '')), rows)
    assert (found['follows_picture'].mean, found['follows_picture'].count) == (1.0, 3)
    assert (found['components'].mean, found['components'].count) == (1.0, 2)
    assert found['slow'].mean == pytest.approx(2 / 3)
    assert (found['agreement'].mean, found['agreement'].count) == (1.0, 2)


def test_one_that_never_looks_does_not(rows):
    found = measures(Parrot((), deaf=LEAD), rows)
    assert found['follows_picture'].count == 0
    assert found['components'].mean == 0.5
    assert speak(Parrot((), deaf=LIGHT), rows[0].sample.observation).text == LIGHT
