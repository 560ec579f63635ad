"""Stage 1: the vision tower learns to see, before anything is asked of it in words or meters.

For each visual token: which classes does its cell of the picture hold? And from all tokens: the
facts that matter for driving. Both are free from the drawn town. Trained on trajectories alone a
small tower from scratch stays blind for thousands of samples; after this stage the rest follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.objectives import picture_loss
from spanvla_ros.training.settings import TrainSettings

ANSWERS = 'none'


def parts(policy: Policy, settings: TrainSettings) -> list[nn.Module]:
    """What is trained: the vision tower and the heads over it."""
    heads = policy.heads
    return [*policy.backbone.eyes, heads.presence, heads.attention, heads.pooled]


def losses(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The weighted losses of one batch by name; their sum is minimized."""
    return {'picture': picture_loss(policy, policy.look(batch.images), batch)}
