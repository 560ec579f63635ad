"""Camera messages as they arrive: kept until the anchor's picture comes, decoded afterwards.

Callbacks only store; the planner's thread takes, so that a JPEG never delays the odometry. Of
each camera the picture nearest in time to the anchor's is decoded, and no other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    read_camera_info,
    read_compressed_image,
    read_image,
    stamp_ns_of,
)
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.ros.diagnostics import InputMeter
from spanvla_ros.ros.extrinsics import Extrinsics
from spanvla_ros.ros.parameters import PlannerSettings
from spanvla_ros.runtime.virtual_camera import Mount, VirtualCamera, centered
from spanvla_ros.types import CameraFrame

NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
# A camera three times as fast as the anchor still has its nearest picture here.
WAITING = 6
# What a middleware that does not number its messages says instead.
UNNUMBERED = 2**64 - 1


@dataclass(frozen=True)
class Arrival:
    """A message of a camera, not decoded yet."""

    stamp_ns: int
    message: Any
    compressed: bool


@dataclass
class Intake:
    """One camera: its messages not yet taken, and how its pictures become the model's."""

    camera: CameraSpec
    meter: InputMeter
    info_meter: InputMeter
    rectified: bool
    waiting: deque[Arrival] = field(default_factory=deque)
    stamp_ns: int = 0
    received: int = 0
    unmatched: int = 0
    numbers: dict[bool, int] = field(default_factory=dict)
    source: tuple[Intrinsics, Mount | None] | None = None
    view: VirtualCamera | None = None


class CameraInputs:
    """Subscriptions of all cameras of a model; the first camera is the anchor."""

    def __init__(
        self,
        node: Node,
        cameras: Sequence[CameraSpec],
        settings: PlannerSettings,
        extrinsics: Extrinsics,
    ) -> None:
        """Subscribe on `node`.

        Args:
            node: the node.
            cameras: the model's cameras, the anchor first.
            settings: the planner's parameters.
            extrinsics: where the rig's cameras stand.
        """
        self._node = node
        self._use_cv_bridge = settings.use_cv_bridge
        self._extrinsics = extrinsics
        self._tolerance_ns = round(settings.sync_tolerance_ms * 1e6)
        self._news = threading.Condition()
        self._woken = False
        self.intakes: dict[str, Intake] = {}
        self._subscriptions: list[Any] = []
        topics = dict(pair.split('=', 1) for pair in settings.camera_topics if '=' in pair)
        for camera in cameras:
            base = f'input/{camera.name}'
            topic = topics.get(camera.name, f'{base}/image')
            intake = Intake(
                camera,
                InputMeter(f'{base}/image', settings.input_timeout_s),
                InputMeter(f'{base}/camera_info', settings.input_timeout_s, required=False),
                settings.pictures == 'rectified'
                or (settings.pictures == 'auto' and 'rect' in node.resolve_topic_name(topic)),
            )
            self.intakes[camera.name] = intake
            self._subscribe(intake, base, topic)
        self._anchor = self.intakes[cameras[0].name]

    def _subscribe(self, intake: Intake, base: str, topic: str) -> None:
        def on_raw(message: Image, info: Mapping[str, Any]) -> None:
            self._store(intake, message, info, compressed=False)

        def on_compressed(message: CompressedImage, info: Mapping[str, Any]) -> None:
            self._store(intake, message, info, compressed=True)

        def on_info(message: CameraInfo) -> None:
            self._on_info(intake, message)

        create = self._node.create_subscription
        self._subscriptions += [
            create(Image, topic, on_raw, NEWEST),
            create(CompressedImage, f'{topic}/compressed', on_compressed, NEWEST),
            create(CameraInfo, f'{base}/camera_info', on_info, NEWEST),
        ]

    def _on_info(self, intake: Intake, message: CameraInfo) -> None:
        now_ns = self._node.get_clock().now().nanoseconds
        camera, meter = intake.camera, intake.info_meter
        try:
            info = read_camera_info(message, rectified=intake.rectified)
            mount, doubt = self._extrinsics.mount(camera.name, str(message.header.frame_id))
            source = (info, mount)
            if intake.source is None or not _equal(source, intake.source):
                intake.view, intake.source = VirtualCamera(camera, info, mount), source
        except MessageError as error:
            meter.fault(now_ns, str(error))
            return
        view = intake.view
        meter.warning = doubt or ('' if view is None else view.warning)
        if view is not None:
            meter.extra['seen'] = f'{view.seen:.2f}'
        if view is not None and view.fault:
            meter.fault(now_ns, view.fault)
        else:
            meter.arrived(now_ns, stamp_ns_of(message.header))

    def _store(
        self, intake: Intake, message: Any, info: Mapping[str, Any], *, compressed: bool
    ) -> None:
        room = 1 if intake is self._anchor else WAITING
        with self._news:
            _count_losses(intake, info, compressed=compressed)
            while len(intake.waiting) >= room:
                intake.waiting.popleft()
                intake.meter.dropped += 1
            intake.stamp_ns = stamp_ns_of(message.header)
            intake.received += 1
            intake.waiting.append(Arrival(intake.stamp_ns, message, compressed))
            self._news.notify()

    @property
    def meters(self) -> Mapping[str, InputMeter]:
        """The picture meter of each camera."""
        return {name: intake.meter for name, intake in self.intakes.items()}

    def wake(self) -> None:
        """Let a waiting `wait_for_anchor` return."""
        with self._news:
            self._woken = True
            self._news.notify()

    def wait_for_anchor(self, timeout_s: float) -> bool:
        """Wait for a new picture of the anchor camera; False if none came in time."""
        with self._news:
            self._news.wait_for(lambda: self._anchor.waiting or self._woken, timeout_s)
            self._woken = False
            return bool(self._anchor.waiting)

    def take(self, wait_s: float) -> tuple[int | None, list[CameraFrame]]:
        """Decode the anchor's picture and, of each other camera, the one nearest to it in time.

        Pictures of one exposure come in one after another, so the other cameras are given
        `wait_s` to catch up with the anchor.

        Returns:
            The anchor's stamp, None where its picture was refused, and the good pictures.
        """
        with self._news:
            anchor_ns = self._anchor.stamp_ns
            others = [intake for intake in self.intakes.values() if intake.received]
            self._news.wait_for(
                lambda: self._woken or all(other.stamp_ns >= anchor_ns for other in others), wait_s
            )
            chosen = [(intake, self._nearest(intake, anchor_ns)) for intake in others]
        frames = [
            frame
            for intake, arrival in chosen
            if arrival is not None and (frame := self._decode(intake, arrival)) is not None
        ]
        anchor = self._anchor.camera.name
        stamp_ns = next((frame.stamp_ns for frame in frames if frame.camera == anchor), None)
        return stamp_ns, frames

    def _nearest(self, intake: Intake, anchor_ns: int) -> Arrival | None:
        """Take the message nearest to the anchor's stamp; newer ones wait for a later anchor."""
        waiting = intake.waiting
        off_ns = [abs(arrival.stamp_ns - anchor_ns) for arrival in waiting]
        if not off_ns or min(off_ns) > self._tolerance_ns:
            intake.unmatched += 1
            intake.meter.extra['unmatched'] = str(intake.unmatched)
        if not off_ns:
            return None
        for _ in range(off_ns.index(min(off_ns))):
            waiting.popleft()
            intake.meter.dropped += 1
        arrival = waiting.popleft()
        intake.meter.extra['skew_ms'] = f'{(arrival.stamp_ns - anchor_ns) / 1e6:.1f}'
        return arrival

    def _decode(self, intake: Intake, arrival: Arrival) -> CameraFrame | None:
        camera, view, message = intake.camera, intake.view, arrival.message
        now_ns = self._node.get_clock().now().nanoseconds
        try:
            if view is not None and view.fault:
                raise MessageError(view.fault)
            if arrival.compressed:
                frame = read_compressed_image(message, camera.name)
            else:
                frame = read_image(message, camera.name, use_cv_bridge=self._use_cv_bridge)
            fitted = centered(frame.image, camera) if view is None else view.fit(frame.image)
        except MessageError as error:
            intake.meter.fault(now_ns, str(error))
            return None
        intake.meter.arrived(now_ns, frame.stamp_ns)
        return CameraFrame(camera.name, frame.stamp_ns, fitted)

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()


def _count_losses(intake: Intake, info: Mapping[str, Any], *, compressed: bool) -> None:
    """Count what the publisher sent between the last message and this one; Humble cannot tell."""
    number = int(info.get('publication_sequence_number', UNNUMBERED))
    last = intake.numbers.get(compressed, UNNUMBERED)
    intake.numbers[compressed] = number
    # A publisher that was started again counts from the beginning.
    if last < number < UNNUMBERED:
        intake.meter.lost += number - last - 1


def _equal(one: tuple[Intrinsics, Mount | None], other: tuple[Intrinsics, Mount | None]) -> bool:
    (info, mount), (other_info, other_mount) = one, other
    if info != other_info or (mount is None) != (other_mount is None):
        return False
    if mount is None or other_mount is None:
        return True
    places = (mount.place_m == other_mount.place_m).all()
    return bool(places and (mount.base_from_optical == other_mount.base_from_optical).all())
