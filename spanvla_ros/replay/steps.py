"""One recorded message after another through the on-board cores; time is the messages' own.

The same observation builder, planner and guardian as on the road. No wall clock enters: a plan
takes no time, and reasoning goes on by a fixed number of tokens a frame.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from spanvla_ros.carla import to_rear_axle
from spanvla_ros.geometry import world_from_local
from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    read_camera_info,
    read_compressed_image,
    read_image,
    read_odometry,
    read_route,
)
from spanvla_ros.replay.bag import Topics
from spanvla_ros.replay.drawing import Drawing
from spanvla_ros.runtime.observations import IMAGE_TOLERANCE_S, ObservationBuilder
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.runtime.virtual_camera import VirtualCamera, centered
from spanvla_ros.safety.state import Guardian, GuardianParameters
from spanvla_ros.types import CameraFrame, EgoState, Plan, PlanError, Route, Vehicle

TOKENS_PER_FRAME = 4
FRAME = 'odom'


@dataclass(frozen=True)
class Step:
    """What became of one anchor picture; `plan` is None where there was none, see `refusal`."""

    stamp_ns: int
    picture: UInt8[np.ndarray, 'h w 3']
    plan: Plan | None
    refusal: str
    state: str = ''
    reasons: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the guardian took the plan."""
        return self.plan is not None and not self.refusal


class Replay:
    """A planner and a guardian that live on recorded messages."""

    def __init__(
        self,
        planner: Planner,
        topics: Topics,
        vehicle: Vehicle,
        transforms: Mapping[tuple[str, str], Float64[np.ndarray, '3']],
        *,
        origin_ahead_m: float = 0.0,
        drawing: Drawing | None = None,
    ) -> None:
        """Start empty.

        Args:
            planner: the planner.
            topics: what the bag offers.
            vehicle: whose limits the guardian holds.
            transforms: static plane transforms, by parent and child frame.
            origin_ahead_m: how far what the odometry follows lies ahead of the rear axle.
            drawing: draws the pictures where the bag has none.
        """
        self.drawing = drawing
        self._origin_ahead_m = origin_ahead_m
        self.planner = planner
        self.topics = topics
        self.builder = ObservationBuilder(planner.config)
        self.guardian = Guardian(vehicle, GuardianParameters(frame_id=FRAME))
        self.steps: list[Step] = []
        self.egos: list[EgoState] = []
        self.route: Route | None = None
        self.refused: Counter[str] = Counter()
        self.odometry_frame = ''
        self._transforms = transforms
        self._infos: dict[str, Intrinsics] = {}
        self._views: dict[str, VirtualCamera] = {}
        self._cameras = {topic: name for name, topic in topics.images.items()}
        self._info_cameras = {topic: name for name, topic in topics.infos.items()}
        self._specs = {camera.name: camera for camera in planner.config.cameras}
        self._anchor_name = planner.config.cameras[0].name
        self._waiting: CameraFrame | None = None
        self._arrived: dict[str, int] = {}
        self._held_route: Route | None = None
        self._now_ns = 0

    def feed(self, topic: str, message: Any) -> None:
        """Take one message; a bad one is counted under its reason."""
        try:
            if isinstance(message, MessageError):
                raise message
            if topic in self._cameras:
                self._on_picture(self._cameras[topic], message)
            elif topic == self.topics.odometry:
                self._on_odometry(message)
            elif topic in self._info_cameras:
                self._on_info(self._info_cameras[topic], message)
            elif topic == self.topics.route:
                self._held_route = read_route(message)
                self._take_route()
        except MessageError as error:
            self.refused[f'{topic}: {error}'] += 1

    def finish(self) -> None:
        """Plan from a last picture that still waits for its neighbours."""
        if self._waiting is not None:
            self._plan(self._waiting)

    def _on_odometry(self, message: Any) -> None:
        if self._origin_ahead_m:
            message = to_rear_axle(message, self._origin_ahead_m)
        ego = read_odometry(message)
        if self._waiting is not None and self._too_late(ego.stamp_ns):
            self._plan(self._waiting)
        self.odometry_frame = self.odometry_frame or str(message.header.frame_id)
        self._take_route()
        reason = self.builder.add_ego(ego)
        if reason:
            self.refused[f'{self.topics.odometry}: {reason}'] += 1
            return
        self._now_ns = ego.stamp_ns
        self.guardian.on_ego(ego, self._now_ns)
        self.egos.append(ego)
        if self.drawing is not None:
            for frame in self.drawing.pictures(ego):
                self.take_frame(frame)

    def _take_route(self) -> None:
        """Hand the route on, in the odometry frame, once that is known."""
        route = self._held_route
        if route is None or not self.odometry_frame:
            return
        self._held_route = None
        points = route.points
        if route.frame_id != self.odometry_frame:
            parent_from_child = self._transforms.get((self.odometry_frame, route.frame_id))
            child_from_parent = self._transforms.get((route.frame_id, self.odometry_frame))
            if parent_from_child is not None:
                points = world_from_local(parent_from_child, points)
            elif child_from_parent is not None:
                points = world_from_local(_inverse(child_from_parent), points)
            else:
                self.refused[
                    f'{self.topics.route}: no static transform from {route.frame_id} '
                    f'to {self.odometry_frame}'
                ] += 1
                return
        self.route = replace(route, frame_id=FRAME, points=points)
        self.builder.set_route(self.route)
        self.guardian.on_route(self.route)

    def _on_info(self, camera: str, message: Any) -> None:
        rectified = 'rect' in self.topics.images.get(camera, '')
        info = read_camera_info(message, rectified=rectified)
        if info != self._infos.get(camera):
            self._infos[camera] = info
            self._views[camera] = VirtualCamera(self._specs[camera], info)

    def _on_picture(self, camera: str, message: Any) -> None:
        view = self._views.get(camera)
        if view is not None and view.fault:
            raise MessageError(view.fault)
        fit = partial(centered, camera=self._specs[camera]) if view is None else view.fit
        if hasattr(message, 'format'):
            self.take_frame(read_compressed_image(message, camera, fit=fit))
        else:
            self.take_frame(read_image(message, camera, fit=fit))

    def take_frame(self, frame: CameraFrame) -> None:
        """Take one picture of the model's own size; a plan follows once all cameras are there."""
        camera = frame.camera
        if self._waiting is not None and self._too_late(frame.stamp_ns):
            self._plan(self._waiting)
        reason = self.builder.add_frame(frame)
        if reason:
            self.refused[f'{self.topics.images[camera]}: {reason}'] += 1
            return
        self._arrived[camera] = frame.stamp_ns
        if camera == self._anchor_name:
            if self._waiting is not None:
                self._plan(self._waiting)
            self._waiting = frame
        if self._waiting is not None and self._complete(self._waiting.stamp_ns):
            self._plan(self._waiting)

    def _complete(self, stamp_ns: int) -> bool:
        tolerance_ns = IMAGE_TOLERANCE_S * 1e9
        return all(
            abs(self._arrived.get(name, 0) - stamp_ns) <= tolerance_ns
            for name in self.topics.images
        )

    def _too_late(self, stamp_ns: int) -> bool:
        waiting = self._waiting
        return waiting is not None and stamp_ns - waiting.stamp_ns > IMAGE_TOLERANCE_S * 1e9

    def _plan(self, anchor: CameraFrame) -> None:
        self._waiting = None
        observation = self.builder.build(anchor.stamp_ns)
        if observation is None:
            self.steps.append(Step(anchor.stamp_ns, anchor.image, None, self.builder.refusal))
            return
        try:
            plan = self.planner.plan(observation)
        except PlanError as error:
            self.steps.append(Step(anchor.stamp_ns, anchor.image, None, str(error)))
            return
        self.planner.reason_slice(budget_ms=math.inf, tokens=TOKENS_PER_FRAME)
        now_ns = max(self._now_ns, anchor.stamp_ns)
        rejection = self.guardian.on_plan_text(plan.to_json(), now_ns)
        output = self.guardian.tick(now_ns)
        refusal = '' if rejection is None else f'rejected:{rejection.reason.value}'
        state, reasons = ('', ()) if output is None else (output.state, output.reasons)
        self.steps.append(Step(anchor.stamp_ns, anchor.image, plan, refusal, state, reasons))


def _inverse(pose: Float64[np.ndarray, '3']) -> Float64[np.ndarray, '3']:
    x, y, yaw = pose
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([-cos * x - sin * y, sin * x - cos * y, -yaw])


@dataclass(frozen=True)
class OpenLoopError:
    """How far the plans are from what the recorded driver did next.

    `ade_m` averages all waypoints whose true place is on the bag; `fde_m` the last waypoint of
    the plans whose whole horizon is. None where there is no such waypoint.
    """

    ade_m: float | None
    fde_m: float | None
    waypoints: int
    full_plans: int
    ade_by_second_m: tuple[tuple[float, float], ...]


def open_loop_error(steps: list[Step], egos: list[EgoState]) -> OpenLoopError:
    """Compare accepted plans with the recorded ego's own future at the waypoints' times."""
    plans = [step.plan for step in steps if step.accepted and step.plan is not None]
    stamps_s = np.array([ego.stamp_ns for ego in egos], dtype=np.float64) / 1e9
    places = np.array([[ego.x_m, ego.y_m] for ego in egos], dtype=np.float64).reshape(-1, 2)
    errors: list[tuple[float, float]] = []
    finals = []
    for plan in plans:
        times_s = plan.trajectory.stamp_ns / 1e9 + plan.trajectory.times_s
        known = (times_s <= stamps_s[-1]) & (times_s >= stamps_s[0])
        truth = np.stack([np.interp(times_s, stamps_s, column) for column in places.T], axis=1)
        error_m = np.hypot(*(plan.trajectory.poses[:, :2] - truth).T)
        rows = zip(plan.trajectory.times_s[known], error_m[known], strict=True)
        errors += [(float(at), float(off)) for at, off in rows]
        if known.all():
            finals.append(float(error_m[-1]))
    by_second = []
    for second in (1.0, 2.0, 3.0, 4.0, 5.0):
        chosen = [off for at, off in errors if at <= second + 1e-9]
        if chosen and any(abs(at - second) < 1e-9 for at, _ in errors):
            by_second.append((second, float(np.mean(chosen))))
    return OpenLoopError(
        float(np.mean([off for _, off in errors])) if errors else None,
        float(np.mean(finals)) if finals else None,
        len(errors),
        len(finals),
        tuple(by_second),
    )
