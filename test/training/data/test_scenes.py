"""The `scenes` command: what it draws is right, reproducible, resumable and kept apart."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spanvla_ros.model.checkpoint import load_model_dir
from spanvla_ros.model.config import ModelConfig, with_settings
from spanvla_ros.model.reasoning import parse_decision
from spanvla_ros.town.driver import reference_plan
from spanvla_ros.town.scenarios import Ranges, ranges_sha256
from spanvla_ros.town.snapshots import sample_snapshots
from spanvla_ros.training.data import scenes
from spanvla_ros.training.data.rows import RowMaker, earlier_reasoning
from spanvla_ros.training.data.scenes import SceneRequest, draw_scenes
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.types import SpanvlaError

TOWN = Path(__file__).parents[3] / 'models' / 'town'
REQUEST = SceneRequest(
    count=10,
    seed=0,
    pairs=0,
    families=('pedestrian', 'turns'),
    ranges=Ranges(),
    config=ModelConfig(),
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(scenes, 'ROWS_PER_SHARD', 5)


def digests(path):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.glob('*.parquet'))
    }


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp('scenes')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, 'ROWS_PER_SHARD', 5)
        draw_scenes(REQUEST, out)
    return out


def test_the_manifest_counts_what_lies_there(drawn):
    manifest = json.loads((drawn / 'manifest.json').read_text())
    shards = ShardSet(drawn)
    assert manifest['rows'] == len(shards) == 10
    assert manifest['ranges_sha256'] == ranges_sha256()
    assert {s['file']: s['sha256'] for s in manifest['shards']} == digests(drawn)
    assert sum(manifest['family_rows'].values()) == 10
    assert set(manifest['family_rows']) <= {'pedestrian', 'turns'}
    assert not list(drawn.glob('.*'))


def test_the_same_request_draws_the_same_bytes(drawn, tmp_path):
    draw_scenes(REQUEST, tmp_path)
    assert digests(tmp_path) == digests(drawn)


def test_a_broken_off_run_draws_only_what_is_missing(drawn, tmp_path, monkeypatch):
    draw_scenes(REQUEST, tmp_path)
    (tmp_path / 'manifest.json').unlink()
    (tmp_path / 'scenes-00001.parquet').unlink()
    drawn_again = []
    real = scenes.draw_shard
    monkeypatch.setattr(scenes, 'draw_shard', lambda job: drawn_again.append(job) or real(job))
    draw_scenes(REQUEST, tmp_path)
    assert [job.path.name for job in drawn_again] == ['scenes-00001.parquet']
    assert digests(tmp_path) == digests(drawn)
    assert (tmp_path / 'manifest.json').exists()


def test_another_request_does_not_mix_into_the_directory(drawn):
    with pytest.raises(SpanvlaError, match='another request'):
        draw_scenes(replace(REQUEST, seed=7), drawn)


@pytest.mark.parametrize('content', [b'', b'{"count": 10', b'[' * 100_000, b'[]', b'\xff'])
def test_a_damaged_request_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / 'request.json').write_bytes(content)
    with pytest.raises(SpanvlaError, match=r'request\.json: .*; draw into an empty directory'):
        draw_scenes(REQUEST, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['request.json']


def test_a_damaged_shard_of_a_broken_off_run_is_named(drawn, tmp_path):
    for file in drawn.iterdir():
        data = file.read_bytes()
        cut = len(data) // 2 if file.name == 'scenes-00001.parquet' else len(data)
        (tmp_path / file.name).write_bytes(data[:cut])
    with pytest.raises(SpanvlaError, match=r'scenes-00001\.parquet: .*; remove it and run again'):
        draw_scenes(REQUEST, tmp_path)


def test_training_seeds_stop_before_the_held_out_ones(tmp_path):
    with pytest.raises(SpanvlaError, match='held-out'):
        draw_scenes(replace(REQUEST, seed=999_900), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(SpanvlaError, match='at least one row'):
        draw_scenes(replace(REQUEST, count=0), tmp_path / 'out')


def test_a_row_holds_the_reference_plan_of_its_moment(drawn):
    for row in ShardSet(drawn).rows(range(10)):
        family, seed, index, *flipped = row.sample.scene_id.split('/')
        if flipped:
            continue
        snapshot = sample_snapshots(
            family, int(seed), scenes.MOMENTS_PER_DRIVE, wide_share=scenes.WIDE_SHARE
        )[int(index)]
        plan = reference_plan(snapshot.world)
        np.testing.assert_allclose(row.sample.future, plan.poses[4::5], atol=1e-9)
        seen = row.sample.observation
        assert seen.ego.speed_mps == snapshot.ego.speed_mps
        np.testing.assert_allclose(seen.history, snapshot.history, atol=1e-6)
        assert seen.history_valid.all()
        if row.sample.thinking == 'slow':
            assert parse_decision(row.sample.reasoning) == plan.decision
        else:
            assert row.sample.reasoning == ''


def test_a_set_of_four_pictures_a_camera_serves_models_of_fewer(drawn, tmp_path):
    four = with_settings(ModelConfig(), frames_per_camera=4)
    draw_scenes(replace(REQUEST, config=four), tmp_path)
    many, one = ShardSet(tmp_path), ShardSet(drawn)
    chosen = range(0, 10, 3)
    whole = many.rows(chosen)
    for row, newest, alone in zip(whole, many.rows(chosen, 1), one.rows(chosen), strict=True):
        assert newest.sample.scene_id == alone.sample.scene_id
        assert np.array_equal(newest.sample.future, alone.sample.future)
        assert np.array_equal(newest.facts, alone.facts)
        assert np.array_equal(newest.presence, alone.presence)
        pictures = zip(
            row.sample.observation.frames,
            newest.sample.observation.frames,
            alone.sample.observation.frames,
            strict=True,
        )
        for every, (last,), (same,) in pictures:
            assert np.array_equal(last.image, same.image)
            assert np.array_equal(every[-1].image, same.image)
            ages = [(last.stamp_ns - frame.stamp_ns) / 1e9 for frame in every]
            assert ages == [1.5, 1.0, 0.5, 0.0]
        assert len(row.presence) == 4 * len(alone.presence)
    # Two pictures are the newer half of four, camera by camera.
    for row, half in zip(whole, many.rows(chosen, 2), strict=True):
        cells = row.presence.reshape(3, 4, -1, 7)[:, 2:]
        assert np.array_equal(half.presence, cells.reshape(-1, 7))
        assert half.sample.observation.frames[1][0].stamp_ns == (
            row.sample.observation.frames[1][2].stamp_ns
        )
    with pytest.raises(SpanvlaError, match='1 pictures a camera, the model wants 4'):
        one.rows([0], 4)
    with pytest.raises(SpanvlaError, match='frames_per_camera'):
        draw_scenes(REQUEST, tmp_path)


def test_an_earlier_picture_is_what_was_seen_there_then():
    # The ego as it drove: where its past says it was is where the world had it.
    ranges = replace(
        Ranges(), consistent_history_share=1.0, history_noise_sd_m=0.0, lateral_offset_sd_m=0.0,
        heading_sd_rad=0.0,
    )  # fmt: skip
    maker = RowMaker(with_settings(ModelConfig(), frames_per_camera=4))
    drawn = sample_snapshots('lead_vehicle', 3, 8, ranges, earlier=True)
    moving = [snapshot for snapshot in drawn if snapshot.ego.speed_mps > 3]
    assert moving
    for snapshot in moving:
        images, _ = maker.draw(snapshot)
        for place, world in enumerate(snapshot.earlier):
            then = maker.renderer.draw(world.ground(), world.boxes(), world.tint, world.ego.pose)
            off = (np.abs(images[:, place].astype(int) - then).max(-1) > 40).mean()
            now = (np.abs(images[:, -1].astype(int) - then).max(-1) > 40).mean()
            assert off < min(0.01, now)


def test_moments_without_a_past_and_pictures_of_other_times_are_refused(tmp_path):
    two = with_settings(ModelConfig(), frames_per_camera=2)
    with pytest.raises(SpanvlaError, match='one picture a camera'):
        draw_scenes(replace(REQUEST, config=two, mistakes=1), tmp_path)
    odd = with_settings(two, frame_lag_s=0.3)
    with pytest.raises(SpanvlaError, match=r'pictures of 0\.3 s ago'):
        draw_scenes(replace(REQUEST, config=odd), tmp_path)
    bare = sample_snapshots('turns', 3, 1)[0]
    assert bare.earlier == ()
    with pytest.raises(SpanvlaError, match='one picture a camera'):
        RowMaker(two).draw(bare)


def test_pairs_differ_in_the_hazard_and_in_nothing_else(tmp_path):
    draw_scenes(replace(REQUEST, count=1, seed=1_000_000, pairs=2), tmp_path)
    shards = ShardSet(tmp_path)
    for name in sorted(set(shards.pair_ids) - {''}):
        first, second = shards.rows(np.flatnonzero(shards.pair_ids == name))
        assert first.sample.scene_id.endswith('/present')
        one, other = first.sample.observation, second.sample.observation
        assert one.ego == other.ego
        np.testing.assert_array_equal(one.history, other.history)
        np.testing.assert_array_equal(one.route, other.route)
        changed = [
            (a[0].image.astype(int) - b[0].image != 0).any(axis=-1).mean()
            for a, b in zip(one.frames, other.frames, strict=True)
        ]
        assert 0.0 < sum(changed) < 1.0
        assert one.reasoning == other.reasoning == ''
        speed = [np.linalg.norm(r.sample.future[6, :2] - r.sample.future[5, :2]) for r in
                 (first, second)]  # fmt: skip
        assert speed[0] < speed[1]


def test_an_older_text_tells_of_larger_distances():
    maker = RowMaker(ModelConfig())
    found = 0
    for snapshot in sample_snapshots('red_light', 3, 8):
        plan = snapshot.plan
        lights = [c.distance_m for c in plan.components if c.kind.endswith('light')]
        if not lights or plan.speed_mps < 5 or min(lights) > 40:
            continue
        found += 1
        row = maker.row(snapshot, 'x', np.random.default_rng(0))
        seen = row.sample.observation
        if row.sample.thinking == 'slow':
            assert 0.2e9 <= seen.stamp_ns - seen.reasoning_stamp_ns <= 2.0e9
        text = earlier_reasoning(plan, 2.0)
        metres = [int(text.split(' light ')[1].split(' ')[0])]
        assert metres[0] == pytest.approx(min(lights) + 2.0 * plan.speed_mps, abs=2.6)
    assert found


def test_rows_from_a_driver_come_from_its_own_drive(tmp_path):
    request = replace(REQUEST, count=3, families=('turns',), driver=TOWN)
    draw_scenes(request, tmp_path)
    rows = ShardSet(tmp_path).rows(range(3))
    # Pasts a drawn perturbation would not have: the driver steers at all times.
    for row in rows:
        assert row.sample.observation.history_valid.all()
        assert row.sample.observation.history[0, 0] < 0.0
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    assert manifest['driver_sha256'] == load_model_dir(TOWN).sha256
    with pytest.raises(SpanvlaError, match='driver_sha256'):
        draw_scenes(replace(request, driver=None), tmp_path)
