"""Means with 95 % intervals by the bootstrap over whole drives.

Moments of one drive resemble one another, so drives are drawn anew, not rows. Percentile
intervals, 2,000 draws, a fixed seed: the same numbers give the same interval everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

DRAWS = 2_000
LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; all None where there is nothing to average."""

    mean: float | None
    low: float | None
    high: float | None
    count: int = 0

    def content(self) -> dict[str, float | int | None]:
        """As it stands in a summary."""
        return {'mean': self.mean, 'low': self.low, 'high': self.high, 'count': self.count}


NOTHING = Estimate(None, None, None)


def mean_of(values: ArrayLike, drives: Sequence[Hashable] | np.ndarray) -> Estimate:
    """The mean of one value a row; `drives` names the drive each row is from."""
    values = np.asarray(values, dtype=np.float64)
    return ratio_of(values, np.ones(len(values)), drives)


def ratio_of(
    above: ArrayLike, below: ArrayLike, drives: Sequence[Hashable] | np.ndarray
) -> Estimate:
    """Sum over sum, such as collisions over kilometers, with an interval over drives."""
    above = np.asarray(above, dtype=np.float64)
    below = np.asarray(below, dtype=np.float64)
    if len(above) == 0 or below.sum() == 0:
        return NOTHING
    names = {name: index for index, name in enumerate(dict.fromkeys(list(drives)))}
    owner = np.array([names[name] for name in drives])
    top = np.bincount(owner, above, len(names))
    bottom = np.bincount(owner, below, len(names))
    mean = float(above.sum() / below.sum())
    low, high = np.percentile(_drawn_ratios(top, bottom), LEVEL).tolist()
    # With a single drive all draws are equal, but for the last bit of their sums.
    return Estimate(mean, min(low, mean), max(high, mean), len(above))


def _drawn_ratios(
    top: Float64[np.ndarray, ' d'], bottom: Float64[np.ndarray, ' d']
) -> Float64[np.ndarray, ' b']:
    rng = np.random.default_rng(0)
    count = len(top)
    weights = rng.multinomial(count, np.full(count, 1.0 / count), size=DRAWS)
    below = weights @ bottom
    found = np.divide(weights @ top, below, out=np.full(DRAWS, math.nan), where=below != 0)
    return found[np.isfinite(found)]
