"""Roundabouts: the way round, and the ground of the ring. Traffic keeps right and goes round left.

Everything is in the frame of the junction's entry: x along the lane, y to its left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

IN_M, OUT_M = 2.2, 2.5
SECTORS = 28
SMOOTH_M = 3.0


@dataclass(frozen=True)
class Ring:
    """The lane round the island: its center in the world, its radius, where the corridor joins."""

    x_m: float
    y_m: float
    radius_m: float
    joins_m: float

    def sectors(self, inner_m: float, outer_m: float) -> list[Float64[np.ndarray, '4 2']]:
        """The band between two radii in convex pieces."""
        turn = np.linspace(0.0, 2 * math.pi, SECTORS + 1)
        unit = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        low, high = self.middle + inner_m * unit, self.middle + outer_m * unit
        return [np.stack([low[i], high[i], high[i + 1], low[i + 1]]) for i in range(SECTORS)]

    @property
    def middle(self) -> Float64[np.ndarray, '2']:
        """The center."""
        return np.array([self.x_m, self.y_m])

    def path_to(self, point: Float64[np.ndarray, '2']) -> tuple[tuple[float, float, float], ...]:
        """Once round the ring to a point near it, each meter a pose, in driving direction."""
        arm = point - self.middle
        radius = float(np.hypot(*arm))
        end = math.atan2(arm[1], arm[0])
        back = np.arange(math.floor(2 * math.pi * radius * 0.8), -1.0, -1.0) / radius
        angle = end - back
        return tuple(
            zip(
                (self.x_m + radius * np.cos(angle)).tolist(),
                (self.y_m + radius * np.sin(angle)).tolist(),
                (angle + math.pi / 2).tolist(),
                strict=True,
            )
        )


def ring_curvature(
    turn: str, ring_m: float, swerve_m: float, middle_m: float, spacing_m: float
) -> tuple[Float64[np.ndarray, 'n'], float, float]:
    """Curvature of the way round, where the ring begins on it, and where its middle is.

    Right onto the ring, left along it, right off it again.

    Args:
        turn: `right` takes the first exit, `straight` the second.
        ring_m: radius of the lane round the island.
        swerve_m: radius of the ways on and off.
        middle_m: how far left of the lane the ring's center lies.
        spacing_m: of the samples.
    """
    swerve = math.acos((middle_m + swerve_m) / (swerve_m + ring_m))
    total = -math.pi / 2 if turn == 'right' else 0.0
    lengths = (swerve_m * swerve, ring_m * (total + 2 * swerve), swerve_m * swerve)
    counts = [round(length / spacing_m) for length in lengths]
    values = [-swerve / (counts[0] * spacing_m), (total + 2 * swerve) / (counts[1] * spacing_m),
              -swerve / (counts[2] * spacing_m)]  # fmt: skip
    margin = round(SMOOTH_M / spacing_m)
    bare = np.concatenate(
        [np.zeros(margin), *(np.full(n, v) for n, v in zip(counts, values, strict=True)),
         np.zeros(margin)]
    )  # fmt: skip
    box = np.ones(margin) / margin
    starts = (margin + counts[0]) * spacing_m
    return np.convolve(bare, box, mode='same'), starts, starts + 0.5 * counts[1] * spacing_m
