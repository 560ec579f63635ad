"""Closed loop: whole drives in lockstep, a record a drive, and rates over them.

The cores are those on board: observation builder, planner, guardian, follower. Every driver gets
the same held-out seeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.safety.follower import Follower
from spanvla_ros.safety.state import Guardian
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import BlindRouteFollower, ConstantVelocity, ReferenceDriver
from spanvla_ros.town.lockstep import PlannerLike, run_episode
from spanvla_ros.town.scenarios import HELD_OUT_SEED, make_world
from spanvla_ros.town.traffic import World
from spanvla_ros.training.intervals import Estimate, mean_of, ratio_of

MODEL = 'model'
TWIN = 'twin'
REFERENCES = ('constant_velocity', 'blind_route_follower', 'reference_driver')


@dataclass(frozen=True)
class Episode:
    """What became of one drive of one driver."""

    driver: str
    family: str
    seed: int
    success: bool
    collided: bool
    at_fault: bool
    collided_with: str
    completion: float
    distance_m: float
    offroad_m: float
    red_lights_run: int
    time_s: float
    plans_refused: int
    states: tuple[tuple[str, float], ...]
    trace_sha256: str

    def content(self) -> dict[str, Any]:
        """As one line of `episodes.jsonl`."""
        return {**asdict(self), 'states': dict(self.states)}


ROW = {field.name for field in fields(Episode)} | {'made_with'}


def _is_states(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(share, float) for share in value.values())


class EpisodeBook:
    """Finished drives, a JSON line each, kept as they come so that a long run can go on."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that is no drive, such as a torn one, is left out."""
        self.path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and row.keys() == ROW and _is_states(row['states']):
                        self._rows.append(row)
            # Whole lines only from here on.
            text = ''.join(json.dumps(row) + '\n' for row in self._rows)
            write_text(path, text)

    def finished(self, driver: str, made_with: str) -> dict[tuple[str, int], Episode]:
        """Drives of a driver made with the same settings, by family and seed."""
        found = {}
        for row in self._rows:
            if (row.get('driver'), row.get('made_with')) == (driver, made_with):
                values = {key: value for key, value in row.items() if key != 'made_with'}
                values['states'] = tuple(sorted(values['states'].items()))
                found[row['family'], row['seed']] = Episode(**values)
        return found

    def add(self, episode: Episode, made_with: str) -> None:
        """Write one more drive."""
        row = {**episode.content(), 'made_with': made_with}
        self._rows.append(row)
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row, allow_nan=False) + '\n')


def drive(
    driver: str,
    family: str,
    seed: int,
    planner: PlannerLike | None,
    config: ModelConfig,
    plan_period_s: float,
    latency_s: float,
) -> Episode:
    """One drive to its end.

    Args:
        driver: name of the driver; `REFERENCES` make their own planner.
        family: town family.
        seed: held-out seed.
        planner: of the model; None for the references.
        config: of the model, for cameras and history.
        plan_period_s: time between plans.
        latency_s: modeled time from picture to plan.
    """
    world = make_world(family, seed)
    eyes = Renderer(config.cameras) if planner is not None else None
    if planner is not None and hasattr(planner, 'reset'):
        planner.reset()
    result = run_episode(
        world,
        planner if planner is not None else _reference(driver, world),
        ObservationBuilder(config),
        Guardian(world.vehicle),
        Follower(world.vehicle),
        eyes,
        plan_period_s=plan_period_s,
        latency_s=latency_s,
    )
    end = result.outcome
    states: dict[str, int] = {}
    for step in result.trace:
        states[step.state] = states.get(step.state, 0) + 1
    total = max(len(result.trace), 1)
    return Episode(
        driver=driver,
        family=family,
        seed=seed,
        success=end.success,
        collided=end.collided,
        at_fault=end.at_fault,
        collided_with=end.collided_with,
        completion=end.completion,
        distance_m=end.distance_m,
        offroad_m=end.offroad_m,
        red_lights_run=end.red_lights_run,
        time_s=end.time_s,
        plans_refused=sum(count for _, count in result.counts.refused),
        states=tuple(sorted((name, count / total) for name, count in states.items())),
        trace_sha256=result.trace_sha256,
    )


def held_out_seeds(episodes: int) -> range:
    """The seeds of a closed-loop comparison."""
    return range(HELD_OUT_SEED, HELD_OUT_SEED + episodes)


def code_sha256() -> str:
    """A hash of the sources that closed-loop drives run through."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for layer in ('geometry.py', 'types.py', 'model', 'runtime', 'safety', 'town'):
        place = root / layer
        for file in sorted(place.rglob('*.py')) if place.is_dir() else [place]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def rates(episodes: Sequence[Episode]) -> dict[str, Estimate]:
    """Success, completion and events per kilometer, with intervals over drives."""
    names = [(e.family, e.seed) for e in episodes]
    km = [e.distance_m / 1000.0 for e in episodes]
    return {
        'success_rate': mean_of([e.success for e in episodes], names),
        'route_completion': mean_of([e.completion for e in episodes], names),
        'collision_rate': mean_of([e.collided for e in episodes], names),
        'collisions_per_km': ratio_of([e.collided for e in episodes], km, names),
        'at_fault_per_km': ratio_of([e.collided and e.at_fault for e in episodes], km, names),
        'red_lights_per_km': ratio_of([e.red_lights_run for e in episodes], km, names),
        'offroad_share': ratio_of(
            [e.offroad_m for e in episodes], [e.distance_m for e in episodes], names
        ),
    }


def paired(first: Iterable[Episode], second: Iterable[Episode]) -> dict[str, Estimate]:
    """Differences on the same seeds, second minus first."""
    others = {(e.family, e.seed): e for e in second}
    both = [(e, others[e.family, e.seed]) for e in first if (e.family, e.seed) in others]
    names = [(one.family, one.seed) for one, _ in both]
    return {
        'success_rate': mean_of([float(b.success) - a.success for a, b in both], names),
        'collision_rate': mean_of([float(b.collided) - a.collided for a, b in both], names),
        'route_completion': mean_of([b.completion - a.completion for a, b in both], names),
    }


def by_family(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Drives of each family, all of them under `all`."""
    found: dict[str, list[Episode]] = {'all': list(episodes)}
    for episode in episodes:
        found.setdefault(episode.family, []).append(episode)
    return found


def _reference(driver: str, world: World) -> PlannerLike:
    if driver == 'reference_driver':
        return ReferenceDriver(world)
    if driver == 'constant_velocity':
        return ConstantVelocity()
    if driver == 'blind_route_follower':
        return BlindRouteFollower()
    raise ValueError(f'{driver!r} is none of {REFERENCES}')
