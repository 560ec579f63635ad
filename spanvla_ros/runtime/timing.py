"""Timing of calls on a shared machine, and what a summary of it always says."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.model.action_heads import expert_draws
from spanvla_ros.model.checkpoint import ModelDirectory, write_text
from spanvla_ros.model.flow import time_features
from spanvla_ros.runtime.backend import Backend, ask_expert
from spanvla_ros.runtime.reasoner import padded
from spanvla_ros.types import SpanvlaError

WARM = 3


@dataclass(frozen=True)
class Timing:
    """Times of one stage in ms; `floor_ms` is the least this machine could take, if known."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_ms: float
    floor_ms: float | None = None

    @property
    def multiple(self) -> float | None:
        """CPU time over the floor."""
        return None if not self.floor_ms else self.cpu_ms / self.floor_ms


def time_in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time calls one after another, round by round, so that all see the same machine."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats + WARM):
        for name, call in calls.items():
            began, used = time.perf_counter(), time.process_time()
            call()
            if index >= WARM:
                wall[name].append((time.perf_counter() - began) * 1e3)
                spent[name].append((time.process_time() - used) * 1e3)
    return {
        name: Timing(
            float(np.percentile(wall[name], 50)),
            float(np.percentile(wall[name], 99)),
            max(wall[name]),
            float(np.median(spent[name])),
        )
        for name in calls
    }


def stage_calls(backend: Backend) -> dict[str, Callable[[], object]]:
    """A call of each graph with inputs of the right shapes."""
    config = backend.config
    rng = np.random.default_rng(0)
    pixels = rng.random((1, 3, config.height_px, config.width_px), dtype=np.float32)
    pictures = len(config.cameras) * config.frames_per_camera
    embeds = np.tile(backend.vision(pixels), (pictures, 1))
    ids = np.zeros((1, config.prompt_tokens), np.int64)
    valid = np.ones((1, config.prompt_tokens), np.float32)
    slots = config.sequence_tokens
    bridged = [padded(part, slots) for part in backend.prefill_action(ids, embeds, valid)]
    keys, values, _ = backend.prefill_reason(ids, embeds, valid)
    cache = padded(keys, slots), padded(values, slots)
    seen = np.pad(valid, ((0, 0), (0, config.answer_room)))
    x = np.zeros((1, expert_draws(config), config.waypoints, 3), np.float32)
    at, ego = time_features(0.0)[None], np.zeros((1, 20), np.float32)
    token, position = np.array([[5]]), np.array([config.prompt_tokens])
    return {
        'vision': lambda: backend.vision(pixels),
        'prefill_action': lambda: backend.prefill_action(ids, embeds, valid),
        'prefill_reason': lambda: backend.prefill_reason(ids, embeds, valid),
        'decode': lambda: backend.decode(token, position, *cache, seen),
        'step': lambda: ask_expert(backend, x, at, ego, bridged[0], bridged[1], seen),
    }


def rows(timings: Mapping[str, Timing]) -> dict[str, dict[str, float | None]]:
    """Timings as a summary holds them, with their multiple of the floor."""
    return {
        name: {**asdict(timing), 'multiple_of_floor': timing.multiple}
        for name, timing in timings.items()
    }


def circumstances(directory: ModelDirectory, repeats: int) -> dict[str, Any]:
    """What numbers are worth nothing without: model, cameras, machine, load, repeats."""
    config = directory.config
    return {
        'model_sha256': directory.sha256,
        'cameras': len(config.cameras),
        'pictures_px': [config.width_px, config.height_px],
        'prompt_tokens': config.prompt_tokens,
        'repeats': repeats,
        'threads': 1,
        'machine': {'processor': _processor(), 'cores': os.cpu_count()},
        'load': os.getloadavg()[0],
    }


def write_summary(out_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` below `out_dir` in one step; the directory is made if missing."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(out_dir / 'summary.json', json.dumps(summary, indent=1, allow_nan=False) + '\n')


def at_least_one(repeats: int) -> int:
    """The number of repeats, refused below 1."""
    if repeats < 1:
        raise SpanvlaError(f'--repeats is {repeats}; give at least 1')
    return repeats


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
