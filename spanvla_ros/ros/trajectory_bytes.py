"""The guardian's trajectory as the bytes it has on the bus, written and read as one table.

rclpy makes and converts some five hundred small objects for each `MultiDOFJointTrajectory`, and
one goes out some thirty times a second. In its bytes (CDR, little-endian) a trajectory whose
points hold one transform, one velocity and one acceleration each is a table of equal rows. What
is laid out otherwise goes through rclpy.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from rclpy.serialization import serialize_message
from trajectory_msgs.msg import MultiDOFJointTrajectory

from spanvla_ros.messages import read_trajectory, trajectory_of_table
from spanvla_ros.ros.cdr import (
    HEAD_BYTES,
    is_little_endian,
    message_of_bytes,
    number_at,
    string_at,
)
from spanvla_ros.types import Trajectory

# Each count is followed by four bytes that bring what it counts to a multiple of eight.
ROW = np.dtype(
    [
        ('transforms', '<u4'),
        ('pad_0', '<u4'),
        ('place', '<f8', 3),
        ('rotation', '<f8', 4),
        ('velocities', '<u4'),
        ('pad_1', '<u4'),
        ('linear', '<f8', 3),
        ('angular', '<f8', 3),
        ('accelerations', '<u4'),
        ('pad_2', '<u4'),
        ('linear_change', '<f8', 3),
        ('angular_change', '<f8', 3),
        ('sec', '<i4'),
        ('nanosec', '<u4'),
    ]
)


def rows_of(data: bytes | bytearray) -> tuple[np.ndarray, str] | None:
    """The points as a table on `data` itself and the frame; None where they are not one."""
    try:
        if not is_little_endian(data):
            return None
        frame_id, at = string_at(data, 12)
        joints, at = number_at(data, at)
        if joints > 8:
            return None
        for _ in range(joints):
            _, at = string_at(data, at)
        count, at = number_at(data, at)
    except (struct.error, UnicodeDecodeError):
        return None
    # Where the table would begin inside a multiple of eight, its first count has no gap behind it
    # and stands in that gap's place.
    first = 'transforms' if (at - HEAD_BYTES) % 8 == 0 else 'pad_0'
    begin = at if first == 'transforms' else at - 4
    if count == 0 or begin + count * ROW.itemsize != len(data):
        return None
    rows = np.ndarray((count,), ROW, buffer=data, offset=begin)
    ones = (rows[first][:1], rows['transforms'][1:], rows['velocities'], rows['accelerations'])
    return (rows, frame_id) if all((one == 1).all() for one in ones) else None


def trajectory_of_bytes(data: bytes) -> Trajectory:
    """A serialized trajectory as the follower reads it, as `read_trajectory` would.

    Raises:
        MessageError: as `read_trajectory`.
    """
    found = rows_of(data)
    if found is None:
        return read_trajectory(message_of_bytes(data, MultiDOFJointTrajectory))
    rows, frame_id = found
    sec, nanosec = struct.unpack_from('<iI', data, HEAD_BYTES)
    time_s = rows['sec'] + rows['nanosec'] * 1e-9
    table = np.column_stack([time_s, rows['place'][:, :2], rows['rotation'][:, [3, 0, 1, 2]]])
    return trajectory_of_table(table, sec * 1_000_000_000 + nanosec, frame_id)


class TrajectoryBytes:
    """One message, serialized by rclpy once and overwritten in place from then on."""

    def __init__(self, message: Any) -> None:
        """Take a message with as many points as all that follow, one of each kind in a point.

        Where its bytes are no table, `rows` is None.
        """
        self._data = bytearray(serialize_message(message))
        found = rows_of(self._data)
        self.rows: np.ndarray | None = None if found is None else found[0]

    def stamped(self, stamp_ns: int) -> bytes:
        """The bytes as they are now, with this stamp."""
        sec, nanosec = divmod(stamp_ns, 1_000_000_000)
        struct.pack_into('<iI', self._data, HEAD_BYTES, sec, nanosec)
        return bytes(self._data)
