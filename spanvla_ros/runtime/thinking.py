"""The think meter: how often the model thinks slowly, what that may cost, and when it has ceased.

Paper: SpanVLA 3.1.2 and AutoVLA 3.3: the model chooses slow or fast thinking by its first words.
A reinforced model can forget the slow way altogether, and nothing in its plans would tell; and a
slow one can cost more than a vehicle has. Both are watched and bounded here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from spanvla_ros.types import SpanvlaError


@dataclass(frozen=True)
class Reasoning:
    """A finished reasoning; `text` is empty where thinking was fast.

    `forced`: it was fast because the budget was spent, not by the model's choice. `agreement`:
    whether the decision it names was carried out by the plan of its own picture.
    """

    stamp_ns: int
    text: str
    thinking: str
    tokens: int
    forced: bool = False
    agreement: bool | None = None


@dataclass(frozen=True)
class ThinkLimits:
    """Bounds on thinking.

    `reasoning_tokens` ends one reasoning early, `drive_tokens` is what all since the last reset
    may take: after that thinking is fast. 0 is no bound. `window` is the number of reasonings the
    rate and the alarm look back on.
    """

    reasoning_tokens: int = 0
    drive_tokens: int = 0
    window: int = 100

    def __post_init__(self) -> None:
        """Refuse what bounds nothing."""
        if min(self.reasoning_tokens, self.drive_tokens) < 0 or self.window < 1:
            raise SpanvlaError('thinking: budgets must not be negative, window at least 1')


@dataclass
class ThinkMeter:
    """How often the model chose slow thinking, how fast it reasons, what is left to spend."""

    limits: ThinkLimits = ThinkLimits()
    slow: int = 0
    fast: int = 0
    forced: int = 0
    tokens: int = 0
    spent_s: float = 0.0
    drive_tokens: int = 0
    _chosen: deque[bool] = field(default_factory=deque)

    def said(self) -> None:
        """Count a decoded token."""
        self.tokens += 1
        self.drive_tokens += 1

    def count(self, reasoning: Reasoning) -> None:
        """Count a finished reasoning; a forced one was nobody's choice."""
        if reasoning.forced:
            self.forced += 1
            return
        slow = reasoning.thinking == 'slow'
        self.slow += slow
        self.fast += not slow
        self._chosen.append(slow)
        while len(self._chosen) > self.limits.window:
            self._chosen.popleft()

    def new_drive(self) -> None:
        """Give the budget of a drive anew; the rates look on."""
        self.drive_tokens = 0

    @property
    def spent(self) -> bool:
        """Whether the drive's budget is used up."""
        return 0 < self.limits.drive_tokens <= self.drive_tokens

    @property
    def slow_share(self) -> float:
        """Share of finished reasonings that were slow, 0 before the first."""
        return self.slow / max(1, self.slow + self.fast)

    @property
    def slow_rate(self) -> float | None:
        """Share of slow thinking in the window; None before the first."""
        return sum(self._chosen) / len(self._chosen) if self._chosen else None

    @property
    def alarm(self) -> str:
        """What is wrong with thinking, empty where nothing is."""
        if self.spent:
            return f'thinking is fast: its {self.limits.drive_tokens} tokens are spent'
        if len(self._chosen) == self.limits.window and not any(self._chosen):
            return f'slow thinking has died out: none in the last {self.limits.window}'
        return ''

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens in a second of decoding."""
        return self.tokens / self.spent_s if self.spent_s > 0 else 0.0
