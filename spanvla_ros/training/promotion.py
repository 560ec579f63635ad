"""Whether a reinforced checkpoint may become its run's model: the lint on held-out moments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from spanvla_ros.model.backbone.adapters import adapters_off
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import make_batch
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.lint import Behaviour, Finding, lint
from spanvla_ros.training.rewards import Asked, Rollout, pdms
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.grpo import sample_rollouts
from spanvla_ros.types import SpanvlaError

CHUNK = 4
PARTS = ('nc', 'dac', 'ep', 'comfort')


class Promotion:
    """Lints a policy with adapters against itself with its adapters off."""

    def __init__(self, shards: ShardSet, settings: TrainSettings) -> None:
        """Choose `lint_rows` evenly among the rows that have scoring rows."""
        usable = np.flatnonzero(shards.scored & (shards.pair_ids == ''))
        if not len(usable):
            raise SpanvlaError(
                f'{shards.path}: holds no scoring rows for the lint; draw it again with --scored, '
                'or train with lint_rows=0'
            )
        count = min(settings.lint_rows, len(usable))
        self._rows = shards.rows(usable[np.linspace(0, len(usable) - 1, count).astype(int)])
        self._settings = settings
        self._before: Behaviour | None = None

    def findings(self, policy: Policy) -> list[Finding]:
        """What keeps the policy from being promoted."""
        if self._before is None:
            with adapters_off(policy):
                self._before = self._behaviour(policy)
        return lint(self._before, self._behaviour(policy))

    @torch.no_grad()
    def _behaviour(self, policy: Policy) -> Behaviour:
        found = []
        for start in range(0, len(self._rows), CHUNK):
            rows = self._rows[start : start + CHUNK]
            batch = make_batch(rows, policy, self._settings, None).to(policy.device)
            generator = torch.Generator().manual_seed(start)
            rollouts = sample_rollouts(policy, batch, self._settings, generator)
            size = self._settings.group
            for at, row in enumerate(rows):
                # Progress counts for what is driven here, whatever the sample's label.
                sample = replace(row.sample, label='positive')
                asked = Asked(sample, row.scoring, policy.config.times_s)
                found.append(_moment(asked, rollouts[at * size : (at + 1) * size], self._settings))
        stacked = {name: np.stack([moment[name] for moment in found]) for name in found[0]}
        return Behaviour(times_s=policy.config.times_s, **stacked)


def _moment(asked: Asked, group: list[Rollout], settings: TrainSettings) -> dict[str, np.ndarray]:
    parts = pdms(asked, group, settings).parts
    nothing = np.zeros_like(asked.sample.future)
    return {
        'poses': np.stack([nothing if r.poses is None else r.poses for r in group]),
        'valid': np.array([r.poses is not None for r in group]),
        'slow': np.array([r.thinking == 'slow' for r in group]),
        'reference': asked.sample.future,
        **{name: parts[name] for name in PARTS},
    }
