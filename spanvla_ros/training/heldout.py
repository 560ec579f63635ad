"""A look at held-out rows while training runs: open-loop error, reaction to hazards, seeing.

Small and noisy on purpose; `spanvla evaluate` measures a finished model.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spanvla_ros.geometry import local_from_world
from spanvla_ros.model.action_heads import AnswerError, AnswerHead, head_of
from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import source_path
from spanvla_ros.model.policy import Policy
from spanvla_ros.model.reasoning import agreement
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.runtime.settling import settled
from spanvla_ros.runtime.torch_ import TorchBackend
from spanvla_ros.training import token_policy
from spanvla_ros.training.batches import Batch, make_batch, without_pictures
from spanvla_ros.training.data.shards import FACTS, PRESENT_CLASSES, ShardSet
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.sft import bridge, run_backbone, slots
from spanvla_ros.types import Observation

CHUNK = 24
# A temperature at which the likeliest token is drawn.
LIKELIEST = 1e-3
REACTION_MPS = 1.0
REACTION_TIME_S = 3.0
SHOWN_CLASSES = range(3, 7)


class HeldOut:
    """The share of held-out rows that this process measures, decoded once."""

    def __init__(
        self, shards: ShardSet, policy: Policy, settings: TrainSettings, group: Group
    ) -> None:
        """Take rows evenly, pairs whole, and this process's share of them."""
        chosen = choose_rows(shards, settings.heldout_rows)
        self.group, self.settings = group, settings
        self.pairs = shards.pair_ids[chosen]
        self.families = shards.families[chosen]
        self.futures = shards.futures[chosen]
        self.mine = np.arange(group.rank, len(chosen), group.size)
        rows = shards.rows(chosen[self.mine], policy.config.frames_per_camera)
        self.step_s = policy.config.horizon_s / policy.config.waypoints
        self.observations = [_unprompted(row.sample.observation, settings) for row in rows]
        chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        self.batches = [
            make_batch(chunk, policy, settings, None).to(policy.device) for chunk in chunks
        ]

    @torch.no_grad()
    def plan(self, policy: Policy) -> np.ndarray:
        """Planned poses `[n, T, 3]` of all rows, in every process."""
        planned = np.zeros(self.futures.shape)
        if isinstance(head_of(policy.config), AnswerHead):
            planned[self.mine] = self._spoken(policy)
            self.group.sum(torch.from_numpy(planned))
            return planned
        found = [expert_plans(policy, batch, self.settings) for batch in self.batches]
        planned[self.mine] = np.concatenate(found)
        gathered = torch.from_numpy(planned)
        self.group.sum(gathered)
        return planned

    def _spoken(self, policy: Policy) -> np.ndarray:
        """Plans of an answer head, as on board; rows of NaN where an answer is no trajectory."""
        assert policy.normalization is not None
        backend = TorchBackend(policy, torch.get_num_threads())
        planner = Planner(backend, policy.layout, policy.normalization, schedule='off')
        found = np.full((len(self.mine), *self.futures.shape[1:]), np.nan)
        for place, seen in zip(found, self.observations, strict=True):
            planner.reset()
            try:
                plan = planner.plan(seen)
            except AnswerError:
                continue
            place[:] = local_from_world(np.array(plan.origin), plan.trajectory.poses)
        return found

    def driving(self, policy: Policy) -> dict[str, float]:
        """Open-loop errors and reactions to hazards, of the rows that have a plan."""
        planned = self.plan(policy)
        answered = np.isfinite(planned).all((1, 2))
        if not answered.all():
            return {'answered': float(answered.mean()), **self._driving(planned, answered)}
        return self._driving(planned, answered)

    def _driving(self, planned: np.ndarray, kept: np.ndarray) -> dict[str, float]:
        if not kept.any():
            return {}
        planned, futures = planned[kept], self.futures[kept]
        families, pairs = self.families[kept], self.pairs[kept]
        at = round(REACTION_TIME_S / self.step_s) - 1
        error = np.linalg.norm(planned[..., :2] - futures[..., :2], axis=-1)
        speed, wanted = (speed_at(poses, at, self.step_s) for poses in (planned, futures))
        found = {
            'ade_m': float(error.mean()),
            'ade_3s_m': float(error[:, : at + 1].mean()),
            'speed_error_3s_mps': float(np.abs(speed - wanted).mean()),
            'lateral_3s_m': float(np.abs(planned[:, at, 1] - futures[:, at, 1]).mean()),
        }
        for family in sorted(set(families)):
            found[f'ade_{family}_m'] = float(error[families == family].mean())
        found.update(pair_reactions(pairs, families, speed, wanted))
        return found

    @torch.no_grad()
    def speaking(self, policy: Policy) -> dict[str, float]:
        """Share of texts that agree with the plan of their picture, and of moments with a text."""
        counts = torch.zeros(3)
        times_s = policy.config.times_s
        for batch in self.batches:
            embeds = None if self.settings.blind else policy.look(batch.images)
            prompt = policy.backbone.prefill(batch.ids, embeds, batch.valid)
            answers = token_policy.sample_answers(
                policy, prompt, batch.valid, 1, LIKELIEST, torch.Generator().manual_seed(0)
            )
            said = token_policy.to_rollouts(policy, answers)
            driven = driven_plans(policy, prompt, batch)
            for rollout, poses, seen in zip(said, driven, batch.observations, strict=True):
                agrees = agreement(rollout.text, times_s, poses, seen.ego.speed_mps, seen.command)
                counts += torch.tensor([agrees is True, agrees is not None, bool(rollout.text)])
        self.group.sum(counts)
        right, judged, slow = counts.tolist()
        return {'agreement': right / max(judged, 1.0), 'slow': slow / len(self.futures)}

    @torch.no_grad()
    def seeing(self, policy: Policy) -> dict[str, float]:
        """F1 of rare classes per token, error of facts, over all processes."""
        counts = torch.zeros(3, len(PRESENT_CLASSES), device=policy.device)
        errors = torch.zeros(len(FACTS) + 1, device=policy.device)
        for batch in self.batches:
            presence, facts = policy.heads(policy.look(batch.images))
            count_presence(counts, presence, batch)
            errors[:-1] += (facts - batch.facts).abs().sum(0)
            errors[-1] += len(batch)
        for tensor in (counts, errors):
            self.group.sum(tensor)
        right, said, true = counts.cpu().numpy()
        found = {
            f'f1_{PRESENT_CLASSES[k].replace(" ", "_")}': float(
                2 * right[k] / max(said[k] + true[k], 1.0)
            )
            for k in SHOWN_CLASSES
        }
        mean = (errors[:-1] / errors[-1].clamp_min(1.0)).tolist()
        for name in ('lead', 'red', 'pedestrian_on_road', 'lane_offset', 'heading'):
            found[f'error_{name}'] = mean[FACTS.index(name)]
        return found


def _unprompted(seen: Observation, settings: TrainSettings) -> Observation:
    seen = replace(seen, reasoning='', reasoning_stamp_ns=None)
    return without_pictures(seen) if settings.blind else seen


@torch.no_grad()
def expert_plans(
    policy: Policy, batch: Batch, settings: TrainSettings, steps: int | None = None
) -> np.ndarray:
    """Poses `[B, T, 3]` in `base_link` by an expert head for a batch made for evaluation."""
    prefix, _, prompt = run_backbone(policy, batch, settings, policy.backbone.bridged)
    bridged = bridge(policy, prefix, batch, prompt, detach=True)
    return plans_on(policy, bridged, batch, slots(policy, batch, settings), steps)


def plans_on(
    policy: Policy, bridged: Prefix, batch: Batch, valid: Tensor, steps: int | None = None
) -> np.ndarray:
    """Poses `[B, T, 3]` in `base_link` by an expert head, on K/V that are there already."""
    config = policy.config
    sources = np.stack(
        [source_path(config.source, seen, config.times_s) for seen in batch.observations]
    )
    return policy.plan(bridged, batch.ego, valid, sources, steps)


@torch.no_grad()
def driven_plans(policy: Policy, prompt: Prefix, batch: Batch) -> np.ndarray:
    """The plans `[B, T, 3]` that would be driven, given K/V of all layers over the prompts."""
    layers = list(policy.backbone.bridged)
    bridged = Prefix(prompt.keys[layers].detach(), prompt.values[layers].detach())
    planned = plans_on(policy, bridged, batch, batch.valid)
    return np.stack(
        [
            settled(poses, policy.config.times_s, seen.ego.speed_mps)
            for poses, seen in zip(planned, batch.observations, strict=True)
        ]
    )


def count_presence(counts: torch.Tensor, presence: torch.Tensor, batch: Batch) -> None:
    """Add this batch's hits, claims and truths per class to `counts [3, classes]`."""
    claimed = (presence > 0).float().flatten(0, 1)
    true = batch.presence.flatten(0, 1)
    counts += torch.stack([(claimed * true).sum(0), claimed.sum(0), true.sum(0)])


def choose_rows(shards: ShardSet, wanted: int) -> np.ndarray:
    """About `wanted` row numbers: half of them whole pairs if there are any, evenly spread."""
    paired: dict[str, list[int]] = {}
    for index, pair in enumerate(shards.pair_ids):
        if pair:
            paired.setdefault(pair, []).append(index)
    pairs = [rows for rows in paired.values() if len(rows) == 2]
    keep = pairs[:: max(1, math.ceil(len(pairs) / max(wanted // 4, 1)))] if pairs else []
    chosen = {index for rows in keep for index in rows}
    alone = [index for index, pair in enumerate(shards.pair_ids) if not pair]
    room = max(wanted - len(chosen), 0)
    if alone and room:
        chosen |= {alone[int(i)] for i in np.linspace(0, len(alone) - 1, room)}
    return np.array(sorted(chosen), dtype=np.int64)


def speed_at(poses: np.ndarray, at: int, step_s: float) -> np.ndarray:
    """Speed around waypoint `at` of poses `[n, T, 3]`."""
    after = min(at + 1, poses.shape[1] - 1)
    gap = poses[:, after, :2] - poses[:, at - 1, :2]
    return np.linalg.norm(gap, axis=-1) / ((after - at + 1) * step_s)


def pair_reactions(
    pairs: np.ndarray, families: np.ndarray, speed: np.ndarray, wanted: np.ndarray
) -> dict[str, float]:
    """How the plan answers a hazard: share moved the right way, and size, by family.

    Taken are pairs whose reference speeds differ by more than 1 m/s; the right way is more than
    a quarter of that difference, with its sign.
    """
    rows: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        if pair:
            rows.setdefault(pair, []).append(index)
    gaps: dict[str, list[tuple[float, float]]] = {}
    for pair in rows.values():
        if len(pair) != 2:
            continue
        first, second = pair
        gap = wanted[second] - wanted[first]
        if abs(gap) > REACTION_MPS:
            moved = (speed[second] - speed[first]) * np.sign(gap)
            gaps.setdefault(families[first], []).append((moved, abs(gap)))
    found = {}
    for family, both in sorted(gaps.items()):
        moved, size = np.array(both).T
        found[f'pairs_{family}'] = float(len(both))
        found[f'right_{family}'] = float((moved > 0.25 * size).mean())
        found[f'size_{family}'] = float(moved.sum() / size.sum())
    return found
