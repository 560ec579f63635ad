"""Many polygons in one array: packing, choosing and clipping without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from spanvla_ros.town.elements import GroundPolygon


@dataclass(frozen=True)
class Polygons:
    """Polygons end to end: polygon i owns the points from `start[i]` to `start[i + 1]`.

    `lit` ones keep their color in any light; `convex` ones may be filled the fast way.
    """

    points: Float64[np.ndarray, 'n 3']
    start: Int64[np.ndarray, ' p']
    colors: Float64[np.ndarray, 'p 3']
    class_ids: Int64[np.ndarray, ' p']
    convex: Bool[np.ndarray, ' p']
    lit: Bool[np.ndarray, ' p']


def pack_ground(ground: Sequence[GroundPolygon]) -> Polygons:
    """Ground polygons as one array, at height 0."""
    points = [np.asarray(polygon.points, dtype=np.float64) for polygon in ground]
    counts = np.array([len(corners) for corners in points], dtype=np.int64)
    flat = np.concatenate(points) if points else np.zeros((0, 2))
    start = np.cumsum(counts) - counts
    return Polygons(
        np.column_stack([flat, np.zeros(len(flat))]),
        start,
        np.array([polygon.color for polygon in ground], dtype=np.float64).reshape(-1, 3),
        np.array([polygon.class_id for polygon in ground], dtype=np.int64),
        _convex(flat, start),
        np.zeros(len(points), dtype=bool),
    )


def select(
    polygons: Polygons, points: Float64[np.ndarray, 'n 3'], keep: Bool[np.ndarray, ' p']
) -> Polygons:
    """The polygons of `keep`, their points taken from `points` (the same corners, elsewhere)."""
    counts = np.diff(np.append(polygons.start, len(polygons.points)))
    return _rebuilt(polygons, points[np.repeat(keep, counts)], counts[keep], keep)


def clip(polygons: Polygons, normal: tuple[float, float, float], offset: float) -> Polygons:
    """The parts where `normal . point + offset >= 0` (Sutherland and Hodgman 1974).

    A polygon that the plane cuts into several pieces stays one, its pieces joined by edges that
    run along the plane there and back.
    """
    points = polygons.points
    value = points[:, 0] * normal[0] + points[:, 1] * normal[1] + points[:, 2] * normal[2] + offset
    inside = value >= 0.0
    if inside.all():
        return polygons
    following = _following(len(points), polygons.start)
    crosses = inside != inside[following]
    change = np.where(crosses, value - value[following], 1.0)
    slots = np.empty((len(points), 2, 3))
    slots[:, 0] = points
    slots[:, 1] = points + (value / change)[:, None] * (points[following] - points)
    keep = np.stack([inside, crosses], axis=1)
    counts = np.add.reduceat(keep.sum(axis=1), polygons.start)
    whole = counts > 0
    return _rebuilt(polygons, slots.reshape(-1, 3)[keep.reshape(-1)], counts[whole], whole)


def joined(first: Polygons, second: Polygons) -> Polygons:
    """Both, one after the other."""
    return Polygons(
        np.concatenate([first.points, second.points]),
        np.concatenate([first.start, second.start + len(first.points)]),
        np.concatenate([first.colors, second.colors]),
        np.concatenate([first.class_ids, second.class_ids]),
        np.concatenate([first.convex, second.convex]),
        np.concatenate([first.lit, second.lit]),
    )


def following_corners(polygons: Polygons) -> Int64[np.ndarray, ' n']:
    """The index of the next corner round each corner's own polygon."""
    return _following(len(polygons.points), polygons.start)


def _following(count: int, start: Int64[np.ndarray, ' p']) -> Int64[np.ndarray, ' n']:
    following = np.arange(1, count + 1)
    following[np.append(start[1:], count) - 1] = start
    return following


def _rebuilt(
    polygons: Polygons, points: np.ndarray, counts: np.ndarray, keep: np.ndarray
) -> Polygons:
    return Polygons(
        points,
        np.cumsum(counts) - counts,
        polygons.colors[keep],
        polygons.class_ids[keep],
        polygons.convex[keep],
        polygons.lit[keep],
    )


def _convex(points: Float64[np.ndarray, 'n 2'], start: Int64[np.ndarray, ' p']) -> np.ndarray:
    if not len(start):
        return np.zeros(0, dtype=bool)
    following = _following(len(points), start)
    edge = points[following] - points
    turn = edge[:, 0] * edge[following, 1] - edge[:, 1] * edge[following, 0]
    left = np.minimum.reduceat(turn, start) >= -1e-9
    right = np.maximum.reduceat(turn, start) <= 1e-9
    # Corners that all turn one way can still wind round twice; the fast fill is for small ones.
    few = np.diff(np.append(start, len(points))) <= 8
    return (left | right) & few
