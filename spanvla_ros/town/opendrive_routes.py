"""Routes along the lanes of an OpenDRIVE map, and such a route as a world of the town."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import arc_length
from spanvla_ros.town.elements import GroundPolygon, Tint
from spanvla_ros.town.opendrive import Link, OpenDriveMap, Road
from spanvla_ros.town.road_users import BrakeEvent, Car
from spanvla_ros.town.roads import SPACING_M, Corridor, CrossSection, Stretch
from spanvla_ros.town.surroundings import Surroundings
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState, SpanvlaError, Vehicle

POINT_STEP_M = 1.0
# Road before the start and beyond the goal, for the past and for what is planned last.
BEFORE_M, BEYOND_M = 30.0, 60.0
SMOOTH_M = 3.0
DEFAULT_LIMIT_MPS = 11.0
LEAD_GAP_M = 35.0
LEAD_STOPS_M = 90.0
PACE_MPS = 4.0


@dataclass(frozen=True)
class LaneRef:
    """One lane of one section, and whether it is driven along the reference line."""

    road_id: str
    section: int
    number: int
    forward: bool


def driving_lanes(found: OpenDriveMap) -> list[LaneRef]:
    """All lanes for driving outside of junctions, in a fixed order."""
    return [
        LaneRef(road.road_id, index, lane.number, road.drives_forward(lane.number))
        for _, road in sorted(found.roads.items())
        if road.junction == '-1'
        for index, section in enumerate(road.sections)
        for lane in section.lanes
        if lane.kind == 'driving' and lane.number
    ]


def successors(found: OpenDriveMap, at: LaneRef) -> list[LaneRef]:
    """The lanes that follow in driving direction."""
    road = found.roads[at.road_id]
    lane = road.sections[at.section].lane(at.number)
    if lane is None:
        return []
    onward = lane.successor if at.forward else lane.predecessor
    next_section = at.section + (1 if at.forward else -1)
    if 0 <= next_section < len(road.sections):
        number = at.number if onward is None else onward
        return _existing(found, LaneRef(at.road_id, next_section, number, at.forward))
    link = road.successor if at.forward else road.predecessor
    if link is None:
        return []
    if link.kind == 'road':
        return [] if onward is None else _entered(found, link, onward)
    ways = []
    for connection in found.connections.get(link.road_id, ()):
        if connection.incoming == at.road_id:
            way = Link('road', connection.connecting, connection.contact)
            for from_lane, to_lane in connection.lanes:
                if from_lane == at.number:
                    ways += _entered(found, way, to_lane)
    return ways


def _entered(found: OpenDriveMap, link: Link, number: int) -> list[LaneRef]:
    road = found.roads.get(link.road_id)
    if road is None:
        return []
    forward = link.contact == 'start'
    return _existing(
        found, LaneRef(road.road_id, 0 if forward else len(road.sections) - 1, number, forward)
    )


def _existing(found: OpenDriveMap, at: LaneRef) -> list[LaneRef]:
    lane = found.roads[at.road_id].sections[at.section].lane(at.number)
    return [at] if lane is not None and lane.kind == 'driving' else []


def lane_line(road: Road, at: LaneRef) -> Float64[np.ndarray, 'n 2']:
    """The middle of a lane in driving direction, a point about each `POINT_STEP_M`."""
    section = road.sections[at.section]
    count = max(2, math.ceil((section.end_m - section.start_m) / POINT_STEP_M) + 1)
    s = np.linspace(section.start_m, section.end_m, count)
    return road.center(section, at.number, s if at.forward else s[::-1])


def draw_route(
    found: OpenDriveMap, seed: int, length_m: float
) -> tuple[Float64[np.ndarray, 'n 2'], float]:
    """A route of at least that length from a random lane, turning at random.

    Returns:
        Points in the middle of its lanes, and the lowest speed limit along it in m/s.

    Raises:
        SpanvlaError: no lane of the map leads so far.
    """
    rng = np.random.default_rng([seed, 77])
    lanes = driving_lanes(found)
    for _ in range(200):
        if not lanes:
            break
        at = lanes[int(rng.integers(len(lanes)))]
        points: list[Float64[np.ndarray, 'n 2']] = []
        limits, total_m = [], 0.0
        while total_m < length_m:
            road = found.roads[at.road_id]
            line = lane_line(road, at)
            points.append(line)
            limits.append(road.speed_mps or DEFAULT_LIMIT_MPS)
            total_m += float(arc_length(line)[-1])
            ways = successors(found, at)
            if not ways:
                break
            at = ways[int(rng.integers(len(ways)))]
        if total_m >= length_m:
            joined = np.concatenate(points)
            keep = np.concatenate([[True], np.hypot(*np.diff(joined, axis=0).T) > 0.05])
            return joined[keep], min(limits)
    raise SpanvlaError(f'{found.name}: no lane leads {length_m:g} m')


def route_corridor(points: Float64[np.ndarray, 'n 2']) -> Corridor:
    """A corridor of one lane, and one for oncoming traffic, along route points."""
    along = arc_length(points)
    s = np.arange(0.0, along[-1], SPACING_M)
    x, y = (np.interp(s, along, column) for column in points.T)
    width = max(3, round(SMOOTH_M / SPACING_M)) | 1
    kernel = np.ones(width) / width
    for _ in range(2):
        # Lanes of two roads meet within a hand's breadth; a corridor has no such step.
        x, y = (np.convolve(np.pad(v, width // 2, 'reflect', reflect_type='odd'), kernel, 'valid')
                for v in (x, y))  # fmt: skip
    yaw = np.unwrap(np.arctan2(np.gradient(y), np.gradient(x)))
    curvature = np.gradient(yaw, SPACING_M)
    stretch = Stretch(0.0, (len(x) - 1) * SPACING_M, CrossSection(0, 0, 1))
    return Corridor(x, y, yaw, curvature, (stretch,), ())


def route_world(
    found: OpenDriveMap,
    ground: tuple[GroundPolygon, ...],
    seed: int,
    drive_m: float,
    vehicle: Vehicle,
) -> World:
    """A world of the town on a map's lanes: a route, a car ahead that stops once, one oncoming.

    Args:
        found: the map.
        ground: the whole map as painted ground.
        seed: draws route and traffic.
        drive_m: from start to goal.
        vehicle: the ego's.
    """
    points, limit_mps = draw_route(found, seed, BEFORE_M + drive_m + BEYOND_M)
    corridor = route_corridor(points)
    rng = np.random.default_rng([seed, 78])
    size, pace_mps = (4.6, 1.9, 1.6), 0.75 * limit_mps
    lead = Car(
        'car_lead', BEFORE_M + LEAD_GAP_M, 0.0, 0.0, pace_mps, size, (60, 90, 170), reacts=True,
        events=(BrakeEvent(BEFORE_M + LEAD_STOPS_M, 40.0, 3.0, 0.0, 3.0),),
    )  # fmt: skip
    place_m = BEFORE_M + float(rng.uniform(80.0, 160.0))
    oncoming = Car('car_oncoming', place_m, 0.0, pace_mps, pace_mps, size, (170, 60, 60),
                   opposing_lane=0)  # fmt: skip
    around = Surroundings(
        corridor=corridor,
        ground=ground,
        houses=(),
        tint=Tint(),
        route_points=points,
        limits_mps=tuple(np.full(len(corridor.x_m), limit_mps).tolist()),
        speed_limit_mps=limit_mps,
        start_m=BEFORE_M,
        goal_m=BEFORE_M + drive_m,
        time_limit_s=drive_m / PACE_MPS + 40.0,
        family=f'map:{found.name}',
        seed=seed,
    )
    x, y, yaw = corridor.place(BEFORE_M, 0.0)
    ego = EgoState(0, x, y, (yaw + math.pi) % (2 * math.pi) - math.pi, 0.0)
    return World(around, vehicle, [lead, oncoming], [], [], ego)
