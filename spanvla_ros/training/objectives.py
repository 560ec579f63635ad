"""The losses of the supervised stages.

Papers: SpanVLA 3.4 (token loss on reasoning and action tokens, flow matching on the action
expert), AutoVLA 3.3 (the two token losses weighted apart). The picture targets are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from spanvla_ros.model.action_heads import AXES, TRUNCATED_STEPS, anchors_of, kept_share
from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import time_features
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import SpanvlaError

# How many cells lack a class for one that has it differs by orders of magnitude.
PRESENCE_WEIGHT = (1.0, 1.0, 2.0, 8.0, 15.0, 15.0, 15.0)
# Lane offset and heading are small numbers that steer.
FACT_WEIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0, 4.0, 3.0, 3.0, 2.0, 2.0)
FACT_BETA = 0.2
SHARED_NOISE, POINT_NOISE = 1.0, 0.3
BETA_SHAPE = 1.5


def picture_loss(policy: Policy, embeds: Tensor, batch: Batch) -> Tensor:
    """Presence per visual token plus facts by attention pooling.

    Cells of a picture that was taken away, and facts of a row that lost one, do not count.
    """
    presence, facts = policy.heads(embeds)
    if presence.shape != batch.presence.shape:
        raise SpanvlaError(
            f'training data: knows what shows in {batch.presence.shape[1]} places, the model has '
            f'{presence.shape[1]} visual tokens; add --set auxiliary_weight=0'
        )
    cells = functional.binary_cross_entropy_with_logits(
        presence.float(),
        batch.presence,
        pos_weight=presence.new_tensor(PRESENCE_WEIGHT, dtype=torch.float32),
        reduction='none',
    )
    weight = batch.picture_valid.repeat_interleave(policy.config.image_tokens, 1)[..., None]
    dense = (cells * weight).sum() / (weight.sum() * cells.shape[-1]).clamp_min(1.0)
    return dense + facts_loss(facts, batch)


def facts_loss(facts: Tensor, batch: Batch) -> Tensor:
    """Smooth-L1 on the facts of rows with all pictures."""
    whole = batch.picture_valid.amin(1, keepdim=True)
    error = functional.smooth_l1_loss(facts.float(), batch.facts, reduction='none', beta=FACT_BETA)
    error = error * error.new_tensor(FACT_WEIGHT) * whole
    return error.sum() / (whole.sum() * error.shape[1]).clamp_min(1.0)


def answer_losses(policy: Policy, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean token loss over the reasoning text and over the action tokens.

    Args:
        policy: the model.
        hidden: `[B, A + 1, H]` from the prompt's last token on.
        batch: holds the answer.
    """
    logits = policy.backbone.logits(hidden[:, :-1]).float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch.answer.flatten(), reduction='none'
    ).view_as(batch.reasoning_weight)
    text = (losses * batch.reasoning_weight).sum() / batch.reasoning_weight.sum().clamp_min(1.0)
    action = (losses * batch.action_weight).sum() / batch.action_weight.sum().clamp_min(1.0)
    return text, action


def expert_losses(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    settings: TrainSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The losses of the model's expert head by name; beside an answer head it stays a flow's."""
    loss = EXPERT_LOSSES.get(policy.config.head, flow_loss)
    return loss(policy, prefix, valid, batch, settings, generator)


def flow_loss(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    settings: TrainSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Smooth-L1 on the velocity of several (time, noise) draws a scene on one prefix.

    Noise on the source has a part shared by all waypoints and a smaller one of each, in units of
    the normalized state; the `gaussian` source is N(0, 1).
    """
    rows, points, draws = len(batch), policy.config.waypoints, settings.draws
    time = draw_times(settings, (rows, draws), generator)
    shared = torch.randn(rows, draws, 1, 3, generator=generator)
    own = torch.randn(rows, draws, points, 3, generator=generator)
    if policy.config.source == 'gaussian':
        start = own
    else:
        start = policy.config.noise_std * (SHARED_NOISE * shared + POINT_NOISE * own)
    # Drawn on the CPU, so that a draw is the same whatever trains.
    target, start = batch.target[:, None], start.to(batch.target.device)
    features, where = _features(time, start), time.to(start.device)[..., None, None]
    state = (1.0 - where) * start + where * target
    velocity = policy.expert(state, features, batch.ego, prefix.keys, prefix.values, valid)
    loss = functional.smooth_l1_loss(velocity.float(), target - start, beta=1.0)
    return {'flow': 2.0 * loss}


def draw_times(
    settings: TrainSettings, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Flow times in [0, 1): 0 is the source.

    `uniform`; `beta`, 1 - Beta(1.5, 1) as in Alpamayo, with more weight near the source;
    `logit_normal`, the sigmoid of a normal draw shifted by `time_shift` (our reading of SpanVLA's
    shifted normal distribution).
    """
    if settings.time_sampler == 'logit_normal':
        return torch.sigmoid(torch.randn(shape, generator=generator) + settings.time_shift)
    drawn = torch.rand(shape, generator=generator)
    if settings.time_sampler == 'beta':
        # The distribution function of Beta(a, 1) is x^a.
        return 1.0 - drawn.pow(1.0 / BETA_SHAPE)
    return drawn


def _answer_at_source(policy: Policy, prefix: Prefix, valid: Tensor, batch: Batch) -> Tensor:
    """The expert's numbers `[B, T, A]` when asked once, at the source."""
    state = torch.zeros_like(batch.target)[:, None]
    time = _features(torch.zeros(len(batch), 1), state)
    answer: Tensor = policy.expert(state, time, batch.ego, prefix.keys, prefix.values, valid)
    return answer[:, 0].float()


def l1_loss(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    settings: TrainSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """L1 of the expert's one answer at the source."""
    answer = _answer_at_source(policy, prefix, valid, batch)
    return {'l1': functional.l1_loss(answer, batch.target)}


def diffusion_loss(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    settings: TrainSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Which anchor is nearest, and L1 of what is denoised from that one.

    Paper: IRL-VLA's imitation loss, anchor classification plus trajectory regression; one noise
    step a scene, all anchors noised apart.
    """
    assert policy.normalization is not None
    device = batch.target.device
    anchors = torch.from_numpy(anchors_of(policy.normalization)).float()
    rows = len(batch)
    step = torch.rand(rows, 1, generator=generator) * TRUNCATED_STEPS
    kept = torch.from_numpy(kept_share(step.double().numpy())).float()[..., None, None]
    noise = torch.randn(rows, *anchors.shape, generator=generator)
    state = (kept.sqrt() * anchors + (1.0 - kept).sqrt() * noise).to(device)
    anchors = anchors.to(device)
    time = _features(diffusion_times(step), state).expand(-1, len(anchors), -1)
    answer = policy.expert(state, time, batch.ego, prefix.keys, prefix.values, valid).float()
    nearest = (batch.target[:, None] - anchors).square().sum((-1, -2)).argmin(-1)
    chosen = answer[torch.arange(rows, device=device), nearest, :, :AXES]
    return {
        'anchor': functional.cross_entropy(answer[..., AXES].mean(-1), nearest),
        'l1': functional.l1_loss(chosen, batch.target),
    }


def diffusion_times(step: Tensor) -> Tensor:
    """Time features' argument of noise steps."""
    return 1.0 - step / TRUNCATED_STEPS


def parallel_loss(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    settings: TrainSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Cross entropy of the action token of every waypoint."""
    logits = _answer_at_source(policy, prefix, valid, batch)
    found = functional.cross_entropy(logits.flatten(0, 1), batch.actions.flatten())
    return {'token': found}


EXPERT_LOSSES: dict[str, Callable[..., dict[str, Tensor]]] = {
    'flow': flow_loss,
    'l1': l1_loss,
    'diffusion': diffusion_loss,
    'parallel': parallel_loss,
}


def _features(time: Tensor, like: Tensor) -> Tensor:
    """Features of flow times drawn on the CPU, where `like` is."""
    rows = time_features(time.double().numpy())
    return torch.from_numpy(rows).to(like.device)
