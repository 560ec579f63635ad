"""Stage 2: supervised fine-tuning on reasoning and action tokens, the flow expert beside it.

One causal pass over prompt and answer gives the token losses and the K/V that the expert attends
to. In some rows the expert sees the K/V of the reasoning (the sequential schedule), in the others
the prompt alone (concurrent, off). With `detach_bridge` the flow loss stops at the K/V (the
paper's bridge); without it the flow loss shapes the backbone too. Picture targets stay on, so
that what was learnt to be seen is not forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.backbone.adapters import adapter_parts
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch
from spanvla_ros.training.objectives import (
    answer_losses,
    expert_losses,
    facts_loss,
    picture_loss,
)
from spanvla_ros.training.settings import TrainSettings

ANSWERS = 'full'


def parts(policy: Policy, settings: TrainSettings) -> list[nn.Module]:
    """What is trained: everything, or adapters in place of the backbone, or all but the eyes."""
    network = policy.backbone.network
    if not settings.lora_rank and settings.vision_rate:
        return [policy]
    if not settings.lora_rank:
        return [policy.backbone.text, network.lm_head, policy.expert, policy.heads]
    tables = [network.get_input_embeddings(), network.lm_head] if settings.lora_embeddings else []
    return [*adapter_parts(network), *tables, policy.expert, policy.heads]


def losses(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The weighted losses of one batch by name; their sum is minimised."""
    prefix, embeds, prompt = run_backbone(policy, batch, settings, layers=None)
    assert prefix.hidden is not None
    hidden = prefix.hidden[:, prompt - 1 :]
    text, action = answer_losses(policy, hidden, batch)
    found = {
        'reasoning': settings.reasoning_weight * text,
        'action': settings.action_weight * action,
    }
    if embeds is not None and settings.auxiliary_weight > 0:
        picture = picture_loss(policy, embeds, batch)
        facts = facts_loss(policy.heads.facts_from_prompt(hidden[:, 0]), batch)
        found['picture'] = settings.auxiliary_weight * (picture + facts)
    if settings.flow_weight > 0:
        bridged = bridge(policy, prefix, batch, prompt, detach=settings.detach_bridge)
        valid = slots(policy, batch, settings)
        for name, loss in expert_losses(
            policy, bridged, valid, batch, settings, generator
        ).items():
            found[name] = settings.flow_weight * loss
    return found


def run_backbone(
    policy: Policy, batch: Batch, settings: TrainSettings, layers: tuple[int, ...] | None
) -> tuple[Prefix, Tensor | None, int]:
    """One pass over prompt and answer: K/V, visual tokens, number of prompt tokens run.

    Without pictures the places of the visual tokens are left out; masked they would change
    nothing but the time it takes.
    """
    backbone = policy.backbone
    ids = torch.cat([batch.ids, batch.answer], 1)
    valid = torch.cat([batch.valid, torch.ones_like(batch.answer, dtype=torch.float32)], 1)
    if not settings.blind:
        embeds = policy.look(batch.images)
        return backbone.prefill(ids, embeds, valid, layers), embeds, batch.ids.shape[1]
    text = backbone.text_places
    answer = torch.arange(batch.ids.shape[1], ids.shape[1], device=ids.device)
    places = torch.cat([text, answer])
    prefix = backbone.prefill(ids[:, places], None, valid[:, places], layers, places)
    return prefix, None, len(text)


def bridge(policy: Policy, prefix: Prefix, batch: Batch, prompt: int, *, detach: bool) -> Prefix:
    """K/V of the bridged layers over the prompt and the slots of the answer's reasoning."""
    length = prompt + min(batch.answer.shape[1], policy.config.answer_tokens)
    keys, values = prefix.keys, prefix.values
    if keys.shape[0] != len(policy.backbone.bridged):
        layers = list(policy.backbone.bridged)
        keys, values = keys[layers], values[layers]
    keys, values = keys[..., :length, :], values[..., :length, :]
    return Prefix(keys.detach(), values.detach()) if detach else Prefix(keys, values)


def stored(prefix: Prefix, valid: Tensor) -> Prefix:
    """K/V of a cache as far as these rows reach."""
    length = valid.shape[1]
    return Prefix(prefix.keys[..., :length, :], prefix.values[..., :length, :])


def slots(policy: Policy, batch: Batch, settings: TrainSettings) -> Tensor:
    """Which slots of prompt and answer the expert may attend to."""
    prompt = batch.valid[:, policy.backbone.text_places] if settings.blind else batch.valid
    return torch.cat([prompt, batch.seen[:, : policy.config.answer_tokens]], 1)
