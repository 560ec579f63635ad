"""The page of a replay: pictures with the plan, plans from above, speed and state over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.geometry import local_from_world
from spanvla_ros.replay.steps import Replay, Step
from spanvla_ros.report.charts import (
    Entry,
    Series,
    Shape,
    Span,
    bird_view,
    state_band,
    time_chart,
    timeline,
)
from spanvla_ros.report.page import Fact, columns, headline, number, section, table, write_page
from spanvla_ros.report.pictures import (
    CameraView,
    Overlay,
    encode_picture,
    film,
    picture,
    project_ground,
)

MOST_FRAMES = 60
VIEW_RADIUS_M = 35.0


def write_replay_page(path: Path, replay: Replay, summary: dict[str, Any]) -> None:
    """Write the self-contained page of a finished replay."""
    steps = replay.steps
    begin_ns = steps[0].stamp_ns if steps else 0
    facts = (
        Fact('pictures planned', f'{summary["plans"]} of {summary["pictures"]}'),
        Fact('ADE', f'{number(summary["ade_m"])} m', 'against the recorded drive'),
        Fact('FDE', f'{number(summary["fde_m"])} m', 'plans with a whole recorded horizon'),
        Fact('backend', str(summary['backend']), f'schedule {summary["schedule"]}'),
    )
    note = (
        'Open loop: the recorded driver drove, the model only planned. '
        'Time is that of the recording.'
    )
    if replay.drawing is not None:
        note += f' The pictures are {replay.drawing.source.label}.'
    fragments = [headline(f'Replay of {summary["bag"]}', note, facts)]
    stride = max(1, -(-len(steps) // MOST_FRAMES))
    frames = [(_label(step, begin_ns), _moment(step, replay)) for step in steps[::stride]]
    fragments.append(section('What the model saw and planned', film(frames)))
    fragments.append(section('Over time', *_charts(steps, begin_ns)))
    fragments.append(section('Reasons and refusals', *_tables(summary)))
    fragments.append(section('Reasoning', timeline(_words(steps, begin_ns))))
    write_page(path, f'Replay of {summary["bag"]}', fragments)


def _label(step: Step, begin_ns: int) -> str:
    return f'{(step.stamp_ns - begin_ns) / 1e9:.1f} s {step.state}'


def _moment(step: Step, replay: Replay) -> str:
    plan = step.plan
    if plan is None:
        drawn = '' if replay.drawing is None else f'{replay.drawing.source.label}; '
        shot = encode_picture(step.picture, f'{drawn}no plan: {step.refusal}')
        return picture(shot)
    spec = replay.planner.config.cameras[0]
    view = CameraView(
        spec.name,
        spec.width_px,
        spec.height_px,
        spec.fov_deg,
        spec.x_m,
        spec.y_m,
        spec.z_m,
        spec.yaw_deg,
        spec.pitch_deg,
    )
    path = local_from_world(np.array(plan.origin), plan.trajectory.poses)[:, :2]
    pixels = project_ground(view, np.vstack([np.zeros((1, 2)), path]))
    words = step.refusal or ', '.join(step.reasons) or step.state
    if replay.drawing is not None:
        words = f'{replay.drawing.source.label}; {words}'
    shot = encode_picture(step.picture, words, (Overlay(pixels, 'c0', 2.0),))
    shapes = []
    if replay.egos:
        driven = np.array([[ego.x_m, ego.y_m] for ego in replay.egos])
        shapes.append(Shape(local_from_world(np.array(plan.origin), driven), 'c6', label='driven'))
    if replay.route is not None:
        route = local_from_world(np.array(plan.origin), replay.route.points)
        shapes.append(Shape(route, 'c3', opacity=0.5, label='route'))
    shapes.append(Shape(np.vstack([np.zeros((1, 2)), path]), 'c0', width_m=0.6, label='plan'))
    above = bird_view(shapes, center=(VIEW_RADIUS_M / 2, 0.0), radius_m=VIEW_RADIUS_M, height=260)
    return columns(picture(shot), above)


def _charts(steps: list[Step], begin_ns: int) -> list[str]:
    planned = [step for step in steps if step.plan is not None]
    if not planned:
        return ['<p class="remark">No plan was made.</p>']
    times_s = np.array([(step.stamp_ns - begin_ns) / 1e9 for step in planned])
    speeds = np.array([step.plan.speed_mps for step in planned if step.plan is not None])
    at_3s = np.array([_mean_speed(step) for step in planned])
    ends = [*times_s[1:].tolist(), float(times_s[-1]) + 0.1]
    spans = [
        Span(float(begin), float(end), step.state)
        for begin, end, step in zip(times_s, ends, planned, strict=True)
    ]
    lines = (Series('driven', times_s, speeds), Series('planned, mean of 3 s', times_s, at_3s))
    return [state_band('state', spans), time_chart('speed', lines, 'm/s')]


def _mean_speed(step: Step) -> float:
    plan = step.plan
    if plan is None:
        return float('nan')
    places = np.vstack([plan.origin[:2], plan.trajectory.poses[:, :2]])
    times_s = plan.trajectory.times_s
    count = int(np.searchsorted(times_s, 3.0, side='right'))
    way_m = float(np.hypot(*np.diff(places[: count + 1], axis=0).T).sum())
    return way_m / float(times_s[count - 1]) if count else float('nan')


def _tables(summary: dict[str, Any]) -> list[str]:
    rows = [
        (kind, name, count)
        for kind in ('states', 'reasons', 'not_planned', 'refused_inputs')
        for name, count in summary[kind].items()
    ]
    topics = summary['topics']
    inputs = [
        *((f'camera {name}', topic) for name, topic in topics['images'].items()),
        ('odometry', topics['odometry']),
        ('route', topics['route'] or 'none: the path check is off'),
    ]
    return [table(('what', 'which', 'count'), rows), table(('input', 'topic'), inputs)]


def _words(steps: list[Step], begin_ns: int) -> list[Entry]:
    entries: list[Entry] = []
    last = None
    for step in steps:
        plan = step.plan
        if plan is None or plan.reasoning_stamp_ns in (None, last):
            continue
        last = plan.reasoning_stamp_ns
        agrees = {True: 'agrees', False: 'disagrees', None: ''}[plan.agreement]
        entries.append(Entry((step.stamp_ns - begin_ns) / 1e9, plan.reasoning, agrees))
    return entries
