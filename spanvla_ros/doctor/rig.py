"""What the checks of a rig look at: stamps, poses, a few small grey pictures, no messages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8
from transforms3d.euler import quat2euler
from transforms3d.quaternions import quat2mat

from spanvla_ros.doctor.sight import Mount
from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    read_camera_info,
    read_compressed_image,
    read_image,
    read_odometry,
    read_route,
    stamp_ns_of,
)
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.replay.bag import (
    CAMERA_INFO,
    COMPRESSED,
    IMAGE,
    ODOMETRY,
    PATH,
    TRANSFORMS,
    info_of,
)
from spanvla_ros.replay.observed import SeenMessage, SeenTopic

CLOCK = 'rosgraph_msgs/msg/Clock'
LOOKED_AT = (CAMERA_INFO, COMPRESSED, IMAGE, ODOMETRY, PATH, TRANSFORMS, CLOCK)
PICTURE_WIDTH_PX = 640
PAIRS = 40
PAIR_GAP_S = 0.06


@dataclass
class Stream:
    """Stamps, times of reception, sizes and frames of one topic."""

    topic: SeenTopic
    stamps_ns: list[int] = field(default_factory=list)
    received_ns: list[int] = field(default_factory=list)
    largest_bytes: int = 0
    frame: str = ''
    child_frame: str = ''
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """How many messages came."""
        return len(self.stamps_ns)

    @property
    def stamps_s(self) -> Float64[np.ndarray, ' n']:
        """Stamps in seconds."""
        return np.array(self.stamps_ns, dtype=np.int64) * 1e-9

    @property
    def delay_s(self) -> Float64[np.ndarray, ' n']:
        """From stamp to reception."""
        late: Int64[np.ndarray, ' n'] = np.array(self.received_ns, np.int64) - np.array(
            self.stamps_ns, np.int64
        )
        return late * 1e-9


@dataclass
class Camera:
    """One image topic: its name in the model if known, small grey pictures, what they lack."""

    name: str
    stream: Stream
    info_topic: str | None = None
    info: Intrinsics | None = None
    size_px: tuple[int, int] = (0, 0)
    pairs: list[tuple[int, UInt8[np.ndarray, 'h w'], int, UInt8[np.ndarray, 'h w']]] = field(
        default_factory=list
    )
    brightest: float = 0.0
    _pending: tuple[int, UInt8[np.ndarray, 'h w']] | None = None
    _next_ns: int = 0

    def keep(self, stamp_ns: int, gray: UInt8[np.ndarray, 'h w'], every_s: float) -> None:
        """Take a picture as the first or the second of a pair, or leave it."""
        self.brightest = max(self.brightest, float(gray.max()))
        if self._pending is None:
            if stamp_ns >= self._next_ns:
                self._pending = (stamp_ns, gray)
                self._next_ns = stamp_ns + round(every_s * 1e9)
            return
        first_ns, first = self._pending
        if stamp_ns - first_ns >= PAIR_GAP_S * 1e9:
            self.pairs.append((first_ns, first, stamp_ns, gray))
            self._pending = None

    def wants(self, stamp_ns: int) -> bool:
        """Whether a picture of this stamp would be kept, so that it is worth decoding."""
        return self._pending is not None or stamp_ns >= self._next_ns


@dataclass
class Rig:
    """Everything the checks look at."""

    specs: tuple[CameraSpec, ...]
    streams: dict[str, Stream]
    cameras: list[Camera]
    poses: list[tuple[float, ...]] = field(default_factory=list)
    route: Float64[np.ndarray, 'n 2'] | None = None
    transforms: dict[str, tuple[str, Mount]] = field(default_factory=dict)
    odometry_topic: str = ''
    route_topic: str = ''
    live: bool = False

    @property
    def odometry(self) -> Float64[np.ndarray, 'n 8']:
        """Columns stamp, x, y, yaw, roll, forward and left speed, yaw rate; by stamp, unique."""
        table = np.array(self.poses, dtype=np.float64).reshape(-1, 8)
        _, first = np.unique(table[:, 0], return_index=True)
        return table[first]

    def streams_of(self, *kinds: str) -> list[Stream]:
        """The streams of some message types."""
        return [stream for stream in self.streams.values() if stream.topic.kind in kinds]

    def mount_of(self, camera: Camera) -> Mount | None:
        """Where a camera sits: by the transforms, else as the model's camera of its name."""
        mount = self.given_mount(camera)
        if mount is not None:
            return mount
        return next((Mount.of(s) for s in self.specs if s.name == camera.name), None)

    def given_mount(self, camera: Camera) -> Mount | None:
        """Where a camera sits by the static transforms, None where none lead to it."""
        frame = camera.stream.frame
        center, axes = np.zeros(3), np.eye(3)
        for _ in range(10):
            if frame == 'base_link':
                return Mount(center, axes)
            if frame not in self.transforms:
                return None
            frame, step = self.transforms[frame]
            center = step.center_m + step.base_from_optical @ center
            axes = step.base_from_optical @ axes
        return None


def camera_name(topic: str, names: Sequence[str]) -> str:
    """The model's name for an image topic, by a part of its path; else empty."""
    parts = topic.strip('/').split('/')
    for name in sorted(names, key=len, reverse=True):
        if any(
            part in (name, f'{name}_camera', f'camera_{name}', f'cam_{name}') for part in parts
        ):
            return name
    return ''


def empty_rig(
    topics: Iterable[SeenTopic], specs: tuple[CameraSpec, ...], *, live: bool = False
) -> Rig:
    """A rig whose messages have not come yet; outputs of our own nodes are left out."""
    inputs = [
        topic for topic in topics if '/output/' not in topic.name and topic.kind in LOOKED_AT
    ]
    streams = {topic.name: Stream(topic) for topic in inputs}
    kinds = {topic.name: topic.kind for topic in inputs}
    names = [spec.name for spec in specs]
    images = [stream for stream in streams.values() if stream.topic.kind in (IMAGE, COMPRESSED)]
    cameras = [
        Camera(camera_name(stream.topic.name, names), stream, info_of(stream.topic.name, kinds))
        for stream in images
    ]
    if len(cameras) == 1 and not cameras[0].name:
        cameras[0].name = names[0]
    return Rig(specs, streams, cameras, live=live)


def gather(rig: Rig, messages: Iterable[SeenMessage], seconds: float) -> Rig:
    """Read messages into a rig.

    Args:
        rig: an empty one.
        messages: in order of reception.
        seconds: how long they last, which spaces the pictures that are kept.
    """
    by_topic = {camera.stream.topic.name: camera for camera in rig.cameras}
    every_s = max(seconds / PAIRS, 0.0)
    for seen in messages:
        stream = rig.streams.get(seen.topic)
        if stream is None:
            continue
        kind, message = stream.topic.kind, seen.message
        stream.largest_bytes = max(stream.largest_bytes, seen.size_bytes)
        if kind == TRANSFORMS:
            _keep_transforms(rig, message)
            continue
        stream.received_ns.append(seen.received_ns)
        if kind == CLOCK:
            stream.stamps_ns.append(seen.received_ns)
            continue
        stamp_ns = stamp_ns_of(message.header)
        stream.stamps_ns.append(stamp_ns)
        stream.frame = str(message.header.frame_id)
        try:
            if kind == ODOMETRY:
                _keep_odometry(rig, stream, message)
            elif kind == PATH:
                _keep_route(rig, stream, message)
            elif kind == CAMERA_INFO:
                for camera in rig.cameras:
                    if camera.info_topic == seen.topic:
                        camera.info = read_camera_info(message)
            elif seen.topic in by_topic:
                _keep_picture(by_topic[seen.topic], message, stamp_ns, every_s)
        except MessageError as error:
            stream.refused[str(error)] += 1
    return rig


def _keep_odometry(rig: Rig, stream: Stream, message: Any) -> None:
    stream.child_frame = str(message.child_frame_id)
    if rig.odometry_topic not in ('', stream.topic.name):
        return
    rig.odometry_topic = stream.topic.name
    ego = read_odometry(message)
    q = message.pose.pose.orientation
    _, _, roll = quat2euler((q.w, q.x, q.y, q.z), axes='rzyx')
    left = float(message.twist.twist.linear.y)
    rig.poses.append(
        (ego.stamp_ns * 1e-9, ego.x_m, ego.y_m, ego.yaw_rad, float(roll), ego.speed_mps,
         left if math.isfinite(left) else 0.0, ego.yaw_rate_radps)
    )  # fmt: skip


def _keep_route(rig: Rig, stream: Stream, message: Any) -> None:
    points = read_route(message).points
    if rig.route_topic in ('', stream.topic.name) and len(points) > 1:
        rig.route_topic, rig.route = stream.topic.name, points


def _keep_transforms(rig: Rig, message: Any) -> None:
    for item in message.transforms:
        t, q = item.transform.translation, item.transform.rotation
        step = Mount(np.array([t.x, t.y, t.z]), quat2mat((q.w, q.x, q.y, q.z)))
        rig.transforms[str(item.child_frame_id)] = (str(item.header.frame_id), step)


def _keep_picture(camera: Camera, message: Any, stamp_ns: int, every_s: float) -> None:
    raw = camera.stream.topic.kind == IMAGE
    if raw:
        camera.size_px = (int(message.width), int(message.height))
    if not camera.wants(stamp_ns):
        return
    frame = read_image(message, 'any') if raw else read_compressed_image(message, 'any')
    height_px, width_px = frame.image.shape[:2]
    camera.size_px = (width_px, height_px)
    gray = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
    if width_px > PICTURE_WIDTH_PX:
        size = (PICTURE_WIDTH_PX, round(height_px * PICTURE_WIDTH_PX / width_px))
        gray = np.asarray(cv2.resize(gray, size, interpolation=cv2.INTER_AREA), np.uint8)
    camera.keep(stamp_ns, gray, every_s)
