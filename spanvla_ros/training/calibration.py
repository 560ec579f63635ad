"""What the graphs of a model see on the road: their inputs while it plans and reasons on scenes.

Ranges for eight-bit graphs are read off these, so they come from the very path that runs on
board: each row is planned once as the `off` schedule does it and once with its reasoning.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.model.action_heads import AnswerError
from spanvla_ros.model.checkpoint import ModelDirectory
from spanvla_ros.model.flow import load_normalization
from spanvla_ros.model.prompt import PromptLayout, load_tokenizer
from spanvla_ros.runtime.eight_bit import Calibration, Feed
from spanvla_ros.runtime.onnx_ import INPUTS, OnnxBackend
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.training.data.shards import ShardSet, refuse_held_out

ROWS = 64
# Of the many calls of a graph on one row, evenly spread ones.
CALLS_PER_ROW = 4


def record_inputs(directory: ModelDirectory, scenes: Path, rows: int = ROWS) -> Calibration:
    """Inputs of every graph on evenly spread rows of a scene set that is not held out.

    Raises:
        SpanvlaError: the set is held out, is empty or has other cameras than the model.
    """
    shards = ShardSet(scenes)
    config = directory.config
    _check_scenes(shards, directory)
    chosen = np.unique(np.linspace(0, len(shards) - 1, rows).astype(int))
    backend = _Recorder(directory)
    planners = [
        Planner(
            backend,
            PromptLayout(config, load_tokenizer(directory.path)),
            load_normalization(directory.path, config),
            schedule=schedule,
        )
        for schedule in ('off', 'sequential')
    ]
    for row in shards.rows(chosen, config.frames_per_camera):
        for planner in planners:
            planner.reset()
            try:
                planner.plan(row.sample.observation)
            except AnswerError:
                continue
        backend.next_row()
    return Calibration(feeds=backend.kept, scenes=str(scenes.name), rows=len(chosen))


def _check_scenes(shards: ShardSet, directory: ModelDirectory) -> None:
    shards.check_cameras(directory.config.camera_names)
    refuse_held_out(shards.path, 'calibrate on')


class _Recorder:
    """The fp32 graphs, remembering what they were asked; implements `Backend`."""

    name = 'onnxruntime'

    def __init__(self, directory: ModelDirectory) -> None:
        self.config = directory.config
        self._backend = OnnxBackend(directory)
        self.kept: dict[str, list[Feed]] = defaultdict(list)
        self._row: dict[str, list[Feed]] = defaultdict(list)

    def next_row(self) -> None:
        """Keep some of the calls since the last row."""
        for graph, calls in self._row.items():
            some = np.unique(np.linspace(0, len(calls) - 1, CALLS_PER_ROW).astype(int))
            self.kept[graph] += [calls[index] for index in some]
        self._row.clear()

    def vision(self, *arrays: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._ask('vision', arrays)
        return found

    def prefill_action(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = self._ask('prefill_action', arrays)
        return found

    def prefill_reason(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray, np.ndarray] = self._ask('prefill_reason', arrays)
        return found

    def decode(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray, np.ndarray] = self._ask('decode', arrays)
        return found

    def step(self, *arrays: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._ask('step', arrays)
        return found

    def _ask(self, graph: str, arrays: tuple[np.ndarray, ...]) -> Any:
        # The reasoner goes on writing into the cache it gave.
        feed = {name: np.array(a) for name, a in zip(INPUTS[graph], arrays, strict=True)}
        self._row[graph].append(feed)
        return getattr(self._backend, graph)(*arrays)
