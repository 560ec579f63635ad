from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import pickle

import numpy as np
import pytest
import shapely
from navsim_files import write_drive

from spanvla_ros.cli import main
from spanvla_ros.geometry import wrap_angle
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.scoring.rows import reference_from_json
from spanvla_ros.scoring.scene import scene_from_json
from spanvla_ros.town.driver import reference_plan
from spanvla_ros.town.scenarios import make_world
from spanvla_ros.training.data.scoring_rows import unpack_scene
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.navsim.pickles import read_pickle
from spanvla_ros.types import SpanvlaError

WORLDS = [('lead_vehicle', 3), ('red_light', 6), ('turns', 8)]


@pytest.fixture(scope='module', params=WORLDS, ids=[name for name, _ in WORLDS])
def written(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return write_drive(tmp_path_factory.mktemp('navsim'), patch, make_world(*request.param))


def lines(path):
    with gzip.open(path, 'rt') as file:
        return [json.loads(line) for line in file]


def convert(written, out, *more):
    words = ['navsim', '--logs', str(written.logs), '--cache', str(written.cache)]
    return main([*words, '--out', str(out), *more])


def test_a_drive_comes_back_from_its_log_and_cache(written, tmp_path):
    assert convert(written, tmp_path / 'out') == 0
    (raw,), (given,) = (
        lines(tmp_path / 'out' / name) for name in ('scenes.jsonl.gz', 'references.jsonl.gz')
    )
    scene, truth = scene_from_json(raw), written.scene
    assert raw['scene'] == given['scene'] == written.token
    ours, theirs = ({a.agent_id: a for a in s.agents} for s in (scene, truth))
    assert set(ours) >= set(theirs)
    for name, agent in theirs.items():
        assert ours[name].kind == agent.kind
        off = ours[name].states[0] - agent.states[0]
        off[2] = wrap_angle(off[2])
        assert np.abs(off).max() < 1e-3
    assert (scene.ego.x_m, scene.ego.y_m) == pytest.approx((truth.ego.x_m, truth.ego.y_m))
    now_red = {light.lane_id for light in scene.red_lights if light.from_s == 0.0}
    assert now_red == {light.lane_id for light in truth.red_lights}
    drivable = [
        shapely.union_all(
            [shapely.Polygon(b.polygon).buffer(0.01) for b in s.map.roadblocks
             if not b.is_connector] + [shapely.Polygon(ring) for ring in s.map.intersections]
        )
        for s in (scene, truth)
    ]  # fmt: skip
    assert drivable[0].symmetric_difference(drivable[1]).area < 1.0
    reference = reference_from_json(given, 'v2')
    assert np.allclose(reference.plan, written.plan, atol=1e-6)


def test_plans_score_as_in_the_scene_it_came_from(written, tmp_path):
    assert convert(written, tmp_path / 'out') == 0
    (raw,), (given,) = (
        lines(tmp_path / 'out' / name) for name in ('scenes.jsonl.gz', 'references.jsonl.gz')
    )
    scene, reference = scene_from_json(raw), reference_from_json(given, 'v2')
    plan = reference_plan(written.world).poses[4::5]
    still, aside = np.zeros_like(plan), plan + np.array([0.0, 5.0, 0.0])
    plans = np.stack([plan, still, aside])
    here = Scorer(scene, 'v2', reference, human_filter=False).score(plans)
    there = Scorer(written.scene, 'v2', human_filter=False).score(plans)
    for one, other in zip(here, there, strict=True):
        assert (one.nc, one.dac, one.tlc) == (other.nc, other.dac, other.tlc)
        assert one.ep == pytest.approx(other.ep, abs=0.02)


def test_rows_show_what_the_cameras_saw_and_what_the_human_did(written, tmp_path):
    out = tmp_path / 'out'
    assert convert(written, out, '--sensors', str(written.sensors)) == 0
    shards = ShardSet(out)
    assert len(shards) == 1
    (row,) = shards.rows([0])
    seen = row.sample.observation
    for frames, image in zip(seen.frames, written.images, strict=True):
        difference = np.abs(frames[0].image.astype(int) - image.astype(int))
        assert np.median(difference) <= 2
    ego = written.world.ego
    scene = unpack_scene(row.scoring)
    assert scene.human is not None
    way = np.hypot(scene.human[-1, 0] - ego.x_m, scene.human[-1, 1] - ego.y_m)
    assert np.hypot(*row.sample.future[-1, :2]) == pytest.approx(way, abs=1e-3)
    assert seen.ego.speed_mps == pytest.approx(ego.speed_mps, abs=1e-6)
    assert seen.history_valid.all()
    assert seen.route is not None
    assert not row.presence.any()
    # Its own reference can be planned on the map made of the cache.
    score = Scorer(scene, 'v2').score(row.sample.future[None], hz=2)[0]
    assert score.total > 0.5


class Evil:
    def __reduce__(self):
        return (eval, ('open("touched", "w")',))


@pytest.mark.parametrize('packed', [False, True])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch, capsys, packed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'logs').mkdir()
    content = pickle.dumps([{'token': Evil()}])
    path = tmp_path / 'logs' / 'log.pkl'
    path.write_bytes(lzma.compress(content) if packed else content)
    words = ['--logs', 'logs', '--sensors', 'logs', '--out', 'out']
    assert main(['navsim', *words]) == 2
    assert 'builtins.eval' in capsys.readouterr().err
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize(
    'name', ['os.system', 'numpy.load', 'shapely.io.from_pickle', 'builtins.getattr']
)
def test_only_the_names_in_the_tables_stand_for_something(tmp_path, name):
    module, _, word = name.rpartition('.')
    path = tmp_path / 'log.pkl'
    path.write_bytes(f'c{module}\n{word}\n.'.encode())
    with pytest.raises(SpanvlaError, match=word):
        read_pickle(path)


def test_a_damaged_pickle_is_one_sentence(tmp_path):
    whole = pickle.dumps([{'a': np.arange(5.0), 'b': np.float64(2.0)}], protocol=4)
    rng = np.random.default_rng(0)
    (tmp_path / 'log.pkl').write_bytes(whole)
    found = read_pickle(tmp_path / 'log.pkl')[0]
    assert np.array_equal(found['a'], np.arange(5.0))
    assert found['b'] == 2.0
    for _ in range(200):
        torn = bytearray(whole)
        torn[int(rng.integers(len(torn)))] = int(rng.integers(256))
        (tmp_path / 'log.pkl').write_bytes(bytes(torn[: int(rng.integers(1, len(torn) + 1))]))
        with contextlib.suppress(SpanvlaError):
            read_pickle(tmp_path / 'log.pkl')


def test_a_log_of_another_layout_names_the_frame(tmp_path, capsys):
    path = tmp_path / 'log.pkl'
    path.write_bytes(pickle.dumps([{'token': 'a'}]))
    words = ['--logs', str(path), '--sensors', str(tmp_path), '--out', str(tmp_path / 'out')]
    assert main(['navsim', *words]) == 2
    assert 'frame 0' in capsys.readouterr().err
