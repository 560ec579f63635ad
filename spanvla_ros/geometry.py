"""Plane geometry on numpy arrays: angles, poses, polylines, boxes. Meters and radians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

# numpy's own ArrayLike does not know tuples when types are checked at run time.
ArrayLike = NDArray[Any] | Sequence[Any] | float
Poses = Float64[np.ndarray, '*n 3']
Points = Float64[np.ndarray, '*n 2']


def wrap_angle(angle_rad: ArrayLike) -> Float64[np.ndarray, '...']:
    """The same angle in [-pi, pi)."""
    turned = np.asarray(angle_rad, dtype=np.float64) + np.pi
    return np.asarray(turned % (2.0 * np.pi) - np.pi)


def world_from_local(origin: ArrayLike, local: ArrayLike) -> Float64[np.ndarray, '... c']:
    """Points (2 columns) or poses (3 columns) given in the frame of pose `origin`, in its parent.

    Args:
        origin: the pose `(x, y, yaw)` of the local frame in the world.
        local: `[..., 2]` points or `[..., 3]` poses in the local frame.
    """
    x, y, yaw = np.asarray(origin, dtype=np.float64)
    local = np.asarray(local, dtype=np.float64)
    cos, sin = np.cos(yaw), np.sin(yaw)
    world: NDArray[np.float64] = local.copy()
    world[..., 0] = x + cos * local[..., 0] - sin * local[..., 1]
    world[..., 1] = y + sin * local[..., 0] + cos * local[..., 1]
    if local.shape[-1] == 3:
        world[..., 2] = wrap_angle(local[..., 2] + yaw)
    return world


def local_from_world(origin: ArrayLike, world: ArrayLike) -> Float64[np.ndarray, '... c']:
    """The inverse of `world_from_local`: points or poses of the world in the frame of `origin`."""
    x, y, yaw = np.asarray(origin, dtype=np.float64)
    world = np.asarray(world, dtype=np.float64)
    cos, sin = np.cos(yaw), np.sin(yaw)
    dx, dy = world[..., 0] - x, world[..., 1] - y
    local: NDArray[np.float64] = world.copy()
    local[..., 0] = cos * dx + sin * dy
    local[..., 1] = -sin * dx + cos * dy
    if world.shape[-1] == 3:
        local[..., 2] = wrap_angle(world[..., 2] - yaw)
    return local


def interpolate_poses(times_s: ArrayLike, poses: ArrayLike, at_s: ArrayLike) -> Poses:
    """Poses at other times: linear in x and y, the short way round in yaw, ends held."""
    times_s = np.asarray(times_s, dtype=np.float64)
    poses = np.asarray(poses, dtype=np.float64)
    at_s = np.asarray(at_s, dtype=np.float64)
    yaw = np.interp(at_s, times_s, np.unwrap(poses[:, 2]))
    return np.stack(
        [
            np.interp(at_s, times_s, poses[:, 0]),
            np.interp(at_s, times_s, poses[:, 1]),
            wrap_angle(yaw),
        ],
        axis=-1,
    )


def arc_length(points: ArrayLike) -> Float64[np.ndarray, 'n']:
    """Distance along a polyline at each of its points, starting at 0."""
    steps = np.linalg.norm(np.diff(np.asarray(points, dtype=np.float64)[:, :2], axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def sample_polyline(points: ArrayLike, at_m: ArrayLike) -> Points:
    """Points at distances `at_m` along a polyline; beyond an end it goes straight on."""
    line = np.asarray(points, dtype=np.float64)[:, :2]
    along = arc_length(line)
    keep = np.concatenate([[True], np.diff(along) > 1e-9])
    line, along = line[keep], along[keep]
    at_m = np.asarray(at_m, dtype=np.float64)
    if len(line) == 1:
        return np.array(np.broadcast_to(line[0], (*at_m.shape, 2)))
    piece = np.clip(np.searchsorted(along, at_m, side='right') - 1, 0, len(line) - 2)
    direction = np.diff(line, axis=0) / np.diff(along)[:, None]
    sampled: NDArray[np.float64] = (
        line[piece] + (at_m - along[piece])[..., None] * direction[piece]
    )
    return sampled


def project_on_polyline(
    points: ArrayLike, query: ArrayLike
) -> tuple[Float64[np.ndarray, 'q'], Float64[np.ndarray, 'q']]:
    """Arc length and signed lateral offset (left positive) of each query point's nearest point.

    Args:
        points: `[n, 2]` polyline, at least two distinct points.
        query: `[q, 2]` points.
    """
    points = np.asarray(points, dtype=np.float64)[:, :2]
    query = np.atleast_2d(np.asarray(query, dtype=np.float64))[:, :2]
    step = np.diff(points, axis=0)
    length = np.linalg.norm(step, axis=1)
    keep = length > 1e-9
    start, step, length = points[:-1][keep], step[keep], length[keep]
    base = arc_length(points)[:-1][keep]
    unit = step / length[:, None]
    offset = query[:, None] - start
    along = np.clip((offset * unit).sum(-1), 0.0, length)
    gap = offset - along[..., None] * unit
    nearest = np.argmin((gap**2).sum(-1), axis=1)
    row = np.arange(len(query))
    cross = unit[nearest, 0] * offset[row, nearest, 1] - unit[nearest, 1] * offset[row, nearest, 0]
    distance = np.linalg.norm(gap[row, nearest], axis=1)
    return base[nearest] + along[row, nearest], np.copysign(distance, cross)


def box_corners(pose: ArrayLike, length_m: ArrayLike, width_m: ArrayLike) -> Points:
    """Corners of boxes by center poses: front-left, rear-left, rear-right, front-right.

    Args:
        pose: `[..., 3]` center poses.
        length_m: `[...]` lengths, along yaw.
        width_m: `[...]` widths.
    """
    pose = np.asarray(pose, dtype=np.float64)
    half = 0.5 * np.stack(
        np.broadcast_arrays(
            np.asarray(length_m, dtype=np.float64), np.asarray(width_m, dtype=np.float64)
        ),
        axis=-1,
    )
    signs = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    local = signs * half[..., None, :]
    cos, sin = np.cos(pose[..., 2, None]), np.sin(pose[..., 2, None])
    return np.stack(
        [
            pose[..., 0, None] + cos * local[..., 0] - sin * local[..., 1],
            pose[..., 1, None] + sin * local[..., 0] + cos * local[..., 1],
        ],
        axis=-1,
    )
