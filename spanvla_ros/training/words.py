"""Words and deeds on held-out moments: does the text say what the plan does, and what is seen?

A text is decoded through the graphs as on board, from the picture of the plan it is held against.
For the second question the pictures of two moments are exchanged: the components a text names
must be those of the pictures, whatever speed, past and route stand beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spanvla_ros.model.reasoning import KINDS
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.training.data.shards import TrainingRow
from spanvla_ros.training.intervals import Estimate, mean_of, ratio_of
from spanvla_ros.types import Observation

# What only a picture tells; turns stand in the route, too.
SEEN_KINDS = (
    'lead vehicle', 'pedestrian', 'red light', 'green light', 'stop sign', 'construction zone',
    'parked car', 'oncoming car', 'traffic', 'roundabout',
)  # fmt: skip
_NAMED = re.compile(rf'\b({"|".join(KINDS)}) \d')


@dataclass(frozen=True)
class Said:
    """A finished reasoning of one moment: text (empty for fast thinking), and its agreement."""

    text: str
    agreement: bool | None


def speak(planner: Planner, observation: Observation) -> Said:
    """Plan once, then reason to the end on the same picture; nothing is remembered.

    The planner's schedule must be `concurrent`: under the others no text stands beside a plan.
    """
    planner.reset()
    planner.plan(replace(observation, reasoning='', reasoning_stamp_ns=None))
    while True:
        finished = planner.reason_slice(math.inf)
        if finished is not None:
            return Said(finished.text, finished.agreement)


def named(text: str) -> frozenset[str]:
    """The kinds of component a text lists that only a picture can tell."""
    return frozenset(kind for kind in _NAMED.findall(text) if kind in SEEN_KINDS)


def measures(planner: Planner, rows: Sequence[TrainingRow]) -> dict[str, Estimate]:
    """Shares over moments; each `Estimate` says over how many.

    `agreement`: texts whose decision is that of the plan, of those that name one. `components`:
    texts that name the components of the reference's text, of the moments worth one.
    `follows_picture`: of the moments whose neighbor in the list has other components to name,
    those whose text, with the neighbor's pictures, names what it names for the neighbor and not
    what it names with its own. `slow`: texts at all.
    """
    seen = [row.sample.observation for row in rows]
    names = ['/'.join(row.sample.scene_id.split('/')[:2]) for row in rows]
    own = [speak(planner, observation) for observation in seen]
    judged = [i for i, said in enumerate(own) if said.agreement is not None]
    told = [i for i, row in enumerate(rows) if row.sample.reasoning]
    follows, drives = [], []
    for i, other in zip(range(len(rows)), np.roll(np.arange(len(rows)), -1).tolist(), strict=True):
        mine, theirs = named(own[i].text), named(own[other].text)
        if mine == theirs:
            continue
        exchanged = speak(planner, replace(seen[i], frames=seen[other].frames))
        follows.append(named(exchanged.text) == theirs)
        drives.append(names[i])
    return {
        'agreement': mean_of([bool(own[i].agreement) for i in judged], [names[i] for i in judged]),
        'components': mean_of(
            [named(own[i].text) == named(rows[i].sample.reasoning) for i in told],
            [names[i] for i in told],
        ),
        'follows_picture': mean_of(follows, drives),
        'slow': ratio_of([bool(said.text) for said in own], [1.0] * len(own), names),
    }
