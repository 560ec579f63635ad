"""GRPO: groups of answers to one scene, rewarded by the scorer, reinforced by their advantage.

Papers: SpanVLA 3.5, AutoVLA 3.4 (group-normalised advantage, k3 KL to the SFT model, LoRA).
For answers i = 1..G to a scene, with token log-probs l, those of the reference l_ref and of the
sampling policy l_old:

    A_i  = (r_i - mean r) / (std r + 1e-4), or / advantage_unit where that is set
    k3   = exp(l_ref - l) - (l_ref - l) - 1
    loss = mean_i mean_t -( rho A_i - beta k3 ),  rho = exp(l - l_old)

With one update a batch rho is 1 and its gradient that of the policy; only with more is it
clipped. The policy is the language model's answer (`rollout_policy: tokens`), the steps of the
flow expert (`flow`) or slow changes around its plan (`plan`); all give log-probs `[N, steps]` and
all else is the same. The reference is the model with its adapters off.

The deviation of a group makes a matter of life and death count no more than a shade of progress:
all groups push alike, and a policy learns to drive faster everywhere at the cost of a crash now
and then. With `advantage_unit` what is at stake counts, and the mean reward is what rises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.backbone.adapters import (
    LoraSettings,
    adapter_parts,
    adapters_off,
    attach_adapters,
)
from spanvla_ros.model.policy import Policy
from spanvla_ros.training import flow_policy, plan_policy, token_policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.rewards import REWARDS, Asked, GroupReward, Rollout, group_rewards
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.sft import bridge, run_backbone, slots, stored
from spanvla_ros.types import SpanvlaError

ANSWERS = 'none'
EXPERT_LAYERS = ('qkv', 'out', 'gate_up', 'down', 'modulation')
LEAST_SPREAD = 1e-4

LogProbs = Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """What was sampled for a batch, kept while it is learnt from.

    `log_probs` gives those of the present policy, with gradient; `old` are those at sampling, None
    until they are first asked for; `reference` is None where `kl` is 0; `chosen [N, steps]` marks
    the steps that were choices.
    """

    log_probs: LogProbs
    old: Tensor | None
    reference: Tensor | None
    chosen: Tensor
    advantage: Tensor
    report: dict[str, float]


def parts(policy: Policy, settings: TrainSettings) -> list[nn.Module]:
    """What is trained: low-rank adapters on the language model, or on the flow expert."""
    if not settings.lora_rank:
        raise SpanvlaError(
            'train grpo: lora_rank is 0; give one, for the reference is the model without adapters'
        )
    if settings.rollout_policy == 'tokens':
        return adapter_parts(policy.backbone.network)
    if policy.config.head != 'flow':
        raise SpanvlaError(f'train grpo: head {policy.config.head} has no flow to reinforce')
    lora = LoraSettings(settings.lora_rank, settings.lora_alpha, EXPERT_LAYERS, r'blocks\.\d+\.')
    attach_adapters(policy.expert, lora, settings.seed)
    return adapter_parts(policy.expert)


def losses(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The weighted losses of one batch by name, and without gradient what there is to report."""
    if 'group' not in batch.kept:
        batch.kept['group'] = sample_group(policy, batch, settings, generator)
    group: Group = batch.kept['group']
    now = group.log_probs()
    old = now.detach() if group.old is None else group.old
    batch.kept['group'] = replace(group, old=old)
    reference = now.detach() if group.reference is None else group.reference
    clip = settings.ratio_clip if settings.updates > 1 else 0.0
    gain, divergence, clipped = grpo_terms(
        now, old, reference, group.advantage, group.chosen, clip
    )
    report = {name: torch.tensor(value) for name, value in group.report.items()}
    return {'policy': -gain, 'kl': settings.kl * divergence, 'clipped': clipped, **report}


def grpo_terms(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor,
    advantage: Tensor,
    chosen: Tensor,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, k3 divergence from the reference, and share of clipped steps.

    Args:
        log_probs: of the present policy `[N, steps]`.
        old: at sampling, without gradient.
        reference: of the reference policy, without gradient.
        advantage: `[N]`.
        chosen: 1 where a step was a choice `[N, steps]`.
        clip: epsilon of the ratio, 0 for none.

    Returns:
        Means over answers of the mean over their steps; the share is without gradient.
    """
    ratio = torch.exp(log_probs - old)
    gain = ratio * advantage[:, None]
    share = torch.zeros_like(ratio)
    if clip:
        bounded = ratio.clamp(1.0 - clip, 1.0 + clip) * advantage[:, None]
        share = (bounded < gain).float()
        gain = torch.minimum(gain, bounded)
    gap = reference - log_probs
    divergence = torch.exp(gap) - gap - 1.0
    count = chosen.sum(1).clamp_min(1.0)
    means = [((x * chosen).sum(1) / count).mean() for x in (gain, divergence, share)]
    return means[0], means[1], means[2].detach()


def advantages(rewards: np.ndarray, unit: float = 0.0) -> np.ndarray:
    """Rewards `[B, G]` less their group's mean, in units of its deviation or of `unit`."""
    above = rewards - rewards.mean(axis=1, keepdims=True)
    if unit:
        return above / unit
    return above / (rewards.std(axis=1, keepdims=True) + LEAST_SPREAD)


def sample_group(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> Group:
    """Answers, rewards and log-probs for a batch."""
    rollouts, log_probs, chosen = _sampled(policy, batch, settings, generator)
    asked = [Asked(row.sample, row.scoring, policy.config.times_s) for row in batch.rows]
    size = settings.group
    groups = [rollouts[at * size : (at + 1) * size] for at in range(len(asked))]
    rewards = group_rewards(asked, groups, settings)
    totals = np.stack([reward.total for reward in rewards])
    reference = None
    if settings.kl:
        with torch.no_grad(), adapters_off(policy):
            reference = log_probs()
    found = advantages(totals, settings.advantage_unit).astype(np.float32)
    advantage = torch.from_numpy(found).flatten().to(policy.device)
    return Group(log_probs, None, reference, chosen, advantage, describe(rewards, rollouts))


def sample_rollouts(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> list[Rollout]:
    """`group` answers to each row of a batch, row after row."""
    return _sampled(policy, batch, settings, generator)[0]


def _sampled(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> tuple[list[Rollout], LogProbs, Tensor]:
    sampled = {'tokens': _tokens, 'flow': _flow, 'plan': _plan}[settings.rollout_policy]
    return sampled(policy, batch, settings, generator)


def describe(rewards: Sequence[GroupReward], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means for the log: rewards, their terms unweighted, spread, thinking, malformed answers."""
    totals = np.stack([reward.total for reward in rewards])
    found = {
        'reward': float(totals.mean()),
        'reward_spread': float(totals.std(axis=1).mean()),
        'slow_rate': float(np.mean([r.thinking == 'slow' for r in rollouts])),
        'malformed': float(np.mean([r.poses is None for r in rollouts])),
    }
    for name in REWARDS:
        terms = [reward.terms[name].values for reward in rewards if name in reward.terms]
        if terms:
            found[f'term_{name}'] = float(np.mean(terms))
    return found


def _tokens(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> tuple[list[Rollout], LogProbs, Tensor]:
    # No adapter reaches the eyes: they look once for all passes.
    with torch.no_grad():
        embeds = None if settings.blind else policy.look(batch.images)

    def prefill() -> Prefix:
        return policy.backbone.prefill(batch.ids, embeds, batch.valid)

    with torch.no_grad():
        prompt = prefill()
    answers = token_policy.sample_answers(
        policy, prompt, batch.valid, settings.group, settings.temperature, generator
    )

    def log_probs() -> Tensor:
        return token_policy.answer_log_probs(
            policy, prefill(), batch.valid, answers, settings.group, settings.temperature
        )

    return token_policy.to_rollouts(policy, answers), log_probs, answers.chosen


def _flow(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> tuple[list[Rollout], LogProbs, Tensor]:
    prefix, valid = bridged(policy, batch, settings)
    chains = flow_policy.sample_chains(
        policy, prefix, valid, batch.ego, settings.group, settings.flow_noise, generator
    )

    def log_probs() -> Tensor:
        return flow_policy.chain_log_probs(
            policy, prefix, valid, batch.ego, chains, settings.flow_noise
        )

    rollouts = flow_policy.to_rollouts(policy, batch, chains)
    chosen = torch.ones(len(rollouts), policy.config.steps, device=policy.device)
    return rollouts, log_probs, chosen


def _plan(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> tuple[list[Rollout], LogProbs, Tensor]:
    prefix, valid = bridged(policy, batch, settings)
    with torch.no_grad():
        plan = plan_policy.flow_plan(policy, prefix, valid, batch.ego)
    along_m, across_m = settings.plan_along_m, settings.plan_across_m
    around = plan_policy.sample_around(
        policy, batch, plan, settings.group, along_m, across_m, generator
    )

    def log_probs() -> Tensor:
        now = plan_policy.flow_plan(policy, prefix, valid, batch.ego)
        return plan_policy.around_log_probs(around, now)

    rollouts = plan_policy.to_rollouts(around)
    chosen = torch.ones(len(rollouts), around.coefficients.shape[-1], device=policy.device)
    return rollouts, log_probs, chosen


def bridged(policy: Policy, batch: Batch, settings: TrainSettings) -> tuple[Prefix, Tensor]:
    """What the expert attends to: K/V of the frozen backbone, and which slots of them."""
    valid = slots(policy, batch, settings)
    if batch.prefix is not None:
        return stored(batch.prefix, valid), valid
    with torch.no_grad():
        prefix, _, prompt = run_backbone(policy, batch, settings, policy.backbone.bridged)
    return bridge(policy, prefix, batch, prompt, detach=True), valid
