"""The flow expert as a policy: Euler steps with Gaussian noise, whose log-probs are exact.

Paper: ReCogDrive's plain Gaussian transitions. The drift correction of Flow-GRPO assumes a
Gaussian source, which a source path is not; a Gaussian step around the Euler step is a valid
policy whatever the source. Log-probs are means over the numbers of a step, as in Flow-GRPO, so
that they do not grow with the number of waypoints.

Shapes: B scenes, G chains a scene, K steps, T waypoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import decode_trajectory, source_path, time_features
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.objectives import POINT_NOISE, SHARED_NOISE
from spanvla_ros.training.rewards import Rollout
from spanvla_ros.types import SpanvlaError

LEAST_STD = 0.02


@dataclass(frozen=True)
class Chains:
    """States of sampled flows `[K + 1, B, G, T, 3]`, normalized; the last are trajectories."""

    states: Tensor


def step_std(index: int, steps: int, noise: float) -> float:
    """Deviation of a step: falls with the time that is left, never below `LEAST_STD`."""
    left = 1.0 - (index + 1) / steps
    return max(noise * math.sqrt(left / steps), LEAST_STD)


def step_mean(
    policy: Policy,
    state: Tensor,
    index: int,
    steps: int,
    prefix: Prefix,
    valid: Tensor,
    ego: Tensor,
) -> Tensor:
    """The Euler step from a state `[B, G, T, 3]`."""
    time = torch.from_numpy(time_features(index / steps)).to(state.device)
    time = time.expand(*state.shape[:2], -1)
    velocity = policy.expert(state, time, ego, prefix.keys, prefix.values, valid).float()
    return state + velocity / steps


@torch.no_grad()
def sample_chains(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    ego: Tensor,
    group: int,
    noise: float,
    generator: torch.Generator,
) -> Chains:
    """G chains a scene; the start has the noise of training."""
    steps, points = policy.config.steps, policy.config.waypoints
    shape = (ego.shape[0], group)
    own = torch.randn(*shape, points, 3, generator=generator)
    shared = torch.randn(*shape, 1, 3, generator=generator)
    state = policy.config.noise_std * (SHARED_NOISE * shared + POINT_NOISE * own)
    if policy.config.source == 'gaussian':
        state = own
    state = state.to(ego.device)
    states = [state]
    for index in range(steps):
        mean = step_mean(policy, state, index, steps, prefix, valid, ego)
        draw = torch.randn(mean.shape, generator=generator).to(mean.device)
        state = mean + step_std(index, steps, noise) * draw
        states.append(state)
    return Chains(torch.stack(states))


def chain_log_probs(
    policy: Policy, prefix: Prefix, valid: Tensor, ego: Tensor, chains: Chains, noise: float
) -> Tensor:
    """Log-probs `[B * G, K]` of the steps of sampled chains."""
    steps = len(chains.states) - 1
    found = []
    for index in range(steps):
        here, there = chains.states[index], chains.states[index + 1]
        mean = step_mean(policy, here, index, steps, prefix, valid, ego)
        found.append(gaussian_log_prob(there, mean, step_std(index, steps, noise)))
    return torch.stack(found, -1).flatten(0, 1)


def gaussian_log_prob(value: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log-density of N(mean, std^2), averaged over the last two axes."""
    squared = ((value - mean) / std).square()
    return (-0.5 * squared - math.log(std) - 0.5 * math.log(2 * math.pi)).mean((-2, -1))


def to_rollouts(policy: Policy, batch: Batch, chains: Chains) -> list[Rollout]:
    """The trajectories at the ends of chains; they hold no words."""
    if policy.normalization is None:
        raise SpanvlaError('grpo: the model has no normalization; train sft first')
    config, std = policy.config, policy.normalization.std
    found: list[Rollout] = []
    for seen, group in zip(batch.observations, chains.states[-1].cpu().numpy(), strict=True):
        source = source_path(config.source, seen, config.times_s)
        found += [Rollout(decode_trajectory(state, source, std)) for state in group]
    return found
