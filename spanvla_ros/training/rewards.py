"""Rewards of a group of answers to one scene: small terms, weighted apart from their values.

Papers: SpanVLA 3.5 (driving, negative, recovery, length of reasoning), AutoVLA 3.4 (its length
penalty), ELF-VLA 3.4 (format, goal). Deviations: the kernel of negative and recovery, unpublished,
is linear; words that contradict the trajectory cost a term of their own.

A new term is one function, one line of `REWARDS`, and its weight `reward_NAME` in the settings.
A scorer that fails raises: nothing is ever rewarded 0 because it could not be computed.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from spanvla_ros.model.reasoning import agreement
from spanvla_ros.scoring.pdms import Scorer, Scores
from spanvla_ros.scoring.prepared import Version
from spanvla_ros.training.data.scoring_rows import unpack_scene
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import Sample, SpanvlaError

# A tenth of a megabyte each, a tenth of a second to make.
KEPT_SCORERS = 8192
# End point within so many metres of the goal (L1): so much.
GOAL_STEPS = ((2.0, 1.0), (4.0, 0.8), (6.0, 0.6), (10.0, 0.4), (15.0, 0.2))

Values = Float64[np.ndarray, ' g']


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: poses in `base_link`, None where it is no trajectory, and its words.

    `closed` tells whether the model ended its reasoning itself within its room.
    """

    poses: Float64[np.ndarray, 't 3'] | None
    text: str = ''
    thinking: str = 'fast'
    closed: bool = True


@dataclass(frozen=True)
class Asked:
    """What a group answers to: the sample, its scoring row, and the times of the poses."""

    sample: Sample
    scoring: bytes
    times_s: Float64[np.ndarray, ' t']

    def scorer(self, version: Version) -> Scorer:
        """The scorer of this scene.

        Raises:
            SpanvlaError: the sample has no scoring row, or it is damaged.
        """
        if not self.scoring:
            raise SpanvlaError(
                f'{self.sample.scene_id}: has no scoring row; draw the scenes with --scored'
            )
        try:
            return _scorer(self.scoring, version)
        except SpanvlaError as error:
            raise SpanvlaError(f'{self.sample.scene_id}: {error}') from error


@dataclass(frozen=True)
class Term:
    """One term's values for a group, unweighted, and what they are made of."""

    values: Values
    parts: dict[str, Values]


@dataclass(frozen=True)
class GroupReward:
    """Totals of a group (scale x sum of weight x value), and the terms they came from."""

    total: Values
    terms: dict[str, Term]
    weights: dict[str, float]
    scale: float


def group_reward(
    asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings
) -> GroupReward:
    """The rewards of a group; terms of weight zero are not computed."""
    weights = {name: weight for name in REWARDS if (weight := weight_of(name, settings)) > 0}
    if not weights:
        raise SpanvlaError('rewards: every weight is zero; give at least one reward_NAME')
    terms = {name: REWARDS[name](asked, rollouts, settings) for name in weights}
    total = np.zeros(len(rollouts))
    for name, term in terms.items():
        if term.values.shape != total.shape or not np.isfinite(term.values).all():
            raise SpanvlaError(f'reward {name}: {asked.sample.scene_id} gives {term.values}')
        total = total + weights[name] * term.values
    return GroupReward(settings.reward_scale * total, terms, weights, settings.reward_scale)


def group_rewards(
    asked: Sequence[Asked], groups: Sequence[Sequence[Rollout]], settings: TrainSettings
) -> list[GroupReward]:
    """The rewards of several groups, computed by `scorers` processes where there are some."""
    jobs = zip(asked, groups, itertools.repeat(settings), strict=False)
    if not settings.scorers:
        return [group_reward(*job) for job in jobs]
    size = max(1, len(asked) // (2 * settings.scorers))
    return list(_scorers(settings.scorers).map(_group_reward, jobs, chunksize=size))


def _group_reward(job: tuple[Asked, Sequence[Rollout], TrainSettings]) -> GroupReward:
    return group_reward(*job)


@lru_cache(maxsize=1)
def _scorers(count: int) -> ProcessPoolExecutor:
    # A fork of a process that uses a GPU could use it no more; these start afresh.
    return ProcessPoolExecutor(count, multiprocessing.get_context('spawn'))


def weight_of(name: str, settings: TrainSettings) -> float:
    """Weight of a term in the settings."""
    return float(getattr(settings, f'reward_{name}'))


def pdms(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """PDMS; without ego progress for a negative sample, whose future is no measure of it."""
    return _driving(asked, rollouts, 'v1', ('nc', 'dac'), {'ep': 5, 'ttc': 5, 'comfort': 2})


def epdms(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """EPDMS without extended comfort; without ego progress for a negative sample."""
    gates = ('nc', 'dac', 'ddc', 'tlc')
    return _driving(asked, rollouts, 'v2', gates, {'ep': 5, 'ttc': 5, 'lk': 2, 'hc': 2})


def negative(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """Minus the nearness to what went wrong; 0 but for negative samples."""
    near, ade_m = _nearness(asked, rollouts, settings)
    use = float(asked.sample.label == 'negative')
    return Term(-use * near, {'ade_m': ade_m} if use else {})


def recovery(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """Nearness to the way back; 0 but for recovery samples."""
    near, ade_m = _nearness(asked, rollouts, settings)
    use = float(asked.sample.label == 'recovery')
    return Term(use * near, {'ade_m': ade_m} if use else {})


def cot_length(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """Minus a sigmoid of the reasoning's length in characters; thinking fast costs nothing."""
    characters = np.array([len(r.text) if r.thinking == 'slow' else 0 for r in rollouts], float)
    slow = np.array([float(r.thinking == 'slow') for r in rollouts])
    over = settings.cot_slope * (characters - settings.cot_center)
    return Term(-slow / (1.0 + np.exp(-over)), {'characters': characters})


def say_do(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """-1 where the decision in the words is not the one driven; 0 where no words decide."""
    seen = asked.sample.observation
    found = [
        None
        if r.poses is None or r.thinking != 'slow'
        else agreement(r.text, asked.times_s, r.poses, seen.ego.speed_mps, seen.command)
        for r in rollouts
    ]
    return Term(
        -np.array([float(one is False) for one in found]),
        {'said': np.array([float(one is not None) for one in found])},
    )


def well_formed(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """Half for a reasoning ended in its room, half for an answer that is a trajectory."""
    closed = np.array([float(r.closed) for r in rollouts])
    parsed = np.array([float(r.poses is not None) for r in rollouts])
    return Term(0.5 * closed + 0.5 * parsed, {'closed': closed, 'parsed': parsed})


def goal(asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings) -> Term:
    """By steps of the L1 distance of the end points; 0 for negative samples."""
    target = asked.sample.future[-1, :2]
    away = np.array(
        [math.inf if r.poses is None else np.abs(r.poses[-1, :2] - target).sum() for r in rollouts]
    )
    values = np.zeros(len(rollouts))
    if asked.sample.label != 'negative':
        for within_m, value in reversed(GOAL_STEPS):
            values[away < within_m] = value
    return Term(values, {})


REWARDS: dict[str, Callable[[Asked, Sequence[Rollout], TrainSettings], Term]] = {
    'pdms': pdms,
    'epdms': epdms,
    'negative': negative,
    'recovery': recovery,
    'cot_length': cot_length,
    'say_do': say_do,
    'format': well_formed,
    'goal': goal,
}


@lru_cache(maxsize=KEPT_SCORERS)
def _scorer(scoring: bytes, version: Version) -> Scorer:
    return Scorer(unpack_scene(scoring), version)


def _driving(
    asked: Asked,
    rollouts: Sequence[Rollout],
    version: Version,
    gates: tuple[str, ...],
    weights: dict[str, int],
) -> Term:
    """The score of each answer in one batch; an answer that is no trajectory scores 0."""
    drawn = [at for at, r in enumerate(rollouts) if r.poses is not None]
    names = ('total', *gates, *weights)
    parts = {name: np.zeros(len(rollouts)) for name in names}
    if drawn:
        hz = round(1.0 / float(asked.times_s[1] - asked.times_s[0]))
        plans = np.stack([poses for r in rollouts if (poses := r.poses) is not None])
        for at, one in zip(drawn, asked.scorer(version).score(plans, hz=hz), strict=True):
            for name in names:
                parts[name][at] = _number(one, name)
    values = parts.pop('total')
    if asked.sample.label == 'negative':
        kept = {name: weight for name, weight in weights.items() if name != 'ep'}
        mean = sum(weight * parts[name] for name, weight in kept.items()) / sum(kept.values())
        values = np.prod([parts[name] for name in gates], axis=0) * mean
    return Term(values, parts)


def _number(scores: Scores, name: str) -> float:
    value = getattr(scores, name)
    if value is None:
        raise SpanvlaError(f'scorer: {scores.scored_with.version} gives no {name}')
    return float(value)


def _nearness(
    asked: Asked, rollouts: Sequence[Rollout], settings: TrainSettings
) -> tuple[Values, Values]:
    """1 at the sample's own future, falling to 0 at a mean distance of `reward_radius_m`."""
    future = asked.sample.future[:, :2]
    ade_m = np.array(
        [
            math.inf
            if r.poses is None
            else float(np.linalg.norm(r.poses[:, :2] - future, axis=1).mean())
            for r in rollouts
        ]
    )
    near = np.maximum(0.0, 1.0 - ade_m / settings.reward_radius_m)
    return near, np.where(np.isfinite(ade_m), ade_m, -1.0)
