from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.geometry import box_corners
from spanvla_ros.town.driver import reference_plan
from spanvla_ros.town.motion import boxes_overlap
from spanvla_ros.town.road_users import Car, idm
from spanvla_ros.town.scenarios import FAMILIES, MIX, make_world
from spanvla_ros.town.traffic import World
from spanvla_ros.types import DriveCommand, Vehicle

DT_S = 0.05


def command(speed_mps: float, steering_rad: float = 0.0) -> DriveCommand:
    return DriveCommand(
        speed_mps=speed_mps, yaw_rate_radps=0.0, accel_mps2=0.0, steering_rad=steering_rad
    )


def roll(world: World, seconds: float) -> None:
    """Drive roughly along the reference's plan, as one that steers by its own first metres."""
    for index in range(round(seconds / DT_S)):
        if index % 4 == 0:
            plan = reference_plan(world)
        ahead = plan.poses[min(9, len(plan.poses) - 1)]
        bend = 2.0 * ahead[1] / max(ahead[0] ** 2 + ahead[1] ** 2, 4.0)
        world.step(command(plan.speeds_mps[3], math.atan(bend * 3.089)), DT_S)


@given(
    st.lists(st.tuples(st.floats(-5.0, 40.0), st.floats(-2.0, 2.0)), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.05, 0.1]),
)
def test_the_bicycle_keeps_its_limits(orders: list[tuple[float, float]], dt_s: float) -> None:
    world, limits = make_world('lane_keeping', 1), Vehicle()
    for speed, steering in orders:
        before = world.state
        world.step(command(speed, steering), dt_s)
        after = world.state
        change = (after.speed_mps - before.speed_mps) / dt_s
        assert -limits.max_decel_mps2 - 1e-9 <= change <= limits.max_accel_mps2 + 1e-9
        assert 0.0 <= after.speed_mps <= limits.max_speed_mps
        turned = abs(after.steering_rad - before.steering_rad)
        assert turned <= limits.max_steering_rate_radps * dt_s + 1e-9
        assert abs(after.steering_rad) <= limits.max_steering_rad
        moved = math.hypot(after.x_m - before.x_m, after.y_m - before.y_m)
        assert moved <= max(after.speed_mps, before.speed_mps) * dt_s + 1e-9


def test_steady_steering_drives_the_circle_of_the_wheelbase() -> None:
    world = make_world('lane_keeping', 1)
    steering, speed = 0.2, 3.0
    for _ in range(100):
        world.step(command(speed, steering), 0.01)
    start = world.state
    for _ in range(200):
        world.step(command(speed, steering), 0.01)
    turned = (world.state.yaw_rad - start.yaw_rad + math.pi) % (2 * math.pi) - math.pi
    assert turned == pytest.approx(2.0 * speed * math.tan(steering) / 3.089, rel=1e-2)


@pytest.mark.parametrize('family', [*FAMILIES, MIX])
def test_nobody_jumps(family: str) -> None:
    for seed in range(2):
        world = make_world(family, seed)
        for _ in range(40):
            before = {name: pose for name, pose, *_ in world.bodies()}
            roll(world, 0.1)
            for name, pose, *_ in world.bodies():
                if name in before:
                    old = before[name]
                    assert math.hypot(pose[0] - old[0], pose[1] - old[1]) < 2.0
                    assert abs(math.remainder(pose[2] - old[2], math.tau)) < 0.35


@pytest.mark.parametrize('family', [*FAMILIES, MIX])
def test_the_same_seed_and_commands_give_the_same_world(family: str) -> None:
    first, second = make_world(family, 5), make_world(family, 5)
    roll(first, 3.0)
    roll(second, 3.0)
    assert first.state == second.state
    assert first.boxes() == second.boxes()
    assert first.outcome() == second.outcome()
    assert make_world(family, 6).state != make_world(family, 5).state


def test_a_clone_goes_its_own_way() -> None:
    world = make_world('pedestrian', 2)
    twin = world.clone()
    before = twin.boxes()
    roll(world, 6.0)
    assert twin.boxes() == before
    assert twin.time_s == 0.0


@pytest.mark.parametrize('family', FAMILIES)
def test_a_mirrored_world_driven_by_mirrored_commands_stays_the_mirror_image(family: str) -> None:
    world = make_world(family, 3)
    twin = world.mirrored()
    for _ in range(80):
        world.step(command(5.0, 0.05), DT_S)
        twin.step(command(5.0, -0.05), DT_S)
    assert twin.ego.x_m == world.ego.x_m
    assert twin.ego.y_m == -world.ego.y_m
    assert twin.ego.yaw_rad == -world.ego.yaw_rad
    for ours, theirs in zip(world.boxes(), twin.boxes(), strict=True):
        assert (theirs.x_m, theirs.y_m) == (ours.x_m, -ours.y_m)
    assert np.array_equal(twin.route().points, world.route().points * [1.0, -1.0])
    assert twin.mirrored().scene().ego == world.scene().ego


@given(
    st.tuples(st.floats(-6, 6), st.floats(-6, 6), st.floats(-3.2, 3.2)),
    st.floats(0.3, 6.0),
    st.floats(0.3, 3.0),
)
def test_overlap_agrees_with_an_independent_geometry(
    pose: tuple[float, float, float], length: float, width: float
) -> None:
    a = box_corners(np.zeros(3), 5.2, 2.3)
    b = box_corners(np.array(pose), length, width)
    one, other = shapely.Polygon(a), shapely.Polygon(b)
    if one.distance(other) > 1e-6 or one.intersection(other).area > 1e-6:
        assert boxes_overlap(a, b) == one.intersects(other)


def test_driving_into_the_lead_is_a_collision_at_fault() -> None:
    world = make_world('lead_vehicle', 0).without_hazard()
    ahead = world.ego_s_m + 25.0
    size = (4.4, 1.8, 1.5)
    world.cars.append(Car('car_wall', ahead, 0.0, 0.0, 0.0, size, (9, 9, 9), parked=True))
    while not world.finished:
        x, y, _ = world.corridor.place(world.ego_s_m + 6.0, 0.0)
        bearing = math.atan2(y - world.state.y_m, x - world.state.x_m) - world.state.yaw_rad
        world.step(command(6.0, math.remainder(bearing, math.tau)), DT_S)
    outcome = world.outcome()
    assert outcome.collided_with == 'car_wall'
    assert outcome.at_fault
    assert not outcome.success
    assert world.ego_s_m == pytest.approx(ahead - 2.2 - 4.05, abs=0.5)


def test_straight_off_a_bend_is_counted_as_off_the_road() -> None:
    world = make_world('lane_keeping', 0)
    while not world.finished and world.time_s < 30.0:
        world.step(command(9.0), DT_S)
    assert world.outcome().offroad_m > 5.0


def test_passing_a_red_light_counts_once_and_green_never() -> None:
    for seed in range(5):
        world = make_world('red_light', seed)
        for light in world.signals:
            light.green_after_s = math.inf
        red = world.signals[0].red
        world.cars.clear()
        world.pedestrians.clear()
        while not world.finished:
            x, y, _ = world.corridor.place(world.ego_s_m + 6.0, 0.0)
            bearing = math.atan2(y - world.state.y_m, x - world.state.x_m) - world.state.yaw_rad
            world.step(command(6.0, math.remainder(bearing, math.tau)), DT_S)
        assert world.outcome().red_lights_run == int(red)
        assert world.outcome().reached_goal


@given(st.floats(0.0, 15.0), st.floats(0.5, 80.0))
def test_followers_brake_more_the_nearer_and_the_faster(speed: float, gap: float) -> None:
    assert idm(speed, 11.0, gap, speed) <= idm(speed, 11.0, gap + 1.0, speed)
    assert idm(speed, 11.0, gap, speed) <= idm(speed, 11.0, gap, 0.0)


def test_lit_lamps_show_a_braking_and_a_standing_car() -> None:
    car = Car('car', 0.0, 0.0, 8.0, 8.0, (4.4, 1.8, 1.5), (9, 9, 9))
    assert not car.braking
    car.accel_mps2 = -2.0
    assert car.braking
    car.accel_mps2, car.speed_mps = 0.0, 0.0
    assert car.braking
