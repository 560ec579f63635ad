from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.elements import BRAKE, PEDESTRIAN, RED
from spanvla_ros.town.scenarios import FAMILIES, Ranges
from spanvla_ros.town.snapshots import (
    HISTORY_S,
    NEW_PAIR_KINDS,
    PAIR_KINDS,
    facts,
    hazard_pairs,
    labelled_scene,
    mirrored,
    sample_snapshots,
)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_seed_gives_the_same_moments(family: str) -> None:
    first, second = sample_snapshots(family, 4, 3), sample_snapshots(family, 4, 3)
    for one, other in zip(first, second, strict=True):
        assert one.ego == other.ego
        assert np.array_equal(one.history, other.history)
        assert np.array_equal(one.plan.poses, other.plan.poses)
        assert one.world.boxes() == other.world.boxes()


def test_the_past_mostly_says_nothing_about_what_lies_ahead() -> None:
    rows, consistent = [], []
    for seed in range(16):
        for snapshot in sample_snapshots('red_light', seed, 12):
            if snapshot.ego.speed_mps > 1.0:
                past = -snapshot.history[:, 0]
                slowing = (past[0] - past[1]) - past[2]
                rows.append((slowing, float(facts(snapshot.world)[3])))
                consistent.append(snapshot.consistent_history)
    rows, known = np.array(rows), np.array(consistent)
    assert 0.1 < known.mean() < 0.4
    drawn = rows[~known]
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2
    assert np.abs(rows[known][:, 0]).max() > np.abs(drawn[:, 0]).max()


def test_moments_are_spread_over_standing_starting_and_driving() -> None:
    speeds, starting = [], 0
    for family in FAMILIES:
        for seed in range(5):
            for snapshot in sample_snapshots(family, seed, 8):
                speeds.append(snapshot.ego.speed_mps)
                going = snapshot.plan.speeds_mps[-1] > 2.0
                starting += snapshot.ego.speed_mps < 0.1 and going
    assert 0.04 < np.mean(np.array(speeds) < 0.1) < 0.3
    assert starting > 3
    assert np.percentile(speeds, 90) > 8.0


def test_a_standing_car_has_a_standing_past_or_has_just_stopped() -> None:
    for seed in range(5):
        for snapshot in sample_snapshots('red_light', seed, 8):
            if snapshot.ego.speed_mps < 0.1:
                assert (snapshot.history[:, 0] < 0.2).all()
                assert (np.diff(snapshot.history[:, 0]) > -0.2).all()


@pytest.mark.parametrize('kind', [*PAIR_KINDS, *NEW_PAIR_KINDS])
def test_pairs_differ_in_the_hazard_alone(kind: str) -> None:
    renderer = Renderer(TOWN_CAMERAS)
    shown = {'light': RED, 'sign': RED, 'pedestrian': PEDESTRIAN}.get(kind)
    pairs = hazard_pairs(kind, 4, 1_000_000)
    assert len(pairs) == 4
    for pair in pairs:
        one, other = pair.present, pair.absent
        assert one.ego == other.ego
        assert np.array_equal(one.history, other.history)
        assert np.array_equal(one.world.route().points, other.world.route().points)
        assert other.plan.speeds_mps[29] - one.plan.speeds_mps[29] > 1.0
        views = [
            renderer.draw_classes(s.world.ground(), s.world.boxes(), s.ego.pose)
            for s in (one, other)
        ]
        if shown is not None:
            assert (views[0] == shown).sum() > (views[1] == shown).sum()
        assert (views[0] != views[1]).mean() < 0.25
        index = {'lead': 0, 'merge': 0, 'light': 3, 'sign': 3, 'pedestrian': 6}.get(kind)
        if index is not None:
            assert facts(one.world)[index] == 1.0
            assert facts(other.world)[index] == 0.0


def test_facts_agree_with_the_picture() -> None:
    renderer = Renderer(TOWN_CAMERAS)
    checked = 0
    for seed in range(6):
        for snapshot in sample_snapshots('red_light', seed, 6):
            read = facts(snapshot.world)
            if read[5] < 0.4:
                continue
            view = renderer.draw_classes(
                snapshot.world.ground(), snapshot.world.boxes(), snapshot.ego.pose
            )
            if read[3] and read[0] == 0.0:
                assert (view == RED).any()
                checked += 1
            if read[0] and read[2] and read[1] > 0.5:
                assert (view == BRAKE).any()
    assert checked > 3


def test_a_mirrored_moment_mirrors_its_parts() -> None:
    for snapshot in sample_snapshots('turns', 8, 3):
        twin = mirrored(snapshot)
        assert np.allclose(twin.plan.poses, snapshot.plan.poses * [1.0, -1.0, -1.0])
        assert np.array_equal(twin.history, snapshot.history * [1.0, -1.0, -1.0])
        back = mirrored(twin)
        assert back.ego == snapshot.ego


def test_earlier_worlds_are_those_the_drive_went_through() -> None:
    # As it was driven: the past of the ego is its own, without noise.
    ranges = replace(Ranges(), consistent_history_share=1.0, history_noise_sd_m=0.0)
    ways = []
    for snapshot in sample_snapshots('lead_vehicle', 3, 8, ranges, earlier=True):
        now = snapshot.world
        times = [world.time_s for world in snapshot.earlier]
        assert np.allclose(times, np.maximum(now.time_s + np.array(HISTORY_S), 0.0))
        places = np.array([world.state.pose[:2] for world in snapshot.earlier])
        driven = np.linalg.norm(np.diff(places, axis=0), axis=1)
        told = np.linalg.norm(np.diff(snapshot.history[:, :2], axis=0), axis=1)
        assert np.allclose(driven, told, atol=1e-6)
        leads = [
            next(c.s_m for c in world.cars if c.name == 'car_lead')
            for world in (*snapshot.earlier, now)
        ]
        assert (np.diff(leads) >= 0.0).all()
        ways.append(leads[-1] - leads[0])
    assert max(ways) > 3.0


def test_a_past_is_kept_where_it_is_asked_for_and_changes_nothing() -> None:
    plain, looking_back = (sample_snapshots('turns', 3, 3, earlier=e) for e in (False, True))
    for one, other in zip(plain, looking_back, strict=True):
        assert (len(one.earlier), len(other.earlier)) == (0, len(HISTORY_S))
        assert one.ego == other.ego
        assert np.array_equal(one.history, other.history)
        assert np.array_equal(one.plan.poses, other.plan.poses)
        assert one.world.boxes() == other.world.boxes()


def test_what_is_taken_away_was_never_there_and_a_mirror_shows_the_past_too() -> None:
    pair = hazard_pairs('pedestrian', 1, 1_000_000, earlier=True)[0]
    assert pair.present.earlier
    for one, other in zip(pair.present.earlier, pair.absent.earlier, strict=True):
        assert any(p.crosses for p in one.pedestrians)
        assert not any(p.crosses for p in other.pedestrians)
    twin = mirrored(pair.present)
    for one, other in zip(pair.present.earlier, twin.earlier, strict=True):
        flipped = [box.y_m for box in other.boxes()]
        assert flipped == [-box.y_m for box in one.boxes()]


def test_a_labelled_scene_holds_what_follows() -> None:
    snapshot = sample_snapshots('lead_vehicle', 3, 1)[0]
    scene = labelled_scene(snapshot)
    lead = next(a for a in scene.agents if a.agent_id == 'car_lead')
    assert len(lead.times_s) == 51
    assert np.allclose(np.diff(lead.times_s), 0.1)
    moved = np.hypot(*(lead.states[-1, :2] - lead.states[0, :2]))
    assert moved <= 5.0 * 13.0
    assert scene.human is not None
    assert scene.human.shape == (10, 3)
    ahead = scene.human[-1, :2] - [scene.ego.x_m, scene.ego.y_m]
    assert np.hypot(*ahead) == pytest.approx(np.hypot(*snapshot.plan.poses[49, :2]))
    twin = labelled_scene(mirrored(snapshot))
    assert np.allclose(twin.agents[0].states[:, 1], -scene.agents[0].states[:, 1])


def test_ranges_reach_the_snapshots() -> None:
    still = replace(
        Ranges(), lateral_offset_sd_m=0.0, heading_sd_rad=0.0, own_speed_share=1.0,
        standstill_share=0.0, consistent_history_share=0.0,
    )  # fmt: skip
    for snapshot in sample_snapshots('lane_keeping', 6, 4, still):
        assert abs(snapshot.world.ego_d_m) < 1e-6
