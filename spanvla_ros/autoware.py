"""Autoware's planning messages, written and read by attribute; no ROS package is imported.

Autoware's `base_link` is the rear axle on the ground, as here, and its planning runs in `map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from transforms3d.euler import euler2quat

from spanvla_ros.types import SpanvlaError, Trajectory

MAP_FRAME = 'map'
# Numbers of autoware_adapi_v1_msgs: MrmState.state and OperationModeState.mode.
MRM_STATES = ('unknown', 'normal', 'operating', 'succeeded', 'failed')
MODE_AUTONOMOUS = 2
ROUTE_STEP_M = 1.0


@dataclass(frozen=True)
class Motion:
    """A trajectory with what an Autoware point holds besides its pose."""

    trajectory: Trajectory
    speeds_mps: Float64[np.ndarray, 't']
    accels_mps2: Float64[np.ndarray, 't']
    yaw_rates_radps: Float64[np.ndarray, 't']


def fill_trajectory(message: Any, make_point: Callable[[], Any], motion: Motion) -> Any:
    """An empty `autoware_planning_msgs/Trajectory`, or a candidate, filled with a motion.

    Lateral velocity is 0 at the rear axle; wheel angles stay 0, as Autoware's planners leave them.
    """
    track = motion.trajectory
    message.header.frame_id = track.frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(track.stamp_ns, 10**9)
    for time_s, pose, speed, accel, yaw_rate in zip(
        track.times_s.tolist(),
        track.poses.tolist(),
        motion.speeds_mps.tolist(),
        motion.accels_mps2.tolist(),
        motion.yaw_rates_radps.tolist(),
        strict=True,
    ):
        point = make_point()
        since = point.time_from_start
        since.sec, since.nanosec = divmod(round(time_s * 1e9), 10**9)
        point.pose.position.x, point.pose.position.y = pose[0], pose[1]
        q = point.pose.orientation
        q.w, q.x, q.y, q.z = euler2quat(0.0, 0.0, math.remainder(pose[2], math.tau))
        point.longitudinal_velocity_mps = speed
        point.acceleration_mps2 = accel
        point.heading_rate_rps = yaw_rate
        message.points.append(point)
    return message


def fill_candidates(
    message: Any, candidate: Any, info: Any, generator: str, number: UInt8[np.ndarray, '16']
) -> Any:
    """A `CandidateTrajectories` of one filled candidate and the generator it comes from.

    Args:
        message: empty `autoware_internal_planning_msgs/CandidateTrajectories`.
        candidate: a `CandidateTrajectory` filled by `fill_trajectory`.
        info: an empty `GeneratorInfo`.
        generator: the generator's name.
        number: its 16-byte identity.
    """
    candidate.generator_id.uuid = number
    info.generator_id.uuid = number
    info.generator_name.data = generator
    message.candidate_trajectories.append(candidate)
    message.generator_info.append(info)
    return message


def read_mrm(message: Any) -> str:
    """What an `MrmState` says of the minimal risk maneuver, one word of `MRM_STATES`.

    Raises:
        SpanvlaError: a state that is not known.
    """
    state = int(message.state)
    if not 0 <= state < len(MRM_STATES):
        raise SpanvlaError(f'mrm_state: {state} is none of the states 0 to {len(MRM_STATES) - 1}')
    return MRM_STATES[state]


def read_engaged(message: Any) -> bool:
    """Whether an `OperationModeState` says that Autoware drives by itself now."""
    autonomous = int(message.mode) == MODE_AUTONOMOUS
    return autonomous and bool(message.is_autoware_control_enabled)


def read_route_places(
    path: Any, lanelet_route: Any | None = None
) -> tuple[str, Float64[np.ndarray, 'n 2']]:
    """Frame and places of an `autoware_planning_msgs/Path`, up to the goal of a `LaneletRoute`.

    A `LaneletRoute` names lanelets and holds no geometry but start and goal; the geometry comes
    from the path that Autoware's behavior planner draws along it.

    Raises:
        SpanvlaError: a place that is no number, or a goal in another frame.
    """
    places = np.array(
        [(point.pose.position.x, point.pose.position.y) for point in path.points], np.float64
    ).reshape(-1, 2)
    if not np.isfinite(places).all():
        raise SpanvlaError('path: holds a number that is not finite')
    frame_id = str(path.header.frame_id)
    kept: list[int] = []
    for index in range(len(places)):
        if not kept or math.hypot(*(places[index] - places[kept[-1]])) >= ROUTE_STEP_M:
            kept.append(index)
    places = places[kept]
    if lanelet_route is not None and len(places):
        if str(lanelet_route.header.frame_id) != frame_id:
            raise SpanvlaError(
                f'route: its goal is in {lanelet_route.header.frame_id!r:.40}, '
                f'the path in {frame_id!r:.40}'
            )
        places = _until(places, lanelet_route.goal_pose.position)
    return frame_id, places


def _until(places: Float64[np.ndarray, 'n 2'], goal: Any) -> Float64[np.ndarray, 'm 2']:
    """The places before the goal, and the goal, where the path comes near to it."""
    apart = np.hypot(places[:, 0] - goal.x, places[:, 1] - goal.y)
    nearest = int(np.argmin(apart))
    if apart[nearest] > 2.0 * ROUTE_STEP_M:
        return places
    before = places[: nearest + 1][apart[: nearest + 1] >= ROUTE_STEP_M]
    return np.concatenate([before, [[goal.x, goal.y]]])
