from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.model.prompt import build_tokenizer
from spanvla_ros.model.reasoning import (
    BEHAVIOURS,
    KINDS,
    LATERAL,
    LONGITUDINAL,
    Component,
    Decision,
    write_reasoning,
)
from spanvla_ros.town.crossing import Crossing
from spanvla_ros.town.driver import look, reference_plan
from spanvla_ros.town.families import NEW_FAMILIES
from spanvla_ros.town.motion import inside
from spanvla_ros.town.road_users import Car
from spanvla_ros.town.roads import LANE_WIDTH_M
from spanvla_ros.town.scenarios import make_world
from spanvla_ros.town.surroundings import Shift
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState

SEEDS = range(6)
CAR = (4.4, 1.8, 1.5)


def glide(world: World, until_m: float, speed_mps: float, dt_s: float = 0.1) -> World:
    """Move the ego along the line to drive at one speed, the others by their rules."""
    while world.ego_s_m < until_m:
        s = world.ego_s_m + speed_mps * dt_s
        offset, slope = world.around.line_at(s)
        x, y, yaw = world.corridor.place(s, offset)
        world.place_ego(replace(world.state, x_m=x, y_m=y, yaw_rad=yaw + math.atan(slope),
                                speed_mps=speed_mps))  # fmt: skip
        world.advance(dt_s)
    return world


def put(world: World, s_m: float, speed_mps: float) -> World:
    offset, slope = world.around.line_at(s_m)
    x, y, yaw = world.corridor.place(s_m, offset)
    world.ego_s_m = s_m
    world.place_ego(EgoState(0, x, y, yaw + math.atan(slope), speed_mps))
    return world


def test_every_word_of_the_grammar_is_a_word_of_the_tiny_tokenizer() -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.token_to_id('<unk>')
    for kind in KINDS:
        for behaviour in BEHAVIOURS:
            decisions = [Decision(a, b) for a in LONGITUDINAL for b in LATERAL]
            component = Component(kind, 20.0, behaviour)
            for decision in decisions:
                text = write_reasoning([component] * 3, decision)
                assert unknown not in tokenizer.encode(text).ids
                assert len(text.split()) <= 28


@given(st.floats(0.0, 50.0), st.floats(10.0, 40.0), st.floats(-4.0, 4.0), st.floats(-10.0, 110.0))
def test_a_shift_is_smooth_and_its_slope_is_its_derivative(start, ramp, by, s) -> None:
    shift = Shift(start, ramp, by)
    offset, slope = shift.at(s)
    assert min(0.0, by) - 1e-9 <= offset <= max(0.0, by) + 1e-9
    step = 1e-4
    difference = (shift.at(s + step)[0] - shift.at(s - step)[0]) / (2 * step)
    assert slope == pytest.approx(difference, abs=1e-3)
    assert shift.at(start)[0] == 0.0
    assert shift.at(start + ramp)[0] == pytest.approx(by)


def test_a_cutting_in_car_is_in_the_way_from_its_first_metre_and_ends_in_the_lane() -> None:
    for seed in SEEDS:
        world = make_world('cut_in', seed)
        car = world.cars[0]
        beside = car.d_m
        assert abs(beside) == LANE_WIDTH_M
        assert not any(c.kind == 'lead vehicle' for c in look(world).components)
        while not car.blinks:
            glide(world, world.ego_s_m + 1.0, 6.0)
        lead = next(c for c in look(world).components if c.kind == 'lead vehicle')
        assert lead.behaviour == 'merging'
        assert car.blinks == (-1 if beside > 0 else 1)
        assert world.without_hazard().cars[0].d_m == beside
        while car.blinks:
            glide(world, world.ego_s_m + 0.1, 1.0)
        assert car.d_m == pytest.approx(0.0, abs=1e-9)


def test_a_stop_sign_is_obeyed_by_standing_before_its_line() -> None:
    for seed in SEEDS:
        world = make_world('stop_sign', seed)
        line = world.corridor.junctions[0].stop_m
        front = 4.05
        for gap, speed, stands in ((20.0, 0.0, False), (2.0, 3.0, False), (2.0, 0.2, True)):
            twin = put(world.clone(), line - front - gap, speed)
            twin.advance(0.1)
            assert twin.signals[0].red is not stands
        assert not world.without_hazard().signals
        wait = put(world.clone(), line - front - 8.0, 5.0)
        assert reference_plan(wait).decision.longitudinal == 'stop'
        kinds = {c.kind for c in look(wait).components}
        assert 'stop sign' in kinds
        assert 'red light' not in kinds


@pytest.mark.parametrize('family', ['construction', 'lane_bias'])
def test_the_line_leads_clear_of_what_blocks_the_lane_and_the_lane_does_not(family: str) -> None:
    for seed in SEEDS:
        world = make_world(family, seed)
        around = world.around
        assert around.obstructions
        blocked = False
        for s in np.arange(around.start_m, around.goal_m, 1.5).tolist():
            put(world, s, 5.0)
            world.tally.collided_with = ''
            world._notice_collision()
            assert not world.tally.collided_with
            assert not world._offroad()
            x, y, yaw = world.corridor.place(s, 0.0)
            world.place_ego(EgoState(0, x, y, yaw, 5.0))
            world._notice_collision()
            blocked |= bool(world.tally.collided_with)
        assert blocked
        # It ends in its own lane again.
        assert around.line_at(around.goal_m)[0] == pytest.approx(0.0, abs=1e-6)


def test_without_its_cones_the_road_is_the_same_and_free() -> None:
    for seed in SEEDS:
        world = make_world('construction', seed)
        twin = world.without_hazard()
        assert not twin.around.obstructions
        assert not twin.around.shifts
        gone = [b for b in world.boxes() if b not in twin.boxes()]
        assert len(gone) == len(world.around.obstructions)
        assert twin.ground() is world.ground()
        kinds = {a.kind for a in world.scene().agents}
        assert 'traffic_cone' in kinds


def test_the_route_of_a_lane_change_leads_into_the_lane_beside() -> None:
    ends = []
    for seed in SEEDS:
        world = make_world('lane_change', seed)
        section = world.corridor.section_at(world.around.start_m)
        by = world.around.line_at(world.around.goal_m)[0]
        assert section.lanes_left if by > 0 else section.lanes_right
        places = [world.corridor.locate(x, y) for x, y in world.route().points.tolist()]
        after = world.around.shifts[0].start_m + world.around.shifts[0].ramp_m
        ends += [d / by for s, d in places if after < s < world.corridor.length_m - 5.0]
        # Goal reached means in that lane.
        put(world, world.around.goal_m, 5.0)
        assert abs(world.beside_line_m) < 0.05
    assert np.mean(ends) == pytest.approx(1.0, abs=0.1)


def test_one_gives_way_where_both_would_meet_and_not_long_before_or_after() -> None:
    crossing = Crossing(100.0, 110.0, 122.0, 2.0, 6.0)

    def oncoming(front_m: float, speed_mps: float = 8.0) -> Car:
        place = 100.0 + 6.0 + front_m + CAR[0] / 2
        return Car('car', place, 0.0, speed_mps, speed_mps, CAR, (9, 9, 9), opposing_lane=0,
                   straight_m=100.0)  # fmt: skip

    # At 5 m/s the ego is in the other lane from 1 s to 3.4 s on.
    assert crossing.must_yield([oncoming(16.0)], 105.0, 5.0)
    assert not crossing.must_yield([oncoming(60.0)], 105.0, 5.0)
    # That one is out of the way after 1.3 s; the ego from far back comes later.
    assert crossing.must_yield([oncoming(2.0)], 105.0, 5.0)
    assert not crossing.must_yield([oncoming(2.0)], 85.0, 5.0)
    # Whoever is on the other lane goes on.
    assert not crossing.must_yield([oncoming(16.0)], 111.0, 5.0)
    # Others of the road are nobody to give way to.
    turning = replace(oncoming(16.0), straight_m=math.inf)
    assert not crossing.must_yield([turning], 105.0, 5.0)


@pytest.mark.parametrize('family', ['unprotected_left', 'roundabout'])
def test_the_reference_has_to_give_way_now_and_then(family: str) -> None:
    waits = []
    for seed in SEEDS:
        world = make_world(family, seed)
        assert not world.without_hazard().must_yield()
        yields = False
        for s in np.arange(world.ego_s_m, world.around.crossing.in_m, 3.0).tolist():
            glide(world, s, 7.0)
            yields |= world.must_yield()
        waits.append(yields)
    assert np.mean(waits) > 0.6


def test_the_island_of_a_roundabout_is_no_road() -> None:
    for seed in SEEDS:
        world = make_world('roundabout', seed)
        junction = world.corridor.junctions[0]
        ring = junction.ring
        assert ring is not None
        for area in world.around.scene_map.intersections:
            assert not inside(area, ring.x_m, ring.y_m)
        on_ring = world.corridor.place(0.5 * (junction.start_m + junction.end_m), 0.0)
        assert math.hypot(on_ring[0] - ring.x_m, on_ring[1] - ring.y_m) == pytest.approx(
            ring.radius_m, abs=0.3
        )
        path = world.cars[0].joins_by
        joins = world.corridor.place(ring.joins_m, 0.0)
        assert path[-1][:2] == pytest.approx(joins[:2], abs=1e-6)
        assert math.cos(path[-1][2] - joins[2]) > math.cos(0.3)
        for s in np.arange(junction.start_m - 2.0, junction.end_m + 2.0, 2.0).tolist():
            assert not put(world, s, 3.0)._offroad()


def test_every_new_family_has_its_share() -> None:
    from spanvla_ros.training.data.scenes import ROLLOUT_SHARES, SHARES

    assert set(NEW_FAMILIES) <= set(SHARES)
    assert set(SHARES) == set(ROLLOUT_SHARES)
