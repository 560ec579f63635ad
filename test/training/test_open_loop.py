"""Open-loop measures on plans whose errors are known by construction."""

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.model.config import TOWN_CAMERAS, ModelConfig
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import ConstantVelocity
from spanvla_ros.town.snapshots import mirrored, sample_snapshots
from spanvla_ros.training.data.rows import RowMaker, observe
from spanvla_ros.training.open_loop import (
    OpenLoop,
    differences,
    measures,
    mirror_share,
    mirrored_observation,
    pair_measures,
    pair_rows,
    plan_rows,
)

CONFIG = ModelConfig()
TIMES_S = CONFIG.times_s


def straight(speeds_mps):
    poses = np.zeros((len(speeds_mps), len(TIMES_S), 3))
    poses[..., 0] = np.array(speeds_mps)[:, None] * TIMES_S
    return poses


def loop(planned, reference, speeds, pairs=None, scenes=None):
    count = len(planned)
    return OpenLoop(
        scene_ids=np.array(scenes or [f'turns/{i}/0' for i in range(count)], dtype=object),
        families=np.array(['turns'] * count, dtype=object),
        pair_ids=np.array(pairs or [''] * count, dtype=object),
        speeds_mps=np.array(speeds, dtype=float),
        times_s=TIMES_S,
        reference=reference,
        planned=planned,
    )


def test_errors_of_a_plan_that_is_one_metre_beside_and_one_per_second_faster():
    reference = straight([6.0, 6.0])
    planned = straight([7.0, 7.0])
    planned[..., 1] += 1.0
    found = measures(loop(planned, reference, [6.0, 6.0]))
    away = np.hypot(TIMES_S, 1.0)
    assert found['ade_m'].mean == pytest.approx(away.mean())
    assert found['fde_m'].mean == pytest.approx(np.hypot(5.0, 1.0))
    assert found['ade_3s_m'].mean == pytest.approx(away[:6].mean())
    assert found['speed_error_3s_mps'].mean == pytest.approx(1.0)
    assert found['lateral_error_3s_m'].mean == pytest.approx(1.0)
    # 7 m/s at 6 m/s present speed is an acceleration, 6 m/s is none.
    assert found['longitudinal_accuracy'].mean == 0.0
    assert found['lateral_accuracy'].mean == 1.0


def test_lateral_error_is_across_the_reference_not_across_the_car():
    reference = straight([6.0])
    reference[0] = np.column_stack([0 * TIMES_S, 6 * TIMES_S, np.full(10, np.pi / 2)])
    planned = reference + np.array([0.0, 2.0, 0.0])
    found = measures(loop(planned, reference, [6.0]))
    assert found['lateral_error_3s_m'].mean == pytest.approx(0.0, abs=1e-9)


def test_paired_differences_are_positive_where_the_first_is_better():
    reference = straight([5.0] * 20)
    better, worse = straight([5.2] * 20), straight([6.0] * 20)
    found = differences(loop(better, reference, [5.0] * 20), loop(worse, reference, [5.0] * 20))
    assert found['ade_m'].low > 0
    assert found['fde_m'].mean == pytest.approx(5.0 - 1.0)
    with pytest.raises(ValueError, match='same rows'):
        differences(loop(better, reference, [5.0] * 20), loop(worse[:5], reference[:5], [5.0] * 5))


def test_pairs_count_only_where_the_reference_reacts():
    pairs = ['lead/1/0', 'lead/1/0', 'lead/1/1', 'lead/1/1', 'light/1/0', 'light/1/0']
    scenes = [f'{p}/{end}' for p, end in zip(pairs, ['present', 'absent'] * 3, strict=True)]
    reference = straight([2.0, 8.0, 7.5, 8.0, 3.0, 8.0])
    planned = straight([5.0, 8.0, 0.0, 8.0, 8.5, 8.0])
    found = pair_measures(loop(planned, reference, [8.0] * 6, pairs, scenes))
    assert found['lead']['right_way'].mean == 1.0
    assert found['lead']['right_way'].count == 1
    assert found['lead']['effect'].mean == pytest.approx(3.0 / 6.0)
    assert found['light']['right_way'].mean == 0.0
    assert found['light']['effect'].mean == pytest.approx(-0.5 / 5.0)


def test_half_a_pair_is_left_out():
    names = np.array(['lead/1/0', ''], dtype=object)
    assert pair_rows(names, np.array(['lead/1/0/present', 'turns/1/0'], dtype=object)) == []


def test_mirror_share_compares_ends_after_flipping_back():
    plans = straight([5.0, 5.0])
    plans[0, :, 1] = 2.0
    reflected = plans * [1.0, -1.0, -1.0]
    reflected[1, -1, 0] += 3.0
    found = mirror_share(plans, reflected, ['a', 'b'])
    assert found['within_1m'].mean == 0.5
    assert found['gap_m'].mean == pytest.approx(1.5)


def test_a_mirrored_observation_is_that_of_the_mirrored_world():
    snapshot = sample_snapshots('turns', 5, 3)[1]
    renderer = Renderer(TOWN_CAMERAS)

    def seen(moment):
        images = renderer.draw(
            moment.world.ground(), moment.world.boxes(), moment.world.tint, moment.ego.pose
        )
        return observe(CONFIG, moment, images[:, None])

    flipped = mirrored_observation(seen(snapshot), CONFIG.cameras)
    world = seen(mirrored(snapshot))
    np.testing.assert_allclose(flipped.history, world.history, atol=1e-6)
    np.testing.assert_allclose(flipped.route, world.route, atol=1e-6)
    np.testing.assert_allclose(flipped.ego.pose, world.ego.pose, atol=1e-9)
    assert flipped.ego.yaw_rate_radps == pytest.approx(world.ego.yaw_rate_radps)
    assert flipped.command == world.command
    for (a,), (b,) in zip(flipped.frames, world.frames, strict=True):
        assert a.camera == b.camera
        assert (np.abs(a.image.astype(int) - b.image).max(axis=-1) > 8).mean() < 0.02
    twice = mirrored_observation(flipped, CONFIG.cameras)
    for (a,), (b,) in zip(twice.frames, seen(snapshot).frames, strict=True):
        np.testing.assert_array_equal(a.image, b.image)


def test_cameras_without_a_counterpart_cannot_be_mirrored():
    snapshot = sample_snapshots('turns', 5, 1)[0]
    lone = tuple(replace(c, yaw_deg=c.yaw_deg + 5.0) for c in TOWN_CAMERAS)
    blank = np.zeros((3, 1, 112, 224, 3), np.uint8)
    with pytest.raises(ValueError, match='counterpart'):
        mirrored_observation(observe(CONFIG, snapshot, blank), lone)


def test_a_driver_of_the_town_is_measured_by_the_same_code():
    maker = RowMaker(CONFIG)
    rows = [
        maker.row(s, str(i), np.random.default_rng(0))
        for i, s in enumerate(sample_snapshots('lane_keeping', 4, 3))
    ]
    plans = plan_rows(ConstantVelocity(), CONFIG, rows)
    for row, plan in zip(rows, plans, strict=True):
        speed = row.sample.observation.ego.speed_mps
        np.testing.assert_allclose(plan[:, 0], speed * TIMES_S, atol=1e-6)
        np.testing.assert_allclose(plan[:, 1:], 0.0, atol=1e-6)
