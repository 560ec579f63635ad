"""Whether every bridged layer is used: its K/V of another scene must change the plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spanvla_ros.model.action_heads import AnswerHead, head_of
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import load_normalization
from spanvla_ros.runtime.backend import Backend, ProposingBackend
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.training.contestants import Contestant, open_planner
from spanvla_ros.training.data.shards import TrainingRow
from spanvla_ros.training.intervals import Estimate, mean_of
from spanvla_ros.training.open_loop import plan_rows

CHANGED_M = 0.05


class Swapping:
    """A backend that hands out remembered K/V, one layer of them from the scene before.

    With `layer` None it runs and remembers; else `step` gets what was remembered.
    """

    def __init__(self, backend: Backend) -> None:
        """Stand before `backend`."""
        self._backend = backend
        self.layer: int | None = None
        self.call = 0
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def name(self) -> str:
        """The engine's name."""
        return self._backend.name

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._backend.config

    def prefill_reason(
        self, ids: np.ndarray, embeds: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The backend's own."""
        return self._backend.prefill_reason(ids, embeds, valid)

    def decode(
        self,
        token: np.ndarray,
        position: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        valid: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The backend's own."""
        return self._backend.decode(token, position, keys, values, valid)

    def step(
        self,
        x: np.ndarray,
        time: np.ndarray,
        ego: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        valid: np.ndarray,
    ) -> np.ndarray:
        """The backend's own."""
        return self._backend.step(x, time, ego, keys, values, valid)

    def propose(
        self,
        x: np.ndarray,
        time: np.ndarray,
        ego: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        valid: np.ndarray,
    ) -> np.ndarray:
        """The backend's own."""
        assert isinstance(self._backend, ProposingBackend)
        return self._backend.propose(x, time, ego, keys, values, valid)

    def vision(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures matter only while remembering."""
        if self.layer is None:
            self._embeds = self._backend.vision(pixels)
        return self._embeds

    def prefill_action(
        self, ids: np.ndarray, embeds: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Remember, or hand out the remembered with one layer exchanged."""
        if self.layer is None:
            self._seen.append(self._backend.prefill_action(ids, embeds, valid))
            return self._seen[-1]
        keys, values = (part.copy() for part in self._seen[self.call])
        other_keys, other_values = self._seen[self.call - 1]
        keys[self.layer], values[self.layer] = other_keys[self.layer], other_values[self.layer]
        self.call += 1
        return keys, values

    @property
    def layers(self) -> int:
        """Number of bridged layers remembered."""
        return len(self._seen[0][0])


def swapped_layers(
    contestant: Contestant, rows: Sequence[TrainingRow]
) -> dict[str, dict[str, Estimate]]:
    """For each bridged layer: how far the plans' ends move, and the share that moves at all.

    Empty for a head that is the language model's own answer: nothing is bridged.
    """
    opened = open_planner(contestant)
    if isinstance(head_of(opened.config), AnswerHead):
        return {}
    backend = Swapping(opened.backend)
    planner = Planner(
        backend,
        opened.layout,
        load_normalization(contestant.path, opened.config),
        schedule='off',
        steps=opened.steps,
    )
    straight = plan_rows(planner, opened.config, rows)
    names = [row.sample.scene_id for row in rows]
    found = {}
    for layer in range(backend.layers):
        backend.layer, backend.call = layer, 0
        moved = plan_rows(planner, opened.config, rows)
        gap = np.linalg.norm(moved[:, -1, :2] - straight[:, -1, :2], axis=-1)
        found[f'layer_{layer}'] = {
            'end_moves_m': mean_of(gap, names),
            'changed': mean_of(gap > CHANGED_M, names),
        }
    return found
