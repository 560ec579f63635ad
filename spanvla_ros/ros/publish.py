"""What the guardian says, as messages: trajectory, path, markers, state.

Messages of fixed length are made once and refilled: making some hundred nested messages twenty
times a second would cost more than planning the fallback.
"""

from __future__ import annotations

import json
import math

import numpy as np
from geometry_msgs.msg import Point, PoseStamped, Transform, Twist
from nav_msgs.msg import Path
from rclpy.duration import Duration
from rclpy.serialization import serialize_message
from rclpy.time import Time
from std_msgs.msg import ColorRGBA
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint
from transforms3d.euler import euler2quat
from visualization_msgs.msg import Marker, MarkerArray

from spanvla_ros.ros.trajectory_bytes import TrajectoryBytes
from spanvla_ros.safety.state import Counts, GuardianOutput
from spanvla_ros.types import Plan, Vehicle

CHILD_FRAME = 'base_link'
STATE_COLORS = {
    'STANDBY': (0.6, 0.6, 0.6),
    'OK': (0.1, 0.8, 0.3),
    'DEGRADED': (0.95, 0.75, 0.1),
    'FALLBACK': (0.95, 0.45, 0.1),
    'FAULT': (0.9, 0.1, 0.1),
}


class TrajectoryMessage:
    """A `trajectory_msgs/MultiDOFJointTrajectory` refilled for each output.

    All parts are in the frame of the header, also velocities and accelerations, as the message
    names no other.
    """

    def __init__(self) -> None:
        """Start without points; they are made with the first output."""
        self._message = MultiDOFJointTrajectory(joint_names=[CHILD_FRAME])
        self._bytes: TrajectoryBytes | None = None
        self._layout: tuple[str, int] | None = None

    def serialized(self, output: GuardianOutput) -> bytes:
        """What `fill` gives as it goes over the bus, at a tenth of the cost."""
        track = output.trajectory
        layout = (track.frame_id, len(track.times_s))
        if self._bytes is None or layout != self._layout:
            self._bytes, self._layout = TrajectoryBytes(self.fill(output)), layout
        rows = self._bytes.rows
        if rows is None:
            return bytes(serialize_message(self.fill(output)))
        yaw, speeds = track.poses[:, 2], output.speeds_mps
        cos, sin = np.cos(yaw), np.sin(yaw)
        rows['place'][:, :2] = track.poses[:, :2]
        rows['rotation'][:, 2] = np.sin(0.5 * yaw)
        rows['rotation'][:, 3] = np.cos(0.5 * yaw)
        rows['linear'][:, 0] = speeds * cos
        rows['linear'][:, 1] = speeds * sin
        rows['angular'][:, 2] = output.yaw_rates_radps
        inward = speeds * output.yaw_rates_radps
        rows['linear_change'][:, 0] = output.accels_mps2 * cos - inward * sin
        rows['linear_change'][:, 1] = output.accels_mps2 * sin + inward * cos
        return self._bytes.stamped(track.stamp_ns)

    def fill(self, output: GuardianOutput) -> MultiDOFJointTrajectory:
        """The message for an output; valid until the next call."""
        message, track = self._message, output.trajectory
        if len(message.points) != len(track.times_s):
            message.points = [_blank_point(float(time_s)) for time_s in track.times_s]
        message.header.stamp = Time(nanoseconds=track.stamp_ns).to_msg()
        message.header.frame_id = track.frame_id
        for point, (x, y, yaw), speed, accel, yaw_rate in zip(
            message.points,
            track.poses.tolist(),
            output.speeds_mps.tolist(),
            output.accels_mps2.tolist(),
            output.yaw_rates_radps.tolist(),
            strict=True,
        ):
            cos, sin = math.cos(yaw), math.sin(yaw)
            turn = point.transforms[0]
            turn.translation.x, turn.translation.y = x, y
            q = turn.rotation
            q.w, q.x, q.y, q.z = euler2quat(0.0, 0.0, yaw)
            velocity, change = point.velocities[0], point.accelerations[0]
            velocity.linear.x, velocity.linear.y = speed * cos, speed * sin
            velocity.angular.z = yaw_rate
            inward = speed * yaw_rate
            change.linear.x = accel * cos - inward * sin
            change.linear.y = accel * sin + inward * cos
        return message


def _blank_point(time_s: float) -> MultiDOFJointTrajectoryPoint:
    point = MultiDOFJointTrajectoryPoint(
        transforms=[Transform()], velocities=[Twist()], accelerations=[Twist()]
    )
    point.time_from_start = Duration(nanoseconds=round(time_s * 1e9)).to_msg()
    return point


def path_message(output: GuardianOutput) -> Path:
    """The trajectory's poses as a `nav_msgs/Path`, each with its own time."""
    track = output.trajectory
    message = Path()
    message.header.frame_id = track.frame_id
    message.header.stamp = Time(nanoseconds=track.stamp_ns).to_msg()
    for time_s, (x, y, yaw) in zip(track.times_s.tolist(), track.poses.tolist(), strict=True):
        pose = PoseStamped()
        pose.header.frame_id = track.frame_id
        pose.header.stamp = Time(nanoseconds=track.stamp_ns + round(time_s * 1e9)).to_msg()
        pose.pose.position.x, pose.pose.position.y = x, y
        q = pose.pose.orientation
        q.w, q.x, q.y, q.z = euler2quat(0.0, 0.0, yaw)
        message.poses.append(pose)
    return message


def marker_message(output: GuardianOutput, vehicle: Vehicle) -> MarkerArray:
    """The swept line colored by state, the vehicle's box, and the state in words."""
    track = output.trajectory
    red, green, blue = STATE_COLORS[output.state]
    line = _marker(output, 0, Marker.LINE_STRIP, (red, green, blue, 0.8))
    line.scale.x = 0.4
    line.points = [Point(x=x, y=y, z=0.05) for x, y, _ in track.poses.tolist()]
    x, y, yaw = track.poses[0].tolist()
    box = _marker(output, 1, Marker.CUBE, (red, green, blue, 0.35))
    box.pose.position.x = x + vehicle.rear_axle_to_center_m * math.cos(yaw)
    box.pose.position.y = y + vehicle.rear_axle_to_center_m * math.sin(yaw)
    box.pose.position.z = 0.5 * vehicle.height_m
    q = box.pose.orientation
    q.w, q.x, q.y, q.z = euler2quat(0.0, 0.0, yaw)
    box.scale.x, box.scale.y = vehicle.length_m, vehicle.width_m
    box.scale.z = vehicle.height_m
    words = _marker(output, 2, Marker.TEXT_VIEW_FACING, (1.0, 1.0, 1.0, 1.0))
    words.pose.position.x, words.pose.position.y = x, y
    words.pose.position.z = vehicle.height_m + 1.0
    words.scale.z = 0.8
    words.text = ' '.join((output.state, *output.reasons))
    return MarkerArray(markers=[line, box, words])


def _marker(
    output: GuardianOutput, number: int, kind: int, color: tuple[float, float, float, float]
) -> Marker:
    red, green, blue, alpha = color
    marker = Marker(ns='guardian', id=number, type=kind, action=Marker.ADD)
    marker.header.frame_id = output.trajectory.frame_id
    marker.header.stamp = Time(nanoseconds=output.trajectory.stamp_ns).to_msg()
    marker.pose.orientation.w = 1.0
    marker.color = ColorRGBA(r=red, g=green, b=blue, a=alpha)
    marker.lifetime = Duration(nanoseconds=1_000_000_000).to_msg()
    return marker


def state_json(output: GuardianOutput, plan: Plan | None, counts: Counts, now_ns: int) -> str:
    """What `output/state` holds: state, reasons, and stamps and ages of what the plan used."""
    followed = plan is not None and output.plan_id is not None
    content = {
        'stamp_ns': now_ns,
        'trajectory_stamp_ns': output.trajectory.stamp_ns,
        'state': output.state,
        'reasons': list(output.reasons),
        'odometry_age_s': round(output.odometry_age_s, 4),
        'plan_id': output.plan_id,
        'plan_age_s': _rounded(output.plan_age_s),
        'image_stamp_ns': plan.trajectory.stamp_ns if plan is not None and followed else None,
        'image_age_s': _rounded(output.image_age_s),
        'kv_stamp_ns': plan.kv_stamp_ns if plan is not None and followed else None,
        'kv_age_s': _rounded(output.kv_age_s),
        'driver': output.driver,
        'plans_accepted': counts.accepted,
        'refused': dict(counts.refused),
    }
    return json.dumps(content, allow_nan=False)


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 4)
