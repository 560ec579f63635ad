"""`spanvla evaluate`: a model on held-out scenes, in open and in closed loop.

Every number stands with its 95 % interval and with what made it: scene set, seeds, ranges, model,
schedule, steps. Nothing here needs torch unless its backend is asked for. Finished drives are kept
in `episodes.jsonl`: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spanvla_ros import __version__
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.town.driver import BlindRouteFollower, ConstantVelocity
from spanvla_ros.town.scenarios import FAMILIES, HELD_OUT_SEED, MIX, ranges_sha256
from spanvla_ros.training import closed_loop, open_loop, words
from spanvla_ros.training.bridge_check import swapped_layers
from spanvla_ros.training.closed_loop import MODEL, REFERENCES, TWIN, Episode, EpisodeBook
from spanvla_ros.training.contestants import (
    Contestant,
    DriveJob,
    PlanJob,
    do_drive,
    do_plans,
    in_parallel,
    open_planner,
)
from spanvla_ros.training.data.scoring_rows import unpack_scene
from spanvla_ros.training.data.shards import Origin, ShardSet, TrainingRow, read_origin
from spanvla_ros.training.evaluation_page import write_evaluation_page
from spanvla_ros.training.intervals import NOTHING, Estimate
from spanvla_ros.training.open_loop import OpenLoop
from spanvla_ros.training.plan_scores import (
    SCORED_WITH,
    Table,
    score_differences,
    score_measures,
    score_plans,
)
from spanvla_ros.training.worst_clips import Clip
from spanvla_ros.types import SpanvlaError

REFERENCE = 'reference_driver'
WORST_CLIPS = 12
CHUNK = 20
MIRRORED_ROWS = 200
SWAPPED_ROWS = 60
SPOKEN_ROWS = 200
EPISODES_FILE = 'episodes.jsonl'
SCHEMA_VERSION = 1

Content = dict[str, Any]
Measures = Mapping[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """What is asked for."""

    model: Contestant
    twin: Contestant | None
    scenes: Path
    out: Path
    families: tuple[str, ...]
    rows: int
    closed_loop: bool
    drivers: tuple[str, ...]
    episodes: int
    plan_period_s: float
    latency_s: float
    workers: int


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `spanvla evaluate`."""
    parser.add_argument('--model', type=Path, required=True, help='model directory')
    parser.add_argument('--scenes', type=Path, required=True, help='held-out scenes')
    parser.add_argument('--out', type=Path, required=True, help='where the results go')
    parser.add_argument(
        '--compare', type=Path, help='a second model, such as the twin trained without pictures'
    )
    parser.add_argument(
        '--compare-backend',
        help='backend of the second model; without --compare the same model runs on both',
    )
    parser.add_argument('--closed-loop', action='store_true', help='also drive whole episodes')
    parser.add_argument(
        '--drivers',
        nargs='+',
        default=[MODEL, TWIN, *REFERENCES],
        choices=(MODEL, TWIN, *REFERENCES),
        metavar='NAME',
        help=f'who drives: {MODEL}, {TWIN} (with --compare), {", ".join(REFERENCES)}',
    )
    parser.add_argument('--episodes', type=int, default=100, help='drives a family and driver')
    parser.add_argument(
        '--families',
        nargs='+',
        default=[],
        choices=(*FAMILIES, MIX),
        metavar='NAME',
        help='those of the scenes by default, but for mix',
    )
    parser.add_argument('--rows', type=int, default=0, help='at most this many rows; 0 takes all')
    parser.add_argument('--backend', default='auto')
    parser.add_argument('--schedule', choices=('sequential', 'concurrent', 'off'))
    parser.add_argument('--steps', type=int, help='Euler steps')
    parser.add_argument('--plan-period', type=float, default=0.1, help='seconds between plans')
    parser.add_argument('--latency', type=float, default=0.1, help='seconds from picture to plan')
    parser.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1))


def run(options: argparse.Namespace) -> int:
    """Evaluate, write `summary.json` and `index.html`, print one line."""
    evaluation = Evaluation(
        model=_contestant(options.model, options),
        twin=_twin(options),
        scenes=options.scenes,
        out=options.out,
        families=tuple(options.families),
        rows=options.rows,
        closed_loop=options.closed_loop,
        drivers=tuple(options.drivers),
        episodes=options.episodes,
        plan_period_s=options.plan_period,
        latency_s=options.latency,
        workers=options.workers,
    )
    summary = evaluate(evaluation)
    print(headline(summary))  # noqa: T201
    return 0


def evaluate(wanted: Evaluation) -> Content:
    """All that is asked for; writes into `wanted.out` and returns the summary."""
    if wanted.closed_loop and wanted.episodes < 1:
        raise SpanvlaError(
            f'evaluate: --episodes {wanted.episodes} drives nothing; give 1 or more'
        )
    wanted.out.mkdir(parents=True, exist_ok=True)
    config = open_planner(wanted.model).config
    shards, origin = ShardSet(wanted.scenes), read_origin(wanted.scenes)
    _check_scenes(shards, config, wanted.scenes)
    if not wanted.families:
        present = tuple(f for f in FAMILIES if f in set(shards.families))
        wanted = replace(wanted, families=present)
    chosen = choose_rows(shards, wanted.families, wanted.rows)
    loops = {MODEL: _planned(wanted, wanted.model, shards, chosen)}
    if wanted.twin is not None:
        loops[TWIN] = _planned(wanted, wanted.twin, shards, chosen)
    alone, frames = ~_paired(loops[MODEL]), config.frames_per_camera
    every = {name: loop.chosen(alone) for name, loop in loops.items()}
    every |= _simple_drivers(shards, chosen[alone], config)
    tables = _scored(wanted, shards, chosen[alone], every)
    summary: Content = {
        'schema_version': SCHEMA_VERSION,
        'open_loop': {name: _families(loop, tables.get(name)) for name, loop in every.items()},
        **_score_differences(tables, every[MODEL].drives),
        'hazard_pairs': {name: _nested(open_loop.pair_measures(x)) for name, x in loops.items()},
        'mirror': _mirror(wanted, shards, loops[MODEL]),
        'bridge': _nested(
            swapped_layers(
                wanted.model, shards.rows(_spread(shards, chosen, SWAPPED_ROWS), frames)
            )
        ),
        'words': _words(wanted, shards.rows(_spread(shards, chosen, SPOKEN_ROWS), frames)),
    }
    if wanted.twin is not None:
        summary['open_loop_twin_minus_model'] = _flat(
            open_loop.differences(every[MODEL], every[TWIN])
        )
    summary.update(_closed_loop(wanted, config))
    summary['stamp'] = stamp(wanted, shards, origin, chosen)
    if tables:
        summary['stamp']['scored_with'] = SCORED_WITH
    summary = {**_top(summary), **summary}
    worst = _worst(shards, chosen[alone], every[MODEL], tables[MODEL]) if tables else []
    _write_json(wanted.out / 'summary.json', summary)
    write_evaluation_page(wanted.out / 'index.html', summary, headline(summary), worst)
    return summary


def choose_rows(shards: ShardSet, families: Sequence[str], limit: int) -> np.ndarray:
    """Rows of the families; with a limit evenly spread ones, pairs kept whole."""
    wanted = np.isin(shards.families.astype(str), list(families))
    indices = np.flatnonzero(wanted)
    if not len(indices):
        raise SpanvlaError(
            f'{shards.path}: holds no scene of {", ".join(families)}; name other --families'
        )
    if not limit or limit >= len(indices):
        return indices
    paired = np.array([bool(name) for name in shards.pair_ids[indices]])
    names = sorted(set(shards.pair_ids[indices][paired]))
    share = limit / len(indices)
    few = {names[int(i)] for i in np.linspace(0, len(names) - 1, round(share * len(names)))}
    alone = indices[~paired]
    alone = alone[np.linspace(0, len(alone) - 1, round(share * len(alone))).astype(int)]
    together = [i for i in indices[paired] if shards.pair_ids[i] in few]
    return np.sort(np.concatenate([alone, np.array(together, dtype=np.int64)]))


def stamp(wanted: Evaluation, shards: ShardSet, origin: Origin, chosen: np.ndarray) -> Content:
    """What made the numbers."""
    planner = open_planner(wanted.model)
    return {
        'version': __version__,
        'model': wanted.model.path.name,
        'model_sha256': planner.model_sha256,
        'twin_sha256': None if wanted.twin is None else open_planner(wanted.twin).model_sha256,
        'backend': planner.backend.name,
        'twin_backend': None if wanted.twin is None else open_planner(wanted.twin).backend.name,
        'schedule': planner.schedule,
        'steps': planner.steps,
        'samples': 'single',
        'scenes_sha256': origin.manifest_sha256,
        'scenes_seed': origin.seed,
        'scenes_ranges_sha256': origin.ranges_sha256,
        'rows': len(chosen),
        'rows_in_set': len(shards),
        'families': list(wanted.families),
        'ranges_sha256': ranges_sha256(),
        'code_sha256': closed_loop.code_sha256(),
        'episodes': wanted.episodes if wanted.closed_loop else 0,
        'episode_seeds': [HELD_OUT_SEED, HELD_OUT_SEED + wanted.episodes]
        if wanted.closed_loop
        else None,
        'plan_period_s': wanted.plan_period_s,
        'latency_s': wanted.latency_s,
        'interval': '95 % bootstrap over drives',
    }


def headline(summary: Content) -> str:
    """One line of the numbers that matter most."""
    parts = [
        f'{name.upper()} {_span(summary[name])}'
        for name in ('pdms', 'epdms')
        if summary[name]['mean'] is not None
    ]
    parts += [f'ADE {_span(summary["ade_m"])} m', f'FDE {_span(summary["fde_m"])} m']
    for kind, found in summary['hazard_pairs'].get(MODEL, {}).items():
        parts.append(f'{kind} pairs {_span(found["right_way"])}')
    if summary['success_rate']['mean'] is not None:
        parts.append(f'success {_span(summary["success_rate"])}')
        parts.append(f'collisions/km {_span(summary["collisions_per_km"])}')
    return ' | '.join(parts)


def _contestant(path: Path, options: argparse.Namespace) -> Contestant:
    return Contestant(path, options.backend, options.schedule, options.steps)


def _twin(options: argparse.Namespace) -> Contestant | None:
    if options.compare is None and options.compare_backend is None:
        return None
    twin = _contestant(options.compare or options.model, options)
    return replace(twin, backend=options.compare_backend or options.backend)


def _check_scenes(shards: ShardSet, config: ModelConfig, path: Path) -> None:
    shards.check_cameras(config.camera_names)
    if shards.futures.shape[1] != config.waypoints:
        raise SpanvlaError(
            f'{path}: futures have {shards.futures.shape[1]} waypoints, the model '
            f'{config.waypoints}; draw scenes with --model'
        )


def _planned(
    wanted: Evaluation, contestant: Contestant, shards: ShardSet, chosen: np.ndarray
) -> OpenLoop:
    return open_loop.collect(
        shards,
        chosen,
        open_planner(wanted.model).config,
        _plans(wanted, contestant, chosen, mirrored=False),
    )


def _plans(
    wanted: Evaluation, contestant: Contestant, chosen: np.ndarray, *, mirrored: bool
) -> np.ndarray:
    pieces = [tuple(chosen[i : i + CHUNK].tolist()) for i in range(0, len(chosen), CHUNK)]
    jobs = [PlanJob(contestant, wanted.scenes, piece, mirrored) for piece in pieces]
    name = f'{contestant.path.name}{" mirrored" if mirrored else ""}'
    found = []
    with tqdm(total=len(chosen), unit='plan', desc=name) as bar:
        for plans in in_parallel(do_plans, jobs, wanted.workers):
            found.append(plans)
            bar.update(len(plans))
    return np.concatenate(found)


def _simple_drivers(
    shards: ShardSet, chosen: np.ndarray, config: ModelConfig
) -> dict[str, OpenLoop]:
    """Drivers without a model: those that see nothing, and the reference as the ceiling."""
    rows = shards.rows(chosen)
    planned = {
        'constant_velocity': open_loop.plan_rows(ConstantVelocity(), config, rows),
        'blind_route_follower': open_loop.plan_rows(BlindRouteFollower(), config, rows),
        REFERENCE: shards.futures[chosen],
    }
    return {
        name: open_loop.collect(shards, chosen, config, plans) for name, plans in planned.items()
    }


def _families(loop: OpenLoop, table: Table | None) -> Content:
    """Errors and scores of a driver over all rows and by family."""
    found: Content = {}
    for family in ('all', *sorted(set(loop.families))):
        keep = np.ones(len(loop.families), bool) if family == 'all' else loop.families == family
        some = loop.chosen(keep)
        found[family] = _flat(open_loop.measures(some))
        if table is not None:
            part = {name: values[keep] for name, values in table.items()}
            found[family] |= _flat(score_measures(part, some.drives))
    return found


def _scored(
    wanted: Evaluation, shards: ShardSet, rows: np.ndarray, loops: Mapping[str, OpenLoop]
) -> dict[str, Table]:
    """Scores of every driver, or nothing where a row lacks its scoring row."""
    if not len(rows) or not shards.scored[rows].all():
        return {}
    times_s = loops[MODEL].times_s
    plans = {name: loop.planned for name, loop in loops.items()}
    hz = round(1.0 / (times_s[1] - times_s[0]))
    return score_plans(wanted.scenes, rows, plans, hz, wanted.workers)


def _score_differences(tables: Mapping[str, Table], drives: Sequence[str]) -> Content:
    others = [name for name in tables if name != MODEL]
    if not others:
        return {}
    return {
        'scores_model_minus': {
            name: _flat(score_differences(tables[MODEL], tables[name], drives)) for name in others
        }
    }


def _worst(shards: ShardSet, rows: np.ndarray, loop: OpenLoop, table: Table) -> list[Clip]:
    """The clips of lowest EPDMS, the farthest from the reference first among equals."""
    away = open_loop.displacement_m(loop).mean(axis=1)
    order = np.lexsort((-away, table['epdms']))[:WORST_CLIPS]
    clips = []
    for at, row in zip(order.tolist(), shards.rows(rows[order]), strict=True):
        scores = {name: float(values[at]) for name, values in table.items()}
        scene = unpack_scene(row.scoring)
        clips.append(Clip(row.sample, scene, loop.planned[at], loop.reference[at], scores))
    return clips


def _mirror(wanted: Evaluation, shards: ShardSet, loop: OpenLoop) -> Content:
    """Lane keeping straight and mirrored, or nothing where the set has none."""
    keep = np.flatnonzero((loop.families == 'lane_keeping') & ~_paired(loop))[:MIRRORED_ROWS]
    if not len(keep):
        return {}
    names = set(loop.scene_ids[keep])
    indices = np.flatnonzero([name in names for name in shards.scene_ids])
    reflected = _plans(wanted, wanted.model, indices, mirrored=True)
    straight = loop.chosen(keep)
    return _flat(open_loop.mirror_share(straight.planned, reflected, straight.drives))


def _paired(loop: OpenLoop) -> np.ndarray:
    return np.array([bool(name) for name in loop.pair_ids])


def _words(wanted: Evaluation, rows: Sequence[TrainingRow]) -> Content:
    """Words against deeds, for a model that thinks beside its plans."""
    planner = open_planner(wanted.model)
    return _flat(words.measures(planner, rows)) if planner.schedule == 'concurrent' else {}


def _spread(shards: ShardSet, chosen: np.ndarray, wanted: int) -> np.ndarray:
    alone = chosen[[not shards.pair_ids[i] for i in chosen]]
    count = min(wanted, len(alone))
    return alone[np.linspace(0, len(alone) - 1, count).astype(int)]


def _closed_loop(wanted: Evaluation, config: ModelConfig) -> Content:
    if not wanted.closed_loop:
        return {}
    book = EpisodeBook(wanted.out / EPISODES_FILE)
    episodes: dict[str, list[Episode]] = {}
    for driver, contestant in _drivers(wanted):
        maker = _maker(wanted, contestant)
        jobs = [
            DriveJob(
                driver, family, seed, config, contestant, wanted.plan_period_s, wanted.latency_s
            )
            for family in wanted.families
            for seed in closed_loop.held_out_seeds(wanted.episodes)
        ]
        done = book.finished(driver, maker)
        waiting = [job for job in jobs if (job.family, job.seed) not in done]
        with tqdm(
            total=len(jobs), initial=len(jobs) - len(waiting), unit='drive', desc=driver
        ) as bar:
            for episode in in_parallel(do_drive, waiting, wanted.workers):
                book.add(episode, maker)
                done[episode.family, episode.seed] = episode
                bar.update()
        episodes[driver] = [done[job.family, job.seed] for job in jobs]
    found: Content = {
        'closed_loop': {
            name: {
                family: _flat(closed_loop.rates(some))
                for family, some in closed_loop.by_family(every).items()
            }
            for name, every in episodes.items()
        },
    }
    if {MODEL, TWIN} <= set(episodes):
        found['closed_loop_twin_minus_model'] = _flat(
            closed_loop.paired(episodes[MODEL], episodes[TWIN])
        )
    return found


def _drivers(wanted: Evaluation) -> list[tuple[str, Contestant | None]]:
    chosen: list[tuple[str, Contestant | None]] = []
    for name in wanted.drivers:
        if name == MODEL:
            chosen.append((MODEL, wanted.model))
        elif name != TWIN:
            chosen.append((name, None))
        elif wanted.twin is not None:
            chosen.append((TWIN, wanted.twin))
    return chosen


def _maker(wanted: Evaluation, contestant: Contestant | None) -> str:
    """A hash of all that decides how a driver's drives go."""
    parts = [closed_loop.code_sha256(), ranges_sha256(), wanted.plan_period_s, wanted.latency_s]
    if contestant is not None:
        planner = open_planner(contestant)
        parts += [planner.model_sha256, planner.schedule, planner.steps, planner.backend.name]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _top(summary: Content) -> Content:
    """The fields every summary has, in the model's own numbers over all families."""
    errors = summary['open_loop'][MODEL]['all']
    driven = summary.get('closed_loop', {}).get(MODEL, {}).get('all', {})
    nothing = NOTHING.content()
    return {
        **{name: errors.get(name, nothing) for name in ('pdms', 'epdms')},
        'ade_m': errors['ade_m'],
        'fde_m': errors['fde_m'],
        **{
            name: driven.get(name, nothing)
            for name in ('collisions_per_km', 'route_completion', 'success_rate')
        },
    }


def _flat(measures: Measures) -> Content:
    return {name: estimate.content() for name, estimate in measures.items()}


def _nested(groups: Mapping[str, Measures]) -> Content:
    return {name: _flat(measures) for name, measures in groups.items()}


def _span(estimate: Content) -> str:
    if estimate['mean'] is None:
        return '-'
    return f'{estimate["mean"]:.2f} [{estimate["low"]:.2f}, {estimate["high"]:.2f}]'


def _write_json(path: Path, content: Content) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(temporary, path)
