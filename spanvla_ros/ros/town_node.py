"""The town in real time: cameras, odometry and route out, a twist in.

Physics runs in its own thread on a drift-free clock whose step divides the camera period, so that
every exposure falls on a step. Drawing runs in a second thread and takes the newest exposure:
a slow picture is lost, it never delays the car.
"""

from __future__ import annotations

import itertools
import json
import math
import queue
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import PoseStamped, Twist
from nav_msgs.msg import Odometry, Path
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String

from spanvla_ros.model.config import TOWN_CAMERAS, CameraSpec
from spanvla_ros.ros.camera_link import CameraLink
from spanvla_ros.ros.diagnostics import (
    OK,
    WARN,
    DiagnosticsPublisher,
    InputMeter,
    StageMeter,
    status,
)
from spanvla_ros.ros.parameters import TownSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.safety.clock import ClockWatch
from spanvla_ros.safety.state import load_vehicle
from spanvla_ros.scoring.scene import scene_to_json
from spanvla_ros.town.camera import Renderer, camera_matrix
from spanvla_ros.town.elements import Box, GroundPolygon, Tint
from spanvla_ros.town.scenarios import make_world, ranges_sha256
from spanvla_ros.types import DriveCommand, EgoState, Scene, SceneMap

ODOMETRY_HZ = 50.0
SCENE_PERIOD_S = 0.1
SCENES_PER_MAP = 10
STATUS_PERIOD_S = 0.5
# What is farther away lies within a row of the horizon.
SIGHT_M = 250.0
SIGHT_STEP_M = 20.0
MOVING_MPS = 0.05
# A step that comes later than this is a stalled machine: the car has driven on, unseen, but for
# no longer than the second; a longer stall is left out of its time.
MAX_LAG_S = 0.25
MAX_UNSEEN_S = 1.0


@dataclass(frozen=True)
class Exposure:
    """What some cameras see at one instant."""

    cameras: tuple[CameraSpec, ...]
    stamp_ns: int
    pose: np.ndarray
    boxes: tuple[Box, ...]
    tint: Tint


@dataclass(frozen=True)
class Truth:
    """One moment for `town/scene`."""

    scene: Scene
    town: dict[str, Any]
    with_map: bool


class TownNode(QuietNode):
    """Real-time town, node name `town`."""

    def __init__(self) -> None:
        """Make the world and start its threads."""
        super().__init__('town')
        self.settings = settings = declare(self, TownSettings)
        self.vehicle = load_vehicle(settings.vehicle_file)
        self.world = make_world(settings.scenario, settings.seed, vehicle=self.vehicle)
        if settings.wait_for_driver:
            # Standing still is the one motion that may last as long as the driver needs.
            self.world.place_ego(replace(self.world.state, speed_mps=0.0, yaw_rate_radps=0.0))
        self.cameras = TOWN_CAMERAS
        self._stop = threading.Event()
        self._command: tuple[Twist, float] | None = None
        self._moving = not settings.wait_for_driver
        self._late_steps = 0
        self._undrawn = 0
        self._meter = StageMeter()
        self._clock_watch = ClockWatch()
        self._clock_meter = InputMeter('clock', settings.command_timeout_s, required=False)
        self._truths: queue.Queue[Truth] = queue.Queue(maxsize=4)
        self._ranges_sha256 = ranges_sha256()
        self._make_topics()
        self._steps_per_exposure = math.ceil(ODOMETRY_HZ / settings.camera_hz)
        self.step_s = 1.0 / (settings.camera_hz * self._steps_per_exposure)
        self._shutters = self._shutters_by_step()
        self._exposures: queue.Queue[Exposure] = queue.Queue(maxsize=len(self._shutters))
        self._link = CameraLink(
            settings.camera_loss, settings.camera_jitter_ms / 1e3, settings.seed
        )
        self._threads = [
            threading.Thread(target=self._run_physics, name='physics', daemon=True),
            threading.Thread(target=self._run_camera, name='camera', daemon=True),
            threading.Thread(target=self._run_truth, name='truth', daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _make_topics(self) -> None:
        latched = QoSProfile(
            depth=1,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self._odometry = self.create_publisher(Odometry, 'input/odometry', 50)
        self._route = self.create_publisher(Path, 'input/route', latched)
        self._navigation = self.create_publisher(String, 'input/command', 1)
        self._scene = self.create_publisher(String, 'town/scene', 10)
        self._status = self.create_publisher(String, 'town/status', latched)
        kind = CompressedImage if self.settings.image_transport == 'compressed' else Image
        tail = '/compressed' if kind is CompressedImage else ''
        self._images = {}
        self._infos = {}
        self._info_messages = {camera.name: camera_info_message(camera) for camera in self.cameras}
        for camera in self.cameras:
            base = f'input/{camera.name}'
            self._images[camera.name] = self.create_publisher(kind, f'{base}/image{tail}', 5)
            self._infos[camera.name] = self.create_publisher(CameraInfo, f'{base}/camera_info', 5)
        self.create_subscription(Twist, 'output/twist', self._on_twist, 1)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)

    def _on_twist(self, message: Twist) -> None:
        if not (math.isfinite(message.linear.x) and math.isfinite(message.angular.z)):
            return
        self._command = (message, time.monotonic())
        if message.linear.x > MOVING_MPS:
            self._moving = True

    def _publish_diagnostics(self) -> None:
        values = {
            'scenario': self.settings.scenario,
            'seed': str(self.settings.seed),
            'late_steps': str(self._late_steps),
            'undrawn_exposures': str(self._undrawn),
            'lost_on_purpose': str(self._link.lost.total()),
            **self._meter.values(),
        }
        level, text = (OK, 'ok') if self._moving else (WARN, 'waiting for the driver')
        self._diagnostics.publish([status('world', level, text, values)], [self._clock_meter])

    # Physics thread.

    def _run_physics(self) -> None:
        self._route.publish(self._route_message())
        start_ns = self.get_clock().now().nanoseconds
        start_s = time.monotonic()
        finished = False
        for step in itertools.count():
            elapsed_s = step * self.step_s
            wait_s = start_s + elapsed_s - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            elif -wait_s > MAX_LAG_S:
                self._late_steps += 1
                start_s -= wait_s
                start_ns -= round(wait_s * 1e9)
                for _ in range(int(min(-wait_s, MAX_UNSEEN_S) / self.step_s)):
                    self._move()
            if self._stop.is_set():
                return
            now_ns = int(self.get_clock().now().nanoseconds)
            jump = self._clock_watch.observe(now_ns)
            if jump is not None:
                # The drive goes on; its stamps follow the clock that everybody else goes by.
                self._clock_meter.fault(now_ns, f'{jump}: stamps follow')
                start_ns = now_ns - round(elapsed_s * 1e9)
            if step:
                self._move()
            stamp_ns = start_ns + round(elapsed_s * 1e9)
            self._odometry.publish(self._odometry_message(self.world.ego, stamp_ns))
            exposed = self._shutters.get(step % self._steps_per_exposure)
            if exposed is not None:
                self._expose(exposed, stamp_ns)
            ended = self.world.finished and not finished
            if ended or self._due(step, SCENE_PERIOD_S):
                with_map = self._due(step, SCENE_PERIOD_S, SCENES_PER_MAP)
                self._offer_truth(stamp_ns, with_map=with_map)
            if self._due(step, STATUS_PERIOD_S) or self.world.finished != finished:
                finished = self.world.finished
                self._publish_status()

    def _move(self) -> None:
        if self._moving:
            self.world.step(self._drive_command(), self.step_s)

    def _due(self, step: int, period_s: float, periods: int = 1) -> bool:
        """Whether a period, or a number of them, begins with this step."""
        return step % (periods * max(1, round(period_s / self.step_s))) == 0

    def _drive_command(self) -> DriveCommand:
        limit = self.vehicle
        command = self._command
        ego = self.world.ego
        if command is None or time.monotonic() - command[1] > self.settings.command_timeout_s:
            return DriveCommand(
                0.0, 0.0, -limit.max_decel_mps2, ego.steering_rad, braking=True, reason='silence'
            )
        twist = command[0]
        speed_mps, yaw_rate_radps = float(twist.linear.x), float(twist.angular.z)
        curvature = yaw_rate_radps / max(speed_mps, ego.speed_mps, 0.1)
        accel_mps2 = min(
            max((speed_mps - ego.speed_mps) / 0.2, -limit.max_decel_mps2), limit.max_accel_mps2
        )
        steering_rad = math.atan(limit.wheelbase_m * curvature)
        braking = speed_mps <= 0.0
        return DriveCommand(speed_mps, yaw_rate_radps, accel_mps2, steering_rad, braking)

    def _shutters_by_step(self) -> dict[int, tuple[CameraSpec, ...]]:
        """Which cameras expose at which step of a camera period; the anchor at the first.

        The others do so by turns after and before the anchor, by `camera_skew_ms` rounded up to
        a step.
        """
        skew = math.ceil(self.settings.camera_skew_ms / 1e3 / self.step_s - 1e-6)
        steps: dict[int, tuple[CameraSpec, ...]] = {}
        for index, camera in enumerate(self.cameras):
            off = 0 if index == 0 else -skew if index % 2 == 0 else skew
            at = off % self._steps_per_exposure
            steps[at] = (*steps.get(at, ()), camera)
        return steps

    def _expose(self, cameras: tuple[CameraSpec, ...], stamp_ns: int) -> None:
        ego = self.world.ego
        boxes = tuple(
            box
            for box in self.world.boxes()
            if math.hypot(box.x_m - ego.x_m, box.y_m - ego.y_m) < SIGHT_M
        )
        exposure = Exposure(cameras, stamp_ns, ego.pose, boxes, self.world.tint)
        try:
            self._exposures.put_nowait(exposure)
        except queue.Full:
            self._undrawn += 1

    def _odometry_message(self, ego: EgoState, stamp_ns: int) -> Odometry:
        message = Odometry()
        message.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        message.header.frame_id = 'odom'
        message.child_frame_id = 'base_link'
        pose = message.pose.pose
        pose.position.x, pose.position.y = float(ego.x_m), float(ego.y_m)
        pose.orientation.z = math.sin(ego.yaw_rad / 2.0)
        pose.orientation.w = math.cos(ego.yaw_rad / 2.0)
        message.twist.twist.linear.x = float(ego.speed_mps)
        message.twist.twist.angular.z = float(ego.yaw_rate_radps)
        return message

    def _route_message(self) -> Path:
        route = self.world.route()
        message = Path()
        message.header.frame_id = 'odom'
        message.header.stamp = self.get_clock().now().to_msg()
        for x_m, y_m in route.points:
            pose = PoseStamped()
            pose.header = message.header
            pose.pose.position.x, pose.pose.position.y = float(x_m), float(y_m)
            pose.pose.orientation.w = 1.0
            message.poses.append(pose)
        return message

    def _offer_truth(self, stamp_ns: int, *, with_map: bool) -> None:
        outcome = self.world.outcome()
        town = {
            'stamp_ns': stamp_ns,
            'time_s': self.world.time_s,
            'moving': self._moving,
            'scenario': self.settings.scenario,
            'seed': self.settings.seed,
            'scenario_ranges_sha256': self._ranges_sha256,
            'collided': bool(outcome.collided),
            'offroad_m': float(outcome.offroad_m),
            'red_lights_run': int(outcome.red_lights_run),
            'completion': float(outcome.completion),
            'distance_m': float(outcome.distance_m),
            'finished': bool(self.world.finished),
        }
        with suppress(queue.Full):
            self._truths.put_nowait(Truth(self.world.scene(), town, with_map))

    def _publish_status(self) -> None:
        ego = self.world.ego
        content = {
            'time_s': round(self.world.time_s, 2),
            'moving': self._moving,
            'speed_mps': round(float(ego.speed_mps), 2),
            'distance_m': round(float(self.world.outcome().distance_m), 1),
            'finished': bool(self.world.finished),
        }
        self._status.publish(String(data=json.dumps(content)))
        self._navigation.publish(String(data=self.world.command()))

    # Truth thread.

    def _run_truth(self) -> None:
        map_text = ''
        while not self._stop.is_set():
            try:
                truth = self._truths.get(timeout=0.2)
            except queue.Empty:
                continue
            # The map is large and never changes: it is written as text only once.
            map_text = map_text or json.dumps(scene_to_json(truth.scene)['map'])
            content = scene_to_json(replace(truth.scene, map=SceneMap(())))
            content['map'] = None
            content['town'] = truth.town
            text = json.dumps(content, allow_nan=False)
            if truth.with_map:
                text = text.replace('"map": null', f'"map": {map_text}', 1)
            self._scene.publish(String(data=text))

    # Camera thread.

    def _run_camera(self) -> None:
        renderers = {cameras: Renderer(cameras) for cameras in self._shutters.values()}
        ground = self.world.ground()
        near, near_of = ground, None
        while not self._stop.is_set():
            try:
                exposure = self._exposures.get(timeout=0.2)
            except queue.Empty:
                continue
            begin_s = time.perf_counter()
            place = exposure.pose[:2]
            if near_of is None or np.hypot(*(place - near_of)) > SIGHT_STEP_M:
                near, near_of = _within(ground, place, SIGHT_M + SIGHT_STEP_M), place
            renderer = renderers[exposure.cameras]
            pictures = renderer.draw(near, exposure.boxes, exposure.tint, exposure.pose)
            drawn_s = time.perf_counter()
            for camera, picture in zip(exposure.cameras, pictures, strict=True):
                publish = partial(self._publish_picture, camera, picture, exposure.stamp_ns)
                self._link.send(camera.name, publish)
            self._meter.add(
                {
                    'draw_ms': (drawn_s - begin_s) * 1e3,
                    'publish_ms': (time.perf_counter() - drawn_s) * 1e3,
                }
            )

    def _publish_picture(self, camera: CameraSpec, picture: np.ndarray, stamp_ns: int) -> None:
        stamp = Time(nanoseconds=stamp_ns).to_msg()
        frame_id = f'{camera.name}_optical_frame'
        info = self._info_messages[camera.name]
        info.header.stamp, info.header.frame_id = stamp, frame_id
        self._infos[camera.name].publish(info)
        if self.settings.image_transport == 'compressed':
            _, jpeg = cv2.imencode('.jpg', picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            message = CompressedImage(format='jpeg')
            message.data.frombytes(jpeg.tobytes())
        else:
            message = Image(
                height=camera.height_px,
                width=camera.width_px,
                encoding='rgb8',
                step=camera.width_px * 3,
            )
            message.data.frombytes(picture.tobytes())
        message.header.stamp, message.header.frame_id = stamp, frame_id
        self._images[camera.name].publish(message)

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._link.close()


def _within(
    ground: tuple[GroundPolygon, ...], place: np.ndarray, radius_m: float
) -> tuple[GroundPolygon, ...]:
    """The polygons whose bounding box comes within `radius_m` of a place."""
    return tuple(
        polygon
        for polygon in ground
        if np.all(polygon.points.min(axis=0) < place + radius_m)
        and np.all(polygon.points.max(axis=0) > place - radius_m)
    )


def camera_info_message(camera: CameraSpec) -> CameraInfo:
    """The `CameraInfo` of a drawn camera: a pinhole without distortion."""
    matrix = camera_matrix(camera)
    info = CameraInfo(height=camera.height_px, width=camera.width_px)
    info.distortion_model = 'plumb_bob'
    info.d = [0.0] * 5
    info.k = matrix.ravel().tolist()
    info.r = np.eye(3).ravel().tolist()
    info.p = np.hstack([matrix, np.zeros((3, 1))]).ravel().tolist()
    return info


def main() -> int:
    """Run the town until a signal."""
    cv2.setNumThreads(1)
    return run_node(TownNode)


if __name__ == '__main__':
    sys.exit(main())
