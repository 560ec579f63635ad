"""The language model's answer as a policy: sampled in groups on one prefill, with log-probs.

Tokens are drawn from what the grammar allows at their place (words of the reasoning, then exactly
the action that the head decodes); log-probs are those of the restricted distribution, so a token
that had no choice has log-prob 0 and counts for nothing.

Shapes: B scenes, G answers a scene, N = B * G, P prompt slots, A answer slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional

from spanvla_ros.model.action_heads import HEADS, AnswerError, AnswerHead, head_of
from spanvla_ros.model.backbone import MASKED, Backbone, Prefix
from spanvla_ros.model.config import WAYPOINT_WORDS
from spanvla_ros.model.policy import Policy
from spanvla_ros.model.prompt import FAST_TEXT
from spanvla_ros.training.rewards import Rollout
from spanvla_ros.types import SpanvlaError

WORDS, ACTION, FORCED = 0, 1, 2
ENDING_TOKENS = 2


@dataclass(frozen=True)
class Answers:
    """Sampled answers `ids [N, A]` with what each token was drawn from (`kind`).

    `valid` marks the tokens that are there, `closed [N]` the answers whose reasoning the model
    ended itself.
    """

    ids: Tensor
    kind: Tensor
    valid: Tensor
    closed: Tensor

    @property
    def chosen(self) -> Tensor:
        """1 where a token was drawn, 0 where it was forced or is padding."""
        return ((self.kind != FORCED) & (self.valid > 0)).float()


class Grammar:
    """Which tokens may stand where in an answer of a model."""

    def __init__(self, policy: Policy) -> None:
        """Read it off the layout and the head; expert heads speak action tokens."""
        self.layout, self.config = policy.layout, policy.config
        head = head_of(self.config)
        said = head if isinstance(head, AnswerHead) else HEADS['tokens']
        assert isinstance(said, AnswerHead)
        self.head = said
        vocabulary = policy.backbone.network.lm_head.weight.shape[0]
        words = torch.from_numpy(self.layout.reasoning_mask(vocabulary))
        action = torch.zeros(vocabulary, dtype=torch.bool)
        action[torch.from_numpy(self.head.allowed(self.layout, 0))] = True
        anything = torch.ones(vocabulary, dtype=torch.bool)
        self.allowed = torch.stack([words, action, anything]).to(policy.device)
        self.room = self.config.answer_tokens - ENDING_TOKENS
        self.most_actions = self.config.waypoints * (
            WAYPOINT_WORDS if self.config.head == 'text' else 1
        )
        self.longest = self.config.answer_tokens + self.most_actions + 1

    def log_probs(self, logits: Tensor, kind: Tensor, temperature: float) -> Tensor:
        """Log-probs over V of logits `[..., V]` restricted to what `kind [...]` allows."""
        allowed = self.allowed[kind]
        return functional.log_softmax((logits / temperature).masked_fill(~allowed, -torch.inf), -1)


@torch.no_grad()
def sample_answers(
    policy: Policy,
    prompt: Prefix,
    valid: Tensor,
    group: int,
    temperature: float,
    generator: torch.Generator,
) -> Answers:
    """G answers to each of B prompts, token by token over the one prefill of each.

    Args:
        policy: the model.
        prompt: K/V of all layers over the prompts `[L, B, kv, P, hd]`.
        valid: prompt slots that may be attended to `[B, P]`.
        group: answers a prompt.
        temperature: of sampling; log-probs are taken at the same.
        generator: all randomness.
    """
    grammar, layout = Grammar(policy), policy.layout
    rows, slots = valid.shape[0] * group, valid.shape[1]
    longest = grammar.longest
    keys, values = (
        functional.pad(kv.detach().repeat_interleave(group, 1), (0, 0, 0, longest))
        for kv in (prompt.keys, prompt.values)
    )
    attended = functional.pad(valid.repeat_interleave(group, 0), (0, longest))
    ids = torch.full((rows, longest), layout.padding_id, device=valid.device)
    kind = torch.full_like(ids, FORCED)
    there = torch.zeros_like(ids, dtype=torch.float32)
    drawer = _Drawer(grammar, rows)
    if valid.is_cuda:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        generator = torch.Generator(valid.device).manual_seed(seed)
    logits = None
    for step in range(longest):
        token, drawn_from = drawer.next(logits, temperature, generator)
        ids[:, step], kind[:, step] = token, drawn_from
        there[:, step] = (token != layout.padding_id).float()
        if drawer.done:
            break
        new = policy.backbone.decode(
            token[:, None], ids.new_tensor([slots + step]), keys, values, attended
        )
        assert new.hidden is not None
        keys[..., slots + step, :] = new.keys[..., 0, :]
        values[..., slots + step, :] = new.values[..., 0, :]
        attended[:, slots + step] = there[:, step]
        logits = policy.backbone.logits(new.hidden[:, 0]).float()
    length = int(there.sum(1).max())
    return Answers(ids[:, :length], kind[:, :length], there[:, :length], drawer.closed)


class _Drawer:
    """Where each answer of a group stands in the grammar."""

    BEGIN, THINK, END_THOUGHT, ACT, END, DONE = range(6)

    def __init__(self, grammar: Grammar, rows: int) -> None:
        self.grammar = grammar
        self.phase = torch.full((rows,), self.BEGIN, device=grammar.allowed.device)
        self.said = torch.zeros_like(self.phase)
        self.acted = torch.zeros_like(self.phase)
        self.closed = torch.ones_like(self.phase, dtype=torch.bool)

    @property
    def done(self) -> bool:
        return bool((self.phase == self.DONE).all())

    def next(
        self, logits: Tensor | None, temperature: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The next token of each answer, and what it was drawn from."""
        layout = self.grammar.layout
        token = torch.full_like(self.phase, layout.padding_id)
        kind = torch.full_like(self.phase, FORCED)
        kind[self.phase == self.THINK] = WORDS
        kind[self.phase == self.ACT] = ACTION
        if logits is not None:
            drawn = self.grammar.log_probs(logits, kind, temperature).exp()
            token = torch.multinomial(drawn, 1, generator=generator)[:, 0]
        full = (self.phase == self.THINK) & (self.said >= self.grammar.room)
        kind[full] = FORCED
        self.closed &= ~full
        forced = {
            self.BEGIN: layout.think_id,
            self.END_THOUGHT: layout.action_start_id,
            self.END: layout.turn_end_id,
            self.DONE: layout.padding_id,
        }
        for phase, word in forced.items():
            token[self.phase == phase] = word
        token[full] = layout.think_end_id
        self._advance(token)
        return token, kind

    def _advance(self, token: Tensor) -> None:
        layout, before = self.grammar.layout, self.phase.clone()
        self.said += (before <= self.THINK).long()
        self.acted += (before == self.ACT).long()
        thinking, acting = before == self.THINK, before == self.ACT
        self.phase[before == self.BEGIN] = self.THINK
        self.phase[thinking & (token == layout.think_end_id)] = self.END_THOUGHT
        starts = thinking & (token == layout.action_start_id)
        self.phase[starts | (before == self.END_THOUGHT)] = self.ACT
        self.phase[acting & (self.acted >= self.grammar.most_actions)] = self.END
        self.phase[acting & (token == layout.turn_end_id)] = self.DONE
        self.phase[before == self.END] = self.DONE


def answer_log_probs(
    policy: Policy,
    prompt: Prefix,
    valid: Tensor,
    answers: Answers,
    group: int,
    temperature: float,
) -> Tensor:
    """Log-probs `[N, A]` of sampled tokens, one pass over all answers on the shared prefill.

    Gradients reach the prompt's K/V, too; forced tokens and padding have 0.
    """
    keys, values = (kv.repeat_interleave(group, 1) for kv in (prompt.keys, prompt.values))
    attended = valid.repeat_interleave(group, 0)
    hidden = extend(
        policy.backbone, answers.ids[:, :-1], answers.valid[:, :-1], keys, values, attended
    )
    kind = answers.kind[:, 1:]
    logits = policy.backbone.logits(hidden).float()
    every = Grammar(policy).log_probs(logits, kind, temperature)
    found = every.gather(-1, answers.ids[:, 1:, None])[..., 0]
    found = torch.where(answers.chosen[:, 1:] > 0, found, torch.zeros_like(found))
    return functional.pad(found, (1, 0))


def extend(
    backbone: Backbone, ids: Tensor, there: Tensor, keys: Tensor, values: Tensor, valid: Tensor
) -> Tensor:
    """Hidden states `[N, A, H]` of tokens behind cached K/V `[L, N, kv, P, hd]`, in one pass.

    Args:
        backbone: the language model.
        ids: tokens `[N, A]`.
        there: 0 where a token is padding.
        keys: cached keys.
        values: cached values.
        valid: cached slots that may be attended to `[N, P]`.
    """
    text = backbone.text
    x = text.embed_tokens(ids)
    slots, length = keys.shape[3], ids.shape[1]
    cos, sin, causal = backbone.cos, backbone.sin, backbone.causal
    assert isinstance(cos, Tensor)
    assert isinstance(sin, Tensor)
    assert isinstance(causal, Tensor)
    cos, sin = (table[slots : slots + length] for table in (cos, sin))
    open_slots = torch.cat([valid, there], 1)
    bias = ((1.0 - open_slots) * MASKED)[:, None, None, :].expand(-1, 1, length, -1)
    bias = bias + functional.pad(causal[:length, :length], (slots, 0))
    for index, layer in enumerate(text.layers):
        x, _, _ = backbone.run_layer(layer, x, bias, cos, sin, keys[index], values[index])
    return functional.rms_norm(x, (x.shape[-1],), text.norm.weight, backbone.epsilon)


def lengths(policy: Policy, answers: Answers) -> Int64[np.ndarray, 'n 2']:
    """Tokens of each answer up to its action start, and behind it."""
    there = answers.valid > 0
    started = (answers.ids == policy.layout.action_start_id) & there
    before = (started.cumsum(1) == 0) & there
    thought = before.sum(1) + started.any(1)
    found = torch.stack([thought, there.sum(1) - thought], 1)
    return np.asarray(found.cpu().numpy(), dtype=np.int64)


def to_rollouts(policy: Policy, answers: Answers) -> list[Rollout]:
    """Words and poses of sampled answers; an answer that is no trajectory has no poses."""
    grammar, layout = Grammar(policy), policy.layout
    if policy.normalization is None:
        raise SpanvlaError('grpo: the model has no normalization; train sft first')
    found = []
    ids, valid, closed_ids = answers.ids.cpu(), answers.valid.cpu(), answers.closed.tolist()
    for row, there, closed in zip(ids, valid, closed_ids, strict=True):
        words = row[there > 0].tolist()
        text = layout.decode_answer(words)
        start = words.index(layout.action_start_id) + 1 if layout.action_start_id in words else 0
        poses: np.ndarray | None = None
        try:
            if start:
                poses = grammar.head.decode(layout, policy.normalization, words[start:])
        except AnswerError:
            poses = None
        fast = not text or text.startswith(FAST_TEXT)
        thinking = 'fast' if fast else 'slow'
        found.append(Rollout(poses, '' if fast else text, thinking, closed))
    return found
