"""Paths, speed profiles and the bicycle roll-out that every published trajectory comes from.

A trajectory is never copied from a plan. A kinematic bicycle starts in the present state of the
ego and pursues the plan's path at the plan's speed, inside the limits of the vehicle. What it
drives is therefore continuous with the present, never backwards, and feasible by construction,
however rough the plan is.

Source: pure pursuit, Coulter 1992 (CMU-RI-TR-92-01); monotone cubic interpolation, Fritsch and
Carlson 1980, with the harmonic-mean slopes of Fritsch and Butland 1984.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.types import EgoState, Trajectory, Vehicle

STEP_S = 0.1
STEPS = 50
TIMES_S: Float64[np.ndarray, '51'] = np.round(np.arange(STEPS + 1) * STEP_S, 3)
STAND_MPS = 0.05
SPACING_M = 0.25
# Nearer waypoints say more about noise than about direction.
MIN_PIECE_M = 0.3
LOOKAHEAD_S = 0.6
MIN_LOOKAHEAD_M = 3.0
SPEED_GAIN_1PS = 2.0
PROGRESS_GAIN_1PS = 0.6
MAX_JERK_MPS3 = 30.0
# The pursuit asks for less than the limit; a start at the limit is brought back to it.
LATERAL_SHARE = 0.9


@dataclass(frozen=True)
class Motion:
    """A trajectory with the motion at each of its points.

    `speeds_mps` and `yaw_rates_radps` hold at the points, `accels_mps2` from each point to the
    next (the last is repeated).
    """

    trajectory: Trajectory
    speeds_mps: Float64[np.ndarray, 't']
    accels_mps2: Float64[np.ndarray, 't']
    yaw_rates_radps: Float64[np.ndarray, 't']

    @property
    def stands(self) -> bool:
        """True where the whole trajectory covers less than a centimeter."""
        return bool(self.speeds_mps.sum() * STEP_S < 0.01)


class Path:
    """A smooth line through waypoints, by distance; straight on beyond both ends."""

    def __init__(self, points: Float64[np.ndarray, 'n 2'], length_m: float) -> None:
        """Take `n >= 2` points spaced evenly over `length_m`; use `through` for waypoints."""
        self.length_m = length_m
        self.points = points
        # Plain floats: scalar look-ups on lists are several times as fast as on arrays.
        self._x: list[float] = points[:, 0].tolist()
        self._y: list[float] = points[:, 1].tolist()
        self._step_m = length_m / (len(points) - 1)

    @staticmethod
    def through(knots: Float64[np.ndarray, 'k 2'], yaw_rad: float) -> Path:
        """The cubic Hermite line through `knots`, leaving the first one towards `yaw_rad`.

        The parameter is the length of the chords. A single knot gives a meter straight ahead.
        """
        first = np.array([math.cos(yaw_rad), math.sin(yaw_rad)])
        if len(knots) == 1:
            knots = np.stack([knots[0], knots[0] + first])
        chords = np.diff(knots, axis=0)
        lengths = np.linalg.norm(chords, axis=1)
        directions = chords / lengths[:, None]
        tangents = np.empty_like(knots)
        tangents[0] = first
        weight = (lengths[:-1] / (lengths[:-1] + lengths[1:]))[:, None]
        tangents[1:-1] = (1.0 - weight) * directions[:-1] + weight * directions[1:]
        tangents[-1] = 2.0 * directions[-1] - tangents[-2]
        tangents /= np.maximum(np.linalg.norm(tangents, axis=1), 1e-9)[:, None]
        starts = np.concatenate([[0.0], np.cumsum(lengths)])
        total_m = float(starts[-1])
        at_m = np.linspace(0.0, total_m, max(2, math.ceil(total_m / SPACING_M) + 1))
        piece = np.clip(np.searchsorted(starts, at_m, side='right') - 1, 0, len(lengths) - 1)
        span = lengths[piece][:, None]
        u = (at_m - starts[piece])[:, None] / span
        points = (
            (2 * u**3 - 3 * u**2 + 1) * knots[piece]
            + (u**3 - 2 * u**2 + u) * span * tangents[piece]
            + (3 * u**2 - 2 * u**3) * knots[piece + 1]
            + (u**3 - u**2) * span * tangents[piece + 1]
        )
        return Path(points, total_m)

    def at(self, along_m: float) -> tuple[float, float]:
        """The point at distance `along_m`."""
        place = along_m / self._step_m
        piece = min(max(int(place), 0), len(self._x) - 2)
        part = place - piece
        x, y = self._x[piece], self._y[piece]
        return x + part * (self._x[piece + 1] - x), y + part * (self._y[piece + 1] - y)

    def start_index(self, x_m: float, y_m: float) -> int:
        """The index of the point nearest to a place."""
        return int(np.argmin((self.points[:, 0] - x_m) ** 2 + (self.points[:, 1] - y_m) ** 2))

    def advance(self, index: int, x_m: float, y_m: float) -> tuple[int, float]:
        """From `index` forward to the piece nearest to a place: its index and the distance.

        The distance may pass the end of the path, or lie before its start.
        """
        last = len(self._x) - 2
        index = min(index, last)
        while True:
            dx = self._x[index + 1] - self._x[index]
            dy = self._y[index + 1] - self._y[index]
            part = (x_m - self._x[index]) * dx + (y_m - self._y[index]) * dy
            part /= max(dx * dx + dy * dy, 1e-12)
            if part <= 1.0 or index == last:
                return index, (index + part) * self._step_m
            index += 1

    def offset(self, x_m: float, y_m: float, yaw_rad: float) -> tuple[float, float, float]:
        """Distance along, signed lateral offset (left positive) and heading difference of a pose.

        The heading difference is in [0, pi].
        """
        index = max(self.start_index(x_m, y_m) - 1, 0)
        index, along_m = self.advance(index, x_m, y_m)
        dx = self._x[index + 1] - self._x[index]
        dy = self._y[index + 1] - self._y[index]
        size = max(math.hypot(dx, dy), 1e-9)
        left_m = (dx * (y_m - self._y[index]) - dy * (x_m - self._x[index])) / size
        turn = math.remainder(yaw_rad - math.atan2(dy, dx), math.tau)
        return along_m, left_m, abs(turn)


@dataclass(frozen=True)
class Profile:
    """Where along a path, and how fast, at times after a stamp; monotone in between."""

    stamp_ns: int
    times_s: Float64[np.ndarray, 'k']
    along_m: Float64[np.ndarray, 'k']
    slopes_mps: Float64[np.ndarray, 'k']

    def sample(
        self, at_s: Float64[np.ndarray, 't']
    ) -> tuple[Float64[np.ndarray, 't'], Float64[np.ndarray, 't']]:
        """Distance and speed at times after the stamp; beyond the end at its last speed."""
        end_s = self.times_s[-1]
        inside = np.clip(at_s, self.times_s[0], end_s)
        piece = np.searchsorted(self.times_s, inside, side='right') - 1
        piece = np.clip(piece, 0, len(self.times_s) - 2)
        span = np.diff(self.times_s)[piece]
        u = (inside - self.times_s[piece]) / span
        a, b = self.along_m[piece], self.along_m[piece + 1]
        da, db = self.slopes_mps[piece], self.slopes_mps[piece + 1]
        along = (
            (2 * u**3 - 3 * u**2 + 1) * a
            + (u**3 - 2 * u**2 + u) * span * da
            + (3 * u**2 - 2 * u**3) * b
            + (u**3 - u**2) * span * db
        )
        speed = (6 * u**2 - 6 * u) / span * (a - b)
        speed = speed + (3 * u**2 - 4 * u + 1) * da + (3 * u**2 - 2 * u) * db
        along = along + np.maximum(at_s - end_s, 0.0) * self.slopes_mps[-1]
        return along, np.maximum(speed, 0.0)


def monotone_slopes(
    times_s: Float64[np.ndarray, 'k'], along_m: Float64[np.ndarray, 'k'], first_mps: float
) -> Float64[np.ndarray, 'k']:
    """Slopes that keep the cubic through rising values from ever falling."""
    span = np.diff(times_s)
    rise = np.diff(along_m) / span
    slopes = np.empty_like(along_m)
    slopes[0] = min(max(first_mps, 0.0), 3.0 * rise[0])
    before, after = rise[:-1], rise[1:]
    w1, w2 = 2.0 * span[1:] + span[:-1], span[1:] + 2.0 * span[:-1]
    moving = (before > 1e-9) & (after > 1e-9)
    safe_before, safe_after = np.where(moving, before, 1.0), np.where(moving, after, 1.0)
    harmonic = (w1 + w2) / (w1 / safe_before + w2 / safe_after)
    slopes[1:-1] = np.where(moving, harmonic, 0.0)
    # The mirror of the harmonic slope: continues the last change of speed, within bounds.
    slopes[-1] = min(max(2.0 * rise[-1] - slopes[-2], 0.0), 3.0 * rise[-1])
    return slopes


def reference(
    stamp_ns: int,
    times_s: Float64[np.ndarray, 'k'],
    poses: Float64[np.ndarray, 'k 3'],
    speed_mps: float,
) -> tuple[Path, Profile]:
    """The path and the speed profile of a plan whose first pose is its origin.

    Waypoints closer than `MIN_PIECE_M` to the one kept before shape only the profile, so that
    jitter in a plan that stands neither turns nor creeps.
    """
    kept = [0]
    along = np.zeros(len(poses))
    kept_m = 0.0
    for index in range(1, len(poses)):
        gap_m = float(np.hypot(*(poses[index, :2] - poses[kept[-1], :2])))
        along[index] = kept_m + gap_m
        if gap_m >= MIN_PIECE_M:
            kept.append(index)
            kept_m += gap_m
    along = np.maximum.accumulate(along)
    path = Path.through(poses[kept, :2], float(poses[0, 2]))
    profile = Profile(stamp_ns, times_s, along, monotone_slopes(times_s, along, speed_mps))
    return path, profile


def present_steering(ego: EgoState, vehicle: Vehicle) -> float:
    """The steering angle now: from the yaw rate where the ego moves, else as reported."""
    steering = ego.steering_rad
    if ego.speed_mps > 1.0:
        steering = math.atan(vehicle.wheelbase_m * ego.yaw_rate_radps / ego.speed_mps)
    limit = steering_limit(max(ego.speed_mps, 0.0), vehicle)
    return min(max(steering, -limit), limit)


def steering_limit(speed_mps: float, vehicle: Vehicle, share: float = 1.0) -> float:
    """The largest steering angle within the steering stop and a share of lateral acceleration."""
    curvature = share * vehicle.max_lateral_accel_mps2 / max(speed_mps * speed_mps, 1e-6)
    return min(vehicle.max_steering_rad, math.atan(vehicle.wheelbase_m * curvature))


def roll_out(
    ego: EgoState,
    frame_id: str,
    vehicle: Vehicle,
    path: Path | None,
    speed_law: Profile | float,
) -> Motion:
    """Drive a kinematic bicycle from the present state for 5 s in steps of 0.1 s.

    Args:
        ego: the present; the stamp of the result is its stamp. A negative speed counts as 0.
        frame_id: the frame of the ego pose and of `path`.
        vehicle: the limits.
        path: what to pursue; None keeps the present steering angle.
        speed_law: a profile to track, or a deceleration in m/s^2 to brake with to a standstill.
    """
    x, y, yaw = ego.x_m, ego.y_m, ego.yaw_rad
    speed, steering = max(ego.speed_mps, 0.0), present_steering(ego, vehicle)
    wish = _Wish(speed_law, ego.stamp_ns, vehicle) if isinstance(speed_law, Profile) else None
    decel = 0.0 if isinstance(speed_law, Profile) else speed_law
    index = 0 if path is None else max(path.start_index(x, y) - 1, 0)
    accel = 0.0
    rows = [(x, y, yaw, speed, speed * math.tan(steering) / vehicle.wheelbase_m)]
    accels = []
    for step in range(STEPS):
        along = 0.0
        wanted = steering
        if path is not None:
            index, along = path.advance(index, x, y)
            wanted = _pursue(path, along, x, y, yaw, speed, vehicle)
        if wish is None:
            next_speed = max(speed - decel * STEP_S, 0.0)
        else:
            next_speed = wish.next_speed(step, along, speed, accel)
            # Speeding up would need the wheels back sooner than they can turn.
            if abs(steering) > steering_limit(next_speed, vehicle, LATERAL_SHARE):
                next_speed = min(next_speed, speed)
        accel = (next_speed - speed) / STEP_S
        steering = _steer(steering, wanted, max(speed, next_speed), vehicle)
        distance = 0.5 * (speed + next_speed) * STEP_S
        turn = distance * math.tan(steering) / vehicle.wheelbase_m
        chord = distance * (1.0 - turn * turn / 24.0)
        x += chord * math.cos(yaw + 0.5 * turn)
        y += chord * math.sin(yaw + 0.5 * turn)
        yaw += turn
        speed = next_speed
        rows.append((x, y, yaw, speed, speed * math.tan(steering) / vehicle.wheelbase_m))
        accels.append(accel)
    table = np.array(rows)
    table[:, 2] = (table[:, 2] + np.pi) % (2.0 * np.pi) - np.pi
    trajectory = Trajectory(ego.stamp_ns, frame_id, TIMES_S.copy(), table[:, :3])
    return Motion(trajectory, table[:, 3], np.array([*accels, accels[-1]]), table[:, 4])


class _Wish:
    """The speed a profile asks for at each step of a roll-out."""

    def __init__(self, profile: Profile, stamp_ns: int, vehicle: Vehicle) -> None:
        since_s = (stamp_ns - profile.stamp_ns) * 1e-9
        along, speeds = profile.sample(TIMES_S + since_s)
        self._along: list[float] = along.tolist()
        self._speeds: list[float] = np.minimum(speeds, vehicle.max_speed_mps).tolist()
        self._vehicle = vehicle
        ends_standing = profile.slopes_mps[-1] < STAND_MPS
        self._stop_m = float(profile.along_m[-1]) if ends_standing else math.inf

    def next_speed(self, step: int, along_m: float, speed_mps: float, accel_mps2: float) -> float:
        ahead = self._speeds[step + 1]
        lag_m = self._along[step] - along_m
        bound_mps = 0.5 + 0.15 * ahead
        catch_up = min(max(PROGRESS_GAIN_1PS * lag_m, -bound_mps), bound_mps)
        if ahead < STAND_MPS and abs(lag_m) < MIN_PIECE_M:
            catch_up = min(catch_up, 0.0)
        wanted = min(max(ahead + catch_up, 0.0), self._vehicle.max_speed_mps)
        forward = (ahead - self._speeds[step]) / STEP_S
        accel = forward + SPEED_GAIN_1PS * (wanted - speed_mps)
        needed = speed_mps * speed_mps / (2.0 * max(self._stop_m - along_m, 0.05))
        if needed > self._vehicle.comfort_decel_mps2:
            # The plan ends at a stop: late or not, that is where to stand.
            accel = min(accel, -needed)
        if step > 0:
            change = MAX_JERK_MPS3 * STEP_S
            accel = min(max(accel, accel_mps2 - change), accel_mps2 + change)
        accel = min(max(accel, -self._vehicle.max_decel_mps2), self._vehicle.max_accel_mps2)
        result = max(speed_mps + accel * STEP_S, 0.0)
        stoppable = speed_mps <= self._vehicle.max_decel_mps2 * STEP_S
        return 0.0 if stoppable and max(result, wanted) < STAND_MPS else result


def _pursue(
    path: Path, along_m: float, x_m: float, y_m: float, yaw_rad: float, speed: float, v: Vehicle
) -> float:
    target_x, target_y = path.at(along_m + max(MIN_LOOKAHEAD_M, LOOKAHEAD_S * speed))
    dx, dy = target_x - x_m, target_y - y_m
    left_m = -math.sin(yaw_rad) * dx + math.cos(yaw_rad) * dy
    curvature = 2.0 * left_m / max(dx * dx + dy * dy, 1.0)
    return math.atan(v.wheelbase_m * curvature)


def _steer(steering: float, wanted: float, speed_mps: float, vehicle: Vehicle) -> float:
    limit = steering_limit(speed_mps, vehicle, LATERAL_SHARE)
    wanted = min(max(wanted, -limit), limit)
    change = vehicle.max_steering_rate_radps * STEP_S
    return min(max(wanted, steering - change), steering + change)
