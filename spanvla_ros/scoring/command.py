"""`spanvla score`: PDMS and EPDMS of planned trajectories, equal to the official ones."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from shapely.errors import ShapelyError

import spanvla_ros
from spanvla_ros.scoring.jsonl import Line, NamedObjects, parse_object, read_lines
from spanvla_ros.scoring.pdms import SCORER_VERSION, Scorer, simulate_previous
from spanvla_ros.scoring.prepared import VERSIONS, Version
from spanvla_ros.scoring.reference import Reference
from spanvla_ros.scoring.rows import (
    PlanRow,
    areas_to_json,
    reference_from_json,
    row_from_json,
    scores_to_json,
    states_to_json,
)
from spanvla_ros.scoring.scene import scene_from_json
from spanvla_ros.types import SpanvlaError

CHUNK_ROWS = 64
CACHED_SCENES = 16
EXAMPLES = """examples:
  spanvla score --scenes syn_scenes.jsonl.gz --references syn_references.jsonl.gz \\
      --rows syn_rows.jsonl.gz --out scores.jsonl
  spanvla score --scenes scenes.jsonl --rows plans.jsonl --version v2 \\
      --reference pdm_closed --out scores.jsonl
  spanvla score --rows self_contained.jsonl --out scores.jsonl
"""
_BROKEN = (ShapelyError, ArithmeticError, ValueError, np.linalg.LinAlgError)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla score`."""
    parser.description = 'Score planned trajectories by PDMS (v1) and EPDMS (v2).'
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--scenes', type=Path, help='scenes file (JSON Lines, may be gzipped)')
    parser.add_argument('--references', type=Path, help='what PDM-Closed did in each scene')
    parser.add_argument('--rows', type=Path, required=True, help='planned trajectories')
    parser.add_argument('--version', choices=(*VERSIONS, 'both'), default='both')
    parser.add_argument(
        '--reference',
        choices=('given', 'pdm_closed'),
        help='take the reference from --references, or plan it ourselves '
        '(default: given where there is one to take)',
    )
    parser.add_argument('--no-states', action='store_true', help='leave simulated states out')
    parser.add_argument('--out', type=Path, required=True, help='results, one line a row')


def run(options: argparse.Namespace) -> int:
    """Score a rows file; 0 if every row was scored, 2 if any was refused."""
    versions: tuple[Version, ...] = VERSIONS
    if options.version != 'both':
        versions = (options.version,)
    source = options.reference
    if source is None:
        source = 'given' if options.references is not None or options.scenes is None else ''
        source = source or 'pdm_closed'
    if source == 'given' and options.references is None and options.scenes is not None:
        raise SpanvlaError('--reference given needs --references FILE, or use pdm_closed')
    scenes = NamedObjects(options.scenes) if options.scenes else None
    references = NamedObjects(options.references) if options.references else None
    job = _Job(versions, source, scenes, references, not options.no_states)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        _write(options.out, job, options.rows)
        stamp = options.out.with_name(options.out.name + '.stamp.json')
        _replace(stamp, json.dumps(job.stamp(options), indent=2) + '\n')
    except OSError as error:
        raise SpanvlaError(f'{options.out}: cannot be written ({error})') from error
    finally:
        for objects in (scenes, references):
            if objects is not None:
                objects.close()
    print(job.summary(options.out))
    return 2 if job.refused else 0


@dataclass
class _Job:
    """One run of the command: its inputs, its cache of scenes, its counts."""

    versions: tuple[Version, ...]
    source: str
    scenes: NamedObjects | None
    references: NamedObjects | None
    with_states: bool
    scored: int = 0
    refused: int = 0
    totals: dict[str, list[float]] = field(default_factory=dict)
    hashes: dict[str, bytes] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    cache: OrderedDict[bytes, tuple[Scorer, ...] | str] = field(default_factory=OrderedDict)

    def file_errors(self) -> Iterator[dict[str, Any]]:
        """One result line for each line of the scenes or references that names no scene."""
        for objects in (self.scenes, self.references):
            for name, error in objects.errors if objects is not None else ():
                yield self.refusal(name, None, error)

    def refusal(self, scene: str | None, row: str | None, error: str) -> dict[str, Any]:
        """A result line of a refused row; says so on stderr as well."""
        self.refused += 1
        print(f'score: {scene or "?"}/{row or "?"}: {error}', file=sys.stderr)
        return {'scene': scene, 'row': row, 'error': error}

    def score(self, lines: Sequence[tuple[Line, str]]) -> list[dict[str, Any]]:
        """Result lines of a chunk of row lines, in their order."""
        results: list[dict[str, Any] | None] = [None] * len(lines)
        ready: list[tuple[int, str, PlanRow, tuple[Scorer, ...]]] = []
        for at, (line, where) in enumerate(lines):
            scene_name, row_name = None, None
            try:
                if line.error:
                    raise SpanvlaError(f'{where}: {line.error}')
                raw = _parse(line, where)
                row_name = raw['row'] if isinstance(raw.get('row'), str) else None
                scene_name, scorers = self._scorers(raw)
                row = row_from_json(raw, scorers[0].scene.ego)
                self._refuse_twice(scene_name, row.row)
                ready.append((at, scene_name, row, scorers))
            except SpanvlaError as error:
                results[at] = self.refusal(scene_name or _name_of(line), row_name, str(error))
        for at, result in self._score_ready(ready):
            results[at] = result
        return [result for result in results if result is not None]

    def _refuse_twice(self, scene: str, row: str) -> None:
        key = hashlib.sha256(json.dumps([scene, row]).encode()).digest()[:16]
        if key in self.seen:
            raise SpanvlaError(f'row: {row!r} of this scene is there twice')
        self.seen.add(key)

    def _scorers(self, raw: dict[str, Any]) -> tuple[str, tuple[Scorer, ...]]:
        """The scene's name and its scorers, one a version; a bad scene is remembered as such."""
        given = raw.get('scene')
        if isinstance(given, dict) and isinstance(given.get('scene'), str):
            name = given['scene']
            content = json.dumps([given, raw.get('reference')]).encode()
            key = hashlib.sha256(content).digest()
            self.hashes.setdefault(name, key)
        elif isinstance(given, str) and self.scenes is not None:
            name = given
            if name not in self.scenes:
                raise SpanvlaError(f'scene: {name!r:.80} is not in {self.scenes.path.name}')
            key = self.scenes.hashes[name]
        elif self.scenes is None:
            raise SpanvlaError('scene: must be the scene object where there is no --scenes file')
        else:
            raise SpanvlaError('scene: must be the name of a scene')
        if key not in self.cache:
            try:
                scene = given if isinstance(given, dict) else self._scene(name)
                self.cache[key] = self._build(name, scene, raw.get('reference'))
            except SpanvlaError as error:
                self.cache[key] = f'scene.{error}'
            except _BROKEN as error:
                self.cache[key] = f'scene: cannot be prepared ({type(error).__name__}: {error})'
            while len(self.cache) > CACHED_SCENES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        known = self.cache[key]
        if isinstance(known, str):
            raise SpanvlaError(known)
        return name, known

    def _scene(self, name: str) -> dict[str, Any]:
        assert self.scenes is not None
        return self.scenes[name]

    def _build(self, name: str, raw: object, reference: object) -> tuple[Scorer, ...]:
        scene = scene_from_json(raw)
        return tuple(
            Scorer(scene, version, self._reference(name, reference, version))
            for version in self.versions
        )

    def _reference(self, name: str, own: object, version: Version) -> Reference | None:
        if self.source != 'given':
            return None
        if own is not None:
            return reference_from_json(own, version)
        if self.references is not None and name in self.references:
            return reference_from_json(self.references[name], version)
        if self.references is None:
            raise SpanvlaError('reference: the row holds none; use --reference pdm_closed')
        raise SpanvlaError(f'reference: {name!r:.80} is not in {self.references.path.name}')

    def _score_ready(
        self, ready: list[tuple[int, str, PlanRow, tuple[Scorer, ...]]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for group in _by_scene_and_rate(ready):
            try:
                yield from self._score_group(group)
            except _BROKEN as error:
                reason = f'cannot be scored ({type(error).__name__}: {error})'
                for at, name, row, _ in group:
                    yield at, self.refusal(name, row.row, reason)

    def _score_group(
        self, group: list[tuple[int, str, PlanRow, tuple[Scorer, ...]]]
    ) -> list[tuple[int, dict[str, Any]]]:
        scorers = group[0][3]
        poses = np.stack([row.poses[: 4 * row.hz] for _, _, row, _ in group])
        states = scorers[0].simulate(poses, hz=group[0][2].hz, frame='world')
        previous = simulate_previous([row.previous for _, _, row, _ in group])
        if not np.isfinite(states).all():
            raise ArithmeticError('the simulation leaves the range of numbers')
        results: list[dict[str, Any]] = [{'scene': name, 'row': row.row} for _, name, row, _ in group]
        areas = None
        for scorer in scorers:
            scores = scorer.score_states(states, previous)
            for result, one in zip(results, scores, strict=True):
                result[scorer.version] = scores_to_json(one)
                self.totals.setdefault(scorer.version, []).append(one.total)
            areas = areas or scorer.areas(states)
        assert areas is not None
        for at, result in enumerate(results):
            result['ego_areas'] = areas_to_json(areas, at)
            if self.with_states:
                result['simulated_states'] = states_to_json(states[at])
                before = previous[at]
                if before is not None:
                    result['previous_simulated_states'] = states_to_json(before)
        self.scored += len(group)
        return [(at, result) for (at, *_), result in zip(group, results, strict=True)]

    def stamp(self, options: argparse.Namespace) -> dict[str, Any]:
        """What the scores were made with."""
        hashes = self.scenes.hashes if self.scenes is not None else self.hashes
        digest = hashlib.sha256(b''.join(sorted(hashes.values()))).hexdigest()
        files = {'scenes': options.scenes, 'references': options.references, 'rows': options.rows}
        return {
            'scorer_version': SCORER_VERSION,
            'package_version': spanvla_ros.__version__,
            'versions': list(self.versions),
            'reference': self.source,
            'variants': {
                'human_filter': 'v2' in self.versions,
                'traffic': 'log replay',
                'extended_comfort': 'rows with a previous trajectory',
                'vehicle': 'pacifica',
            },
            'scene_set': {'sha256': digest, 'scenes': len(hashes)},
            'seeds': [],
            'files': {name: str(path.name) for name, path in files.items() if path is not None},
            'rows': {'scored': self.scored, 'refused': self.refused},
            'mean': {name: float(np.mean(values)) for name, values in self.totals.items()},
        }

    def summary(self, out: Path) -> str:
        """One line for people."""
        names = {'v1': 'PDMS', 'v2': 'EPDMS'}
        means = ''.join(
            f', mean {names[version]} {np.mean(values):.4f}'
            for version, values in self.totals.items()
        )
        return (
            f'{self.scored} rows scored, {self.refused} refused{means} '
            f'(scorer {SCORER_VERSION}, reference {self.source}): {out}'
        )


def _write(out: Path, job: _Job, rows: Path) -> None:
    temporary = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            _dump(file, job.file_errors())
            chunk: list[tuple[Line, str]] = []
            for line in read_lines(rows):
                chunk.append((line, f'{rows.name} line {line.number}'))
                if len(chunk) == CHUNK_ROWS:
                    _dump(file, job.score(chunk))
                    chunk = []
            _dump(file, job.score(chunk))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _dump(file: IO[str], results: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    for result in results:
        file.write(json.dumps(result, allow_nan=False, separators=(',', ':')) + '\n')


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    temporary.write_text(content, encoding='utf-8')
    os.replace(temporary, path)


def _parse(line: Line, where: str) -> dict[str, Any]:
    try:
        return parse_object(line.content)
    except SpanvlaError as error:
        raise SpanvlaError(f'{where}: {error}') from error


def _name_of(line: Line) -> str | None:
    # Only for the error line: which scene a refused row meant, if that can be told.
    try:
        given = parse_object(line.content).get('scene') if line.content else None
    except SpanvlaError:
        return None
    if isinstance(given, dict):
        given = given.get('scene')
    return given if isinstance(given, str) else None


def _by_scene_and_rate(
    ready: list[tuple[int, str, PlanRow, tuple[Scorer, ...]]],
) -> list[list[tuple[int, str, PlanRow, tuple[Scorer, ...]]]]:
    groups: dict[tuple[int, int], list[tuple[int, str, PlanRow, tuple[Scorer, ...]]]] = {}
    for item in ready:
        groups.setdefault((id(item[3]), item[2].hz), []).append(item)
    return list(groups.values())


