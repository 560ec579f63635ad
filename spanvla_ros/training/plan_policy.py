"""The flow's own plan as a policy: slow changes around it, in the few ways in which a car can err.

Noise on every waypoint of a flow's steps (`flow_policy`) is mostly jerk: what it tells is which
answer was the least uncomfortable. Here an answer differs from the plan along its path, by another
acceleration and by another speed that fades, and across it, the heading turning along; an action
is those coefficients, N(0, 1) each. Their log-probs are exact, and their gradient passes through
all Euler steps to the very plan that is driven, without noise at the source. The whole group
stands on one plan, so it costs one pass a scene.

What a plan changes outside of these modes is no action: there the policy is its plan alone.
Answers come in pairs of opposite coefficients, which leaves less to chance.

Shapes: B scenes, G answers a scene, T waypoints, M modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import source_path
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.flow_policy import step_mean
from spanvla_ros.training.rewards import Rollout
from spanvla_ros.types import SpanvlaError

# Deviations are those at this time, the horizon of PDMS.
AT_S = 4.0
LEAST_SPEED_MPS = 2.0


@dataclass(frozen=True)
class Around:
    """Answers around plans: `coefficients [B, G, M]`, and what was the plan then, `x [B, T, 3]`.

    `modes [B, T, 3, M]` are metres and radians for one unit of a coefficient, `unit [T, 3]` those
    for one unit of x.
    """

    poses: Tensor
    coefficients: Tensor
    x: Tensor
    modes: Tensor
    unit: Tensor


def flow_plan(policy: Policy, prefix: Prefix, valid: Tensor, ego: Tensor) -> Tensor:
    """Normalised plans `[B, T, 3]` from the source without noise, with their gradient."""
    steps, points = policy.config.steps, policy.config.waypoints
    state = torch.zeros(ego.shape[0], 1, points, 3, device=ego.device)
    for index in range(steps):
        state = step_mean(policy, state, index, steps, prefix, valid, ego)
    return state[:, 0]


def plan_modes(plan: Tensor, times_s: Tensor, along_m: float, across_m: float) -> Tensor:
    """The modes of plans `[B, T, 3]` in `base_link`; deviations are those at `AT_S`.

    In this order: more acceleration along the path, more speed that fades, across the path.
    """
    share = times_s / AT_S
    cos, sin = torch.cos(plan[..., 2]), torch.sin(plan[..., 2])
    still = torch.zeros_like(cos)
    ahead, aside = torch.stack([cos, sin, still], -1), torch.stack([-sin, cos, still], -1)
    step = torch.diff(plan[..., :2], dim=1, prepend=torch.zeros_like(plan[:, :1, :2]))
    speed = (step.norm(dim=-1) / (times_s[1] - times_s[0])).clamp_min(LEAST_SPEED_MPS)
    aside[..., 2] = 2.0 * share / AT_S / (speed * share.square())
    square = share.square()[:, None]
    fading = (share * (1.0 - 0.5 * share))[:, None]
    return torch.stack(
        [along_m * square * ahead, along_m * fading * ahead, across_m * square * aside], -1
    )


@torch.no_grad()
def sample_around(
    policy: Policy,
    batch: Batch,
    plan: Tensor,
    group: int,
    along_m: float,
    across_m: float,
    generator: torch.Generator,
) -> Around:
    """G answers around each plan `[B, T, 3]`, normalised."""
    config = policy.config
    if policy.normalization is None:
        raise SpanvlaError('grpo: the model has no normalization; train sft first')
    sources = [source_path(config.source, seen, config.times_s) for seen in batch.observations]
    unit = torch.from_numpy(policy.normalization.std).float().to(plan.device)
    poses = torch.from_numpy(np.stack(sources)).float().to(plan.device) + plan * unit
    times_s = torch.from_numpy(config.times_s).float().to(plan.device)
    modes = plan_modes(poses, times_s, along_m, across_m)
    half = torch.randn(len(plan), -(-group // 2), modes.shape[-1], generator=generator)
    drawn = torch.cat([half, -half], 1)[:, :group].to(plan.device)
    answers = poses[:, None] + torch.einsum('btam,bgm->bgta', modes, drawn)
    return Around(answers, drawn, plan, modes, unit)


def around_log_probs(around: Around, plan: Tensor) -> Tensor:
    """Log-probs `[B * G, M]` of answers around the plans `[B, T, 3]` of the present policy.

    A plan that has moved by `d` gives an answer the coefficients less those that fit `d` best.
    """
    moved = ((plan - around.x) * around.unit).flatten(1)
    fitting = torch.linalg.pinv(around.modes.flatten(1, 2))
    shift = torch.einsum('bmn,bn->bm', fitting, moved)
    left = around.coefficients - shift[:, None]
    return (-0.5 * left.square() - 0.5 * float(np.log(2.0 * np.pi))).flatten(0, 1)


def to_rollouts(around: Around) -> list[Rollout]:
    """The answers, group after group; they hold no words."""
    poses = around.poses.flatten(0, 1).double().cpu().numpy()
    return [Rollout(one) for one in poses]
