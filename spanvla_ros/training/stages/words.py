"""After the other stages: the words learn what the model's own plan does; the plan stays.

Words and plan learn the reference's future apart from each other: where both guess, they guess
differently. Here the text of a row is written again, by the rules that wrote it, with the decision
that the model's own plan carries out on the same picture. Only what no plan passes through is
trained: the language model above the K/V of its last bridged layer. Prefill up to the bridge and
the expert stay bit for bit what they were. Action tokens keep the reference's future as target.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from spanvla_ros.model.action_heads import AnswerHead, head_of
from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.policy import Policy
from spanvla_ros.model.reasoning import meta_action, retold
from spanvla_ros.training.batches import Batch, encode_answers
from spanvla_ros.training.data.shards import TrainingRow
from spanvla_ros.training.heldout import driven_plans
from spanvla_ros.training.objectives import answer_losses
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.token_policy import extend
from spanvla_ros.types import SpanvlaError

ANSWERS = 'none'


def parts(policy: Policy, settings: TrainSettings) -> list[nn.Module]:
    """What is trained: the language model above the K/V of its last bridged layer.

    Token vectors stay as they are, and with them a head that is tied to them.
    """
    if isinstance(head_of(policy.config), AnswerHead):
        raise SpanvlaError(
            f'train words: head {policy.config.head} plans by its words; nothing is left to teach'
        )
    if settings.lora_rank:
        raise SpanvlaError('train words: trains few weights as they are; leave lora_rank out')
    network, text = policy.backbone.network, policy.backbone.text
    last = policy.backbone.bridged[-1]
    layer = text.layers[last]
    found = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.post_attention_layernorm]
    if hasattr(layer.self_attn, 'q_norm'):
        found.append(layer.self_attn.q_norm)
    found += [layer.mlp, *text.layers[last + 1 :], text.norm]
    if network.lm_head.weight is not text.embed_tokens.weight:
        found.append(network.lm_head)
    return found


def losses(
    policy: Policy, batch: Batch, settings: TrainSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The weighted losses of one batch by name; their sum is minimized."""
    backbone = policy.backbone
    with torch.no_grad():
        embeds = None if settings.blind else policy.look(batch.images)
    prompt = backbone.prefill(batch.ids, embeds, batch.valid, tuple(range(backbone.layers)))
    rows = own_rows(policy, prompt, batch)
    answer, text, action = (
        torch.from_numpy(part).to(policy.device)
        for part in encode_answers(rows, policy, 'full', np.zeros(len(rows), bool))
    )
    hidden = extend(backbone, answer, text + action, prompt.keys, prompt.values, batch.valid)
    # The first token of an answer is given.
    told = replace(
        batch,
        answer=answer[:, 1:],
        reasoning_weight=text[:, 1:],
        action_weight=action[:, 1:],
    )
    words, actions = answer_losses(policy, hidden, told)
    return {
        'reasoning': settings.reasoning_weight * words,
        'action': settings.action_weight * actions,
    }


def own_rows(policy: Policy, prompt: Prefix, batch: Batch) -> list[TrainingRow]:
    """The rows with the decisions of the model's own plans in their words.

    A row that is worth no thought stays without words.

    Args:
        policy: the model.
        prompt: K/V of all layers over the prompts.
        batch: the rows.
    """
    found = []
    plans = driven_plans(policy, prompt, batch)
    for row, poses, seen in zip(batch.rows, plans, batch.observations, strict=True):
        decision = meta_action(policy.config.times_s, poses, seen.ego.speed_mps, seen.command)
        text = row.sample.reasoning
        told = replace(row.sample, reasoning=text and retold(text, decision))
        found.append(replace(row, sample=told))
    return found
