"""Stage 3: the action expert alone on a frozen backbone, many flow draws a scene on one prefill.

Where `cache` names a folder, K/V are read from there (`training.kv_cache`).
With `end_to_end` the backbone is trained along by the flow loss, picture targets on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanvla_ros.model.action_heads import AnswerHead, head_of
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.objectives import expert_losses, picture_loss
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.sft import bridge, run_backbone, slots, stored
from spanvla_ros.types import SpanvlaError

ANSWERS = 'reasoning'


def parts(policy: Policy, settings: TrainSettings) -> list[nn.Module]:
    """What is trained: the expert, and with `end_to_end` all else too."""
    if isinstance(head_of(policy.config), AnswerHead):
        raise SpanvlaError(
            f'train action-expert: head {policy.config.head} is the answer of the language model '
            'itself; train it with sft'
        )
    return [policy] if settings.end_to_end else [policy.expert]


def losses(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The weighted losses of one batch by name; their sum is minimised."""
    valid = slots(policy, batch, settings)
    if batch.prefix is not None:
        cached = stored(batch.prefix, valid)
        return expert_losses(policy, cached, valid, batch, settings, generator)
    with torch.set_grad_enabled(settings.end_to_end):
        prefix, embeds, prompt = run_backbone(policy, batch, settings, policy.backbone.bridged)
    bridged = bridge(policy, prefix, batch, prompt, detach=not settings.end_to_end)
    found = expert_losses(policy, bridged, valid, batch, settings, generator)
    if settings.end_to_end and embeds is not None and settings.auxiliary_weight > 0:
        found['picture'] = settings.auxiliary_weight * picture_loss(policy, embeds, batch)
    return found
