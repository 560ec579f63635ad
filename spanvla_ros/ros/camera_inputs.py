"""Camera messages as they arrive: the newest of each camera is kept, decoding happens later.

Callbacks only store; the planner's thread takes, so that a JPEG never delays the odometry.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    fit_picture,
    read_camera_info,
    read_compressed_image,
    read_image,
    stamp_ns_of,
)
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.ros.diagnostics import InputMeter
from spanvla_ros.types import CameraFrame

NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


@dataclass
class Intake:
    """One camera: its newest message, not yet taken, and its intrinsics."""

    camera: CameraSpec
    meter: InputMeter
    info_meter: InputMeter
    message: Any = None
    stamp_ns: int = 0
    compressed: bool = False
    info: Intrinsics | None = None


class CameraInputs:
    """Subscriptions of all cameras of a model; the first camera is the anchor."""

    def __init__(
        self,
        node: Node,
        cameras: Sequence[CameraSpec],
        topics: dict[str, str],
        timeout_s: float,
        *,
        use_cv_bridge: bool = False,
    ) -> None:
        """Subscribe on `node`.

        Args:
            node: the node.
            cameras: the model's cameras, the anchor first.
            topics: image topic by camera name, where not `input/<camera>/image`.
            timeout_s: silence after which a camera is reported stale.
            use_cv_bridge: convert raw images with cv_bridge where it is installed.
        """
        self._node = node
        self._use_cv_bridge = use_cv_bridge
        self._news = threading.Condition()
        self._woken = False
        self.intakes = {
            camera.name: Intake(
                camera,
                InputMeter(f'input/{camera.name}/image', timeout_s),
                InputMeter(f'input/{camera.name}/camera_info', timeout_s, required=False),
            )
            for camera in cameras
        }
        self._anchor = self.intakes[cameras[0].name]
        self._subscriptions: list[Any] = []
        for intake in self.intakes.values():
            base = f'input/{intake.camera.name}'
            self._subscribe(intake, base, topics.get(intake.camera.name, f'{base}/image'))

    def _subscribe(self, intake: Intake, base: str, topic: str) -> None:
        def on_raw(message: Image) -> None:
            self._store(intake, message, compressed=False)

        def on_compressed(message: CompressedImage) -> None:
            self._store(intake, message, compressed=True)

        def on_info(message: CameraInfo) -> None:
            now_ns = self._node.get_clock().now().nanoseconds
            try:
                intake.info = read_camera_info(message)
                intake.info_meter.arrived(now_ns, stamp_ns_of(message.header))
            except MessageError as error:
                intake.info_meter.fault(now_ns, str(error))

        create = self._node.create_subscription
        self._subscriptions += [
            create(Image, topic, on_raw, NEWEST),
            create(CompressedImage, f'{topic}/compressed', on_compressed, NEWEST),
            create(CameraInfo, f'{base}/camera_info', on_info, NEWEST),
        ]

    def _store(self, intake: Intake, message: Any, *, compressed: bool) -> None:
        with self._news:
            if intake.message is not None:
                intake.meter.dropped += 1
            intake.message, intake.compressed = message, compressed
            intake.stamp_ns = stamp_ns_of(message.header)
            self._news.notify()

    @property
    def meters(self) -> dict[str, InputMeter]:
        """The picture meter of each camera."""
        return {name: intake.meter for name, intake in self.intakes.items()}

    def wake(self) -> None:
        """Let a waiting `wait_for_anchor` return."""
        with self._news:
            self._woken = True
            self._news.notify()

    @property
    def anchor_waits(self) -> bool:
        """Whether a new picture of the anchor camera is there."""
        return self._anchor.message is not None

    def wait_for_anchor(self, timeout_s: float) -> bool:
        """Wait for a new picture of the anchor camera; False if none came in time."""
        with self._news:
            self._news.wait_for(lambda: self._anchor.message is not None or self._woken, timeout_s)
            self._woken = False
            return self._anchor.message is not None

    def take(self, wait_s: float) -> tuple[int | None, list[CameraFrame]]:
        """Decode what is new on every camera.

        Pictures of one exposure come in one after another, so the other cameras are given
        `wait_s` to catch up with the anchor.

        Returns:
            The anchor's stamp, None where its picture was refused, and the good pictures.
        """
        with self._news:
            anchor_ns = self._anchor.stamp_ns
            others = [intake for intake in self.intakes.values() if intake.meter.received]
            self._news.wait_for(
                lambda: self._woken or all(other.stamp_ns >= anchor_ns for other in others), wait_s
            )
            taken = []
            for intake in self.intakes.values():
                if intake.message is not None:
                    taken.append((intake, intake.message, intake.compressed))
                    intake.message = None
        frames = [frame for item in taken if (frame := self._decode(*item)) is not None]
        anchor = self._anchor.camera.name
        stamp_ns = next((frame.stamp_ns for frame in frames if frame.camera == anchor), None)
        return stamp_ns, frames

    def _decode(self, intake: Intake, message: Any, compressed: bool) -> CameraFrame | None:  # noqa: FBT001
        camera, now_ns = intake.camera, self._node.get_clock().now().nanoseconds
        try:
            if compressed:
                frame = read_compressed_image(message, camera.name, intake.info)
            else:
                frame = read_image(
                    message, camera.name, intake.info, use_cv_bridge=self._use_cv_bridge
                )
            picture = fit_picture(
                frame.image, intake.info, camera.width_px, camera.height_px, camera.fov_deg
            )
        except MessageError as error:
            intake.meter.fault(now_ns, str(error))
            return None
        intake.meter.arrived(now_ns, frame.stamp_ns)
        return CameraFrame(camera.name, frame.stamp_ns, picture)

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
