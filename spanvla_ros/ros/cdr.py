"""Fields of a serialized message (CDR, little-endian), read where they stand.

rclpy makes a Python object for each field of a message and copies its arrays twice on the way;
who wants a few fields of a large message, or of many, reads them here. What is laid out otherwise
goes through rclpy.
"""

from __future__ import annotations

import struct
from typing import Any

from rclpy.serialization import deserialize_message

from spanvla_ros.messages import MessageError

HEAD_BYTES = 4
LITTLE_ENDIAN = b'\x00\x01'


def is_little_endian(data: bytes | bytearray) -> bool:
    """Whether the functions here can read these bytes; nearly all are so."""
    return bytes(data[:2]) == LITTLE_ENDIAN


def stamp_ns_of_bytes(data: bytes | bytearray) -> int:
    """The stamp of a message that begins with a `std_msgs/Header`, in either order of bytes.

    Raises:
        struct.error: fewer bytes than that.
    """
    order = '>' if bytes(data[:2]) == b'\x00\x00' else '<'
    sec, nanosec = struct.unpack_from(f'{order}iI', data, HEAD_BYTES)
    return int(sec) * 1_000_000_000 + int(nanosec)


def number_at(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """The uint32 that is next after an offset, and where the byte after it stands.

    Raises:
        struct.error: the message ends before.
    """
    at += -at % 4
    return int(struct.unpack_from('<I', data, at)[0]), at + 4


def string_at(data: bytes | bytearray, at: int) -> tuple[str, int]:
    """The string that is next after an offset, and where the byte after it stands.

    Raises:
        struct.error: the message ends before.
        UnicodeDecodeError: not UTF-8.
    """
    length, at = number_at(data, at)
    end = at + length
    if length == 0 or end > len(data):
        raise struct.error('a string that is longer than its message')
    return bytes(data[at : end - 1]).decode(), end


def message_of_bytes(data: bytes, kind: type) -> Any:
    """A serialized message of any kind, whole, by rclpy.

    Raises:
        MessageError: bytes that are none.
    """
    try:
        return deserialize_message(data, kind)
    except Exception as error:
        # The middleware names no type of its own for bytes it cannot read.
        raise MessageError(f'{kind.__name__}: its bytes are no message ({error})') from error
