"""Training on a GPU, as far as a machine without one can tell: no tensor is left behind.

Tensors of the device `meta` have no numbers; an operation on two devices raises.
"""

import pytest

torch = pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402
from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros.model.config import ModelConfig, with_settings  # noqa: E402
from spanvla_ros.model.policy import new_policy  # noqa: E402
from spanvla_ros.town.snapshots import labelled_scene, sample_snapshots  # noqa: E402
from spanvla_ros.training import rewards  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.scoring_rows import pack_scene  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.feed import Feed  # noqa: E402
from spanvla_ros.training.loop import fit_targets  # noqa: E402
from spanvla_ros.training.parallel import Group  # noqa: E402
from spanvla_ros.training.settings import TrainSettings  # noqa: E402
from spanvla_ros.training.stages import action_expert, knowledge, sft  # noqa: E402

SETTINGS = TrainSettings(steps=1, batch=2, draws=2)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return ShardSet(write_shards(tmp_path_factory.mktemp('devices') / 'train', 40, 0))


@pytest.mark.parametrize(
    ('stage', 'settings'),
    [
        (knowledge, SETTINGS),
        (sft, SETTINGS),
        (sft, replace(SETTINGS, blind=True)),
        (action_expert, SETTINGS),
        (action_expert, replace(SETTINGS, end_to_end=True)),
    ],
)
@pytest.mark.parametrize('head', ['flow', 'l1', 'parallel'])
def test_losses_stay_on_the_device_of_the_model(shards, stage, settings, head):
    config = with_settings(ModelConfig(), head=head, waypoints=shards.futures.shape[1])
    policy = new_policy(config)
    fit_targets(policy, shards)
    rows = shards.rows([0, 1])
    batch = make_batch(rows, policy, settings, np.random.default_rng(0), stage.ANSWERS)
    device = torch.device('meta')
    losses = stage.losses(policy.to(device), batch.to(device), settings, torch.Generator())
    assert losses
    assert {loss.device for loss in losses.values()} == {device}


def test_batches_are_the_same_whoever_makes_them(shards):
    policy = new_policy(with_settings(ModelConfig(), waypoints=shards.futures.shape[1]))
    fit_targets(policy, shards)
    found = []
    for feeders in (0, 2):
        settings = replace(SETTINGS, feeders=feeders)
        steps = Feed('full', shards, policy, settings, Group(0, 1)).steps(3)
        found.append([next(steps) for _ in range(3)])
    for alone, helped in zip(*found, strict=True):
        assert alone.seed == helped.seed
        assert np.array_equal(alone.indices, helped.indices)
        for name, tensor in alone.batch.tensors().items():
            assert torch.equal(tensor, helped.batch.tensors()[name]), name


def test_scorers_reward_as_the_training_process_does():
    scoring = pack_scene(labelled_scene(sample_snapshots('turns', 7, 3)[1]))
    rows = [replace(row, scoring=scoring) for row in random_rows(3, 0)]
    asked = [rewards.Asked(row.sample, row.scoring, ModelConfig().times_s) for row in rows]
    groups = [
        [rewards.Rollout(row.sample.future), rewards.Rollout(0.5 * row.sample.future)]
        for row in rows
    ]
    alone, helped = (
        rewards.group_rewards(asked, groups, replace(SETTINGS, scorers=scorers))
        for scorers in (0, 2)
    )
    assert [list(one.total) for one in alone] == [list(one.total) for one in helped]
