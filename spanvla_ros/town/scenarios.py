"""Scenario families: each seed draws one drive from the ranges of `config/town/ranges.yaml`.

Held-out seeds are 1,000,000 and above. After mReasoning's kinds of scene (SpanVLA), families of
short drives, and `mix`, a long road with the first five of them. What a seed draws never changes:
held-out sets are drawn anew from their seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spanvla_ros.town.draft import Draft
from spanvla_ros.town.families import FIRST_FAMILIES, HAZARDS, MIX, NEW_FAMILIES
from spanvla_ros.town.ranges import Ranges, load_ranges, ranges_sha256
from spanvla_ros.town.traffic import World
from spanvla_ros.types import SpanvlaError, Vehicle

__all__ = [
    'FAMILIES',
    'FIRST_FAMILIES',
    'HAZARDS',
    'HELD_OUT_SEED',
    'MIX',
    'Ranges',
    'load_ranges',
    'make_world',
    'ranges_sha256',
]

FAMILIES = (*FIRST_FAMILIES, *NEW_FAMILIES)
HELD_OUT_SEED = 1_000_000
# Part of the seed: a new family goes to the end, or the others would draw other worlds.
_NUMBERS = {name: number for number, name in enumerate((*FIRST_FAMILIES, MIX, *NEW_FAMILIES))}


def make_world(
    family: str, seed: int, ranges: Ranges | None = None, vehicle: Vehicle | None = None
) -> World:
    """The world of a family and seed, always the same one, whatever vehicle drives in it.

    Raises:
        SpanvlaError: unknown family.
    """
    if family not in _NUMBERS:
        raise SpanvlaError(f'{family!r} is not a town family; use one of {(*FAMILIES, MIX)}')
    rng = np.random.default_rng([_NUMBERS[family], seed])
    world = Draft(rng, ranges or Ranges(), family, seed).world()
    return world if vehicle is None else replace(world, vehicle=vehicle)
