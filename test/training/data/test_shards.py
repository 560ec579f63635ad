"""Rows come back from parquet as they went in; pictures as JPEG allows, in their own colours."""

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.training.data.shards import (
    MANIFEST,
    Origin,
    ShardSet,
    TrainingRow,
    decode_picture,
    encode_picture,
    read_origin,
    write_shard,
)
from spanvla_ros.types import CameraFrame, EgoState, Observation, Sample, SpanvlaError

CAMERAS = ('front', 'front_left', 'front_right')


def a_picture(rng):
    image = np.full((112, 224, 3), rng.integers(60, 200, 3), np.uint8)
    image[40:60, 100:130] = (255, 30, 20)
    return image


def a_row(number, *, missing=None, route=True):
    rng = np.random.default_rng(number)
    stamp = 10**15 + number * 10**8 + 7
    frames = tuple(
        (None,) if name == missing else (CameraFrame(name, stamp - k, a_picture(rng)),)
        for k, name in enumerate(CAMERAS)
    )
    observation = Observation(
        stamp_ns=stamp,
        frames=frames,
        ego=EgoState(stamp + 3, *rng.normal(size=7).tolist()),
        history=rng.normal(size=(3, 3)),
        history_valid=rng.random(3) < 0.7,
        route=rng.normal(size=(5, 2)) if route else None,
        command='left',
        reasoning='road clear',
        reasoning_stamp_ns=stamp - 5 if number % 2 else None,
        degraded=('camera_missing:front_left',) if missing else (),
    )
    sample = Sample(
        observation, rng.normal(size=(10, 3)), f'town/{number}', 'turns', 'negative', f'p{number}',
        'left turn 20 m ahead', 'slow',
    )  # fmt: skip
    return TrainingRow(sample, rng.random((96, 7)) < 0.3, rng.normal(size=14).astype(np.float32))


def assert_same(found, row):
    for name in ('scene_id', 'family', 'label', 'pair_id', 'reasoning', 'thinking'):
        assert getattr(found.sample, name) == getattr(row.sample, name)
    mine, theirs = found.sample.observation, row.sample.observation
    for name in ('stamp_ns', 'ego', 'command', 'reasoning', 'reasoning_stamp_ns', 'degraded'):
        assert getattr(mine, name) == getattr(theirs, name)
    np.testing.assert_array_equal(mine.history, theirs.history)
    np.testing.assert_array_equal(mine.history_valid, theirs.history_valid)
    np.testing.assert_array_equal(found.sample.future, row.sample.future)
    np.testing.assert_array_equal(found.presence, row.presence)
    np.testing.assert_array_equal(found.facts, row.facts)
    if theirs.route is None:
        assert mine.route is None
    else:
        np.testing.assert_array_equal(mine.route, theirs.route)
    for (a,), (b,) in zip(mine.frames, theirs.frames, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.camera, a.stamp_ns) == (b.camera, b.stamp_ns)
            assert np.abs(a.image.astype(int) - b.image).mean() < 2.0


def test_rows_come_back_in_any_order_over_several_shards(tmp_path):
    rows = [a_row(n, missing='front_left' if n == 2 else None, route=n != 3) for n in range(5)]
    write_shard(tmp_path / 'scenes-00000.parquet', rows[:2])
    write_shard(tmp_path / 'scenes-00001.parquet', rows[2:])
    shards = ShardSet(tmp_path)
    assert len(shards) == 5
    assert shards.cameras == CAMERAS
    order = [4, 0, 2, 3, 1, 2]
    for found, index in zip(shards.rows(np.array(order)), order, strict=True):
        assert_same(found, rows[index])
    np.testing.assert_array_equal(shards.presence([3])[0], rows[3].presence)
    np.testing.assert_array_equal(shards.facts[4], rows[4].facts)
    np.testing.assert_array_equal(shards.futures[1], rows[1].sample.future)
    assert shards.speeds_mps[2] == rows[2].sample.observation.ego.speed_mps
    assert shards.families.tolist() == ['turns'] * 5
    with pytest.raises(IndexError):
        shards.rows([5])


def test_red_stays_red_and_small_lamps_keep_their_colour():
    image = np.full((112, 224, 3), 128, np.uint8)
    image[50:53, 100:103] = (255, 30, 20)
    image[60:63, 100:103] = (40, 255, 60)
    back = decode_picture(encode_picture(image)).astype(int)
    assert np.abs(back[51, 101] - [255, 30, 20]).max() < 40
    assert np.abs(back[61, 101] - [40, 255, 60]).max() < 40


def test_a_changed_row_after_reading_does_not_change_the_set(tmp_path):
    write_shard(tmp_path / 'scenes-00000.parquet', [a_row(0)])
    shards = ShardSet(tmp_path)
    shards.rows([0])[0].sample.future[:] = 0.0
    np.testing.assert_array_equal(shards.rows([0])[0].sample.future, a_row(0).sample.future)


def test_nothing_half_written_is_left(tmp_path):
    odd = replace(a_row(1), facts=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match='facts'):
        write_shard(tmp_path / 'scenes-00000.parquet', [a_row(0), odd])
    assert list(tmp_path.iterdir()) == []


def test_rows_of_different_cameras_do_not_share_a_shard(tmp_path):
    row = a_row(1)
    seen = row.sample.observation
    turned = replace(row, sample=replace(row.sample, observation=replace(
        seen, frames=seen.frames[::-1])))  # fmt: skip
    with pytest.raises(ValueError, match='cameras'):
        write_shard(tmp_path / 'scenes-00000.parquet', [a_row(0), turned])


@pytest.mark.parametrize('content', [b'', b'PAR1 this is no parquet file PAR1'])
def test_a_broken_shard_is_named(tmp_path, content):
    (tmp_path / 'scenes-00000.parquet').write_bytes(content)
    with pytest.raises(SpanvlaError, match=r'scenes-00000\.parquet: not a shard'):
        ShardSet(tmp_path)


def test_an_empty_directory_is_refused_with_the_command_that_fills_it(tmp_path):
    with pytest.raises(SpanvlaError, match='spanvla scenes'):
        ShardSet(tmp_path)


DAMAGED_MANIFESTS = (
    b'', b'{"seed": 1000', b'\xff\xfe', b'[' * 100_000, b'[]', b'7', b'null', b'"seed"',
    b'{"seed": "1000000"}', b'{"seed": 1e6}', b'{"seed": [1]}', b'{"seed": true}',
    b'{"seed": 0, "ranges_sha256": 5}',
)  # fmt: skip


@pytest.mark.parametrize('content', DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_named_with_what_mends_it(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(SpanvlaError, match=r'manifest\.json: .*; run the command again') as caught:
        read_origin(tmp_path)
    assert '\n' not in str(caught.value)


def test_shards_without_a_manifest_are_of_no_known_origin(tmp_path):
    assert read_origin(tmp_path) == Origin()
    (tmp_path / MANIFEST).write_text('{"seed": 1000000, "ranges_sha256": "ab"}')
    found = read_origin(tmp_path)
    assert (found.seed, found.ranges_sha256) == (1_000_000, 'ab')
