"""Does the odometry agree with itself, and with the announced path?

The path of the positions is taken for true: its speed and course are compared with yaw, twist and
yaw rate. That finds wrong units, signs and frames. A frame that is left-handed as a whole agrees
with itself; that one is found by the pictures (`spanvla_ros/doctor/cameras.py`) and by the route.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from spanvla_ros.doctor.findings import Finding, found
from spanvla_ros.doctor.rig import Rig
from spanvla_ros.geometry import project_on_polyline, wrap_angle

GRID_S = 0.1
MOVING_MPS = 1.5
TURNING_RADPS = 0.08
TURNED_RAD = 0.2
SMOOTHING = 5
YAW_NEAR_RAD = 0.05
FEWEST = 8
DEGREES = 180.0 / math.pi
JUMP_M = 1.5
Values = Float64[np.ndarray, ' n']


@dataclass(frozen=True)
class Motion:
    """Odometry on an even grid, its path, and where that moves.

    `heading_rad` is the yaw where it follows the path, else the smoothed course.
    """

    time_s: Values
    x_m: Values
    y_m: Values
    yaw_rad: Values
    twist: Float64[np.ndarray, 'n 3']
    speed_mps: Values
    course_rad: Values
    course_rate: Values
    heading_rad: Values
    moving: Bool[np.ndarray, ' n']

    def pose_at(self, time_s: float) -> Float64[np.ndarray, '3']:
        """Position and heading at a time."""
        return np.array(
            [np.interp(time_s, self.time_s, v) for v in (self.x_m, self.y_m, self.heading_rad)]
        )

    def moves_at(self, time_s: float) -> bool:
        """Whether the vehicle moved at a time, so that its course is known."""
        if not self.time_s[0] <= time_s <= self.time_s[-1]:
            return False
        return bool(np.interp(time_s, self.time_s, self.moving) > 0.99)


def motion_of(rig: Rig) -> Motion | None:
    """The motion of a rig, None where there are too few poses."""
    table = rig.odometry
    if len(table) < FEWEST or table[-1, 0] - table[0, 0] < FEWEST * GRID_S:
        return None
    time_s = np.arange(table[0, 0], table[-1, 0], GRID_S)
    x, y = (np.interp(time_s, table[:, 0], table[:, k]) for k in (1, 2))
    # The nearest yaw: wrapped or scaled yaws must not be blended.
    nearest = np.abs(table[:, 0][None, :] - time_s[:, None]).argmin(axis=1)
    twist = np.stack([np.interp(time_s, table[:, 0], table[:, k]) for k in (5, 6, 7)], axis=1)
    dx, dy = np.gradient(x, GRID_S), np.gradient(y, GRID_S)
    speed = np.hypot(dx, dy)
    moving = speed > MOVING_MPS
    course = np.arctan2(dy, dx)
    if moving.any():
        # While standing the course is that of the last motion.
        held = np.maximum.accumulate(np.where(moving, np.arange(len(moving)), 0))
        course = course[np.maximum(held, int(np.argmax(moving)))]
    course = smoothed(np.unwrap(course))
    yaw = np.interp(time_s, table[:, 0], np.unwrap(table[:, 3]))
    follows = moving.any() and np.median(np.abs(wrap_angle(course - yaw)[moving])) < YAW_NEAR_RAD
    return Motion(
        time_s, x, y, table[nearest, 3], twist, speed, course,
        np.gradient(course, GRID_S), yaw if follows else course, moving,
    )  # fmt: skip


def smoothed(values: Values) -> Values:
    """The mean over half a second: a centimeter in a position is a lot of course."""
    half = SMOOTHING // 2
    # Straight on at both ends, so that a steady turn stays one.
    before = 2.0 * values[0] - values[half:0:-1]
    after = 2.0 * values[-1] - values[-2 : -half - 2 : -1]
    padded = np.concatenate([before, values, after])
    return np.convolve(padded, np.full(SMOOTHING, 1.0 / SMOOTHING), 'valid')


def check_odometry(rig: Rig) -> list[Finding]:
    """Everything the odometry says about itself."""
    if not rig.odometry_topic:
        return []
    name = rig.odometry_topic
    table = rig.odometry
    findings = list(_jumps(table, name))
    if len(table) and np.median(np.abs(table[:, 4])) > math.radians(150.0):
        findings.append(found('frame_z_down', f'{name}: the orientation is rolled by 180 degrees'))
    motion = motion_of(rig)
    if motion is None or motion.moving.sum() < FEWEST:
        still = 'no motion to check odometry and cameras against; record while driving a bend'
        findings.append(found('no_motion', f'{name}: {still}'))
        if motion is not None and np.median(np.abs(motion.twist[:, 0])) > MOVING_MPS:
            seen = f'{name}: the twist moves, the pose does not'
            findings.append(found('twist_disagrees', seen))
        return findings
    yaw = list(_yaw(motion, name))
    findings += yaw
    findings += _speed(motion, name)
    findings += _yaw_rate(motion, name)
    return findings


def _jumps(table: Float64[np.ndarray, 'n 8'], name: str) -> Iterator[Finding]:
    if len(table) < 2:
        return
    step_s = np.diff(table[:, 0])
    moved = np.hypot(np.diff(table[:, 1]), np.diff(table[:, 2]))
    fastest = max(float(np.percentile(moved / np.maximum(step_s, 1e-3), 90)), 1.0)
    jumps = moved > 2.0 * fastest * step_s + JUMP_M
    if jumps.any():
        yield found('odometry_jumps', f'{name}: {int(jumps.sum())} leaps of up to '
                    f'{moved[jumps].max():.1f} m')  # fmt: skip


def spread(angles: Values) -> float:
    """How far angles scatter on the circle: 0 all equal, 1 everywhere."""
    return 1.0 - float(np.abs(np.exp(1j * angles).mean()))


def _yaw(motion: Motion, name: str) -> Iterator[Finding]:
    yaw, course = motion.yaw_rad[motion.moving], motion.course_rad[motion.moving]
    off = wrap_angle(course - yaw)
    scatter = spread(off)
    if scatter > 0.005:
        if spread(yaw - DEGREES * course) < 0.3 * scatter and np.ptp(course) < math.tau:
            yield found('odometry_degrees', f'{name}: the yaw follows the path as degrees would')
            return
        if spread(course + yaw) < 0.2 * scatter:
            yield found('yaw_sign', f'{name}: the yaw turns against the path')
            return
        if scatter > 0.15:
            yield found('yaw_unrelated', f'{name}: yaw and path do not turn together')
            return
    mean = float(np.angle(np.exp(1j * off).mean()))
    backwards = np.median(motion.twist[motion.moving, 0]) < 0.0
    if abs(mean) > math.radians(20.0) and not (backwards and abs(mean) > math.radians(160.0)):
        yield found(
            'yaw_offset', f'{name}: the path runs {math.degrees(mean):.0f} degrees beside the yaw'
        )


def _speed(motion: Motion, name: str) -> Iterator[Finding]:
    forward, left, _ = motion.twist[motion.moving].T
    speed, course = motion.speed_mps[motion.moving], motion.course_rad[motion.moving]
    yaw = motion.yaw_rad[motion.moving]
    ratio = float(np.median(np.hypot(forward, left) / speed))
    if not 0.85 < ratio < 1.15:
        unit = ' (km/h?)' if abs(ratio - 3.6) < 0.3 else ''
        yield found('twist_disagrees', f'{name}: the twist is {ratio:.2f} times the speed of the '
                    f'path{unit}')  # fmt: skip
        if ratio < 0.2:
            return
    heading = np.arctan2(left, forward)
    to_world, to_body = spread_from_zero(heading - course), spread_from_zero(heading)
    if to_world < 0.02 and to_body > 3.0 * to_world + 0.002 and np.abs(left).max() > 0.3:
        yield found('twist_frame', f'{name}: the twist points along the path in '
                    'the odometry frame')  # fmt: skip
    elif np.median(forward) * np.median(np.cos(course - yaw)) < -0.5:
        yield found('twist_disagrees', f'{name}: the twist says backwards, the path forwards')


def spread_from_zero(angles: Values) -> float:
    """How far angles are from zero on the circle: 0 none, 2 opposite."""
    return 1.0 - float(np.cos(angles).mean())


def _yaw_rate(motion: Motion, name: str) -> Iterator[Finding]:
    if np.ptp(motion.course_rad[motion.moving]) < TURNED_RAD:
        return
    rate = motion.course_rate
    turning = motion.moving & (np.abs(rate) > TURNING_RADPS)
    # The course at either end is that of half a step.
    turning[:SMOOTHING] = turning[-SMOOTHING:] = False
    if turning.sum() < FEWEST:
        return
    factor = float(np.median(motion.twist[turning, 2] / rate[turning]))
    if abs(factor / DEGREES - 1.0) < 0.3:
        yield found('odometry_degrees', f'{name}: the yaw rate is {factor:.0f} times that of '
                    'the path, as degrees would be')  # fmt: skip
    elif factor < -0.5:
        yield found('yaw_rate_sign', f'{name}: the yaw rate turns against the path')
    elif not 0.5 < factor < 1.6:
        yield found('twist_disagrees', f'{name}: the yaw rate is {factor:.2f} times that of '
                    'the path')  # fmt: skip


@dataclass(frozen=True)
class RouteFit:
    """Median distance of the driven path from the route: as given, y negated, x and y swapped."""

    given_m: float
    mirrored_m: float
    swapped_m: float

    @property
    def reading(self) -> str:
        """`given`, `mirrored` or `swapped` where one of them clearly fits, else empty."""
        values = {
            'given': self.given_m, 'mirrored': self.mirrored_m, 'swapped': self.swapped_m
        }  # fmt: skip
        best = min(values, key=lambda key: values[key])
        if best != 'given' and values[best] > 0.4 * self.given_m:
            best = 'given'
        return best if values[best] < 4.0 else ''


def fit_route(rig: Rig) -> RouteFit | None:
    """How the driven path lies to the route, None where one of them is missing."""
    table = rig.odometry
    if rig.route is None or len(table) < 2:
        return None
    points = table[:: max(len(table) // 50, 1), 1:3]

    route = rig.route
    if float(np.ptp(route, axis=0).max()) < 1.0:
        return None

    def distance(path: Float64[np.ndarray, 'n 2']) -> float:
        return float(np.median(np.abs(project_on_polyline(route, path)[1])))

    return RouteFit(distance(points), distance(points * [1.0, -1.0]), distance(points[:, ::-1]))
