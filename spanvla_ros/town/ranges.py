"""The ranges scenes are drawn from, fixed before training, and their hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spanvla_ros.types import SpanvlaError, is_finite_number, read_yaml

Span = tuple[float, float]


@dataclass(frozen=True)
class Ranges:
    """What scenes are drawn from; the fields are explained in `config/town/ranges.yaml`."""

    speed_limit_mps: float = 11.0
    lateral_accel_mps2: float = 2.0
    start_speed_mps: Span = (0.0, 11.0)
    standing_start_share: float = 0.15
    drive_m: Span = (120.0, 190.0)
    bend_radius_m: Span = (26.0, 110.0)
    bend_length_m: Span = (35.0, 80.0)
    bend_gap_m: Span = (6.0, 25.0)
    turn_radius_right_m: Span = (8.0, 11.0)
    turn_radius_left_m: Span = (10.0, 15.0)
    junction_at_m: Span = (55.0, 85.0)
    extra_lane_share: float = 0.45
    straight_share: float = 0.3
    route_step_m: Span = (10.0, 20.0)
    route_noise_sd_m: float = 1.0
    lead_stopped_share: float = 0.35
    lead_braking_share: float = 0.35
    lead_gap_m: Span = (14.0, 40.0)
    lead_speed_share: Span = (0.45, 0.95)
    lead_decel_mps2: Span = (2.0, 6.0)
    lead_brake_to_mps: Span = (0.0, 2.0)
    lead_hold_s: Span = (2.0, 5.0)
    pedestrian_at_m: Span = (48.0, 95.0)
    pedestrian_speed_mps: Span = (1.1, 1.8)
    pedestrian_waits_share: float = 0.25
    pedestrian_timing_s: Span = (-0.5, 0.5)
    bystander_share: float = 0.3
    light_red_share: float = 0.75
    green_after_s: Span = (3.0, 12.0)
    queue_share: float = 0.25
    oncoming_mean: float = 1.2
    neighbour_share: float = 0.5
    parked_mean: float = 1.0
    cut_in_at_m: Span = (20.0, 40.0)
    cut_in_gap_m: Span = (14.0, 22.0)
    cut_in_slow_mps: Span = (1.5, 4.0)
    cut_in_cruise_mps: Span = (3.5, 6.5)
    cut_in_duration_s: Span = (1.8, 3.2)
    cut_in_brakes_share: float = 0.3
    stop_sign_turn_share: float = 0.5
    site_at_m: Span = (62.0, 85.0)
    site_length_m: Span = (10.0, 26.0)
    site_speed_mps: Span = (5.0, 7.0)
    lane_closed_share: float = 0.7
    narrowing_m: Span = (0.9, 1.2)
    bias_m: Span = (0.8, 1.1)
    bias_start_m: Span = (0.4, 0.9)
    bias_speed_mps: Span = (6.0, 9.0)
    lane_change_at_m: Span = (22.0, 45.0)
    lane_change_over_m: Span = (28.0, 36.0)
    lane_change_met_share: float = 0.75
    oncoming_speed_mps: Span = (6.0, 9.0)
    oncoming_meet_m: Span = (12.0, 24.0)
    oncoming_gap_m: Span = (6.0, 14.0)
    ring_radius_m: Span = (12.0, 16.0)
    ring_way_on_m: Span = (9.0, 12.0)
    ring_meet_m: Span = (8.0, 18.0)
    ring_speed_mps: Span = (4.0, 6.0)
    lateral_offset_sd_m: float = 0.4
    heading_sd_rad: float = 0.03
    snapshot_speed_mps: Span = (0.0, 14.0)
    own_speed_share: float = 0.4
    standstill_share: float = 0.06
    consistent_history_share: float = 0.25
    history_accel_sd_mps2: float = 0.4
    history_noise_sd_m: float = 0.03


def load_ranges(path: str | Path | None = None) -> Ranges:
    """The ranges of a YAML file, by default those of the package; anything odd is refused."""
    if path is None:
        return Ranges()
    raw = read_yaml(path, 'a file of ranges')
    known = {field.name: field.default for field in fields(Ranges)}
    if not isinstance(raw, dict) or set(raw) - set(known):
        odd = sorted(map(str, set(raw) - set(known))) if isinstance(raw, dict) else 'no mapping'
        raise SpanvlaError(f'{path}: {odd} is not a range; use {sorted(known)}')
    values: dict[str, Any] = {}
    for name, value in raw.items():
        span = isinstance(known[name], tuple)
        parts = value if isinstance(value, list) else [value]
        if len(parts) != (2 if span else 1) or not all(map(is_finite_number, parts)):
            raise SpanvlaError(f'{path}: {name} must be {"[low, high]" if span else "a number"}')
        values[name] = (float(parts[0]), float(parts[1])) if span else float(value)
    return Ranges(**values)


def ranges_sha256(ranges: Ranges | None = None) -> str:
    """The hash of the ranges' content, for summaries."""
    content = json.dumps(asdict(ranges or Ranges()), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
