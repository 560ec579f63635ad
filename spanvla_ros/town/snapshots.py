"""Labelled moments cut from reference drives, and pairs with and without a hazard.

The past handed to a model is mostly drawn independently of what lies ahead: a history that shows
the braking would teach it to copy instead of to look.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Float64

from spanvla_ros.geometry import local_from_world
from spanvla_ros.town.driver import (
    PEDESTRIAN_SIGHT_M,
    SIGHT_M,
    ReferencePlan,
    blocks_line,
    in_the_way,
    reference_plan,
)
from spanvla_ros.town.mirror import flip_scene
from spanvla_ros.town.road_users import FRONT_M, STOOD_MPS, STOOD_WITHIN_M
from spanvla_ros.town.roads import LANE_WIDTH_M, SPACING_M
from spanvla_ros.town.scenarios import HAZARDS, MIX, Ranges, make_world
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState, Scene, SceneAgent

HISTORY_S = (-1.5, -1.0, -0.5)
TICK_S = 0.1
STRIDE_S = 0.3
PAIR_SPEED_MPS = 1.0
FACTS = 14
PAIR_KINDS = ('lead', 'light', 'pedestrian')
NEW_PAIR_KINDS = tuple(kind for kind in HAZARDS.values() if kind not in PAIR_KINDS)
WIDE_OFFSET_M, WIDE_HEADING_SD_RAD = 1.5, 0.05

Past = TypeVar('Past')


@dataclass(frozen=True)
class Snapshot:
    """One labelled moment: the world at it (an own copy), the past, and the reference's plan.

    `history` holds poses `[3, 3]` in `base_link` at -1.5, -1.0 and -0.5 s. `earlier` are copies of
    the world at these times, for the pictures taken there from those poses: what others did is
    what they did, wherever the ego is told to have been. Moments drawn without `earlier`, those
    of a driver's own drive and those after a mistake have none.
    """

    world: World
    ego: EgoState
    history: Float64[np.ndarray, '3 3']
    plan: ReferencePlan
    consistent_history: bool = False
    earlier: tuple[World, ...] = ()


@dataclass(frozen=True)
class HazardPair:
    """The same moment with its hazard and without it, all else equal."""

    kind: str
    present: Snapshot
    absent: Snapshot


@dataclass(frozen=True)
class _Moment:
    world: World
    past: Float64[np.ndarray, '3 3']
    weight: float
    earlier: tuple[World, ...]


def sample_snapshots(
    family: str,
    seed: int,
    count: int = 5,
    ranges: Ranges | None = None,
    wide_share: float = 0.0,
    *,
    earlier: bool = False,
) -> list[Snapshot]:
    """Labelled moments of one drive, those with something to see drawn more often.

    Args:
        family: one of `FAMILIES` or `mix`.
        seed: the drive's seed; also that of the perturbations.
        count: how many moments, fewer if the drive is too short.
        ranges: what the drive is drawn from.
        wide_share: of the moments, far beside the line and heading back to it.
        earlier: also keep the world at the times of the history, for pictures of then.
    """
    ranges = ranges or Ranges()
    rng = np.random.default_rng([seed, 7])
    wide = np.random.default_rng([seed, 13])
    moments = _drive_through(make_world(family, seed, ranges), rng, earlier=earlier)
    weights = np.array([m.weight for m in moments])
    count = min(count, len(moments))
    picked = rng.choice(len(moments), size=count, replace=False, p=weights / weights.sum())
    return [
        perturbed(moments[i], rng, ranges, wide if wide.random() < wide_share else None)
        for i in sorted(picked.tolist())
    ]


def _drive_through(world: World, rng: np.random.Generator, *, earlier: bool) -> list[_Moment]:
    """The reference's own motion without a follower, a moment each `STRIDE_S`."""
    limit_s = 60.0 if world.around.family != MIX else 400.0
    track = [world.state.pose]
    moments = []
    world = world.clone()
    # A copy each tick costs a tenth of the drawing.
    lately = deque([world.clone()] if earlier else [], maxlen=1 - round(HISTORY_S[0] / TICK_S))
    while world.ego_s_m < world.around.goal_m and world.time_s < limit_s:
        plan = reference_plan(world)
        past = local_from_world(track[-1], np.array(_at_history(track)))
        before = tuple(_at_history(lately)) if earlier else ()
        moments.append(_Moment(world.clone(), past, moment_weight(world, plan), before))
        steps = round(STRIDE_S / TICK_S)
        start = world.state
        if start.speed_mps < 0.05 and plan.speeds_mps[9] < 0.05 and rng.random() < 0.5:
            steps *= 2
        sign = -1.0 if world.mirror else 1.0
        cos, sin = math.cos(start.yaw_rad), math.sin(start.yaw_rad)
        for index in range(steps):
            x, y, yaw = plan.poses[index].tolist()
            last = world.state
            speed = float(plan.speeds_mps[index])
            heading = start.yaw_rad + sign * yaw
            state = EgoState(
                last.stamp_ns + 100_000_000,
                start.x_m + cos * x - sin * sign * y,
                start.y_m + sin * x + cos * sign * y,
                (heading + math.pi) % (2 * math.pi) - math.pi,
                speed,
                (speed - last.speed_mps) / 0.1,
                math.sin(heading - last.yaw_rad) / 0.1,
            )
            world.place_ego(state)
            world.advance(0.1)
            track.append(state.pose)
            if earlier:
                lately.append(world.clone())
    return moments


def _at_history(track: Sequence[Past]) -> list[Past]:
    """What stood in a track at the history's times; before its first, all stood still."""
    return [track[max(len(track) - 1 + round(t / TICK_S), 0)] for t in HISTORY_S]


def moment_weight(world: World, plan: ReferencePlan) -> float:
    """How often a moment is drawn: more often where there is something to see."""
    weight = 0.4
    for component in plan.components:
        name, how = component.kind, component.behaviour
        near = component.distance_m < 45.0
        slowing_lead = name == 'lead vehicle' and near and how != 'steady'
        if slowing_lead or (name == 'pedestrian' and how == 'crossing'):
            weight += 4.0
        elif name in ('red light', 'stop sign') and near:
            weight += 1.2
        elif name in ('construction zone', 'parked car', 'lane change', 'oncoming car'):
            weight += 0.8
        elif name in ('lead vehicle', 'green light') and near:
            weight += 0.4
        elif name in ('left turn', 'right turn', 'curve', 'pedestrian'):
            weight += 0.3
    if world.state.speed_mps < 0.2:
        starting = plan.speeds_mps[19] > 1.0
        weight += 2.0 if starting else 0.5
    return weight


def perturbed(
    moment: _Moment,
    rng: np.random.Generator,
    ranges: Ranges,
    wide: np.random.Generator | None = None,
) -> Snapshot:
    """The moment with the ego moved off the line, at another speed, with its past redrawn.

    With `wide`, which draws how, it stands anywhere in its lane and heads back to the line: far
    beside it and heading away, no picture tells whose lane that is.
    """
    world = moment.world.clone()
    ego = world.state
    cap = _stoppable_mps(world)
    draws = rng.random(4)
    side, turn, accel = rng.normal(size=3) * (
        ranges.lateral_offset_sd_m, ranges.heading_sd_rad, ranges.history_accel_sd_mps2,
    )  # fmt: skip
    redrawn = min(float(rng.uniform(*ranges.snapshot_speed_mps)), cap)
    noise = rng.normal(size=(3, 2)) * ranges.history_noise_sd_m
    consistent = draws[0] < ranges.consistent_history_share
    speed = ego.speed_mps
    if speed > 0.2 and not consistent and draws[1] > ranges.own_speed_share:
        speed = redrawn
    if draws[3] < ranges.standstill_share and not consistent:
        speed = 0.0
    side = float(np.clip(side, -1.1, 1.1))
    if wide is not None:
        side = float(wide.uniform(-WIDE_OFFSET_M, WIDE_OFFSET_M))
        turn = -math.copysign(abs(wide.normal()) * WIDE_HEADING_SD_RAD, side)
    gaps = (o.s_m - world.ego_s_m for o in world.around.obstructions)
    if any(-8.0 < gap < 25.0 for gap in gaps):
        # Between cones there is no room to be elsewhere.
        side, turn = 0.3 * side, 0.3 * turn
    side -= world.beside_line_m
    if speed < 0.2:
        # A standing car lies as it drove up: nearly straight.
        side, turn = 0.4 * side, 0.4 * turn
    road_yaw = world.corridor.place(world.ego_s_m, 0.0)[2]
    bend = world.corridor.curvature_at(world.ego_s_m)
    moved = replace(
        ego,
        x_m=ego.x_m - math.sin(road_yaw) * side,
        y_m=ego.y_m + math.cos(road_yaw) * side,
        yaw_rad=(ego.yaw_rad + turn + math.pi) % (2 * math.pi) - math.pi,
        speed_mps=speed,
        steering_rad=math.atan(bend * world.vehicle.wheelbase_m),
    )
    if consistent:
        history = moment.past.copy()
    else:
        if speed < 0.2 and draws[2] < 0.7:
            accel = 0.0
        history = _independent_past(world, speed, float(accel))
        moved = replace(moved, accel_mps2=float(accel), yaw_rate_radps=speed * bend)
    if speed > 0.2 or abs(history[0, 0]) > 0.3:
        history[:, :2] += noise
    world.place_ego(moved)
    _heed_signs(world, consistent=bool(consistent))
    if world.mirror:
        history = history * [1.0, -1.0, -1.0]
    return Snapshot(
        world, world.ego, history, reference_plan(world), bool(consistent), moment.earlier
    )


def _heed_signs(world: World, *, consistent: bool) -> None:
    """After the ego was put elsewhere at another speed: has it stood before the sign's line?"""
    for light in world.signals:
        gap = world.corridor.junctions[light.junction].stop_m - world.ego_s_m - FRONT_M
        if light.sign and gap > -1.0:
            stands = world.state.speed_mps < STOOD_MPS and gap < STOOD_WITHIN_M
            light.red = not stands and (light.red or not consistent)


def _stoppable_mps(world: World) -> float:
    """The speed from which the nearest hazard can still be met with 5 m/s2."""
    front = world.ego_s_m + FRONT_M
    gaps = [60.0]
    for car in world.cars:
        gap = car.s_m - car.size[0] / 2 - front
        if blocks_line(car, world) and gap > -3.0:
            gaps.append(gap + car.speed_mps**2 / 12.0)
    gaps += [w.s_m - 0.4 - front for w in world.pedestrians if w.walking and w.s_m > front]
    for light in world.signals:
        gap = world.corridor.junctions[light.junction].stop_m - front
        if (light.red or light.sign) and gap > -1.0:
            gaps.append(gap)
    if world.around.crossing is not None and world.must_yield():
        gaps.append(world.around.crossing.in_m - world.ego_s_m)
    limit = world.around.limits_mps[int(world.ego_s_m / SPACING_M)]
    free = limit + 3.0
    return min(free, math.sqrt(2 * 5.0 * max(min(gaps) - 2.0, 0.0)))


def _independent_past(world: World, speed: float, accel: float) -> Float64[np.ndarray, '3 3']:
    """A past at nearly constant speed along the lane, ending at the present pose."""
    bend = world.corridor.curvature_at(world.ego_s_m)
    # Backwards in time a braking car was faster; it never rolled backwards.
    ways = [-max(speed * -t - 0.5 * accel * t * t, 0.0) for t in HISTORY_S]
    if world.around.shifts:
        line = np.array([_on_line(world, world.ego_s_m + way) for way in (*ways, 0.0)])
        return local_from_world(line[-1], line[:-1])
    past = []
    for s in ways:
        yaw = bend * s
        past.append((s * math.cos(yaw / 2), s * math.sin(yaw / 2), yaw))
    return np.array(past)


def _on_line(world: World, s_m: float) -> tuple[float, float, float]:
    offset, slope = world.around.line_at(s_m)
    x, y, yaw = world.corridor.place(s_m, offset)
    return x, y, yaw + math.atan(slope)


def facts(world: World) -> Float32[np.ndarray, '14']:
    """What the picture shows, as numbers to be read from it.

    Lead there, 10 / its gap, its brake lamps; red (a light or a stop sign, obeyed or not), green,
    10 / distance to its line; pedestrian on the road, 10 / distance; lane offset in metres,
    heading to the lane times 10, lateral position of the lane 10, 20, 30 and 45 m ahead divided
    by 2, 3, 5, 10. The lane is that of the line to drive. Gaps from the bumper, at least 2 m;
    beyond sight nothing is there.
    """
    out = np.zeros(FACTS, dtype=np.float32)
    front = world.ego_s_m + FRONT_M
    leads = [
        (c.s_m - c.size[0] / 2 - front, c.braking)
        for c in world.cars
        if blocks_line(c, world) and c.s_m > world.ego_s_m
    ]
    gap, braking = min(leads, default=(math.inf, False))
    if gap < SIGHT_M:
        out[0:3] = 1.0, 10.0 / max(gap, 2.0), float(braking)
    for light in world.signals:
        gap = world.corridor.junctions[light.junction].stop_m - front
        if -1.0 < gap < SIGHT_M:
            red = light.red or light.sign
            out[3:6] = float(red), float(not red), 10.0 / max(gap, 2.0)
            break
    people = [w.s_m - 0.4 - front for w in world.pedestrians if in_the_way(w, world)]
    gap = min((g for g in people if g > -1.0), default=math.inf)
    if gap < PEDESTRIAN_SIGHT_M:
        out[6:8] = 1.0, 10.0 / max(gap, 2.0)
    ego = world.state
    sign = -1.0 if world.mirror else 1.0
    _, _, road_yaw = world.corridor.place(world.ego_s_m, 0.0)
    lane_m = LANE_WIDTH_M * round(world.around.line_at(world.ego_s_m)[0] / LANE_WIDTH_M)
    out[8] = sign * (world.ego_d_m - lane_m)
    out[9] = sign * 10.0 * math.sin(ego.yaw_rad - road_yaw)
    ahead = np.array([world.corridor.place(world.ego_s_m + m, lane_m) for m in (10, 20, 30, 45)])
    out[10:14] = sign * local_from_world(ego.pose, ahead)[:, 1] / [2.0, 3.0, 5.0, 10.0]
    return out


def hazard_pairs(
    kind: str,
    count: int,
    seed: int,
    ranges: Ranges | None = None,
    *,
    earlier: bool = False,
) -> list[HazardPair]:
    """Moments with and without a hazard, one of `HAZARDS`, that slows the reference.

    Only those where its speed at 3 s differs by more than 1 m/s. World, history, route, picture
    but for the hazard: all else is equal. `earlier` as in `sample_snapshots`.
    """
    ranges = ranges or Ranges()
    family = next(name for name, hazard in HAZARDS.items() if hazard == kind)
    rng = np.random.default_rng([seed, 11])
    found: list[HazardPair] = []
    number = seed
    while len(found) < count:
        moments = _drive_through(make_world(family, number, ranges), rng, earlier=earlier)
        number += 1
        kept = 0
        for index in rng.permutation(len(moments)).tolist():
            if kept == 2 or len(found) == count:
                break
            moment = moments[index]
            if moment.world.state.speed_mps < 1.0 or not _shows(moment.world, kind):
                continue
            present = perturbed(moment, rng, replace(ranges, consistent_history_share=0.0))
            twin = present.world.without_hazard(kind)
            before = tuple(then.without_hazard(kind) for then in present.earlier)
            absent = replace(present, world=twin, plan=reference_plan(twin), earlier=before)
            slower = absent.plan.speeds_mps[29] - present.plan.speeds_mps[29]
            if slower > PAIR_SPEED_MPS:
                found.append(HazardPair(kind, present, absent))
                kept += 1
    return found


def _shows(world: World, kind: str) -> bool:
    read = facts(world)
    if kind in ('lead', 'merge'):
        return bool(read[0])
    if kind in ('oncoming', 'traffic'):
        return world.must_yield()
    if kind == 'obstruction':
        near = (o.s_m - world.ego_s_m - FRONT_M for o in world.around.obstructions)
        return any(0.0 < gap < PEDESTRIAN_SIGHT_M for gap in near)
    return bool(read[3] if kind in ('light', 'sign') else read[6])


def mirrored(snapshot: Snapshot) -> Snapshot:
    """The snapshot in a mirror."""
    world = snapshot.world.mirrored()
    return replace(
        snapshot,
        world=world,
        ego=world.ego,
        history=snapshot.history * [1.0, -1.0, -1.0],
        plan=reference_plan(world),
        earlier=tuple(then.mirrored() for then in snapshot.earlier),
    )


def labelled_scene(snapshot: Snapshot, horizon_s: float = 5.0) -> Scene:
    """The snapshot as a scoring scene: road users over the next seconds, the reference as human.

    Road users follow their own scripts while the ego follows the reference's first plan; lights
    stay red as long as they do in that rollout.
    """
    world = snapshot.world.clone()
    world.mirror = False
    plan = reference_plan(world)
    now = world.scene()
    start = world.state
    rows: dict[str, list[tuple[float, np.ndarray]]] = {}
    red_until: dict[str, float] = {light.lane_id: 0.0 for light in now.red_lights}
    steps = round(horizon_s / 0.1)
    for index in range(steps + 1):
        moment = now if index == 0 else world.scene()
        for agent in moment.agents:
            rows.setdefault(agent.agent_id, []).append((0.1 * index, agent.states[0]))
        for light in moment.red_lights:
            red_until[light.lane_id] = 0.1 * index
        if index == steps:
            break
        pose = plan.poses[min(index, len(plan.poses) - 1)]
        cos, sin = math.cos(start.yaw_rad), math.sin(start.yaw_rad)
        world.place_ego(
            replace(
                world.state,
                stamp_ns=world.state.stamp_ns + 100_000_000,
                x_m=start.x_m + cos * pose[0] - sin * pose[1],
                y_m=start.y_m + sin * pose[0] + cos * pose[1],
                yaw_rad=start.yaw_rad + pose[2],
                speed_mps=float(plan.speeds_mps[min(index, len(plan.poses) - 1)]),
            )
        )
        world.advance(0.1)
    agents = []
    for agent in now.agents:
        seen = rows[agent.agent_id]
        agents.append(
            SceneAgent(
                agent.agent_id, agent.kind, agent.length_m, agent.width_m, agent.height_m,
                np.array([t for t, _ in seen]), np.stack([state for _, state in seen]),
            )
        )  # fmt: skip
    lights = tuple(replace(x, from_s=0.0, to_s=red_until[x.lane_id]) for x in now.red_lights)
    halves = plan.poses[4::5]
    cos, sin = math.cos(start.yaw_rad), math.sin(start.yaw_rad)
    human = np.stack(
        [
            start.x_m + cos * halves[:, 0] - sin * halves[:, 1],
            start.y_m + sin * halves[:, 0] + cos * halves[:, 1],
            start.yaw_rad + halves[:, 2],
        ],
        axis=1,
    )
    scene = replace(now, agents=tuple(agents), red_lights=lights, human=human)
    if snapshot.world.mirror:
        return flip_scene(scene)
    return scene
