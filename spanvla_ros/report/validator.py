"""A second opinion on published trajectories, written apart from the safety kernel.

Slow and plain: it looks at every point of every trajectory through finite differences of the
poses alone. Its bounds are the vehicle's own with a little room for rounding.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from spanvla_ros.report.recording import OutputRecord, Recording
from spanvla_ros.types import Vehicle

MIN_HORIZON_S = 3.0
START_M = 0.3
START_YAW_RAD = 0.1
JUMP_AHEAD_S = 0.5
JUMP_M = 1.5
CORRIDOR_M = 8.0
CORRIDOR_LOOK_S = 3.0


def faults_of(
    output: OutputRecord, previous: OutputRecord | None, recording: Recording, vehicle: Vehicle
) -> list[str]:
    """Everything that is wrong with one published trajectory, in short words; empty if valid."""
    times_s, poses = output.times_s, output.poses
    if len(times_s) < 2 or not (np.isfinite(times_s).all() and np.isfinite(poses).all()):
        return ['not_finite' if len(times_s) >= 2 else 'empty']
    if times_s[0] < 0.0 or not all(b > a for a, b in pairwise(times_s)):
        return ['times']
    faults = []
    if times_s[-1] < MIN_HORIZON_S:
        faults.append('horizon')
    if not output.frame_id:
        faults.append('frame')
    if output.tilt > 1e-3:
        faults.append('quaternion')
    return (
        faults
        + _start_faults(output, recording)
        + _motion_faults(output, vehicle)
        + _jump_faults(output, previous)
        + _corridor_faults(output, recording.route)
    )


def _start_faults(output: OutputRecord, recording: Recording) -> list[str]:
    stamps = recording.odometry_stamps_ns
    if not len(stamps):
        return ['no_odometry']
    # Integer nanoseconds are too long for a double; seconds since the first one are not.
    clock_s = (stamps - stamps[0]) * 1e-9
    at_s = (output.stamp_ns - int(stamps[0])) * 1e-9 + output.times_s[0]
    if not clock_s[0] - 0.1 <= at_s <= clock_s[-1] + 0.1:
        return ['stamp']
    order = np.argsort(clock_s, kind='stable')
    yaw = np.unwrap(recording.odometry[order, 2])
    x, y, turn = (
        float(np.interp(at_s, clock_s[order], column))
        for column in (recording.odometry[order, 0], recording.odometry[order, 1], yaw)
    )
    faults = []
    if math.hypot(output.poses[0, 0] - x, output.poses[0, 1] - y) > START_M:
        faults.append('start_position')
    if abs(math.remainder(output.poses[0, 2] - turn, math.tau)) > START_YAW_RAD:
        faults.append('start_heading')
    return faults


def _motion_faults(output: OutputRecord, vehicle: Vehicle) -> list[str]:
    faults = set()
    tightest_1pm = math.tan(vehicle.max_steering_rad) / vehicle.wheelbase_m
    speeds, middles = [], []
    for index in range(len(output.times_s) - 1):
        (x0, y0, yaw0), (x1, y1, yaw1) = output.poses[index], output.poses[index + 1]
        span_s = float(output.times_s[index + 1] - output.times_s[index])
        turn = math.remainder(yaw1 - yaw0, math.tau)
        heading = yaw0 + 0.5 * turn
        forward = (x1 - x0) * math.cos(heading) + (y1 - y0) * math.sin(heading)
        sideways = (y1 - y0) * math.cos(heading) - (x1 - x0) * math.sin(heading)
        speeds.append(forward / span_s)
        middles.append(output.times_s[index] + 0.5 * span_s)
        if forward < -0.01:
            faults.add('reversal')
        if abs(sideways) > 0.02 + 0.1 * abs(forward):
            faults.add('sideways')
        if abs(turn) > 1.1 * tightest_1pm * abs(forward) + 0.005:
            faults.add('curvature')
        if abs(turn * forward) / span_s**2 > 1.1 * vehicle.max_lateral_accel_mps2 + 0.2:
            faults.add('lateral_acceleration')
        if output.speeds_mps is not None:
            told = 0.5 * (output.speeds_mps[index] + output.speeds_mps[index + 1])
            if not abs(told - forward / span_s) <= 0.4:
                faults.add('velocity')
    if max(speeds) > vehicle.max_speed_mps + 0.5 and max(speeds) > speeds[0] + 0.1:
        faults.add('speed')
    for index in range(len(speeds) - 1):
        accel = (speeds[index + 1] - speeds[index]) / (middles[index + 1] - middles[index])
        if not -vehicle.max_decel_mps2 - 0.5 <= accel <= vehicle.max_accel_mps2 + 0.5:
            faults.add('acceleration')
    return sorted(faults)


def _jump_faults(output: OutputRecord, previous: OutputRecord | None) -> list[str]:
    if previous is None or len(previous.times_s) < 2:
        return []
    later_s = (output.stamp_ns - previous.stamp_ns) * 1e-9
    if not 0.0 <= later_s <= 1.0:
        return []
    here = _place(output, JUMP_AHEAD_S)
    there = _place(previous, JUMP_AHEAD_S + later_s)
    return ['jump'] if math.dist(here, there) > JUMP_M else []


def _place(output: OutputRecord, at_s: float) -> tuple[float, float]:
    x = np.interp(at_s, output.times_s, output.poses[:, 0])
    y = np.interp(at_s, output.times_s, output.poses[:, 1])
    return float(x), float(y)


def _corridor_faults(output: OutputRecord, route: Float64[np.ndarray, 'r 2'] | None) -> list[str]:
    if route is None or distance_to_line(output.poses[0, :2], route) > CORRIDOR_M:
        return []
    look = [
        pose[:2]
        for time_s, pose in zip(output.times_s, output.poses, strict=True)
        if time_s <= CORRIDOR_LOOK_S
    ]
    off = max(distance_to_line(point, route) for point in look[::5] or look)
    return ['corridor'] if off > CORRIDOR_M else []


def distance_to_line(point: Float64[np.ndarray, '2'], line: Float64[np.ndarray, 'n 2']) -> float:
    """Distance from a point to a polyline, in meters."""
    start, step = line[:-1], np.diff(line, axis=0)
    square = np.maximum((step**2).sum(axis=1), 1e-12)
    share = np.clip(((point - start) * step).sum(axis=1) / square, 0.0, 1.0)
    gap = start + share[:, None] * step - point
    return float(np.sqrt((gap**2).sum(axis=1).min()))


def inside(point: Float64[np.ndarray, '2'], ring: Float64[np.ndarray, 'n 2']) -> bool:
    """Whether a point lies in a polygon, by counting crossings of a ray."""
    x, y = point
    ax, ay = ring[:, 0], ring[:, 1]
    bx, by = np.roll(ax, -1), np.roll(ay, -1)
    spans = (ay > y) != (by > y)
    height = np.where(spans, by - ay, 1.0)
    return bool(np.count_nonzero(spans & (x < ax + (y - ay) * (bx - ax) / height)) % 2)


def boxes_overlap(first: Float64[np.ndarray, '4 2'], second: Float64[np.ndarray, '4 2']) -> bool:
    """Whether two rectangles, given by their corners in order, share more than a touch."""
    for corners in (first, second):
        for index in range(2):
            axis = corners[index + 1] - corners[index]
            one, other = first @ axis, second @ axis
            if one.max() <= other.min() or other.max() <= one.min():
                return False
    return True
