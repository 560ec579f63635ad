"""Drivers that are not the model: the reference that sees all, and two that see nothing.

The reference follows PDM-Closed (Dauner et al. 2023) in kind: the lane's center line, the
intelligent driver model against what lies on it, rolled out over five seconds. Differences: one
proposal instead of fifteen, leads predicted with their present braking, curves limited to
2 m/s2, and a smooth return to the lane from where the ego is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import local_from_world, world_from_local, wrap_angle
from spanvla_ros.model.reasoning import Component, Decision, meta_action
from spanvla_ros.town.road_users import FRONT_M, Car, Pedestrian, idm, takes_lane
from spanvla_ros.town.roads import SPACING_M
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState, Observation, Plan, Trajectory

STEP_S = 0.1
STEPS = 50
TIMES_S = np.arange(1, STEPS + 1) * STEP_S
MAX_ACCEL_MPS2 = 1.5
COMFORT_DECEL_MPS2 = 3.0
HARD_DECEL_MPS2 = 6.5
STOP_BEFORE_LINE_M = 1.0
SIGHT_M = 60.0
PEDESTRIAN_SIGHT_M = 45.0
TURN_SIGHT_M = 40.0
CURVE_PER_M = 1.0 / 70.0
CLEAR_OF_LANE_M = 2.4


@dataclass(frozen=True)
class ReferencePlan:
    """What the reference would do: poses `[50, 3]` in `base_link` each 0.1 s, and why."""

    times_s: Float64[np.ndarray, 't']
    poses: Float64[np.ndarray, 't 3']
    speeds_mps: Float64[np.ndarray, 't']
    components: tuple[Component, ...]
    decision: Decision
    speed_mps: float


@dataclass(frozen=True)
class Obstacle:
    """Something on the lane: bumper-to-bumper `gap_m`, its speed, its braking (negative)."""

    gap_m: float
    speed_mps: float = 0.0
    accel_mps2: float = 0.0


@dataclass(frozen=True)
class Sight:
    """What the reference takes into account now; distances from the ego's front bumper."""

    obstacles: tuple[Obstacle, ...]
    components: tuple[Component, ...]


def reference_plan(world: World) -> ReferencePlan:
    """The reference driver's plan for the world as it is, in `base_link` of the (mirrored) ego."""
    ego = world.state
    sight = look(world)
    along_m, speeds = _speed_profile(world, ego.speed_mps, sight.obstacles)
    poses = _return_to_lane(world, ego, along_m)
    if world.mirror:
        poses = poses * [1.0, -1.0, -1.0]
    return ReferencePlan(
        TIMES_S,
        poses,
        speeds,
        sight.components,
        meta_action(TIMES_S, poses, ego.speed_mps, world.command()),
        ego.speed_mps,
    )


def look(world: World) -> Sight:
    """Obstacles on the ego's lane, and the critical components a driver would name."""
    front = world.ego_s_m + world.vehicle.rear_axle_to_center_m + world.vehicle.length_m / 2
    obstacles: list[Obstacle] = []
    components: list[Component] = []
    for parts in (
        _leads(world, front),
        _people(world, front),
        _lights(world, front),
        _oncoming(world),
    ):
        obstacles += parts[0]
        components += parts[1]
    components += _bends(world, front)
    components += _line_changes(world, front)
    return Sight(tuple(obstacles), tuple(sorted(components, key=lambda c: c.distance_m)))


def _leads(world: World, front: float) -> tuple[list[Obstacle], list[Component]]:
    obstacles, components = [], []
    for car in world.cars:
        gap = car.s_m - car.size[0] / 2 - front
        if not blocks_line(car, world) or not -3.0 <= gap <= SIGHT_M:
            continue
        braking = car.accel_mps2 < -0.4
        obstacles.append(Obstacle(gap, car.speed_mps, car.accel_mps2 if braking else 0.0))
        how = 'stopped' if car.speed_mps < 0.3 else 'braking' if braking else 'steady'
        if car.blinks:
            how = 'merging'
        components.append(Component('lead vehicle', max(gap, 0.0), how))
    nearest = min(components, key=lambda c: c.distance_m, default=None)
    return obstacles, [nearest] if nearest else []


def blocks_line(car: Car, world: World) -> bool:
    """Whether a car ahead is in the way of the line to drive, where it is or a length before.

    A length before: so much sooner the ego's front gets there, when it may still be changing over.
    """
    if not world.around.shifts:
        return takes_lane(car)
    here, before = (world.around.line_at(car.s_m - back)[0] for back in (0.0, FRONT_M + 2.0))
    return takes_lane(car, here, CLEAR_OF_LANE_M) or takes_lane(car, before, CLEAR_OF_LANE_M)


def _people(world: World, front: float) -> tuple[list[Obstacle], list[Component]]:
    obstacles, components = [], []
    for walker in world.pedestrians:
        gap = walker.s_m - 0.4 - front
        if not -1.0 < gap < PEDESTRIAN_SIGHT_M:
            continue
        crossing = in_the_way(walker, world)
        if crossing:
            obstacles.append(Obstacle(gap))
        how = 'crossing' if crossing else 'waiting'
        components.append(Component('pedestrian', max(gap, 0.0), how))
    return obstacles, components


def in_the_way(walker: Pedestrian, world: World) -> bool:
    """Whether a pedestrian is on the road, or stepping onto it, and not yet past the lane."""
    if not walker.walking:
        return False
    past = walker.d_m > CLEAR_OF_LANE_M if walker.left_going else walker.d_m < -CLEAR_OF_LANE_M
    return not past


def _lights(world: World, front: float) -> tuple[list[Obstacle], list[Component]]:
    obstacles, components = [], []
    for light in world.signals:
        gap = world.corridor.junctions[light.junction].stop_m - front
        if not -STOP_BEFORE_LINE_M < gap < SIGHT_M:
            continue
        name = 'stop sign' if light.sign else 'red light' if light.red else 'green light'
        components.append(Component(name, max(gap, 0.0), 'ahead'))
        speed = world.state.speed_mps
        if light.red and speed * speed / (2 * max(gap + 0.3, 0.1)) < HARD_DECEL_MPS2:
            # The follower model halts IDM_GAP_M before what it meets.
            obstacles.append(Obstacle(gap + 2.5 - STOP_BEFORE_LINE_M))
    return obstacles, components


def _oncoming(world: World) -> tuple[list[Obstacle], list[Component]]:
    crossing = world.around.crossing
    if crossing is None or not world.must_yield():
        return [], []
    gap = crossing.in_m - world.ego_s_m
    if gap > SIGHT_M:
        return [], []
    obstacle = Obstacle(gap + 2.5 - STOP_BEFORE_LINE_M)
    to_turn = crossing.start_m - world.ego_s_m - FRONT_M
    on_ring = any(junction.ring is not None for junction in world.corridor.junctions)
    name = 'traffic' if on_ring else 'oncoming car'
    return [obstacle], [Component(name, max(to_turn, 0.0), 'crossing')]


def _bends(world: World, front: float) -> list[Component]:
    components = []
    for junction in world.corridor.junctions:
        gap = junction.start_m - front
        if junction.ring is not None:
            if gap < TURN_SIGHT_M and world.ego_s_m < junction.end_m:
                components.append(Component('roundabout', max(gap, 0.0), 'ahead'))
            continue
        if junction.turn == 'straight' or gap > TURN_SIGHT_M or world.ego_s_m > junction.end_m:
            continue
        side = junction.turn
        if world.mirror:
            side = 'left' if side == 'right' else 'right'
        components.append(Component(f'{side} turn', max(gap, 0.0), 'ahead'))
    if components:
        return components
    start = int(max(world.ego_s_m, 0.0) / SPACING_M)
    ahead = world.corridor.curvature_per_m[start : start + int(35.0 / SPACING_M)]
    sharp = np.flatnonzero(np.abs(ahead) > CURVE_PER_M)
    if len(sharp):
        left = (ahead[sharp[0]] > 0) != world.mirror
        distance = max(float(sharp[0]) * SPACING_M - (front - world.ego_s_m), 0.0)
        components.append(Component('curve', distance, 'left' if left else 'right'))
    return components


def _line_changes(world: World, front: float) -> list[Component]:
    """Why the line leaves the lane's middle: what stands there, or a lane change of the route."""
    places: dict[str, list[float]] = {}
    for thing in world.around.obstructions:
        name = 'parked car' if thing.kind == 'vehicle' else 'construction zone'
        places.setdefault(name, []).append(thing.s_m - front)
    components = []
    for name, gaps in places.items():
        ahead = [gap for gap in gaps if -2.0 < gap < SIGHT_M]
        if ahead:
            components.append(Component(name, max(min(ahead), 0.0), 'ahead'))
    if world.around.shifts and not places:
        shift = world.around.shifts[0]
        gap = shift.start_m - front
        if gap < TURN_SIGHT_M and world.ego_s_m < shift.start_m + 0.7 * shift.ramp_m:
            left = (shift.by_m > 0) != world.mirror
            components.append(Component('lane change', max(gap, 0.0), 'left' if left else 'right'))
    return components


def _speed_profile(
    world: World, speed_mps: float, obstacles: tuple[Obstacle, ...]
) -> tuple[Float64[np.ndarray, 't'], Float64[np.ndarray, 't']]:
    """Distance and speed at each step; plain floats, as this runs hundreds of times a second."""
    limits = world.around.limits_mps
    last = len(limits) - 1
    start_m = world.ego_s_m
    along, speed = 0.0, speed_mps
    seen = [[o.gap_m, o.speed_mps, o.accel_mps2] for o in obstacles]
    out_along, out_speed = [], []
    for _ in range(STEPS):
        place = int((start_m + along + 0.3 * speed) / SPACING_M)
        limit = limits[min(max(place, 0), last)]
        accel = min(max((limit - speed) / 0.6, -COMFORT_DECEL_MPS2), MAX_ACCEL_MPS2)
        for item in seen:
            gap = item[0] - along
            accel = min(accel, idm(speed, max(limit, 1.0), gap, speed - item[1]))
            if item[1] > 0.0:
                faster = max(0.0, item[1] + item[2] * STEP_S)
                item[0] += 0.5 * (item[1] + faster) * STEP_S
                item[1] = faster
        accel = max(accel, -HARD_DECEL_MPS2)
        slower = max(0.0, speed + accel * STEP_S)
        along += 0.5 * (speed + slower) * STEP_S
        speed = slower
        out_along.append(along)
        out_speed.append(speed)
    return np.array(out_along), np.array(out_speed)


def _return_to_lane(
    world: World, ego: EgoState, along_m: Float64[np.ndarray, 't']
) -> Float64[np.ndarray, 't 3']:
    """Poses in the unmirrored `base_link` while the offset decays, heading kept at the start."""
    corridor, around = world.corridor, world.around
    line, line_slope = around.line_at(world.ego_s_m)
    offset = world.ego_d_m - line
    _, _, road_yaw = corridor.place(world.ego_s_m, 0.0)
    slope = math.tan(min(max(float(wrap_angle(ego.yaw_rad - road_yaw)), -0.8), 0.8)) - line_slope
    reach = max(7.0, 1.2 * ego.speed_mps)
    push = slope + offset / reach
    decay = np.exp(-along_m / reach)
    side = (offset + push * along_m) * decay
    turn = (push - (offset + push * along_m) / reach) * decay
    at_m = np.minimum(world.ego_s_m + along_m, corridor.length_m)
    if around.shifts:
        lines = np.array([around.line_at(s) for s in at_m.tolist()])
        side, turn = side + lines[:, 0], turn + lines[:, 1]
    places = corridor.places(at_m, side)
    places[:, 2] += np.arctan(turn)
    return local_from_world(ego.pose, places)


def _plan(
    observation: Observation,
    driver: str,
    number: int,
    poses: Float64[np.ndarray, 't 3'],
    reasoning: str = '',
    decision: str = '',
) -> Plan:
    ego = observation.ego
    return Plan(
        plan_id=number,
        trajectory=Trajectory(
            observation.stamp_ns, 'odom', TIMES_S, world_from_local(ego.pose, poses)
        ),
        origin=(ego.x_m, ego.y_m, ego.yaw_rad),
        image_stamps_ns=tuple(
            None if not frames or frames[-1] is None else frames[-1].stamp_ns
            for frames in observation.frames
        ),
        kv_stamp_ns=observation.stamp_ns,
        schedule='off',
        steps=0,
        speed_mps=ego.speed_mps,
        reasoning=reasoning,
        decision=decision,
        history=tuple(tuple(map(float, pose)) for pose in observation.history),  # type: ignore[misc]
        command=observation.command,
        degraded=observation.degraded,
        driver=driver,
    )


class ReferenceDriver:
    """The reference in the planner's slot; it looks at the world, not at the observation."""

    def __init__(self, world: World) -> None:
        """Drive in `world`."""
        self.world = world
        self._count = 0

    def plan(self, observation: Observation) -> Plan:
        """A plan from the world as it is now."""
        from spanvla_ros.model.reasoning import write_reasoning

        self._count += 1
        reference = reference_plan(self.world)
        return _plan(
            observation,
            'reference_driver',
            self._count,
            reference.poses,
            write_reasoning(reference.components, reference.decision),
            str(reference.decision),
        )


class ConstantVelocity:
    """Straight on at the present speed."""

    def __init__(self) -> None:
        """Nothing to set."""
        self._count = 0

    def plan(self, observation: Observation) -> Plan:
        """The present motion, extended."""
        self._count += 1
        poses = np.zeros((STEPS, 3))
        poses[:, 0] = observation.ego.speed_mps * TIMES_S
        return _plan(observation, 'constant_velocity', self._count, poses)


class BlindRouteFollower:
    """Follows the coarse route at `route_speed_mps`, slower in its bends; sees nothing."""

    def __init__(self, route_speed_mps: float = 9.0) -> None:
        """Drive at `route_speed_mps` where the route is straight."""
        self.route_speed_mps = route_speed_mps
        self._count = 0

    def plan(self, observation: Observation) -> Plan:
        """A plan along a smooth curve through the route's points."""
        self._count += 1
        if observation.route is None or len(observation.route) < 2:
            poses = np.zeros((STEPS, 3))
            poses[:, 0] = observation.ego.speed_mps * TIMES_S
            return _plan(observation, 'blind_route_follower', self._count, poses)
        line = _smooth_line(observation.route)
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
        yaw = np.unwrap(np.arctan2(*np.gradient(line, axis=0).T[::-1]))
        bend = np.abs(np.gradient(yaw, along))
        limit = np.minimum(self.route_speed_mps, np.sqrt(2.0 / np.maximum(bend, 1e-3)))
        speed, s, driven = observation.ego.speed_mps, 0.0, []
        for _ in range(STEPS):
            wish = float(np.interp(s + 0.5 * speed, along, limit))
            speed += min(max((wish - speed) / 0.6, -3.0), MAX_ACCEL_MPS2) * STEP_S
            s += max(speed, 0.0) * STEP_S
            driven.append(s)
        poses = np.stack([np.interp(driven, along, c) for c in (*line.T, yaw)], axis=1)
        return _plan(observation, 'blind_route_follower', self._count, poses)


def _smooth_line(route: Float64[np.ndarray, 'r 2']) -> Float64[np.ndarray, 'n 2']:
    """A cubic Hermite curve from the ego, straight ahead at first, through the route's points."""
    ahead = route[route[:, 0] > -50.0]
    points = np.concatenate([np.zeros((1, 2)), ahead])
    step = np.linalg.norm(np.diff(points, axis=0), axis=1)
    slopes = np.zeros_like(points)
    slopes[0] = [1.0, 0.0]
    slopes[1:-1] = (points[2:] - points[:-2]) / (step[1:] + step[:-1])[:, None]
    slopes[-1] = (points[-1] - points[-2]) / max(step[-1], 1e-6)
    pieces = []
    for i, length in enumerate(step):
        t = np.linspace(0.0, 1.0, max(2, int(length)), endpoint=False)[:, None]
        pieces.append(
            (2 * t**3 - 3 * t**2 + 1) * points[i]
            + (t**3 - 2 * t**2 + t) * length * slopes[i]
            + (-2 * t**3 + 3 * t**2) * points[i + 1]
            + (t**3 - t**2) * length * slopes[i + 1]
        )
    return np.concatenate([*pieces, points[-1:]])
