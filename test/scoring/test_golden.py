"""Our scores against those of the official code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from spanvla_ros import cli
from spanvla_ros.geometry import wrap_angle
from spanvla_ros.scoring.pdms import Scorer
from spanvla_ros.scoring.reference import pdm_closed

from .conftest import SHARED, Golden

TOLERANCE = {'EP': 1e-4, 'PDMS': 1e-4, 'EPDMS': 1e-4, 'EPDMS_without_EC': 1e-4}
LOOSE = {'ego_progress': 1e-4, 'score': 1e-4, 'pdm_score': 1e-4, 'weighted_metrics': 1e-4}
LOOSE |= {'raw_progress_m': 1e-4, 'ec_rms': 1e-4}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='../shared is not here')


def differences(ours: object, theirs: object, path: str = '', tolerance: float = 0.0) -> list[str]:
    """Every place where two result objects differ; times and scores are exact, progress is not."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or set(ours) != set(theirs):
            return [f'{path}: fields {sorted(ours)} are not {sorted(theirs)}']
        return [
            line
            for name, value in theirs.items()
            for line in differences(
                ours[name],
                value,
                f'{path}.{name}',
                TOLERANCE.get(name, LOOSE.get(name, tolerance)),
            )
        ]
    if isinstance(theirs, list):
        if not isinstance(ours, list) or len(ours) != len(theirs):
            return [f'{path}: lengths differ']
        return [
            line
            for at, (one, other) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(one, other, f'{path}[{at}]', tolerance)
        ]
    if isinstance(theirs, float) and not isinstance(theirs, bool):
        near = isinstance(ours, float) and abs(ours - theirs) <= tolerance + 1e-9
        return [] if near else [f'{path}: {ours} is not {theirs}']
    return [] if ours == theirs else [f'{path}: {ours} is not {theirs}']


def score(tmp_path: Path, golden: Golden, *more: str) -> list[dict]:
    out = tmp_path / 'scores.jsonl'
    arguments = ['--scenes', str(golden.path('scenes')), '--rows', str(golden.path('rows'))]
    assert cli.main(['score', *arguments, '--out', str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def row_differences(ours: dict, theirs: dict) -> list[str]:
    name = f'{theirs["scene"]}/{theirs["row"]}'
    assert (ours['scene'], ours['row']) == (theirs['scene'], theirs['row'])
    found = []
    for version in ('v1', 'v2'):
        if theirs[f'stable_{version}']:
            found += differences(ours[version], theirs[version], f'{name}.{version}')
    found += differences(ours['ego_areas'], theirs['ego_areas'], f'{name}.ego_areas')
    for field in ('simulated_states', 'previous_simulated_states'):
        if field in theirs:
            gap = np.array(ours[field]) - np.array(theirs[field])
            gap[:, 2] = wrap_angle(gap[:, 2])
            if np.abs(gap).max() > 1e-4:
                found.append(f'{name}.{field}: {np.abs(gap).max()}')
        else:
            assert field not in ours
    return found


def check_rows(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    found = [
        line
        for one, other in zip(ours, theirs, strict=True)
        for line in row_differences(one, other)
    ]
    assert not found, '\n'.join(found[:20])


def test_given_references_make_the_official_scores(golden, tmp_path):
    ours = score(tmp_path, golden, '--references', str(golden.path('references')))
    check_rows(ours, golden.raw_rows)
    assert all(line['reference'] == 'given' for line in ours)


def test_a_reference_is_measured_as_the_official_code_measured_it(golden):
    for name, scene in golden.scenes.items():
        for version in ('v1', 'v2'):
            given = golden.reference(name, version)
            bare = type(given)(given.centerline, given.route_lane_ids, given.plan)
            ours = Scorer(scene, version, bare).score(golden.plans(name)[:1], hz=2, frame='world')
            theirs = Scorer(scene, version, given).score(
                golden.plans(name)[:1], hz=2, frame='world'
            )
            assert ours[0].ep == pytest.approx(theirs[0].ep, abs=1e-6)


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_own_pdm_closed_plans_what_the_official_one_planned(golden, version):
    for name, scene in golden.scenes.items():
        own, given = pdm_closed(scene, version), golden.reference(name, version)
        assert own.route_lane_ids == given.route_lane_ids, name
        assert np.abs(own.centerline - given.centerline).max() < 1e-5, name
        assert np.abs(own.plan[:, :2] - given.plan[:, :2]).max() < 1e-4, name


def test_own_reference_makes_the_official_scores(golden, tmp_path):
    rows = [raw for raw in golden.raw_rows if raw['scene'] in list(golden.scenes)[:3]]
    short = tmp_path / 'rows.jsonl'
    short.write_text(''.join(json.dumps(raw) + '\n' for raw in rows))
    arguments = ['--scenes', str(golden.path('scenes')), '--rows', str(short)]
    out = tmp_path / 'scores.jsonl'
    assert cli.main(['score', *arguments, '--reference', 'pdm_closed', '--out', str(out)]) == 0
    ours = [json.loads(line) for line in out.read_text().splitlines()]
    check_rows(ours, rows)
    assert all(line['reference'] == 'pdm_closed' for line in ours)


def test_self_contained_rows_score_like_files(golden, tmp_path):
    rows = tmp_path / 'rows.jsonl.gz'
    with gzip.open(rows, 'wt') as file:
        for raw in golden.raw_rows[:9]:
            scene, reference = golden.raw_scenes[raw['scene']], golden.raw_references[raw['scene']]
            bare = {name: raw[name] for name in raw if name in ('row', 'trajectory')}
            if 'previous_trajectory' in raw:
                bare['previous_trajectory'] = raw['previous_trajectory']
            file.write(json.dumps({**bare, 'scene': scene, 'reference': reference}) + '\n')
    out = tmp_path / 'scores.jsonl'
    assert cli.main(['score', '--rows', str(rows), '--out', str(out)]) == 0
    check_rows([json.loads(line) for line in out.read_text().splitlines()], golden.raw_rows[:9])


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize('prefix', ['syn', 'av2'])
@pytest.mark.parametrize('source', ['given', 'pdm_closed'])
def test_whole_golden_set(tmp_path, prefix, source):
    golden = Golden(SHARED, prefix)
    more = ['--reference', source]
    if source == 'given':
        more += ['--references', str(golden.path('references'))]
    check_rows(score(tmp_path, golden, *more), golden.raw_rows)
