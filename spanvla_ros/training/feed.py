"""The batches of a run by step: made of rows by processes ahead of use, or of cached K/V."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch, make_batch
from spanvla_ros.training.data.shards import FACTS, ShardSet
from spanvla_ros.training.kv_cache import open_cache
from spanvla_ros.training.optimizer import draw_order
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import SpanvlaError

AHEAD = 3


@dataclass(frozen=True)
class Step:
    """What one step trains on: the batch, the numbers of its rows, the seed of its other draws."""

    batch: Batch
    indices: np.ndarray
    seed: int


class Feed(Dataset[Step]):
    """Steps by number; each is a function of (seed, step, process) alone."""

    def __init__(
        self,
        answers: str,
        shards: ShardSet,
        policy: Policy,
        settings: TrainSettings,
        group: Group,
    ) -> None:
        """Take the rows whose label is wanted; with `cache` prefill them first.

        Raises:
            SpanvlaError: there are fewer rows than a batch, or the cache is of other rows.
        """
        self._answers, self._shards, self._policy = answers, shards, policy
        self._settings, self._group = settings, group
        usable = np.flatnonzero(np.isin(shards.labels.astype(str), settings.labels.split()))
        if len(usable) < settings.batch:
            raise SpanvlaError(
                f'{settings.data}: holds {len(usable)} rows of {settings.labels}, fewer than one '
                'batch'
            )
        weights = row_weights(shards.facts[usable], settings)
        self._cached = None
        if settings.cache:
            usable = usable[draw_order(weights, 0, 0)][: settings.cache_rows or None]
            self._cached = open_cache(Path(settings.cache), policy, shards, usable, settings)
            # The cached rows were drawn by their weights.
            weights = np.ones(len(self._cached))
        self._usable, self._rows = usable, _Draw(weights, settings, group)

    def steps(self, first: int) -> Iterator[Step]:
        """The steps from number `first` on, without end."""
        if self._cached is not None:
            return (self[step] for step in itertools.count(first))
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=itertools.count(first),
            num_workers=self._settings.feeders,
            prefetch_factor=AHEAD if self._settings.feeders else None,
            generator=torch.Generator(),
        )
        return iter(loader)

    def __getitem__(self, step: int) -> Step:
        rng = np.random.default_rng([self._settings.seed, step, self._group.rank])
        seed = int(rng.integers(2**62))
        drawn = self._rows.at(step)
        indices = self._usable[drawn]
        if self._cached is not None:
            batch = self._cached.at(drawn)
            if self._answers == 'none':
                # What has no answer to learn from learns from scores.
                bare = self._shards.rows(indices, frames=0)
                batch = replace(batch, rows=tuple(bare))
            return Step(batch, indices, seed)
        rows = self._shards.rows(indices, self._policy.config.frames_per_camera)
        batch = make_batch(rows, self._policy, self._settings, rng, self._answers)
        return Step(batch, indices, seed)


def row_weights(facts: np.ndarray, settings: TrainSettings) -> np.ndarray:
    """Weight of each row: rare classes come more often than they are."""
    column = {name: facts[:, index].astype(np.float64) for index, name in enumerate(FACTS)}
    return (
        1.0
        + settings.weight_pedestrian * (column['pedestrian_on_road'] > 0.5)
        + settings.weight_light * (column['light_inverse_distance'] > 0.0)
        + settings.weight_lead * (column['lead'] > 0.5)
    )


class _Draw:
    """Row numbers of each step for this process."""

    def __init__(self, weights: np.ndarray, settings: TrainSettings, group: Group) -> None:
        self._weights, self._settings, self._group = weights, settings, group
        self._orders: dict[int, np.ndarray] = {}

    def at(self, step: int) -> np.ndarray:
        batch, rows = self._settings.batch, len(self._weights)
        places = range(step * batch + self._group.rank, (step + 1) * batch, self._group.size)
        return np.array([self._order(place // rows)[place % rows] for place in places])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = draw_order(self._weights, self._settings.seed, epoch)
        return self._orders[epoch]
