"""How fast the line to drive may be driven."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spanvla_ros.town.ranges import Ranges
from spanvla_ros.town.roads import SPACING_M, Corridor
from spanvla_ros.town.surroundings import Shift


def speed_limits(
    corridor: Corridor,
    ranges: Ranges,
    shifts: Sequence[Shift] = (),
    slow_zones: Sequence[tuple[float, float, float]] = (),
) -> np.ndarray:
    """Speed along the ego lane: town limit, lateral acceleration, braking in time, end of road."""
    curvature = corridor.curvature_per_m
    if shifts:
        slope = [sum(shift.at(s)[1] for shift in shifts) for s in corridor.s_m.tolist()]
        curvature = curvature + np.gradient(np.array(slope), SPACING_M)
    bend = np.maximum(np.abs(curvature), 1e-4)
    limit = np.minimum(np.sqrt(ranges.lateral_accel_mps2 / bend), ranges.speed_limit_mps)
    for start_m, end_m, speed_mps in slow_zones:
        zone = slice(int(start_m / SPACING_M), int(end_m / SPACING_M) + 1)
        limit[zone] = np.minimum(limit[zone], speed_mps)
    limit[-int(6.0 / SPACING_M) :] = 0.0
    slow = limit.tolist()
    for index in range(len(slow) - 2, -1, -1):
        slow[index] = min(slow[index], math.sqrt(slow[index + 1] ** 2 + 2 * 1.5 * SPACING_M))
    return np.array(slow)
