"""The sub-scores of PDMS and EPDMS, one pure function each, batched over proposals.

All take simulated states in the prepared scene's own frame. Scores are float64 in [0, 1], one a
proposal; infraction steps are integers, `NEVER` where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Bool, Float64, Int64

from spanvla_ros.scoring import simulation
from spanvla_ros.scoring.prepared import (
    STOPPED_MPS,
    Centerline,
    Ground,
    RedLights,
    Tracks,
    Version,
    box_of,
)
from spanvla_ros.types import Vehicle

NEVER = -1

_AHEAD_RAD = np.deg2rad(30.0)
_BEHIND_RAD = np.deg2rad(150.0)
_TTC_OFFSETS = np.array([0, 3, 6, 9])
_TTC_MIN_SPEED_MPS = 5e-3
_DIRECTION_STEPS = 10
_DIRECTION_LIMITS_M = (2.0, 6.0)
_LANE_LIMIT_M = 0.5
_LANE_STEPS = 20

Steps = Int64[np.ndarray, 'n']
Values = Float64[np.ndarray, 'n']


@dataclass(frozen=True)
class Footprints:
    """What the vehicle covers at each step: states, box centers, corners, speeds."""

    states: Float64[np.ndarray, 'n 41 11']
    centers: Float64[np.ndarray, 'n 41 2']
    corners: Float64[np.ndarray, 'n 41 4 2']
    speed_mps: Float64[np.ndarray, 'n 41']
    vehicle: Vehicle


@dataclass(frozen=True)
class EgoAreas:
    """Where the vehicle stands at each step, in the terms that the sub-scores share."""

    multiple_lanes: Bool[np.ndarray, 'n 41']
    non_drivable: Bool[np.ndarray, 'n 41']
    oncoming: Bool[np.ndarray, 'n 41']
    in_intersection: Bool[np.ndarray, 'n 41']


def footprints(
    states: Float64[np.ndarray, 'n 41 11'], vehicle: Vehicle = simulation.PACIFICA
) -> Footprints:
    """The boxes of simulated rear-axle states."""
    yaw = states[..., simulation.YAW]
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    centers = states[..., :2] + vehicle.rear_axle_to_center_m * ahead
    poses = np.concatenate([centers, yaw[..., None]], axis=-1)
    half_length, half_width = np.array(vehicle.length_m / 2.0), np.array(vehicle.width_m / 2.0)
    return Footprints(
        states=states,
        centers=centers,
        corners=box_of(poses, half_length, half_width),
        speed_mps=np.hypot(states[..., simulation.VX], states[..., simulation.VY]),
        vehicle=vehicle,
    )


def ego_areas(ego: Footprints, ground: Ground, on_route: frozenset[str]) -> EgoAreas:
    """Multiple lanes, off the road, off the route, inside an intersection, at each step.

    `in_intersection` is that of the box center.
    """
    corner_count = np.zeros(ego.corners.shape[:2], dtype=np.int64)
    whole = np.zeros(ego.corners.shape[:2], dtype=bool)
    for inside in ground.lanes.contains(ego.corners):
        held = inside.sum(axis=-1)
        corner_count += held > 0
        whole |= held == 4
    routed = np.array([lane_id in on_route for lane_id in ground.lane_ids], dtype=bool)
    return EgoAreas(
        multiple_lanes=(corner_count > 1) & ~whole,
        non_drivable=np.any(~ground.drivable.any_contains(ego.corners), axis=-1),
        oncoming=~ground.lanes.keep(routed).any_contains(ego.centers),
        in_intersection=ground.intersections.any_contains(ego.centers),
    )


def no_at_fault_collision(
    ego: Footprints, areas: EgoAreas, tracks: Tracks
) -> tuple[Values, Steps]:
    """NC: 0 after an at-fault collision with a road user, 0.5 with an object, else 1.

    An object counts by its first contact alone: when that is not the ego's fault, it is
    ignored from then on. Also returns the step of the first at-fault contact.
    """
    tracks = _reachable(tracks, ego, 0.0)
    steps = ego.states.shape[1]
    hit = _overlaps(
        ego.centers[:, None],
        ego.states[:, None, :, simulation.YAW],
        tracks.poses[None, :, :steps],
        ego.vehicle,
        tracks,
        tracks.present[None, :, :steps],
    )
    proposal, track = np.nonzero(hit.any(axis=-1))
    step = hit[proposal, track].argmax(axis=-1)
    fault = _at_fault(ego, areas, tracks, proposal, track, step)
    scores = np.ones(len(ego.states))
    cost = np.where(tracks.moving_kind[track], 0.0, 0.5)
    np.minimum.at(scores, proposal[fault], cost[fault])
    return scores, _first(len(scores), proposal[fault], step[fault])


def drivable_area(areas: EgoAreas) -> Values:
    """DAC: 0 if any corner ever leaves the drivable area, else 1."""
    return np.where(areas.non_drivable.any(axis=1), 0.0, 1.0)


def driving_direction(ego: Footprints, areas: EgoAreas, version: Version) -> Values:
    """DDC: by the distance moved off the route within any 1 s: < 2 m 1, < 6 m 0.5, else 0.

    v2 does not count travel inside intersections.
    """
    counted = areas.oncoming
    if version == 'v2':
        counted = counted & ~areas.in_intersection
    moved = np.zeros(counted.shape)
    moved[:, 1:] = np.linalg.norm(np.diff(ego.centers, axis=1), axis=-1)
    total = np.cumsum(np.where(counted, moved, 0.0), axis=1)
    window = total.copy()
    window[:, _DIRECTION_STEPS + 1 :] -= total[:, : -_DIRECTION_STEPS - 1]
    worst = window.max(axis=1)
    compliant, violated = _DIRECTION_LIMITS_M
    return np.where(worst < compliant, 1.0, np.where(worst < violated, 0.5, 0.0))


def traffic_lights(ego: Footprints, lights: RedLights) -> Values:
    """TLC: 0 if the vehicle ever overlaps an on-route lane while that shows red, else 1."""
    scores = np.ones(len(ego.states))
    low, high = ego.corners.min(axis=2), ego.corners.max(axis=2)
    for polygon, bounds, red in zip(
        lights.areas.polygons, lights.areas.bounds, lights.red, strict=True
    ):
        near = (low <= bounds[2:]).all(axis=-1) & (high >= bounds[:2]).all(axis=-1) & red
        proposal, step = np.nonzero(near)
        if proposal.size:
            hit = shapely.intersects(polygon, shapely.polygons(ego.corners[proposal, step]))
            scores[proposal[hit]] = 0.0
    return scores


def raw_progress_m(ego: Footprints, centerline: Centerline) -> Values:
    """Distance along the center line between the first and the last box center, at least 0."""
    start = shapely.line_locate_point(centerline.line, shapely.points(ego.centers[:, 0]))
    end = shapely.line_locate_point(centerline.line, shapely.points(ego.centers[:, -1]))
    progress: Values = np.maximum(end - start, 0.0)
    return progress


def time_to_collision(
    ego: Footprints, areas: EgoAreas, tracks: Tracks, ground: Ground, version: Version
) -> tuple[Values, Steps]:
    """TTC: 0 if going on straight for up to 0.9 s would strike something that counts, else 1.

    What counts is ahead within 30 degrees or, where the ego is between lanes, off the road or
    in an intersection, anything not behind. An object counts by its first predicted contact
    alone. v2 stops looking 0.9 s before the end. Also returns the step of the first infraction.
    """
    tracks = _reachable(tracks, ego, 0.1 * _TTC_OFFSETS[-1])
    steps = ego.states.shape[1] if version == 'v1' else simulation.STEPS - _TTC_OFFSETS[-1] + 1
    yaw = ego.states[:, :steps, simulation.YAW]
    speed = ego.speed_mps[:, :steps]
    velocity = np.stack([np.cos(yaw) * speed, np.sin(yaw) * speed], axis=-1)
    ahead_s = _TTC_OFFSETS * simulation.STEP_S
    centers = ego.centers[:, :steps, None] + velocity[:, :, None] * ahead_s[:, None]
    later = np.arange(steps)[:, None] + _TTC_OFFSETS
    moving = (speed >= _TTC_MIN_SPEED_MPS)[:, None, :, None]
    hit = _overlaps(
        centers[:, None],
        yaw[:, None, :, None],
        tracks.poses[None, :, later],
        ego.vehicle,
        tracks,
        tracks.present[None, :, later] & moving,
    )
    hit = hit.reshape(*hit.shape[:2], steps * len(_TTC_OFFSETS))
    proposal, track = np.nonzero(hit.any(axis=-1))
    first = hit[proposal, track].argmax(axis=-1)
    step, offset = first // len(_TTC_OFFSETS), first % len(_TTC_OFFSETS)
    rear_axle = ego.states[proposal, step]
    place = tracks.poses[track, later[step, offset], :2]
    angle = _angle_off_heading(rear_axle, place)
    exposed = areas.multiple_lanes[proposal, step] | areas.non_drivable[proposal, step]
    exposed |= ground.intersections.any_contains(rear_axle[:, :2])
    fault = (angle < _AHEAD_RAD) | (exposed & ~(angle > _BEHIND_RAD))
    scores = np.ones(len(ego.states))
    scores[proposal[fault]] = 0.0
    return scores, _first(len(scores), proposal[fault], step[fault])


def lane_keeping(ego: Footprints, areas: EgoAreas, centerline: Centerline) -> Values:
    """LK: 0 if the center is over 0.5 m off the center line for 2 s on end, else 1.

    Steps inside intersections neither add to nor end a run.
    """
    points = shapely.points(ego.centers)
    off = ~shapely.dwithin(centerline.line, points, _LANE_LIMIT_M)
    skipped = areas.in_intersection
    run = np.zeros(len(off), dtype=np.int64)
    longest = run.copy()
    for step in range(off.shape[1]):
        run = np.where(skipped[:, step], run, np.where(off[:, step], run + 1, 0))
        longest = np.maximum(longest, run)
    return np.where(longest >= _LANE_STEPS, 0.0, 1.0)


def ego_progress_v1(reference_m: float, proposal_m: Values, multiplier: Values) -> Values:
    """EP of v1: gated progress over the better of reference and proposal, if that is over 5 m.

    Args:
        reference_m: raw progress of the reference times its own multiplier.
        proposal_m: raw progress of each proposal.
        multiplier: NC x DAC of each proposal.
    """
    gated = proposal_m * multiplier
    best = np.maximum(gated, reference_m)
    far = best > _PROGRESS_LIMIT_M
    ratio = gated / np.where(far, best, 1.0)
    return np.where(far, ratio, np.where(multiplier == 0.0, 0.0, 1.0))


def ego_progress_v2(reference_m: float, proposal_m: Values, multiplier: Values) -> Values:
    """EP of v2: raw progress over the better gated progress, clipped to 1; arguments as in v1."""
    best = np.maximum(proposal_m * multiplier, reference_m)
    far = best > _PROGRESS_LIMIT_M
    return np.where(far, np.clip(proposal_m / np.where(far, best, 1.0), 0.0, 1.0), 1.0)


_PROGRESS_LIMIT_M = 5.0


def _at_fault(
    ego: Footprints,
    areas: EgoAreas,
    tracks: Tracks,
    proposal: Int64[np.ndarray, 'm'],
    track: Int64[np.ndarray, 'm'],
    step: Int64[np.ndarray, 'm'],
) -> Bool[np.ndarray, 'm']:
    rear_axle = ego.states[proposal, step]
    place = tracks.poses[track, step]
    moving = ego.speed_mps[proposal, step] > STOPPED_MPS
    behind = _angle_off_heading(rear_axle, place[:, :2]) > _BEHIND_RAD
    vehicle = ego.vehicle
    yaw = rear_axle[:, simulation.YAW]
    heading = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    bumper = ego.centers[proposal, step] + vehicle.length_m / 2.0 * heading
    front = _boxes_overlap(
        bumper - place[:, :2],
        yaw,
        np.zeros(1),
        np.full(1, vehicle.width_m / 2.0),
        place[:, 2],
        tracks.half_length_m[track],
        tracks.half_width_m[track],
    )
    exposed = areas.multiple_lanes[proposal, step] | areas.non_drivable[proposal, step]
    fault: Bool[np.ndarray, 'm'] = moving & (tracks.stopped[track] | (~behind & (front | exposed)))
    return fault


def _reachable(tracks: Tracks, ego: Footprints, ahead_s: float) -> Tracks:
    # Most of a busy scene is never near any proposal; boxes around whole paths tell.
    reach = float(np.hypot(ego.vehicle.length_m, ego.vehicle.width_m)) / 2.0
    reach += ahead_s * float(ego.speed_mps.max(initial=0.0))
    flat = ego.centers.reshape(-1, 2)
    low, high = flat.min(axis=0) - reach, flat.max(axis=0) + reach
    size = np.hypot(tracks.half_length_m, tracks.half_width_m)[:, None]
    places = np.where(tracks.present[..., None], tracks.poses[..., :2], np.nan)
    near = (places >= low - size[..., None]) & (places <= high + size[..., None])
    return tracks.keep(near.all(axis=-1).any(axis=-1))


def _overlaps(
    centers: Float64[np.ndarray, '...'],
    yaw: Float64[np.ndarray, '...'],
    poses: Float64[np.ndarray, '...'],
    vehicle: Vehicle,
    tracks: Tracks,
    valid: Bool[np.ndarray, '...'],
) -> Bool[np.ndarray, 'n a *s']:
    """Whether the ego's box touches each track's box, for arrays that broadcast together."""
    gap_x = centers[..., 0] - poses[..., 0]
    gap_y = centers[..., 1] - poses[..., 1]
    size = np.hypot(tracks.half_length_m, tracks.half_width_m)
    size = size + np.hypot(vehicle.length_m, vehicle.width_m) / 2.0
    size = size.reshape(1, -1, *[1] * (gap_x.ndim - 2))
    near: Bool[np.ndarray, 'n a *s'] = (gap_x * gap_x + gap_y * gap_y <= size * size) & valid
    at = np.nonzero(near)
    track = at[1]
    near[at] = _boxes_overlap(
        np.stack([gap_x[at], gap_y[at]], axis=-1),
        np.broadcast_to(yaw, near.shape)[at],
        np.full(1, vehicle.length_m / 2.0),
        np.full(1, vehicle.width_m / 2.0),
        np.broadcast_to(poses[..., 2], near.shape)[at],
        tracks.half_length_m[track],
        tracks.half_width_m[track],
    )
    return near


def _boxes_overlap(
    gap: Float64[np.ndarray, 'm 2'],
    yaw_a: Float64[np.ndarray, 'm'],
    length_a: Float64[np.ndarray, '_'],
    width_a: Float64[np.ndarray, '_'],
    yaw_b: Float64[np.ndarray, 'm'],
    length_b: Float64[np.ndarray, 'm'],
    width_b: Float64[np.ndarray, 'm'],
) -> Bool[np.ndarray, 'm']:
    """Separating-axis test of boxes a and b (half sizes), `gap` leading from b to a."""
    cos_a, sin_a, cos_b, sin_b = np.cos(yaw_a), np.sin(yaw_a), np.cos(yaw_b), np.sin(yaw_b)
    cos = np.abs(cos_a * cos_b + sin_a * sin_b)
    sin = np.abs(sin_a * cos_b - cos_a * sin_b)
    x, y = gap[:, 0], gap[:, 1]
    overlap: Bool[np.ndarray, 'm'] = (
        (np.abs(x * cos_a + y * sin_a) <= length_a + length_b * cos + width_b * sin)
        & (np.abs(y * cos_a - x * sin_a) <= width_a + length_b * sin + width_b * cos)
        & (np.abs(x * cos_b + y * sin_b) <= length_b + length_a * cos + width_a * sin)
        & (np.abs(y * cos_b - x * sin_b) <= width_b + length_a * sin + width_a * cos)
    )
    return overlap


def _angle_off_heading(
    rear_axle: Float64[np.ndarray, 'm 11'], place: Float64[np.ndarray, 'm 2']
) -> Float64[np.ndarray, 'm']:
    gap = place - rear_axle[:, :2]
    yaw = rear_axle[:, simulation.YAW]
    along = gap[:, 0] * np.cos(yaw) + gap[:, 1] * np.sin(yaw)
    distance = np.hypot(gap[:, 0], gap[:, 1])
    cos = along / np.where(distance > 0.0, distance, 1.0)
    angle: Float64[np.ndarray, 'm'] = np.arccos(np.clip(cos, -1.0, 1.0))
    return np.where(distance > 0.0, angle, np.nan)


def _first(count: int, proposal: Int64[np.ndarray, 'm'], step: Int64[np.ndarray, 'm']) -> Steps:
    earliest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(earliest, proposal, step)
    return np.where(earliest == np.iinfo(np.int64).max, NEVER, earliest)
