"""What became of a drive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of a drive; `success`: goal reached, no collision, red light or excursion."""

    collided: bool
    at_fault: bool
    collided_with: str
    offroad_m: float
    red_lights_run: int
    completion: float
    distance_m: float
    time_s: float
    reached_goal: bool
    success: bool


@dataclass
class Tally:
    """What `Outcome` is counted from."""

    collided_with: str = ''
    at_fault: bool = False
    offroad_m: float = 0.0
    red_lights_run: int = 0
    distance_m: float = 0.0
    best_s_m: float = 0.0
