"""The words stage: it teaches what the model's own plan does, and leaves that plan alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros.model.action_tokens import fit_codebook, segments_of  # noqa: E402
from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.flow import Normalization  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy  # noqa: E402
from spanvla_ros.model.prompt import FAST_TEXT  # noqa: E402
from spanvla_ros.model.reasoning import parse_components, parse_decision  # noqa: E402
from spanvla_ros.runtime.planner import Planner  # noqa: E402
from spanvla_ros.runtime.torch_ import TorchBackend  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.heldout import HeldOut, expert_plans  # noqa: E402
from spanvla_ros.training.objectives import answer_losses  # noqa: E402
from spanvla_ros.training.parallel import Group  # noqa: E402
from spanvla_ros.training.settings import TrainSettings  # noqa: E402
from spanvla_ros.training.stages import sft, words  # noqa: E402
from spanvla_ros.training.words import measures  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

TOWN = Path(__file__).parents[2] / 'models/town'
SETTINGS = TrainSettings(slot_empty=1.0)


def drawn_policy(**changes):
    """Fresh weights, but an expert that plans something else for every row."""
    policy = new_policy(replace(ModelConfig(), **changes), seed=0)
    futures = np.concatenate([segments_of(r.sample.future) for r in random_rows(40, 1)])
    policy.codebook = fit_codebook(futures, policy.config.action_tokens)
    spread = np.ones((policy.config.waypoints, 3)) * [2.0, 0.5, 0.05]
    policy.normalization = Normalization('history', spread, codebook=policy.codebook)
    disturb([policy.expert], 0.2)
    return policy


@torch.no_grad()
def disturb(modules, size):
    draw = torch.Generator().manual_seed(3)
    for parameter in (p for module in modules for p in module.parameters()):
        parameter += size * torch.randn(parameter.shape, generator=draw)


@pytest.fixture(scope='module')
def policy():
    return drawn_policy()


@pytest.fixture(scope='module')
def batch(policy):
    return make_batch(random_rows(8, 0), policy, SETTINGS, None)


@torch.no_grad()
def run(policy, batch):
    """Plans, bridged K/V, and what the words are made of."""
    prompt = policy.backbone.prefill(batch.ids, policy.look(batch.images), batch.valid)
    layers = list(policy.backbone.bridged)
    plans = torch.from_numpy(expert_plans(policy, batch, SETTINGS))
    return plans, prompt.keys[layers], prompt.values[layers], prompt.hidden


# Bridged are layers 0, 2 and 4; 0 and 3; the last one alone.
@pytest.mark.parametrize('interval', [2, 3, 0])
def test_nothing_that_is_trained_reaches_a_plan(interval):
    policy = drawn_policy(interval=interval)
    batch = make_batch(random_rows(3, 0), policy, SETTINGS, None)
    before = run(policy, batch)
    assert len(before[0].flatten(1).unique(dim=0)) == 3
    trained = words.parts(policy, SETTINGS)
    disturb(trained, 0.1)
    after = run(policy, batch)
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.allclose(before[3], after[3])
    # The next layer up, or any smaller part of this one, is not left out.
    count = sum(p.numel() for module in trained for p in module.parameters())
    layer = policy.backbone.text.layers[-1]
    whole = sum(p.numel() for p in layer.parameters())
    spared = [layer.self_attn.k_proj, layer.self_attn.v_proj, layer.input_layernorm]
    kept = sum(p.numel() for module in spared for p in module.parameters())
    norm = policy.backbone.hidden
    last = policy.backbone.bridged[-1]
    assert count == (4 - last) * whole + (whole - kept) + norm


@torch.no_grad()
def own_rows(policy, batch):
    prompt = policy.backbone.prefill(batch.ids, policy.look(batch.images), batch.valid)
    return words.own_rows(policy, prompt, batch)


def test_words_tell_of_what_the_planner_plans(policy, batch):
    rows = random_rows(8, 0)
    planner = Planner(TorchBackend(policy, 1), policy.layout, policy.normalization, schedule='off')
    said = set()
    for before, told in zip(rows, own_rows(policy, batch), strict=True):
        planner.reset()
        plan = planner.plan(before.sample.observation)
        np.testing.assert_array_equal(told.sample.future, before.sample.future)
        assert told.sample.thinking == before.sample.thinking
        said.add(plan.decision)
        text = told.sample.reasoning
        if before.sample.thinking == 'fast':
            assert text == ''
            continue
        assert str(parse_decision(text)) == plan.decision
        assert parse_components(text) == parse_components(before.sample.reasoning)
    assert len(said) > 1


def test_the_answer_that_is_taught_has_these_words(policy, batch, monkeypatch):
    taught = []

    def remember(policy, hidden, told):
        taught.append(told)
        return answer_losses(policy, hidden, told)

    monkeypatch.setattr(words, 'answer_losses', remember)
    assert set(words.losses(policy, batch, SETTINGS, torch.Generator())) == {'reasoning', 'action'}
    for ids, row in zip(taught[0].answer.tolist(), own_rows(policy, batch), strict=True):
        text = policy.layout.decode_answer(ids)
        assert text == (row.sample.reasoning or FAST_TEXT)
        actions = policy.layout.decode_actions(ids)
        assert actions == policy.codebook.encode(row.sample.future).tolist()


def test_the_loss_is_that_of_fine_tuning_on_those_answers(policy, batch):
    with torch.no_grad():
        ours = words.losses(policy, batch, SETTINGS, torch.Generator())
        rows = [
            replace(row, sample=replace(told.sample, observation=row.sample.observation))
            for row, told in zip(random_rows(8, 0), own_rows(policy, batch), strict=True)
        ]
        whole = make_batch(rows, policy, SETTINGS, None, 'full')
        # The mark that opens an answer is given, not said.
        whole.reasoning_weight[:, 0] = 0.0
        prefix, _, length = sft.run_backbone(policy, whole, SETTINGS, None)
        text, action = answer_losses(policy, prefix.hidden[:, length - 1 :], whole)
    assert float(ours['reasoning']) == pytest.approx(float(text), rel=1e-5)
    assert float(ours['action']) == pytest.approx(float(action), rel=1e-5)


def test_only_what_is_trained_has_a_gradient(policy, batch):
    trained = {id(p) for module in words.parts(policy, SETTINGS) for p in module.parameters()}
    for parameter in policy.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    losses = words.losses(policy, batch, SETTINGS, torch.Generator())
    torch.stack(list(losses.values())).sum().backward()
    moved = {id(p) for p in policy.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == trained
    policy.zero_grad(set_to_none=True)
    policy.requires_grad_(requires_grad=True)


def test_the_look_while_it_trains_counts_as_the_evaluation_does(tmp_path):
    folder = write_shards(tmp_path / 'rows', 6, 2)
    policy = load_policy(TOWN)
    rows = ShardSet(folder).rows(range(6))
    backend = TorchBackend(policy, 1)
    planner = Planner(backend, policy.layout, policy.normalization, schedule='concurrent')
    found = measures(planner, rows)
    look = HeldOut(ShardSet(folder), policy, TrainSettings(), Group(0, 1)).speaking(policy)
    assert look['slow'] == pytest.approx(found['slow'].mean)
    assert look['agreement'] == pytest.approx(found['agreement'].mean)
    assert look['slow'] > 0.0


@pytest.mark.parametrize(
    ('head', 'rank', 'sentence'), [('tokens', 0, 'plans by its words'), ('flow', 4, 'lora_rank')]
)
def test_what_cannot_be_taught_is_refused(policy, monkeypatch, head, rank, sentence):
    monkeypatch.setattr(policy, 'config', replace(policy.config, head=head))
    with pytest.raises(SpanvlaError, match=sentence):
        words.parts(policy, TrainSettings(lora_rank=rank))
