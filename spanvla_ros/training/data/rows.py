"""From a moment of the town to a training row: what is seen, what should follow, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import interpolate_poses, world_from_local
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.reasoning import MAX_COMPONENTS, Component, write_reasoning
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import STEP_S, ReferencePlan
from spanvla_ros.town.snapshots import HISTORY_S, Snapshot, facts, labelled_scene
from spanvla_ros.town.traffic import World
from spanvla_ros.training.data.labels import needs_thought, presence, visible_facts
from spanvla_ros.training.data.mistakes import Mistake
from spanvla_ros.training.data.scoring_rows import pack_scene
from spanvla_ros.training.data.shards import TrainingRow
from spanvla_ros.types import CameraFrame, EgoState, Observation, Sample, SpanvlaError

START_NS = 1_000_000_000_000
TEXT_AGE_S = (0.2, 2.0)


class RowMaker:
    """Turns snapshots into rows for one model's cameras, history and horizon."""

    def __init__(self, config: ModelConfig, *, scored: bool = False) -> None:
        """Draw for the cameras of `config` and its frames, at times of the history (`lags_s`).

        With `scored` each row holds its scoring row.
        """
        self.config = config
        self.scored = scored
        self.renderer = Renderer(config.cameras)
        per_waypoint = config.horizon_s / config.waypoints / STEP_S
        self._future = np.rint(per_waypoint * np.arange(1, config.waypoints + 1)).astype(int) - 1

    def row(
        self,
        snapshot: Snapshot,
        scene_id: str,
        rng: np.random.Generator,
        pair_id: str = '',
    ) -> TrainingRow:
        """The row of a snapshot.

        Args:
            snapshot: the moment.
            scene_id: name of the row.
            rng: draws how old the last reasoning in the prompt is.
            pair_id: joins the rows of the same moment with and without its hazard.
        """
        images, classes = self.draw(snapshot)
        shown = presence(classes.reshape(-1, *classes.shape[2:]))
        # What an earlier picture showed need not be seen any more.
        now = shown.reshape(*classes.shape[:2], -1, shown.shape[-1])[:, -1]
        now = now.reshape(-1, shown.shape[-1])
        plan = snapshot.plan
        slow = needs_thought(plan.components, plan.decision)
        seen = observe(self.config, snapshot, images)
        age_s = float(rng.uniform(*TEXT_AGE_S))
        if slow:
            stamp_ns = seen.stamp_ns - round(age_s * 1e9)
            text = earlier_reasoning(plan, age_s)
            seen = replace(seen, reasoning=text, reasoning_stamp_ns=stamp_ns)
        sample = Sample(
            observation=seen,
            future=plan.poses[self._future],
            scene_id=scene_id,
            family=snapshot.world.around.family,
            pair_id=pair_id,
            reasoning=write_reasoning(plan.components, plan.decision) if slow else '',
            thinking='slow' if slow else 'fast',
        )
        scoring = pack_scene(labelled_scene(snapshot)) if self.scored else b''
        return TrainingRow(sample, shown, visible_facts(facts(snapshot.world), now), scoring)

    def draw(self, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """Pictures `[c, f, h, w, 3]` and classes of a snapshot by camera, frames oldest first.

        Raises:
            SpanvlaError: the snapshot has no earlier moments.
        """
        drawn = [
            self.renderer.draw_both(world.ground(), world.boxes(), world.tint, pose)
            for world, pose in views(self.config, snapshot)
        ]
        images, classes = (np.stack(part, axis=1) for part in zip(*drawn, strict=True))
        return images, classes

    def mistake(
        self, mistake: Mistake, pair_id: str, rng: np.random.Generator
    ) -> tuple[TrainingRow, TrainingRow]:
        """The negative row of a mistake and the recovery row after it, joined by `pair_id`.

        A negative holds no reasoning: the reference's words do not lead to what was done.
        """
        name = f'{pair_id}/{mistake.kind}'
        row = self.row(mistake.before, f'{name}/negative', rng, pair_id)
        sample = replace(
            row.sample,
            future=mistake.poses[self._future],
            label='negative',
            reasoning='',
            thinking='fast',
        )
        back = self.row(mistake.after, f'{name}/recovery', rng, pair_id)
        recovery = replace(back.sample, label='recovery')
        return replace(row, sample=sample), replace(back, sample=recovery)


def lags_s(config: ModelConfig) -> list[float]:
    """How far back each picture of a camera lies, the oldest first.

    Raises:
        SpanvlaError: there, a drawn moment has no past.
    """
    lags = [config.frame_lag_s * back for back in reversed(range(config.frames_per_camera))]
    if odd := [lag for lag in lags[:-1] if -lag not in HISTORY_S]:
        known = ', '.join(f'{-at:g}' for at in HISTORY_S)
        raise SpanvlaError(
            f'scenes: the model wants pictures of {odd[0]:g} s ago, a drawn moment has them of '
            f'{known} s; change frames_per_camera or frame_lag_s'
        )
    return lags


def views(config: ModelConfig, snapshot: Snapshot) -> list[tuple[World, Float64[np.ndarray, '3']]]:
    """World and pose of each picture of a camera, the oldest first.

    The earlier ones are taken from the past that the model is told, so that pictures and odometry
    agree.
    """
    lags, now = lags_s(config), snapshot.ego.pose
    if len(lags) > 1 and not snapshot.earlier:
        raise SpanvlaError(
            'scenes: moments of a driver or after a mistake have one picture a camera; use a '
            'model with frames_per_camera 1'
        )
    places = [HISTORY_S.index(-lag) for lag in lags[:-1]]
    poses = world_from_local(now, snapshot.history)
    before = [(snapshot.earlier[place], poses[place]) for place in places]
    return [*before, (snapshot.world, now)]


def observe(config: ModelConfig, snapshot: Snapshot, images: np.ndarray) -> Observation:
    """The observation of a snapshot, built by the very class that builds it on board.

    `images` are by camera, then frame, the oldest first.
    """
    builder = ObservationBuilder(config)
    ego = replace(snapshot.ego, stamp_ns=START_NS)
    for past in _past(config, snapshot, ego):
        builder.add_ego(past)
    builder.add_ego(ego)
    builder.set_route(snapshot.world.route())
    stamps_ns = [START_NS - round(lag * 1e9) for lag in lags_s(config)]
    for camera, frames in zip(config.cameras, images, strict=True):
        for stamp_ns, image in zip(stamps_ns, frames, strict=True):
            builder.add_frame(CameraFrame(camera.name, stamp_ns, image))
    seen = builder.build(START_NS)
    if seen is None or not seen.history_valid.all():
        raise ValueError(f'snapshot gives no whole observation: {builder.refusal or seen}')
    return seen


def _past(config: ModelConfig, snapshot: Snapshot, ego: EgoState) -> list[EgoState]:
    """The history as odometry, with a pose half-way between each two: half a second is a gap."""
    times_s = np.append(config.history_times_s, 0.0)
    poses = np.concatenate([snapshot.history, np.zeros((1, 3))])
    dense_s = np.linspace(times_s[0], 0.0, 2 * len(times_s) - 1)
    world = world_from_local(ego.pose, interpolate_poses(times_s, poses, dense_s))
    speeds = np.linalg.norm(np.diff(world[:, :2], axis=0), axis=1) / np.diff(dense_s)
    return [
        EgoState(ego.stamp_ns + round(time_s * 1e9), pose[0], pose[1], pose[2], speed)
        for time_s, pose, speed in zip(
            dense_s[:-1].tolist(), world[:-1].tolist(), speeds.tolist(), strict=True
        )
    ]


def earlier_reasoning(plan: ReferencePlan, age_s: float) -> str:
    """The reasoning as it stood `age_s` ago, when all was farther ahead by the way driven.

    On board the prompt holds the last finished text, up to two seconds old.
    """
    driven_m = plan.speed_mps * age_s
    before = [replace(c, distance_m=c.distance_m + driven_m) for c in _nearest(plan.components)]
    return write_reasoning(before, plan.decision)


def _nearest(components: Sequence[Component]) -> list[Component]:
    ordered = sorted(components, key=lambda component: component.distance_m)
    return [c for c in ordered if math.isfinite(c.distance_m)][:MAX_COMPONENTS]
