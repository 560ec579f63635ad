"""Scoring a stream of rows: scenes are kept while they are in use, bad rows are told apart."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from shapely.errors import ShapelyError

from spanvla_ros.scoring.jsonl import Line, NamedObjects, parse_object
from spanvla_ros.scoring.pdms import Scorer, simulate_previous
from spanvla_ros.scoring.prepared import Version
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

CACHED_SCENES = 16

Source = Literal['given', 'pdm_closed', 'given_or_pdm_closed']
_BROKEN = (ShapelyError, ArithmeticError, ValueError, np.linalg.LinAlgError)


@dataclass(frozen=True)
class RowResult:
    """A result line, and for a scored row its total by version; a refused one holds `error`."""

    content: dict[str, Any]
    totals: dict[str, float]

    @property
    def error(self) -> str | None:
        """Why the row was refused, None if it was scored."""
        return self.content.get('error')


@dataclass(frozen=True)
class _Ready:
    """A row that was read and whose scene is prepared; `at` is its place among its chunk."""

    at: int
    scene: str
    row: PlanRow
    scorers: tuple[Scorer, ...]


class RowScorer:
    """Scores chunks of rows lines by one or both versions.

    Args:
        versions: which scores to make.
        source: where references come from.
        scenes: scenes by name; None where each row holds its own scene object.
        references: references by scene name, if there is such a file.
        with_states: whether result lines hold the simulated states.
    """

    def __init__(
        self,
        versions: Sequence[Version],
        source: Source,
        scenes: NamedObjects | None,
        references: NamedObjects | None,
        *,
        with_states: bool = True,
    ) -> None:
        """Start with nothing cached."""
        self.hashes: set[bytes] = set() if scenes is None else set(scenes.hashes.values())
        self._versions = tuple(versions)
        self._source = source
        self._scenes = scenes
        self._references = references
        self._with_states = with_states
        self._seen: set[bytes] = set()
        self._cache: OrderedDict[bytes, tuple[Scorer, ...] | str] = OrderedDict()

    def score(self, lines: Sequence[Line]) -> list[RowResult]:
        """Result lines of a chunk of rows lines, in their order."""
        results: dict[int, RowResult] = {}
        groups: dict[tuple[int, int], list[_Ready]] = {}
        for at, line in enumerate(lines):
            read = self._read(at, line)
            if isinstance(read, RowResult):
                results[at] = read
            else:
                groups.setdefault((id(read.scorers), read.row.hz), []).append(read)
        for group in groups.values():
            results |= self._score_group(group)
        return [results[at] for at in range(len(lines))]

    def _read(self, at: int, line: Line) -> _Ready | RowResult:
        scene: str | None = None
        row: str | None = None
        try:
            if line.error:
                raise SpanvlaError(f'line {line.number}: {line.error}')
            try:
                raw = parse_object(line.content)
            except SpanvlaError as error:
                raise SpanvlaError(f'line {line.number}: {error}') from error
            row = raw['row'] if isinstance(raw.get('row'), str) else None
            scene = _scene_name(raw.get('scene'))
            scorers = self._scorers(raw)
            assert scene is not None
            read = row_from_json(raw, scorers[0].scene.ego)
            self._refuse_twice(scene, read.row)
            return _Ready(at, scene, read, scorers)
        except SpanvlaError as error:
            return refusal(scene, row, str(error))

    def _refuse_twice(self, scene: str, row: str) -> None:
        key = hashlib.sha256(json.dumps([scene, row]).encode()).digest()[:16]
        if key in self._seen:
            raise SpanvlaError(f'row: {row!r:.80} of this scene is there twice')
        self._seen.add(key)

    def _scorers(self, raw: dict[str, Any]) -> tuple[Scorer, ...]:
        key = self._key(raw)
        if key not in self._cache:
            self._cache[key] = self._prepared(raw)
            while len(self._cache) > CACHED_SCENES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        known = self._cache[key]
        if isinstance(known, str):
            raise SpanvlaError(known)
        return known

    def _key(self, raw: dict[str, Any]) -> bytes:
        given = raw.get('scene')
        name = _scene_name(given)
        if self._scenes is None:
            if not isinstance(given, dict):
                raise SpanvlaError('scene: must be the scene object where --scenes is not given')
            if name is None:
                raise SpanvlaError('scene.scene: must be the name of the scene')
            content = json.dumps([given, raw.get('reference')], sort_keys=True).encode()
            key = hashlib.sha256(content).digest()
            self.hashes.add(key)
            return key
        if not isinstance(given, str):
            raise SpanvlaError('scene: must be the name of a scene of the --scenes file')
        if given not in self._scenes:
            raise SpanvlaError(f'scene: {given!r:.80} is not in {self._scenes.path.name}')
        return self._scenes.hashes[given]

    def _prepared(self, raw: dict[str, Any]) -> tuple[Scorer, ...] | str:
        """The scorers of a row's scene, or why there can be none; both are worth remembering."""
        given = raw['scene']
        try:
            scene = scene_from_json(given if self._scenes is None else self._scenes[given])
            return tuple(
                Scorer(scene, version, self._reference(scene.name, raw.get('reference'), version))
                for version in self._versions
            )
        except SpanvlaError as error:
            where = '' if str(error).startswith(('scene', 'reference')) else 'scene.'
            return f'{where}{error}'
        except _BROKEN as error:
            return f'scene: cannot be prepared ({type(error).__name__}: {error})'

    def _reference(self, name: str, own: object, version: Version) -> Reference | None:
        if self._source == 'pdm_closed':
            return None
        if own is not None:
            return reference_from_json(own, version)
        if self._references is not None and name in self._references:
            return reference_from_json(self._references[name], version)
        if self._source == 'given_or_pdm_closed':
            return None
        if self._references is None:
            raise SpanvlaError('reference: the row holds none, use --reference pdm_closed')
        raise SpanvlaError(f'reference: {name!r:.80} is not in {self._references.path.name}')

    def _score_group(self, group: list[_Ready]) -> dict[int, RowResult]:
        try:
            return self._score_together(group)
        except _BROKEN as error:
            if len(group) > 1:
                # One row must not take its neighbors along.
                alone = [self._score_group([one]) for one in group]
                return {at: result for one in alone for at, result in one.items()}
            reason = f'trajectory: cannot be scored ({type(error).__name__}: {error})'
            return {group[0].at: refusal(group[0].scene, group[0].row.row, reason)}

    def _score_together(self, group: list[_Ready]) -> dict[int, RowResult]:
        scorers, hz = group[0].scorers, group[0].row.hz
        poses = np.stack([one.row.poses[: 4 * hz] for one in group])
        states = scorers[0].simulate(poses, hz=hz, frame='world')
        previous = simulate_previous([one.row.previous for one in group])
        for array in (states, *[before for before in previous if before is not None]):
            if not np.isfinite(array).all():
                raise ArithmeticError('its simulation leaves the range of numbers')
        scores = {scorer.version: scorer.score_states(states, previous) for scorer in scorers}
        areas = scorers[0].areas(states)
        results = {}
        for at, one in enumerate(group):
            content: dict[str, Any] = {
                'scene': one.scene,
                'row': one.row.row,
                'reference': scorers[0].reference.source,
            }
            content |= {version: scores_to_json(made[at]) for version, made in scores.items()}
            content['ego_areas'] = areas_to_json(areas, at)
            if self._with_states:
                content['simulated_states'] = states_to_json(states[at])
                before = previous[at]
                if before is not None:
                    content['previous_simulated_states'] = states_to_json(before)
            totals: dict[str, float] = {name: made[at].total for name, made in scores.items()}
            results[one.at] = RowResult(content, totals)
        return results


def refusal(scene: str | None, row: str | None, error: str) -> RowResult:
    """The result line of a row that was not scored."""
    return RowResult({'scene': scene, 'row': row, 'error': error}, {})


def file_refusals(objects: NamedObjects | None) -> Iterator[RowResult]:
    """One result line for each line of a scenes or references file that names no scene."""
    for name, error in () if objects is None else objects.errors:
        yield refusal(name, None, error)


def _scene_name(given: object) -> str | None:
    name = given.get('scene') if isinstance(given, dict) else given
    return name if isinstance(name, str) and name else None
