"""All of a scene that scoring needs, as arrays made once: tracks at 10 Hz, areas, red lights.

Everything is shifted by `origin` (the ego's rear axle), so that maps with coordinates of
millions of meters lose no precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from jaxtyping import Bool, Float64

from spanvla_ros.geometry import arc_length, interpolate_poses, world_from_local, wrap_angle
from spanvla_ros.scoring import simulation
from spanvla_ros.scoring.scene import AGENT_KINDS
from spanvla_ros.types import Scene, SceneAgent, SceneEgo, SceneMap, Vehicle

Version = Literal['v1', 'v2']
VERSIONS: tuple[Version, ...] = ('v1', 'v2')
MAP_RADIUS_M = 100.0
STOPPED_MPS = 0.05

_SAMPLE_STEPS = 5
_HORIZON_SAMPLES = {'v1': 10, 'v2': 8}
_HISTORY_STEPS = 14


@dataclass(frozen=True)
class Tracks:
    """Boxes of other road users at 10 Hz from t = 0, 5 s long in v1 and 4 s in v2.

    `moving_kind` is true for vehicles, pedestrians and bicycles. `stopped` and `speed_mps` are
    those of the first sample at which the object is seen, as the official collision rules use.
    """

    ids: tuple[str, ...]
    poses: Float64[np.ndarray, 'a t 3']
    present: Bool[np.ndarray, 'a t']
    half_length_m: Float64[np.ndarray, 'a']
    half_width_m: Float64[np.ndarray, 'a']
    moving_kind: Bool[np.ndarray, 'a']
    stopped: Bool[np.ndarray, 'a']

    def keep(self, mask: Bool[np.ndarray, 'a']) -> Tracks:
        """The tracks where `mask` is true."""
        return Tracks(
            tuple(name for name, kept in zip(self.ids, mask, strict=True) if kept),
            self.poses[mask],
            self.present[mask],
            self.half_length_m[mask],
            self.half_width_m[mask],
            self.moving_kind[mask],
            self.stopped[mask],
        )


@dataclass(frozen=True)
class Areas:
    """Polygons and their bounding boxes (x low, y low, x high, y high)."""

    polygons: np.ndarray
    bounds: Float64[np.ndarray, 'p 4']

    @staticmethod
    def build(rings: Iterable[Float64[np.ndarray, '_ 2']]) -> Areas:
        """Areas of rings; a ring that touches itself is repaired by a zero-width buffer."""
        polygons = np.array([shapely.polygons(ring) for ring in rings], dtype=object)
        if not polygons.size:
            return Areas(polygons, np.zeros((0, 4)))
        broken = ~shapely.is_valid(polygons)
        polygons[broken] = shapely.buffer(polygons[broken], 0.0)
        shapely.prepare(polygons)
        return Areas(polygons, shapely.bounds(polygons))

    def keep(self, mask: Bool[np.ndarray, 'p']) -> Areas:
        """The areas where `mask` is true."""
        return Areas(self.polygons[mask], self.bounds[mask])

    def contains(self, points: Float64[np.ndarray, '*m 2']) -> Bool[np.ndarray, 'p *m']:
        """Which areas hold which points in their interior; a point on an edge is outside."""
        x, y = points[..., 0], points[..., 1]
        inside = np.zeros((len(self.polygons), *x.shape), dtype=bool)
        for at in self._near(points):
            x_low, y_low, x_high, y_high = self.bounds[at]
            maybe = (x >= x_low) & (x <= x_high) & (y >= y_low) & (y <= y_high)
            if maybe.any():
                inside[at][maybe] = shapely.contains_xy(self.polygons[at], x[maybe], y[maybe])
        return inside

    def any_contains(self, points: Float64[np.ndarray, '*m 2']) -> Bool[np.ndarray, '*m']:
        """Whether any area holds each point in its interior."""
        x, y = points[..., 0], points[..., 1]
        inside = np.zeros(x.shape, dtype=bool)
        for at in self._near(points):
            x_low, y_low, x_high, y_high = self.bounds[at]
            maybe = (x >= x_low) & (x <= x_high) & (y >= y_low) & (y <= y_high) & ~inside
            if maybe.any():
                inside[maybe] = shapely.contains_xy(self.polygons[at], x[maybe], y[maybe])
        return inside

    def _near(self, points: Float64[np.ndarray, '*m 2']) -> Sequence[int]:
        if not len(self.polygons) or not points.size:
            return []
        flat = points.reshape(-1, 2)
        low, high = flat.min(axis=0), flat.max(axis=0)
        hit = (self.bounds[:, :2] <= high).all(axis=1) & (self.bounds[:, 2:] >= low).all(axis=1)
        return [int(at) for at in np.flatnonzero(hit)]


@dataclass(frozen=True)
class RedLights:
    """Areas of on-route lanes and, for each, the 41 steps at which it shows red."""

    areas: Areas
    red: Bool[np.ndarray, 'l 41']


@dataclass(frozen=True)
class Ground:
    """The map near the ego: lanes, what may be driven on, intersections."""

    lane_ids: tuple[str, ...]
    lanes: Areas
    drivable: Areas
    intersections: Areas


@dataclass(frozen=True)
class Centerline:
    """The path along which progress and lane keeping are measured."""

    points: Float64[np.ndarray, 'n 2']
    line: shapely.LineString

    @staticmethod
    def build(points: Float64[np.ndarray, 'n 2']) -> Centerline:
        """A center line of at least two points."""
        line = shapely.linestrings(points)
        shapely.prepare(line)
        return Centerline(points, line)

    @property
    def length_m(self) -> float:
        """The arc length."""
        return float(arc_length(self.points)[-1])


@dataclass(frozen=True)
class PreparedScene:
    """One scene, ready for scoring by one version; positions are relative to `origin`."""

    version: Version
    origin: Float64[np.ndarray, '2']
    start: Float64[np.ndarray, '11']
    tracks: Tracks
    ground: Ground
    red_lights: RedLights
    history: Float64[np.ndarray, '14 11'] | None
    human: Float64[np.ndarray, 'h 3'] | None


def prepare(
    scene: Scene, version: Version, vehicle: Vehicle = simulation.PACIFICA
) -> PreparedScene:
    """Everything of `scene` that does not depend on a plan."""
    origin = np.array([scene.ego.x_m, scene.ego.y_m])
    start = simulation.state_of_ego(scene.ego)
    start[:2] = 0.0
    tracks = prepare_tracks(scene.agents, version, origin)
    if version == 'v2':
        tracks = _drop_overlapping(tracks, start, vehicle)
    human = None
    if scene.human is not None:
        human = scene.human - [*origin, 0.0]
    return PreparedScene(
        version=version,
        origin=origin,
        start=start,
        tracks=tracks,
        ground=prepare_ground(scene.map, scene.ego, origin, vehicle),
        red_lights=_red_lights(scene, origin, version),
        history=_history(scene, origin) if version == 'v2' else None,
        human=human,
    )


def prepare_tracks(
    agents: Sequence[SceneAgent], version: Version, origin: Float64[np.ndarray, '2']
) -> Tracks:
    """Agents sampled at 2 Hz over the horizon of `version`, then drawn out to 10 Hz.

    An object seen at a single sample stands at that pose at all times, as in the official code.
    """
    samples = _HORIZON_SAMPLES[version]
    steps = samples * _SAMPLE_STEPS + 1
    rows = [_track(agent, samples, origin) for agent in agents]
    seen = [(agent, row) for agent, row in zip(agents, rows, strict=True) if row is not None]
    return Tracks(
        ids=tuple(agent.agent_id for agent, _ in seen),
        poses=np.array([row[0] for _, row in seen]).reshape(-1, steps, 3),
        present=np.array([row[1] for _, row in seen], dtype=bool).reshape(-1, steps),
        half_length_m=np.array([agent.length_m / 2.0 for agent, _ in seen]),
        half_width_m=np.array([agent.width_m / 2.0 for agent, _ in seen]),
        moving_kind=np.array([agent.kind in AGENT_KINDS for agent, _ in seen], dtype=bool),
        stopped=np.array(
            [agent.kind not in AGENT_KINDS or row[2] <= STOPPED_MPS for agent, row in seen],
            dtype=bool,
        ),
    )


def _track(
    agent: SceneAgent, samples: int, origin: Float64[np.ndarray, '2']
) -> tuple[Float64[np.ndarray, 't 3'], Bool[np.ndarray, 't'], float] | None:
    steps = samples * _SAMPLE_STEPS + 1
    poses = agent.states[:, :3] - [*origin, 0.0]
    if len(agent.states) == 1:
        still = np.broadcast_to(poses[0], (steps, 3))
        return still, np.ones(steps, dtype=bool), float(np.hypot(*agent.states[0, 3:]))
    at_s = np.arange(samples + 1) * 0.5
    seen = np.flatnonzero((at_s >= agent.times_s[0]) & (at_s <= agent.times_s[-1]))
    if not seen.size:
        return None
    first, last = int(seen[0]), int(seen[-1])
    sampled = interpolate_poses(agent.times_s, poses, at_s[first : last + 1])
    velocity = [np.interp(at_s[first], agent.times_s, agent.states[:, axis]) for axis in (3, 4)]
    speed = float(np.hypot(velocity[0], velocity[1]))
    if first == last:
        return np.broadcast_to(sampled[0], (steps, 3)), np.ones(steps, dtype=bool), speed
    track = interpolate_poses(
        np.arange(first, last + 1) * _SAMPLE_STEPS, sampled, np.arange(steps, dtype=np.float64)
    )
    step = np.arange(steps)
    present = (step >= first * _SAMPLE_STEPS) & (step <= last * _SAMPLE_STEPS)
    return track, present, speed


def prepare_ground(
    road: SceneMap, ego: SceneEgo, origin: Float64[np.ndarray, '2'], vehicle: Vehicle
) -> Ground:
    """The map objects within 100 m of the ego's center, by layer."""
    pose = np.array([ego.x_m - origin[0], ego.y_m - origin[1], ego.yaw_rad])
    center = shapely.Point(world_from_local(pose, np.array([vehicle.rear_axle_to_center_m, 0.0])))
    blocks = Areas.build(block.polygon - origin for block in road.roadblocks)
    near = shapely.distance(blocks.polygons, center) <= MAP_RADIUS_M
    kept = [block for block, is_near in zip(road.roadblocks, near, strict=True) if is_near]
    lanes = [lane for block in kept for lane in block.lanes]
    own = np.array([not block.is_connector for block in road.roadblocks], dtype=bool)
    crossings = _near_areas(road.intersections, origin, center)
    others = [blocks.keep(near & own), crossings, _near_areas(road.carparks, origin, center)]
    return Ground(
        lane_ids=tuple(lane.lane_id for lane in lanes),
        lanes=Areas.build(lane.polygon - origin for lane in lanes),
        drivable=Areas(
            np.concatenate([area.polygons for area in others]),
            np.concatenate([area.bounds for area in others]),
        ),
        intersections=crossings,
    )


def _near_areas(
    rings: Sequence[Float64[np.ndarray, '_ 2']],
    origin: Float64[np.ndarray, '2'],
    center: shapely.Point,
) -> Areas:
    areas = Areas.build(ring - origin for ring in rings)
    return areas.keep(shapely.distance(areas.polygons, center) <= MAP_RADIUS_M)


def _drop_overlapping(
    tracks: Tracks, start: Float64[np.ndarray, '11'], vehicle: Vehicle
) -> Tracks:
    # v2's log replay takes whatever overlaps the ego at t = 0 out of the world for good.
    ego = shapely.polygons(_box(start[:3], vehicle))
    boxes = shapely.polygons(box_of(tracks.poses[:, 0], tracks.half_length_m, tracks.half_width_m))
    return tracks.keep(~(shapely.intersects(boxes, ego) & tracks.present[:, 0]))


def _box(rear_axle: Float64[np.ndarray, '3'], vehicle: Vehicle) -> Float64[np.ndarray, '4 2']:
    center = world_from_local(rear_axle, np.array([vehicle.rear_axle_to_center_m, 0.0, 0.0]))
    half = np.array([vehicle.length_m / 2.0]), np.array([vehicle.width_m / 2.0])
    box: Float64[np.ndarray, '4 2'] = box_of(center[None], *half)[0]
    return box


def box_of(
    poses: Float64[np.ndarray, '*a 3'],
    half_length_m: Float64[np.ndarray, '*b'],
    half_width_m: Float64[np.ndarray, '*b'],
) -> Float64[np.ndarray, '*a 4 2']:
    """Corners of boxes by center pose: front-left, rear-left, rear-right, front-right."""
    cos, sin = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    along = np.stack([half_length_m * cos, half_length_m * sin], axis=-1)
    across = np.stack([-half_width_m * sin, half_width_m * cos], axis=-1)
    center = poses[..., :2]
    return np.stack(
        [
            center + along + across,
            center - along + across,
            center - along - across,
            center + along - across,
        ],
        axis=-2,
    )


def _red_lights(scene: Scene, origin: Float64[np.ndarray, '2'], version: Version) -> RedLights:
    steps = simulation.STEPS + 1
    route = set(scene.route)
    rings = {
        lane.lane_id: lane.polygon
        for block in scene.map.roadblocks
        if block.roadblock_id in route
        for lane in block.lanes
    }
    lights = [light for light in scene.red_lights if light.lane_id in rings]
    if version == 'v1' or not lights:
        return RedLights(Areas.build([]), np.zeros((0, steps), dtype=bool))
    sample_s = (np.arange(steps) // _SAMPLE_STEPS) * 0.5
    red = [(sample_s >= light.from_s) & (sample_s <= light.to_s) for light in lights]
    areas = Areas.build(rings[light.lane_id] - origin for light in lights)
    return RedLights(areas, np.array(red))


def _history(scene: Scene, origin: Float64[np.ndarray, '2']) -> Float64[np.ndarray, '14 11']:
    """Past states at -1.5 .. -0.2 s; without a recorded past, constant velocity straight back.

    Interpolated states know no yaw rate and no yaw acceleration, and the official slice drops
    the sample at -0.1 s as well.
    """
    if scene.ego_history:
        states = np.stack([simulation.state_of_ego(ego) for ego in scene.ego_history])
        states[:, :2] -= origin
    else:
        states = np.repeat(simulation.state_of_ego(scene.ego)[None], 4, axis=0)
        back_s = np.array([-1.5, -1.0, -0.5, 0.0])
        velocity = world_from_local(
            [0.0, 0.0, scene.ego.yaw_rad], np.array([scene.ego.vx_mps, scene.ego.vy_mps])
        )
        states[:, :2] = back_s[:, None] * velocity
        states[:, simulation.AX] = 0.0
    known_s = np.arange(len(states)) * 0.5
    states[:, 2] = np.unwrap(states[:, 2])
    at_s = np.arange(_HISTORY_STEPS) * simulation.STEP_S
    past = np.stack([np.interp(at_s, known_s, column) for column in states.T], axis=1)
    past[:, 2] = wrap_angle(past[:, 2])
    past[:, [simulation.STEERING_RATE, simulation.YAW_RATE, simulation.YAW_ACCEL]] = 0.0
    return past
