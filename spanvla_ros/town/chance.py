"""Plain draws of one generator: the order in which they are asked for makes a seed what it is."""

from __future__ import annotations

import numpy as np

from spanvla_ros.town import bodies
from spanvla_ros.town.elements import Color
from spanvla_ros.town.ranges import Span


class Chance:
    """Numbers, sizes and colors, one after another."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draw from `rng`."""
        self.rng = rng

    def within(self, span: Span) -> float:
        """One number of a range, any as likely."""
        return float(self.rng.uniform(*span))

    def chance(self, share: float) -> bool:
        """Whether something of this share happens."""
        return bool(self.rng.random() < share)

    def color(self, low: int = 40, high: int = 220) -> Color:
        """A color."""
        r, g, b = self.rng.integers(low, high, 3)
        return int(r), int(g), int(b)

    def size(self) -> tuple[float, float, float]:
        """Length, width and height of a car."""
        return (
            float(self.rng.uniform(4.0, 5.0)),
            float(self.rng.uniform(1.75, 2.0)),
            float(self.rng.uniform(1.45, 2.1)),
        )

    def shirt(self) -> Color:
        """A color of clothes."""
        return bodies.CLOTHES[int(self.rng.integers(len(bodies.CLOTHES)))]

    def skin(self) -> Color:
        """A color of skin."""
        return bodies.SKINS[int(self.rng.integers(len(bodies.SKINS)))]
