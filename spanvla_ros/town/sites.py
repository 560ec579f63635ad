"""Where things fit beside a corridor: ways out of a junction, free ground for houses."""

from __future__ import annotations

import math

import numpy as np

from spanvla_ros.geometry import local_from_world
from spanvla_ros.town.roads import LANE_WIDTH_M, SPACING_M, Arm, Corridor, Junction


def leaving_path(corridor: Corridor, junction: Junction) -> tuple[tuple[float, float, float], ...]:
    """A way from the ego's lane into an arm the ego does not take, each meter a pose."""
    start = corridor.place(junction.start_m, 0.0)
    arm = _arm_to_leave_by(junction, start)
    if arm is None:
        return ()
    d = -(arm.lanes_out - 0.5) * LANE_WIDTH_M
    ex = arm.pose[0] + 2.0 * math.cos(arm.pose[2]) - math.sin(arm.pose[2]) * d
    ey = arm.pose[1] + 2.0 * math.sin(arm.pose[2]) + math.cos(arm.pose[2]) * d
    reach = math.hypot(ex - start[0], ey - start[1])
    t = np.linspace(0.0, 1.0, max(3, int(reach * 1.15)), endpoint=False)
    pull = 1.2 * reach
    a, b = np.array(start[:2]), np.array([ex, ey])
    u = pull * np.array([math.cos(start[2]), math.sin(start[2])])
    v = pull * np.array([math.cos(arm.pose[2]), math.sin(arm.pose[2])])
    t = t[:, None]
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * a + (t**3 - 2 * t**2 + t) * u
        + (3 * t**2 - 2 * t**3) * b + (t**3 - t**2) * v
    )  # fmt: skip
    along = np.arange(0.0, arm.length_m - 6.0)[:, None]
    line = np.concatenate([curve, b + along * (v / pull)])
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    metres = np.arange(0.0, length[-1])
    x, y = np.interp(metres, length, line[:, 0]), np.interp(metres, length, line[:, 1])
    yaw = np.unwrap(np.arctan2(np.gradient(y), np.gradient(x)))
    yaw += 2 * math.pi * round((start[2] - yaw[0]) / (2 * math.pi))
    return tuple(zip(x.tolist(), y.tolist(), yaw.tolist(), strict=True))


def _arm_to_leave_by(junction: Junction, start: tuple[float, float, float]) -> Arm | None:
    """The straight arm where the ego turns, the right one where it goes straight."""
    wanted = -math.pi / 2 if junction.turn == 'straight' else 0.0
    for arm in junction.arms:
        turn = (arm.pose[2] - start[2] + math.pi) % (2 * math.pi) - math.pi
        if abs(turn - wanted) < 0.1 and arm.lanes_out > 0 and arm.length_m > 20.0:
            return arm
    return None


def is_free(
    corridor: Corridor, pose: tuple[float, float, float], size: tuple[float, float, float]
) -> bool:
    """Whether a house here stands clear of every road."""
    half_x, half_y = size[0] / 2 + 1.5, size[1] / 2 + 1.5
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    spots = (
        np.array([(i * half_x, j * half_y) for i in (-1, 0, 1) for j in (-1, 0, 1)])
        @ np.array([[cos, sin], [-sin, cos]])
        + pose[:2]
    )
    gap = np.hypot(spots[:, :1] - corridor.x_m[::4], spots[:, 1:] - corridor.y_m[::4])
    nearest = gap.argmin(axis=1) * 4
    yaw = corridor.yaw_rad[nearest]
    left = (spots[:, 1] - corridor.y_m[nearest]) * np.cos(yaw) - (
        spots[:, 0] - corridor.x_m[nearest]
    ) * np.sin(yaw)
    for d, index in zip(left.tolist(), nearest.tolist(), strict=True):
        section = corridor.section_at(index * SPACING_M)
        if section.right_m - 1.0 < d < section.left_m + 1.0:
            return False
    for junction in corridor.junctions:
        reach = 14.0 if junction.ring is None else junction.ring.radius_m + 8.0
        if np.hypot(*(junction.area.mean(axis=0) - pose[:2])) < reach + half_x:
            return False
        for arm in junction.arms:
            local = local_from_world(arm.pose, spots)
            low, high = arm.edges_m
            if (
                (local[:, 0] > -3.0) & (local[:, 0] < arm.length_m + 3.0)
                & (local[:, 1] > low - 1.5) & (local[:, 1] < high + 1.5)
            ).any():  # fmt: skip
                return False
    return True
