"""The film of a drive: at each moment the pictures, the plan in them, the view from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8

from spanvla_ros.geometry import box_corners, local_from_world, world_from_local
from spanvla_ros.report import charts, page, pictures
from spanvla_ros.report.drive_summary import Window, window_of
from spanvla_ros.report.recording import (
    PictureRecord,
    PlanRecord,
    Recording,
    SceneRecord,
    read_pictures,
)
from spanvla_ros.types import Vehicle

MAP_LAYER = 'town-map'
FILM_FRAMES = 48
VIEW_RADIUS_M = 19.0
VIEW_AHEAD_M = 14.0
CHANNEL_ORDER = {'rgb8': (0, 1, 2), 'bgr8': (2, 1, 0), 'rgba8': (0, 1, 2), 'bgra8': (2, 1, 0)}


@dataclass(frozen=True)
class Moment:
    """One frame of the film: a plan, the pictures it was made from, the truth around it."""

    time_s: float
    plan: PlanRecord
    ego: Float64[np.ndarray, '3']
    shots: tuple[PictureRecord, ...]
    scene: SceneRecord | None


def film(
    path: str | Path,
    drive: Recording,
    cameras: Sequence[pictures.CameraView],
    vehicle: Vehicle,
    namespace: str,
) -> str:
    """The film of the recording at `path`; the page must hold `ground` as its `MAP_LAYER`."""
    views = {view.name: view for view in cameras}
    order = [view.name for view in sorted(cameras, key=lambda view: -view.yaw_deg)]
    frames = [
        (f'{moment.time_s:.1f} s', _frame(moment, drive, views, order, vehicle))
        for moment in _moments(path, drive, window_of(drive), namespace)
    ]
    return pictures.film(frames)


def _moments(path: str | Path, drive: Recording, window: Window, namespace: str) -> list[Moment]:
    plans = [plan for plan in drive.plans if window.holds(plan.received_ns)]
    if not plans or not len(drive.odometry):
        return []
    rows = np.unique(np.linspace(0, len(plans) - 1, FILM_FRAMES).astype(int))
    chosen = [plans[row] for row in rows]
    wanted = {s for plan in chosen for s in (plan.stamp_ns, *plan.image_stamps_ns) if s}
    shots = read_pictures(path, wanted, namespace)
    arrivals = np.array([scene.received_ns for scene in drive.scenes], dtype=np.int64)
    moments = []
    for plan in chosen:
        row = int(np.argmin(np.abs(drive.odometry_stamps_ns - plan.stamp_ns)))
        seen = [_nearest_shot(track, plan.stamp_ns) for track in shots.values()]
        scene = None
        if len(arrivals):
            scene = drive.scenes[int(np.argmin(np.abs(arrivals - plan.stamp_ns)))]
        moments.append(
            Moment(
                (plan.stamp_ns - window.from_ns) * 1e-9,
                plan,
                drive.odometry[row, :3],
                tuple(shot for shot in seen if shot is not None),
                scene,
            )
        )
    return moments


def _nearest_shot(track: Sequence[PictureRecord], stamp_ns: int) -> PictureRecord | None:
    nearest = min(track, key=lambda shot: abs(shot.stamp_ns - stamp_ns))
    return nearest if abs(nearest.stamp_ns - stamp_ns) <= 100_000_000 else None


def _frame(
    moment: Moment,
    drive: Recording,
    views: Mapping[str, pictures.CameraView],
    order: Sequence[str],
    vehicle: Vehicle,
) -> str:
    ranks = {name: rank for rank, name in enumerate(order)}
    row = [
        _drawn(shot, moment, views.get(shot.camera))
        for shot in sorted(
            moment.shots, key=lambda shot: (ranks.get(shot.camera, 99), shot.camera)
        )
    ]
    seen = pictures.picture_row([shot for shot in row if shot is not None]) if row else ''
    said = _last_said(drive, moment.plan.received_ns)
    words = f'<p class="remark">{page.escape(said)}</p>' if said else ''
    middle = world_from_local(moment.ego, np.array([[VIEW_AHEAD_M, 0.0]]))[0]
    above = charts.bird_view(
        _around(moment, drive, vehicle),
        center=(float(middle[0]), float(middle[1])),
        radius_m=VIEW_RADIUS_M,
        height=330,
        ground=MAP_LAYER,
    )
    return seen + words + above


def _last_said(drive: Recording, before_ns: int) -> str:
    earlier = [said for said in drive.reasonings if said.received_ns <= before_ns and said.text]
    return earlier[-1].text if earlier else ''


def _drawn(
    shot: PictureRecord, moment: Moment, view: pictures.CameraView | None
) -> pictures.Picture | None:
    image = _pixels(shot)
    if image is None:
        return None
    overlays: tuple[pictures.Overlay, ...] = ()
    if view is not None and (view.width_px, view.height_px) == (image.shape[1], image.shape[0]):
        path = np.concatenate([moment.ego[None, :], moment.plan.poses])
        local = local_from_world(moment.ego, path)[:, :2]
        pixels = pictures.project_ground(view, local)
        if len(pixels) > 1 and float(np.ptp(local[:, 0])) > 0.5:
            overlays = (pictures.Overlay(pixels, width_px=max(2.0, view.width_px / 90.0)),)
    return pictures.encode_picture(image, shot.camera.replace('_', ' '), overlays)


def _pixels(shot: PictureRecord) -> UInt8[np.ndarray, 'h w 3'] | None:
    data = np.frombuffer(shot.data, dtype=np.uint8)
    if shot.encoding == 'compressed':
        import cv2

        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        return None if decoded is None else np.ascontiguousarray(decoded[:, :, ::-1])
    rows = data.reshape(shot.height_px, -1)
    if shot.encoding == 'mono8':
        return np.repeat(rows[:, : shot.width_px, None], 3, axis=2)
    channels = CHANNEL_ORDER.get(shot.encoding)
    if channels is None:
        return None
    count = 4 if 'a' in shot.encoding else 3
    grid = rows[:, : shot.width_px * count].reshape(shot.height_px, shot.width_px, count)
    return np.ascontiguousarray(grid[:, :, list(channels)])


def ground(drive: Recording) -> list[charts.Shape]:
    """Roads and lane centers of the town."""
    if drive.town_map is None:
        return []
    roads = [charts.Shape(ring, 'road', closed=True) for ring in drive.town_map.drivable]
    lines = [
        charts.Shape(line, 'marking', width_m=0.12, opacity=0.7)
        for line in drive.town_map.centerlines
    ]
    return roads + lines


def _around(moment: Moment, drive: Recording, vehicle: Vehicle) -> list[charts.Shape]:
    shapes = []
    if drive.route is not None:
        near = np.hypot(*(drive.route - moment.ego[:2]).T) < 3.0 * VIEW_RADIUS_M
        shapes += [
            charts.Shape(np.stack([point, point]), 'route', width_m=0.9, label='route')
            for point in drive.route[near]
        ]
    for agent in moment.scene.agents if moment.scene else ():
        corners = box_corners(agent.pose, agent.length_m, max(agent.width_m, 0.6))
        if np.hypot(*(corners[0] - moment.ego[:2])) < 4.0 * VIEW_RADIUS_M:
            paint = 'person' if agent.kind == 'pedestrian' else 'agent'
            shapes.append(charts.Shape(corners, paint, closed=True, label=agent.kind))
    lanes = drive.town_map.lanes if drive.town_map else {}
    for lane_id in moment.scene.red_lanes if moment.scene else ():
        if lane_id in lanes:
            ring = lanes[lane_id][1]
            shapes.append(charts.Shape(ring, 'person', closed=True, opacity=0.18, label='red'))
    center = world_from_local(moment.ego, np.array([[vehicle.rear_axle_to_center_m, 0.0, 0.0]]))[0]
    body = box_corners(center, vehicle.length_m, vehicle.width_m)
    path = np.concatenate([moment.ego[None, :2], moment.plan.poses[:, :2]])
    dots = [charts.Shape(np.stack([p, p]), 'ego', width_m=0.9) for p in moment.plan.poses[:, :2]]
    return [
        *shapes,
        charts.Shape(body, 'ego', closed=True, opacity=0.75, label='ego'),
        charts.Shape(path, 'ego', width_m=0.35, label='plan'),
        *dots,
    ]
