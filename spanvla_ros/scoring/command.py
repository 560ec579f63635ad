"""`spanvla score`: PDMS and EPDMS of planned trajectories, equal to the official ones."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import spanvla_ros
from spanvla_ros.scoring.jsonl import NamedObjects, read_lines
from spanvla_ros.scoring.pdms import SCORER_VERSION
from spanvla_ros.scoring.prepared import VERSIONS, Version
from spanvla_ros.scoring.row_scorer import RowResult, RowScorer, Source, file_refusals
from spanvla_ros.types import SpanvlaError

CHUNK_ROWS = 64
BAD_ROWS = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla score`."""
    parser.add_argument(
        '--scenes', type=Path, help='scenes, JSON Lines; without it each row holds its scene'
    )
    parser.add_argument('--references', type=Path, help='what PDM-Closed did in each scene')
    parser.add_argument('--rows', type=Path, required=True, help='planned trajectories')
    parser.add_argument(
        '--version', choices=(*VERSIONS, 'both'), default='both', help='v1 PDMS, v2 EPDMS'
    )
    parser.add_argument(
        '--reference',
        choices=('given', 'pdm_closed'),
        help='take references from --references or the rows, or plan them ourselves; '
        'default: given with --references, else planned where a row holds none',
    )
    parser.add_argument(
        '--no-states', action='store_true', help='leave simulated states out of the results'
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='results; what made them goes to OUT.stamp.json'
    )


def run(options: argparse.Namespace) -> int:
    """Score a rows file; 0 if every row was scored, 2 if any was refused."""
    versions: tuple[Version, ...] = VERSIONS
    if options.version != 'both':
        versions = (options.version,)
    source: Source = options.reference or (
        'given_or_pdm_closed' if options.references is None else 'given'
    )
    if source == 'given' and options.references is None and options.scenes is not None:
        raise SpanvlaError('--reference given needs --references FILE, or use pdm_closed')
    with ExitStack() as stack:
        scenes, references = (
            None if path is None else stack.enter_context(NamedObjects(path))
            for path in (options.scenes, options.references)
        )
        scorer = RowScorer(versions, source, scenes, references, with_states=not options.no_states)
        results = chain(
            file_refusals(scenes), file_refusals(references), _results(scorer, options.rows)
        )
        tally = _Tally()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        _write(options.out, tally.lines(results, options.rows))
        stamp = tally.stamp(scorer, versions, source, options)
        _write(options.out.with_name(f'{options.out.name}.stamp.json'), [stamp])
    sys.stdout.write(tally.summary(options.out) + '\n')
    return BAD_ROWS if tally.refused else 0


def _results(scorer: RowScorer, rows: Path) -> Iterator[RowResult]:
    lines = read_lines(rows)
    while chunk := list(islice(lines, CHUNK_ROWS)):
        yield from scorer.score(chunk)


class _Tally:
    """Counts and sums of the result lines that pass through it."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.scored = 0
        self.refused = 0
        self.references: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()

    def lines(self, results: Iterable[RowResult], rows: Path) -> Iterator[str]:
        """The text of each result line; a refusal is said on stderr as well.

        Raises:
            SpanvlaError: the file `rows` has given none.
        """
        for result in results:
            content = result.content
            if result.error is not None:
                self.refused += 1
                place = f'scene {content["scene"] or "?"} row {content["row"] or "?"}'
                sys.stderr.write(f'spanvla score: {place}: {result.error}\n')
            else:
                self.scored += 1
                self.references[content['reference']] += 1
                self.sums.update(result.totals)
            yield json.dumps(content, allow_nan=False, separators=(',', ':')) + '\n'
        if not (self.scored or self.refused):
            raise SpanvlaError(f'{rows}: holds no row; name a file of planned trajectories')

    @property
    def means(self) -> dict[str, float]:
        """Mean total by version."""
        return {version: total / self.scored for version, total in self.sums.items()}

    def stamp(
        self,
        scorer: RowScorer,
        versions: tuple[Version, ...],
        source: Source,
        options: argparse.Namespace,
    ) -> str:
        """What the scores were made with, as JSON."""
        hashes = b''.join(sorted(scorer.hashes))
        files = {'scenes': options.scenes, 'references': options.references, 'rows': options.rows}
        stamp: dict[str, Any] = {
            'scorer_version': SCORER_VERSION,
            'package_version': spanvla_ros.__version__,
            'versions': list(versions),
            'variants': {
                'human_filter': 'v2' in versions,
                'extended_comfort': 'where a row holds a previous trajectory',
                'traffic': 'log replay, non-reactive',
                'vehicle': 'pacifica',
            },
            'reference': source,
            'references_used': dict(self.references),
            'scene_set': {
                'sha256': hashlib.sha256(hashes).hexdigest(),
                'scenes': len(scorer.hashes),
            },
            'seeds': [],
            'files': {name: path.name for name, path in files.items() if path is not None},
            'rows': {'scored': self.scored, 'refused': self.refused},
            'mean': self.means,
        }
        return json.dumps(stamp, indent=2) + '\n'

    def summary(self, out: Path) -> str:
        """One line for people."""
        names = {'v1': 'PDMS', 'v2': 'EPDMS'}
        means = ''.join(f', mean {names[name]} {mean:.4f}' for name, mean in self.means.items())
        used = ' and '.join(self.references) or 'none'
        made_with = f'scorer {SCORER_VERSION}, reference {used}'
        return f'{self.scored} rows scored, {self.refused} refused{means} ({made_with}): {out}'


def _write(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.writelines(lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
