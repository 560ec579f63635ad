"""Negatives are really worse, recoveries start where they lead to, and both are joined."""

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.geometry import local_from_world
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.reasoning import Decision
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.town.driver import TIMES_S, ReferencePlan
from spanvla_ros.town.scenarios import Ranges
from spanvla_ros.town.snapshots import sample_snapshots
from spanvla_ros.training.data.mistakes import (
    LEAST_COST,
    MISTAKES,
    drive_along,
    mistakes_at,
)
from spanvla_ros.training.data.rows import RowMaker
from spanvla_ros.training.data.scenes import SceneRequest, draw_scenes
from spanvla_ros.training.data.scoring_rows import unpack_scene
from spanvla_ros.training.data.shards import ShardSet

CONFIG = ModelConfig()


def plan_of(speed_mps, side=None, decision='keep lane'):
    x = speed_mps * TIMES_S
    y = np.zeros(50) if side is None else side
    poses = np.stack([x, y, np.zeros(50)], -1)
    return ReferencePlan(
        TIMES_S, poses, np.full(50, speed_mps), (), Decision('maintain', decision), speed_mps
    )


def speeds(poses):
    steps = np.diff(np.concatenate([np.zeros((1, 3)), poses])[:, :2], axis=0)
    return np.linalg.norm(steps, axis=1) / 0.1


def test_an_early_stop_stands_before_the_reference_would_and_stays_on_its_path():
    poses = MISTAKES['early_stop'](plan_of(8.0), np.random.default_rng(0))
    moving = speeds(poses)
    assert moving[-1] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(moving) <= 1e-6).all()
    np.testing.assert_allclose(poses[:, 1], 0.0)


def test_a_hesitation_slows_and_goes_on():
    moving = speeds(MISTAKES['hesitation'](plan_of(8.0), np.random.default_rng(1)))
    assert moving.min() < 4.0
    assert moving[-1] > moving.min() + 2.0


def test_a_drift_leaves_to_one_side_with_the_heading_it_drives():
    poses = MISTAKES['lateral_drift'](plan_of(8.0), np.random.default_rng(2))
    assert 1.4 < abs(poses[-1, 1]) < 3.1
    assert (np.diff(np.abs(poses[:, 1])) >= -1e-9).all()
    dy, dx = np.diff(poses[:, 1]), np.diff(poses[:, 0])
    np.testing.assert_allclose(poses[1:, 2], np.arctan2(dy, dx), atol=1e-6)


def test_lane_changes_go_wrong_only_where_there_is_one():
    rng = np.random.default_rng(3)
    side = 3.5 * np.clip(TIMES_S / 4.0, 0.0, 1.0)
    for name in ('late_lane_change', 'aborted_lane_change'):
        assert MISTAKES[name](plan_of(8.0), rng) is None
    changing = plan_of(8.0, side, 'change left')
    late = MISTAKES['late_lane_change'](changing, rng)
    assert late[12, 1] == 0.0
    assert 0.0 < late[-1, 1] < side[-1] + 1e-9
    back = MISTAKES['aborted_lane_change'](changing, rng)
    assert back[:, 1].max() > 0.8
    assert back[-1, 1] == pytest.approx(0.0, abs=1e-9)


def test_nothing_goes_wrong_for_a_car_that_stands():
    rng = np.random.default_rng(4)
    assert all(make(plan_of(0.0), rng) is None for make in MISTAKES.values())


def test_driving_along_a_path_ends_on_it():
    snapshot = next(s for s in sample_snapshots('lane_keeping', 3, 6) if s.ego.speed_mps > 4)
    world, start = snapshot.world.clone(), snapshot.world.state.pose
    track = drive_along(world, snapshot.plan.poses, 15)
    assert len(track) == 16
    np.testing.assert_allclose(
        local_from_world(start, np.array(track[1:])), snapshot.plan.poses[:15], atol=1e-9
    )
    assert world.time_s == pytest.approx(snapshot.world.time_s + 1.5)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp('mistakes')
    families = ('lane_keeping', 'turns')
    draw_scenes(SceneRequest(1, 30, 0, families, Ranges(), CONFIG, mistakes=3), out)
    return ShardSet(out)


def test_a_negative_scores_clearly_below_its_reference_and_a_recovery_well(drawn):
    pairs = sorted(set(drawn.pair_ids) - {''})
    assert len(pairs) == 3
    for name in pairs:
        negative, back = drawn.rows(np.flatnonzero(drawn.pair_ids == name))
        assert (negative.sample.label, back.sample.label) == ('negative', 'recovery')
        assert negative.sample.reasoning == ''
        scorer = Scorer(unpack_scene(negative.scoring), 'v2')
        done, human = scorer.score(
            np.stack([negative.sample.future, _human(scorer.scene)[: len(negative.sample.future)]])
        )
        assert done.total < human.total - LEAST_COST + 0.05
        there = Scorer(unpack_scene(back.scoring), 'v2').score(back.sample.future[None])[0]
        assert there.total > 0.65


def _human(scene):
    origin = [scene.ego.x_m, scene.ego.y_m, scene.ego.yaw_rad]
    return local_from_world(origin, scene.human)


def test_a_recovery_begins_where_its_negative_led_to(drawn):
    for name in sorted(set(drawn.pair_ids) - {''}):
        rows = drawn.rows(np.flatnonzero(drawn.pair_ids == name))
        before, after = (unpack_scene(row.scoring).ego for row in rows)
        reached = local_from_world(
            [before.x_m, before.y_m, before.yaw_rad], np.array([[after.x_m, after.y_m, 0.0]])
        )[0, :2]
        path = np.concatenate([np.zeros((1, 2)), rows[0].sample.future[:, :2]])
        dense = np.stack(
            [np.interp(np.linspace(0, 10, 201), np.arange(11), c) for c in path.T], -1
        )
        assert np.linalg.norm(dense - reached, axis=1).min() < 0.3
        # Its past is the mistake: 1.5 s back it stood or drove behind.
        assert rows[1].sample.observation.history[0, 0] <= 0.01


def test_the_manifest_counts_labels_and_moments_stay_what_they_were(drawn, tmp_path):
    import json

    manifest = json.loads((drawn.path / 'manifest.json').read_text())
    assert manifest['label_rows'] == {'negative': 3, 'positive': 1, 'recovery': 3}
    assert manifest['mistakes'] == 3


def test_a_policys_own_plan_counts_where_it_scores_low():
    snapshot = next(s for s in sample_snapshots('lane_keeping', 3, 6) if s.ego.speed_mps > 4)
    kinds = set()
    for plan in (np.zeros((50, 3)), snapshot.plan.poses):
        for seed in range(3):
            found = mistakes_at(snapshot, np.random.default_rng(seed), plan)
            kinds |= {(bool(plan.any()), m.kind) for m in found}
    assert (False, 'policy') in kinds
    assert (True, 'policy') not in kinds
    row = RowMaker(CONFIG, scored=True).row(replace(snapshot), 'x', np.random.default_rng(0))
    assert row.sample.label == 'positive'
