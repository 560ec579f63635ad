"""`spanvla score` on files that hold bad rows among good ones."""

from __future__ import annotations

import copy
import json
import math
import resource
import subprocess
import sys

import pytest

from spanvla_ros import cli
from spanvla_ros.scoring import jsonl
from spanvla_ros.types import SpanvlaError


def good_row(golden) -> dict:
    raw = next(golden.rows_of('syn_d037'))
    return {name: raw[name] for name in ('scene', 'row', 'trajectory')}


def bad_rows(golden) -> list[tuple[object, str]]:
    """Rows that must be refused, each with what its sentence names."""
    row, scene = good_row(golden), golden.raw_scenes['syn_d037']

    def with_scene(change) -> dict:
        own = copy.deepcopy(scene)
        change(own)
        return {**row, 'scene': own}

    bowtie = [[0.0, 0.0], [10.0, 10.0], [10.0, 0.0], [0.0, 10.0]]
    agent = {'id': 'x', 'type': 'vehicle', 'length': 4.0, 'width': 2.0, 'height': 1.5}
    agent['states'] = [{'x': 1.0, 'y': 2.0, 'heading': 0.0, 'vx': 0.0, 'vy': 0.0}]
    nan_pose = copy.deepcopy(row)
    nan_pose['trajectory']['poses'][3][0] = math.nan
    short = copy.deepcopy(row)
    short['trajectory']['poses'] = short['trajectory']['poses'][:5]
    return [
        (with_scene(lambda s: s['map']['roadblocks'][0].update(polygon=bowtie)), 'crosses itself'),
        ({**nan_pose, 'scene': scene}, 'trajectory.poses[3][0]: nan'),
        ({**short, 'scene': scene}, 'shorter than 4 s'),
        (with_scene(lambda s: s.update(agents=[{**agent, 'type': 'ufo'}])), 'agents[0].type'),
        (with_scene(lambda s: s.update(agents=[agent, agent])), 'is there twice'),
        (with_scene(lambda s: s['map'].update(roadblocks=[])), 'map.roadblocks: is empty'),
        (
            with_scene(
                lambda s: s.update(agents=[{**agent, 'id': f'{i}'} for i in range(10_000)])
            ),
            'agents: 10000 items',
        ),
        ({**row, 'scene': 'syn_d037'}, 'scene: must be the scene object'),
        ('[1, 2]', 'is not a JSON object'),
        ('{"scene": ', 'is not JSON'),
        ('[' * 100_000, 'is not JSON'),
    ]


def test_bad_rows_are_refused_one_by_one_and_good_ones_scored(golden, tmp_path, capsys):
    bad = bad_rows(golden)
    good = {**good_row(golden), 'scene': golden.raw_scenes['syn_d037']}
    lines = []
    for at, (raw, _) in enumerate(bad):
        own = raw if isinstance(raw, str) else json.dumps({**raw, 'row': f'bad{at}'})
        lines += [own, json.dumps({**good, 'row': f'good{at}'})]
    lines += [json.dumps({**good, 'row': 'good0'}), '', '   ']
    rows, out = tmp_path / 'rows.jsonl', tmp_path / 'deep' / 'scores.jsonl'
    rows.write_text('\n'.join(lines))

    assert cli.main(['score', '--rows', str(rows), '--version', 'v1', '--out', str(out)]) == 2

    results = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().err.splitlines()
    assert len(results) == 2 * len(bad) + 1
    assert len(said) == len([result for result in results if 'error' in result])
    for (raw, sentence), result, line in zip(bad, results[0::2], said, strict=False):
        assert set(result) == {'scene', 'row', 'error'}
        assert sentence in result['error'], (raw, result)
        assert sentence in line
    scored = [result for result in results[1::2] if 'error' not in result]
    assert len(scored) == len(bad)
    assert {json.dumps(result['v1']) for result in scored} == {json.dumps(scored[0]['v1'])}
    assert "row: 'good0' of this scene is there twice" in results[-1]['error']
    stamp = json.loads(out.with_name('scores.jsonl.stamp.json').read_text())
    assert stamp['rows'] == {'scored': len(scored), 'refused': len(bad) + 1}
    assert [path.name for path in out.parent.iterdir() if path.name.startswith('.')] == []


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_in_bounded_memory(golden, tmp_path):
    # One gigabyte of nothing costs no disk; the good row after it must still be scored.
    rows, out = tmp_path / 'rows.jsonl', tmp_path / 'scores.jsonl'
    good = {**good_row(golden), 'scene': golden.raw_scenes['syn_d037']}
    with open(rows, 'wb') as file:
        file.truncate(2**30)
        file.seek(2**30)
        file.write(b'\n' + json.dumps(good).encode() + b'\n')
    arguments = ['score', '--rows', str(rows), '--version', 'v1', '--out', str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(
        [sys.executable, '-m', 'spanvla_ros.cli', *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert done.returncode == 2, done.stderr
    assert 'line 1: is longer than 16 MiB' in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert max(peak_kib, before) < 600 * 1024
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {'scene': None, 'row': None, 'error': 'line 1: is longer than 16 MiB'}
    assert 0.0 <= second['v1']['PDMS'] <= 1.0


def test_a_scene_that_is_unknown_bad_or_twice_is_named(golden, tmp_path, capsys):
    row = good_row(golden)
    broken = copy.deepcopy(golden.raw_scenes['syn_d037'])
    broken['scene'], broken['ego']['vx'] = 'broken', None
    scenes, rows, out = (tmp_path / name for name in ('s.jsonl', 'r.jsonl', 'o.jsonl'))
    own = golden.raw_scenes['syn_d037']
    scenes.write_text('\n'.join(json.dumps(one) for one in (own, broken, own)))
    wanted = ('syn_d037', 'broken', 'missing')
    rows.write_text('\n'.join(json.dumps({**row, 'scene': name}) for name in wanted))
    arguments = ['score', '--scenes', str(scenes), '--rows', str(rows), '--version', 'v2']
    assert cli.main([*arguments, '--out', str(out)]) == 2
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert 'is there twice' in results[0]['error']
    assert 'v2' in results[1]
    assert results[1]['reference'] == 'pdm_closed'
    assert results[2]['error'] == 'scene.ego.vx: is missing'
    assert "'missing' is not in s.jsonl" in results[3]['error']
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_stamp_tells_scenes_apart(golden, tmp_path):
    rows = tmp_path / 'r.jsonl'
    rows.write_text(json.dumps(good_row(golden)))
    stamps = []
    for names in (['syn_d037', 'syn_d072'], ['syn_d072', 'syn_d037'], ['syn_d037']):
        scenes, out = tmp_path / 's.jsonl', tmp_path / 'o.jsonl'
        scenes.write_text('\n'.join(json.dumps(golden.raw_scenes[name]) for name in names))
        arguments = ['--scenes', str(scenes), '--rows', str(rows), '--version', 'v1']
        assert cli.main(['score', *arguments, '--no-states', '--out', str(out)]) == 0
        stamps.append(json.loads((tmp_path / 'o.jsonl.stamp.json').read_text()))
        assert 'simulated_states' not in json.loads(out.read_text())
    hashes = [stamp['scene_set']['sha256'] for stamp in stamps]
    assert hashes[0] == hashes[1] != hashes[2]
    assert stamps[0]['scene_set']['scenes'] == 2
    assert stamps[0]['references_used'] == {'pdm_closed': 1}


def test_given_references_need_a_file(golden, tmp_path, capsys):
    arguments = ['--scenes', str(golden.path('scenes')), '--rows', str(golden.path('rows'))]
    arguments += ['--reference', 'given', '--out', str(tmp_path / 'o.jsonl')]
    assert cli.main(['score', *arguments]) == 2
    assert '--reference given needs --references FILE' in capsys.readouterr().err
    assert not (tmp_path / 'o.jsonl').exists()


def test_a_missing_or_damaged_file_is_one_sentence(tmp_path, capsys):
    damaged = tmp_path / 'rows.jsonl.gz'
    damaged.write_bytes(b'\x1f\x8b\x08\x00 not really gzip')
    (tmp_path / 'empty.jsonl').touch()
    for rows in (tmp_path / 'absent.jsonl', damaged, tmp_path / 'empty.jsonl'):
        assert cli.main(['score', '--rows', str(rows), '--out', str(tmp_path / 'o.jsonl')]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert str(rows) in said[0]
        assert not (tmp_path / 'o.jsonl').exists()


def test_lines_are_cut_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, 'MAX_LINE_BYTES', 10)
    path = tmp_path / 'x'
    path.write_bytes(b'short\nexactly10!\n' + b'x' * 11 + b'\n\nlast')
    lines = list(jsonl.read_lines(path))
    assert [(line.number, line.content) for line in lines if not line.error] == [
        (1, b'short'),
        (2, b'exactly10!'),
        (5, b'last'),
    ]
    assert [line.number for line in lines if line.error] == [3]


def test_named_objects_refuse_what_names_no_scene(tmp_path):
    path = tmp_path / 'x'
    path.write_bytes(b'{"scene": "a"}\n{"scene": 3}\n\xff\n{"scene": "a"}\n')
    with jsonl.NamedObjects(path) as objects:
        assert 'a' in objects
        assert objects['a'] == {'scene': 'a'}
        assert len(objects.errors) == 3
    with pytest.raises(SpanvlaError):
        jsonl.parse_object(b'3')
