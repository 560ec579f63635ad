"""`index.html` of a drive: what the cameras saw, what was planned, how fast and how fresh it was.

Everything on it is read from the recording; the numbers are those of `summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from spanvla_ros.report import charts, page, pictures
from spanvla_ros.report.drive_film import MAP_LAYER, VIEW_RADIUS_M, film, ground
from spanvla_ros.report.drive_summary import Window, output_gaps_ms, stamps_s, window_of
from spanvla_ros.report.recording import PlanRecord, Recording, read_recording
from spanvla_ros.report.shadow import disagreement
from spanvla_ros.types import Vehicle

STAGES = ('observe', 'vision', 'prefill', 'reason', 'step', 'total')


def write_page(
    recording: str | Path,
    content: Mapping[str, Any],
    path: str | Path,
    cameras: Sequence[pictures.CameraView] = (),
    *,
    vehicle: Vehicle | None = None,
    namespace: str = '/spanvla',
) -> Path:
    """Write the page of a drive.

    Args:
        recording: `drive.mcap`.
        content: what `summarise` returned for it, with the caller's additions.
        path: the HTML file.
        cameras: mounts of the recorded cameras; where one is known the plan is drawn into its
            pictures.
        vehicle: size of the vehicle.
        namespace: of the nodes.
    """
    drive = read_recording(recording, namespace)
    window = window_of(drive)
    fragments = [
        charts.ground_layer(MAP_LAYER, ground(drive)),
        headline(content),
        page.section(
            'What it saw and what it planned',
            film(recording, drive, cameras, vehicle or Vehicle(), namespace),
            note='Cameras with the planned path; from above: the vehicle and its plan in blue, '
            'other road users in orange, people in red, the announced route dotted grey.',
        ),
        _timing(drive, window),
        _motion(drive, window),
        *_shadow(drive, window),
        _reasoning(drive, window),
        _numbers(content),
    ]
    return page.write_page(path, f'spanvla drive: {content.get("scenario") or "?"}', fragments)


def headline(content: Mapping[str, Any]) -> str:
    """The title, one sentence on what drove, and the numbers that matter most."""
    gap, age = content['output_gap_ms'], content['kv_age_ms']
    camera_hz = content['camera_hz'] or 0.0
    driver = content['driver'] or 'nothing'
    slot = '' if driver == 'model' else f' In the slot of the model stood: {driver}.'
    sentence = (
        f'{content["seconds"]:.0f} s in closed loop over DDS, pictures at {camera_hz:.0f} Hz, '
        f'backend {content["backend"] or "none"}, schedule {content["schedule"] or "none"}.{slot}'
    )
    facts = [
        page.Fact(
            'plans a second',
            f'{content["plan_hz"]:.1f}',
            f'of {camera_hz:.0f} pictures',
            content['plan_hz'] >= 0.93 * camera_hz,
        ),
        _limited('K/V age p99', age['p99'], 150.0, 'ms'),
        _limited('output gap p99', gap['p99'], 60.0, 'ms'),
        _limited('longest output gap', gap['max'], 100.0, 'ms'),
        page.Fact(
            'fresh outputs',
            _percent(content['fresh_share']),
            'limit 99 %',
            None if content['fresh_share'] is None else content['fresh_share'] >= 0.99,
        ),
        _count('invalid outputs', content['invalid_trajectories']),
        _count('collisions', content['collisions']),
        _count('red lights run', content['red_lights_run']),
        page.Fact('route driven', _percent(content['route_completion'])),
        page.Fact('distance', f'{content["distance_m"]:.0f} m'),
    ]
    scenario = str(content['scenario'] or 'unnamed').replace('_', ' ')
    return page.headline(f'Drive: {scenario}, seed {content["seed"]}', sentence, facts)


def _limited(label: str, value: float | None, limit: float, unit: str) -> page.Fact:
    if value is None:
        return page.Fact(label, '-')
    return page.Fact(label, f'{value:.0f} {unit}', f'limit {limit:.0f} {unit}', value <= limit)


def _count(label: str, value: int | None) -> page.Fact:
    return page.Fact(label, page.number(value), good=None if value is None else value == 0)


def _percent(value: float | None) -> str:
    return '-' if value is None else f'{100.0 * value:.1f} %'


def _timing(drive: Recording, window: Window) -> str:
    plans = [plan for plan in drive.plans if window.holds(plan.received_ns)]
    outputs = [output for output in drive.outputs if window.holds(output.received_ns)]
    planned_s = stamps_s([plan.received_ns for plan in plans], window.from_ns)
    ages_ms = np.array([(p.received_ns - p.kv_stamp_ns) * 1e-6 for p in plans])
    sent_s = stamps_s([output.received_ns for output in outputs], window.from_ns)
    gaps_ms = output_gaps_ms(outputs)
    seconds = np.arange(0.5, max(window.seconds - 0.5, 0.6), 0.5)
    stages = [dict(plan.stage_ms) for plan in plans]
    lines = [
        charts.Series(name, planned_s, np.array([row.get(f'{name}_ms', 0.0) for row in stages]))
        for name in STAGES
        if any(row.get(f'{name}_ms', 0.0) > 0.0 for row in stages)
    ]
    return page.section(
        'Rates, ages, states',
        page.columns(
            charts.time_chart(
                'Plans and outputs',
                [
                    charts.Series('plans', seconds, _rate_over(planned_s, seconds)),
                    charts.Series('outputs', seconds, _rate_over(sent_s, seconds)),
                ],
                '1/s',
            ),
            charts.time_chart(
                'Age of the picture whose K/V a plan used',
                [charts.Series('at its arrival', planned_s, ages_ms)],
                'ms',
                [charts.Limit('150 ms', 150.0)],
            ),
            charts.time_chart(
                'Time between outputs',
                [charts.Series('gap', sent_s[1:], gaps_ms)],
                'ms',
                [charts.Limit('100 ms', 100.0)],
            ),
            *([charts.time_chart('Parts of a plan', lines, 'ms')] if lines else []),
        ),
        charts.state_band('State of the guardian', _spans(drive, window)),
    )


def _rate_over(
    times_s: Float64[np.ndarray, 'n'], at_s: Float64[np.ndarray, 'm']
) -> Float64[np.ndarray, 'm']:
    """Events a second within half a second either side."""
    count = np.searchsorted(times_s, at_s + 0.5) - np.searchsorted(times_s, at_s - 0.5)
    return np.asarray(count, dtype=np.float64)


def _spans(drive: Recording, window: Window) -> list[charts.Span]:
    spans: list[charts.Span] = []
    for index, told in enumerate(drive.states):
        last = index + 1 == len(drive.states)
        until = window.to_ns if last else drive.states[index + 1].received_ns
        from_s = max(0.0, (told.received_ns - window.from_ns) * 1e-9)
        to_s = min(window.seconds, (until - window.from_ns) * 1e-9)
        if to_s <= from_s:
            continue
        if spans and spans[-1].state == told.state:
            spans[-1] = charts.Span(spans[-1].from_s, to_s, told.state)
        else:
            spans.append(charts.Span(from_s, to_s, told.state))
    return spans


def _shadow(drive: Recording, window: Window) -> list[str]:
    found = disagreement(drive, window.from_ns, window.to_ns)
    if found is None:
        return []
    at_s = stamps_s(found.received_ns, window.from_ns)
    return [
        page.section(
            'The shadow planner',
            page.columns(
                charts.time_chart(
                    'Distance of its plan from the driven one',
                    [
                        charts.Series('mean of the waypoints', at_s, found.mean_m),
                        charts.Series('last waypoint', at_s, found.end_m),
                    ],
                    'm',
                )
            ),
            note=f'Nobody drove its {found.plans} plans; {len(found.mean_m)} of them come from a '
            'picture that the driving planner planned from as well.',
        )
    ]


def _motion(drive: Recording, window: Window) -> str:
    driven_s = (drive.odometry_stamps_ns - window.from_ns) * 1e-9
    keep = (driven_s >= 0.0) & (driven_s <= window.seconds)
    plans = [plan for plan in drive.plans if window.holds(plan.received_ns)]
    ahead = np.array([_planned_speed_mps(plan) for plan in plans])
    planned_s = stamps_s([plan.stamp_ns for plan in plans], window.from_ns)
    track = [charts.Shape(drive.odometry[keep][::5, :2], 'ego', width_m=1.2, label='driven')]
    ends = [drive.odometry[keep][[-1], :2]] if keep.any() else []
    track += [charts.Shape(np.concatenate([end, end]), 'ego', width_m=5.0) for end in ends]
    route = [charts.Shape(drive.route, 'route', width_m=0.6)] if drive.route is not None else []
    return page.section(
        'The drive',
        page.columns(
            charts.time_chart(
                'Speed',
                [
                    charts.Series('driven', driven_s[keep], drive.odometry[keep, 3]),
                    charts.Series('planned, one second ahead', planned_s, ahead),
                ],
                'm/s',
            ),
            charts.time_chart(
                'Yaw rate',
                [charts.Series('driven', driven_s[keep], drive.odometry[keep, 4])],
                'rad/s',
            ),
        ),
        _overview(route + track, drive.odometry[keep, :2]) if keep.any() else '',
    )


def _overview(shapes: list[charts.Shape], driven: Float64[np.ndarray, 'n 2']) -> str:
    """The driven way and what lies around it; the rest of a long route is out of the picture."""
    low, high = driven.min(axis=0), driven.max(axis=0)
    across, up = (high - low) / 2.0
    height = 320
    return charts.bird_view(
        shapes,
        center=(float(low[0] + across), float(low[1] + up)),
        radius_m=max(float(up), float(across) * height / charts.WIDE) + VIEW_RADIUS_M,
        height=height,
        ground=MAP_LAYER,
    )


def _planned_speed_mps(plan: PlanRecord) -> float:
    steps_m = np.hypot(*np.diff(plan.poses[:, :2], axis=0).T)
    middles_s = 0.5 * (plan.times_s[1:] + plan.times_s[:-1])
    return float(np.interp(1.0, middles_s, steps_m / np.diff(plan.times_s)))


def _reasoning(drive: Recording, window: Window) -> str:
    entries, last = [], ''
    for said in drive.reasonings:
        if not window.holds(said.received_ns) or not said.text or said.text == last:
            continue
        last = said.text
        tag = said.thinking
        if said.agreement is not None:
            tag += ', agrees' if said.agreement else ', disagrees'
        entries.append(
            charts.Entry((said.received_ns - window.from_ns) * 1e-9, said.text, tag.strip(', '))
        )
    if not entries:
        return page.section('Reasoning', note='The drive holds no reasoning.')
    return page.section(
        'Reasoning',
        charts.timeline(entries),
        note='Where the words changed. "agrees" is a rule: the words and the planned motion say '
        'the same. It does not say that the words caused the motion.',
    )


def _numbers(content: Mapping[str, Any]) -> str:
    stages = [
        (name, spread['p50'], spread['p99'])
        for name, spread in content['stage_ms'].items()
        if spread['p99']
    ]
    plain = [
        (name, value)
        for name, value in content.items()
        if isinstance(value, str | int | float | bool) and value != ''
    ]
    states = [(state, _percent(share)) for state, share in content['states'].items()]
    libraries = list(content['versions'].items())
    return page.section(
        'Numbers',
        page.columns(
            page.table(['summary.json', ''], plain),
            ''.join(
                page.table(head, rows)
                for head, rows in (
                    (['stage', 'p50 ms', 'p99 ms'], stages),
                    (['state', 'share of time'], states),
                    (['reason to be degraded', 'plans'], list(content['degraded'].items())),
                    (
                        ['reason to be invalid', 'outputs'],
                        list(content['invalid_reasons'].items()),
                    ),
                    (['version', ''], libraries),
                )
                if rows
            ),
        ),
    )
