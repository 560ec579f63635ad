"""The golden inputs of a model directory: plans that every engine must make alike.

`spanvla export` draws the inputs and stores the plans of the torch model beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from spanvla_ros.model.checkpoint import ModelDirectory, read_tensors
from spanvla_ros.model.flow import euler, load_normalization, time_features
from spanvla_ros.runtime.backend import Backend
from spanvla_ros.types import SpanvlaError

GOLDEN_FILE = 'golden_inputs/golden.safetensors'
NAMES = ('images', 'ids', 'valid', 'ego', 'state')


def load_golden(directory: ModelDirectory) -> dict[str, np.ndarray]:
    """The golden inputs and plans of a verified model directory."""
    path = directory.file(GOLDEN_FILE)
    golden = read_tensors(path)
    if missing := sorted(set(NAMES) - set(golden)):
        raise SpanvlaError(
            f'{path}: holds no {missing[0]}; run: spanvla export --model {directory.path}'
        )
    return golden


def golden_state(
    backend: Backend, golden: Mapping[str, np.ndarray], case: int
) -> Float32[np.ndarray, '1 t 3']:
    """The normalized trajectory an engine plans on one golden case."""
    config = backend.config
    pixels = golden['images'][case].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255.0)
    embeds = np.concatenate([backend.vision(picture[None]) for picture in pixels])
    ids, valid = golden['ids'][case : case + 1], golden['valid'][case : case + 1]
    room = ((0, 0), (0, 0), (0, 0), (0, config.answer_room), (0, 0))
    keys, values = (np.pad(part, room) for part in backend.prefill_action(ids, embeds, valid))
    seen = np.pad(valid, ((0, 0), (0, config.answer_room)))
    ego = golden['ego'][case : case + 1]

    def velocity(x: np.ndarray, when: float) -> np.ndarray:
        return backend.step(x, time_features(when)[None], ego, keys, values, seen)

    start = np.zeros((1, config.waypoints, 3), np.float32)
    state: Float32[np.ndarray, '1 t 3'] = euler(velocity, start, config.steps)
    return state


def golden_states(
    backend: Backend, golden: Mapping[str, np.ndarray]
) -> Float32[np.ndarray, 'n t 3']:
    """The normalized trajectories an engine plans on all golden cases."""
    cases = range(len(golden['ids']))
    return np.concatenate([golden_state(backend, golden, case) for case in cases])


def waypoint_difference_m(backend: Backend, directory: ModelDirectory) -> float:
    """Largest distance, in meters, of a waypoint from its golden place; inf for one not finite."""
    golden = load_golden(directory)
    return states_apart_m(golden_states(backend, golden), golden['state'], directory)


def states_apart_m(ours: np.ndarray, theirs: np.ndarray, directory: ModelDirectory) -> float:
    """Largest distance, in meters, of a waypoint between normalized trajectories; inf for NaN."""
    std = load_normalization(directory.path, directory.config).std
    apart = (ours.astype(np.float64) - theirs) * std
    if not np.isfinite(apart).all():
        return float('inf')
    return float(np.hypot(apart[..., 0], apart[..., 1]).max())
