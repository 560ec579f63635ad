"""Open loop: plans for held-out moments against the reference's, hazard pairs, and the mirror.

The text slot of every prompt is empty: the reference's words about a hazard would tell what only
the pictures may tell. Each plan stands alone, no cache or reasoning reaches the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import interpolate_poses, local_from_world
from spanvla_ros.model.action_heads import AnswerError
from spanvla_ros.model.config import CameraSpec, ModelConfig
from spanvla_ros.model.reasoning import meta_action
from spanvla_ros.town.lockstep import PlannerLike
from spanvla_ros.training.data.shards import ShardSet, TrainingRow
from spanvla_ros.training.intervals import Estimate, mean_of, ratio_of
from spanvla_ros.types import CameraFrame, EgoState, Observation

REACTION_S = 3.0
# A pair counts where the reference is slower by more than this with the hazard.
REACTION_MPS = 1.0
CLEARLY_MPS = 0.5
MIRROR_WITHIN_M = 1.0


@dataclass(frozen=True)
class OpenLoop:
    """Plans `[n, T, 3]` in `base_link` beside the reference's, and what each row is."""

    scene_ids: np.ndarray
    families: np.ndarray
    pair_ids: np.ndarray
    speeds_mps: Float64[np.ndarray, ' n']
    times_s: Float64[np.ndarray, ' t']
    reference: Float64[np.ndarray, 'n t 3']
    planned: Float64[np.ndarray, 'n t 3']

    @property
    def drives(self) -> list[str]:
        """The drive each row was cut from."""
        return ['/'.join(name.split('/')[:2]) for name in self.scene_ids]

    @property
    def answered(self) -> np.ndarray:
        """Which rows have a plan."""
        found: np.ndarray = np.isfinite(self.planned).all((1, 2))
        return found

    def chosen(self, keep: np.ndarray) -> OpenLoop:
        """Some of the rows."""
        return OpenLoop(
            self.scene_ids[keep],
            self.families[keep],
            self.pair_ids[keep],
            self.speeds_mps[keep],
            self.times_s,
            self.reference[keep],
            self.planned[keep],
        )


def plan_rows(
    planner: PlannerLike, config: ModelConfig, rows: Sequence[TrainingRow]
) -> Float64[np.ndarray, 'n t 3']:
    """Plans in `base_link` at the model's times, each from a fresh start; NaN where there is none.

    An answer that is no trajectory has no error to be measured by: such rows are counted apart.
    """
    return np.stack([plan_or_none(planner, config, _bare(row.sample.observation)) for row in rows])


def plan_or_none(
    planner: PlannerLike, config: ModelConfig, observation: Observation
) -> Float64[np.ndarray, 't 3']:
    """One plan, or NaN where the model's answer is none."""
    try:
        return plan_alone(planner, config, observation)
    except AnswerError:
        return np.full((config.waypoints, 3), np.nan)


def plan_alone(
    planner: PlannerLike, config: ModelConfig, observation: Observation
) -> Float64[np.ndarray, 't 3']:
    """One plan with nothing remembered, in `base_link`."""
    reset: Callable[[], None] | None = getattr(planner, 'reset', None)
    if reset is not None:
        # Drawn moments share a stamp, by which a planner remembers its pictures.
        reset()
    plan = planner.plan(observation)
    local = local_from_world(np.array(plan.origin), plan.trajectory.poses)
    # Later times than the plan's own hold its last pose.
    return interpolate_poses(
        np.append(0.0, plan.trajectory.times_s),
        np.concatenate([np.zeros((1, 3)), local]),
        config.times_s,
    )


def collect(
    shards: ShardSet, indices: np.ndarray, config: ModelConfig, planned: np.ndarray
) -> OpenLoop:
    """Plans joined with what their rows are."""
    return OpenLoop(
        shards.scene_ids[indices],
        shards.families[indices],
        shards.pair_ids[indices],
        shards.speeds_mps[indices],
        config.times_s,
        shards.futures[indices],
        planned,
    )


def displacement_m(loop: OpenLoop) -> Float64[np.ndarray, 'n t']:
    """Distance between plan and reference at each time."""
    gap: np.ndarray = np.linalg.norm(loop.planned[..., :2] - loop.reference[..., :2], axis=-1)
    return gap


def speed_at(
    poses: Float64[np.ndarray, 'n t 3'], times_s: Float64[np.ndarray, ' t'], at_s: float
) -> Float64[np.ndarray, ' n']:
    """Speed around a time, from the waypoints on both sides of the nearest one."""
    at = int(np.argmin(np.abs(times_s - at_s)))
    after, before = min(at + 1, len(times_s) - 1), max(at - 1, 0)
    way = np.linalg.norm(poses[:, after, :2] - poses[:, before, :2], axis=-1)
    speed: np.ndarray = way / (times_s[after] - times_s[before])
    return speed


def measures(loop: OpenLoop) -> dict[str, Estimate]:
    """Errors and agreement of decisions over the rows that have a plan, and their share."""
    answered = mean_of(loop.answered, loop.drives)
    loop = loop.chosen(loop.answered)
    away = displacement_m(loop)
    at = int(np.argmin(np.abs(loop.times_s - REACTION_S)))
    speed_error = speed_at(loop.planned, loop.times_s, REACTION_S) - speed_at(
        loop.reference, loop.times_s, REACTION_S
    )
    side = np.abs(_sideways(loop)[:, at])
    drives = loop.drives
    longitudinal, lateral = _same_decisions(loop)
    return {
        'ade_m': mean_of(away.mean(axis=1), drives),
        'fde_m': mean_of(away[:, -1], drives),
        'ade_3s_m': mean_of(away[:, : at + 1].mean(axis=1), drives),
        'speed_error_3s_mps': mean_of(np.abs(speed_error), drives),
        'lateral_error_3s_m': mean_of(side, drives),
        'longitudinal_accuracy': mean_of(longitudinal, drives),
        'lateral_accuracy': mean_of(lateral, drives),
        'answered': answered,
    }


def differences(first: OpenLoop, second: OpenLoop) -> dict[str, Estimate]:
    """Paired differences of errors, second minus first: positive where the first is better."""
    if list(first.scene_ids) != list(second.scene_ids):
        raise ValueError('paired differences need the same rows in the same order')
    both = first.answered & second.answered
    first, second = first.chosen(both), second.chosen(both)
    one, other = displacement_m(first), displacement_m(second)
    drives = first.drives
    return {
        'ade_m': mean_of(other.mean(axis=1) - one.mean(axis=1), drives),
        'fde_m': mean_of(other[:, -1] - one[:, -1], drives),
    }


def pair_measures(loop: OpenLoop) -> dict[str, dict[str, Estimate]]:
    """For each kind of hazard, how plans answer its presence.

    Taken are pairs in which the reference is slower by over 1 m/s at 3 s. `right_way`: share of
    plans slower with the hazard at all; `clearly`: by over 0.5 m/s; `effect`: sum of the plans'
    changes over sum of the reference's; `pairs` counts them.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for first, second in pair_rows(loop.pair_ids, loop.scene_ids):
        kinds.setdefault(str(loop.pair_ids[first]).split('/')[0], []).append((first, second))
    planned = speed_at(loop.planned, loop.times_s, REACTION_S)
    wanted = speed_at(loop.reference, loop.times_s, REACTION_S)
    found = {}
    for kind, both in sorted(kinds.items()):
        present, absent = np.array(both).T
        asked = wanted[absent] - wanted[present]
        keep = asked > REACTION_MPS
        # A row without a plan answers nothing.
        moved = np.nan_to_num((planned[absent] - planned[present])[keep])
        names = loop.pair_ids[present][keep]
        found[kind] = {
            'right_way': mean_of(moved > 0.0, names),
            'clearly': mean_of(moved > CLEARLY_MPS, names),
            'effect': ratio_of(moved, asked[keep], names),
        }
    return found


def pair_rows(pair_ids: np.ndarray, scene_ids: np.ndarray) -> list[tuple[int, int]]:
    """Row numbers (with the hazard, without it) of every whole pair."""
    halves: dict[str, dict[str, int]] = {}
    for index, (pair, scene) in enumerate(zip(pair_ids, scene_ids, strict=True)):
        if pair:
            halves.setdefault(pair, {})[str(scene).rsplit('/', 1)[-1]] = index
    return [
        (half['present'], half['absent'])
        for half in halves.values()
        if {'present', 'absent'} <= set(half)
    ]


def mirror_share(
    straight: Float64[np.ndarray, 'n t 3'],
    reflected: Float64[np.ndarray, 'n t 3'],
    drives: Sequence[str],
) -> dict[str, Estimate]:
    """How well plans of mirrored observations are the mirrored plans, at their end points."""
    kept = np.isfinite(straight).all((1, 2)) & np.isfinite(reflected).all((1, 2))
    straight, reflected = straight[kept], reflected[kept]
    drives = [name for name, good in zip(drives, kept, strict=True) if good]
    back = reflected * np.array([1.0, -1.0, -1.0])
    gap = np.linalg.norm(back[:, -1, :2] - straight[:, -1, :2], axis=-1)
    return {
        'within_1m': mean_of(gap <= MIRROR_WITHIN_M, drives),
        'gap_m': mean_of(gap, drives),
    }


def mirrored_observation(seen: Observation, cameras: Sequence[CameraSpec]) -> Observation:
    """What the same scene would look like in a mirror: pictures, ego, history, route, command.

    Raises:
        ValueError: a camera has no counterpart on the other side.
    """
    partner = [_partner(camera, cameras) for camera in cameras]
    frames = tuple(
        tuple(_flipped(frame, cameras[index].name) for frame in seen.frames[partner[index]])
        for index in range(len(cameras))
    )
    swap = {'left': 'right', 'right': 'left'}
    return replace(
        seen,
        frames=frames,
        ego=_mirrored_ego(seen.ego),
        history=seen.history * np.array([1.0, -1.0, -1.0]),
        route=None if seen.route is None else seen.route * np.array([1.0, -1.0]),
        command=swap.get(seen.command, seen.command),
        reasoning='',
        reasoning_stamp_ns=None,
    )


def _partner(camera: CameraSpec, cameras: Sequence[CameraSpec]) -> int:
    for index, other in enumerate(cameras):
        mirrored = replace(
            other, name=camera.name, y_m=0.0 - other.y_m, yaw_deg=0.0 - other.yaw_deg
        )
        if mirrored == camera:
            return index
    raise ValueError(f'camera {camera.name} has no counterpart on the other side')


def _flipped(frame: CameraFrame | None, name: str) -> CameraFrame | None:
    if frame is None:
        return None
    return CameraFrame(name, frame.stamp_ns, np.ascontiguousarray(frame.image[:, ::-1]))


def _mirrored_ego(ego: EgoState) -> EgoState:
    return replace(
        ego,
        y_m=-ego.y_m,
        yaw_rad=-ego.yaw_rad,
        yaw_rate_radps=-ego.yaw_rate_radps,
        steering_rad=-ego.steering_rad,
    )


def _bare(seen: Observation) -> Observation:
    return replace(seen, reasoning='', reasoning_stamp_ns=None)


def _sideways(loop: OpenLoop) -> Float64[np.ndarray, 'n t']:
    gap = loop.planned[..., :2] - loop.reference[..., :2]
    yaw = loop.reference[..., 2]
    side: np.ndarray = np.cos(yaw) * gap[..., 1] - np.sin(yaw) * gap[..., 0]
    return side


def _same_decisions(loop: OpenLoop) -> tuple[np.ndarray, np.ndarray]:
    rows = zip(loop.planned, loop.reference, loop.speeds_mps.tolist(), strict=True)
    same = []
    for planned, reference, speed_mps in rows:
        said = meta_action(loop.times_s, planned, speed_mps)
        meant = meta_action(loop.times_s, reference, speed_mps)
        same.append((said.longitudinal == meant.longitudinal, said.lateral == meant.lateral))
    both = np.array(same, dtype=bool).reshape(-1, 2)
    return both[:, 0], both[:, 1]
