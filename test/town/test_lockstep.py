from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.model.config import TOWN_CAMERAS, ModelConfig
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.safety.follower import Follower
from spanvla_ros.safety.state import Guardian
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import BlindRouteFollower, ConstantVelocity, ReferenceDriver
from spanvla_ros.town.lockstep import EpisodeResult, run_episode
from spanvla_ros.town.scenarios import FAMILIES, HELD_OUT_SEED, make_world
from spanvla_ros.town.traffic import World
from spanvla_ros.types import Observation, Plan, SpanvlaError

CONFIG = ModelConfig(name='town', cameras=TOWN_CAMERAS)


def short(family: str, seed: int, seconds: float) -> World:
    world = make_world(family, seed)
    world.around = replace(world.around, time_limit_s=seconds)
    return world


def drive(
    world: World, make: Callable[[World], object], *, eyes: bool = False, **timing: float
) -> EpisodeResult:
    return run_episode(
        world,
        make(world),  # type: ignore[arg-type]
        ObservationBuilder(CONFIG),
        Guardian(world.vehicle),
        Follower(world.vehicle),
        Renderer(TOWN_CAMERAS) if eyes else None,
        keep_plans=True,
        **timing,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_the_reference_reaches_the_goal_through_the_onboard_cores(family: str) -> None:
    result = drive(make_world(family, HELD_OUT_SEED), ReferenceDriver)
    assert result.outcome.success
    assert not result.counts.refused
    assert {step.state for step in result.trace} == {'OK'}


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_every_scene_can_be_solved_and_not_by_the_blind(family: str) -> None:
    seen = [drive(make_world(family, HELD_OUT_SEED + i), ReferenceDriver) for i in range(30)]
    assert all(result.outcome.success for result in seen)
    for blind in (BlindRouteFollower, ConstantVelocity):
        results = [
            drive(make_world(family, HELD_OUT_SEED + i), lambda _, b=blind: b()) for i in range(30)
        ]
        assert np.mean([result.outcome.success for result in results]) < 0.75


def test_the_same_drive_twice_and_another_with_another_latency() -> None:
    first = drive(short('turns', 7, 4.0), ReferenceDriver)
    again = drive(short('turns', 7, 4.0), ReferenceDriver)
    late = drive(short('turns', 7, 4.0), ReferenceDriver, latency_s=0.2)
    assert first.trace_sha256 == again.trace_sha256
    assert first.outcome == again.outcome
    assert first.trace_sha256 != late.trace_sha256


def test_a_mirrored_drive_is_the_mirror_image() -> None:
    world = short('turns', 9, 9.0)
    one = drive(world.clone(), ReferenceDriver)
    other = drive(world.mirrored(), ReferenceDriver)
    assert other.outcome.success == one.outcome.success
    assert len(one.trace) == len(other.trace)
    for a, b in zip(one.trace, other.trace, strict=True):
        assert b.ego.y_m == pytest.approx(-a.ego.y_m, abs=1e-3)


def test_plans_come_late_by_the_latency_and_pictures_are_of_their_instant() -> None:
    result = drive(short('lane_keeping', 3, 2.0), ReferenceDriver, eyes=True)
    stamps = [plan.trajectory.stamp_ns for plan in result.plans]
    assert set(np.diff(stamps).tolist()) == {100_000_000}
    assert all(set(p.image_stamps_ns) == {p.trajectory.stamp_ns} for p in result.plans)
    used = {s.plan_id: s.time_s for s in reversed(result.trace)}
    # In use from the step that begins 0.1 s after its picture.
    assert used[3] == pytest.approx(0.1 * 2 + 0.1 + 0.05)


class Watching:
    """The reference, keeping the observations it was given."""

    def __init__(self, world: World) -> None:
        self.inner = ReferenceDriver(world)
        self.seen: list[Observation] = []
        self.tokens: list[int | None] = []

    def plan(self, observation: Observation) -> Plan:
        self.seen.append(observation)
        return self.inner.plan(observation)

    def reason_slice(self, budget_ms: float, tokens: int | None) -> None:
        self.tokens.append(tokens)


def test_the_observation_is_whole_from_the_start_and_reasoning_has_its_quota() -> None:
    world = short('lane_keeping', 4, 2.0)
    watching = Watching(world)
    drive(world, lambda _: watching, eyes=True, reason_tokens=3)
    first = watching.seen[0]
    assert first.history_valid.all()
    assert first.degraded == ()
    assert first.route is not None
    assert first.frames[0][0] is not None
    assert first.frames[0][0].image.shape == (112, 224, 3)
    assert set(watching.tokens) == {3}


def test_a_period_off_the_step_is_refused() -> None:
    with pytest.raises(SpanvlaError, match='plan_period_s'):
        drive(make_world('lane_keeping', 4), ReferenceDriver, plan_period_s=0.07)
