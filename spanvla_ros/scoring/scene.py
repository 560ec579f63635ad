"""Scenes as JSON objects, and back: the golden layout of NAVSIM-style scoring sets.

Units are m, s, rad. Ego and human poses are of the rear axle, agents' of the box center; all
are in the world frame once read. Every refusal is a `SpanvlaError` whose sentence starts with
the field at fault, such as `agents[3].states[2].x`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import shapely
from jaxtyping import Float64

from spanvla_ros.geometry import world_from_local
from spanvla_ros.types import (
    Scene,
    SceneAgent,
    SceneEgo,
    SceneLane,
    SceneLight,
    SceneMap,
    SceneRoadblock,
    SpanvlaError,
)

AGENT_KINDS = ('vehicle', 'pedestrian', 'bicycle')
STATIC_KINDS = ('traffic_cone', 'barrier', 'czone_sign', 'generic_object', 'static')
HISTORY_TIMES_S = (-1.5, -1.0, -0.5, 0.0)
MAX_AGENTS = 1_000
MAX_STATES = 1_000
MAX_ROADBLOCKS = 5_000
MAX_POINTS = 20_000
MAX_MAGNITUDE = 1e8

_EGO_FIELDS = ('x', 'y', 'heading', 'vx', 'vy', 'ax', 'ay', 'steering_angle', 'yaw_rate')
_EGO_REQUIRED = ('x', 'y', 'heading', 'vx')
_STATE_FIELDS = ('x', 'y', 'heading', 'vx', 'vy')
_AREA_SLACK_M2 = 1e-4


def scene_from_json(raw: object) -> Scene:
    """Read one scene object of the golden layout.

    Args:
        raw: what `json.loads` made of one line of a scenes file.

    Raises:
        SpanvlaError: a field is missing, of the wrong kind, not finite, out of bounds, a polygon
            crosses itself, or an id is there twice. The sentence starts with the field.
    """
    scene = mapping(raw, 'scene')
    ego = ego_from_json(field(scene, 'ego', ''), 'ego')
    road = _map(mapping(field(scene, 'map', ''), 'map'))
    known = {roadblock.roadblock_id for roadblock in road.roadblocks}
    route = tuple(_texts(field(scene, 'route', ''), 'route'))
    if not route:
        raise SpanvlaError('route: is empty, name at least one roadblock')
    for at, name in enumerate(route):
        if name not in known:
            raise SpanvlaError(f'route[{at}]: {name!r} is no roadblock of the map')
    tags = _texts(scene.get('tags') or [], 'tags')
    return Scene(
        name=text(field(scene, 'scene', ''), 'scene'),
        ego=ego,
        map=road,
        route=route,
        agents=_agents(field(scene, 'agents', '')),
        red_lights=_lights(scene.get('red_lights') or [], road),
        ego_history=_history(scene.get('ego_history')),
        human=_human(scene.get('human_trajectory'), ego),
        kind=text(scene.get('kind') or '', 'kind', empty=True),
        tags=tuple(tags),
    )


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """The golden-layout object of a scene, made of lists, numbers and text only."""
    raw: dict[str, Any] = {
        'scene': scene.name,
        'kind': scene.kind,
        'tags': list(scene.tags),
        'ego': _ego_to_json(scene.ego),
        'route': list(scene.route),
        'red_lights': [_light_to_json(light) for light in scene.red_lights],
        'map': {
            'roadblocks': [_roadblock_to_json(roadblock) for roadblock in scene.map.roadblocks],
            'intersections': [ring.tolist() for ring in scene.map.intersections],
            'carparks': [ring.tolist() for ring in scene.map.carparks],
        },
        'agents': [_agent_to_json(agent) for agent in scene.agents],
    }
    if scene.ego_history:
        first = len(HISTORY_TIMES_S) - len(scene.ego_history)
        raw['ego_history'] = [
            {**_ego_to_json(ego), 't': time_s}
            for ego, time_s in zip(scene.ego_history, HISTORY_TIMES_S[first:], strict=True)
        ]
    if scene.human is not None:
        raw['human_trajectory'] = {'hz': 2, 'frame': 'world', 'poses': scene.human.tolist()}
    return raw


def ego_from_json(raw: object, where: str) -> SceneEgo:
    """Read an ego state: `x y heading vx` are required, all else is 0 where it is missing."""
    ego = mapping(raw, where)
    values = [
        number(ego.get(name, None if name in _EGO_REQUIRED else 0.0), f'{where}.{name}')
        for name in _EGO_FIELDS
    ]
    return SceneEgo(*values)


def poses_from_json(
    raw: object, where: str, ego: SceneEgo, rates_hz: Sequence[int]
) -> tuple[int, Float64[np.ndarray, 't 3']]:
    """Read a trajectory object `{hz, frame, poses}`; its first pose is at 1/hz.

    Args:
        raw: the object.
        where: the field it stands in, for error sentences.
        ego: the state whose pose a trajectory of frame `ego` is relative to.
        rates_hz: the rates allowed.

    Returns:
        The rate in Hz and the rear-axle poses in the world frame.
    """
    track = mapping(raw, where)
    rate = field(track, 'hz', where)
    if isinstance(rate, bool) or rate not in rates_hz:
        raise SpanvlaError(f'{where}.hz: {rate!r:.40} is not one of {list(rates_hz)}')
    frame = field(track, 'frame', where)
    if frame not in ('ego', 'world'):
        raise SpanvlaError(f"{where}.frame: {frame!r:.40} is neither 'ego' nor 'world'")
    poses = table(field(track, 'poses', where), f'{where}.poses', 3)
    if len(poses) < 4 * int(rate):
        raise SpanvlaError(
            f'{where}.poses: {len(poses)} poses at {int(rate)} Hz are shorter than 4 s'
        )
    if frame == 'ego':
        poses = world_from_local([ego.x_m, ego.y_m, ego.yaw_rad], poses)
    return int(rate), poses


def mapping(raw: object, where: str) -> dict[str, Any]:
    """`raw` if it is a JSON object, else a refusal."""
    if not isinstance(raw, dict):
        raise SpanvlaError(f'{where}: must be a JSON object')
    return raw


def field(raw: dict[str, Any], name: str, where: str) -> Any:
    """`raw[name]`, else a refusal."""
    if name not in raw:
        raise SpanvlaError(f'{where}.{name}: is missing' if where else f'{name}: is missing')
    return raw[name]


def text(raw: object, where: str, *, empty: bool = False) -> str:
    """`raw` if it is text of at most 256 characters, else a refusal."""
    if not isinstance(raw, str) or len(raw) > 256 or (not raw and not empty):
        raise SpanvlaError(f'{where}: must be text of 1 to 256 characters')
    return raw


def number(raw: object, where: str) -> float:
    """`raw` if it is a finite number below 1e8 in magnitude, else a refusal."""
    if raw is None:
        raise SpanvlaError(f'{where}: is missing')
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise SpanvlaError(f'{where}: {raw!r:.40} is not a number')
    # An integer too large for a float must not reach math.isfinite.
    if abs(raw) > MAX_MAGNITUDE or not math.isfinite(raw):
        raise SpanvlaError(f'{where}: {raw!r:.40} is not a finite number below 1e8')
    return float(raw)


def table(raw: object, where: str, columns: int) -> Float64[np.ndarray, 'n c']:
    """`raw` as an array if it is a list of rows of `columns` finite numbers, else a refusal."""
    rows = sequence(raw, where, MAX_POINTS)
    for at, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != columns:
            raise SpanvlaError(f'{where}[{at}]: must be a list of {columns} numbers')
    return _numbers(
        [value for row in rows for value in row],
        lambda at: f'{where}[{at // columns}][{at % columns}]',
    ).reshape(-1, columns)


def sequence(raw: object, where: str, most: int) -> list[Any]:
    """`raw` if it is a list of at most `most` items, else a refusal."""
    if not isinstance(raw, list):
        raise SpanvlaError(f'{where}: must be a list')
    if len(raw) > most:
        raise SpanvlaError(f'{where}: {len(raw)} items are more than the {most} allowed')
    return raw


def _numbers(values: list[Any], where: Any) -> Float64[np.ndarray, 'n']:
    # The kinds are checked in one sweep first: a map holds tens of thousands of numbers.
    if set(map(type, values)) <= {int, float}:
        try:
            array = np.array(values, dtype=np.float64)
        except OverflowError:
            array = np.array([math.inf])
        if not array.size or np.abs(array).max() <= MAX_MAGNITUDE:
            return array
    return np.array([number(value, where(at)) for at, value in enumerate(values)])


def _texts(raw: object, where: str) -> list[str]:
    items = sequence(raw, where, MAX_POINTS)
    return [text(item, f'{where}[{at}]') for at, item in enumerate(items)]


def _map(raw: dict[str, Any]) -> SceneMap:
    items = sequence(field(raw, 'roadblocks', 'map'), 'map.roadblocks', MAX_ROADBLOCKS)
    if not items:
        raise SpanvlaError('map.roadblocks: is empty, the map holds no road')
    roadblocks = tuple(_roadblock(item, f'map.roadblocks[{at}]') for at, item in enumerate(items))
    _unique((r.roadblock_id for r in roadblocks), 'map.roadblocks', 'roadblock')
    lanes = (lane.lane_id for roadblock in roadblocks for lane in roadblock.lanes)
    _unique(lanes, 'map.roadblocks[].lanes', 'lane')
    areas = {}
    for layer in ('intersections', 'carparks'):
        rings = sequence(raw.get(layer) or [], f'map.{layer}', MAX_ROADBLOCKS)
        areas[layer] = tuple(_ring(ring, f'map.{layer}[{at}]') for at, ring in enumerate(rings))
    return SceneMap(roadblocks, areas['intersections'], areas['carparks'])


def _roadblock(raw: object, where: str) -> SceneRoadblock:
    roadblock = mapping(raw, where)
    kind = field(roadblock, 'type', where)
    if kind not in ('ROADBLOCK', 'ROADBLOCK_CONNECTOR'):
        raise SpanvlaError(f'{where}.type: {kind!r:.40} is no ROADBLOCK or ROADBLOCK_CONNECTOR')
    lanes = sequence(field(roadblock, 'lanes', where), f'{where}.lanes', MAX_ROADBLOCKS)
    if not lanes:
        raise SpanvlaError(f'{where}.lanes: is empty')
    return SceneRoadblock(
        roadblock_id=text(field(roadblock, 'id', where), f'{where}.id'),
        is_connector=kind == 'ROADBLOCK_CONNECTOR',
        polygon=_ring(field(roadblock, 'polygon', where), f'{where}.polygon'),
        lanes=tuple(_lane(lane, f'{where}.lanes[{at}]') for at, lane in enumerate(lanes)),
    )


def _lane(raw: object, where: str) -> SceneLane:
    lane = mapping(raw, where)
    line = table(field(lane, 'centerline', where), f'{where}.centerline', 2)
    if len(line) < 2 or not np.ptp(line, axis=0).any():
        raise SpanvlaError(f'{where}.centerline: needs two distinct points')
    limit = lane.get('speed_limit')
    if limit is not None and number(limit, f'{where}.speed_limit') < 0:
        raise SpanvlaError(f'{where}.speed_limit: must not be negative')
    return SceneLane(
        lane_id=text(field(lane, 'id', where), f'{where}.id'),
        centerline=line,
        polygon=_ring(field(lane, 'polygon', where), f'{where}.polygon'),
        speed_limit_mps=None if limit is None else float(limit),
        successors=tuple(_texts(lane.get('successors') or [], f'{where}.successors')),
    )


def _ring(raw: object, where: str) -> Float64[np.ndarray, 'n 2']:
    ring = table(raw, where, 2)
    if len(np.unique(ring, axis=0)) < 3:
        raise SpanvlaError(f'{where}: a polygon needs three distinct points')
    polygon = shapely.polygons(ring)
    if not polygon.is_valid and _crosses_itself(ring):
        raise SpanvlaError(f'{where}: the polygon crosses itself')
    if polygon.area <= 0:
        raise SpanvlaError(f'{where}: the polygon has no area')
    return ring


def _crosses_itself(ring: Float64[np.ndarray, 'n 2']) -> bool:
    # Rings that merely touch themselves within the rounding of their coordinates occur in real
    # maps and are repaired without loss; a real crossing loses area when it is repaired.
    local = ring - ring.mean(axis=0)
    turned = np.roll(local, -1, axis=0)
    shoelace = 0.5 * abs(float((local[:, 0] * turned[:, 1] - local[:, 1] * turned[:, 0]).sum()))
    repaired = shapely.make_valid(shapely.polygons(local)).area
    kept = shapely.buffer(shapely.polygons(local), 0.0).area
    return bool(max(abs(repaired - shoelace), abs(kept - shoelace)) > _AREA_SLACK_M2)


def _agents(raw: object) -> tuple[SceneAgent, ...]:
    items = sequence(raw, 'agents', MAX_AGENTS)
    agents = tuple(_agent(item, f'agents[{at}]') for at, item in enumerate(items))
    _unique((agent.agent_id for agent in agents), 'agents', 'agent')
    return agents


def _agent(raw: object, where: str) -> SceneAgent:
    agent = mapping(raw, where)
    kind = field(agent, 'type', where)
    if kind not in AGENT_KINDS and kind not in STATIC_KINDS:
        known = ', '.join(AGENT_KINDS + STATIC_KINDS)
        raise SpanvlaError(f'{where}.type: {kind!r:.40} is an unknown agent type; known: {known}')
    size = [number(agent.get(name), f'{where}.{name}') for name in ('length', 'width', 'height')]
    for name, value in zip(('length', 'width', 'height'), size, strict=True):
        if value <= 0:
            raise SpanvlaError(f'{where}.{name}: must be positive')
    raws = sequence(field(agent, 'states', where), f'{where}.states', MAX_STATES)
    if not raws:
        raise SpanvlaError(f'{where}.states: is empty')
    states = [mapping(state, f'{where}.states[{at}]') for at, state in enumerate(raws)]
    names = _STATE_FIELDS if len(states) == 1 else ('t', *_STATE_FIELDS)
    values = _numbers(
        [state.get(name) for state in states for name in names],
        lambda at: f'{where}.states[{at // len(names)}].{names[at % len(names)]}',
    ).reshape(len(states), len(names))
    times_s = np.zeros(1) if len(states) == 1 else values[:, 0]
    if not (np.diff(times_s) > 0).all():
        raise SpanvlaError(f'{where}.states: t must rise strictly')
    agent_id = text(field(agent, 'id', where), f'{where}.id')
    return SceneAgent(agent_id, kind, size[0], size[1], size[2], times_s, values[:, -5:])


def _lights(raw: object, road: SceneMap) -> tuple[SceneLight, ...]:
    lanes = {lane.lane_id for roadblock in road.roadblocks for lane in roadblock.lanes}
    lights = []
    for at, item in enumerate(sequence(raw, 'red_lights', MAX_ROADBLOCKS)):
        where = f'red_lights[{at}]'
        light = mapping(item, where)
        lane_id = text(field(light, 'lane_id', where), f'{where}.lane_id')
        if lane_id not in lanes:
            raise SpanvlaError(f'{where}.lane_id: {lane_id!r} is no lane of the map')
        start, end = light.get('t_from'), light.get('t_to')
        lights.append(
            SceneLight(
                lane_id,
                -math.inf if start is None else number(start, f'{where}.t_from'),
                math.inf if end is None else number(end, f'{where}.t_to'),
            )
        )
    return tuple(lights)


def _history(raw: object) -> tuple[SceneEgo, ...]:
    if raw is None:
        return ()
    items = sequence(raw, 'ego_history', len(HISTORY_TIMES_S))
    if len(items) != len(HISTORY_TIMES_S):
        raise SpanvlaError('ego_history: must hold the states at t -1.5, -1, -0.5 and 0')
    for at, (item, time_s) in enumerate(zip(items, HISTORY_TIMES_S, strict=True)):
        where = f'ego_history[{at}]'
        given_s = number(mapping(item, where).get('t', time_s), f'{where}.t')
        if abs(given_s - time_s) > 1e-3:
            raise SpanvlaError(f'{where}.t: {given_s} is not {time_s}')
    return tuple(ego_from_json(item, f'ego_history[{at}]') for at, item in enumerate(items))


def _human(raw: object, ego: SceneEgo) -> Float64[np.ndarray, 'h 3'] | None:
    if raw is None:
        return None
    return poses_from_json(raw, 'human_trajectory', ego, (2,))[1]


def _unique(ids: Iterable[str], where: str, what: str) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise SpanvlaError(f'{where}: {what} id {name!r} is there twice')
        seen.add(name)


def _ego_to_json(ego: SceneEgo) -> dict[str, float]:
    motion = (ego.vx_mps, ego.vy_mps, ego.ax_mps2, ego.ay_mps2, ego.steering_rad)
    values = (ego.x_m, ego.y_m, ego.yaw_rad, *motion, ego.yaw_rate_radps)
    return dict(zip(_EGO_FIELDS, map(float, values), strict=True))


def _light_to_json(light: SceneLight) -> dict[str, Any]:
    raw: dict[str, Any] = {'lane_id': light.lane_id}
    if math.isfinite(light.from_s):
        raw['t_from'] = light.from_s
    if math.isfinite(light.to_s):
        raw['t_to'] = light.to_s
    return raw


def _roadblock_to_json(roadblock: SceneRoadblock) -> dict[str, Any]:
    return {
        'id': roadblock.roadblock_id,
        'type': 'ROADBLOCK_CONNECTOR' if roadblock.is_connector else 'ROADBLOCK',
        'polygon': roadblock.polygon.tolist(),
        'lanes': [
            {
                'id': lane.lane_id,
                'centerline': lane.centerline.tolist(),
                'polygon': lane.polygon.tolist(),
                'speed_limit': lane.speed_limit_mps,
                'successors': list(lane.successors),
            }
            for lane in roadblock.lanes
        ],
    }


def _agent_to_json(agent: SceneAgent) -> dict[str, Any]:
    states: list[dict[str, float]] = [
        dict(zip(_STATE_FIELDS, map(float, state), strict=True)) for state in agent.states
    ]
    if len(states) > 1:
        states = [{'t': float(t), **state} for t, state in zip(agent.times_s, states, strict=True)]
    return {
        'id': agent.agent_id,
        'type': agent.kind,
        'length': float(agent.length_m),
        'width': float(agent.width_m),
        'height': float(agent.height_m),
        'states': states,
    }
