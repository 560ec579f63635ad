"""NAVSIM's metric cache: what the official scorer knows of a scene besides the log.

Read are the drivable map (polygons by layer), the center line of the route, the lanes on it and
PDM-Closed's trajectory. A cache holds no lane graph: the lanes along the center line get their
piece of it and follow one another; the others get the long axis of their polygon, which says
nothing of their direction. Scores need neither, as the reference is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from jaxtyping import Float64

from spanvla_ros.geometry import interpolate_poses
from spanvla_ros.scoring.reference import Reference
from spanvla_ros.training.navsim.pickles import Bag, read_pickle
from spanvla_ros.types import SceneLane, SceneMap, SceneRoadblock, SpanvlaError

# `SemanticMapLayer` of nuPlan.
_LANE, _INTERSECTION, _CONNECTOR, _CARPARK, _ROADBLOCK = 0, 1, 11, 15, 17
_PLAN_TIMES_S = np.arange(41) * 0.1
_LEAST_PIECE_M = 0.5


@dataclass(frozen=True)
class CachedScene:
    """Map, route and reference of one metric cache; all in the world."""

    token: str
    map: SceneMap
    route: tuple[str, ...]
    reference: Reference


def read_cache(path: Path) -> CachedScene:
    """One `metric_cache.pkl`; its folder is named by the token of the scene.

    Raises:
        SpanvlaError: the file is no metric cache, naming what is missing.
    """
    raw = read_pickle(path)
    try:
        if not isinstance(raw, Bag) or type(raw).__name__ != 'MetricCache':
            raise SpanvlaError('holds no MetricCache')
        line = np.array([_pose(state) for state in raw['centerline'].argument(0)])[:, :2]
        lanes = tuple(str(name) for name in raw['route_lane_ids'])
        road, route = _map(list(_areas(raw['drivable_area_map'])), line)
        plan = _plan(raw['trajectory'])
    except SpanvlaError as error:
        raise SpanvlaError(f'{path}: {error}; make it anew with NAVSIM') from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SpanvlaError(f'{path}: is not as NAVSIM lays it out ({error!s:.120})') from error
    return CachedScene(path.parent.name, road, route, Reference(line, lanes, plan))


def _areas(drivable: Bag) -> Iterator[tuple[str, int, Float64[np.ndarray, 'n 2']]]:
    names, layers, shapes = (drivable.argument(number) for number in range(3))
    for name, layer, shape in zip(names, layers, shapes, strict=True):
        parts = shape.geoms if hasattr(shape, 'geoms') else (shape,)
        largest = max(parts, key=lambda part: part.area)
        ring = shapely.get_coordinates(largest.exterior)[:-1]
        yield str(name), int(layer.argument(0)), ring


def _map(
    areas: list[tuple[str, int, Float64[np.ndarray, 'n 2']]], line: Float64[np.ndarray, 'n 2']
) -> tuple[SceneMap, tuple[str, ...]]:
    """The map, and the roadblocks along the center line in order."""
    lanes = {
        name: SceneLane(name, _long_axis(ring), ring, None, ())
        for name, layer, ring in areas
        if layer in (_LANE, _CONNECTOR)
    }
    order = _lanes_along(lanes, line)
    for number, (name, piece) in enumerate(order):
        onward = (order[number + 1][0],) if number + 1 < len(order) else ()
        lanes[name] = replace(lanes[name], centerline=piece, successors=onward)
    inside = {
        name: shapely.Polygon(lane.polygon).representative_point() for name, lane in lanes.items()
    }
    blocks, block_of = [], {}
    for name, layer, ring in areas:
        if layer == _ROADBLOCK:
            shape = shapely.Polygon(ring)
            own = [lane for lane, point in inside.items()
                   if lane not in block_of and shape.covers(point)]  # fmt: skip
            block_of.update(dict.fromkeys(own, name))
            if own:
                blocks.append(
                    SceneRoadblock(name, is_connector=False, polygon=ring,
                                   lanes=tuple(lanes[lane] for lane in own))
                )  # fmt: skip
    for name, layer, ring in areas:
        # A connector's roadblock is not in the cache: each lane through a junction is its own.
        if name in lanes and name not in block_of and layer in (_LANE, _CONNECTOR):
            block_of[name] = f'way_{name}'
            blocks.append(
                SceneRoadblock(f'way_{name}', is_connector=layer == _CONNECTOR, polygon=ring,
                               lanes=(lanes[name],))
            )  # fmt: skip
    road = SceneMap(
        tuple(blocks),
        tuple(ring for _, layer, ring in areas if layer == _INTERSECTION),
        tuple(ring for _, layer, ring in areas if layer == _CARPARK),
    )
    route = tuple(dict.fromkeys(block_of[name] for name, _ in order))
    if not route:
        raise SpanvlaError('no lane of the map lies along the centre line')
    return road, route


def _lanes_along(
    lanes: dict[str, SceneLane], line: Float64[np.ndarray, 'n 2']
) -> list[tuple[str, Float64[np.ndarray, 'm 2']]]:
    """The lanes that the line runs through, each with its piece, cut where it leaves them."""
    curve = shapely.linestrings(line)
    found = []
    for name, lane in lanes.items():
        piece = shapely.intersection(curve, shapely.buffer(shapely.Polygon(lane.polygon), 0.0))
        parts = [part for part in getattr(piece, 'geoms', (piece,)) if part.length > 0.0]
        if not parts:
            continue
        longest = max(parts, key=lambda part: part.length)
        covered = longest.length / max(shapely.Polygon(lane.polygon).length / 2.0, 1e-6)
        if longest.length > _LEAST_PIECE_M:
            start = shapely.line_locate_point(curve, shapely.Point(longest.coords[0]))
            points = np.array(longest.coords)
            end = shapely.line_locate_point(curve, shapely.Point(longest.coords[-1]))
            if end < start:
                points, start = points[::-1], end
            found.append((float(start), float(longest.length), covered, name, points))
    # Lanes of one junction overlap: at each place the one that the line fills best.
    kept: list[tuple[str, Float64[np.ndarray, 'm 2']]] = []
    at = -math.inf
    for start, length, covered, name, points in sorted(found, key=lambda one: (one[0], -one[1])):
        rivals = [o for o in found if o[3] != name and o[0] - 1.0 < start + length / 2
                  < o[0] + o[1] + 1.0 and o[2] > covered]  # fmt: skip
        if not rivals and start + length > at + _LEAST_PIECE_M:
            kept.append((name, points))
            at = start + length
    return kept


def _long_axis(ring: Float64[np.ndarray, 'n 2']) -> Float64[np.ndarray, '2 2']:
    box = shapely.get_coordinates(shapely.oriented_envelope(shapely.Polygon(ring)))
    sides = np.linalg.norm(np.diff(box[:3], axis=0), axis=1)
    first = int(np.argmin(sides))
    return np.stack([box[first : first + 2].mean(0), box[first + 2 : first + 4].mean(0)])


def _pose(state: Bag) -> tuple[float, float, float]:
    return float(state['x']), float(state['y']), float(state['heading'])


def _plan(trajectory: Bag) -> Float64[np.ndarray, '41 3']:
    """PDM-Closed's rear-axle poses each 0.1 s over 4 s."""
    states = trajectory.argument(0)
    times_s = np.array([int(state['_time_point']['time_us']) for state in states]) * 1e-6
    poses = np.array([_rear_axle(state['_car_footprint']) for state in states])
    times_s = times_s - times_s[0]
    if times_s[-1] < _PLAN_TIMES_S[-1] - 0.05:
        raise SpanvlaError(f'a trajectory of {times_s[-1]:.1f} s')
    return interpolate_poses(times_s, poses, np.minimum(_PLAN_TIMES_S, times_s[-1]))


def _rear_axle(footprint: Bag) -> tuple[float, float, float]:
    x, y, yaw = _pose(footprint['_center'])
    car: Any = footprint['_vehicle_parameters']
    front_m, rear_m = float(car.argument(1)), float(car.argument(2))
    back_m = 0.5 * (front_m + rear_m) - rear_m
    return x - back_m * math.cos(yaw), y - back_m * math.sin(yaw), yaw
