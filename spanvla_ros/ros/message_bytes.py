"""Pictures and odometry read from the bytes they have on the bus.

rclpy copies a picture into a C struct, into bytes and into an array, and makes an array of each
covariance; here pixels stay where they are, and what nobody reads is not made. A message is what
`spanvla_ros.messages` reads of it by attribute.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image

from spanvla_ros.messages import MessageError
from spanvla_ros.ros.cdr import HEAD_BYTES, is_little_endian, number_at, string_at

# Seven numbers of a pose and the 36 of its covariance.
POSE_BYTES = 43 * 8


@dataclass(frozen=True)
class Stamp:
    """A `builtin_interfaces/Time`."""

    sec: int
    nanosec: int


@dataclass(frozen=True)
class Header:
    """A `std_msgs/Header`."""

    stamp: Stamp
    frame_id: str


@dataclass(frozen=True)
class ImageView:
    """A `sensor_msgs/Image` whose data is a view."""

    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: memoryview


@dataclass(frozen=True)
class CompressedImageView:
    """A `sensor_msgs/CompressedImage` whose data is a view."""

    header: Header
    format: str
    data: memoryview


def image_of_bytes(data: bytes) -> Any:
    """A serialized `sensor_msgs/Image`.

    Raises:
        MessageError: bytes that are none.
    """
    if not is_little_endian(data):
        return deserialize_message(data, Image)
    try:
        header, at = _header(data)
        height, at = number_at(data, at)
        width, at = number_at(data, at)
        encoding, at = string_at(data, at)
        step, end = number_at(data, at + 1)
        return ImageView(header, height, width, encoding, data[at], step, _octets(data, end))
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise MessageError(f'image: its bytes are not those of an Image ({error})') from error


def compressed_image_of_bytes(data: bytes) -> Any:
    """A serialized `sensor_msgs/CompressedImage`.

    Raises:
        MessageError: bytes that are none.
    """
    if not is_little_endian(data):
        return deserialize_message(data, CompressedImage)
    try:
        header, at = _header(data)
        form, at = string_at(data, at)
        return CompressedImageView(header, form, _octets(data, at))
    except (struct.error, UnicodeDecodeError) as error:
        raise MessageError(
            f'compressed image: its bytes are not those of a CompressedImage ({error})'
        ) from error


def odometry_of_bytes(data: bytes) -> Any:
    """A serialized `nav_msgs/Odometry` without its covariances.

    Raises:
        MessageError: bytes that are none.
    """
    if not is_little_endian(data):
        return deserialize_message(data, Odometry)
    try:
        header, at = _header(data)
        child_frame_id, at = string_at(data, at)
        at += (HEAD_BYTES - at) % 8
        x, y, z, *turn = struct.unpack_from('<7d', data, at)
        twist = struct.unpack_from('<6d', data, at + POSE_BYTES)
    except (struct.error, UnicodeDecodeError) as error:
        raise MessageError(
            f'odometry: its bytes are not those of an Odometry ({error})'
        ) from error
    pose = SimpleNamespace(position=_vector(x, y, z), orientation=_vector(*turn))
    speeds = SimpleNamespace(linear=_vector(*twist[:3]), angular=_vector(*twist[3:]))
    return SimpleNamespace(
        header=header,
        child_frame_id=child_frame_id,
        pose=SimpleNamespace(pose=pose),
        twist=SimpleNamespace(twist=speeds),
    )


def _vector(*values: float) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip('xyzw', values, strict=False)))


def _header(data: bytes) -> tuple[Header, int]:
    sec, nanosec = struct.unpack_from('<iI', data, HEAD_BYTES)
    frame_id, at = string_at(data, HEAD_BYTES + 8)
    return Header(Stamp(sec, nanosec), frame_id), at


def _octets(data: bytes, at: int) -> memoryview:
    length, at = number_at(data, at)
    if at + length > len(data):
        raise struct.error(f'{length} bytes of data in a message of {len(data)}')
    return memoryview(data)[at : at + length]
