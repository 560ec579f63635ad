"""`spanvla evaluate` from model directory and shards to summary and page."""

import json
from dataclasses import replace

import numpy as np
import pytest
from random_rows import write_shards
from runtime.conftest import build_toy

from spanvla_ros import cli
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.town.scenarios import Ranges
from spanvla_ros.training import closed_loop, evaluate
from spanvla_ros.training.bridge_check import swapped_layers
from spanvla_ros.training.closed_loop import Episode, EpisodeBook
from spanvla_ros.training.contestants import Contestant, is_blind, open_planner
from spanvla_ros.training.data.scenes import SceneRequest, draw_scenes
from spanvla_ros.training.data.shards import ShardSet, write_shard
from spanvla_ros.training.evaluate import choose_rows
from spanvla_ros.training.intervals import NOTHING

EPISODE = Episode(
    driver='model',
    family='turns',
    seed=1_000_000,
    success=True,
    collided=False,
    at_fault=False,
    collided_with='',
    completion=1.0,
    distance_m=500.0,
    offroad_m=0.0,
    red_lights_run=0,
    time_s=60.0,
    plans_refused=0,
    states=(('OK', 1.0),),
    trace_sha256='',
)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp('held_out')
    families = ('lane_keeping',)
    draw_scenes(SceneRequest(8, 1_000_000, 1, families, Ranges(), ModelConfig(), scored=True), out)
    return out


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp('models') / 'toy').path


def measured(model, scenes, out, *more):
    words = ['evaluate', '--model', str(model), '--scenes', str(scenes), '--out', str(out)]
    code = cli.main([*words, '--workers', '1', *more])
    return code, json.loads((out / 'summary.json').read_text()) if code == 0 else None


@pytest.mark.slow
def test_the_summary_holds_every_number_with_its_interval(model, scenes, tmp_path, capsys):
    code, summary = measured(
        model, scenes, tmp_path, '--closed-loop', '--episodes', '1', '--families',
        'lane_keeping', '--plan-period', '0.5', '--compare', str(model),
    )  # fmt: skip
    assert code == 0
    for name in (
        'pdms', 'epdms', 'ade_m', 'fde_m', 'collisions_per_km', 'route_completion', 'success_rate',
    ):  # fmt: skip
        assert {'mean', 'low', 'high'} <= set(summary[name]), name
    assert summary['ade_m']['low'] <= summary['ade_m']['mean'] <= summary['ade_m']['high']
    assert set(summary['closed_loop']) == {
        'model', 'twin', 'constant_velocity', 'blind_route_follower', 'reference_driver',
    }  # fmt: skip
    assert summary['closed_loop']['reference_driver']['all']['success_rate']['mean'] == 1.0
    # A model compared with itself differs by nothing.
    assert summary['open_loop_twin_minus_model']['ade_m']['mean'] == 0.0
    assert summary['closed_loop_twin_minus_model']['success_rate']['mean'] == 0.0
    assert summary['stamp']['model_sha256'] == open_planner(Contestant(model)).model_sha256
    assert summary['stamp']['schedule'] == 'concurrent'
    lines = (tmp_path / 'episodes.jsonl').read_text().splitlines()
    assert len(lines) == 5
    assert 'ADE' in capsys.readouterr().out
    page = (tmp_path / 'index.html').read_text()
    assert 'reference driver' in page
    assert 'http' not in page.replace('http://www.w3.org', '')


def test_two_backends_of_one_model_are_compared_row_by_row(model, scenes, tmp_path):
    words = ('--schedule', 'off', '--rows', '6', '--compare-backend', 'onnxruntime')
    _, summary = measured(model, scenes, tmp_path, *words)
    assert summary['stamp']['twin_sha256'] == summary['stamp']['model_sha256']
    assert summary['stamp']['twin_backend'] == 'onnxruntime'
    found = summary['open_loop_twin_minus_model']['ade_m']
    assert (found['mean'], found['low'], found['high']) == (0.0, 0.0, 0.0)
    assert summary['scores_model_minus']['twin']['pdms']['mean'] == 0.0


def test_the_same_model_and_scenes_give_the_same_summary(model, scenes, tmp_path):
    words = ('--schedule', 'off', '--rows', '6')
    _, first = measured(model, scenes, tmp_path / 'a', *words)
    _, second = measured(model, scenes, tmp_path / 'b', *words)
    assert first == second
    assert first['stamp']['schedule'] == 'off'
    assert first['success_rate']['mean'] is None
    for name in ('pdms', 'epdms'):
        assert 0.0 <= first[name]['low'] <= first[name]['mean'] <= first[name]['high'] <= 100.0
        assert first['open_loop']['reference_driver']['all'][name]['mean'] > 90.0
    assert first['stamp']['scored_with']['reference'] == 'pdm_closed'
    against = first['scores_model_minus']['constant_velocity']['pdms']
    means = [first['open_loop'][n]['all']['pdms']['mean'] for n in ('model', 'constant_velocity')]
    assert against['mean'] == pytest.approx(means[0] - means[1])
    assert 'Worst clips' in (tmp_path / 'a/index.html').read_text()


def test_a_set_without_scoring_rows_has_no_scores(model, scenes, tmp_path):
    rows = [replace(row, scoring=b'') for row in ShardSet(scenes).rows(range(4))]
    (tmp_path / 'old').mkdir()
    write_shard(tmp_path / 'old/scenes-0.parquet', rows)
    _, summary = measured(model, tmp_path / 'old', tmp_path / 'out', '--schedule', 'off')
    assert summary['pdms'] == summary['epdms'] == NOTHING.content()
    assert 'scores_model_minus' not in summary
    assert 'pdms' not in summary['open_loop']['model']['all']


def test_limited_rows_keep_pairs_whole(scenes):
    shards = ShardSet(scenes)
    chosen = choose_rows(shards, ('red_light', 'lane_keeping', 'pedestrian', 'lead_vehicle'), 9)
    assert len(chosen) < len(shards)
    names = [name for name in shards.pair_ids[chosen] if name]
    assert all(names.count(name) == 2 for name in names)
    assert list(chosen) == sorted(set(chosen.tolist()))


@pytest.mark.parametrize(
    ('more', 'fault'),
    [
        (('--families', 'turns'), 'holds no scene of turns'),
        (('--closed-loop', '--episodes', '0'), '--episodes 0'),
        (('--backend', 'abacus'), 'abacus'),
    ],
)
def test_a_fault_of_the_user_is_one_sentence(model, scenes, tmp_path, capsys, more, fault):
    code, _ = measured(model, scenes, tmp_path, *more)
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert fault in said[-1]


def test_a_damaged_manifest_is_one_sentence_before_anything_is_planned(
    model, tmp_path, capsys, monkeypatch
):
    scenes = write_shards(tmp_path / 'scenes', 2, 0)
    (scenes / 'manifest.json').write_text('{"seed": "1000000"}')
    monkeypatch.setattr(evaluate, '_planned', lambda *_: pytest.fail('planned already'))
    assert measured(model, scenes, tmp_path / 'out')[0] == 2
    error = capsys.readouterr().err
    assert 'manifest.json: seed is' in error
    assert error.count('\n') == 1


def test_each_layer_of_the_bridge_gets_the_other_scene(model, scenes):
    rows = ShardSet(scenes).rows(range(6))
    found = swapped_layers(Contestant(model), rows)
    # The toy's expert reads the keys of its first bridged layer only.
    assert found['layer_0']['end_moves_m'].mean > 0
    assert set(found) == {'layer_0', 'layer_1'}


def test_a_twin_trained_blind_is_known_by_its_manifest(model):
    directory = open_planner(Contestant(model))
    assert directory is open_planner(Contestant(model))

    class Directory:
        training = {'stages': [{'settings': {'blind': True}}]}  # noqa: RUF012

    assert is_blind(Directory())
    Directory.training = {'stages': [{'settings': {}}]}
    assert not is_blind(Directory())


def test_finished_drives_are_not_driven_again(tmp_path):
    book = EpisodeBook(tmp_path / 'episodes.jsonl')
    book.add(EPISODE, 'settings a')
    with open(book.path, 'a') as file:
        file.write('3\nnull\n[]\n{"driver": "model"}\n')
        row = json.loads(book.path.read_text().splitlines()[0])
        file.write(json.dumps({**row, 'states': 7}) + '\n' + json.dumps({**row, 'x': 1}) + '\n')
        file.write('{"driver": "model", "fam')
    again = EpisodeBook(book.path)
    assert again.finished('model', 'settings a') == {('turns', 1_000_000): EPISODE}
    assert again.finished('model', 'settings b') == {}
    assert again.finished('twin', 'settings a') == {}
    again.add(replace(EPISODE, seed=1_000_001), 'settings a')
    assert len(EpisodeBook(book.path).finished('model', 'settings a')) == 2


def test_rates_over_drives_by_hand():
    crash = replace(EPISODE, seed=1, success=False, collided=True, at_fault=True, completion=0.4)
    crash = replace(crash, distance_m=300.0, red_lights_run=1)
    found = closed_loop.rates([EPISODE, crash])
    assert found['success_rate'].mean == 0.5
    assert found['route_completion'].mean == pytest.approx(0.7)
    assert found['collisions_per_km'].mean == pytest.approx(1 / 0.8)
    assert found['red_lights_per_km'].mean == pytest.approx(1 / 0.8)
    difference = closed_loop.paired([EPISODE], [replace(crash, seed=EPISODE.seed)])
    assert difference['collision_rate'].mean == 1.0
    assert difference['success_rate'].mean == -1.0
    assert set(closed_loop.by_family([EPISODE, crash])) == {'all', 'turns'}


def test_closed_loop_seeds_are_held_out():
    assert min(closed_loop.held_out_seeds(3)) == 1_000_000
    assert np.diff(list(closed_loop.held_out_seeds(3))).tolist() == [1, 1]
