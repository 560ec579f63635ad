from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely.ops import unary_union

from spanvla_ros.town.bodies import Paint, paint_ground
from spanvla_ros.town.elements import ROAD
from spanvla_ros.town.lane_map import build_map, ego_lane, route_ids
from spanvla_ros.town.roads import (
    SPACING_M,
    Bend,
    CrossSection,
    JunctionPlan,
    OverlapError,
    StretchPlan,
    lay_out,
)
from spanvla_ros.town.scenarios import FAMILIES, MIX, make_world

START = (3.0, -2.0, 0.7)
WORLDS = [(family, seed) for family in FAMILIES for seed in range(4)] + [(MIX, 0)]


def turning(turn: str) -> list[StretchPlan | JunctionPlan]:
    section = CrossSection(0, 0, 1)
    return [StretchPlan(80.0, section), JunctionPlan(turn), StretchPlan(80.0, section)]


@pytest.mark.parametrize(('turn', 'angle'), [('left', 90.0), ('right', -90.0), ('straight', 0.0)])
def test_a_junction_turns_by_a_right_angle(turn: str, angle: float) -> None:
    corridor = lay_out(turning(turn), START)
    total = math.degrees(corridor.yaw_rad[-1] - corridor.yaw_rad[0])
    assert total == pytest.approx(angle, abs=1e-6)
    assert np.allclose(np.hypot(np.diff(corridor.x_m), np.diff(corridor.y_m)), SPACING_M)


def test_a_bend_turns_by_its_curvature_times_its_length() -> None:
    bend = Bend(20.0, 50.0, 0.02, ramp_m=10.0)
    corridor = lay_out([StretchPlan(100.0, CrossSection(), (bend,))], (0.0, 0.0, 0.0))
    assert corridor.yaw_rad[-1] == pytest.approx(0.02 * (50.0 - 10.0), abs=1e-3)
    assert np.abs(np.diff(corridor.curvature_per_m)).max() <= 0.02 / 10.0 * SPACING_M + 1e-9


def test_a_road_over_itself_is_refused() -> None:
    circle = StretchPlan(400.0, CrossSection(), (Bend(0.0, 400.0, 1 / 40.0),))
    with pytest.raises(OverlapError):
        lay_out([circle], START)


@given(st.floats(0.0, 180.0), st.floats(-8.0, 8.0), st.sampled_from(['left', 'right', 'straight']))
def test_locating_undoes_placing(s_m: float, d_m: float, turn: str) -> None:
    corridor = lay_out(turning(turn), START)
    if abs(corridor.curvature_at(s_m)) > 0 and abs(d_m) > 3.0:
        d_m = math.copysign(3.0, d_m)
    s_m = min(s_m, corridor.length_m - 1.0)
    x, y, _ = corridor.place(s_m, d_m)
    found = corridor.locate(x, y, s_m + 3.0)
    assert found == pytest.approx((s_m, d_m), abs=0.08)


@pytest.mark.parametrize(('family', 'seed'), WORLDS)
def test_map_polygons_are_valid_and_lanes_join(family: str, seed: int) -> None:
    world = make_world(family, seed)
    road = build_map(world.corridor, 11.0)
    lanes = {lane.lane_id: lane for block in road.roadblocks for lane in block.lanes}
    for block in road.roadblocks:
        for ring in (block.polygon, *(lane.polygon for lane in block.lanes)):
            assert shapely.Polygon(ring).is_valid
    for lane in lanes.values():
        for follower in lane.successors:
            assert np.allclose(lane.centerline[-1], lanes[follower].centerline[0], atol=0.02)


@pytest.mark.parametrize(('family', 'seed'), WORLDS)
def test_the_route_leads_along_the_ego_lane_from_end_to_end(family: str, seed: int) -> None:
    corridor = make_world(family, seed).corridor
    road = build_map(corridor, 11.0)
    blocks = {block.roadblock_id: block for block in road.roadblocks}
    lane = f'f0_{ego_lane(corridor.stretches[0].section)}'
    driven = []
    for name, following in pairwise((*route_ids(corridor), '')):
        by_id = {x.lane_id: x for x in blocks[name].lanes}
        driven.append(by_id[lane].centerline)
        onward = [f for f in by_id[lane].successors if f.startswith(f'{following}_')]
        lane = onward[0] if following else lane
    line = shapely.LineString(np.concatenate(driven))
    truth = np.stack([corridor.x_m, corridor.y_m], axis=1)[::20]
    assert max(line.distance(shapely.Point(p)) for p in truth) < 0.15


@pytest.mark.parametrize(('family', 'seed'), WORLDS)
def test_painted_road_is_the_drivable_area_in_convex_pieces(family: str, seed: int) -> None:
    corridor = make_world(family, seed).corridor
    pieces = paint_ground(corridor, Paint())
    for piece in pieces:
        ring = shapely.Polygon(piece.points)
        assert ring.is_valid
        assert ring.convex_hull.area - ring.area < 0.05 * ring.area + 1e-6
    painted = unary_union([shapely.Polygon(p.points) for p in pieces if p.class_id == ROAD])
    road = build_map(corridor, 11.0)
    drivable = unary_union(
        [shapely.Polygon(b.polygon).buffer(0.01) for b in road.roadblocks if not b.is_connector]
        + [shapely.Polygon(area) for area in road.intersections]
    )
    assert painted.symmetric_difference(drivable).area < 0.02 * drivable.area
