"""Pictures and odometry read from the bytes they have on the bus.

rclpy copies a picture into a C struct, into bytes and into an array, and makes an array of each
covariance; here pixels stay where they are, and what nobody reads is not made. A message is what
`spanvla_ros.messages` reads of it by attribute.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nav_msgs.msg import Odometry
from sensor_msgs.msg import CompressedImage, Image

from spanvla_ros.messages import MessageError
from spanvla_ros.ros.cdr import (
    HEAD_BYTES,
    is_little_endian,
    message_of_bytes,
    number_at,
    string_at,
)

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
    return _in_place(data, Image, 'image: its bytes are not those of an Image', _image)


def compressed_image_of_bytes(data: bytes) -> Any:
    """A serialized `sensor_msgs/CompressedImage`.

    Raises:
        MessageError: bytes that are none.
    """
    fault = 'compressed image: its bytes are not those of a CompressedImage'
    return _in_place(data, CompressedImage, fault, _compressed_image)


def odometry_of_bytes(data: bytes) -> Any:
    """A serialized `nav_msgs/Odometry` without its covariances.

    Raises:
        MessageError: bytes that are none.
    """
    return _in_place(data, Odometry, 'odometry: its bytes are not those of an Odometry', _odometry)


def _in_place(data: bytes, kind: type, fault: str, read: Callable[[bytes], Any]) -> Any:
    if not is_little_endian(data):
        return message_of_bytes(data, kind)
    try:
        return read(data)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise MessageError(f'{fault} ({error})') from error


def _image(data: bytes) -> ImageView:
    header, at = _header(data)
    height, at = number_at(data, at)
    width, at = number_at(data, at)
    encoding, at = string_at(data, at)
    step, end = number_at(data, at + 1)
    return ImageView(header, height, width, encoding, data[at], step, _octets(data, end))


def _compressed_image(data: bytes) -> CompressedImageView:
    header, at = _header(data)
    form, at = string_at(data, at)
    return CompressedImageView(header, form, _octets(data, at))


def _odometry(data: bytes) -> SimpleNamespace:
    header, at = _header(data)
    child_frame_id, at = string_at(data, at)
    at += (HEAD_BYTES - at) % 8
    x, y, z, *turn = struct.unpack_from('<7d', data, at)
    twist = struct.unpack_from('<6d', data, at + POSE_BYTES)
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
