"""Negative and recovery samples: what goes wrong at a moment, and the way back from there.

Paper: SpanVLA 3.3.2 takes both from real exploratory drives: suboptimal driving is a negative,
the correction of it a recovery. Here a mistake is made from the reference's plan by one of
`MISTAKES`, or is a plan of a policy; it counts only where the scorer puts it clearly below the
reference. The world then really drives along it for a while, and what the reference does from
there is the recovery.

A new mistake is one function and one line of `MISTAKES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import local_from_world, wrap_angle
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.town.driver import STEP_S, ReferencePlan, reference_plan
from spanvla_ros.town.snapshots import HISTORY_S, Snapshot, labelled_scene
from spanvla_ros.town.traffic import World

# A mistake costs at least so much of the reference's EPDMS; a recovery scores at least so much.
LEAST_COST = 0.15
LEAST_RECOVERY = 0.7
UNTIL_RECOVERY_S = (1.5, 2.5)
LEAST_SPEED_MPS = 3.0
LEAST_WAY_M = 8.0

Poses = Float64[np.ndarray, 't 3']


@dataclass(frozen=True)
class Mistake:
    """A moment, what is done wrong there (`poses` each 0.1 s in `base_link`), and the way back."""

    kind: str
    before: Snapshot
    poses: Poses
    after: Snapshot


def early_stop(plan: ReferencePlan, rng: np.random.Generator) -> Poses | None:
    """Brakes to a halt where the reference goes on, and stays."""
    if plan.speed_mps < LEAST_SPEED_MPS or plan.speeds_mps[-1] < 1.0:
        return None
    begins, brakes = rng.uniform(0.0, 1.0), rng.uniform(1.5, 3.5)
    falling = plan.speed_mps - brakes * np.maximum(plan.times_s - begins, 0.0)
    return _along(plan, np.minimum(plan.speeds_mps, np.maximum(falling, 0.0)))


def hesitation(plan: ReferencePlan, rng: np.random.Generator) -> Poses | None:
    """Slows down for nothing for a while, then goes on."""
    if plan.speed_mps < LEAST_SPEED_MPS or plan.speeds_mps[-1] < 1.0:
        return None
    middle, wide, deep = rng.uniform(1.2, 2.5), rng.uniform(0.8, 1.4), rng.uniform(0.6, 0.9)
    dip = deep * np.exp(-0.5 * ((plan.times_s - middle) / wide) ** 2)
    return _along(plan, plan.speeds_mps * (1.0 - dip))


def lateral_drift(plan: ReferencePlan, rng: np.random.Generator) -> Poses | None:
    """Leaves the line to one side, ever farther."""
    if plan.speed_mps < LEAST_SPEED_MPS or _way_m(plan) < LEAST_WAY_M:
        return None
    side = rng.choice([-1.0, 1.0]) * rng.uniform(1.5, 3.0)
    return _beside(plan.poses, side * _smooth(plan.times_s / rng.uniform(3.0, 4.5)))


def late_lane_change(plan: ReferencePlan, rng: np.random.Generator) -> Poses | None:
    """Keeps the lane for a while where the reference changes it at once."""
    if not plan.decision.lateral.startswith('change'):
        return None
    late_s = rng.uniform(1.5, 2.5)
    side = plan.poses[:, 1]
    waited = np.interp(plan.times_s - late_s, plan.times_s, side, left=0.0)
    return _headed(plan.poses[:, 0], waited)


def aborted_lane_change(plan: ReferencePlan, rng: np.random.Generator) -> Poses | None:
    """Begins the lane change and goes back."""
    if not plan.decision.lateral.startswith('change'):
        return None
    turns_s = rng.uniform(1.5, 2.5)
    back = 1.0 - _smooth((plan.times_s - turns_s) / 2.0)
    return _headed(plan.poses[:, 0], plan.poses[:, 1] * back)


MISTAKES: dict[str, Callable[[ReferencePlan, np.random.Generator], Poses | None]] = {
    'early_stop': early_stop,
    'hesitation': hesitation,
    'lateral_drift': lateral_drift,
    'late_lane_change': late_lane_change,
    'aborted_lane_change': aborted_lane_change,
}


def mistakes_at(
    snapshot: Snapshot, rng: np.random.Generator, own_plan: Poses | None = None
) -> Iterator[Mistake]:
    """The mistakes of a moment that cost something and can be made good, in random order.

    Args:
        snapshot: the moment, not mirrored.
        rng: draws the mistakes and when they end.
        own_plan: a policy's plan each 0.1 s in `base_link`, taken as one more mistake if it
            scores low.
    """
    drawn = {name: make(snapshot.plan, rng) for name, make in MISTAKES.items()}
    tried = {name: poses for name, poses in {**drawn, 'policy': own_plan}.items()
             if poses is not None}  # fmt: skip
    if not tried:
        return
    plans = np.stack([snapshot.plan.poses, *tried.values()])
    scores = Scorer(labelled_scene(snapshot), 'v2').score(plans, hz=10)
    best = scores[0].total
    for at in rng.permutation(len(tried)).tolist():
        if scores[at + 1].total > best - LEAST_COST:
            continue
        name = list(tried)[at]
        after = state_after(snapshot, tried[name], float(rng.uniform(*UNTIL_RECOVERY_S)))
        if after is not None:
            yield Mistake(name, snapshot, tried[name], after)


def state_after(snapshot: Snapshot, poses: Poses, time_s: float) -> Snapshot | None:
    """The moment after driving along `poses` for `time_s`, None where there is no good way back.

    The past handed to the model is the one really driven.
    """
    world = snapshot.world.clone()
    collided = world.tally.collided_with
    track = drive_along(world, poses, round(time_s / STEP_S))
    if world.tally.collided_with != collided:
        return None
    now = track[-1]
    past = np.array([track[len(track) - 1 + round(t / STEP_S)] for t in HISTORY_S])
    after = Snapshot(
        world, world.ego, local_from_world(now, past), reference_plan(world),
        consistent_history=True,
    )  # fmt: skip
    score = Scorer(labelled_scene(after), 'v2').score(after.plan.poses[None], hz=10)[0]
    return after if score.total >= LEAST_RECOVERY else None


def drive_along(world: World, poses: Poses, steps: int) -> list[Float64[np.ndarray, '3']]:
    """Put the ego along `poses` for `steps` of 0.1 s, the world moving; returns its poses."""
    start = world.state
    cos, sin = math.cos(start.yaw_rad), math.sin(start.yaw_rad)
    track = [start.pose]
    for x, y, yaw in poses[:steps].tolist():
        before = world.state
        heading = float(wrap_angle(start.yaw_rad + yaw))
        place = np.array([start.x_m + cos * x - sin * y, start.y_m + sin * x + cos * y])
        speed = float(np.linalg.norm(place - before.pose[:2])) / STEP_S
        turned = float(wrap_angle(heading - before.yaw_rad))
        world.place_ego(
            replace(
                before,
                stamp_ns=before.stamp_ns + round(STEP_S * 1e9),
                x_m=float(place[0]),
                y_m=float(place[1]),
                yaw_rad=heading,
                speed_mps=speed,
                accel_mps2=(speed - before.speed_mps) / STEP_S,
                yaw_rate_radps=turned / STEP_S,
                steering_rad=math.atan2(
                    turned * world.vehicle.wheelbase_m, max(speed * STEP_S, 0.05)
                ),
            )
        )
        world.advance(STEP_S)
        track.append(world.state.pose)
    return track


def _way_m(plan: ReferencePlan) -> float:
    steps = np.diff(np.concatenate([np.zeros((1, 2)), plan.poses[:, :2]]), axis=0)
    return float(np.linalg.norm(steps, axis=1).sum())


def _along(plan: ReferencePlan, speeds_mps: Float64[np.ndarray, ' t']) -> Poses:
    """The reference's path at other, lower speeds."""
    path = np.concatenate([np.zeros((1, 3)), plan.poses])
    gone = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1)))
    wanted = np.minimum(np.cumsum(speeds_mps) * STEP_S, gone[-1])
    yaw = np.unwrap(path[:, 2])
    return np.stack([np.interp(wanted, gone, column) for column in (*path[:, :2].T, yaw)], -1)


def _smooth(share: Float64[np.ndarray, ' t']) -> Float64[np.ndarray, ' t']:
    kept = np.clip(share, 0.0, 1.0)
    smooth: np.ndarray = kept**2 * (3.0 - 2.0 * kept)
    return smooth


def _beside(poses: Poses, side_m: Float64[np.ndarray, ' t']) -> Poses:
    """A path moved sideways, across its own heading, with the heading it then has."""
    moved = poses.copy()
    moved[:, 0] -= np.sin(poses[:, 2]) * side_m
    moved[:, 1] += np.cos(poses[:, 2]) * side_m
    steps = np.diff(np.concatenate([np.zeros((1, 3)), poses])[:, :2], axis=0)
    along = np.maximum(np.linalg.norm(steps, axis=1), 0.05)
    moved[:, 2] += np.arctan2(np.diff(np.append(0.0, side_m)), along)
    return moved


def _headed(x: Float64[np.ndarray, ' t'], y: Float64[np.ndarray, ' t']) -> Poses:
    """A path along the lane with the heading of its own steps."""
    dx, dy = np.diff(np.append(0.0, x)), np.diff(np.append(0.0, y))
    return np.stack([x, y, np.arctan2(dy, np.maximum(dx, 0.05))], -1)
