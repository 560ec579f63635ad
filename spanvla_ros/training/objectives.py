"""The losses of the supervised stages.

Papers: SpanVLA 3.4 (token loss on reasoning and action tokens, flow matching on the action
expert), AutoVLA 3.3 (the two token losses weighted apart). The picture targets are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import time_features
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch

# How many cells lack a class for one that has it differs by orders of magnitude.
PRESENCE_WEIGHT = (1.0, 1.0, 2.0, 8.0, 15.0, 15.0, 15.0)
# Lane offset and heading are small numbers that steer.
FACT_WEIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0, 4.0, 3.0, 3.0, 2.0, 2.0)
FACT_BETA = 0.2
SHARED_NOISE, POINT_NOISE = 1.0, 0.3


def picture_loss(policy: Policy, embeds: Tensor, batch: Batch) -> Tensor:
    """Presence per visual token plus facts by attention pooling.

    Cells of a picture that was taken away, and facts of a row that lost one, do not count.
    """
    presence, facts = policy.heads(embeds)
    cells = functional.binary_cross_entropy_with_logits(
        presence.float(),
        batch.presence,
        pos_weight=torch.tensor(PRESENCE_WEIGHT),
        reduction='none',
    )
    weight = batch.picture_valid.repeat_interleave(policy.config.image_tokens, 1)[..., None]
    dense = (cells * weight).sum() / (weight.sum() * cells.shape[-1]).clamp_min(1.0)
    return dense + facts_loss(facts, batch)


def facts_loss(facts: Tensor, batch: Batch) -> Tensor:
    """Smooth-L1 on the facts of rows with all pictures."""
    whole = batch.picture_valid.amin(1, keepdim=True)
    error = functional.smooth_l1_loss(facts.float(), batch.facts, reduction='none', beta=FACT_BETA)
    error = error * torch.tensor(FACT_WEIGHT) * whole
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


def flow_loss(
    policy: Policy,
    prefix: Prefix,
    valid: Tensor,
    batch: Batch,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Smooth-L1 on the velocity of several (time, noise) draws a scene on one prefix.

    Time is uniform. Noise on the source has a part shared by all waypoints and a smaller one of
    each, in units of the normalised state; the `gaussian` source is N(0, 1).
    """
    rows, points = len(batch), policy.config.waypoints
    time = torch.rand(rows, draws, generator=generator)
    shared = torch.randn(rows, draws, 1, 3, generator=generator)
    own = torch.randn(rows, draws, points, 3, generator=generator)
    if policy.config.source == 'gaussian':
        start = own
    else:
        start = policy.config.noise_std * (SHARED_NOISE * shared + POINT_NOISE * own)
    target = batch.target[:, None]
    where = time[..., None, None]
    state = (1.0 - where) * start + where * target
    velocity = policy.expert(state, _features(time), batch.ego, prefix.keys, prefix.values, valid)
    return 2.0 * functional.smooth_l1_loss(velocity.float(), target - start, beta=1.0)


def _features(time: Tensor) -> Tensor:
    rows = [time_features(float(value)) for value in time.flatten()]
    return torch.from_numpy(np.stack(rows)).view(*time.shape, -1)
