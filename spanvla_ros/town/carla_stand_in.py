"""A stand-in for a CARLA server with its ros-bridge: same topics, same signs, synchronous ticks.

It is the town's world on an OpenDRIVE map, not CARLA: pictures are flat-colored, physics is a
bicycle. What it holds to is the contract: `bgra8` pictures with the bridge's camera_info,
odometry of the vehicle's origin in `map` with a body twist, waypoints each meter, a speedometer
in m/s, steering to the right positive, one control message a tick.

Messages are made by a function the caller hands in, so that they may be rclpy's, rosbags' or any
objects with the same attributes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spanvla_ros.controls import CarlaCar, set_stamp
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.motion import SPEED_RESPONSE_S
from spanvla_ros.town.traffic import World
from spanvla_ros.types import DriveCommand

TICK_S = 0.05
START_NS = 10_000_000_000
Make = Callable[[str], Any]


@dataclass(frozen=True)
class Topic:
    """A message, where it goes and of which type it is."""

    name: str
    kind: str
    message: Any


class StandIn:
    """One ego vehicle in a world, ticked by its control."""

    def __init__(
        self,
        world: World,
        cameras: Sequence[CameraSpec],
        make: Make,
        *,
        role_name: str = 'hero',
        car: CarlaCar | None = None,
        camera_every: int = 2,
    ) -> None:
        """Stand at the world's start.

        Args:
            world: driven in place.
            cameras: of the rig; their ids are the cameras' names.
            make: gives an empty message of a type, such as `nav_msgs/msg/Odometry`.
            role_name: of the ego vehicle.
            car: how it answers its pedals.
            camera_every: pictures come with each such tick.
        """
        self.world = world
        self.role_name = role_name
        self.car = car or CarlaCar()
        self._renderer = Renderer(cameras)
        self._make = make
        self._camera_every = camera_every
        self._ticks = 0
        self._command = self._braking()

    @property
    def now_ns(self) -> int:
        """The simulation's time."""
        return START_NS + round(self._ticks * TICK_S * 1e9)

    @property
    def origin_ahead_m(self) -> float:
        """How far the vehicle's origin, its middle, lies ahead of its rear axle."""
        return self.world.vehicle.rear_axle_to_center_m

    def latched(self) -> list[Topic]:
        """What is published once: the waypoints."""
        path = self._make('nav_msgs/msg/Path')
        path.header.frame_id = 'map'
        set_stamp(path.header, self.now_ns)
        for x_m, y_m in self.world.route().points.tolist():
            pose = self._make('geometry_msgs/msg/PoseStamped')
            pose.pose.position.x, pose.pose.position.y = x_m, y_m
            pose.pose.orientation.w = 1.0
            path.poses.append(pose)
        return [self._topic('waypoints', 'nav_msgs/msg/Path', path)]

    def tick(self) -> list[Topic]:
        """Move on by one tick under the last control, and say what the bridge would say."""
        if self._ticks:
            self.world.step(self._command, TICK_S)
        self._ticks += 1
        found = [self._clock(), self._odometry(), self._speedometer()]
        if (self._ticks - 1) % self._camera_every == 0:
            found += self._pictures()
        return found

    def apply_control(self, message: Any) -> None:
        """Take a `CarlaEgoVehicleControl`: pedals into acceleration, steer into wheel angle."""
        car, ego = self.car, self.world.ego
        accel = float(message.throttle) * car.full_throttle_mps2
        accel -= float(message.brake) * car.full_brake_mps2
        if not message.throttle:
            accel -= car.engine_brake_mps2
        accel -= car.resistance_mps2 + car.drag_per_m * ego.speed_mps**2
        speed_mps = max(ego.speed_mps + accel * SPEED_RESPONSE_S, 0.0)
        # To the right is positive in CARLA and negative here.
        steering_rad = -float(message.steer) * car.full_lock_rad
        self._command = DriveCommand(speed_mps, 0.0, accel, steering_rad)

    def apply_twist(self, message: Any) -> None:
        """Take a `geometry_msgs/Twist`, for graphs without CARLA's messages."""
        ego, wheelbase_m = self.world.ego, self.world.vehicle.wheelbase_m
        speed_mps, turning = float(message.linear.x), float(message.angular.z)
        curvature = turning / max(speed_mps, ego.speed_mps, 0.1)
        accel = (speed_mps - ego.speed_mps) / SPEED_RESPONSE_S
        self._command = DriveCommand(
            max(speed_mps, 0.0), turning, accel, math.atan(wheelbase_m * curvature)
        )

    def _braking(self) -> DriveCommand:
        return DriveCommand(0.0, 0.0, -self.car.full_brake_mps2, 0.0, braking=True)

    def _topic(self, name: str, kind: str, message: Any) -> Topic:
        return Topic(f'/carla/{self.role_name}/{name}', kind, message)

    def _clock(self) -> Topic:
        message = self._make('rosgraph_msgs/msg/Clock')
        message.clock.sec, message.clock.nanosec = divmod(self.now_ns, 1_000_000_000)
        return Topic('/clock', 'rosgraph_msgs/msg/Clock', message)

    def _odometry(self) -> Topic:
        ego, ahead_m = self.world.ego, self.origin_ahead_m
        message = self._make('nav_msgs/msg/Odometry')
        message.header.frame_id, message.child_frame_id = 'map', self.role_name
        set_stamp(message.header, self.now_ns)
        pose, twist = message.pose.pose, message.twist.twist
        pose.position.x = float(ego.x_m + ahead_m * math.cos(ego.yaw_rad))
        pose.position.y = float(ego.y_m + ahead_m * math.sin(ego.yaw_rad))
        pose.orientation.w = math.cos(ego.yaw_rad / 2.0)
        pose.orientation.z = math.sin(ego.yaw_rad / 2.0)
        twist.linear.x = float(ego.speed_mps)
        twist.linear.y = float(ahead_m * ego.yaw_rate_radps)
        twist.angular.z = float(ego.yaw_rate_radps)
        return self._topic('odometry', 'nav_msgs/msg/Odometry', message)

    def _speedometer(self) -> Topic:
        message = self._make('std_msgs/msg/Float32')
        message.data = float(self.world.ego.speed_mps)
        return self._topic('speedometer', 'std_msgs/msg/Float32', message)

    def _pictures(self) -> list[Topic]:
        world = self.world
        pictures = self._renderer.draw(world.ground(), world.boxes(), world.tint, world.ego.pose)
        found = []
        for camera, picture in zip(self._renderer.cameras, pictures, strict=True):
            info = self._camera_info(camera)
            image = self._make('sensor_msgs/msg/Image')
            for message in (info, image):
                message.header.frame_id = f'{self.role_name}/{camera.name}'
                set_stamp(message.header, self.now_ns)
                message.width, message.height = camera.width_px, camera.height_px
            image.encoding, image.step = 'bgra8', 4 * camera.width_px
            opaque = np.full((*picture.shape[:2], 1), 255, np.uint8)
            pixels = np.concatenate([picture[:, :, ::-1], opaque], axis=2)
            if isinstance(image.data, array):
                # rclpy's own kind of array; anything else it would copy byte by byte.
                image.data.frombytes(pixels.tobytes())
            else:
                image.data = np.ascontiguousarray(pixels).reshape(-1)
            found += [
                self._topic(f'{camera.name}/camera_info', 'sensor_msgs/msg/CameraInfo', info),
                self._topic(f'{camera.name}/image', 'sensor_msgs/msg/Image', image),
            ]
        return found

    def _camera_info(self, camera: CameraSpec) -> Any:
        info = self._make('sensor_msgs/msg/CameraInfo')
        # The bridge puts the principal point at half the size.
        focal, cx, cy = camera.focal_px, camera.width_px / 2.0, camera.height_px / 2.0
        info.distortion_model = 'plumb_bob'
        info.d = np.zeros(5)
        info.k = np.array([focal, 0.0, cx, 0.0, focal, cy, 0.0, 0.0, 1.0])
        info.r = np.eye(3).ravel()
        info.p = np.array([focal, 0.0, cx, 0.0, 0.0, focal, cy, 0.0, 0.0, 0.0, 1.0, 0.0])
        return info
