"""PDMS and EPDMS of plans in one scene, batched: the reward, the evaluation, the feedback.

PDMS = NC DAC (5 EP + 5 TTC + 2 C) / 12.
EPDMS = NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16, or / 14 without EC where there is
no earlier plan to compare with. v2's human filter sets a sub-score to 1 where the human driver's
own is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from spanvla_ros.geometry import world_from_local
from spanvla_ros.scoring import comfort, metrics, simulation
from spanvla_ros.scoring.comfort import ExtendedComfort
from spanvla_ros.scoring.prepared import Centerline, PreparedScene, Version, prepare
from spanvla_ros.scoring.reference import Reference, pdm_closed
from spanvla_ros.scoring.subscores import (
    Situation,
    States,
    SubScores,
    Values,
    progress_scores,
    sub_scores,
    total,
)
from spanvla_ros.types import Scene, SceneEgo, SpanvlaError, Vehicle

SCORER_VERSION = '1'

Frame = Literal['ego', 'world']


@dataclass(frozen=True)
class PreviousPlan:
    """The plan made 0.5 s earlier, from `ego`, poses in the world; extended comfort needs it."""

    ego: SceneEgo
    poses: Float64[np.ndarray, 't 3']
    hz: int = 2


@dataclass(frozen=True)
class ScoredWith:
    """What a score was computed with; printed wherever the score is."""

    version: Version
    reference: str
    human_filter: bool
    scorer_version: str = SCORER_VERSION


@dataclass(frozen=True)
class Scores:
    """Every sub-score of one plan, its total, and how it came about.

    `total` is PDMS (v1) or EPDMS (v2). Sub-scores a version does not have are None; `ec` is None
    without an earlier plan, and then `total` leaves it out. `comfort_flags` are named by
    `comfort.FLAGS`. Times are None where nothing happened. In v2 the sub-scores are after the
    human filter and `unfiltered` holds those before it; flags, times and progress are the
    plan's own in either case.
    """

    nc: float
    dac: float
    ddc: float
    tlc: float | None
    ep: float
    ttc: float
    comfort: float | None
    lk: float | None
    hc: float | None
    ec: float | None
    total: float
    total_without_ec: float
    comfort_flags: tuple[bool, ...]
    collision_s: float | None
    ttc_infraction_s: float | None
    progress_m: float
    reference_progress_m: float
    extended_comfort: ExtendedComfort | None
    scored_with: ScoredWith
    unfiltered: Scores | None = None


class Scorer:
    """Scores plans in one scene by one version; keeps all that depends on the scene alone.

    Args:
        scene: the scene, of a golden file or of the town.
        version: `v1` for PDMS, `v2` for EPDMS.
        reference: what progress is measured against; None makes our own PDM-Closed.
        human_filter: v2 only, and only where the scene has a human trajectory.
        vehicle: official scores use the default, NAVSIM's Pacifica.
    """

    def __init__(
        self,
        scene: Scene,
        version: Version = 'v2',
        reference: Reference | None = None,
        *,
        human_filter: bool = True,
        vehicle: Vehicle = simulation.PACIFICA,
    ) -> None:
        """Prepare the scene; see the class."""
        if reference is None:
            reference = pdm_closed(scene, version, vehicle)
        self.scene = scene
        self.version = version
        self.reference = reference
        self.prepared: PreparedScene = prepare(scene, version, vehicle)
        self._vehicle = vehicle
        self._offset = np.array([*self.prepared.origin, 0.0])
        self.situation = Situation(
            version=version,
            tracks=self.prepared.tracks,
            ground=self.prepared.ground,
            red_lights=self.prepared.red_lights,
            on_route=frozenset(reference.route_lane_ids),
            centerline=Centerline.build(reference.centerline - self.prepared.origin),
        )
        self._reference_m, self._reference_gate = self._measure_reference()
        use_human = version == 'v2' and human_filter and scene.human is not None
        self._forgiven = self._human_failures() if use_human else frozenset()
        self.scored_with = ScoredWith(version, reference.source, use_human)

    def score(
        self,
        trajectories: ArrayLike,
        *,
        hz: int = 2,
        frame: Frame = 'ego',
        previous: Sequence[PreviousPlan | None] | PreviousPlan | None = None,
    ) -> list[Scores]:
        """Score a group of plans.

        Args:
            trajectories: `[n, t, 3]` rear-axle poses, the first at `1 / hz`, at least 4 s long;
                what lies beyond 4 s is not read.
            hz: 2 or 10.
            frame: whether poses are relative to the ego at t = 0 or in the world.
            previous: the plan made 0.5 s earlier, one for all or one each; v2 only.

        Raises:
            SpanvlaError: the array has another shape, is too short or holds a number that is
                not finite. Nothing is ever scored 0 because it could not be computed.
        """
        states = self.simulate(trajectories, hz=hz, frame=frame)
        if isinstance(previous, PreviousPlan) or previous is None:
            previous = [previous] * len(states)
        if len(previous) != len(states):
            raise SpanvlaError(f'previous: {len(previous)} plans for {len(states)} trajectories')
        return self.score_states(states, simulate_previous(previous, self._vehicle))

    def simulate(self, trajectories: ArrayLike, *, hz: int = 2, frame: Frame = 'ego') -> States:
        """The simulated world states of a group of plans; arguments as in `score`."""
        states = self._track(self._sampled(trajectories, hz, frame))
        states[..., :2] += self.prepared.origin
        return states

    def score_states(
        self, states: States, previous: Sequence[np.ndarray | None] | None = None
    ) -> list[Scores]:
        """Score simulated world states; `previous` holds those of the plans made 0.5 s earlier."""
        batch = self.evaluate(states)
        reference_m = self._reference_m * self._reference_gate
        ep = progress_scores(reference_m, batch.progress_m, batch.multiplier, self.version)
        extended: list[ExtendedComfort | None] = [None] * len(states)
        if self.version == 'v2' and previous is not None:
            extended = [
                None if before is None else comfort.extended_comfort(now, before)
                for now, before in zip(states, previous, strict=True)
            ]
        return self._all_scores(batch, ep, extended)

    def evaluate(self, states: States) -> SubScores:
        """Everything about simulated world states but progress in relation to the reference."""
        local = states.copy()
        local[..., :2] -= self.prepared.origin
        return sub_scores(local, self.situation, self.prepared.history, self._vehicle)

    def areas(self, states: States) -> metrics.EgoAreas:
        """Where the vehicle stands at each step of simulated world states."""
        local = states.copy()
        local[..., :2] -= self.prepared.origin
        ego = metrics.footprints(local, self._vehicle)
        return metrics.ego_areas(ego, self.prepared.ground, self.situation.on_route)

    def _measure_reference(self) -> tuple[float, float]:
        reference = self.reference
        if reference.states is None:
            states = self._track((reference.plan - self._offset)[None])
        else:
            states = reference.states[None].copy()
            states[..., :2] -= self.prepared.origin
        if reference.multiplier is not None:
            ego = metrics.footprints(states, self._vehicle)
            progress = metrics.raw_progress_m(ego, self.situation.centerline)
            return float(progress[0]), reference.multiplier
        batch = sub_scores(states, self.situation, None, self._vehicle)
        return float(batch.progress_m[0]), float(batch.multiplier[0])

    def _human_failures(self) -> frozenset[str]:
        # The human is scored alone and without a past, so EP and HC are 1 by construction.
        assert self.prepared.human is not None
        start = self.prepared.start[None]
        plan = simulation.resample(self.prepared.human[None], 2, start[:, :3])
        batch = sub_scores(self._track(plan), self.situation, None, self._vehicle)
        scored = {**batch.gates, **batch.weighted}
        return frozenset(name for name, values in scored.items() if values[0] == 0.0)

    def _sampled(
        self, trajectories: ArrayLike, hz: int, frame: Frame
    ) -> Float64[np.ndarray, 'n 41 3']:
        """10 Hz plans in the prepared scene's frame."""
        poses = check_trajectories(trajectories, hz)
        if frame == 'ego':
            local = world_from_local([0.0, 0.0, self.prepared.start[2]], poses)
        else:
            local = poses - self._offset
        return simulation.resample(local, hz, self._starts(len(local))[:, :3])

    def _starts(self, count: int) -> Float64[np.ndarray, 'n 11']:
        return np.broadcast_to(self.prepared.start, (count, simulation.STATE_SIZE))

    def _track(self, plans: Float64[np.ndarray, 'n 41 3']) -> States:
        return simulation.simulate(plans, self._starts(len(plans)), self._vehicle)

    def _all_scores(
        self, batch: SubScores, ep: Values, extended: Sequence[ExtendedComfort | None]
    ) -> list[Scores]:
        own = {**batch.gates, **batch.weighted, 'ep': ep}
        ec = np.array([0.0 if one is None else float(one.passed) for one in extended])
        plain = self._listed(batch, own, ec, extended, [None] * len(ep))
        if self.version == 'v1':
            return plain
        forgiven = {
            name: np.ones_like(values) if name in self._forgiven else values
            for name, values in own.items()
        }
        return self._listed(batch, forgiven, ec, extended, plain)

    def _listed(
        self,
        batch: SubScores,
        own: dict[str, Values],
        ec: Values,
        extended: Sequence[ExtendedComfort | None],
        unfiltered: Sequence[Scores | None],
    ) -> list[Scores]:
        without = total(own, self.version)
        with_ec = total(own, self.version, ec)
        return [
            Scores(
                nc=float(own['nc'][at]),
                dac=float(own['dac'][at]),
                ddc=float(own['ddc'][at]),
                tlc=_at(own, 'tlc', at),
                ep=float(own['ep'][at]),
                ttc=float(own['ttc'][at]),
                comfort=_at(own, 'comfort', at),
                lk=_at(own, 'lk', at),
                hc=_at(own, 'hc', at),
                ec=None if one is None else float(ec[at]),
                total=float(without[at] if one is None else with_ec[at]),
                total_without_ec=float(without[at]),
                comfort_flags=tuple(bool(flag) for flag in batch.comfort_flags[at]),
                collision_s=_time_s(int(batch.collision_step[at])),
                ttc_infraction_s=_time_s(int(batch.ttc_step[at])),
                progress_m=float(batch.progress_m[at]),
                reference_progress_m=self._reference_m,
                extended_comfort=one,
                scored_with=self.scored_with,
                unfiltered=unfiltered[at],
            )
            for at, one in enumerate(extended)
        ]


def score_scenes(
    scorers: Sequence[Scorer],
    trajectories: Sequence[ArrayLike],
    *,
    hz: int = 2,
    frame: Frame = 'ego',
) -> list[list[Scores]]:
    """Score one group of plans in each of many scenes; all are simulated in a single batch.

    Args:
        scorers: one a scene, all of one vehicle.
        trajectories: for each scene its plans `[n, t, 3]`, as in `Scorer.score`.
        hz: 2 or 10, the same for all.
        frame: as in `Scorer.score`.
    """
    if len(scorers) != len(trajectories):
        raise SpanvlaError(f'trajectories: {len(trajectories)} groups for {len(scorers)} scenes')
    if not scorers:
        return []
    plans = [
        scorer._sampled(group, hz, frame)
        for scorer, group in zip(scorers, trajectories, strict=True)
    ]
    starts = [scorer._starts(len(group)) for scorer, group in zip(scorers, plans, strict=True)]
    states = simulation.simulate(
        np.concatenate(plans), np.concatenate(starts), scorers[0]._vehicle
    )
    groups = np.split(states, np.cumsum([len(group) for group in plans])[:-1])
    for scorer, group in zip(scorers, groups, strict=True):
        group[..., :2] += scorer.prepared.origin
    return [scorer.score_states(group) for scorer, group in zip(scorers, groups, strict=True)]


def simulate_previous(
    previous: Sequence[PreviousPlan | None], vehicle: Vehicle = simulation.PACIFICA
) -> list[np.ndarray | None]:
    """Simulated world states of earlier plans, each from its own ego.

    One plan given to many proposals is simulated once.
    """
    distinct = {id(plan): plan for plan in previous if plan is not None}
    done: dict[int, np.ndarray] = {}
    for hz in {plan.hz for plan in distinct.values()}:
        group = {key: plan for key, plan in distinct.items() if plan.hz == hz}
        start = np.stack([simulation.state_of_ego(plan.ego) for plan in group.values()])
        origin = start[:, :2].copy()
        start[:, :2] = 0.0
        poses = np.stack(
            [check_trajectories(plan.poses[None], hz)[0, : 4 * hz] for plan in group.values()]
        )
        poses[..., :2] -= origin[:, None]
        plans = simulation.resample(poses, hz, start[:, :3])
        states = simulation.simulate(plans, start, vehicle)
        states[..., :2] += origin[:, None]
        done |= dict(zip(group, states, strict=True))
    return [None if plan is None else done[id(plan)] for plan in previous]


def check_trajectories(trajectories: ArrayLike, hz: int) -> Float64[np.ndarray, 'n t 3']:
    """`trajectories` as a float64 array of plans at least 4 s long, else a refusal."""
    poses = np.array(trajectories, dtype=np.float64)
    if hz not in (2, 10):
        raise SpanvlaError(f'trajectories: {hz} Hz is neither 2 nor 10')
    if poses.ndim != 3 or poses.shape[2] != 3:
        raise SpanvlaError(f'trajectories: shape {poses.shape} is not [n, t, 3]')
    if poses.shape[1] < 4 * hz:
        raise SpanvlaError(f'trajectories: {poses.shape[1]} poses at {hz} Hz are shorter than 4 s')
    bad = ~np.isfinite(poses).all(axis=(1, 2))
    if bad.any():
        raise SpanvlaError(f'trajectories[{int(bad.argmax())}]: holds a number that is not finite')
    return poses


def _at(scores: dict[str, Values], name: str, at: int) -> float | None:
    return float(scores[name][at]) if name in scores else None


def _time_s(step: int) -> float | None:
    return None if step == metrics.NEVER else round(float(step) * simulation.STEP_S, 1)
