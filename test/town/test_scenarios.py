from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from spanvla_ros.town.elements import GREEN, PEDESTRIAN, RED
from spanvla_ros.town.scenarios import (
    FAMILIES,
    MIX,
    Ranges,
    load_ranges,
    make_world,
    ranges_sha256,
)
from spanvla_ros.types import DriveCommand, SpanvlaError, Vehicle

CONFIG = Path(__file__).parents[2] / 'config'


def test_the_shipped_files_say_what_the_code_does() -> None:
    assert load_ranges(CONFIG / 'town' / 'ranges.yaml') == Ranges()
    assert Vehicle.load(CONFIG / 'vehicle.yaml') == Vehicle()


def test_the_hash_changes_with_any_range() -> None:
    hashes = {ranges_sha256()}
    for field in fields(Ranges):
        value = getattr(Ranges(), field.name)
        other = (0.0, 0.5) if isinstance(value, tuple) else value + 0.5
        hashes.add(ranges_sha256(replace(Ranges(), **{field.name: other})))
    assert len(hashes) == len(fields(Ranges)) + 1


@pytest.mark.parametrize(
    ('text', 'named'),
    [
        ('speed: 3\n', 'speed'),
        ('drive_m: 5\n', 'drive_m'),
        ('speed_limit_mps: [1, 2]\n', 'speed_limit_mps'),
        ('drive_m: [a, b]\n', 'drive_m'),
        ('- 1\n', 'mapping'),
        ('drive_m: [1,\n', 'not valid YAML'),
        ('drive_m: [.nan, 2]\n', 'drive_m'),
        ('1: 2\nmoons: 3\n', 'moons'),
    ],
)
def test_an_odd_range_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / 'ranges.yaml'
    path.write_text(text)
    with pytest.raises(SpanvlaError, match=named):
        load_ranges(path)


def test_an_absent_range_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpanvlaError, match='name a file of ranges'):
        load_ranges(tmp_path / 'absent.yaml')


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(SpanvlaError, match='moon'):
        make_world('moon', 0)


def test_the_same_world_for_another_vehicle() -> None:
    bus = Vehicle(length_m=9.0, wheelbase_m=5.0, max_accel_mps2=1.0)
    world, known = make_world('lead_vehicle', 4, vehicle=bus), make_world('lead_vehicle', 4)
    assert world.vehicle == bus
    assert known.vehicle == Vehicle()
    assert world.state == known.state
    assert [car.s_m for car in world.cars] == [car.s_m for car in known.cars]
    before = world.state.speed_mps
    world.step(DriveCommand(20.0, 0.0, 3.0, 0.1), 0.05)
    assert world.state.speed_mps == pytest.approx(before + 0.05)


@pytest.mark.parametrize('family', [*FAMILIES, MIX])
def test_nothing_stands_on_anything_at_the_start(family: str) -> None:
    for seed in range(12 if family != MIX else 2):
        world = make_world(family, seed)
        world._notice_collision()
        assert not world.outcome().collided
        places = [(c.s_m, c.d_m, c.opposing_lane, c.size[0]) for c in world.cars]
        for index, one in enumerate(places):
            for other in places[:index]:
                if one[1:3] == other[1:3]:
                    assert abs(one[0] - other[0]) > 0.5 * (one[3] + other[3])


def test_each_family_shows_what_it_is_for() -> None:
    seeds = range(30)
    leads = [any(c.reacts for c in make_world('lead_vehicle', s).cars) for s in seeds]
    assert all(leads)
    crossing = [any(p.crosses for p in make_world('pedestrian', s).pedestrians) for s in seeds]
    assert 0.5 < np.mean(crossing) < 0.95
    lights = [make_world('red_light', s).signals[0].red for s in seeds]
    assert 0.5 < np.mean(lights) < 0.95
    turns = Counter(make_world('turns', s).corridor.junctions[0].turn for s in seeds)
    assert set(turns) == {'left', 'right'}
    bends = [np.abs(make_world('lane_keeping', s).corridor.curvature_per_m).max() for s in seeds]
    assert min(bends) > 1 / 120


def test_the_long_road_holds_many_events() -> None:
    world = make_world(MIX, 0)
    assert world.around.goal_m - world.around.start_m > 1000.0
    turns = Counter(j.turn for j in world.corridor.junctions)
    assert sum(turns.values()) >= 6
    assert world.signals
    assert any(c.reacts for c in world.cars)


def test_route_points_are_coarse_and_noisy_about_the_lane() -> None:
    offsets, steps = [], []
    for seed in range(20):
        world = make_world('lane_keeping', seed)
        points = world.route().points
        steps += np.hypot(*np.diff(points, axis=0).T).tolist()
        offsets += [world.corridor.locate(x, y)[1] for x, y in points.tolist()[1:-1]]
    assert 0.8 < np.std(offsets) < 1.2
    assert 10.0 < np.mean(steps) < 20.0


@pytest.mark.parametrize(('family', 'kind'), [('pedestrian', PEDESTRIAN), ('red_light', RED)])
def test_without_its_hazard_a_world_differs_in_nothing_else(family: str, kind: int) -> None:
    for seed in range(8):
        world = make_world(family, seed)
        twin = world.without_hazard()
        assert twin.ground() is world.ground()
        assert twin.state == world.state
        extra = [b for b in world.boxes() if b not in twin.boxes()]
        gone = [p for p in world.pedestrians if p.crosses] if kind == PEDESTRIAN else world.signals
        if kind == PEDESTRIAN:
            assert len(extra) == 4 * len(gone)
        else:
            seen = {p.class_id for b in twin.boxes() for p in b.patches}
            assert RED not in seen
            assert GREEN in seen
