"""How fast plans are scored on this machine, by batch size and by part of the work.

Scenes are drawn here, so the measurement needs no data: a straight four-lane road with a little
traffic, and a wide one with as many objects as a busy city street. Times are CPU seconds of one
process with one thread, because a shared machine makes wall time meaningless; wall time stands
beside them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from spanvla_ros.scoring import metrics
from spanvla_ros.scoring.pdms import SCORER_VERSION, Scorer
from spanvla_ros.scoring.prepared import VERSIONS, Version
from spanvla_ros.types import (
    Scene,
    SceneAgent,
    SceneEgo,
    SceneLane,
    SceneMap,
    SceneRoadblock,
)

BATCHES = (1, 8, 64, 256)
SEED = 0
REPEATS = 5

# Official code on an AMD EPYC (family 25, model 17, 2.6 GHz), one process, one thread, ms for each
# proposal: handed 64 at once, and as its scripts use it (one call a proposal, v2 without filter).
OFFICIAL_BATCH_MS = {
    ('quiet', 'v1'): 2.0,
    ('quiet', 'v2'): 7.6,
    ('busy', 'v1'): 3.8,
    ('busy', 'v2'): 9.7,
}
OFFICIAL_SCRIPT_MS = {
    ('quiet', 'v1'): 24.0,
    ('quiet', 'v2'): 39.3,
    ('busy', 'v1'): 28.9,
    ('busy', 'v2'): 51.5,
}
HOW = (
    'ratio = official ms / our CPU ms, for one proposal at batch 64; the official figures were '
    'taken on an AMD EPYC at 2.6 GHz on synthetic and real scenes with as many objects, ours on '
    'this machine on drawn scenes; both one process, one thread, preparing a scene not counted'
)


@dataclass(frozen=True)
class BatchTime:
    """CPU and wall time of one proposal at one batch size, and where the CPU time goes."""

    scene: str
    version: Version
    batch: int
    cpu_ms: float
    wall_ms: float
    proposals_per_s: float
    simulation_share: float
    collision_share: float
    drivable_area_share: float
    rest_share: float


def run_scoring_bench(out_dir: Path) -> dict[str, Any]:
    """Measure, print a table, and write `summary.json` below `out_dir`.

    Args:
        out_dir: made where it is missing; an older summary is replaced.

    Returns:
        What was written.
    """
    scenes = {'quiet': drawn_scene(agents=2, lanes=4), 'busy': drawn_scene(agents=77, lanes=12)}
    times, prepare_ms = [], {}
    for name, scene in scenes.items():
        for version in VERSIONS:
            start = time.process_time()
            scorer = Scorer(scene, version)
            prepare_ms[f'{name} {version}'] = (time.process_time() - start) * 1e3
            times += [_measure(name, scorer, batch) for batch in BATCHES]
    summary = {
        'scorer_version': SCORER_VERSION,
        'seed': SEED,
        'machine': {'processor': _processor(), 'cores': os.cpu_count()},
        'load': os.getloadavg()[0],
        'prepare_scene_cpu_ms': prepare_ms,
        'times': [asdict(entry) for entry in times],
        'ratios': [_ratio(entry) for entry in times if entry.batch == 64],
        'how': HOW,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / f'.summary.{os.getpid()}.tmp'
    temporary.write_text(json.dumps(summary, indent=2) + '\n', encoding='utf-8')
    os.replace(temporary, out_dir / 'summary.json')
    sys.stdout.write(_table(times, summary))
    return summary


def drawn_scene(agents: int, lanes: int) -> Scene:
    """A straight road 300 m long with parallel lanes, the ego at 8 m/s and seeded traffic."""
    rng = np.random.default_rng(SEED)
    width = 3.5
    centers = (np.arange(lanes) - lanes // 2) * width
    xs = np.linspace(-60.0, 240.0, 31)

    def strip(low: float, high: float) -> Float64[np.ndarray, 'n 2']:
        there = np.column_stack([xs, np.full(xs.size, low)])
        back = np.column_stack([xs[::-1], np.full(xs.size, high)])
        return np.concatenate([there, back])

    made = tuple(
        SceneLane(
            f'l{at}',
            np.column_stack([xs, np.full(xs.size, y)]),
            strip(y - width / 2.0, y + width / 2.0),
            13.0,
            (),
        )
        for at, y in enumerate(centers)
    )
    whole = strip(centers[0] - width / 2.0, centers[-1] + width / 2.0)
    road = SceneMap((SceneRoadblock('A', is_connector=False, polygon=whole, lanes=made),))
    times_s = np.arange(-3, 11) * 0.5
    others = []
    for at in range(agents):
        x, y = rng.uniform(-50.0, 120.0), rng.choice(centers) + rng.uniform(-0.4, 0.4)
        speed = float(rng.choice([0.0, 4.0, 7.0, 9.0]))
        if abs(x) < 9.0:
            x += 25.0
        states = np.zeros((times_s.size, 5))
        states[:, 0], states[:, 1], states[:, 3] = x + speed * times_s, y, speed
        others.append(SceneAgent(f'a{at}', 'vehicle', 4.6, 1.9, 1.6, times_s, states))
    return Scene('drawn', SceneEgo(0.0, 0.0, 0.0, 8.0), road, ('A',), tuple(others))


def drawn_plans(count: int) -> Float64[np.ndarray, 'n 8 3']:
    """Seeded 2 Hz plans: speeds 4 to 12 m/s, gentle swerves up to a lane's width."""
    rng = np.random.default_rng(SEED)
    times_s = np.arange(1, 9) * 0.5
    speed = rng.uniform(4.0, 12.0, (count, 1))
    swerve = rng.normal(0.0, 1.2, (count, 1))
    phase = np.clip(times_s / 3.0, 0.0, 1.0)
    lateral = swerve * (3.0 * phase**2 - 2.0 * phase**3)
    slope = swerve * (6.0 * phase - 6.0 * phase**2) / 3.0 / speed
    return np.stack([speed * times_s, lateral, np.arctan(slope)], axis=-1)


def _measure(name: str, scorer: Scorer, batch: int) -> BatchTime:
    plans = drawn_plans(batch)
    scorer.score(plans)
    cpu_ms, wall_ms = _best(lambda: scorer.score(plans), batch)
    states = scorer.simulate(plans)
    simulate_ms, _ = _best(lambda: scorer.simulate(plans), batch)
    situation, prepared = scorer.situation, scorer.prepared
    local = states.copy()
    local[..., :2] -= prepared.origin
    ego = metrics.footprints(local)
    areas = metrics.ego_areas(ego, situation.ground, situation.on_route)

    def collide() -> None:
        metrics.no_at_fault_collision(ego, areas, situation.tracks)
        metrics.time_to_collision(ego, areas, situation.tracks, situation.ground, scorer.version)

    collision_ms, _ = _best(collide, batch)
    area_ms, _ = _best(lambda: metrics.ego_areas(ego, situation.ground, situation.on_route), batch)
    shares = [min(part / cpu_ms, 1.0) for part in (simulate_ms, collision_ms, area_ms)]
    return BatchTime(
        scene=name,
        version=scorer.version,
        batch=batch,
        cpu_ms=cpu_ms,
        wall_ms=wall_ms,
        proposals_per_s=1e3 / cpu_ms,
        simulation_share=shares[0],
        collision_share=shares[1],
        drivable_area_share=shares[2],
        rest_share=max(0.0, 1.0 - sum(shares)),
    )


def _best(work: Callable[[], object], batch: int) -> tuple[float, float]:
    """Least CPU and wall milliseconds for each proposal over repeats long enough to be timed."""
    rounds = max(1, 64 // batch)
    best_cpu = best_wall = float('inf')
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(rounds):
            work()
        count = rounds * batch
        best_cpu = min(best_cpu, (time.process_time() - cpu) / count * 1e3)
        best_wall = min(best_wall, (time.perf_counter() - wall) / count * 1e3)
    return best_cpu, best_wall


def _ratio(entry: BatchTime) -> dict[str, Any]:
    key = (entry.scene, entry.version)
    return {
        'scene': entry.scene,
        'version': entry.version,
        'against_official_64_at_once': OFFICIAL_BATCH_MS[key] / entry.cpu_ms,
        'against_official_scripts': OFFICIAL_SCRIPT_MS[key] / entry.cpu_ms,
    }


def _table(times: list[BatchTime], summary: dict[str, Any]) -> str:
    lines = ['scene version batch  proposals/s  CPU ms  wall ms  simulation collision area rest']
    lines += [
        f'{t.scene:5} {t.version:7} {t.batch:5} {t.proposals_per_s:12.0f} {t.cpu_ms:7.3f} '
        f'{t.wall_ms:8.3f} {t.simulation_share:11.0%} {t.collision_share:9.0%} '
        f'{t.drivable_area_share:4.0%} {t.rest_share:4.0%}'
        for t in times
    ]
    lines += [
        f'{r["scene"]} {r["version"]}: {r["against_official_64_at_once"]:.1f} times the official '
        f'code handed 64 at once, {r["against_official_scripts"]:.0f} times as its scripts use it'
        for r in summary['ratios']
    ]
    return '\n'.join([*lines, summary['how'], ''])


def _processor() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            named = [line for line in file if line.startswith('model name')]
    except OSError:
        named = []
    return named[0].split(':', 1)[1].strip() if named else platform.processor() or 'unknown'
