"""Labeled moments cut from a driver's own drives: the states it really gets into.

After DAgger (Ross, Gordon, Bagnell 2011): the driver drives in lockstep, the reference says at
each moment what it would do from there. Drawn perturbations miss what a driver's own errors add
up to; its drives do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import wrap_angle
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.safety.follower import Follower
from spanvla_ros.safety.state import Guardian
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import reference_plan
from spanvla_ros.town.lockstep import PlannerLike, run_episode
from spanvla_ros.town.snapshots import Snapshot, moment_weight
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState, Observation, Plan

PLAN_PERIOD_S, LATENCY_S = 0.2, 0.1
START_OFFSET_SD_M, START_HEADING_SD_RAD = 0.35, 0.03
# Farther out, which lane was meant can no longer be seen.
FARTHEST_OFFSET_M, FARTHEST_HEADING_RAD = 1.6, 0.6
OFF_LINE_M, OFF_LINE_RAD, OFF_LINE_WEIGHT = 0.3, 0.06, 3.0


@dataclass(frozen=True)
class _Seen:
    """The world at one plan, with the past as the driver was told it."""

    world: World
    history: Float64[np.ndarray, '3 3']


class _Witness:
    """The driver in the planner's slot, with a copy of the world kept at each of its plans."""

    def __init__(self, world: World, driver: PlannerLike) -> None:
        self._world, self._driver = world, driver
        self.seen: list[_Seen] = []

    def plan(self, observation: Observation) -> Plan:
        if observation.history_valid.all():
            self.seen.append(_Seen(self._world.clone(), observation.history.copy()))
        return self._driver.plan(observation)


def rollout_snapshots(
    world: World, driver: PlannerLike, config: ModelConfig, rng: np.random.Generator, count: int
) -> list[Snapshot]:
    """Moments of one drive of `driver`, each with the reference's plan from there.

    The drive starts a little beside the line. Moments off the line, and those with something to
    see, are drawn more often; those from which no one could tell the way back are left out.

    Args:
        world: driven to its end in place.
        driver: who drives.
        config: its cameras and history.
        rng: draws the start and which moments are kept.
        count: how many moments, fewer if the drive is short.
    """
    world.place_ego(_beside(world, rng))
    witness = _Witness(world, driver)
    run_episode(
        world,
        witness,
        ObservationBuilder(config),
        Guardian(world.vehicle),
        Follower(world.vehicle),
        Renderer(config.cameras),
        plan_period_s=PLAN_PERIOD_S,
        latency_s=LATENCY_S,
    )
    found = [s for s in witness.seen if _tells_the_way(s.world)]
    if not found:
        return []
    plans = [reference_plan(seen.world) for seen in found]
    weights = np.array(
        [
            moment_weight(seen.world, plan) + OFF_LINE_WEIGHT * _off_line(seen.world)
            for seen, plan in zip(found, plans, strict=True)
        ]
    )
    count = min(count, len(found))
    picked = rng.choice(len(found), size=count, replace=False, p=weights / weights.sum())
    return [
        Snapshot(
            found[i].world, found[i].world.ego, found[i].history, plans[i], consistent_history=True
        )
        for i in sorted(picked.tolist())
    ]


def _beside(world: World, rng: np.random.Generator) -> EgoState:
    ego = world.state
    road_yaw = world.corridor.place(world.ego_s_m, 0.0)[2]
    side = float(rng.normal()) * START_OFFSET_SD_M
    turn = float(rng.normal()) * START_HEADING_SD_RAD
    return replace(
        ego,
        x_m=ego.x_m - math.sin(road_yaw) * side,
        y_m=ego.y_m + math.cos(road_yaw) * side,
        yaw_rad=float(wrap_angle(ego.yaw_rad + turn)),
    )


def _heading_rad(world: World) -> float:
    return abs(float(wrap_angle(world.state.yaw_rad - world.line_heading_rad())))


def _tells_the_way(world: World) -> bool:
    return (
        abs(world.beside_line_m) < FARTHEST_OFFSET_M
        and _heading_rad(world) < FARTHEST_HEADING_RAD
        and not world.tally.collided_with
    )


def _off_line(world: World) -> bool:
    return abs(world.beside_line_m) > OFF_LINE_M or _heading_rad(world) > OFF_LINE_RAD
