"""What is refused, and why: checks of incoming plans and of every trajectory that goes out.

Plans are judged at half-second waypoints with an allowance for their noise; what goes out is
judged at every tenth of a second with next to none. The checks see no obstacles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import (
    interpolate_poses,
    local_from_world,
    project_on_polyline,
    wrap_angle,
)
from spanvla_ros.safety.rollout import STEP_S, Motion
from spanvla_ros.types import EgoState, Plan, Vehicle

MIN_HORIZON_S = 2.0
MAX_HORIZON_S = 10.0
MIN_GAP_S, MAX_GAP_S = 0.02, 1.0
MAX_WAYPOINTS = 200
# Four places half a second apart have two changes of speed, the least that can be judged.
MIN_KNOTS = 4
WAYPOINT_SPACING_S = 0.5
# The allowance at the start grows as the first knot nears it: an early one would excuse any speed.
FIRST_KNOT_S = 0.25
FUTURE_TOLERANCE_S = 0.1
MAX_JERK_MPS3 = 25.0
# A waypoint may lie this far from where a perfect one would; all plan tolerances follow from it.
WAYPOINT_NOISE_M = 0.15
MIN_SEGMENT_M = 0.3
START_ALONG_M = 2.0
START_LATERAL_M = 1.2
START_HEADING_RAD = 0.6
CORRIDOR_M = 6.0
ROUTE_EXTENSION_M = 100.0
MOVING_MPS = 1.0


class Reason(str, Enum):
    """Why a plan, or a trajectory on its way out, was refused."""

    SCHEMA = 'schema'
    NOT_FINITE = 'not_finite'
    FRAME = 'frame'
    TIMES = 'times'
    FROM_FUTURE = 'from_future'
    STALE_IMAGE = 'stale_image'
    OUT_OF_ORDER = 'out_of_order'
    NO_ODOMETRY = 'no_odometry'
    TOO_FAR = 'too_far'
    START_POSITION = 'start_position'
    START_HEADING = 'start_heading'
    START_SPEED = 'start_speed'
    ALL_EQUAL = 'all_equal'
    REVERSAL = 'reversal'
    HEADING = 'heading'
    SPEED = 'speed'
    ACCELERATION = 'acceleration'
    JERK = 'jerk'
    CURVATURE = 'curvature'
    LATERAL_ACCELERATION = 'lateral_acceleration'
    STEERING_RATE = 'steering_rate'
    DISCONTINUITY = 'discontinuity'
    CORRIDOR = 'corridor'


@dataclass(frozen=True)
class Rejection:
    """A refusal: the reason for counting, the detail for reading."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class PlanContext:
    """What a plan is judged against.

    `route` is the announced path in the frame of the ego, or None to judge without it.
    `previous` is the last accepted plan while it is still in use.
    """

    now_ns: int
    ego: EgoState
    frame_id: str
    vehicle: Vehicle
    max_age_s: float
    route: Float64[np.ndarray, 'n 2'] | None = None
    previous: Plan | None = None


def check_plan(plan: Plan, context: PlanContext) -> Rejection | None:
    """The first reason to refuse a parsed plan, or None to accept it."""
    for check in (_check_times, _check_age, _check_reach):
        rejection = check(plan, context)
        if rejection is not None:
            return rejection
    times_s, poses = knots(plan)
    if len(times_s) < MIN_KNOTS:
        return Rejection(Reason.TIMES, f'waypoints too uneven: {len(times_s)} about 0.5 s apart')
    return (
        _check_start(times_s, poses, plan, context)
        or _check_direction(poses, context)
        or _check_speeds(times_s, poses, context)
        or _check_steering(times_s, poses, context)
        or _check_continuity(plan, context)
        or _check_corridor(poses, context)
    )


def knots(plan: Plan) -> tuple[Float64[np.ndarray, 'k'], Float64[np.ndarray, 'k 3']]:
    """Times and poses from the origin on, thinned to about half a second, the first gap too."""
    times_s, poses = plan.trajectory.times_s, plan.trajectory.poses
    stride = max(1, round(WAYPOINT_SPACING_S / float(np.median(np.diff(times_s)))))
    first = stride - 1 if times_s[0] > 0 else stride
    first = min(max(first, int(np.searchsorted(times_s, FIRST_KNOT_S))), len(times_s) - 1)
    rows = np.arange(first, len(times_s), stride)
    if rows[-1] != len(times_s) - 1:
        rows = np.append(rows, len(times_s) - 1)
    origin = np.array([plan.origin], dtype=np.float64)
    return np.append(0.0, times_s[rows]), np.concatenate([origin, poses[rows]])


def _check_times(plan: Plan, context: PlanContext) -> Rejection | None:
    times_s = plan.trajectory.times_s
    if plan.trajectory.frame_id != context.frame_id:
        return Rejection(
            Reason.FRAME, f'plan in {plan.trajectory.frame_id:.40}, odometry in {context.frame_id}'
        )
    if len(times_s) > MAX_WAYPOINTS or len(times_s) < 4:
        return Rejection(Reason.TIMES, f'{len(times_s)} waypoints')
    # The first may repeat the present; any other is as far from it as from the next.
    gaps_s = np.diff(times_s if times_s[0] == 0.0 else np.append(0.0, times_s))
    if gaps_s.min() < MIN_GAP_S or gaps_s.max() > MAX_GAP_S:
        return Rejection(
            Reason.TIMES, f'waypoints {gaps_s.min():.3g} to {gaps_s.max():.3g} s apart'
        )
    if not MIN_HORIZON_S <= times_s[-1] <= MAX_HORIZON_S:
        return Rejection(Reason.TIMES, f'horizon of {times_s[-1]:.3g} s')
    return None


def _check_age(plan: Plan, context: PlanContext) -> Rejection | None:
    age_ns = context.now_ns - plan.trajectory.stamp_ns
    if age_ns < -FUTURE_TOLERANCE_S * 1e9:
        return Rejection(Reason.FROM_FUTURE, f'image {-age_ns * 1e-9:.3g} s ahead of the clock')
    if age_ns > context.max_age_s * 1e9:
        return Rejection(Reason.STALE_IMAGE, f'image {age_ns * 1e-9:.3g} s old')
    previous = context.previous
    if previous is not None and plan.trajectory.stamp_ns < previous.trajectory.stamp_ns:
        return Rejection(Reason.OUT_OF_ORDER, 'image older than that of the plan in use')
    return None


def _check_reach(plan: Plan, context: PlanContext) -> Rejection | None:
    every = np.concatenate([[plan.origin], plan.trajectory.poses])
    reach_m = np.abs(every[:, :2] - context.ego.pose[:2]).max()
    top_mps = max(context.vehicle.max_speed_mps, context.ego.speed_mps)
    bound_m = top_mps * float(plan.trajectory.times_s[-1]) * 1.2 + 20.0
    if reach_m > bound_m:
        return Rejection(Reason.TOO_FAR, f'waypoint {reach_m:.3g} m away, bound {bound_m:.3g} m')
    if np.abs(every[:, 2]).max() > 1e3:
        return Rejection(Reason.HEADING, 'a yaw of more than 1000 rad')
    return None


def _check_start(
    times_s: Float64[np.ndarray, 'k'],
    poses: Float64[np.ndarray, 'k 3'],
    plan: Plan,
    context: PlanContext,
) -> Rejection | None:
    ego, vehicle = context.ego, context.vehicle
    since_s = (ego.stamp_ns - plan.trajectory.stamp_ns) * 1e-9
    expected = interpolate_poses(times_s, poses, np.array([since_s]))[0]
    along_m, left_m, turn_rad = local_from_world(ego.pose, expected)
    speed = max(ego.speed_mps, 0.0)
    if abs(along_m) > START_ALONG_M + 0.3 * speed or abs(left_m) > START_LATERAL_M + 0.02 * speed:
        return Rejection(
            Reason.START_POSITION, f'{along_m:.3g} m ahead, {left_m:.3g} m left of the ego'
        )
    if abs(turn_rad) > START_HEADING_RAD:
        return Rejection(Reason.START_HEADING, f'{turn_rad:.3g} rad off the ego')
    spread_m = np.hypot(*(poses[:, :2] - poses[0, :2]).T).max()
    if speed > MOVING_MPS and spread_m < 0.1:
        return Rejection(Reason.ALL_EQUAL, f'all waypoints equal at {speed:.3g} m/s')
    first_mps = float(np.hypot(*(poses[1, :2] - poses[0, :2]))) / times_s[1]
    noise_mps = 2.0 * WAYPOINT_NOISE_M / times_s[1] + 0.8
    lowest = speed - vehicle.max_decel_mps2 * times_s[1] - noise_mps
    highest = speed + vehicle.max_accel_mps2 * times_s[1] + noise_mps
    if not lowest <= first_mps <= highest:
        return Rejection(Reason.START_SPEED, f'{first_mps:.3g} m/s planned at {speed:.3g} m/s')
    return None


def _check_direction(poses: Float64[np.ndarray, 'k 3'], context: PlanContext) -> Rejection | None:
    moves = np.diff(poses[:, :2], axis=0)
    middle = poses[:-1, 2] + 0.5 * wrap_angle(np.diff(poses[:, 2]))
    forward_m = moves[:, 0] * np.cos(middle) + moves[:, 1] * np.sin(middle)
    backward_m = -np.minimum(forward_m, 0.0).sum()
    if backward_m > 3.0 * WAYPOINT_NOISE_M + 0.02 * context.ego.speed_mps:
        return Rejection(Reason.REVERSAL, f'drives {backward_m:.3g} m backwards')
    lengths_m = np.hypot(moves[:, 0], moves[:, 1])
    slip = np.abs(wrap_angle(np.arctan2(moves[:, 1], moves[:, 0]) - middle))
    slipping = (lengths_m > 1.0) & (slip > 0.8)
    if slipping.any():
        return Rejection(Reason.HEADING, f'yaw {slip[slipping].max():.3g} rad off its motion')
    return None


def _check_speeds(
    times_s: Float64[np.ndarray, 'k'], poses: Float64[np.ndarray, 'k 3'], context: PlanContext
) -> Rejection | None:
    vehicle = context.vehicle
    spans_s = np.diff(times_s)
    speeds = np.hypot(*np.diff(poses[:, :2], axis=0).T) / spans_s
    top_mps = max(vehicle.max_speed_mps, context.ego.speed_mps) * 1.05 + 1.0
    if speeds.max() > top_mps:
        return Rejection(Reason.SPEED, f'{speeds.max():.3g} m/s, bound {top_mps:.3g} m/s')
    middles_s = times_s[:-1] + 0.5 * spans_s
    # Differences over two segments: half the noise of neighbors, still within a second.
    accels = (speeds[2:] - speeds[:-2]) / (middles_s[2:] - middles_s[:-2])
    noise_mps2 = 2.0 * WAYPOINT_NOISE_M / WAYPOINT_SPACING_S + 0.4
    if accels.max() > 1.2 * vehicle.max_accel_mps2 + noise_mps2:
        return Rejection(Reason.ACCELERATION, f'{accels.max():.3g} m/s2')
    if accels.min() < -1.2 * vehicle.max_decel_mps2 - noise_mps2:
        return Rejection(Reason.ACCELERATION, f'{accels.min():.3g} m/s2')
    jerks = np.diff(accels) / np.diff(middles_s[1:-1])
    if np.abs(jerks).max(initial=0.0) > MAX_JERK_MPS3:
        return Rejection(Reason.JERK, f'{np.abs(jerks).max():.3g} m/s3')
    return None


def _check_steering(
    times_s: Float64[np.ndarray, 'k'], poses: Float64[np.ndarray, 'k 3'], context: PlanContext
) -> Rejection | None:
    """Curvature where segments are long enough to have a direction.

    Three waypoints `d` apart, each off by `e`, feign a curvature of up to `4 e / d^2`; half of
    that is allowed on top of each bound.
    """
    vehicle = context.vehicle
    bends = _bends(times_s, poses)
    if bends is None:
        return None
    curvature, at_s, length_m, speed = bends
    noise_1pm = 2.0 * WAYPOINT_NOISE_M / length_m**2
    bound_1pm = 1.2 * math.tan(vehicle.max_steering_rad) / vehicle.wheelbase_m + noise_1pm
    if (np.abs(curvature) > bound_1pm).any():
        return Rejection(Reason.CURVATURE, f'{np.abs(curvature).max():.3g} 1/m')
    lateral = np.abs(curvature) * speed**2
    if (lateral > 1.2 * vehicle.max_lateral_accel_mps2 + noise_1pm * speed**2).any():
        return Rejection(Reason.LATERAL_ACCELERATION, f'{lateral.max():.3g} m/s2')
    steering = np.arctan(vehicle.wheelbase_m * curvature)
    spans_s = np.maximum(np.diff(at_s), 1e-3)
    rates = np.abs(np.diff(steering)) / spans_s
    noise = vehicle.wheelbase_m * (noise_1pm[1:] + noise_1pm[:-1]) / spans_s
    if (rates > 1.5 * vehicle.max_steering_rate_radps + noise).any():
        return Rejection(Reason.STEERING_RATE, f'{rates.max():.3g} rad/s')
    return None


def _bends(
    times_s: Float64[np.ndarray, 'k'], poses: Float64[np.ndarray, 'k 3']
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Curvature, time, shorter neighbor and speed at each bend between long enough chords."""
    kept = [0]
    for index in range(1, len(poses)):
        if np.hypot(*(poses[index, :2] - poses[kept[-1], :2])) >= MIN_SEGMENT_M:
            kept.append(index)
    if len(kept) < 3:
        return None
    chords = np.diff(poses[kept, :2], axis=0)
    lengths_m = np.hypot(chords[:, 0], chords[:, 1])
    spans_s = np.diff(times_s[kept])
    turns = wrap_angle(np.diff(np.arctan2(chords[:, 1], chords[:, 0])))
    curvature = turns / (0.5 * (lengths_m[1:] + lengths_m[:-1]))
    shorter_m = np.minimum(lengths_m[1:], lengths_m[:-1])
    speed = (lengths_m[1:] + lengths_m[:-1]) / (spans_s[1:] + spans_s[:-1])
    return curvature, times_s[kept[1:-1]], shorter_m, speed


def _check_continuity(plan: Plan, context: PlanContext) -> Rejection | None:
    """Two plans from one state part no faster than the vehicle at its two extremes does."""
    if context.previous is None:
        return None
    vehicle = context.vehicle
    ahead_s = np.array([0.5, 1.0])
    since_s = (context.ego.stamp_ns - plan.trajectory.stamp_ns) * 1e-9
    before_s = (context.ego.stamp_ns - context.previous.trajectory.stamp_ns) * 1e-9
    now = interpolate_poses(*knots(plan), since_s + ahead_s)
    before = interpolate_poses(*knots(context.previous), before_s + ahead_s)
    for ahead, new, old in zip(ahead_s, now, before, strict=True):
        along_m, left_m, _ = local_from_world(old, new)
        longitudinal = vehicle.max_accel_mps2 + vehicle.max_decel_mps2
        bound_along_m = START_ALONG_M + 0.5 * longitudinal * ahead**2
        bound_left_m = START_LATERAL_M + vehicle.max_lateral_accel_mps2 * ahead**2
        if abs(along_m) > bound_along_m or abs(left_m) > bound_left_m:
            return Rejection(
                Reason.DISCONTINUITY,
                f'{along_m:.3g} m along, {left_m:.3g} m left of the last plan in {ahead:.1f} s',
            )
    return None


def _check_corridor(poses: Float64[np.ndarray, 'k 3'], context: PlanContext) -> Rejection | None:
    if context.route is None:
        return None
    offset_m = np.abs(route_offsets(context.route, poses[:, :2])).max()
    if offset_m > CORRIDOR_M:
        return Rejection(Reason.CORRIDOR, f'{offset_m:.3g} m off the announced route')
    return None


def route_offsets(
    route: Float64[np.ndarray, 'n 2'], points: Float64[np.ndarray, 'q 2']
) -> Float64[np.ndarray, 'q']:
    """Lateral offset of points from the route, which goes straight on beyond its ends."""
    first, last = route[1] - route[0], route[-1] - route[-2]
    ends = (
        route[0] - first / np.hypot(*first) * ROUTE_EXTENSION_M,
        route[-1] + last / np.hypot(*last) * ROUTE_EXTENSION_M,
    )
    _, offsets = project_on_polyline(np.concatenate([[ends[0]], route, [ends[1]]]), points)
    return offsets


def check_motion(motion: Motion, ego: EgoState, vehicle: Vehicle) -> Rejection | None:
    """The reason why a trajectory must not go out, or None.

    Judged from its poses alone, against the present state and the bounds of the vehicle. A speed
    above the vehicle's may only fall, and full braking is allowed at once.
    """
    times_s, poses = motion.trajectory.times_s, motion.trajectory.poses
    if not (np.isfinite(poses).all() and np.isfinite(motion.accels_mps2).all()):
        return Rejection(Reason.NOT_FINITE, 'the trajectory holds a number that is not finite')
    if np.abs(poses[0, :2] - ego.pose[:2]).max() > 1e-6:
        return Rejection(Reason.START_POSITION, 'does not start at the ego')
    spans_s = np.diff(times_s)
    moves = np.diff(poses[:, :2], axis=0)
    turns = wrap_angle(np.diff(poses[:, 2]))
    middle = poses[:-1, 2] + 0.5 * turns
    forward_m = moves[:, 0] * np.cos(middle) + moves[:, 1] * np.sin(middle)
    sideways_m = np.abs(moves[:, 1] * np.cos(middle) - moves[:, 0] * np.sin(middle))
    if sideways_m.max() > 0.01:
        return Rejection(Reason.HEADING, f'slips {sideways_m.max():.3g} m sideways')
    # Coordinates of thousands of kilometers leave nanometers of rounding.
    if forward_m.min() < -1e-6:
        return Rejection(Reason.REVERSAL, f'drives {-forward_m.min():.3g} m backwards')
    speeds = forward_m / spans_s
    start_mps = max(ego.speed_mps, 0.0)
    if speeds.max() > max(vehicle.max_speed_mps, start_mps) + 0.1:
        return Rejection(Reason.SPEED, f'{speeds.max():.3g} m/s')
    half_s = 0.5 * spans_s[0]
    accels = np.diff(speeds, prepend=start_mps) / np.append(half_s, spans_s[1:])
    if accels.max() > vehicle.max_accel_mps2 + 0.1:
        return Rejection(Reason.ACCELERATION, f'{accels.max():.3g} m/s2')
    if accels.min() < -vehicle.max_decel_mps2 - 0.1:
        return Rejection(Reason.ACCELERATION, f'{accels.min():.3g} m/s2')
    return _check_bicycle(forward_m, speeds, turns, vehicle)


def _check_bicycle(
    forward_m: Float64[np.ndarray, 's'],
    speeds: Float64[np.ndarray, 's'],
    turns: Float64[np.ndarray, 's'],
    vehicle: Vehicle,
) -> Rejection | None:
    moving = forward_m > 0.02
    curvature = turns / np.maximum(forward_m, 1e-3)
    steering = np.arctan(vehicle.wheelbase_m * curvature)
    if (np.abs(steering) > 1.02 * vehicle.max_steering_rad).any():
        return Rejection(Reason.CURVATURE, f'{np.abs(curvature).max():.3g} 1/m')
    lateral = np.abs(curvature) * speeds**2
    if lateral.max() > 1.02 * vehicle.max_lateral_accel_mps2:
        return Rejection(Reason.LATERAL_ACCELERATION, f'{lateral.max():.3g} m/s2')
    rates = np.where(moving[1:] & moving[:-1], np.abs(np.diff(steering)), 0.0) / STEP_S
    if rates.max() > 1.05 * vehicle.max_steering_rate_radps:
        return Rejection(Reason.STEERING_RATE, f'{rates.max():.3g} rad/s')
    return None
