"""Reward terms against hand-worked numbers, the scorer itself, and faults."""

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.model.config import ModelConfig
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.town.snapshots import labelled_scene, sample_snapshots
from spanvla_ros.training import rewards
from spanvla_ros.training.data.scoring_rows import pack_scene
from spanvla_ros.training.rewards import REWARDS, Asked, Rollout, group_reward
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import EgoState, Observation, Sample, SpanvlaError

TIMES_S = ModelConfig().times_s
NONE = {f'reward_{name}': 0.0 for name in REWARDS}
BESIDE = np.array([0.0, 9.0, 0.0])


def straight(speed_mps, side_m=0.0):
    return np.stack([speed_mps * TIMES_S, np.full(10, side_m), np.zeros(10)], -1)


def asked(label='positive', speed_mps=5.0, scoring=b''):
    ego = EgoState(1, 0.0, 0.0, 0.0, speed_mps)
    seen = Observation(1, (), ego, np.zeros((3, 3)), np.ones(3, bool), None)
    sample = Sample(seen, straight(speed_mps), 'turns/1/0', 'turns', label=label)
    return Asked(sample, scoring, TIMES_S)


@pytest.fixture(scope='module')
def scene():
    snapshot = next(s for s in sample_snapshots('turns', 7, 5) if s.ego.speed_mps > 4)
    sample = replace(asked().sample, future=snapshot.plan.poses[4::5])
    return Asked(sample, pack_scene(labelled_scene(snapshot)), TIMES_S)


def test_the_total_is_scale_times_the_weighted_values():
    settings = TrainSettings(**{**NONE, 'reward_format': 0.5, 'reward_goal': 2.0})
    group = [Rollout(straight(5.0)), Rollout(straight(5.0, 3.0)), Rollout(None)]
    found = group_reward(asked(), group, settings)
    # Format 1, 1, 0.5 (a closed thought, no trajectory); goal 1 below 2 m, 0.8 below 4 m, 0.
    np.testing.assert_allclose(found.total, 10 * np.array([0.5 + 2.0, 0.5 + 1.6, 0.25]))
    assert set(found.terms) == {'format', 'goal'}
    assert found.scale == 10.0
    assert found.weights == {'format': 0.5, 'goal': 2.0}


@pytest.mark.parametrize(
    ('label', 'term', 'sign'), [('negative', 'negative', -1.0), ('recovery', 'recovery', 1.0)]
)
def test_nearness_is_a_bounded_kernel_of_the_mean_distance(label, term, sign):
    settings = TrainSettings(reward_radius_m=1.7)
    group = [Rollout(straight(5.0, side_m)) for side_m in (0.0, 0.85, 1.7, 40.0)] + [Rollout(None)]
    for other in ('positive', 'negative', 'recovery'):
        values = REWARDS[term](asked(other), group, settings).values
        wanted = sign * np.array([1.0, 0.5, 0.0, 0.0, 0.0]) if other == label else np.zeros(5)
        np.testing.assert_allclose(values, wanted, atol=1e-12)


@pytest.mark.parametrize('name', ['pdms', 'epdms'])
def test_driving_is_the_scorers_total_for_the_whole_group(scene, name):
    good = scene.sample.future
    group = [Rollout(good), Rollout(None), Rollout(0.0 * good), Rollout(good + BESIDE)]
    term = REWARDS[name](scene, group, TrainSettings())
    scorer = scene.scorer('v1' if name == 'pdms' else 'v2')
    plans = np.stack([good, 0.0 * good, good + BESIDE])
    totals = [one.total for one in scorer.score(plans)]
    np.testing.assert_allclose(term.values, [totals[0], 0.0, *totals[1:]])
    assert term.values[0] > 0.9 > term.values[2]


def test_a_negative_sample_asks_for_no_progress(scene):
    standing = Rollout(0.0 * scene.sample.future)
    negative = replace(scene, sample=replace(scene.sample, label='negative'))
    term = rewards.pdms(negative, [standing], TrainSettings())
    # By hand from the scorer's own parts: (5 TTC + 2 C) / 7 behind the gates.
    one = Scorer(scene.scorer('v1').scene, 'v1').score(0.0 * scene.sample.future[None])[0]
    assert term.values[0] == pytest.approx(one.nc * one.dac * (5 * one.ttc + 2 * one.comfort) / 7)
    assert one.ep < 0.5


def test_only_slow_thinking_costs_by_its_length():
    settings = TrainSettings(cot_center=100.0, cot_slope=0.05)
    group = [
        Rollout(straight(5.0), 'x' * 100, 'slow'),
        Rollout(straight(5.0), 'x' * 160, 'slow'),
        Rollout(straight(5.0), '', 'fast'),
    ]
    values = rewards.cot_length(asked(), group, settings).values
    np.testing.assert_allclose(values, [-0.5, -1 / (1 + np.exp(-3.0)), 0.0])


def test_words_that_are_not_driven_cost():
    said = 'road clear ; stop , keep lane ; because road clear'
    kept = 'road clear ; maintain , keep lane ; because road clear'
    group = [
        Rollout(straight(5.0), said, 'slow'),
        Rollout(straight(5.0), kept, 'slow'),
        Rollout(straight(5.0), 'road clear', 'slow'),
        Rollout(None, said, 'slow'),
    ]
    np.testing.assert_array_equal(
        rewards.say_do(asked(), group, TrainSettings()).values, [-1.0, 0.0, 0.0, 0.0]
    )


def test_a_scorer_that_fails_raises_and_names_the_scene(scene):
    with pytest.raises(SpanvlaError, match=r'turns/1/0: has no scoring row.*--scored'):
        group_reward(asked(), [Rollout(straight(5.0))], TrainSettings())
    broken = replace(scene, scoring=scene.scoring[:-20])
    with pytest.raises(SpanvlaError, match='turns/1/0: scoring row'):
        group_reward(broken, [Rollout(straight(5.0))], TrainSettings())
    bad = straight(5.0)
    bad[3, 0] = np.nan
    with pytest.raises(SpanvlaError, match='not finite'):
        group_reward(scene, [Rollout(bad)], TrainSettings())
    with pytest.raises(SpanvlaError, match='every weight is zero'):
        group_reward(scene, [Rollout(straight(5.0))], TrainSettings(**NONE))


def test_every_term_has_its_weight_in_the_settings():
    for name in REWARDS:
        assert rewards.weight_of(name, TrainSettings()) >= 0.0
