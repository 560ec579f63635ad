"""Closed loop in one process: planner, guardian and follower cores on a world, step by step.

Time is the world's own and computing takes a modeled latency, so the same inputs give the same
drive on any machine. Closed-loop scores come from here, timing never does.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.safety.follower import Follower
from spanvla_ros.safety.state import Counts, Guardian, GuardianOutput
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.outcome import Outcome
from spanvla_ros.town.traffic import World
from spanvla_ros.types import CameraFrame, EgoState, Observation, Plan, PlanError, SpanvlaError

STEP_S = 0.05
PAST_S = 2.5
START_NS = 10_000_000_000
NS = 1_000_000_000
BLANK = np.zeros((2, 2, 3), dtype=np.uint8)


@runtime_checkable
class PlannerLike(Protocol):
    """Anything that plans."""

    def plan(self, observation: Observation) -> Plan:
        """A plan for what is seen."""
        ...


@runtime_checkable
class ThinkingPlanner(Protocol):
    """A planner that also works on a reasoning between frames."""

    def reason_slice(self, budget_ms: float, tokens: int | None) -> object:
        """Decode at most `tokens` tokens."""
        ...


@dataclass(frozen=True)
class TraceStep:
    """One physics step: the ego after it, what the guardian said, and the plan in use."""

    time_s: float
    ego: EgoState
    state: str
    reasons: tuple[str, ...]
    plan_id: int | None
    plan_age_s: float | None


@dataclass(frozen=True)
class EpisodeResult:
    """A finished drive; `trace_sha256` is equal for equal drives.

    `refusals` are the reasons of pictures that no plan came of; the guardian bridges these.
    """

    outcome: Outcome
    trace: tuple[TraceStep, ...]
    plans: tuple[Plan, ...]
    counts: Counts
    trace_sha256: str
    refusals: tuple[str, ...] = ()


def run_episode(
    world: World,
    planner: PlannerLike,
    builder: ObservationBuilder,
    guardian: Guardian,
    follower: Follower,
    renderer: Renderer | None = None,
    *,
    plan_period_s: float = 0.1,
    latency_s: float = 0.1,
    reason_tokens: int = 4,
    keep_plans: bool = False,
) -> EpisodeResult:
    """Drive a world to its end.

    Pictures, observation and plan are of the same instant; the guardian gets the plan `latency_s`
    later. The first plan is there at once, as the drive is cut out of a longer one: the past
    before it is at constant speed along the lane.

    Args:
        world: driven in place.
        planner: a `runtime.Planner` or a driver of `town.driver`.
        builder: of the same model; emptied first.
        guardian: a fresh one.
        follower: a fresh one.
        renderer: of the model's cameras; None for drivers without eyes: black pictures.
        plan_period_s: time between plans, a multiple of 50 ms.
        latency_s: from picture to plan, a multiple of 50 ms, at most two periods.
        reason_tokens: tokens decoded after each plan by a planner that reasons concurrently.
        keep_plans: whether the result holds all plans.

    Raises:
        SpanvlaError: a period that is no multiple of the step.
    """
    every = _steps(plan_period_s, 'plan_period_s')
    delay = _steps(latency_s, 'latency_s') if latency_s else 0
    start_ns = START_NS - round(world.time_s * NS)
    builder.reset()
    _give_past(world, builder, guardian)
    on_way: list[tuple[int, Plan]] = []
    plans: list[Plan] = []
    refusals: list[str] = []
    trace: list[TraceStep] = []
    step = 0
    while not world.finished:
        now_ns = start_ns + round(world.time_s * NS)
        ego = replace(world.ego, stamp_ns=now_ns)
        builder.add_ego(ego)
        guardian.on_ego(ego, now_ns)
        if step % every == 0:
            plan = _ask(planner, _observe(world, builder, renderer, now_ns), refusals)
            if plan is not None:
                on_way.append((step + (delay if step else 0), plan))
            if plan is not None and keep_plans:
                plans.append(plan)
            if isinstance(planner, ThinkingPlanner):
                planner.reason_slice(math.inf, reason_tokens)
        while on_way and on_way[0][0] <= step:
            guardian.on_plan_text(on_way.pop(0)[1].to_json(), now_ns)
        output = guardian.tick(now_ns)
        trajectory = None if output is None else output.trajectory
        world.step(follower.command(trajectory, ego, now_ns), STEP_S)
        step += 1
        if output is not None:
            trace.append(_traced(world, output))
    return EpisodeResult(
        world.outcome(),
        tuple(trace),
        tuple(plans),
        guardian.counts,
        _hash(trace),
        tuple(refusals),
    )


def _ask(planner: PlannerLike, observation: Observation, refusals: list[str]) -> Plan | None:
    try:
        return planner.plan(observation)
    except PlanError as error:
        refusals.append(str(error))
        return None


def _traced(world: World, output: GuardianOutput) -> TraceStep:
    return TraceStep(
        world.time_s,
        world.ego,
        output.state,
        output.reasons,
        output.plan_id,
        output.plan_age_s,
    )


def _steps(seconds: float, name: str) -> int:
    count = round(seconds / STEP_S)
    if count < 1 or abs(count * STEP_S - seconds) > 1e-6:
        raise SpanvlaError(f'{name} {seconds} s: give a positive multiple of {STEP_S} s')
    return count


def _give_past(world: World, builder: ObservationBuilder, guardian: Guardian) -> None:
    """Ego states before the start, at constant speed along the lane, and the route."""
    now = world.state
    route = world.route()
    builder.set_route(route)
    guardian.on_route(route)
    corridor = world.corridor
    for back in range(round(PAST_S / STEP_S), 0, -1):
        s = world.ego_s_m - back * STEP_S * now.speed_mps
        x, y, yaw = corridor.place(s, world.ego_d_m)
        if world.mirror:
            y, yaw = -y, -yaw
        builder.add_ego(
            EgoState(START_NS - round(back * STEP_S * NS), x, y, math.remainder(yaw, math.tau),
                     now.speed_mps)
        )  # fmt: skip


def _observe(
    world: World, builder: ObservationBuilder, renderer: Renderer | None, now_ns: int
) -> Observation:
    builder.set_route(world.route())
    if renderer is None:
        for name in builder.camera_names:
            builder.add_frame(CameraFrame(name, now_ns, BLANK))
    else:
        pictures = renderer.draw(world.ground(), world.boxes(), world.tint, world.ego.pose)
        for camera, picture in zip(renderer.cameras, pictures, strict=True):
            builder.add_frame(CameraFrame(camera.name, now_ns, picture))
    observation = builder.build(now_ns)
    if observation is None:
        raise SpanvlaError(f'lockstep: no observation at {world.time_s:.2f} s: {builder.refusal}')
    return observation


def _hash(trace: list[TraceStep]) -> str:
    digest = hashlib.sha256()
    for step in trace:
        digest.update(np.array([*step.ego.pose, step.ego.speed_mps], dtype='<f8').tobytes())
        digest.update(step.state.encode())
    return digest.hexdigest()
