"""Rows to score and their results, in the field names of the golden layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from spanvla_ros.scoring.metrics import EgoAreas
from spanvla_ros.scoring.pdms import PreviousPlan, Scores
from spanvla_ros.scoring.prepared import Version
from spanvla_ros.scoring.reference import Reference
from spanvla_ros.scoring.scene import (
    ego_from_json,
    field,
    mapping,
    number,
    poses_from_json,
    table,
    text,
)
from spanvla_ros.types import SceneEgo, SpanvlaError

_GATES = {'v1': ('NC', 'DAC'), 'v2': ('NC', 'DAC', 'DDC', 'TLC')}
_DECIMALS = 6


@dataclass(frozen=True)
class PlanRow:
    """One planned trajectory of a rows file, poses in the world."""

    row: str
    hz: int
    poses: Float64[np.ndarray, 't 3']
    previous: PreviousPlan | None


def row_from_json(raw: dict[str, Any], ego: SceneEgo) -> PlanRow:
    """Read `row`, `trajectory` and `previous_trajectory` of a rows line.

    Raises:
        SpanvlaError: as `scene.scene_from_json` does, the sentence starting with the field.
    """
    hz, poses = poses_from_json(field(raw, 'trajectory', ''), 'trajectory', ego, (2, 10))
    previous = None
    if raw.get('previous_trajectory') is not None:
        where = 'previous_trajectory'
        before = mapping(raw[where], where)
        before_ego = ego_from_json(field(before, 'ego', where), f'{where}.ego')
        before_hz, before_poses = poses_from_json(
            field(before, 'trajectory', where), f'{where}.trajectory', before_ego, (2, 10)
        )
        previous = PreviousPlan(before_ego, before_poses, before_hz)
    return PlanRow(text(field(raw, 'row', ''), 'row'), hz, poses, previous)


def reference_from_json(raw: object, version: Version) -> Reference:
    """Read a references object: what the official PDM-Closed did in one scene.

    Raises:
        SpanvlaError: a field is missing, of the wrong shape or not finite.
    """
    shared = mapping(raw, 'reference')
    own = mapping(shared.get(version, {}), f'reference.{version}')

    def pick(name: str) -> Any:
        return own.get(name, shared.get(name))

    centerline = table(field(shared, 'centerline', 'reference'), 'reference.centerline', 2)
    if len(centerline) < 2 or not np.ptp(centerline, axis=0).any():
        raise SpanvlaError('reference.centerline: needs two distinct points')
    lanes = field(shared, 'route_lane_ids', 'reference')
    if not isinstance(lanes, list) or not all(isinstance(lane, str) for lane in lanes):
        raise SpanvlaError('reference.route_lane_ids: must be a list of lane ids')
    plan = table(pick('reference_trajectory'), 'reference.reference_trajectory', 3)
    states = None
    if pick('reference_simulated_states') is not None:
        where = 'reference.reference_simulated_states'
        states = table(pick('reference_simulated_states'), where, 11)
    for name, array in (('reference_trajectory', plan), ('reference_simulated_states', states)):
        if array is not None and len(array) != 41:
            raise SpanvlaError(f'reference.{name}: holds {len(array)} rows instead of 41')
    multiplier = None
    if own.get('reference_multipliers') is not None:
        gates = mapping(own['reference_multipliers'], f'reference.{version}.reference_multipliers')
        multiplier = 1.0
        for name in _GATES[version]:
            multiplier *= number(gates.get(name), f'reference.{version}.multipliers.{name}')
    return Reference(centerline, tuple(lanes), plan, states, multiplier, 'given')


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """The `v1` or `v2` object of a result line, numbers rounded to 1e-6."""
    raw = _v1(scores) if scores.scored_with.version == 'v1' else _v2(scores)
    raw['raw_progress_m'] = {
        'reference': _rounded(scores.reference_progress_m),
        'proposal': _rounded(scores.progress_m),
    }
    raw['time_of_at_fault_collision_s'] = scores.collision_s
    raw['time_of_ttc_infraction_s'] = scores.ttc_infraction_s
    return raw


def areas_to_json(areas: EgoAreas, at: int) -> dict[str, str]:
    """The `ego_areas` object of a result line: 41 characters 0 or 1 for each kind."""
    kinds = {
        'multiple_lanes': areas.multiple_lanes,
        'non_drivable_area': areas.non_drivable,
        'oncoming_traffic': areas.oncoming,
    }
    return {name: ''.join('01'[int(flag)] for flag in mask[at]) for name, mask in kinds.items()}


def states_to_json(states: Float64[np.ndarray, '41 11']) -> list[list[float]]:
    """The `simulated_states` of a result line."""
    rounded: list[list[float]] = (np.round(states, _DECIMALS) + 0.0).tolist()
    return rounded


def _v1(scores: Scores) -> dict[str, Any]:
    raw: dict[str, Any] = {
        'NC': scores.nc,
        'DAC': scores.dac,
        'DDC': scores.ddc,
        'EP': _rounded(scores.ep),
        'TTC': scores.ttc,
        'C': scores.comfort,
        'PDMS': _rounded(scores.total),
        'comfort_flags': list(scores.comfort_flags),
    }
    raw['official'] = {
        'no_at_fault_collisions': raw['NC'],
        'drivable_area_compliance': raw['DAC'],
        'driving_direction_compliance': raw['DDC'],
        'ego_progress': raw['EP'],
        'time_to_collision_within_bound': raw['TTC'],
        'comfort': raw['C'],
        'score': raw['PDMS'],
    }
    return raw


def _v2(scores: Scores) -> dict[str, Any]:
    before = scores.unfiltered
    assert before is not None
    raw: dict[str, Any] = _v2_values(scores)
    if scores.ec is not None and scores.extended_comfort is not None:
        extended = scores.extended_comfort
        raw['EC'] = scores.ec
        raw['EPDMS'] = _rounded(scores.total)
        raw['ec_rms'] = {
            'acceleration': _rounded(extended.acceleration),
            'jerk': _rounded(extended.jerk),
            'yaw_rate': _rounded(extended.yaw_rate),
            'yaw_accel': _rounded(extended.yaw_accel),
        }
    raw['EPDMS_without_EC'] = _rounded(scores.total_without_ec)
    raw['unfiltered'] = _v2_values(before)
    raw['history_comfort_flags'] = list(scores.comfort_flags)
    raw['official'] = {
        'no_at_fault_collisions': raw['NC'],
        'drivable_area_compliance': raw['DAC'],
        'driving_direction_compliance': raw['DDC'],
        'traffic_light_compliance': raw['TLC'],
        'ego_progress': raw['EP'],
        'time_to_collision_within_bound': raw['TTC'],
        'lane_keeping': raw['LK'],
        'history_comfort': raw['HC'],
        'multiplicative_metrics_prod': raw['NC'] * raw['DAC'] * raw['DDC'] * raw['TLC'],
        'weighted_metrics': [raw['EP'], raw['TTC'], raw['LK'], raw['HC'], 0.0],
        'weighted_metrics_array': [5.0, 5.0, 2.0, 2.0, 2.0],
        'pdm_score': _rounded(before.total_without_ec),
    }
    return raw


def _v2_values(scores: Scores) -> dict[str, Any]:
    values: Sequence[tuple[str, float | None]] = (
        ('NC', scores.nc),
        ('DAC', scores.dac),
        ('DDC', scores.ddc),
        ('TLC', scores.tlc),
        ('EP', _rounded(scores.ep)),
        ('TTC', scores.ttc),
        ('LK', scores.lk),
        ('HC', scores.hc),
    )
    return dict(values)


def _rounded(value: float) -> float:
    return round(value, _DECIMALS)
