"""EPDMS over two stages: a plan's score times that of the scenes it leads to.

The second stage starts about 4 s later from drawn scenes near the end of the first plan; those
scenes are not free, so this follows the published formula and takes scores as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.types import SpanvlaError

STAGE_TWO_VARIANCE_M2 = 0.1


@dataclass(frozen=True)
class SecondStagePair:
    """Scores of one follow-up scene and of the frame before it, and where each begins (m)."""

    now: float
    before: float
    start_now: tuple[float, float]
    start_before: tuple[float, float]


@dataclass(frozen=True)
class TwoStageGroup:
    """First-stage totals of a frame and the one 0.5 s before, and where their plans end (m)."""

    now: float
    before: float
    end_now: tuple[float, float]
    end_before: tuple[float, float]
    second_stage: tuple[SecondStagePair, ...]


def second_stage_weights(
    end_m: tuple[float, float], starts_m: Sequence[tuple[float, float]]
) -> Float64[np.ndarray, 'n']:
    """How much each follow-up scene counts: a Gaussian of the distance from the plan's end.

    Weights sum to 1; where all are nearly 0 they are equal.
    """
    gap = np.asarray(starts_m, dtype=np.float64) - np.asarray(end_m, dtype=np.float64)
    weights = np.exp(-(gap**2).sum(axis=1) / (2.0 * STAGE_TWO_VARIANCE_M2))
    total = float(weights.sum())
    if math.isclose(total, 0.0, abs_tol=1e-8):
        return np.full(len(weights), 1.0 / len(weights))
    normalised: Float64[np.ndarray, 'n'] = weights / total
    return normalised


def two_stage_epdms(groups: Sequence[TwoStageGroup]) -> float:
    """EPDMS over two stages: each first-stage total times its weighted follow-up, averaged.

    The two frames of a group are averaged first, then the groups, as the official pseudo
    closed-loop aggregation does.
    """
    if not groups or any(not group.second_stage for group in groups):
        raise SpanvlaError('two-stage score: every group needs at least one second-stage pair')
    totals = []
    for group in groups:
        pairs = group.second_stage
        now = second_stage_weights(group.end_now, [pair.start_now for pair in pairs])
        before = second_stage_weights(group.end_before, [pair.start_before for pair in pairs])
        follow_now = float(now @ np.array([pair.now for pair in pairs]))
        follow_before = float(before @ np.array([pair.before for pair in pairs]))
        totals.append((group.now * follow_now + group.before * follow_before) / 2.0)
    return float(np.mean(totals))
