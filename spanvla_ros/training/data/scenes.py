"""`spanvla scenes`: draws labelled moments of the town into parquet shards.

A shard is a function of (seed, its number, the settings) alone, so shards are drawn in parallel
and a broken-off run goes on where it stopped. Seeds from 1,000,000 on are held out; a training set
never reaches them. With `--driver` the moments are cut from that model's own drives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from spanvla_ros.geometry import interpolate_poses
from spanvla_ros.model.checkpoint import load_model_dir
from spanvla_ros.model.config import ModelConfig, load_config
from spanvla_ros.town.rollouts import rollout_snapshots
from spanvla_ros.town.scenarios import (
    FAMILIES,
    HAZARDS,
    HELD_OUT_SEED,
    MIX,
    Ranges,
    load_ranges,
    make_world,
    ranges_sha256,
)
from spanvla_ros.town.snapshots import (
    NEW_PAIR_KINDS,
    PAIR_KINDS,
    Snapshot,
    hazard_pairs,
    mirrored,
    sample_snapshots,
)
from spanvla_ros.training.contestants import Contestant, open_planner
from spanvla_ros.training.data.mistakes import mistakes_at
from spanvla_ros.training.data.rows import RowMaker, lags_s, observe
from spanvla_ros.training.data.shards import FACTS, MANIFEST, TrainingRow, write_shard
from spanvla_ros.training.open_loop import plan_alone
from spanvla_ros.types import SpanvlaError, read_json

# Hazards are rarer than free road; a model that meets them too seldom learns to ignore them.
SHARES = {
    'lane_keeping': 0.12,
    'lead_vehicle': 0.25,
    'pedestrian': 0.31,
    'red_light': 0.20,
    'turns': 0.12,
    MIX: 0.2,
    'cut_in': 0.15,
    'stop_sign': 0.15,
    'construction': 0.15,
    'lane_change': 0.15,
    'lane_bias': 0.12,
    'unprotected_left': 0.15,
    'roundabout': 0.15,
}
# Of the drives for training; held-out drives all keep right, and stay in their lanes. No junction
# is mirrored: coming out of a turn nothing but the side of the traffic tells which lane is ours.
MIRRORED_SHARE = {
    'lane_keeping': 0.5,
    'lead_vehicle': 0.5,
    'pedestrian': 0.5,
    'cut_in': 0.5,
    'construction': 0.5,
    'lane_change': 0.5,
    'lane_bias': 0.5,
}
WIDE_SHARE = 0.1
# A model fails in turns and bends rather than in front of hazards.
ROLLOUT_SHARES = {
    'lane_keeping': 0.2,
    'lead_vehicle': 0.2,
    'pedestrian': 0.12,
    'red_light': 0.14,
    'turns': 0.26,
    MIX: 0.08,
    'cut_in': 0.15,
    'stop_sign': 0.15,
    'construction': 0.2,
    'lane_change': 0.2,
    'lane_bias': 0.15,
    'unprotected_left': 0.25,
    'roundabout': 0.25,
}
ROWS_PER_SHARD = 400
MOMENTS_PER_DRIVE = 8
MOMENTS_PER_ROLLOUT = 24
MIX_IS_LONGER = 6
SEEDS_PER_SHARD = 1_000
PAIR_SEED_OFFSET = 500_000
PAIRS_PER_SHARD = 50
# Apart from the first kinds, whose seeds must not move when a kind is added.
NEW_PAIR_SEED_OFFSET = 600_000
NEW_PAIR_STRIDE = 8
MISTAKE = 'mistake'
MISTAKE_SEED_OFFSET = 700_000
MISTAKES_PER_DRIVE = 2
REQUEST = 'request.json'
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SceneRequest:
    """All that decides what is drawn."""

    count: int
    seed: int
    pairs: int
    families: tuple[str, ...]
    ranges: Ranges
    config: ModelConfig
    driver: Path | None = None
    scored: bool = False
    mistakes: int = 0

    @property
    def held_out(self) -> bool:
        """Whether the scenes are for evaluation only."""
        return self.seed >= HELD_OUT_SEED


@dataclass(frozen=True)
class ShardJob:
    """One shard: `kind` is empty for moments, else that of hazard pairs, or `MISTAKE`."""

    request: SceneRequest
    path: Path
    number: int
    rows: int
    kind: str = ''


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `spanvla scenes`."""
    parser.add_argument('--count', type=int, required=True, help='rows to draw')
    parser.add_argument(
        '--seed', type=int, required=True, help=f'first seed; from {HELD_OUT_SEED} on held out'
    )
    parser.add_argument('--out', type=Path, required=True, help='directory of the shards')
    parser.add_argument(
        '--pairs',
        type=int,
        default=0,
        help='also this many pairs with and without each hazard: lead, light, pedestrian, '
        'and those of the other families drawn',
    )
    parser.add_argument(
        '--mistakes',
        type=int,
        default=0,
        help='also this many pairs of a mistake (negative) and the way back (recovery)',
    )
    parser.add_argument(
        '--families', nargs='+', default=list(FAMILIES), choices=(*FAMILIES, MIX), metavar='NAME'
    )
    parser.add_argument('--ranges', type=Path, help='YAML of scenario ranges')
    parser.add_argument(
        '--model', type=Path, help='model directory, or its settings (YAML); its cameras are used'
    )
    parser.add_argument(
        '--driver', type=Path, help='model directory; moments come from its own drives'
    )
    parser.add_argument(
        '--scored',
        action='store_true',
        help='write scoring rows, which PDMS and GRPO need; held-out sets always have them',
    )
    parser.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1))


def run(options: argparse.Namespace) -> int:
    """Draw what is missing, then write the manifest."""
    request = SceneRequest(
        count=options.count,
        seed=options.seed,
        pairs=options.pairs,
        families=tuple(sorted(set(options.families), key=(*FAMILIES, MIX).index)),
        ranges=load_ranges(options.ranges),
        config=ModelConfig() if options.model is None else load_config(options.model),
        driver=options.driver,
        scored=options.scored or options.seed >= HELD_OUT_SEED,
        mistakes=options.mistakes,
    )
    draw_scenes(request, options.out, workers=options.workers)
    return 0


def draw_scenes(request: SceneRequest, out: Path, workers: int = 1) -> None:
    """Draw all shards of a request that `out` lacks, and the manifest.

    Raises:
        SpanvlaError: the request cannot be met, or `out` holds the scenes of another one.
    """
    _check(request)
    out.mkdir(parents=True, exist_ok=True)
    _claim(request, out)
    jobs = plan_shards(request, out)
    waiting = [job for job in jobs if not job.path.exists()]
    total = sum(job.rows for job in jobs)
    done = total - sum(job.rows for job in waiting)
    with tqdm(total=total, initial=done, unit='row', desc='scenes') as bar:
        for rows in _drawn(waiting, workers):
            bar.update(rows)
    _write_json(out / MANIFEST, _manifest(request, jobs))


def plan_shards(request: SceneRequest, out: Path) -> list[ShardJob]:
    """The shards of a request, moments first, then pairs."""
    jobs = [
        ShardJob(
            request,
            out / f'scenes-{number:05d}.parquet',
            number,
            min(ROWS_PER_SHARD, request.count - number * ROWS_PER_SHARD),
        )
        for number in range(-(-request.count // ROWS_PER_SHARD))
    ]
    for kind in pair_kinds(request):
        for number in range(-(-request.pairs // PAIRS_PER_SHARD)):
            pairs = min(PAIRS_PER_SHARD, request.pairs - number * PAIRS_PER_SHARD)
            path = out / f'scenes-pairs-{kind}-{number:03d}.parquet'
            jobs.append(ShardJob(request, path, number, 2 * pairs, kind))
    for number in range(-(-request.mistakes // PAIRS_PER_SHARD)):
        pairs = min(PAIRS_PER_SHARD, request.mistakes - number * PAIRS_PER_SHARD)
        path = out / f'scenes-mistakes-{number:03d}.parquet'
        jobs.append(ShardJob(request, path, number, 2 * pairs, MISTAKE))
    return jobs


def pair_kinds(request: SceneRequest) -> tuple[str, ...]:
    """The first kinds always, the others where their family is drawn."""
    drawn = {HAZARDS[family] for family in request.families if family in HAZARDS}
    return (*PAIR_KINDS, *(kind for kind in NEW_PAIR_KINDS if kind in drawn))


def _pair_seed(seed: int, kind: str, number: int) -> int:
    if kind in PAIR_KINDS:
        block = number * len(PAIR_KINDS) + PAIR_KINDS.index(kind)
        return seed + PAIR_SEED_OFFSET + block * SEEDS_PER_SHARD
    block = number * NEW_PAIR_STRIDE + NEW_PAIR_KINDS.index(kind)
    return seed + NEW_PAIR_SEED_OFFSET + block * SEEDS_PER_SHARD


def draw_shard(job: ShardJob) -> int:
    """Draw and write one shard; returns its number of rows."""
    if job.kind == MISTAKE:
        rows = list(_mistake_rows(job))
    else:
        rows = list(_pair_rows(job) if job.kind else _moment_rows(job))
    write_shard(job.path, rows)
    return len(rows)


def _moment_rows(job: ShardJob) -> Iterator[TrainingRow]:
    request = job.request
    maker = RowMaker(request.config, scored=request.scored)
    rng = np.random.default_rng([request.seed, job.number, 3])
    families = request.families
    shares = np.array([(ROLLOUT_SHARES if request.driver else SHARES)[f] for f in families])
    drawn = 0
    first = request.seed + job.number * SEEDS_PER_SHARD
    for seed in range(first, first + SEEDS_PER_SHARD):
        family = families[int(rng.choice(len(families), p=shares / shares.sum()))]
        flip = rng.random() < (0.0 if request.held_out else MIRRORED_SHARE.get(family, 0.0))
        for index, snapshot in enumerate(_moments(request, family, seed)):
            name = f'{family}/{seed}/{index}' + ('/mirrored' if flip else '')
            yield maker.row(mirrored(snapshot) if flip else snapshot, name, rng)
            drawn += 1
            if drawn == job.rows:
                return
    raise SpanvlaError(f'{job.path}: {SEEDS_PER_SHARD} drives gave {drawn} of {job.rows} rows')


def _moments(request: SceneRequest, family: str, seed: int) -> list[Snapshot]:
    longer = MIX_IS_LONGER if family == MIX else 1
    if request.driver is None:
        earlier = request.config.frames_per_camera > 1
        wide_share = 0.0 if request.held_out else WIDE_SHARE
        count = MOMENTS_PER_DRIVE * longer
        return sample_snapshots(family, seed, count, request.ranges, wide_share, earlier=earlier)
    planner = open_planner(Contestant(request.driver, schedule='off'))
    # Every drive starts at the same stamp: what was seen in the last one must be forgotten.
    planner.reset()
    return rollout_snapshots(
        make_world(family, seed, request.ranges),
        planner,
        request.config,
        np.random.default_rng([seed, 17]),
        MOMENTS_PER_ROLLOUT * longer,
    )


def _pair_rows(job: ShardJob) -> Iterator[TrainingRow]:
    request = job.request
    maker = RowMaker(request.config, scored=request.scored)
    rng = np.random.default_rng([request.seed, job.number, 5])
    seed = _pair_seed(request.seed, job.kind, job.number)
    earlier = request.config.frames_per_camera > 1
    pairs = hazard_pairs(job.kind, job.rows // 2, seed, request.ranges, earlier=earlier)
    for index, pair in enumerate(pairs):
        pair_id = f'{job.kind}/{seed}/{index}'
        for snapshot, ending in ((pair.present, 'present'), (pair.absent, 'absent')):
            row = maker.row(snapshot, f'{pair_id}/{ending}', rng, pair_id)
            # A text in the prompt would tell the hazard that only the pictures may tell.
            seen = replace(row.sample.observation, reasoning='', reasoning_stamp_ns=None)
            yield replace(row, sample=replace(row.sample, observation=seen))


def _mistake_rows(job: ShardJob) -> Iterator[TrainingRow]:
    """Pairs of a negative and its recovery, at most one a moment and two a drive."""
    request = job.request
    maker = RowMaker(request.config, scored=True)
    rng = np.random.default_rng([request.seed, job.number, 13])
    first = request.seed + MISTAKE_SEED_OFFSET + job.number * SEEDS_PER_SHARD
    drawn = 0
    for seed in range(first, first + SEEDS_PER_SHARD):
        family = request.families[int(rng.integers(len(request.families)))]
        kept = 0
        for index, snapshot in enumerate(_moments(request, family, seed)):
            own = own_plan(request.driver, maker, snapshot) if request.driver else None
            mistake = next(mistakes_at(snapshot, rng, own), None)
            if mistake is None or kept == MISTAKES_PER_DRIVE:
                continue
            kept += 1
            yield from maker.mistake(mistake, f'{family}/{seed}/{index}', rng)
            drawn += 2
            if drawn == job.rows:
                return
    raise SpanvlaError(f'{job.path}: {SEEDS_PER_SHARD} drives gave {drawn} of {job.rows} rows')


def own_plan(driver: Path, maker: RowMaker, snapshot: Snapshot) -> np.ndarray:
    """What a model would do at a moment, each 0.1 s in `base_link`."""
    planner = open_planner(Contestant(driver, schedule='off'))
    seen = observe(maker.config, snapshot, maker.draw(snapshot)[0])
    poses = plan_alone(planner, maker.config, seen)
    times_s = np.append(0.0, maker.config.times_s)
    return interpolate_poses(
        times_s, np.concatenate([np.zeros((1, 3)), poses]), snapshot.plan.times_s
    )


def _drawn(jobs: Sequence[ShardJob], workers: int) -> Iterator[int]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(draw_shard, jobs)
        return
    # A fresh interpreter each: a fork would copy whatever threads the caller runs.
    context = multiprocessing.get_context('spawn')
    with context.Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(draw_shard, jobs)


def _check(request: SceneRequest) -> None:
    if request.count < 1 or request.pairs < 0 or request.mistakes < 0:
        raise SpanvlaError(
            f'scenes: --count {request.count} --pairs {request.pairs} --mistakes '
            f'{request.mistakes} leaves nothing to draw; ask for at least one row'
        )
    if request.seed < 0:
        raise SpanvlaError(f'scenes: --seed {request.seed} is negative; use 0 or above')
    shards = -(-request.count // ROWS_PER_SHARD)
    rounds = -(-request.pairs // PAIRS_PER_SHARD)
    first_end = PAIR_SEED_OFFSET + rounds * len(PAIR_KINDS) * SEEDS_PER_SHARD
    pairs_end = first_end
    if len(pair_kinds(request)) > len(PAIR_KINDS):
        pairs_end = NEW_PAIR_SEED_OFFSET + rounds * NEW_PAIR_STRIDE * SEEDS_PER_SHARD
        if first_end > NEW_PAIR_SEED_OFFSET:
            raise SpanvlaError(f'scenes: --pairs {request.pairs} would draw seeds twice; ask less')
    mistake_shards = -(-request.mistakes // PAIRS_PER_SHARD)
    last = request.seed + max(
        shards * SEEDS_PER_SHARD,
        pairs_end if request.pairs else 0,
        (MISTAKE_SEED_OFFSET + mistake_shards * SEEDS_PER_SHARD) if request.mistakes else 0,
    )
    if request.mistakes and pairs_end > MISTAKE_SEED_OFFSET:
        raise SpanvlaError(f'scenes: --pairs {request.pairs} would share seeds with the mistakes')
    if not request.held_out and last > HELD_OUT_SEED:
        raise SpanvlaError(
            f'scenes: --seed {request.seed} with --count {request.count} would reach the held-out '
            f'seeds from {HELD_OUT_SEED} on; start at 0 or draw fewer'
        )
    if shards * SEEDS_PER_SHARD > PAIR_SEED_OFFSET and (request.pairs or request.mistakes):
        raise SpanvlaError(
            f'scenes: --count {request.count} would share seeds with the pairs; draw at most '
            f'{PAIR_SEED_OFFSET // SEEDS_PER_SHARD * ROWS_PER_SHARD} rows'
        )
    if len(lags_s(request.config)) > 1 and (request.driver or request.mistakes):
        raise SpanvlaError(
            'scenes: moments of a --driver and --mistakes have one picture a camera; use a model '
            'with frames_per_camera 1'
        )


def _describe(request: SceneRequest) -> dict[str, Any]:
    config = request.config
    frames = {'frames_per_camera': config.frames_per_camera, 'frame_lag_s': config.frame_lag_s}
    return {
        **({'scored': True} if request.scored else {}),
        **({'mistakes': request.mistakes} if request.mistakes else {}),
        **(frames if config.frames_per_camera > 1 else {}),
        'schema_version': _SCHEMA_VERSION,
        'count': request.count,
        'seed': request.seed,
        'pairs_per_kind': request.pairs,
        'held_out': request.held_out,
        'families': list(request.families),
        'driver_sha256': request.driver and load_model_dir(request.driver).sha256,
        'ranges_sha256': ranges_sha256(request.ranges),
        'ranges': asdict(request.ranges),
        'cameras': [asdict(camera) for camera in config.cameras],
        'history_s': config.history_s,
        'horizon_s': config.horizon_s,
        'waypoints': config.waypoints,
        'route_points': config.route_points,
        'route_step_m': config.route_step_m,
    }


def _claim(request: SceneRequest, out: Path) -> None:
    """Write down what is being drawn here; another request's directory is refused."""
    wanted = json.loads(json.dumps(_describe(request)))
    path = out / REQUEST
    if path.exists():
        found = read_json(path, 'draw into an empty directory')
        odd = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
        if odd:
            raise SpanvlaError(
                f'{out}: holds scenes of another request (differs in {", ".join(odd)}); '
                'give an empty directory'
            )
    elif any(out.glob('scenes-*.parquet')):
        raise SpanvlaError(f'{out}: holds shards of unknown origin; give an empty directory')
    else:
        _write_json(path, wanted)


def _manifest(request: SceneRequest, jobs: Sequence[ShardJob]) -> dict[str, Any]:
    families: Counter[str] = Counter()
    thinking: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    paired = 0
    facts = []
    shards = []
    for job in jobs:
        table = _columns(job.path, ('family', 'thinking', 'label', 'pair_id', 'facts'))
        labels.update(table.column('label').to_pylist())
        families.update(table.column('family').to_pylist())
        thinking.update(table.column('thinking').to_pylist())
        paired += sum(bool(name) for name in table.column('pair_id').to_pylist())
        facts.append(table.column('facts').combine_chunks().flatten().to_numpy())
        digest = hashlib.sha256(job.path.read_bytes()).hexdigest()
        shards.append({'file': job.path.name, 'rows': table.num_rows, 'sha256': digest})
    values = np.concatenate(facts).reshape(-1, len(FACTS))
    shown = ('lead', 'lead_braking', 'red', 'green', 'pedestrian_on_road')
    return {
        **_describe(request),
        'rows': len(values),
        'rows_in_pairs': paired,
        'family_rows': dict(sorted(families.items())),
        'thinking_rows': dict(sorted(thinking.items())),
        'label_rows': dict(sorted(labels.items())),
        'share': {name: round(float(values[:, FACTS.index(name)].mean()), 4) for name in shown},
        'shards': shards,
    }


def _columns(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(names)).select(names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise SpanvlaError(
            f'{path}: not a shard of this project ({str(error).splitlines()[0]:.80}); remove it '
            'and run again'
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(temporary, path)
