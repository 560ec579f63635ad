"""Every head trains by its setting, plans from its directory, and drives in lockstep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.action_heads import HEADS, AnswerError, AnswerHead  # noqa: E402
from spanvla_ros.model.checkpoint import load_model_dir  # noqa: E402
from spanvla_ros.model.config import ModelConfig, with_settings  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy  # noqa: E402
from spanvla_ros.runtime.export import export_model  # noqa: E402
from spanvla_ros.runtime.observations import ObservationBuilder  # noqa: E402
from spanvla_ros.runtime.planner import Planner  # noqa: E402
from spanvla_ros.runtime.torch_ import TorchBackend  # noqa: E402
from spanvla_ros.safety.follower import Follower  # noqa: E402
from spanvla_ros.safety.state import Guardian  # noqa: E402
from spanvla_ros.town.camera import Renderer  # noqa: E402
from spanvla_ros.town.lockstep import run_episode  # noqa: E402
from spanvla_ros.town.scenarios import make_world  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.heldout import expert_plans  # noqa: E402
from spanvla_ros.training.loop import fit_targets, start_policy  # noqa: E402
from spanvla_ros.training.objectives import EXPERT_LOSSES, draw_times, expert_losses  # noqa: E402
from spanvla_ros.training.open_loop import plan_rows  # noqa: E402
from spanvla_ros.training.settings import TrainSettings  # noqa: E402
from spanvla_ros.training.stages import sft  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ('minutes=0', 'batch=4', 'processes=1', 'compiled=false', 'heldout_rows=4', 'steps=2')
LOSSES = {
    'flow': {'flow'},
    'l1': {'l1'},
    'diffusion': {'anchor', 'l1'},
    'parallel': {'token'},
    'tokens': {'flow'},
    'text': {'flow'},
}


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_shards(folder / 'heldout', 4, 1)
    return write_shards(folder / 'train', 60, 0)


@pytest.fixture(scope='module')
def start(shards, tmp_path_factory):
    """A model directory as sft leaves it: fresh weights, flow head."""
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(shards))
    path = tmp_path_factory.mktemp('start') / 'model'
    save_policy(policy, path, {'stages': []})
    return path


def train(stage, out, shards, *settings, init):
    words = [
        'train',
        stage,
        '--config',
        str(ROOT / f'config/train/{stage.replace("-", "_")}.yaml'),
    ]
    words += ['--out', str(out), '--init', str(init)]
    paths = (f'data={shards}', f'heldout={shards.parent / "heldout"}')
    for setting in (*SMALL, *paths, *settings):
        words += ['--set', setting]
    return cli.main(words)


def headed(start, shards, head, **settings):
    policy = start_policy(TrainSettings(steps=1, model={'head': head, **settings}), start)
    fit_targets(policy, ShardSet(shards))
    return policy


def planner_of(policy, schedule='off'):
    return Planner(TorchBackend(policy), policy.layout, policy.normalization, schedule=schedule)


def seen_of(row):
    return replace(row.sample.observation, reasoning='', reasoning_stamp_ns=None)


@pytest.mark.parametrize('head', ['l1', 'diffusion', 'parallel', 'tokens', 'text'])
def test_a_head_trains_by_its_setting_and_plans_from_its_directory(
    start, shards, tmp_path, head, capfd
):
    expert = not isinstance(HEADS[head], AnswerHead)
    stage = 'action-expert' if expert else 'sft'
    assert train(stage, tmp_path / 'run', shards, f'head={head}', init=start) == 0
    line = json.loads((tmp_path / 'run/log.jsonl').read_text().splitlines()[-1])
    assert {f'loss_{name}' for name in LOSSES[head]} <= set(line)
    assert ('ade_m' in line) or head == 'text'
    directory = load_model_dir(tmp_path / 'run/model')
    assert directory.config.head == head
    planner = Planner.open(tmp_path / 'run/model', 'torch', schedule='off')
    planned = plan_rows(planner, planner.config, random_rows(2, 5))
    assert planned.shape == (2, 10, 3)
    if head == 'text':
        # Words that were never taught are no trajectory; that is said, not driven.
        assert np.isnan(planned).all()
    else:
        assert np.isfinite(planned).all()
    capfd.readouterr()


def test_an_answer_head_is_not_trained_on_a_frozen_backbone(start, shards, tmp_path, capfd):
    assert train('action-expert', tmp_path / 'run', shards, 'head=tokens', init=start) == 2
    assert 'train it with sft' in capfd.readouterr().err


def test_another_head_keeps_the_backbone_and_the_shipped_head_all_of_it(start, shards):
    before = load_policy(start)
    same = start_policy(TrainSettings(steps=1, model={'head': 'flow'}), start)
    assert torch.equal(same.expert.point, before.expert.point)
    other = headed(start, shards, 'diffusion', anchors=7, interval=4)
    assert other.backbone.bridged == (0, 4)
    assert len(other.expert.blocks) == 2
    assert other.normalization.anchors.shape == (7, 10, 3)
    for name, weight in before.backbone.network.named_parameters():
        assert torch.equal(weight, dict(other.backbone.network.named_parameters())[name])
    assert np.array_equal(other.normalization.std, before.normalization.std)
    other = headed(start, shards, 'flow', source='gaussian')
    assert other.normalization.source == 'gaussian'
    assert not np.array_equal(other.normalization.std, before.normalization.std)


def test_more_pictures_keep_backbone_and_expert_and_lengthen_the_prompt(start, shards):
    before = load_policy(start)
    torch.nn.init.normal_(before.expert.velocity.weight)
    save_policy(before, start.parent / 'taught', {'stages': []})
    settings = TrainSettings(steps=1, model={'frames_per_camera': 2})
    two = start_policy(settings, start.parent / 'taught')
    weights = dict(two.named_parameters())
    for name, weight in before.named_parameters():
        # A training head knows each visual token by its place.
        if not name.startswith('heads.attention.place'):
            assert torch.equal(weights[name], weight), name
    # One more picture of each camera: its 32 tokens, its camera's name, two marks.
    assert two.config.prompt_tokens == before.config.prompt_tokens + 3 * 35
    assert np.array_equal(two.normalization.std, before.normalization.std)
    # It plans from rows of two pictures, and the older one is seen.
    row = random_rows(1, 5)[0]
    seen = row.sample.observation
    dark = tuple((replace(f, image=np.zeros_like(f.image)), f) for (f,) in seen.frames)
    twice = tuple((f, f) for (f,) in seen.frames)
    rows = [
        replace(row, sample=replace(row.sample, observation=replace(seen, frames=frames)))
        for frames in (dark, twice)
    ]
    batch = make_batch(rows, two, TrainSettings(), None)
    planned = expert_plans(two, batch, TrainSettings())
    assert np.isfinite(planned).all()
    assert np.abs(planned[0] - planned[1]).max() > 1e-6
    fresh = start_policy(replace(settings, fresh_expert=True), start.parent / 'taught')
    assert not fresh.expert.velocity.weight.any()


@pytest.mark.parametrize('head', sorted(EXPERT_LOSSES))
def test_a_perfect_expert_has_no_loss_and_plans_the_future(start, shards, head):
    policy = headed(start, shards, head)
    rows = random_rows(3, 7)
    batch = make_batch(rows, policy, TrainSettings(), None)
    target = batch.target
    anchors = policy.normalization.anchors
    codebook = policy.codebook
    if head == 'parallel':
        wanted = torch.from_numpy(np.stack([codebook.encode(r.sample.future) for r in rows]))
    if head == 'diffusion':
        gaps = (target[:, None].numpy() - anchors[None]) ** 2
        nearest = torch.from_numpy(gaps.sum((-1, -2)).argmin(-1))

    def expert(state, time, ego, keys, values, valid):
        if head == 'flow':
            return (target[:, None] - state) / (1.0 - expert.time[..., None, None])
        if head == 'l1':
            return target[:, None]
        if head == 'parallel':
            return 50.0 * torch.nn.functional.one_hot(wanted, 256)[:, None].float()
        score = torch.nn.functional.one_hot(nearest, len(anchors)).float()
        score = 50.0 * score[..., None, None].expand(-1, -1, 10, 1)
        return torch.cat([target[:, None].expand(-1, len(anchors), -1, -1), score], -1)

    class Perfect:
        config, normalization = policy.config, policy.normalization

    Perfect.expert = staticmethod(expert)
    settings = TrainSettings(draws=4)
    expert.time = draw_times(settings, (3, 4), torch.Generator().manual_seed(1))
    prefix, _, prompt = sft.run_backbone(policy, batch, settings, policy.backbone.bridged)
    bridged = sft.bridge(policy, prefix, batch, prompt, detach=True)
    valid = sft.slots(policy, batch, settings)
    draw = torch.Generator().manual_seed(1)
    losses = expert_losses(Perfect, bridged, valid, batch, settings, draw)
    assert set(losses) == LOSSES[head]
    assert all(float(loss) < 1e-6 for loss in losses.values())


def test_an_action_without_thought_follows_the_fast_words_and_teaches_none(start, shards):
    policy = headed(start, shards, 'tokens')
    rows = random_rows(4, 3)
    for share, text in (
        (0.0, 'directly predict the final action'),
        (1.0, rows[0].sample.reasoning),
    ):
        settings = TrainSettings(answer_seen=share)
        batch = make_batch(rows, policy, settings, np.random.default_rng(0), 'full')
        # Row 0 is a slow one: its own words are taught only where it may think.
        assert policy.layout.decode_answer(batch.answer[0].tolist()) == text
        assert bool(batch.reasoning_weight[0].any()) == (share == 1.0)
        assert batch.reasoning_weight[1].any()
        actions = policy.layout.decode_actions(batch.answer[0].tolist())
        assert actions == policy.codebook.encode(rows[0].sample.future).tolist()


def test_a_text_answer_is_taught_as_waypoints_in_words(start, shards):
    policy = headed(start, shards, 'text')
    rows = random_rows(2, 3)
    batch = make_batch(rows, policy, TrainSettings(), np.random.default_rng(0), 'full')
    for index, row in enumerate(rows):
        ids = batch.answer[index][batch.action_weight[index] > 0].tolist()
        found = HEADS['text'].decode(policy.layout, policy.normalization, ids)
        clipped = np.clip(row.sample.future, -80.0, 99.5)
        assert np.abs(found - clipped)[:, :2].max() <= 0.25 + 1e-9


@pytest.mark.parametrize('schedule', ['off', 'sequential', 'concurrent'])
def test_tokens_are_said_behind_the_thought_and_the_cache_stands_as_before(
    start, shards, schedule
):
    policy = headed(start, shards, 'tokens')
    planner = planner_of(policy, schedule)
    seen = seen_of(random_rows(1, 5)[0])
    first = planner.plan(seen)
    said = planner._bridge.answer
    length = said.length
    assert length == int(said.cache.valid[0, policy.config.prompt_tokens :].sum())
    # The same K/V say the same again, token for token.
    again = said.say(HEADS['tokens'], policy.layout)
    poses = HEADS['tokens'].decode(policy.layout, policy.normalization, again)
    assert said.length == length
    assert np.isfinite(poses).all()
    assert np.isfinite(first.trajectory.poses).all()
    assert first.schedule == schedule


def test_greedy_tokens_are_those_of_one_causal_pass(start, shards):
    """Token by token through `decode`, against the whole answer at once through `prefill`."""
    policy = headed(start, shards, 'tokens')
    planner = planner_of(policy)
    seen = seen_of(random_rows(1, 5)[0])
    planner.plan(seen)
    said = planner._bridge.answer.say(HEADS['tokens'], policy.layout)
    ids, valid = policy.layout.encode(seen)
    answer = [*policy.layout.encode_answer('', 'fast').tolist(), *said]
    images = np.stack([frame.image for camera in seen.frames for frame in camera])
    with torch.no_grad():
        embeds = policy.look(torch.from_numpy(images)[None])
        whole = torch.tensor([[*ids.tolist(), *answer]])
        seen_all = torch.cat([torch.from_numpy(valid).float(), torch.ones(len(answer))])[None]
        hidden = policy.backbone.prefill(whole, embeds, seen_all).hidden
        logits = policy.backbone.logits(hidden)[0, -len(said) - 1 : -2]
    best = policy.layout.action_ids[logits[:, policy.layout.action_ids].argmax(-1).numpy()]
    assert best.tolist() == said[:-1]
    assert said[-1] == policy.layout.turn_end_id


@pytest.mark.slow
@pytest.mark.parametrize('head', sorted(HEADS))
def test_every_head_drives_in_lockstep(start, shards, head):
    policy = headed(start, shards, head)
    world = make_world('lane_keeping', 1_000_001)
    world.around = replace(world.around, time_limit_s=2.75)
    result = run_episode(
        world,
        planner_of(policy, 'concurrent'),
        ObservationBuilder(policy.config),
        Guardian(world.vehicle),
        Follower(world.vehicle),
        Renderer(policy.config.cameras),
        plan_period_s=0.5,
        keep_plans=True,
    )
    if head == 'text':
        # Untaught words: no plan reaches the guardian, and it stops the car.
        assert not result.plans
        assert len(result.refusals) == 6
        assert 'no plan is made of it' in result.refusals[0]
        assert result.trace[-1].state == 'FALLBACK'
    else:
        assert len(result.plans) == 6
        assert not result.refusals
        assert all(np.isfinite(plan.trajectory.poses).all() for plan in result.plans)


@pytest.mark.slow
@pytest.mark.parametrize('head', ['diffusion', 'tokens'])
def test_the_graphs_of_a_head_plan_as_torch_does(start, shards, tmp_path, head):
    policy = headed(start, shards, head)
    with torch.no_grad():
        policy.expert.velocity.weight.normal_(0.0, 0.3)
    save_policy(policy, tmp_path / 'model', {'stages': []})
    export_model(tmp_path / 'model', tmp_path / 'model')
    rows = random_rows(3, 5)
    plans = []
    for backend in ('onnxruntime', 'torch'):
        planner = Planner.open(tmp_path / 'model', backend, schedule='off')
        plans.append(plan_rows(planner, planner.config, rows))
    assert np.abs(plans[0] - plans[1]).max() < 1e-3
    assert np.abs(plans[0][0] - plans[0][1]).max() > 0.1


def test_a_malformed_answer_yields_no_plan_but_a_reason(start, shards):
    policy = headed(start, shards, 'text')
    planner = planner_of(policy)
    with pytest.raises(AnswerError) as caught:
        planner.plan(seen_of(random_rows(1, 5)[0]))
    assert caught.value.reason
    assert 'no plan' in str(caught.value)
    # No trajectory was made of it, and the next picture is a new chance.
    assert planner._plans == 0


@pytest.mark.parametrize(
    ('sampler', 'quartiles'),
    [
        ('uniform', (0.25, 0.5, 0.75)),
        # Of 1 - Beta(1.5, 1): 1 - (1 - p)^(2/3).
        ('beta', (0.1745, 0.3700, 0.6031)),
        # Of a normal around -0.5: 1 / (1 + exp(0.5 - z)), z = -0.6745, 0, 0.6745.
        ('logit_normal', (0.2360, 0.3775, 0.5435)),
    ],
)
def test_flow_times_are_drawn_as_the_sampler_says(sampler, quartiles):
    settings = TrainSettings(time_sampler=sampler)
    times = draw_times(settings, (200, 200), torch.Generator().manual_seed(0))
    assert float(times.min()) >= 0.0
    assert float(times.max()) < 1.0
    found = np.quantile(times.numpy(), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(found, quartiles, atol=0.01)


@pytest.mark.parametrize(('source', 'spread'), [('history', 0.3 * 1.09**0.5), ('gaussian', 1.0)])
def test_noise_stands_at_the_source_in_training_only(start, shards, source, spread):
    policy = headed(start, shards, 'flow', source=source)
    batch = make_batch(random_rows(2, 7), policy, TrainSettings(), None)
    batch.target[:] = 0.0
    starts = []

    def expert(state, time, ego, keys, values, valid):
        # The target is zero, so the state is the start shrunk by the time that is left.
        gone = draw_times(settings, (2, 400), torch.Generator().manual_seed(3))
        starts.append(state / (1.0 - gone[..., None, None]))
        return torch.zeros_like(state)

    class Recording:
        config = policy.config

    Recording.expert = staticmethod(expert)
    settings = TrainSettings(draws=400)
    prefix = sft.Prefix(torch.zeros(3, 2, 1, 1, 1), torch.zeros(3, 2, 1, 1, 1))
    generator = torch.Generator().manual_seed(3)
    expert_losses(Recording, prefix, torch.ones(2, 1), batch, settings, generator)
    assert float(starts[0].std()) == pytest.approx(spread, rel=0.05)
    # Planning starts at the source itself, or at one draw that is always the same.
    one, two = (planner_of(policy).plan(seen_of(random_rows(1, 5)[0])) for _ in range(2))
    assert np.array_equal(one.trajectory.poses, two.trajectory.poses)


def test_fifty_waypoints_train_and_plan(start, tmp_path, capfd):
    config = with_settings(ModelConfig(), waypoints=50)
    shards = write_shards(tmp_path / 'train', 8, 0, config)
    write_shards(tmp_path / 'heldout', 4, 1, config)
    run = tmp_path / 'run'
    assert train('action-expert', run, shards, 'waypoints=50', 'steps=1', init=start) == 0
    policy = load_policy(run / 'model')
    assert policy.normalization.std.shape == (50, 3)
    planner = planner_of(policy)
    for steps in (1, 5):
        planner.steps = steps
        plan = planner.plan(seen_of(random_rows(1, 5, config)[0]))
        assert plan.trajectory.poses.shape == (50, 3)
        np.testing.assert_allclose(plan.trajectory.times_s[[0, 49]], [0.1, 5.0])
    capfd.readouterr()
