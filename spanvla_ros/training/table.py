"""`spanvla table`: several models on the same held-out rows, each paired with the first.

Plans are made in batches, on a GPU if asked, and kept in OUT/plans: a plan file that is there is
taken as it is, so that planning and scoring may happen on two machines.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.training import open_loop
from spanvla_ros.training.batch_plans import Entry, Plans, plan_entry
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.intervals import mean_of
from spanvla_ros.training.open_loop import OpenLoop
from spanvla_ros.training.plan_scores import score_differences, score_measures, score_plans
from spanvla_ros.training.settings import DEVICES
from spanvla_ros.types import SpanvlaError

PLANS_DIR, TABLE_FILE, PAGE_FILE = 'plans', 'table.json', 'table.md'
SCORES = ('pdms', 'epdms')
TOKENS = ('thought_tokens', 'action_tokens')
DIGITS = {'ade_m': 2, 'fde_m': 2, 'answered': 3}
ENTRY = re.compile(r'(?P<name>[\w.+-]+)=(?P<path>.+?)(:(?P<steps>\d+)|:(?P<tokens>tokens))?')


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla table`."""
    parser.add_argument(
        'models', nargs='+', metavar='NAME=DIR[:STEPS|:tokens]',
        help='lines of the table, each paired with the first; STEPS are Euler steps, tokens plans '
        'by the action tokens of the answer',
    )  # fmt: skip
    parser.add_argument('--scenes', required=True, type=Path, help='held-out scene set')
    parser.add_argument('--out', required=True, type=Path, help='directory of plans and table')
    parser.add_argument('--rows', type=int, default=0, help='at most so many; 0 takes all')
    parser.add_argument('--device', choices=DEVICES, default='cpu', help='where to plan')
    parser.add_argument('--plans-only', action='store_true', help='plan, score later')
    parser.add_argument('--workers', type=int, default=2, help='processes that score')


def run(options: argparse.Namespace) -> int:
    """Plan, score, write table.json and table.md."""
    import torch

    entries = [parse_entry(text) for text in options.models]
    if len({entry.name for entry in entries}) < len(entries):
        raise SpanvlaError('table: two lines have one name; give each its own')
    shards = ShardSet(options.scenes)
    rows = choose(shards, options.rows)
    folder = options.out / PLANS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        opened(folder / f'{entry.name}.npz', entry, shards, rows, torch.device(options.device))
        for entry in entries
    ]
    if options.plans_only:
        print(f'{folder}: plans of {len(lines)} models for {len(rows)} rows')  # noqa: T201
        return 0
    table = measure(lines, shards, rows, options.scenes, options.workers)
    write_text(options.out / TABLE_FILE, json.dumps(table, indent=1) + '\n')
    page = as_markdown(table)
    write_text(options.out / PAGE_FILE, page)
    print(page, end='')  # noqa: T201
    return 0


def parse_entry(text: str) -> Entry:
    """A line as typed.

    Raises:
        SpanvlaError: it is not NAME=DIR, NAME=DIR:STEPS or NAME=DIR:tokens.
    """
    found = ENTRY.fullmatch(text)
    if not found or found['steps'] == '0':
        raise SpanvlaError(f'table: {text!r}: write NAME=DIR, NAME=DIR:STEPS or NAME=DIR:tokens')
    steps = int(found['steps']) if found['steps'] else None
    return Entry(found['name'], Path(found['path']), steps, bool(found['tokens']))


def choose(shards: ShardSet, limit: int) -> np.ndarray:
    """Rows that are no halves of pairs, evenly spread where there is a limit."""
    alone = np.flatnonzero(shards.pair_ids == '')
    if limit and limit < len(alone):
        alone = alone[np.linspace(0, len(alone) - 1, limit).astype(int)]
    return alone


def opened(path: Path, entry: Entry, shards: ShardSet, rows: np.ndarray, device: Any) -> Plans:
    """The plans in a file, made first where there is none.

    Raises:
        SpanvlaError: the file holds plans for other rows.
    """
    ids = shards.scene_ids[rows].astype(str)
    if not path.exists():
        made = plan_entry(entry, shards, rows, device)
        temporary = path.with_name(f'.{path.stem}.part.npz')
        planned = made.planned.astype(np.float32)
        np.savez_compressed(
            temporary, planned=planned, times_s=made.times_s, ids=ids, tokens=made.tokens,
            sha256=np.array(made.sha256),
        )  # fmt: skip
        temporary.replace(path)
    try:
        return _kept(path, entry.name, ids)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise SpanvlaError(
            f'{path}: no plans ({error}); delete it to have them made anew'
        ) from error


def _kept(path: Path, name: str, ids: np.ndarray) -> Plans:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as kept:
        if list(kept['ids']) != list(ids):
            raise SpanvlaError(
                f'{path}: holds plans for other rows; delete it, or name another --out'
            )
        planned = kept['planned'].astype(np.float64)
        # Plans kept by an earlier version do not say what was said.
        tokens = kept['tokens'] if 'tokens' in kept else np.zeros((len(ids), 2), np.int64)
        return Plans(name, planned, kept['times_s'], str(kept['sha256']), tokens)


def measure(
    lines: Sequence[Plans], shards: ShardSet, rows: np.ndarray, scenes: Path, workers: int
) -> dict[str, Any]:
    """Errors and scores of every line, and its paired differences to the first.

    A row without an answer scores nothing by itself: it is given the plan that stays where it is.
    """
    loops = [_loop(line, shards, rows) for line in lines]
    tables = {}
    if shards.scored[rows].all():
        drawn = {line.name: np.nan_to_num(line.planned) for line in lines}
        hz = round(1.0 / (lines[0].times_s[1] - lines[0].times_s[0]))
        tables = score_plans(scenes, rows, drawn, hz, workers)
    found: dict[str, Any] = {}
    for line, loop in zip(lines, loops, strict=True):
        entry: dict[str, Any] = {'sha256': line.sha256}
        entry |= {name: one.content() for name, one in open_loop.measures(loop).items()}
        for name, said in zip(TOKENS, line.tokens.T, strict=True):
            entry[name] = mean_of(said, loop.drives).content()
        against = open_loop.differences(loops[0], loop)
        if tables:
            mine, first = tables[line.name], tables[lines[0].name]
            entry |= {n: e.content() for n, e in score_measures(mine, loop.drives).items()}
            better = score_differences(mine, first, loop.drives)
            against |= {name: better[name] for name in SCORES}
        entry['minus_first'] = {name: one.content() for name, one in against.items()}
        found[line.name] = entry
    return {
        'rows': len(rows),
        'scenes': str(scenes),
        'interval': '95 % bootstrap over drives',
        'lines': found,
    }


def _loop(line: Plans, shards: ShardSet, rows: np.ndarray) -> OpenLoop:
    reference = shards.futures[rows]
    if line.planned.shape != reference.shape:
        raise SpanvlaError(
            f'table: {line.name} plans {line.planned.shape[1]} waypoints, the scenes have '
            f'{reference.shape[1]}; draw scenes for this model'
        )
    return OpenLoop(
        shards.scene_ids[rows],
        shards.families[rows],
        shards.pair_ids[rows],
        shards.speeds_mps[rows],
        line.times_s,
        reference,
        line.planned,
    )


def as_markdown(table: dict[str, Any]) -> str:
    """The table as it may stand in a page."""
    columns = {'ade_m': 'ADE [m]', 'fde_m': 'FDE [m]', 'pdms': 'PDMS', 'epdms': 'EPDMS'}
    if any(entry['action_tokens']['mean'] for entry in table['lines'].values()):
        columns |= {'answered': 'answered', 'thought_tokens': 'words', 'action_tokens': 'action'}
    paired = {name: f'{columns[name].split()[0]} minus first' for name in ('ade_m', *SCORES)}
    lines = [
        f'| model | {" | ".join([*columns.values(), *paired.values()])} |',
        '|---' * (1 + len(columns) + len(paired)) + '|',
    ]
    for name, entry in table['lines'].items():
        cells = [_cell(entry.get(one), DIGITS.get(one, 1)) for one in columns]
        cells += [_cell(entry['minus_first'].get(one), DIGITS.get(one, 1)) for one in paired]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def _cell(value: dict[str, Any] | None, digits: int) -> str:
    if value is None or value['mean'] is None:
        return ''
    mean, low, high = (f'{value[key]:.{digits}f}' for key in ('mean', 'low', 'high'))
    return f'{mean} [{low}, {high}]'
