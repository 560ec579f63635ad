"""The cached path trains on the numbers that the backbone gives, and only on those of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.config import ModelConfig, with_settings  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy, with_config  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.kv_cache import NOISE_SEED, open_cache  # noqa: E402
from spanvla_ros.training.loop import fit_targets  # noqa: E402
from spanvla_ros.training.plan_policy import flow_plan  # noqa: E402
from spanvla_ros.training.settings import TrainSettings, load_settings  # noqa: E402
from spanvla_ros.training.stages import action_expert, grpo  # noqa: E402
from spanvla_ros.training.stages.sft import bridge, run_backbone, slots  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/action_heads.md').read_text(encoding='utf-8')
ROWS = dict(re.findall(r'^\| [a-z ]+ \| `([a-z0-9-]+)` \| `([^`]*--set[^`]*)` \|$', PAGE, re.M))
SETTINGS = TrainSettings(steps=1, draws=2)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('shards') / 'train', 40, 0)


@pytest.fixture(scope='module')
def policy(shards):
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(shards))
    return policy


def spoken(policy, **changes):
    """The policy with another configuration and an expert that is not zero at the start."""
    changed = with_config(policy, with_settings(policy.config, **changes))
    with torch.no_grad():
        changed.expert.velocity.weight.normal_(
            0.0, 0.3, generator=torch.Generator().manual_seed(1)
        )
    return changed


@pytest.mark.parametrize(('interval', 'layers'), [(2, 3), (4, 2), (0, 1)])
def test_losses_on_cached_kv_are_those_of_the_backbone(policy, shards, tmp_path, interval, layers):
    rows, changed = ShardSet(shards), spoken(policy, interval=interval)
    fit_targets(changed, rows)
    chosen = np.arange(6)
    cached = open_cache(tmp_path / 'kv', changed, rows, chosen, SETTINGS).at(chosen)
    assert cached.prefix.keys.shape[:2] == (layers, 6)
    rng = np.random.default_rng([NOISE_SEED, 0])
    plain = make_batch(rows.rows(chosen), changed, SETTINGS, rng, 'reasoning')
    ours, theirs = (_flow_loss(changed, batch) for batch in (cached, plain))
    assert ours == pytest.approx(theirs, rel=2e-3)
    # The K/V matter: those of other rows give another loss.
    keys, values = cached.prefix.keys, cached.prefix.values
    other = replace(cached, prefix=type(cached.prefix)(keys.flip(1), values.flip(1)))
    assert abs(_flow_loss(changed, other) - theirs) > 3 * abs(ours - theirs)


@torch.no_grad()
def _flow_loss(policy, batch):
    draw = torch.Generator().manual_seed(5)
    return float(action_expert.losses(policy, batch, SETTINGS, draw)['flow'])


@torch.no_grad()
def test_plans_on_cached_kv_are_those_of_the_backbone(policy, shards, tmp_path):
    rows, changed = ShardSet(shards), spoken(policy)
    fit_targets(changed, rows)
    chosen = np.arange(6)
    cached = open_cache(tmp_path / 'kv', changed, rows, chosen, SETTINGS).at(chosen[::-1].copy())
    rng = np.random.default_rng([NOISE_SEED, 0])
    plain = make_batch(rows.rows(chosen), changed, SETTINGS, rng, 'reasoning')
    prefix, _, prompt = run_backbone(changed, plain, SETTINGS, changed.backbone.bridged)
    prefix, seen = (
        bridge(changed, prefix, plain, prompt, detach=True),
        slots(changed, plain, SETTINGS),
    )
    theirs = flow_plan(changed, prefix, seen, plain.ego).flip(0)
    ours = flow_plan(changed, *grpo.bridged(changed, cached, SETTINGS), cached.ego)
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0.0)
    assert (ours - ours.flip(0)).abs().max() > 0.1
    pasts = [one.history for one in cached.observations]
    np.testing.assert_array_equal(pasts, [one.history for one in plain.observations[::-1]])


def test_one_cache_serves_heads_intervals_and_sources_but_no_other_backbone(
    policy, shards, tmp_path, monkeypatch
):
    rows, chosen = ShardSet(shards), np.arange(4)
    open_cache(tmp_path / 'kv', policy, rows, chosen, SETTINGS)
    monkeypatch.setattr('spanvla_ros.training.kv_cache.run_backbone', None)
    for changes in ({'head': 'diffusion'}, {'interval': 1}, {'source': 'gaussian'}):
        changed = spoken(policy, **changes)
        fit_targets(changed, rows)
        assert len(open_cache(tmp_path / 'kv', changed, rows, chosen, SETTINGS)) == 4
    other = new_policy(ModelConfig(), seed=1)
    fit_targets(other, rows)
    for settings, who, which in (
        (SETTINGS, other, chosen),
        (SETTINGS, policy, chosen + 1),
        (replace(SETTINGS, camera_drop=0.5), policy, chosen),
    ):
        with pytest.raises(SpanvlaError, match=r'another (backbone|rows|noise)'):
            open_cache(tmp_path / 'kv', who, rows, which, settings)


def row_words(name, settings):
    file = 'answer' if name in ('tokens', 'text') else 'expert'
    stage = 'sft' if file == 'answer' else 'action-expert'
    config = ROOT / 'config/train/ablation' / f'{file}.yaml'
    return ['train', stage, '--config', str(config), *settings.split()]


def test_the_page_has_the_rows_of_every_table():
    assert {'flow', 'l1', 'diffusion', 'parallel', 'tokens', 'text'} <= set(ROWS)
    assert {'interval-1', 'interval-4', 'last-layer', 'gaussian', 'constant-velocity'} <= set(ROWS)
    for name, settings in ROWS.items():
        words = row_words(name, settings)
        assert load_settings(words[3], words[5::2]).steps == 3000


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(ROWS))
def test_every_row_of_the_page_trains(policy, shards, tmp_path, name, capfd):
    save_policy(policy, tmp_path / 'start', {'stages': []})
    words = row_words(name, ROWS[name])
    words += ['--init', str(tmp_path / 'start'), '--out', str(tmp_path / 'run')]
    changes = ('steps=2', 'batch=4', f'data={shards}', f'heldout={shards}', 'heldout_rows=4')
    if words[1] == 'action-expert':
        changes += (f'cache={tmp_path / "kv"}', 'cache_rows=16')
    for change in changes:
        words += ['--set', change]
    assert cli.main(words) == 0
    assert 'ade_m' in (tmp_path / 'run/log.jsonl').read_text() or name == 'text'
    assert load_policy(tmp_path / 'run/model').normalization is not None
    capfd.readouterr()
