"""Scores of open-loop plans from scoring rows: the scorer's own numbers, and who ranks where."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from spanvla_ros.model.config import ModelConfig
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.town.driver import ConstantVelocity
from spanvla_ros.town.scenarios import Ranges
from spanvla_ros.town.snapshots import labelled_scene, mirrored, sample_snapshots
from spanvla_ros.training.data.rows import RowMaker
from spanvla_ros.training.data.scenes import SceneRequest, draw_scenes
from spanvla_ros.training.data.scoring_rows import pack_scene, unpack_scene
from spanvla_ros.training.data.shards import ShardSet, write_shard
from spanvla_ros.training.open_loop import plan_rows
from spanvla_ros.training.plan_scores import COLUMNS, score_differences, score_plans
from spanvla_ros.types import SpanvlaError

CONFIG = ModelConfig()
FAMILIES = ('lane_keeping', 'lead_vehicle', 'pedestrian', 'red_light', 'turns')


@pytest.fixture(scope='module')
def moments():
    found = [s for family in FAMILIES for s in sample_snapshots(family, 1_000_003, 5)]
    return [s for s in found if s.ego.speed_mps > 3.0]


@pytest.fixture(scope='module')
def scored(moments, tmp_path_factory):
    maker, rng = RowMaker(CONFIG, scored=True), np.random.default_rng(0)
    rows = [maker.row(s, f'x/{i}/0', rng) for i, s in enumerate(moments)]
    folder = tmp_path_factory.mktemp('scored')
    write_shard(folder / 'scenes-00000.parquet', rows)
    return folder


def test_a_scoring_row_gives_the_scores_of_the_scene_it_was_made_of(moments):
    for snapshot in (moments[0], mirrored(moments[-1])):
        scene = labelled_scene(snapshot)
        data = pack_scene(scene)
        assert len(data) < 80_000
        plans = np.stack([snapshot.plan.poses[4::5], 0.5 * snapshot.plan.poses[4::5]])
        for version in ('v1', 'v2'):
            ours = Scorer(unpack_scene(data), version).score(plans)
            direct = Scorer(scene, version).score(plans)
            assert [s.total for s in ours] == pytest.approx([s.total for s in direct], abs=2e-3)


def test_the_reference_driver_scores_near_the_top_and_constant_velocity_low(scored):
    shards = ShardSet(scored)
    every = np.arange(len(shards))
    plans = {
        'reference': shards.futures,
        'constant_velocity': plan_rows(ConstantVelocity(), CONFIG, shards.rows(every)),
        'standing': np.zeros_like(shards.futures),
    }
    tables = score_plans(scored, every, plans, 2, workers=1)
    for name in ('pdms', 'epdms'):
        assert tables['reference'][name].mean() > 0.95, name
        assert tables['constant_velocity'][name].mean() < 0.75, name
        assert tables['standing'][name].mean() < 0.75, name
    found = score_differences(tables['reference'], tables['constant_velocity'], list(every))
    assert found['pdms'].low > 5.0
    assert set(found) == set(COLUMNS)
    difference = 100.0 * (tables['reference']['pdms'] - tables['constant_velocity']['pdms'])
    assert found['pdms'].mean == pytest.approx(difference.mean())


def test_columns_are_the_scorers_own_numbers(scored):
    shards = ShardSet(scored)
    plan = 0.6 * shards.futures[:1]
    table = score_plans(scored, np.arange(1), {'slow': plan}, 2, workers=1)['slow']
    scene = unpack_scene(shards.scoring(0))
    one, two = Scorer(scene, 'v1').score(plan)[0], Scorer(scene, 'v2').score(plan)[0]
    assert (table['pdms'][0], table['epdms'][0]) == (one.total, two.total)
    assert (table['pdms_ep'][0], table['epdms_lk'][0]) == (one.ep, two.lk)
    assert one.ep < 1.0


def test_held_out_sets_hold_scoring_rows_and_training_sets_do_not(tmp_path):
    request = SceneRequest(2, 1_000_000, 0, ('turns',), Ranges(), CONFIG, scored=True)
    draw_scenes(request, tmp_path / 'held_out')
    draw_scenes(replace(request, seed=5, scored=False), tmp_path / 'train')
    held_out, train = ShardSet(tmp_path / 'held_out'), ShardSet(tmp_path / 'train')
    assert held_out.scored.all()
    assert unpack_scene(held_out.rows([1])[0].scoring).agents is not None
    # A training shard is byte for byte laid out as before there were scoring rows.
    names = pq.read_schema(next((tmp_path / 'train').glob('*.parquet'))).names
    assert 'scoring' not in names
    assert not train.scored.any()
    assert train.rows([0])[0].scoring == b''


@pytest.mark.parametrize('fault', ['cut', 'noise', 'not a scene', 'bomb'])
def test_a_damaged_scoring_row_is_named_by_file_and_row(scored, tmp_path, fault):
    import zlib

    rows = ShardSet(scored).rows(range(2))
    whole = rows[1].scoring
    data = {
        'cut': whole[:-9],
        'noise': b'\x00' * 40,
        'not a scene': zlib.compress(b'{"scene": 3}'),
        'bomb': zlib.compress(b' ' * (2**27)),
    }[fault]
    write_shard(tmp_path / 'scenes-0.parquet', [rows[0], replace(rows[1], scoring=data)])
    with pytest.raises(SpanvlaError, match=r'scenes-0.parquet row 1: '):
        score_plans(tmp_path, np.arange(2), {'x': ShardSet(tmp_path).futures}, 2, workers=1)
