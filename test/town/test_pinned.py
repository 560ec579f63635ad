"""Held-out sets are fixed: what a family and a seed draw never changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.scenarios import MIX
from spanvla_ros.town.snapshots import Snapshot, hazard_pairs, mirrored, sample_snapshots

RENDERER = Renderer(TOWN_CAMERAS)


def digest(snapshots: list[Snapshot]) -> str:
    """Of the pictures and, to a tenth of a millimetre, of pasts, plans and reasons."""
    total = hashlib.sha256()
    for one in snapshots:
        world = one.world
        total.update(
            RENDERER.draw(world.ground(), world.boxes(), world.tint, one.ego.pose).tobytes()
        )
        for numbers in (one.history, one.plan.poses, one.plan.speeds_mps, world.route().points):
            total.update((np.round(numbers, 4) + 0.0).tobytes())
        total.update(repr([(c.kind, c.behaviour) for c in one.plan.components]).encode())
        total.update(str(one.plan.decision).encode())
    return total.hexdigest()[:16]


@pytest.mark.parametrize(
    ('family', 'expected'),
    [
        ('lane_keeping', '52484683fcc95e2f'),
        ('lead_vehicle', 'bf7386c8e4951ace'),
        ('pedestrian', '9e83fce0ca6d480a'),
        ('red_light', 'ec2d0da13b5b47fb'),
        ('turns', 'd4d262e74fca856c'),
        pytest.param(MIX, '0890690e2f5ed9bd', marks=pytest.mark.slow),
    ],
)
def test_the_first_families_draw_what_they_always_drew(family: str, expected: str) -> None:
    found = []
    for seed in (3, 1_000_000) if family != MIX else (3,):
        found += sample_snapshots(family, seed, 3)
        found.append(mirrored(found[-1]))
    assert digest(found) == expected


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('lead', 'e81574aa2a7496d2'),
        ('light', '4c5f0308d9cf2c5f'),
        ('pedestrian', '081d645094383114'),
    ],
)
def test_the_first_pairs_are_what_they_always_were(kind: str, expected: str) -> None:
    pairs = hazard_pairs(kind, 2, 1_500_000)
    assert digest([half for pair in pairs for half in (pair.present, pair.absent)]) == expected
