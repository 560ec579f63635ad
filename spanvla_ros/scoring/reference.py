"""PDM-Closed, the rule-based planner whose progress plans are measured against; our own.

Fifteen proposals (three lateral offsets, five target speeds) follow the center line by IDM
against a constant-velocity forecast, are simulated, scored by the very sub-scores plans are
scored by, and the best one is the reference. Rules and parameters are those NAVSIM builds its
metric cache with; its habits that shape scores are kept and said where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Bool, Float64

from spanvla_ros.geometry import world_from_local, wrap_angle
from spanvla_ros.scoring import simulation
from spanvla_ros.scoring.prepared import (
    STOPPED_MPS,
    Areas,
    Ground,
    RedLights,
    Tracks,
    Version,
    box_of,
    prepare_ground,
)
from spanvla_ros.scoring.routes import LaneGraph, Path, centerline_of
from spanvla_ros.scoring.scene import AGENT_KINDS
from spanvla_ros.scoring.subscores import Situation, progress_scores, sub_scores, total
from spanvla_ros.types import Scene, SceneAgent, SpanvlaError, Vehicle

SPEED_FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
LATERAL_OFFSETS_M = (0.0, -1.0, 1.0)

_FALLBACK_MPS = 15.0
_MIN_GAP_M = 1.0
_HEADWAY_S = 1.5
_ACCEL_MPS2 = 1.5
_DECEL_MPS2 = 3.0
_EXPONENT = 10
_FORECAST_STEPS = 50
_FORECAST_EVERY = 2
_RADIUS_M = 100.0
_MOST = {'vehicle': 50, 'pedestrian': 25, 'bicycle': 10}
_MOST_STATIC = 50

Points = Float64[np.ndarray, 'n 2']


@dataclass(frozen=True)
class Reference:
    """What progress is measured against: PDM-Closed's plan, its center line and its route.

    Positions are in the world. `states` are the simulated states of `plan`, `multiplier` the
    product of the reference's own gating scores; where either is None the scorer makes it.
    """

    centerline: Float64[np.ndarray, 'n 2']
    route_lane_ids: tuple[str, ...]
    plan: Float64[np.ndarray, '41 3']
    states: Float64[np.ndarray, '41 11'] | None = None
    multiplier: float | None = None
    source: str = 'given'


@dataclass(frozen=True)
class _Forecast:
    # What is on the road for the next 5 s, as far as can be told at t = 0: objects go straight
    # on at their speed along their heading, lights keep their color. Lights come last.
    tracks: Tracks
    speed_mps: Float64[np.ndarray, 'a']
    lights: Areas
    ignored: Bool[np.ndarray, 'o']
    shapes: list[np.ndarray]
    trees: list[shapely.STRtree]


def pdm_closed(
    scene: Scene, version: Version, vehicle: Vehicle = simulation.PACIFICA
) -> Reference:
    """The reference of a scene by our own PDM-Closed.

    Args:
        scene: the scene; only what is known at t = 0 is used.
        version: whose sub-scores choose among the proposals.
        vehicle: NAVSIM's Pacifica by default.
    """
    origin = np.array([scene.ego.x_m, scene.ego.y_m])
    start = simulation.state_of_ego(scene.ego)
    start[:2] = 0.0
    graph = LaneGraph(scene.map, origin)
    route = graph.repair_route(scene.route, start[:3])
    lanes = graph.lanes_of(route)
    if not lanes:
        raise SpanvlaError(f'scene {scene.name!r:.80}: its route has no lane')
    ground = prepare_ground(scene.map, scene.ego, origin, vehicle)
    forecast = _forecast(scene, origin, start, graph, set(lanes), vehicle)
    lane = _starting_lane(graph, ground, list(lanes), start, vehicle)
    path = graph.path_along(route, lane)
    limit = graph.lanes[lane].speed_limit_mps
    speeds = np.array(SPEED_FRACTIONS) * (_FALLBACK_MPS if limit is None else limit)
    plans = np.concatenate(
        [
            _unroll(path.beside(offset), speeds, forecast, start, vehicle)
            for offset in LATERAL_OFFSETS_M
        ]
    )
    situation = Situation(
        version=version,
        tracks=forecast.tracks.keep(~forecast.ignored[: len(forecast.tracks.ids)]),
        ground=ground,
        red_lights=_red_now(forecast, version),
        on_route=frozenset(lanes),
        centerline=centerline_of(path),
    )
    plan = plans[_best(plans, start, situation, vehicle)]
    plan[:, :2] += origin
    return Reference(path.points + origin, tuple(lanes), plan, source='pdm_closed')


def _best(
    plans: Float64[np.ndarray, 'n 41 3'],
    start: Float64[np.ndarray, '11'],
    situation: Situation,
    vehicle: Vehicle,
) -> int:
    starts = np.broadcast_to(start, (len(plans), simulation.STATE_SIZE))
    scored = sub_scores(simulation.simulate(plans, starts, vehicle), situation, None, vehicle)
    multiplier = scored.multiplier
    best_m = float((scored.progress_m * multiplier).max())
    scores = {**scored.gates, **scored.weighted}
    scores['ep'] = progress_scores(best_m, scored.progress_m, multiplier, situation.version)
    return int(np.argmax(total(scores, situation.version)))


def _starting_lane(
    graph: LaneGraph,
    ground: Ground,
    lanes: list[str],
    start: Float64[np.ndarray, '11'],
    vehicle: Vehicle,
) -> str:
    rear_axle = start[:2]
    tree = shapely.STRtree(ground.lanes.polygons)
    under = [ground.lane_ids[at] for at in tree.query(shapely.Point(rear_axle), 'intersects')]
    under = [lane for lane in under if lane in set(lanes)]
    if under:
        errors = [
            abs(float(wrap_angle(graph.paths[lane].nearest(rear_axle)[1] - start[2])))
            for lane in under
        ]
        return str(under[int(np.argmin(errors))])
    box = shapely.polygons(_footprint(start[:3][None], vehicle)[0])
    center = world_from_local(start[:3], np.array([vehicle.rear_axle_to_center_m, 0.0]))
    closest, nearest = np.inf, lanes[0]
    for lane in lanes:
        polygon = graph.lane_polygons[lane]
        if shapely.contains_xy(polygon, *center):
            return lane
        distance = float(shapely.distance(polygon, box))
        if distance < closest:
            closest, nearest = distance, lane
    return nearest


def _forecast(
    scene: Scene,
    origin: Float64[np.ndarray, '2'],
    start: Float64[np.ndarray, '11'],
    graph: LaneGraph,
    lanes: set[str],
    vehicle: Vehicle,
) -> _Forecast:
    center = world_from_local(start[:3], np.array([vehicle.rear_axle_to_center_m, 0.0]))
    now = [(agent, _state_now(agent, origin)) for agent in scene.agents]
    seen = [(agent, state) for agent, state in now if state is not None]
    agents = _nearest(seen, center)
    poses = np.array([state[:3] for _, state in agents]).reshape(-1, 3)
    velocity = np.array([state[3:] for _, state in agents]).reshape(-1, 2)
    moving = np.array([agent.kind in AGENT_KINDS for agent, _ in agents], dtype=bool)
    speed = np.where(moving, np.hypot(velocity[:, 0], velocity[:, 1]), 0.0)
    # Objects move along their heading, or straight back where they reverse.
    forward = np.abs(wrap_angle(poses[:, 2] - np.arctan2(velocity[:, 1], velocity[:, 0])))
    signed = np.where(forward < np.pi / 2.0, speed, -speed)
    step = np.stack([np.cos(poses[:, 2]) * signed, np.sin(poses[:, 2]) * signed], axis=-1)
    tick = np.arange(_FORECAST_STEPS + _FORECAST_EVERY) // _FORECAST_EVERY
    ahead_s = tick * _FORECAST_EVERY * simulation.STEP_S
    track = np.repeat(poses[:, None], len(tick), axis=1)
    track[..., :2] += step[:, None] * ahead_s[:, None]
    half_length = np.array([agent.length_m / 2.0 for agent, _ in agents])
    half_width = np.array([agent.width_m / 2.0 for agent, _ in agents])
    tracks = Tracks(
        ids=tuple(agent.agent_id for agent, _ in agents),
        poses=track,
        present=np.ones(track.shape[:2], dtype=bool),
        half_length_m=half_length,
        half_width_m=half_width,
        moving_kind=moving,
        stopped=~moving | (speed <= STOPPED_MPS),
    )
    red = [
        light.lane_id
        for light in scene.red_lights
        if light.lane_id in lanes and light.from_s <= 0.0 <= light.to_s
    ]
    lights = Areas.build(graph.lanes[name].polygon - origin for name in red)
    shapes = [
        np.concatenate(
            [shapely.polygons(box_of(track[:, at], half_length, half_width)), lights.polygons]
        )
        for at in range(0, len(tick), _FORECAST_EVERY)
    ]
    box = shapely.polygons(_footprint(start[:3][None], vehicle)[0])
    ignored = shapely.intersects(shapes[0], box)
    ignored[len(agents) :] &= shapely.within(box, lights.polygons)
    trees = [shapely.STRtree(shape) for shape in shapes]
    return _Forecast(tracks, speed, lights, ignored, shapes, trees)


def _state_now(
    agent: SceneAgent, origin: Float64[np.ndarray, '2']
) -> Float64[np.ndarray, '5'] | None:
    shift = np.array([*origin, 0.0, 0.0, 0.0])
    if len(agent.states) == 1:
        return np.asarray(agent.states[0] - shift)
    if not agent.times_s[0] <= 0.0 <= agent.times_s[-1]:
        return None
    states = agent.states.copy()
    states[:, 2] = np.unwrap(states[:, 2])
    now = [np.interp(0.0, agent.times_s, column) for column in states.T]
    return np.asarray(np.array(now) - shift)


def _nearest(
    seen: list[tuple[SceneAgent, np.ndarray]], center: Float64[np.ndarray, '2']
) -> list[tuple[SceneAgent, np.ndarray]]:
    # Static objects first, then vehicles, pedestrians, bicycles, each kind nearest first.
    kinds: dict[str, list[tuple[float, int]]] = {name: [] for name in ('static', *_MOST)}
    for at, (agent, state) in enumerate(seen):
        gap = float(np.hypot(*(state[:2] - center)))
        if gap <= _RADIUS_M:
            kinds[agent.kind if agent.kind in _MOST else 'static'].append((gap, at))
    kept: list[tuple[SceneAgent, np.ndarray]] = []
    for name, found in kinds.items():
        nearest = sorted(found)[: _MOST.get(name, _MOST_STATIC)]
        kept += [seen[at] for _, at in nearest]
    return kept


def _red_now(forecast: _Forecast, version: Version) -> RedLights:
    steps = simulation.STEPS + 1
    if version == 'v1':
        return RedLights(Areas.build([]), np.zeros((0, steps), dtype=bool))
    return RedLights(forecast.lights, np.ones((len(forecast.lights.polygons), steps), dtype=bool))


def _unroll(
    path: Path,
    target_mps: Float64[np.ndarray, 's'],
    forecast: _Forecast,
    start: Float64[np.ndarray, '11'],
    vehicle: Vehicle,
) -> Float64[np.ndarray, 's 41 3']:
    """Plans along one path, one a target speed, by IDM behind whatever is nearest ahead."""
    walk = _Walk.along(path)
    begin_m = float(shapely.line_locate_point(walk.line, shapely.Point(start[:2])))
    progress = np.full(len(target_mps), begin_m)
    speed = np.full(len(target_mps), start[simulation.VX])
    reach_m = abs(float(target_mps.max())) * _FORECAST_STEPS * simulation.STEP_S
    corridor = walk.corridor(begin_m, begin_m + reach_m, vehicle.width_m / 2.0)
    poses = np.empty((len(target_mps), simulation.STEPS + 1, 3))
    poses[:, 0] = walk.at(progress)
    # Until the first look at step 2 the "leader" stands at the start of the path, which makes
    # every proposal brake for one step; the official planner does that too.
    leader = np.zeros((len(target_mps), 3))
    for step in range(1, simulation.STEPS + 1):
        if step % _FORECAST_EVERY == 0:
            leader = _leaders(
                walk, corridor, forecast, step, progress, poses[:, step - 1], vehicle
            )
        change = _idm(progress, speed, leader, target_mps)
        progress = progress + simulation.STEP_S * speed
        speed = speed + simulation.STEP_S * change
        poses[:, step] = walk.at(progress)
    return poses


def _idm(
    progress: Float64[np.ndarray, 's'],
    speed: Float64[np.ndarray, 's'],
    leader: Float64[np.ndarray, 's 3'],
    target_mps: Float64[np.ndarray, 's'],
) -> Float64[np.ndarray, 's']:
    lead_m, lead_mps, lead_rear_m = leader.T
    closing = speed * (speed - lead_mps) / (2.0 * np.sqrt(_ACCEL_MPS2 * _DECEL_MPS2))
    wanted = _MIN_GAP_M + speed * _HEADWAY_S + closing
    gap = np.maximum(lead_m - progress - lead_rear_m, _MIN_GAP_M)
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        free = (speed / target_mps) ** _EXPONENT
    change = _ACCEL_MPS2 * (1.0 - free - (wanted / gap) ** 2)
    change = np.clip(np.nan_to_num(change, nan=-_DECEL_MPS2), -_DECEL_MPS2, _ACCEL_MPS2)
    return np.asarray(change)


def _leaders(
    walk: _Walk,
    corridor: shapely.Polygon,
    forecast: _Forecast,
    step: int,
    progress: Float64[np.ndarray, 's'],
    poses: Float64[np.ndarray, 's 3'],
    vehicle: Vehicle,
) -> Float64[np.ndarray, 's 3']:
    """Per proposal: where its leader is along the path, how fast, and a rear length (m)."""
    shapes = forecast.shapes[step // _FORECAST_EVERY]
    inside = forecast.trees[step // _FORECAST_EVERY].query(corridor, 'intersects')
    inside = inside[~forecast.ignored[inside]]
    along = shapely.line_locate_point(walk.line, shapely.centroid(shapes[inside]))
    boxes = shapely.polygons(_footprint(poses, vehicle))
    found = np.zeros((len(progress), 3))
    # The official planner fills one record for all proposals in turn, so a speed or length
    # left by one of them reaches the next.
    record = np.zeros(3)
    for at, reached in enumerate(progress):
        ahead = inside[along > reached]
        if ahead.size:
            gaps = shapely.distance(boxes[at], shapes[ahead])
            nearest = int(ahead[int(np.argmin(gaps))])
            record[0] = reached + gaps.min()
            if nearest < len(forecast.tracks.ids):
                turn = forecast.tracks.poses[nearest, 0, 2] - poses[at, 2]
                record[1] = forecast.speed_mps[nearest] * np.cos(turn)
        else:
            record[0], record[2] = walk.line.length, vehicle.length_m / 2.0
        found[at] = record
    return found


@dataclass(frozen=True)
class _Walk:
    """A path that can be asked for poses by distance."""

    poses: Float64[np.ndarray, 'n 3']
    along_m: Float64[np.ndarray, 'n']
    line: shapely.LineString

    @staticmethod
    def along(path: Path) -> _Walk:
        step = np.linalg.norm(np.diff(path.points, axis=0), axis=1)
        poses = np.column_stack([path.points, np.unwrap(path.yaw_rad)])
        line = shapely.linestrings(path.points)
        return _Walk(poses, np.concatenate([[0.0], np.cumsum(step)]), line)

    def at(self, progress: Float64[np.ndarray, 's']) -> Float64[np.ndarray, 's 3']:
        distance = np.clip(progress, 1e-5, self.along_m[-1])
        high = np.clip(np.searchsorted(self.along_m, distance), 1, len(self.along_m) - 1)
        low = high - 1
        share = (distance - self.along_m[low]) / (self.along_m[high] - self.along_m[low])
        poses: Float64[np.ndarray, 's 3'] = self.poses[low] + share[:, None] * (
            self.poses[high] - self.poses[low]
        )
        poses[:, 2] = wrap_angle(poses[:, 2])
        return poses

    def corridor(self, start_m: float, end_m: float, half_width_m: float) -> shapely.Polygon:
        start_m, end_m = np.clip([start_m, end_m], 0.0, self.along_m[-1])
        between = (self.along_m >= start_m) & (self.along_m <= end_m)
        points = self.poses[between, :2]
        if len(points) < 2:
            points = self.at(np.array([start_m, end_m]))[:, :2]
        return shapely.buffer(shapely.linestrings(points), half_width_m, cap_style='square')


def _footprint(
    rear_axle: Float64[np.ndarray, 'n 3'], vehicle: Vehicle
) -> Float64[np.ndarray, 'n 4 2']:
    poses = rear_axle.copy()
    ahead = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=-1)
    poses[:, :2] += vehicle.rear_axle_to_center_m * ahead
    return box_of(poses, np.array(vehicle.length_m / 2.0), np.array(vehicle.width_m / 2.0))
