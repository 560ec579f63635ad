"""`spanvla navsim`: NAVSIM's logs and metric caches as scenes for `spanvla score` and as rows.

The only place where a pickle is read, and offline: see `training.navsim.pickles`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spanvla_ros.model.config import ModelConfig, load_config
from spanvla_ros.scoring.scene import scene_to_json
from spanvla_ros.training.data.shards import TrainingRow, write_shard
from spanvla_ros.training.navsim.cache import CachedScene, read_cache
from spanvla_ros.training.navsim.logs import HISTORY_FRAMES, LogFrame, read_log, windows
from spanvla_ros.training.navsim.samples import SampleMaker, scene_of
from spanvla_ros.types import SpanvlaError

SCENES, REFERENCES = 'scenes.jsonl.gz', 'references.jsonl.gz'
CACHE_FILE = 'metric_cache.pkl'
ROWS_PER_SHARD = 400


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `spanvla navsim`."""
    parser.add_argument('--logs', type=Path, required=True, help='folder of logs (*.pkl)')
    parser.add_argument('--cache', type=Path, help=f'folder of metric caches ({CACHE_FILE})')
    parser.add_argument('--sensors', type=Path, help='folder of pictures; writes training rows')
    parser.add_argument('--model', type=Path, help='model whose cameras the rows are for')
    parser.add_argument('--out', type=Path, required=True, help='where the results go')
    parser.add_argument('--limit', type=int, default=0, help='at most so many moments; 0: all')


def run(options: argparse.Namespace) -> int:
    """Read, write, print one line."""
    caches = _caches(options.cache)
    maker = None
    if options.sensors is not None:
        config = ModelConfig() if options.model is None else load_config(options.model)
        maker = SampleMaker(config, options.sensors)
    if maker is None and not caches:
        raise SpanvlaError('navsim: with neither --cache nor --sensors there is nothing to write')
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        raise SpanvlaError(f'{options.out}: is not empty; name another folder')
    scenes, rows = _convert(options, caches, maker)
    if not scenes + rows:
        raise SpanvlaError(f'{options.logs}: no moment of its logs has a past, a future, a route '
                           'and a cache')  # fmt: skip
    print(f'{scenes} scenes and {rows} rows in {options.out}')  # noqa: T201
    return 0


def _convert(
    options: argparse.Namespace, caches: dict[str, Path], maker: SampleMaker | None
) -> tuple[int, int]:
    scenes: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    waiting: list[TrainingRow] = []
    shard = rows = 0
    moments = _moments(options.logs, caches if options.cache is not None else None)
    for number, run_ in enumerate(tqdm(moments, unit='moment', desc='navsim')):
        if options.limit and number == options.limit:
            break
        token = run_[HISTORY_FRAMES - 1].token
        cached = read_cache(caches[token]) if token in caches else None
        if cached is not None:
            scenes.append(scene_to_json(scene_of(run_, cached)))
            references.append(reference_to_json(token, cached))
        if maker is not None:
            waiting.append(maker.row(run_, cached))
        if len(waiting) == ROWS_PER_SHARD:
            write_shard(options.out / f'scenes-{shard:05d}.parquet', waiting)
            rows, shard, waiting = rows + len(waiting), shard + 1, []
    if waiting:
        write_shard(options.out / f'scenes-{shard:05d}.parquet', waiting)
    if scenes:
        _write_lines(options.out / SCENES, scenes)
        _write_lines(options.out / REFERENCES, references)
    return len(scenes), rows + len(waiting)


def reference_to_json(token: str, cached: CachedScene) -> dict[str, Any]:
    """What `spanvla score --references` reads of a scene."""
    reference = cached.reference
    return {
        'scene': token,
        'centerline': reference.centerline.tolist(),
        'route_lane_ids': list(reference.route_lane_ids),
        'reference_trajectory': reference.plan.tolist(),
    }


def _moments(logs: Path, caches: dict[str, Path] | None) -> Iterator[Sequence[LogFrame]]:
    """All moments of all logs, with `caches` only those that have one."""
    files = sorted(logs.rglob('*.pkl')) if logs.is_dir() else [logs]
    if not files:
        raise SpanvlaError(f'{logs}: holds no log (*.pkl)')
    for file in files:
        for found in windows(read_log(file)):
            if caches is None or found[HISTORY_FRAMES - 1].token in caches:
                yield found


def _caches(folder: Path | None) -> dict[str, Path]:
    """Metric caches by token."""
    if folder is None:
        return {}
    found = {path.parent.name: path for path in sorted(folder.rglob(CACHE_FILE))}
    if not found:
        raise SpanvlaError(f'{folder}: holds no {CACHE_FILE}; make them with NAVSIM')
    return found


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    with gzip.open(temporary, 'wt', encoding='utf-8') as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + '\n')
    os.replace(temporary, path)
