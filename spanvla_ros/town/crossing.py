"""Giving way: where the line to drive crosses, or joins, the lane of those who go first.

Times are estimates as a driver makes them: the others keep their wished speed, the ego starts
gently and turns slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spanvla_ros.geometry import local_from_world
from spanvla_ros.town.road_users import FRONT_M, Car
from spanvla_ros.town.roads import LANE_WIDTH_M, SPACING_M, Corridor

REAR_M = 1.2
HALF_M = 2.3
TURN_MPS = 5.0
START_MPS2 = 1.3
AFTER_S = 1.0
BEFORE_S = 0.5
JOIN_OUT_M = 2.2


@dataclass(frozen=True)
class Crossing:
    """The ego's bumper enters the other lane at base_link place `in_m` and leaves it at `out_m`.

    `low_m` and `high_m`: the part of the other lane that it covers, in meters beyond `start_m`
    straight on; for a ring they are nothing, one who comes by it is there where it joins.
    """

    start_m: float
    in_m: float
    out_m: float
    low_m: float
    high_m: float

    def must_yield(self, cars: list[Car], ego_s_m: float, ego_mps: float) -> bool:
        """Whether one who comes straight on would be there before the ego is through."""
        if ego_s_m > self.in_m:
            return False
        enters_s = _time_s(self.in_m - ego_s_m, ego_mps)
        leaves_s = _time_s(self.out_m - ego_s_m, ego_mps)
        for car in cars:
            if not car.goes_first:
                continue
            half = car.size[0] / 2
            if car.ahead:
                arrives_m, clears_m = car.joins_m - car.s_m - half, car.joins_m - car.s_m + half
            else:
                place = car.s_m - self.start_m
                arrives_m, clears_m = place - half - self.high_m, place + half - self.low_m
            if clears_m < 0.0:
                continue
            arrives_s = arrives_m / max(car.speed_mps, car.desired_mps, 1.0)
            # As slow as it is now it may take longer to get out of the way.
            clears_s = clears_m / max(car.speed_mps, 2.0)
            if arrives_s < leaves_s + AFTER_S and enters_s < clears_s + BEFORE_S:
                return True
        return False


def crossing_of(corridor: Corridor, junction: int, lane: int = 0) -> Crossing:
    """Where the corridor's left turn crosses opposing lane number `lane` of the road before it."""
    at = corridor.junctions[junction]
    section = corridor.section_at(at.start_m - 0.1)
    entry = corridor.place(at.start_m, 0.0)
    first = int(at.start_m / SPACING_M)
    places = slice(first, int((at.end_m + 12.0) / SPACING_M))
    line = local_from_world(entry, np.stack([corridor.x_m, corridor.y_m], axis=1)[places])
    s = corridor.s_m[places]
    middle = section.divider_m + (lane + 0.5) * LANE_WIDTH_M
    enters = float(s[np.argmax(line[:, 1] > middle - HALF_M)])
    leaves = float(s[np.argmax(line[:, 1] > middle + HALF_M)])
    covered = line[(s >= enters) & (s <= leaves), 0]
    return Crossing(
        at.start_m,
        enters - FRONT_M,
        leaves + REAR_M,
        float(covered.min()) - 1.6,
        float(covered.max()) + 1.6,
    )


def joining_of(corridor: Corridor, junction: int) -> Crossing:
    """Where the corridor comes onto the ring of a roundabout."""
    at = corridor.junctions[junction]
    assert at.ring is not None
    first = int(at.start_m / SPACING_M)
    gap = np.hypot(corridor.x_m[first:] - at.ring.x_m, corridor.y_m[first:] - at.ring.y_m)
    enters = float(corridor.s_m[first + np.argmax(gap < at.ring.radius_m + JOIN_OUT_M)])
    return Crossing(at.start_m, enters - FRONT_M, at.ring.joins_m, 0.0, 0.0)


def _time_s(way_m: float, speed_mps: float) -> float:
    """Time for a way, first at the present speed changed towards that of a turn."""
    way_m = max(way_m, 0.0)
    if speed_mps >= TURN_MPS:
        return way_m / TURN_MPS if way_m < 15.0 else 15.0 / TURN_MPS + (way_m - 15.0) / speed_mps
    start_s = (TURN_MPS - speed_mps) / START_MPS2
    start_m = 0.5 * (TURN_MPS + speed_mps) * start_s
    if way_m < start_m:
        return (math.sqrt(speed_mps**2 + 2 * START_MPS2 * way_m) - speed_mps) / START_MPS2
    return start_s + (way_m - start_m) / TURN_MPS
