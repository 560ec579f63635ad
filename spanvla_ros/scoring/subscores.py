"""All sub-scores of a batch of simulated plans in one situation, before they are weighed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from spanvla_ros.scoring import comfort, metrics
from spanvla_ros.scoring.prepared import Centerline, Ground, RedLights, Tracks, Version
from spanvla_ros.types import Vehicle

States = Float64[np.ndarray, 'n 41 11']
Values = Float64[np.ndarray, 'n']


@dataclass(frozen=True)
class Situation:
    """What plans are scored in; positions are in the prepared scene's own frame."""

    version: Version
    tracks: Tracks
    ground: Ground
    red_lights: RedLights
    on_route: frozenset[str]
    centerline: Centerline


@dataclass(frozen=True)
class SubScores:
    """Sub-scores of n plans; `gates` multiply the total, progress is still in meters."""

    gates: dict[str, Values]
    weighted: dict[str, Values]
    comfort_flags: Bool[np.ndarray, 'n 6']
    progress_m: Values
    collision_step: metrics.Steps
    ttc_step: metrics.Steps
    areas: metrics.EgoAreas

    @property
    def multiplier(self) -> Values:
        """The product of the gates."""
        product: Values = np.prod(np.stack(list(self.gates.values())), axis=0)
        return product


def sub_scores(
    states: States,
    situation: Situation,
    history: Float64[np.ndarray, '14 11'] | None,
    vehicle: Vehicle,
) -> SubScores:
    """Sub-scores of simulated states; without a history v2's history comfort is 1."""
    version = situation.version
    ego = metrics.footprints(states, vehicle)
    areas = metrics.ego_areas(ego, situation.ground, situation.on_route)
    nc, collision_step = metrics.no_at_fault_collision(ego, areas, situation.tracks)
    ttc, ttc_step = metrics.time_to_collision(
        ego, areas, situation.tracks, situation.ground, version
    )
    gates = {'nc': nc, 'dac': metrics.drivable_area(areas)}
    direction = metrics.driving_direction(ego, areas, version)
    weighted = {'ttc': ttc}
    if version == 'v1':
        flags = comfort.comfort_flags(states, 'v1')
        weighted['ddc'] = direction
        weighted['comfort'] = np.where(flags.all(axis=1), 1.0, 0.0)
    else:
        gates['ddc'] = direction
        gates['tlc'] = metrics.traffic_lights(ego, situation.red_lights)
        weighted['lk'] = metrics.lane_keeping(ego, areas, situation.centerline)
        flags = np.ones((len(states), len(comfort.FLAGS)), dtype=bool)
        if history is not None:
            flags = comfort.comfort_flags(comfort.with_history(states, history), 'v2')
        weighted['hc'] = np.where(flags.all(axis=1), 1.0, 0.0)
    progress = metrics.raw_progress_m(ego, situation.centerline)
    return SubScores(gates, weighted, flags, progress, collision_step, ttc_step, areas)


def total(scores: dict[str, Values], version: Version, ec: Values | None = None) -> Values:
    """PDMS (v1) or EPDMS (v2) of sub-scores by name, `ep` among them; without EC, / 14."""
    if version == 'v1':
        mean = (5.0 * scores['ep'] + 5.0 * scores['ttc'] + 2.0 * scores['comfort']) / 12.0
        pdms: Values = scores['nc'] * scores['dac'] * mean
        return pdms
    gate = scores['nc'] * scores['dac'] * scores['ddc'] * scores['tlc']
    points = 5.0 * scores['ep'] + 5.0 * scores['ttc'] + 2.0 * scores['lk'] + 2.0 * scores['hc']
    epdms: Values = gate * points / 14.0 if ec is None else gate * (points + 2.0 * ec) / 16.0
    return epdms


def progress_scores(
    reference_m: float, progress_m: Values, multiplier: Values, version: Version
) -> Values:
    """EP by the rule of `version`; `reference_m` is the reference's gated progress."""
    rule = metrics.ego_progress_v1 if version == 'v1' else metrics.ego_progress_v2
    return rule(reference_m, progress_m, multiplier)
