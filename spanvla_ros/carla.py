"""CARLA's ego topics in this package's frames: vehicle origin, speedometer, waypoints.

The ros-bridge has turned Unreal's left-handed axes into ROS's already (y and yaw change sign);
what is left is where the vehicle's origin lies, and which units a topic is in. Messages are read
and written by attribute; no ROS package is imported.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float64

KMH_PER_MPS = 3.6
ROUTE_STEP_M = 0.5
UNIT_TOLERANCE = 0.1
# Below this both speeds are too near to noise to tell a unit.
UNIT_SPEED_MPS = 2.0
MAP_FRAME = 'map'


def to_rear_axle(message: Any, origin_ahead_m: float) -> Any:
    """A `nav_msgs/Odometry` of CARLA's vehicle origin, changed into one of `base_link`.

    Args:
        message: pose of the vehicle's origin, twist in its body frame; changed in place.
        origin_ahead_m: how far the origin lies ahead of the rear axle.
    """
    pose, twist = message.pose.pose, message.twist.twist
    q = pose.orientation
    # The first column of the rotation: the direction the vehicle points to.
    pose.position.x -= origin_ahead_m * (1.0 - 2.0 * (q.y * q.y + q.z * q.z))
    pose.position.y -= origin_ahead_m * 2.0 * (q.x * q.y + q.w * q.z)
    pose.position.z -= origin_ahead_m * 2.0 * (q.x * q.z - q.w * q.y)
    twist.linear.y -= origin_ahead_m * twist.angular.z
    message.child_frame_id = 'base_link'
    return message


def speedometer_fault(speedometer_mps: float, odometry_mps: float) -> str:
    """Why speedometer and odometry contradict one another, or `''`."""
    if not (math.isfinite(speedometer_mps) and math.isfinite(odometry_mps)):
        return 'speedometer: a speed that is not a number'
    if max(abs(speedometer_mps), abs(odometry_mps)) < UNIT_SPEED_MPS:
        return ''
    if abs(speedometer_mps - odometry_mps) <= UNIT_TOLERANCE * abs(odometry_mps) + 0.5:
        return ''
    said = f'speedometer: {speedometer_mps:.1f} against {odometry_mps:.1f} m/s of the odometry'
    in_mps = speedometer_mps / KMH_PER_MPS
    if odometry_mps and abs(in_mps / odometry_mps - 1.0) < UNIT_TOLERANCE:
        return f'{said}; it is in km/h, and the bridge publishes m/s'
    return f'{said}; one of the two is of another vehicle or frame'


def thin_route(points: Float64[np.ndarray, 'n 2']) -> list[int]:
    """Numbers of the waypoints that do not repeat their predecessor, as some do where lanes join.

    Points that are no numbers are left out.
    """
    kept: list[int] = []
    for index in np.flatnonzero(np.isfinite(points).all(axis=1)).tolist():
        if not kept or math.hypot(*(points[index] - points[kept[-1]])) >= ROUTE_STEP_M:
            kept.append(index)
    return kept
