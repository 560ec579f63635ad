"""Reasoning by greedy decoding through the exported graphs, in slices that fit between frames.

An episode is one reasoning of one frame: `prefill_reason`, then a token at a time. Tokens are
constrained to text: `<think>` is given, then words until `</think>` or `<action_start>`, at most
R tokens in all. The prompt's own reasoning slot is masked here, so that a reasoning reads the
pictures and never its predecessor.

Paper: SpanVLA 3.1.2 and Fig. 4: the model chooses slow or fast thinking by its first words.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from spanvla_ros.model.action_heads import AnswerHead
from spanvla_ros.model.prompt import FAST_TEXT, PromptLayout
from spanvla_ros.runtime.backend import Backend
from spanvla_ros.runtime.thinking import Reasoning, ThinkLimits, ThinkMeter
from spanvla_ros.types import PlanError

ENDING_TOKENS = 2


@dataclass(frozen=True)
class Prompt:
    """The inputs of a prefill, and the stamp of their anchor picture."""

    stamp_ns: int
    ids: Int64[np.ndarray, '1 p']
    embeds: Float32[np.ndarray, 'i d']
    valid: Float32[np.ndarray, '1 p']


@dataclass(frozen=True)
class AnswerCache:
    """Keys and values of prompt and answer in S slots, and which slots may be attended."""

    keys: Float32[np.ndarray, 'l 1 g s e']
    values: Float32[np.ndarray, 'l 1 g s e']
    valid: Float32[np.ndarray, '1 s']


class Answer:
    """A prefilled prompt, and behind it an answer that grows token by token."""

    def __init__(self, backend: Backend, prompt: Prompt) -> None:
        """Prefill; there are no logits before the first token is fed."""
        self._backend = backend
        room = backend.config.sequence_tokens
        keys, values, _ = backend.prefill_reason(prompt.ids, prompt.embeds, prompt.valid)
        valid = np.pad(prompt.valid, ((0, 0), (0, room - prompt.valid.shape[1])))
        self.cache = AnswerCache(padded(keys, room), padded(values, room), valid)
        self.logits: Float32[np.ndarray, '1 v'] | None = None
        self.length = 0

    def feed(self, token: int) -> None:
        """Append one token."""
        cache = self.cache
        slot = self._backend.config.prompt_tokens + self.length
        self.logits, keys, values = self._backend.decode(
            np.array([[token]], dtype=np.int64),
            np.array([slot], dtype=np.int64),
            cache.keys,
            cache.values,
            cache.valid,
        )
        cache.keys[:, :, :, slot : slot + 1] = keys
        cache.values[:, :, :, slot : slot + 1] = values
        cache.valid[:, slot] = 1.0
        self.length += 1

    def say(
        self,
        head: AnswerHead,
        layout: PromptLayout,
        rng: np.random.Generator | None = None,
        temperature: float = 1.0,
    ) -> list[int]:
        """The tokens of an action, of those the head allows; the answer then stands as before.

        Args:
            head: of the model.
            layout: of the model.
            rng: draws tokens by their probability; None takes the most probable.
            temperature: divides the logits before a draw.
        """
        length, logits = self.length, self.logits
        said: list[int] = []
        while not said or said[-1] != layout.turn_end_id:
            if said:
                self.feed(said[-1])
            assert self.logits is not None
            allowed = head.allowed(layout, len(said))
            if len(allowed) == 1:
                said.append(int(allowed[0]))
                continue
            scores = self.logits[0, allowed].astype(np.float64) / temperature
            if not np.isfinite(scores).all():
                raise PlanError('answer: the model gave a number that is not finite; check files')
            if rng is not None:
                scores = scores + rng.gumbel(size=len(scores))
            said.append(int(allowed[scores.argmax()]))
        self._rewind(length, logits)
        return said

    def _rewind(self, length: int, logits: Float32[np.ndarray, '1 v'] | None) -> None:
        start = self._backend.config.prompt_tokens
        self.cache.valid[:, start + length : start + self.length] = 0.0
        self.length, self.logits = length, logits


class Reasoner:
    """One reasoning episode at a time; `advance` works on it within a budget."""

    def __init__(
        self, backend: Backend, layout: PromptLayout, limits: ThinkLimits | None = None
    ) -> None:
        """Work with `backend` and the token layout of its model, within `limits`."""
        self._backend = backend
        self._layout = layout
        self._template = layout.encode_answer('', 'fast')[1:-1]
        self._text_mask: Bool[np.ndarray, 'v'] | None = None
        self.meter = ThinkMeter(limits or ThinkLimits())
        self.reset()

    def reset(self) -> None:
        """Drop the episode under way."""
        self._prompt: Prompt | None = None
        self._answer: Answer | None = None
        self._said: list[int] = []
        self._forced = False
        self._operation_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether an episode is under way."""
        return self._prompt is not None

    def start(self, prompt: Prompt) -> None:
        """Begin an episode; one under way is dropped."""
        self.reset()
        valid = prompt.valid.copy()
        valid[:, self._layout.slot] = 0.0
        self._prompt = Prompt(prompt.stamp_ns, prompt.ids, prompt.embeds, valid)
        self._forced = self.meter.spent

    def advance(self, budget_ms: float, tokens: int | None = None) -> Reasoning | None:
        """Work on the episode; returns it when it ends.

        Does at least one graph call, and starts no further one that would, by the time of the
        last, end after the budget. Where the drive's tokens are spent it ends at once, as fast.
        With `tokens` the work does not depend on the clock if the budget is infinite.

        Args:
            budget_ms: wall time to stay within.
            tokens: most tokens to decode in this slice.
        """
        if self._forced and self._prompt is not None:
            finished = Reasoning(self._prompt.stamp_ns, '', 'fast', 0, forced=True)
            self.meter.count(finished)
            self.reset()
            return finished
        began = time.perf_counter()
        done = 0
        while self.busy and (tokens is None or done < tokens):
            spent_s = time.perf_counter() - began
            if done and (spent_s + self._operation_s) * 1e3 > budget_ms:
                break
            ended = self._operate()
            done += 1
            if ended is not None:
                return ended
        return None

    def run(self, prompt: Prompt) -> tuple[Reasoning, Answer]:
        """A whole episode at once with the action start appended (schedule `sequential`).

        Returns:
            The reasoning, and the answer up to the action start.
        """
        self.start(prompt)
        reasoning: Reasoning | None = None
        while reasoning is None:
            reasoning = self._operate(keep=True)
        answer = self._answer
        assert answer is not None
        closing = [self._layout.think_end_id, self._layout.action_start_id]
        for token in closing[closing.index(self._said[-1]) :]:
            answer.feed(token)
        self.reset()
        return reasoning, answer

    def without_thought(self, prompt: Prompt) -> Answer:
        """An answer of the fast template up to the action start; no episode is touched."""
        answer = Answer(self._backend, prompt)
        for token in self._layout.encode_answer('', 'fast').tolist():
            answer.feed(token)
        return answer

    def _operate(self, *, keep: bool = False) -> Reasoning | None:
        assert self._prompt is not None
        began = time.perf_counter()
        finished = None
        if self._answer is None:
            self._answer = Answer(self._backend, self._prompt)
        else:
            finished = self._next_token(self._answer)
            if finished is None and not keep and self._is_fast(self._said[1:]):
                # The rest of the fast template says nothing new.
                finished = self._finished()
        self._operation_s = time.perf_counter() - began
        self.meter.spent_s += self._operation_s
        if finished is not None:
            self.meter.count(finished)
            if not keep:
                self.reset()
        return finished

    def _next_token(self, answer: Answer) -> Reasoning | None:
        layout = self._layout
        if answer.logits is None:
            self._said.append(layout.think_id)
            answer.feed(layout.think_id)
            return None
        token = self._choose(answer.logits[0])
        if self._forced:
            words = len(self._said) - 1
            token = int(self._template[words])
        elif len(self._said) >= self._room or self.meter.spent:
            token = layout.think_end_id
        self._said.append(token)
        if not self._forced:
            self.meter.said()
        if token in (layout.think_end_id, layout.action_start_id):
            return self._finished()
        answer.feed(token)
        return None

    @property
    def _room(self) -> int:
        """Most tokens of a reasoning before its end, `<think>` among them."""
        room = self._backend.config.answer_tokens - ENDING_TOKENS
        budget = self.meter.limits.reasoning_tokens
        return min(room, budget + 1) if budget else room

    def _choose(self, logits: Float32[np.ndarray, 'v']) -> int:
        if self._text_mask is None or len(self._text_mask) != len(logits):
            self._text_mask = self._layout.reasoning_mask(len(logits))
        return int(np.argmax(np.where(self._text_mask, logits, -np.inf)))

    def _is_fast(self, words: list[int]) -> bool:
        return bool(words) and words[0] == int(self._template[0])

    def _finished(self) -> Reasoning:
        assert self._prompt is not None
        words = self._said[1:]
        fast = self._is_fast(words) or len(words) < ENDING_TOKENS
        text = '' if fast else self._layout.decode_answer(self._said)
        return Reasoning(
            self._prompt.stamp_ns,
            '' if text.startswith(FAST_TEXT) else text,
            'fast' if fast else 'slow',
            len(self._said),
            self._forced,
        )


def padded(
    cache: Float32[np.ndarray, 'l 1 g p e'], length: int
) -> Float32[np.ndarray, 'l 1 g s e']:
    """Keys or values with empty slots appended up to `length`."""
    layers, batch, heads, present, size = cache.shape
    whole = np.zeros((layers, batch, heads, length, size), dtype=cache.dtype)
    whole[:, :, :, :present] = cache
    return whole
