"""All of a world that never changes: the road, what stands on it, and the line to drive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from spanvla_ros.town.crossing import Crossing
from spanvla_ros.town.elements import Box, GroundPolygon, Tint
from spanvla_ros.town.lane_map import build_map
from spanvla_ros.town.roads import Corridor
from spanvla_ros.types import SceneMap


@dataclass(frozen=True)
class Shift:
    """The line to drive moves `by_m` to the left over `ramp_m` from `start_m`, and stays there."""

    start_m: float
    ramp_m: float
    by_m: float

    def at(self, s_m: float) -> tuple[float, float]:
        """Offset and slope at a place of the corridor."""
        part = min(max((s_m - self.start_m) / self.ramp_m, 0.0), 1.0)
        offset = self.by_m * part * part * part * (10.0 + part * (6.0 * part - 15.0))
        return offset, self.by_m * 30.0 * (part * (1.0 - part)) ** 2 / self.ramp_m


@dataclass(frozen=True)
class Obstruction:
    """Something that stands on the road and is none of the houses: a cone, a barrier.

    `kind` is one of `scoring.scene.STATIC_KINDS`, `pose` that of the box center.
    """

    name: str
    kind: str
    s_m: float
    pose: tuple[float, float, float]
    length_m: float
    width_m: float
    height_m: float


@dataclass(frozen=True)
class Surroundings:
    """All of a world that never changes.

    `shifts`: where the line to drive leaves the corridor's own, around what blocks it or into
    another lane. `crossing`: where it has to give way. `cleared`: the same
    without its obstructions, where those are the hazard.
    """

    corridor: Corridor
    ground: tuple[GroundPolygon, ...]
    houses: tuple[Box, ...]
    tint: Tint
    route_points: Float64[np.ndarray, 'n 2']
    limits_mps: tuple[float, ...]
    speed_limit_mps: float
    start_m: float
    goal_m: float
    time_limit_s: float
    family: str
    seed: int
    shifts: tuple[Shift, ...] = ()
    obstructions: tuple[Obstruction, ...] = ()
    crossing: Crossing | None = None
    cleared: Surroundings | None = None

    @cached_property
    def mirrored_ground(self) -> tuple[GroundPolygon, ...]:
        """The ground in a mirror."""
        return tuple(replace(g, points=g.points * [1.0, -1.0]) for g in self.ground)

    @cached_property
    def scene_map(self) -> SceneMap:
        """The lane map, unmirrored."""
        return build_map(self.corridor, self.speed_limit_mps)

    def line_at(self, s_m: float) -> tuple[float, float]:
        """Offset and slope of the line to drive against the corridor's own."""
        offset = slope = 0.0
        for shift in self.shifts:
            more = shift.at(s_m)
            offset, slope = offset + more[0], slope + more[1]
        return offset, slope
