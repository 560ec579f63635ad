"""Writes the golden loss curves of GRPO: python test/training/golden_grpo.py."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from random_rows import random_rows, write_shards

from spanvla_ros.model.backbone.adapters import LoraSettings, attach_adapters
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.policy import load_policy, new_policy, save_policy
from spanvla_ros.town.snapshots import labelled_scene, sample_snapshots
from spanvla_ros.training.batches import make_batch
from spanvla_ros.training.data.scoring_rows import pack_scene
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.loop import fit_targets
from spanvla_ros.training.optimizer import Optimizer
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages import grpo

FILE = Path(__file__).parents[1] / 'data/golden/grpo_losses.json'
STEPS = {'tokens': 12, 'plan': 50}
SETTINGS = TrainSettings(
    batch=2, group=4, lora_rank=8, learning_rate=1e-3, warmup_steps=2,
    camera_drop=0.0, history_drop=0.0, route_drop=0.0, slot_empty=1.0, slot_foreign=0.0,
)  # fmt: skip


def curve(folder: Path, kind: str) -> list[dict[str, float]]:
    """Losses of some steps on random rows with a scene of the town as their scoring row."""
    steps, settings = STEPS[kind], replace(SETTINGS, rollout_policy=kind)
    write_shards(folder / 'plain', 40, 0)
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(folder / 'plain'))
    save_policy(policy, folder / 'init', {})
    policy = load_policy(folder / 'init')
    scoring = pack_scene(labelled_scene(sample_snapshots('turns', 7, 3)[1]))
    attach_adapters(policy.backbone.network, LoraSettings(settings.lora_rank), settings.seed)
    optimizer = Optimizer(policy, grpo.parts(policy, settings), settings)
    # An untrained expert gives no velocity at all, and its blocks would learn nothing.
    drawn = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(policy.expert.velocity.weight, 0.0, 0.02, generator=drawn)
    rows = [replace(row, scoring=scoring) for row in random_rows(2 * steps, 0)]
    found = []
    for step in range(steps):
        rng = np.random.default_rng(step)
        batch = make_batch(rows[2 * step : 2 * step + 2], policy, settings, rng)
        optimizer.zero()
        losses = grpo.losses(policy, batch, settings, torch.Generator().manual_seed(step))
        (losses['policy'] + losses['kl']).backward()
        optimizer.step(Group(0, 1), step / steps, step, (0.0, 0.0))
        wanted = ('policy', 'kl', 'reward', 'slow_rate')
        found.append({name: round(float(losses[name].detach()), 6) for name in wanted})
    return found


if __name__ == '__main__':
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    with tempfile.TemporaryDirectory() as place:
        curves = {kind: curve(Path(place) / kind, kind) for kind in STEPS}
    content = {'torch': torch.__version__.split('+')[0], **curves}
    FILE.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    sys.stderr.write(f'{FILE}\n')
