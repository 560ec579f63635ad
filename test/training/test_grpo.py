"""GRPO against hand-worked numbers, brute force on a toy policy, and controlled runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

import golden_grpo  # noqa: E402
from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.backbone.adapters import (  # noqa: E402
    LoraSettings,
    adapter_layers,
    attach_adapters,
)
from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.flow import source_path  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy  # noqa: E402
from spanvla_ros.town.snapshots import labelled_scene, sample_snapshots  # noqa: E402
from spanvla_ros.training import flow_policy, plan_policy, token_policy  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.scoring_rows import pack_scene  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet, write_shard  # noqa: E402
from spanvla_ros.training.loop import fit_targets  # noqa: E402
from spanvla_ros.training.optimizer import Optimizer  # noqa: E402
from spanvla_ros.training.parallel import Group  # noqa: E402
from spanvla_ros.training.rewards import (  # noqa: E402
    REWARDS,
    Asked,
    Rollout,
    group_reward,
)
from spanvla_ros.training.settings import TrainSettings  # noqa: E402
from spanvla_ros.training.stages import grpo  # noqa: E402

ROOT = Path(__file__).parents[2]
NONE = {f'reward_{name}': 0.0 for name in REWARDS}
PLAIN = TrainSettings(
    batch=2, group=3, lora_rank=8, camera_drop=0.0, history_drop=0.0, route_drop=0.0, **NONE
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Random rows with one scene of the town as everybody's scoring row, and a model for them."""
    folder = tmp_path_factory.mktemp('grpo')
    write_shards(folder / 'plain', 40, 0)
    scoring = pack_scene(labelled_scene(sample_snapshots('turns', 7, 3)[1]))
    rows = [replace(row, scoring=scoring) for row in random_rows(40, 0)]
    (folder / 'train').mkdir()
    write_shard(folder / 'train/scenes-0.parquet', rows)
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(folder / 'plain'))
    save_policy(policy, folder / 'init', {})
    return folder


def opened(data, settings):
    policy = load_policy(data / 'init')
    attach_adapters(policy.backbone.network, LoraSettings(settings.lora_rank), settings.seed)
    optimizer = Optimizer(policy, grpo.parts(policy, settings), settings)
    return policy, optimizer


def test_advantages_by_hand():
    found = grpo.advantages(np.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]))
    std = np.sqrt((4 + 1 + 0 + 9) / 4)
    np.testing.assert_allclose(found[0], np.array([-2, -1, 0, 3]) / (std + 1e-4))
    np.testing.assert_array_equal(found[1], np.zeros(4))
    in_units = grpo.advantages(np.array([[1.0, 2.0, 3.0, 6.0], [0.9, 1.1, 1.0, 1.0]]), 2.0)
    np.testing.assert_allclose(in_units, [[-1.0, -0.5, 0.0, 1.5], [-0.05, 0.05, 0.0, 0.0]])


def test_terms_by_hand():
    now = torch.log(torch.tensor([[0.5, 0.25], [0.1, 0.8]]))
    reference = torch.log(torch.tensor([[0.25, 0.25], [0.2, 0.4]]))
    chosen = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    advantage = torch.tensor([2.0, -1.0])
    gain, kl, clipped = grpo.grpo_terms(now, now, reference, advantage, chosen)
    # One update: every ratio is 1.
    assert float(gain) == pytest.approx((2.0 - 1.0) / 2)
    k3 = lambda r, p: r / p - np.log(r / p) - 1  # noqa: E731
    assert float(kl) == pytest.approx(((k3(0.25, 0.5) + 0.0) / 2 + k3(0.2, 0.1)) / 2, rel=1e-6)
    assert float(clipped) == 0.0


def test_the_ratio_is_clipped_on_the_side_that_would_gain():
    old = torch.zeros(4, 1)
    now = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]]))
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    one = torch.ones(4, 1)
    gain, _, clipped = grpo.grpo_terms(now, old, old, advantage, one, clip=0.2)
    assert float(gain) == pytest.approx((1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert float(clipped) == pytest.approx(0.5)


def test_the_gradient_is_that_of_a_brute_force_policy_gradient():
    """A policy over 3 x 3 answers whose expected reward can be summed over all of them."""
    torch.manual_seed(0)
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor(
        [[0.0, 1.0, 4.0], [2.0, -1.0, 0.5], [3.0, 0.0, 1.0]], dtype=torch.float64
    )
    table = torch.log_softmax(weights, -1)
    joint = (table[0][:, None] + table[1][None]).exp()
    expected = (joint * reward).sum()
    (exact,) = torch.autograd.grad(expected, weights, retain_graph=True)
    # Every answer once, weighted by its probability in place of being drawn: the same estimator.
    found = torch.zeros_like(exact)
    for i in range(3):
        for j in range(3):
            now = torch.stack([table[0, i], table[1, j]])[None]
            gain, _, _ = grpo.grpo_terms(
                now, now.detach(), now.detach(), reward[i, j][None], torch.ones(1, 2)
            )
            (slope,) = torch.autograd.grad(2.0 * gain, weights, retain_graph=True)
            found += joint[i, j].detach() * slope
    # The mean over two tokens halves the gradient; 2.0 undoes it.
    torch.testing.assert_close(found, exact)


@torch.no_grad()
def test_log_probs_of_one_pass_are_those_of_drawing_token_by_token(data):
    policy, _ = opened(data, PLAIN)
    batch = make_batch(random_rows(2, 3), policy, PLAIN, np.random.default_rng(0))
    with torch.no_grad():
        prompt = policy.backbone.prefill(batch.ids, policy.look(batch.images), batch.valid)
    draw = torch.Generator().manual_seed(1)
    answers = token_policy.sample_answers(policy, prompt, batch.valid, 3, 1.3, draw)
    with torch.no_grad():
        found = token_policy.answer_log_probs(policy, prompt, batch.valid, answers, 3, 1.3)
    # Independently: prompt and answer in one causal pass of the whole backbone, a row at a time.
    grammar = token_policy.Grammar(policy)
    for row in range(6):
        ids = answers.ids[row, : int(answers.valid[row].sum())]
        whole = torch.cat([batch.ids[row // 3], ids])[None]
        valid = torch.cat([batch.valid[row // 3], torch.ones(len(ids))])[None]
        embeds = policy.look(batch.images[row // 3 : row // 3 + 1])
        hidden = policy.backbone.prefill(whole, embeds, valid).hidden
        logits = policy.backbone.logits(hidden)[0, batch.ids.shape[1] - 1 : -1]
        for at, token in enumerate(ids.tolist()):
            if answers.chosen[row, at]:
                allowed = grammar.allowed[answers.kind[row, at]]
                free = (logits[at] / 1.3).masked_fill(~allowed, -torch.inf)
                assert allowed[token]
                wanted = float(torch.log_softmax(free, -1)[token])
                assert float(found[row, at]) == pytest.approx(wanted, abs=2e-4)
            else:
                assert float(found[row, at]) == 0.0
    assert answers.chosen.sum() > 60


def test_answers_follow_the_grammar(data):
    policy, _ = opened(data, PLAIN)
    batch = make_batch(random_rows(2, 3), policy, PLAIN, np.random.default_rng(0))
    with torch.no_grad():
        prompt = policy.backbone.prefill(batch.ids, policy.look(batch.images), batch.valid)
    draw = torch.Generator().manual_seed(2)
    answers = token_policy.sample_answers(policy, prompt, batch.valid, 4, 1.0, draw)
    layout = policy.layout
    for ids, valid, rollout in zip(
        answers.ids, answers.valid, token_policy.to_rollouts(policy, answers), strict=True
    ):
        words = ids[valid > 0].tolist()
        assert words[0] == layout.think_id
        assert words[-1] == layout.turn_end_id
        actions = words[words.index(layout.action_start_id) + 1 : -1]
        decoded = layout.decode_actions(actions)
        assert len(decoded) == len(actions) == 10
        np.testing.assert_allclose(rollout.poses, policy.codebook.decode(np.array(decoded)))


def test_log_probs_of_a_flow_step_are_those_of_a_normal_distribution():
    value, mean = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 3)
    wanted = torch.distributions.Normal(mean, 0.4).log_prob(value).mean((-2, -1))
    torch.testing.assert_close(flow_policy.gaussian_log_prob(value, mean, 0.4), wanted)


def test_the_modes_of_a_plan_by_hand():
    times = torch.arange(0.5, 5.1, 0.5)
    north = torch.stack([0.0 * times, 8.0 * times, 0.0 * times + np.pi / 2], -1)[None]
    modes = plan_policy.plan_modes(north, times, 1.5, 0.3)[0]
    at_2s, at_4s = modes[3], modes[7]
    # Ahead is +y, left is -x; across, the heading is the slope of 0.3 (t / 4)^2 over 8 t.
    close = lambda row, wanted: torch.testing.assert_close(  # noqa: E731
        row, torch.tensor(wanted), atol=1e-6, rtol=0.0
    )
    close(at_4s[:, 0], [0.0, 1.5, 0.0])
    close(at_2s[:, 0], [0.0, 0.375, 0.0])
    close(at_4s[:, 1], [0.0, 0.75, 0.0])
    close(at_2s[:, 1], [0.0, 1.5 * 0.375, 0.0])
    close(at_4s[:, 2], [-0.3, 0.0, 0.3 * 2 / 4 / 8])
    close(at_2s[:, 2], [-0.075, 0.0, 0.3 * 2 * 0.5 / 4 / 8])


def test_log_probs_around_a_plan_are_those_of_the_coefficients_it_leaves():
    times = torch.arange(0.5, 5.1, 0.5)
    bend = torch.stack([6.0 * times, 0.3 * times**2, 0.1 * times], -1)[None]
    modes = plan_policy.plan_modes(bend, times, 1.0, 0.3)
    unit = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    drawn = torch.tensor([[[0.5, -1.0, 2.0], [-0.5, 1.0, -2.0]]])
    around = plan_policy.Around(bend[:, None], drawn, bend / unit, modes, unit)
    moved = (bend + modes @ torch.tensor([0.2, 0.0, -0.4])) / unit
    wanted = torch.distributions.Normal(0.0, 1.0)
    left = torch.tensor([[0.3, -1.0, 2.4], [-0.7, 1.0, -1.6]])
    found = plan_policy.around_log_probs(around, moved)
    torch.testing.assert_close(found, wanted.log_prob(left), atol=1e-4, rtol=0.0)
    found = plan_policy.around_log_probs(around, around.x)
    torch.testing.assert_close(found, wanted.log_prob(drawn[0]))


@pytest.mark.parametrize('kind', ['tokens', 'flow', 'plan'])
def test_a_first_update_stands_at_the_reference_and_reaches_adapters_alone(data, kind):
    settings = replace(PLAIN, rollout_policy=kind, reward_goal=1.0, reward_format=0.1)
    policy, optimizer = opened(data, settings)
    # An untrained expert gives no velocity at all.
    policy.expert.velocity.weight.data.normal_(0.0, 0.1)
    batch = make_batch(random_rows(2, 5), policy, settings, np.random.default_rng(0))
    optimizer.zero()
    found = grpo.losses(policy, batch, settings, torch.Generator().manual_seed(0))
    assert float(found['kl'].detach()) == pytest.approx(0.0, abs=1e-6)
    (found['policy'] + found['kl']).backward()
    moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all('.lora_B.' in name for name in moved)
    assert ('expert' in next(iter(moved))) == (kind != 'tokens')


@pytest.mark.parametrize(('label', 'goes'), [('negative', -1), ('recovery', 1), ('positive', 0)])
def test_negatives_push_away_and_recoveries_pull_near(label, goes):
    """A policy over four plans, one of them the sample's own future, nothing else rewarded."""
    settings = replace(PLAIN, reward_negative=0.5, reward_recovery=0.5, group=32)
    rows = random_rows(1, 11)
    sample = replace(rows[0].sample, label=label)
    asked = Asked(sample, b'', ModelConfig().times_s)
    beside = np.array([0.0, 1.0, 0.0])
    plans = [sample.future + side_m * beside for side_m in (0.0, 1.0, 4.0, -8.0)]
    weights = torch.zeros(4, requires_grad=True)
    start = torch.log_softmax(torch.zeros(4), -1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        now = torch.log_softmax(weights, -1)
        picked = torch.multinomial(now.detach().exp(), 32, replacement=True, generator=draw)
        reward = group_reward(asked, [Rollout(plans[i]) for i in picked.tolist()], settings)
        advantage = torch.from_numpy(grpo.advantages(reward.total[None])[0])
        chosen = now[picked][:, None]
        gain, kl, _ = grpo.grpo_terms(
            chosen, chosen.detach(), start[picked][:, None], advantage, torch.ones(32, 1)
        )
        (slope,) = torch.autograd.grad(0.04 * kl - gain, weights)
        weights = (weights - 0.2 * slope).detach().requires_grad_()
    chance = torch.softmax(weights.detach(), -1).numpy()
    if goes == 0:
        np.testing.assert_allclose(chance, 0.25)
    elif goes < 0:
        assert chance[0] < 0.12
        # What lies within the radius is pushed away less, what lies beyond not at all.
        assert chance[0] < chance[1] < chance[2:].min()
    else:
        assert chance[0] > 0.6
        assert chance[0] > chance[1] > chance[2:].max()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['plan', 'flow'])
@pytest.mark.parametrize(('label', 'goes'), [('negative', 1), ('recovery', -1)])
def test_the_flow_moves_away_from_negatives_and_towards_recoveries(data, kind, label, goes):
    """The plan that is driven, without noise, on K/V of the tiny model; nothing else rewarded."""
    settings = replace(
        PLAIN, rollout_policy=kind, reward_negative=0.5, reward_recovery=0.5, group=16, kl=0.0,
        learning_rate=2e-3, warmup_steps=1, decay=0.0, slot_empty=1.0, slot_foreign=0.0,
    )  # fmt: skip
    policy, optimizer = opened(data, settings)
    drawn = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.expert.velocity.weight, 0.0, 0.02, generator=drawn)
    batch = make_batch(random_rows(1, 5), policy, settings, np.random.default_rng(0))
    prefix, valid = grpo.bridged(policy, batch, settings)
    batch = replace(batch, prefix=prefix)

    def plan():
        source = source_path('history', batch.observations[0], policy.config.times_s)
        return policy.plan(prefix, batch.ego, valid, source[None])[0]

    # Three quarters of a metre beside the plan, as it widens: within reach of the noise.
    share = np.linspace(0.1, 1.0, 10)[:, None]
    target = plan() + share * [0.0, 1.5, 0.0]
    sample = replace(batch.rows[0].sample, label=label, future=target)
    batch = replace(batch, rows=(replace(batch.rows[0], sample=sample),))
    away = [np.linalg.norm((plan() - target)[:, :2], axis=1).mean()]
    for step in range(20):
        optimizer.zero()
        batch.kept.clear()
        found = grpo.losses(policy, batch, settings, torch.Generator().manual_seed(step))
        found['policy'].backward()
        optimizer.step(Group(0, 1), 0.0, step, (0.0, 0.0))
        away.append(np.linalg.norm((plan() - target)[:, :2], axis=1).mean())
    assert goes * (away[-1] - away[0]) > 0.2


def train(data, out, *settings, resume=False, init=None):
    words = ['train', 'grpo', '--config', str(ROOT / 'config/train/grpo.yaml'), '--out', str(out)]
    words += ['--resume'] if resume else ['--init', str(init or data / 'init')]
    small = (
        'minutes=0', 'batch=2', 'group=3', 'processes=1', "heldout=''", f'data={data / "train"}',
        'lint_rows=0',
    )  # fmt: skip
    for setting in (*small, *settings):
        words += ['--set', setting]
    return cli.main(words)


def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_ends(data, tmp_path, capfd):
    assert train(data, tmp_path / 'whole', 'steps=4') == 0
    assert train(data, tmp_path / 'broken', 'steps=4', 'stop_after=2') == 0
    assert train(data, tmp_path / 'broken', 'steps=4', resume=True) == 0
    for name in ('weights', 'optimizer'):
        one, other = (
            (tmp_path / run / f'state/{name}.safetensors').read_bytes()
            for run in ('whole', 'broken')
        )
        assert one == other, name
    line = json.loads((tmp_path / 'whole/log.jsonl').read_text().splitlines()[-1])
    for name in ('reward', 'slow_rate', 'term_epdms', 'kl', 'clipped'):
        assert f'loss_{name}' in line
    # The model directory is plain: it opens without adapters, and differs from the start.
    model = load_policy(tmp_path / 'whole/model')
    assert not adapter_layers(model)
    start = load_policy(data / 'init')
    moved = [
        name
        for (name, a), (_, b) in zip(
            model.named_parameters(), start.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert moved
    assert all(name.endswith(('q_proj.weight', 'k_proj.weight', 'v_proj.weight', 'o_proj.weight'))
               for name in moved)  # fmt: skip
    capfd.readouterr()


def test_the_plan_is_reinforced_on_cached_kv_and_resumes_bit_for_bit(data, tmp_path, capfd):
    words = (
        'rollout_policy=plan', f'cache={tmp_path / "kv"}', 'steps=3', 'reward_epdms=0',
        'reward_goal=1', 'advantage_unit=1', 'kl=0.01', 'accumulate=2',
    )  # fmt: skip
    policy = load_policy(data / 'init')
    torch.nn.init.normal_(policy.expert.velocity.weight, 0.0, 0.02)
    save_policy(policy, tmp_path / 'init', {})
    start = tmp_path / 'init'
    assert train(data, tmp_path / 'whole', *words, init=start) == 0
    assert train(data, tmp_path / 'broken', *words, 'stop_after=1', init=start) == 0
    assert train(data, tmp_path / 'broken', *words, resume=True) == 0
    one, other = (
        (tmp_path / run / 'state/weights.safetensors').read_bytes() for run in ('whole', 'broken')
    )
    assert one == other
    model = load_policy(tmp_path / 'whole/model')
    for (name, a), (_, b) in zip(model.named_parameters(), policy.named_parameters(), strict=True):
        assert torch.equal(a, b) or name.startswith('expert.blocks.')
    assert not torch.equal(model.expert.blocks[0].qkv.weight, policy.expert.blocks[0].qkv.weight)
    capfd.readouterr()


def test_a_refused_checkpoint_is_kept_apart_and_told(data, tmp_path, capfd, monkeypatch):
    from spanvla_ros.training import promotion
    from spanvla_ros.training.lint import Finding

    findings = [Finding('standing', '40% of plans stand')]
    monkeypatch.setattr(promotion, 'lint', lambda before, after: findings)
    words = ('steps=1', 'lint_rows=4', f'heldout={data / "train"}', 'heldout_rows=4')
    assert train(data, tmp_path / 'run', *words) == 2
    said = capfd.readouterr().err
    assert 'standing: 40% of plans stand' in said
    assert not (tmp_path / 'run/model').exists()
    manifest = json.loads((tmp_path / 'run/refused/manifest.json').read_text())
    assert manifest['training']['stages'][-1]['lint'][0]['check'] == 'standing'
    # It can go on, and is promoted once nothing is found.
    findings.clear()
    assert train(data, tmp_path / 'run', *words, 'steps=2', resume=True) == 0
    assert (tmp_path / 'run/model/manifest.json').exists()
    assert not (tmp_path / 'run/refused').exists()
    capfd.readouterr()


def test_the_lint_needs_scoring_rows(data, tmp_path, capfd):
    assert train(data, tmp_path / 'a', 'steps=1', 'lint_rows=4', f'heldout={data / "plain"}') == 2
    assert 'no scoring rows for the lint' in capfd.readouterr().err
    assert train(data, tmp_path / 'b', 'steps=1', f'data={data / "plain"}') == 2
    assert 'draw the scenes with --scored' in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('kind', sorted(golden_grpo.STEPS))
def test_the_loss_curve_is_the_golden_one(tmp_path, kind):
    golden = json.loads(golden_grpo.FILE.read_text())
    if torch.__version__.split('+')[0] != golden['torch']:
        pytest.skip(f'the golden curve is of torch {golden["torch"]}')
    for step, (now, then) in enumerate(
        zip(golden_grpo.curve(tmp_path, kind), golden[kind], strict=True)
    ):
        assert now == pytest.approx(then, abs=1e-4), step


def test_several_updates_a_batch_sample_once_and_clip(data, monkeypatch):
    settings = replace(PLAIN, reward_goal=1.0, updates=3)
    policy, optimizer = opened(data, settings)
    batch = make_batch(random_rows(2, 5), policy, settings, np.random.default_rng(0))
    sampled = []
    real = grpo.sample_group
    monkeypatch.setattr(grpo, 'sample_group', lambda *a: sampled.append(1) or real(*a))
    for _ in range(3):
        optimizer.zero()
        found = grpo.losses(policy, batch, settings, torch.Generator().manual_seed(0))
        found['policy'].backward()
        optimizer.step(Group(0, 1), 0.0, 0, (0.0, 0.0))
    assert len(sampled) == 1
