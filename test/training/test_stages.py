"""The supervised stages end to end on a few random rows, and what their parts promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import TEXT, random_rows, write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.checkpoint import read_tensors  # noqa: E402
from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.heldout import choose_rows, pair_reactions, speed_at  # noqa: E402
from spanvla_ros.training.loop import fit_targets  # noqa: E402
from spanvla_ros.training.objectives import (  # noqa: E402
    expert_losses,
    facts_loss,
    flow_loss,
    picture_loss,
)
from spanvla_ros.training.optimizer import draw_order, schedule  # noqa: E402
from spanvla_ros.training.settings import TrainSettings, load_settings  # noqa: E402
from spanvla_ros.training.stages import sft  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ('minutes=0', 'batch=4', 'processes=1', 'compiled=false', 'heldout_rows=8')


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_shards(folder / 'heldout', 8, 1)
    return write_shards(folder / 'train', 60, 0)


@pytest.fixture(scope='module')
def policy(shards):
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(shards))
    return policy


@pytest.fixture(scope='module')
def model(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model'
    save_policy(policy, path, {})
    return path


def train(stage, out, shards, *settings, init=None, resume=False):
    words = ['train', stage, '--config', str(ROOT / 'config/train/sft.yaml'), '--out', str(out)]
    words += ['--init', str(init)] if init else []
    words += ['--resume'] if resume else []
    paths = (f'data={shards}', f'heldout={shards.parent / "heldout"}')
    for setting in (*SMALL, *paths, *settings):
        words += ['--set', setting]
    return cli.main(words)


@pytest.mark.parametrize('stage', ['sft', 'words'])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_ends(stage, shards, model, tmp_path):
    assert train(stage, tmp_path / 'whole', shards, 'steps=4', init=model) == 0
    assert train(stage, tmp_path / 'broken', shards, 'steps=4', 'stop_after=2', init=model) == 0
    state = json.loads((tmp_path / 'broken/state/state.json').read_text())
    assert state['step'] == 2
    assert train(stage, tmp_path / 'broken', shards, 'steps=4', resume=True) == 0
    for name in ('weights', 'optimizer'):
        ours, theirs = (
            (tmp_path / run / 'state' / f'{name}.safetensors').read_bytes()
            for run in ('whole', 'broken')
        )
        assert ours == theirs
    notes = json.loads((tmp_path / 'broken/model/manifest.json').read_text())
    assert [stage['steps'] for stage in notes['training']['stages']] == [4]


def test_two_batches_a_step_are_one_of_twice_the_rows(shards, tmp_path, capfd):
    halves = ('camera_drop=0', 'batch=2', 'accumulate=2', 'steps=2')
    assert train('knowledge', tmp_path / 'whole', shards, 'camera_drop=0', 'steps=2') == 0
    assert train('knowledge', tmp_path / 'parts', shards, *halves) == 0
    assert train('knowledge', tmp_path / 'broken', shards, *halves, 'stop_after=1') == 0
    assert train('knowledge', tmp_path / 'broken', shards, *halves, resume=True) == 0
    whole, parts, broken = (
        (tmp_path / run / 'state/weights.safetensors') for run in ('whole', 'parts', 'broken')
    )
    assert parts.read_bytes() == broken.read_bytes()
    ours, theirs, start = read_tensors(parts), read_tensors(whole), new_policy(ModelConfig(), 0)
    moved = {n for n, p in start.named_parameters() if np.any(theirs[n] != p.detach().numpy())}
    assert len(moved) > 10
    for name in moved:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)
    capfd.readouterr()


def test_the_stages_follow_one_another(shards, tmp_path, capfd):
    assert train('knowledge', tmp_path / 'a', shards, 'steps=2') == 0
    assert train('sft', tmp_path / 'b', shards, 'steps=2', init=tmp_path / 'a') == 0
    assert train('action-expert', tmp_path / 'c', shards, 'steps=2', init=tmp_path / 'b') == 0
    before, after = (load_policy(tmp_path / run / 'model') for run in 'bc')
    for name, weight in after.named_parameters():
        moved = not torch.equal(weight, dict(before.named_parameters())[name])
        if not name.startswith('expert.'):
            assert not moved, name
    assert not torch.equal(before.expert.velocity.weight, after.expert.velocity.weight)
    line = json.loads((tmp_path / 'c/log.jsonl').read_text().splitlines()[-1])
    assert line['ade_m'] > 0
    assert 'f1_pedestrian' in (tmp_path / 'a/log.jsonl').read_text()
    capfd.readouterr()


@pytest.mark.slow
def test_two_processes_take_the_same_steps_each_time(shards, tmp_path):
    for run in ('one', 'two'):
        assert train('sft', tmp_path / run, shards, 'steps=2', 'processes=2') == 0
    first, second = (
        (tmp_path / run / 'state/weights.safetensors').read_bytes() for run in ('one', 'two')
    )
    assert first == second


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        (('steps=-1',), 'must not be negative'),
        (('stepz=1',), 'no training setting'),
        (('steps=2', 'minutes=3'), 'either steps or minutes'),
        (('steps=2', 'batch=5', 'processes=2'), 'does not divide'),
        (('steps=2', 'data=nowhere'), 'nowhere'),
    ],
)
def test_bad_settings_are_one_sentence_and_exit_two(shards, tmp_path, capfd, settings, sentence):
    assert train('sft', tmp_path / 'run', shards, *settings) == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert error.count('\n') == 1


def test_a_run_is_not_overwritten(shards, tmp_path, capfd):
    (tmp_path / 'run/state').mkdir(parents=True)
    assert train('sft', tmp_path / 'run', shards, 'steps=1') == 2
    assert '--resume' in capfd.readouterr().err


def test_the_shipped_configurations_are_valid():
    for path in sorted((ROOT / 'config/train').glob('*.yaml')):
        settings = load_settings(path)
        assert settings.minutes > 0 or settings.steps > 0


def test_a_batch_is_a_function_of_its_seed(policy):
    rows = random_rows(6, 3)
    first, second = (
        make_batch(rows, policy, TrainSettings(), np.random.default_rng(5), 'full')
        for _ in range(2)
    )
    for name in ('ids', 'valid', 'ego', 'target', 'answer', 'seen'):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_augmentation_takes_inputs_away_as_driving_does(policy):
    settings = TrainSettings(camera_drop=1.0, history_drop=1.0, slot_empty=0.0, answer_seen=1.0)
    rows = random_rows(40, 4)
    batch = make_batch(rows, policy, settings, np.random.default_rng(0), 'full')
    assert (batch.picture_valid.sum(1) == 2).all()
    images = policy.layout.image_positions
    assert (batch.valid[:, images].sum(1) == 64).all()
    history_valid = batch.ego[:, 12:15]
    assert (history_valid.diff(dim=1) >= 0).all()
    assert (history_valid.sum(1) < 3).all()
    # Where the expert sees the answer, it sees the text and never an action token.
    assert torch.equal(batch.seen, batch.reasoning_weight)
    assert (batch.reasoning_weight * batch.action_weight == 0).all()
    assert (batch.action_weight.sum(1) == 11).all()
    plain = make_batch(rows, policy, settings, None)
    assert (plain.picture_valid == 1).all()
    assert (plain.valid[:, policy.layout.slot] == 0).all()


def test_the_answer_holds_the_text_and_the_tokens_of_the_future(policy):
    rows = random_rows(2, 6)
    batch = make_batch(rows, policy, TrainSettings(), np.random.default_rng(0), 'full')
    assert policy.layout.decode_answer(batch.answer[0].tolist()) == TEXT
    actions = policy.layout.decode_actions(batch.answer[0].tolist())
    assert actions == policy.codebook.encode(rows[0].sample.future).tolist()


def test_a_perfect_velocity_has_no_flow_loss(policy):
    batch = make_batch(random_rows(3, 7), policy, TrainSettings(), None)
    prefix, _, prompt = sft.run_backbone(policy, batch, TrainSettings(), policy.backbone.bridged)
    bridged = sft.bridge(policy, prefix, batch, prompt, detach=True)
    valid = sft.slots(policy, batch, TrainSettings())

    class Perfect:
        config = policy.config

        @staticmethod
        def expert(state, time, ego, keys, values, valid):
            # On the straight path from x0 the velocity is (x1 - x) / (1 - t).
            gone = Perfect.time[..., None, None]
            return (batch.target[:, None] - state) / (1.0 - gone)

    settings = TrainSettings(draws=4)
    draw = torch.Generator().manual_seed(1)
    Perfect.time = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    assert float(flow_loss(Perfect, bridged, valid, batch, settings, draw)['flow']) < 1e-6


def test_a_lost_picture_does_not_count_in_the_picture_loss(policy):
    batch = make_batch(random_rows(4, 8), policy, TrainSettings(), None)
    embeds = policy.look(batch.images).detach()
    batch.picture_valid[:, 0] = 0.0
    before = float(picture_loss(policy, embeds, batch).detach())
    batch.presence[:, :32] = 1.0 - batch.presence[:, :32]
    batch.facts[:] = 5.0
    assert float(picture_loss(policy, embeds, batch).detach()) == pytest.approx(before)
    assert float(facts_loss(batch.facts, batch)) == 0.0


def test_blind_training_runs_no_vision(policy, monkeypatch):
    settings = TrainSettings(blind=True)
    batch = make_batch(random_rows(2, 9), policy, settings, np.random.default_rng(0), 'full')
    monkeypatch.setattr(policy, 'look', None)
    losses = sft.losses(policy, batch, settings, torch.Generator())
    assert set(losses) == {'reasoning', 'action', 'flow'}


def test_the_bridge_is_cut_where_asked(policy):
    batch = make_batch(random_rows(2, 10), policy, TrainSettings(), np.random.default_rng(0))
    policy.expert.velocity.weight.data.normal_(0.0, 0.1)
    for detach in (True, False):
        settings = TrainSettings(detach_bridge=detach, auxiliary_weight=0.0, draws=2)
        prefix, _, prompt = sft.run_backbone(policy, batch, settings, policy.backbone.bridged)
        bridged = sft.bridge(policy, prefix, batch, prompt, detach=detach)
        valid = sft.slots(policy, batch, settings)
        policy.zero_grad()
        losses = expert_losses(policy, bridged, valid, batch, settings, torch.Generator())
        losses['flow'].backward()
        assert (policy.backbone.network.lm_head.weight.grad is None) == detach
    policy.zero_grad()


def test_every_row_comes_about_as_often_as_it_weighs():
    weights = np.array([1.0, 1.0, 2.0, 4.0] * 50)
    counts = np.zeros(200)
    for epoch in range(40):
        order = draw_order(weights, 3, epoch)
        assert len(order) == 200
        counts += np.bincount(order, minlength=200)
    np.testing.assert_allclose(counts / 40, weights / 2.0, atol=0.2)
    assert not np.array_equal(draw_order(weights, 3, 0), draw_order(weights, 3, 1))


def test_the_rate_warms_up_and_falls():
    settings = TrainSettings(warmup_steps=10, final_rate=0.03)
    assert schedule(0.0, 0, settings) == pytest.approx(0.1)
    assert schedule(0.0, 20, settings) == pytest.approx(1.0)
    assert schedule(1.0, 500, settings) == pytest.approx(0.03)


def test_reactions_count_the_right_way_only():
    pairs = np.array(['a', 'a', 'b', 'b', 'c', 'c', ''], dtype=object)
    families = np.array(['pedestrian'] * 7, dtype=object)
    wanted = np.array([2.0, 8.0, 9.0, 5.0, 3.0, 3.5, 1.0])
    speed = np.array([3.0, 8.0, 7.0, 8.0, 0.0, 9.0, 1.0])
    found = pair_reactions(pairs, families, speed, wanted)
    assert found['pairs_pedestrian'] == 2
    assert found['right_pedestrian'] == 0.5
    assert found['size_pedestrian'] == pytest.approx((5.0 - 1.0) / 10.0)


def test_held_out_rows_hold_whole_pairs(shards):
    rows = ShardSet(shards)
    chosen = choose_rows(rows, 24)
    pairs = [p for p in rows.pair_ids[chosen] if p]
    assert len(pairs) == 2 * len(set(pairs)) > 0
    assert len(chosen) == len(set(chosen.tolist()))


def test_speed_is_that_of_the_waypoints():
    poses = np.zeros((1, 10, 3))
    poses[0, :, 0] = 4.0 * 0.5 * np.arange(1, 11)
    assert speed_at(poses, 5, 0.5) == pytest.approx([4.0])


def test_a_broken_settings_file_is_a_users_fault(tmp_path):
    (tmp_path / 'bad.yaml').write_text('steps: [')
    with pytest.raises(SpanvlaError, match='cannot be read'):
        load_settings(tmp_path / 'bad.yaml')
