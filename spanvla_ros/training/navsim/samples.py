"""From a moment of a NAVSIM log to a scene to score plans in, and to a training row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from spanvla_ros.geometry import (
    arc_length,
    interpolate_poses,
    local_from_world,
    project_on_polyline,
    sample_polyline,
)
from spanvla_ros.messages import Intrinsics
from spanvla_ros.model.config import CameraSpec, ModelConfig
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.runtime.virtual_camera import Mount, VirtualCamera
from spanvla_ros.training.data.labels import presence
from spanvla_ros.training.data.scoring_rows import pack_scene
from spanvla_ros.training.data.shards import FACTS, TrainingRow
from spanvla_ros.training.navsim.cache import CachedScene
from spanvla_ros.training.navsim.logs import (
    FRAME_S,
    FUTURE_FRAMES,
    HISTORY_FRAMES,
    LogCamera,
    LogFrame,
    agents_of,
    red_lights_of,
)
from spanvla_ros.types import (
    CameraFrame,
    EgoState,
    Observation,
    Route,
    Sample,
    Scene,
    SpanvlaError,
)

START_NS = 1_000_000_000_000
FAMILY = 'navsim'


def scene_of(run: Sequence[LogFrame], cached: CachedScene) -> Scene:
    """The scoring scene of a moment: the log's traffic and lights on the cache's map."""
    now = run[HISTORY_FRAMES - 1]
    lanes = {lane.lane_id for block in cached.map.roadblocks for lane in block.lanes}
    lights = tuple(light for light in red_lights_of(run) if light.lane_id in lanes)
    ahead = run[HISTORY_FRAMES:]
    return Scene(
        name=now.token,
        ego=now.ego,
        map=cached.map,
        route=cached.route,
        agents=agents_of(run),
        red_lights=lights,
        ego_history=tuple(frame.ego for frame in run[:HISTORY_FRAMES]),
        human=np.array([_pose(frame) for frame in ahead]),
        kind=FAMILY,
        tags=(now.log_name, now.map_name),
    )


class SampleMaker:
    """Turns moments into rows for one model, pictures fitted to its cameras."""

    def __init__(self, config: ModelConfig, sensors: Path) -> None:
        """Look for pictures below `sensors`.

        Raises:
            SpanvlaError: the model wants more frames, a longer past or a later future than a
                moment of NAVSIM has.
        """
        future_s = FRAME_S * FUTURE_FRAMES
        if config.frames_per_camera != 1 or config.horizon_s > future_s + 1e-6:
            raise SpanvlaError(
                f'navsim: a moment has one picture a camera and {future_s:g} s after it, the '
                f'model wants {config.frames_per_camera} and {config.horizon_s:g} s; use another'
            )
        if config.history_s > FRAME_S * (HISTORY_FRAMES - 1) + 1e-6:
            raise SpanvlaError(
                f'navsim: a moment has 1.5 s before it, the model wants {config.history_s:g} s'
            )
        self.config = config
        self.sensors = sensors
        self._cells = presence(
            np.zeros(
                (len(config.cameras), config.cameras[0].height_px, config.cameras[0].width_px),
                dtype=np.uint8,
            )
        )
        self._eyes: dict[tuple[str, bytes], VirtualCamera] = {}

    def row(self, run: Sequence[LogFrame], cached: CachedScene | None) -> TrainingRow:
        """The row of a moment, with route and scoring row where there is a cache.

        What shows in the pictures and the facts are not known: both are zero, so train with
        `auxiliary_weight` 0. There is no reasoning either.
        """
        now = run[HISTORY_FRAMES - 1]
        config = self.config
        times_s = FRAME_S * np.arange(len(run) - HISTORY_FRAMES + 1)
        ahead = np.array([_pose(frame) for frame in run[HISTORY_FRAMES - 1 :]])
        wanted_s = config.horizon_s / config.waypoints * np.arange(1, config.waypoints + 1)
        future = local_from_world(_pose(now), interpolate_poses(times_s, ahead, wanted_s))
        sample = Sample(self._observe(run, cached), future, f'{now.log_name}/{now.token}', FAMILY)
        scoring = b'' if cached is None else pack_scene(scene_of(run, cached))
        facts = np.zeros(len(FACTS), dtype=np.float32)
        return TrainingRow(sample, self._cells, facts, scoring)

    def _observe(self, run: Sequence[LogFrame], cached: CachedScene | None) -> Observation:
        now = run[HISTORY_FRAMES - 1]
        builder = ObservationBuilder(self.config)
        for ego in _past(run[:HISTORY_FRAMES]):
            builder.add_ego(ego)
        if cached is not None:
            points = _coarse(cached.reference.centerline, _pose(now)[:2], self.config)
            builder.set_route(Route(START_NS, 'odom', points, now.command))
        for camera in self.config.cameras:
            builder.add_frame(CameraFrame(camera.name, START_NS, self._picture(camera, now)))
        seen = builder.build(START_NS)
        if seen is None:
            raise SpanvlaError(f'{now.log_name}/{now.token}: gives no observation')
        return seen if cached is not None else replace(seen, command=now.command)

    def _picture(self, camera: CameraSpec, frame: LogFrame) -> UInt8[np.ndarray, 'h w 3']:
        """The picture of the camera that sees most of what the model's would."""
        if not frame.cameras:
            raise SpanvlaError(f'{frame.log_name}/{frame.token}: the log names no pictures')
        shown = {one.file: self._eye(camera, one, frame) for one in frame.cameras.values()}
        file = max(shown, key=lambda name: shown[name].seen)
        if shown[file].fault:
            raise SpanvlaError(f'{frame.log_name}/{frame.token}: {shown[file].fault}')
        picture = cv2.imread(str(self.sensors / file), cv2.IMREAD_COLOR)
        if picture is None:
            raise SpanvlaError(f'{self.sensors / file}: is no picture; name the sensor folder')
        return shown[file].fit(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))

    def _eye(self, camera: CameraSpec, one: LogCamera, frame: LogFrame) -> VirtualCamera:
        key = (camera.name, one.intrinsic.tobytes() + one.base_from_optical.tobytes())
        if key not in self._eyes:
            width, height = self._size(one, frame)
            matrix = one.intrinsic
            source = Intrinsics(
                width, height, matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2],
                'plumb_bob', one.distortion,
            )  # fmt: skip
            self._eyes[key] = VirtualCamera(camera, source, Mount(*_mount(one)))
        return self._eyes[key]

    def _size(self, one: LogCamera, frame: LogFrame) -> tuple[int, int]:
        picture = cv2.imread(str(self.sensors / one.file), cv2.IMREAD_COLOR)
        if picture is None:
            raise SpanvlaError(
                f'{self.sensors / one.file}: is no picture, but {frame.log_name} names it; '
                'name the sensor folder'
            )
        return picture.shape[1], picture.shape[0]


def _mount(one: LogCamera) -> tuple[Float64[np.ndarray, '3'], Float64[np.ndarray, '3 3']]:
    return one.place_m, one.base_from_optical


def _pose(frame: LogFrame) -> Float64[np.ndarray, '3']:
    return np.array([frame.ego.x_m, frame.ego.y_m, frame.ego.yaw_rad])


def _past(run: Sequence[LogFrame]) -> list[EgoState]:
    """The past as odometry, with a state half-way between each two: half a second is a gap."""
    times_s = FRAME_S * np.arange(1 - len(run), 1)
    dense_s = np.linspace(times_s[0], 0.0, 2 * len(run) - 1)
    poses = interpolate_poses(times_s, np.array([_pose(frame) for frame in run]), dense_s)
    speeds = np.interp(dense_s, times_s, [frame.ego.vx_mps for frame in run])
    accels = np.interp(dense_s, times_s, [frame.ego.ax_mps2 for frame in run])
    return [
        EgoState(START_NS + round(time_s * 1e9), x, y, yaw, speed, accel)
        for time_s, (x, y, yaw), speed, accel in zip(
            dense_s.tolist(), poses.tolist(), speeds.tolist(), accels.tolist(), strict=True
        )
    ]


def _coarse(
    line: Float64[np.ndarray, 'n 2'], at: Float64[np.ndarray, '2'], config: ModelConfig
) -> Float64[np.ndarray, 'm 2']:
    """The center line from a little behind the ego on, a point each `route_step_m`."""
    here = float(project_on_polyline(line, at)[0][0])
    end = float(arc_length(line)[-1])
    steps = np.arange(max(here - config.route_step_m, 0.0), end, config.route_step_m)
    return sample_polyline(line, np.append(steps, end))[:, :2]
