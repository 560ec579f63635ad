"""Camera messages as they arrive: kept until the anchor's picture comes, decoded afterwards.

Only the anchor's pictures wake the node, and its callback only stores. The planner's thread takes
what the other cameras and the `camera_info` topics have brought when it wants to plan: waking up
for a message costs more than reading it. Of each camera the picture nearest in time to the
anchor's is decoded, and no other.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    read_camera_info,
    read_compressed_image,
    read_image,
)
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.ros.by_hand import subscribe_by_hand, taken
from spanvla_ros.ros.cdr import HEAD_BYTES, message_of_bytes, stamp_ns_of_bytes
from spanvla_ros.ros.diagnostics import InputMeter
from spanvla_ros.ros.extrinsics import Extrinsics
from spanvla_ros.ros.message_bytes import compressed_image_of_bytes, image_of_bytes
from spanvla_ros.ros.parameters import PlannerSettings
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.runtime.virtual_camera import Mount, VirtualCamera, centered
from spanvla_ros.types import CameraFrame

# A camera three times as fast as the anchor still has its nearest picture here.
WAITING = 6
NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
RECENT = QoSProfile(depth=WAITING, reliability=ReliabilityPolicy.BEST_EFFORT)
# How often the other cameras are looked at while the anchor's picture waits for theirs.
LOOK_S = 0.001
# What a middleware that does not number its messages says instead.
UNNUMBERED = 2**64 - 1


@dataclass(frozen=True)
class Arrival:
    """A message of a camera, not decoded yet."""

    stamp_ns: int
    data: bytes
    compressed: bool


@dataclass
class Intake:
    """One camera: its messages not yet taken, and how its pictures become the model's.

    `pictures` are its subscriptions, by whether they bring compressed pictures.
    """

    camera: CameraSpec
    meter: InputMeter
    info_meter: InputMeter
    rectified: bool
    pictures: Mapping[bool, Subscription[Any]]
    infos: Subscription[Any]
    waiting: deque[Arrival] = field(default_factory=deque)
    stamp_ns: int = 0
    received: int = 0
    unmatched: int = 0
    numbers: dict[bool, int] = field(default_factory=dict)
    info_bytes: bytes = b''
    info: tuple[Intrinsics, str] | None = None
    source: tuple[Intrinsics, Mount | None] | None = None
    view: VirtualCamera | None = None


class CameraInputs:
    """Subscriptions of all cameras of a model; the first camera is the anchor."""

    def __init__(
        self,
        node: QuietNode,
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
        topics = dict(pair.split('=', 1) for pair in settings.camera_topics if '=' in pair)
        self.intakes: dict[str, Intake] = {}
        for camera in cameras:
            base = f'input/{camera.name}'
            topic = topics.get(camera.name, f'{base}/image')
            subscribe = self._heard_by_hand if self.intakes else self._woken_by
            intake = self.intakes[camera.name] = Intake(
                camera,
                InputMeter(f'{base}/image', settings.input_timeout_s),
                InputMeter(f'{base}/camera_info', settings.input_timeout_s, required=False),
                settings.pictures == 'rectified'
                or (settings.pictures == 'auto' and 'rect' in node.resolve_topic_name(topic)),
                {
                    False: subscribe(Image, topic),
                    True: subscribe(CompressedImage, f'{topic}/compressed'),
                },
                subscribe_by_hand(node, CameraInfo, f'{base}/camera_info', NEWEST),
            )
            intake.meter.subscriptions += intake.pictures.values()
            intake.info_meter.subscriptions.append(intake.infos)
        self._anchor, *self._sides = self.intakes.values()

    def _woken_by(self, kind: type, topic: str) -> Subscription[Any]:
        def on_picture(data: bytes, info: Mapping[str, Any]) -> None:
            with self._news:
                self._store(self._anchor, data, info, compressed=kind is CompressedImage)
                self._news.notify()

        return self._node.create_subscription(kind, topic, on_picture, NEWEST, raw=True)

    def _heard_by_hand(self, kind: type, topic: str) -> Subscription[Any]:
        return subscribe_by_hand(self._node, kind, topic, RECENT)

    def _read_info(self, intake: Intake) -> None:
        """Look at the newest `camera_info`, if there is a new one."""
        for data, _ in taken(intake.infos, 1):
            now_ns, meter = self._node.get_clock().now().nanoseconds, intake.info_meter
            try:
                stamp_ns = stamp_ns_of_bytes(data)
                doubt = self._look_through(intake, data)
            except MessageError as error:
                meter.fault(now_ns, str(error))
                continue
            except struct.error as error:
                meter.fault(now_ns, f'camera_info: its bytes are not those of one ({error})')
                continue
            view = intake.view
            meter.warning = doubt or ('' if view is None else view.warning)
            if view is not None:
                meter.extra['seen'] = f'{view.seen:.2f}'
            if view is not None and view.fault:
                meter.fault(now_ns, view.fault)
            else:
                meter.arrived(now_ns, stamp_ns)

    def _look_through(self, intake: Intake, data: bytes) -> str:
        """See that the view is that of this `camera_info`; what is in doubt about its mount."""
        # Nothing but the stamp changes from one to the next.
        content = data[HEAD_BYTES + 8 :]
        if intake.info is None or content != intake.info_bytes:
            message = message_of_bytes(data, CameraInfo)
            info = read_camera_info(message, rectified=intake.rectified)
            intake.info = info, str(message.header.frame_id)
            intake.info_bytes = content
        info, frame_id = intake.info
        mount, doubt = self._extrinsics.mount(intake.camera.name, frame_id)
        source = (info, mount)
        if intake.source is None or not _equal(source, intake.source):
            intake.view, intake.source = VirtualCamera(intake.camera, info, mount), source
        return doubt

    def _hear(self, intake: Intake) -> None:
        """Keep what a side camera has brought since it was looked at last."""
        for compressed, subscription in intake.pictures.items():
            batch = list(taken(subscription, WAITING))
            for number, (data, info) in enumerate(batch):
                # A full history has overwritten what came before it.
                overwritten = number == 0 and len(batch) == WAITING
                self._store(intake, data, info, compressed=compressed, overwritten=overwritten)

    def _store(
        self,
        intake: Intake,
        data: bytes,
        info: Mapping[str, Any],
        *,
        compressed: bool,
        overwritten: bool = False,
    ) -> None:
        try:
            stamp_ns = stamp_ns_of_bytes(data)
        except struct.error as error:
            now_ns = self._node.get_clock().now().nanoseconds
            intake.meter.fault(now_ns, f'image: its bytes are not those of a picture ({error})')
            return
        missing = _missing_before(intake, info, compressed=compressed)
        if overwritten:
            intake.meter.dropped += missing
        else:
            intake.meter.lost += missing
        room = 1 if intake is self._anchor else WAITING
        while len(intake.waiting) >= room:
            intake.waiting.popleft()
            intake.meter.dropped += 1
        intake.stamp_ns = stamp_ns
        intake.received += 1
        intake.waiting.append(Arrival(stamp_ns, data, compressed))

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

    def listen(self) -> None:
        """Look at every `camera_info`, as `take` does; for when there is nothing to take."""
        for intake in self.intakes.values():
            self._read_info(intake)

    def take(self, wait_s: float) -> tuple[int | None, list[CameraFrame]]:
        """Decode the anchor's picture and, of each other camera, the one nearest to it in time.

        Pictures of one exposure come in one after another, so the other cameras are given
        `wait_s` to catch up with the anchor.

        Returns:
            The anchor's stamp, None where its picture was refused, and the good pictures.
        """
        with self._news:
            anchor_ns = self._anchor.stamp_ns
            chosen = [(self._anchor, self._nearest(self._anchor, anchor_ns))]
        self._catch_up(anchor_ns, wait_s)
        chosen += [(side, self._nearest(side, anchor_ns)) for side in self._sides if side.received]
        frames = [
            frame
            for intake, arrival in chosen
            if arrival is not None and (frame := self._decode(intake, arrival)) is not None
        ]
        anchor = self._anchor.camera.name
        stamp_ns = next((frame.stamp_ns for frame in frames if frame.camera == anchor), None)
        return stamp_ns, frames

    def _catch_up(self, anchor_ns: int, wait_s: float) -> None:
        """Hear the side cameras until each has a picture as new as the anchor's, or time is up."""
        end_s = time.monotonic() + wait_s
        late = list(self._sides)
        while late:
            for side in late:
                self._hear(side)
            late = [side for side in late if side.received and side.stamp_ns < anchor_ns]
            if self._woken or time.monotonic() >= end_s:
                return
            if late:
                time.sleep(LOOK_S)

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
        self._read_info(intake)
        camera, view = intake.camera, intake.view
        now_ns = self._node.get_clock().now().nanoseconds
        fit = partial(centered, camera=camera) if view is None else view.fit
        try:
            if view is not None and view.fault:
                raise MessageError(view.fault)
            if arrival.compressed:
                message = compressed_image_of_bytes(arrival.data)
                frame = read_compressed_image(message, camera.name, fit=fit)
            else:
                message = image_of_bytes(arrival.data)
                frame = read_image(
                    message, camera.name, use_cv_bridge=self._use_cv_bridge, fit=fit
                )
        except MessageError as error:
            intake.meter.fault(now_ns, str(error))
            return None
        intake.meter.arrived(now_ns, frame.stamp_ns)
        return frame

    def close(self) -> None:
        """End the subscriptions."""
        for intake in self.intakes.values():
            for subscription in (*intake.pictures.values(), intake.infos):
                self._node.destroy_subscription(subscription)


def _missing_before(intake: Intake, info: Mapping[str, Any], *, compressed: bool) -> int:
    """What the publisher sent between the last message and this one; Humble cannot tell."""
    number = int(info.get('publication_sequence_number', UNNUMBERED))
    last = intake.numbers.get(compressed, UNNUMBERED)
    intake.numbers[compressed] = number
    # A publisher that was started again counts from the beginning.
    return number - last - 1 if last < number < UNNUMBERED else 0


def _equal(one: tuple[Intrinsics, Mount | None], other: tuple[Intrinsics, Mount | None]) -> bool:
    (info, mount), (other_info, other_mount) = one, other
    if info != other_info or (mount is None) != (other_mount is None):
        return False
    if mount is None or other_mount is None:
        return True
    places = (mount.place_m == other_mount.place_m).all()
    return bool(places and (mount.base_from_optical == other_mount.base_from_optical).all())
