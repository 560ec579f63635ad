"""The lane graph of a scene: repairing the announced route, and the center line along it.

The rules are those of the official planner, whose repaired route and center line also decide
what counts as on-route and as progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import shapely
from jaxtyping import Float64

from spanvla_ros.geometry import wrap_angle
from spanvla_ros.scoring.prepared import Centerline
from spanvla_ros.types import SceneLane, SceneMap

POINT_STEP_M = 0.5

_NEAR_M = 1.0
_HEADING_RAD = np.pi / 4.0
_DISPLACEMENT_M = 3.0
_BACKWARD_DEPTH, _FORWARD_DEPTH = 15, 30
_ROUTE_DEPTH = 30
_LOOP_AREA_M2 = 1.0

Points = Float64[np.ndarray, 'n 2']


@dataclass(frozen=True)
class Path:
    """A polyline with the direction of travel at each point, by central differences."""

    points: Points
    yaw_rad: Float64[np.ndarray, 'n']

    @staticmethod
    def along(line: Points) -> Path:
        """A center line cut into equal pieces of about 0.5 m, as the official maps hold them."""
        curve = shapely.linestrings(line)
        pieces = max(1, round(curve.length / POINT_STEP_M))
        at = np.linspace(0.0, curve.length, pieces + 1)
        points = shapely.get_coordinates(shapely.line_interpolate_point(curve, at))
        step = np.gradient(points, axis=0)
        return Path(points, np.arctan2(step[:, 1], step[:, 0]))

    @staticmethod
    def joined(paths: Sequence[Path]) -> Path:
        """Paths one after the other."""
        return Path(
            np.concatenate([path.points for path in paths]),
            np.concatenate([path.yaw_rad for path in paths]),
        )

    def beside(self, left_m: float) -> Path:
        """The parallel path `left_m` to the left."""
        normal = np.stack([-np.sin(self.yaw_rad), np.cos(self.yaw_rad)], axis=-1)
        return Path(self.points + left_m * normal, self.yaw_rad)

    def nearest(self, point: Float64[np.ndarray, '2']) -> tuple[float, float]:
        """Distance to the nearest point of the path (m) and the direction there (rad)."""
        gap = np.linalg.norm(self.points - point, axis=1)
        at = int(np.argmin(gap))
        return float(gap[at]), float(self.yaw_rad[at])


class LaneGraph:
    """Roadblocks and lanes of a map by id, who follows whom, and each lane's path.

    Positions are shifted by `origin`. Successors that are not in the map are left out.
    """

    def __init__(self, road: SceneMap, origin: Float64[np.ndarray, '2']) -> None:
        """Index the map."""
        self.blocks = {block.roadblock_id: block for block in road.roadblocks}
        self.lanes = {lane.lane_id: lane for block in road.roadblocks for lane in block.lanes}
        self.block_of = {
            lane.lane_id: block.roadblock_id for block in road.roadblocks for lane in block.lanes
        }
        self.polygons = {
            name: _polygon(block.polygon - origin) for name, block in self.blocks.items()
        }
        self.lane_polygons = {
            name: _polygon(lane.polygon - origin) for name, lane in self.lanes.items()
        }
        self.paths = {
            name: Path.along(lane.centerline - origin) for name, lane in self.lanes.items()
        }
        self.length_m = {
            name: float(shapely.linestrings(lane.centerline - origin).length)
            for name, lane in self.lanes.items()
        }
        self.after: dict[str, list[str]] = {name: [] for name in self.blocks}
        self.before: dict[str, list[str]] = {name: [] for name in self.blocks}
        for lane_id, lane in self.lanes.items():
            for follower in self.followers(lane):
                here, there = self.block_of[lane_id], self.block_of[follower]
                if there != here and there not in self.after[here]:
                    self.after[here].append(there)
                    self.before[there].append(here)

    def followers(self, lane: SceneLane) -> list[str]:
        """The lanes that continue `lane`."""
        return [name for name in lane.successors if name in self.lanes]

    def lanes_of(self, route: Sequence[str]) -> dict[str, SceneLane]:
        """The lanes of a route's roadblocks, in order."""
        return {
            lane.lane_id: lane for name in dict.fromkeys(route) for lane in self.blocks[name].lanes
        }

    def repair_route(
        self, route: Sequence[str], pose: Float64[np.ndarray, '3']
    ) -> tuple[str, ...]:
        """The route from where the ego is: its start joined on, gaps filled, loops cut.

        Args:
            route: announced roadblock ids, repeats ignored.
            pose: the rear axle.
        """
        ids = list(dict.fromkeys(route))
        start, near = self._start_block(ids, pose)
        if start not in ids:
            ids = self._joined_to_route(ids, start, near)
        return tuple(self._without_loops(self._without_gaps(ids)))

    def path_along(self, route: Sequence[str], start: str) -> Path:
        """The center line from lane `start` to the end of the route (at most 30 roadblocks)."""
        ids = list(dict.fromkeys(route))
        block = self.block_of[start]
        first = ids.index(block) if block in ids else 0
        goal = ids[first : first + _ROUTE_DEPTH][-1]
        lanes = self._shortest(start, goal, set(self.lanes_of(ids)))
        return Path.joined([self.paths[lane] for lane in lanes])

    def _start_block(
        self, route: Sequence[str], pose: Float64[np.ndarray, '3']
    ) -> tuple[str, list[str]]:
        candidates = self._blocks_near(shapely.Point(pose[:2]))
        on_route: list[tuple[float, str]] = []
        off_route: list[tuple[float, str]] = []
        closest: list[float] = []
        for name in candidates:
            best = np.inf
            for lane in self.blocks[name].lanes:
                gap, yaw = self.paths[lane.lane_id].nearest(pose[:2])
                best = min(best, gap)
                aligned = abs(float(wrap_angle(yaw - pose[2]))) < _HEADING_RAD
                if aligned and gap < _DISPLACEMENT_M:
                    (on_route if name in route else off_route).append((gap, name))
            closest.append(best)
        for found in (on_route, off_route):
            if found:
                gaps = [gap for gap, _ in found]
                return found[int(np.argmin(gaps))][1], [name for _, name in found]
        return candidates[int(np.argmin(closest))], candidates

    def _blocks_near(self, point: shapely.Point) -> list[str]:
        layers: list[list[str]] = [[], []]
        for name, block in self.blocks.items():
            layers[int(block.is_connector)].append(name)
        gap = {name: float(shapely.distance(self.polygons[name], point)) for name in self.blocks}
        near = [name for layer in layers for name in layer if gap[name] <= _NEAR_M]
        return near or [min(layer, key=gap.__getitem__) for layer in layers if layer]

    def _joined_to_route(self, ids: list[str], start: str, near: list[str]) -> list[str]:
        backward = self._search(ids[0], near, _BACKWARD_DEPTH, self.before)
        if backward is not None:
            return backward[::-1][:-1] + ids
        forward = self._search(start, ids[:3], _FORWARD_DEPTH, self.after)
        if forward is not None:
            return forward + ids[ids.index(forward[-1]) + 1 :]
        return ids

    def _without_gaps(self, ids: list[str]) -> list[str]:
        filled = ids[:1]
        for here, there in pairwise(ids):
            if here not in self.before[there]:
                link = self._search(here, [there], _FORWARD_DEPTH, self.after)
                if link is not None and len(link) >= 3:
                    filled += link[1:-1]
            filled.append(there)
        return filled

    def _without_loops(self, ids: list[str]) -> list[str]:
        crossed: list[shapely.Polygon] = []
        for at, name in enumerate(ids):
            if not self.blocks[name].is_connector:
                continue
            polygon = self.polygons[name]
            if any(shapely.intersection(polygon, old).area > _LOOP_AREA_M2 for old in crossed):
                return ids[:at]
            crossed.append(polygon)
        return ids

    def _search(
        self, start: str, goals: Sequence[str], depth: int, graph: dict[str, list[str]]
    ) -> list[str] | None:
        """Breadth-first: blocks from `start` to the first goal met, at most `depth` long."""
        queue = deque([start])
        parent: dict[str, str | None] = {start: None}
        level = {start: 1}
        while queue:
            here = queue.popleft()
            if level[here] > depth:
                return None
            if here in goals:
                path = [here]
                while (before := parent[path[-1]]) is not None:
                    path.append(before)
                return path[::-1]
            for there in graph[here]:
                if there not in parent:
                    parent[there], level[there] = here, level[here] + 1
                    queue.append(there)
                elif level[there] == level[here] + 1:
                    # Of several ways of one length the official search keeps the last found.
                    parent[there] = here
        return None

    def _shortest(self, start: str, goal_block: str, allowed: set[str]) -> list[str]:
        """Dijkstra over lanes; where the goal cannot be reached, the path to the deepest lane."""
        parent: dict[str, str | None] = {start: None}
        frontier: dict[str, tuple[float, int]] = {start: (1.0, 1)}
        done: dict[str, tuple[float, int]] = {}
        end = None
        while frontier and end is None:
            here = min(frontier, key=lambda name: frontier[name][0])
            cost, depth = frontier.pop(here)
            if self.block_of[here] == goal_block:
                end = here
                break
            done[here] = (cost, depth)
            for there in self.followers(self.lanes[here]):
                if there not in allowed or there in done:
                    continue
                total = cost + self.length_m[there]
                if there not in frontier or total < frontier[there][0]:
                    parent[there] = here
                    frontier[there] = (total, depth + 1)
        if end is None:
            end = min(done, key=lambda name: (-done[name][1], done[name][0]))
        path = [end]
        while (before := parent[path[-1]]) is not None:
            path.append(before)
        return path[::-1]


def centerline_of(path: Path) -> Centerline:
    """A path as the line along which progress is measured."""
    return Centerline.build(path.points)


def _polygon(ring: Points) -> shapely.Polygon:
    polygon = shapely.polygons(ring)
    return polygon if polygon.is_valid else shapely.buffer(polygon, 0.0)
