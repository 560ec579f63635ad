"""The clips in which a model scored lowest: what it saw, what it planned, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import box_corners, local_from_world
from spanvla_ros.report import charts, page
from spanvla_ros.report.pictures import encode_picture, picture_row
from spanvla_ros.types import Sample, Scene, Vehicle

VIEW_RADIUS_M = 24.0
VIEW_CENTER_M = (16.0, 0.0)
SHOWN_M = 90.0


@dataclass(frozen=True)
class Clip:
    """A moment with the model's plan, the reference's, and the plan's scores by column."""

    sample: Sample
    scene: Scene
    planned: Float64[np.ndarray, 't 3']
    reference: Float64[np.ndarray, 't 3']
    scores: Mapping[str, float]


def clips_section(clips: Sequence[Clip]) -> str:
    """A page section with one figure a clip, the lowest score first."""
    return page.section(
        'Worst clips',
        *[fragment for clip in clips for fragment in _clip(clip)],
        note='Blue: the plan. Grey: the reference. Road users now, and faint at 2 and 4 s.',
    )


def lost(scores: Mapping[str, float]) -> list[str]:
    """The sub-scores below 1, worst first, as words for a caption."""
    parts = {name: value for name, value in scores.items() if '_' in name and value < 0.995}
    ordered = sorted(parts.items(), key=lambda part: part[1])
    return [f'{name.replace("_", " ").upper()} {100.0 * value:.0f}' for name, value in ordered]


def _clip(clip: Clip) -> list[str]:
    sample = clip.sample
    title = (
        f'<h3>{page.escape(sample.scene_id)}: PDMS {100.0 * clip.scores["pdms"]:.1f}, '
        f'EPDMS {100.0 * clip.scores["epdms"]:.1f}</h3>'
    )
    cost = ', '.join(lost(clip.scores)) or 'nothing lost'
    note = f'<p class="remark">{page.escape(cost)}</p>'
    shots = [
        encode_picture(frames[-1].image, frames[-1].camera)
        for frames in sample.observation.frames
        if frames[-1] is not None
    ]
    view = charts.bird_view(
        _shapes(clip), center=VIEW_CENTER_M, radius_m=VIEW_RADIUS_M, height=300
    )
    return [title, note, picture_row(shots) if shots else '', view]


def _shapes(clip: Clip) -> list[charts.Shape]:
    scene, vehicle = clip.scene, Vehicle()
    ego = np.array([scene.ego.x_m, scene.ego.y_m, scene.ego.yaw_rad])
    shapes = []
    for block in scene.map.roadblocks:
        for lane in block.lanes:
            ring = _local(ego, lane.polygon)
            if np.abs(ring).min() < SHOWN_M:
                shapes.append(charts.Shape(ring, 'road', closed=True))
    for agent in scene.agents:
        paint = 'person' if agent.kind == 'pedestrian' else 'agent'
        for time_s, opacity in ((4.0, 0.2), (2.0, 0.35), (0.0, 1.0)):
            at = int(np.argmin(np.abs(agent.times_s - time_s)))
            corners = box_corners(agent.states[at, :3], agent.length_m, max(agent.width_m, 0.6))
            shapes.append(charts.Shape(_local(ego, corners), paint, closed=True, opacity=opacity))
    body = box_corners(
        np.array([vehicle.rear_axle_to_center_m, 0.0, 0.0]), vehicle.length_m, vehicle.width_m
    )
    start = np.zeros((1, 2))
    return [
        *shapes,
        charts.Shape(
            np.concatenate([start, clip.reference[:, :2]]), 'route', width_m=0.6, label='reference'
        ),
        charts.Shape(body, 'ego', closed=True, opacity=0.6, label='ego'),
        charts.Shape(np.concatenate([start, clip.planned[:, :2]]), 'ego', label='plan'),
        *[charts.Shape(np.stack([p, p]), 'ego', width_m=0.8) for p in clip.planned[:, :2]],
    ]


def _local(ego: np.ndarray, points: np.ndarray) -> Float64[np.ndarray, 'n 2']:
    world = np.column_stack([points[:, :2], np.zeros(len(points))])
    return local_from_world(ego, world)[:, :2]
