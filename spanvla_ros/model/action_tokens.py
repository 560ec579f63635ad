"""Action tokens: a K-disk codebook of motions over one waypoint step.

Paper: AutoVLA 3.2 (K-disk clustering of segments by the mean distance of the vehicle's four
corners, token 0 = standing still; tokenized by rolling from the decoded state). Deviations: a
segment is its end pose alone; a radius is searched so that K disks cover the data, since K = 256
disks of the paper's 0.05 m cover little; what then remains of K goes to the worst-covered motions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from spanvla_ros.geometry import box_corners, local_from_world, world_from_local
from spanvla_ros.model.checkpoint import read_tensors, write_tensors
from spanvla_ros.types import SpanvlaError

CODEBOOK_FILE = 'action_codebook.safetensors'
BOX_LENGTH_M, BOX_WIDTH_M = 4.8, 2.0
RADIUS_RANGE_M = (0.02, 4.0)
RADIUS_SEARCH_STEPS = 12
MAX_SEGMENTS = 20_000


@dataclass(frozen=True)
class ActionCodebook:
    """`motions[i]` is (dx m, dy m, dyaw rad) of token i in the pose before it."""

    motions: Float64[np.ndarray, 'k 3']

    def encode(self, poses: Float64[np.ndarray, 't 3']) -> Int64[np.ndarray, 't']:
        """Tokens of poses in `base_link` (present excluded), rolled from the decoded state."""
        state = np.zeros(3)
        tokens = np.empty(len(poses), dtype=np.int64)
        for index, target in enumerate(poses):
            # Distances are the same in the frame of the state, where the corners stay as they are.
            near = _corners(local_from_world(state, target))
            tokens[index] = int(np.argmin(_distance(self._motion_corners, near)))
            state = world_from_local(state, self.motions[tokens[index]])
        return tokens

    @cached_property
    def _motion_corners(self) -> Float64[np.ndarray, 'k 4 2']:
        return _corners(self.motions)

    def decode(self, tokens: Int64[np.ndarray, 't']) -> Float64[np.ndarray, 't 3']:
        """Poses in `base_link` of a row of tokens."""
        state = np.zeros(3)
        poses = np.empty((len(tokens), 3))
        for index, token in enumerate(tokens):
            state = world_from_local(state, self.motions[token])
            poses[index] = state
        return poses


def segments_of(poses: Float64[np.ndarray, 't 3']) -> Float64[np.ndarray, 't 3']:
    """Motion of each step of a trajectory in `base_link`, in the pose before it."""
    before = np.concatenate([np.zeros((1, 3)), poses[:-1]])
    pairs = zip(before, poses, strict=True)
    return np.stack([local_from_world(origin, pose) for origin, pose in pairs])


def fit_codebook(
    segments: Float64[np.ndarray, 'n 3'], size: int = 256, seed: int = 0
) -> ActionCodebook:
    """K-disk codebook of `size` motions over segments (dx, dy, dyaw); token 0 stands still."""
    if len(segments) < size or not np.isfinite(segments).all():
        raise SpanvlaError(f'codebook: needs at least {size} finite segments, has {len(segments)}')
    rng = np.random.default_rng(seed)
    if len(segments) > MAX_SEGMENTS:
        segments = segments[rng.choice(len(segments), MAX_SEGMENTS, replace=False)]
    segments = np.concatenate([np.zeros((1, 3)), segments])
    corners = _corners(segments)
    low, high = RADIUS_RANGE_M
    best = _disks(segments, corners, high, size, seed)
    if best is None:
        raise SpanvlaError(f'codebook: {size} disks of {high} m do not cover the segments')
    for _ in range(RADIUS_SEARCH_STEPS):
        middle = float(np.sqrt(low * high))
        found = _disks(segments, corners, middle, size, seed)
        low, high = (middle, high) if found is None else (low, middle)
        best = best if found is None else found
    return ActionCodebook(_filled(best, segments, corners, size))


def _disks(
    segments: Float64[np.ndarray, 'n 3'],
    corners: Float64[np.ndarray, 'n 4 2'],
    radius_m: float,
    size: int,
    seed: int,
) -> Float64[np.ndarray, 'k 3'] | None:
    rng = np.random.default_rng(seed)
    motions: list[Float64[np.ndarray, '3']] = []
    left = np.arange(len(segments))
    while len(left):
        if len(motions) == size:
            return None
        center = left[0] if not motions else left[rng.integers(len(left))]
        inside = _distance(corners[left], corners[center]) <= radius_m
        motions.append(segments[left[inside]].mean(axis=0) if motions else np.zeros(3))
        left = left[~inside]
    return np.stack(motions)


def _filled(
    motions: Float64[np.ndarray, 'k 3'],
    segments: Float64[np.ndarray, 'n 3'],
    corners: Float64[np.ndarray, 'n 4 2'],
    size: int,
) -> Float64[np.ndarray, 'm 3']:
    nearest = np.full(len(segments), np.inf)
    for motion in motions:
        nearest = np.minimum(nearest, _distance(corners, _corners(motion)))
    extra = []
    for _ in range(size - len(motions)):
        worst = int(np.argmax(nearest))
        extra.append(segments[worst])
        nearest = np.minimum(nearest, _distance(corners, corners[worst]))
    return np.concatenate([motions, np.array(extra).reshape(-1, 3)])


def _corners(poses: Float64[np.ndarray, '*n 3']) -> Float64[np.ndarray, '*n 4 2']:
    return box_corners(
        poses, np.full(poses.shape[:-1], BOX_LENGTH_M), np.full(poses.shape[:-1], BOX_WIDTH_M)
    )


def _distance(
    corners: Float64[np.ndarray, 'n 4 2'], target: Float64[np.ndarray, '4 2']
) -> Float64[np.ndarray, 'n']:
    gap = corners - target
    return np.sqrt((gap * gap).sum(-1)).mean(-1)


def write_codebook(model_dir: str | Path, codebook: ActionCodebook) -> None:
    """Write `action_codebook.safetensors`."""
    write_tensors(
        Path(model_dir) / CODEBOOK_FILE, {'motions': codebook.motions.astype(np.float32)}
    )


def load_codebook(model_dir: str | Path) -> ActionCodebook:
    """Read `action_codebook.safetensors`; a bad one raises `SpanvlaError`."""
    path = Path(model_dir) / CODEBOOK_FILE
    motions = read_tensors(path).get('motions')
    if motions is None or motions.ndim != 2 or motions.shape[1] != 3:
        raise SpanvlaError(f'{path}: holds no tensor motions [k, 3]; fetch the model again')
    if not np.isfinite(motions).all():
        raise SpanvlaError(f'{path}: holds a number that is not finite; fetch the model again')
    return ActionCodebook(motions.astype(np.float64))
