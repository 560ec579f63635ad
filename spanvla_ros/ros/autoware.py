"""The guardian's trajectory in Autoware's own type, where that is installed and asked for."""

from __future__ import annotations

import math
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.time import Time
from transforms3d.euler import euler2quat

from spanvla_ros.safety.state import GuardianOutput
from spanvla_ros.types import SpanvlaError


class AutowareTrajectory:
    """Publishes `autoware_planning_msgs/Trajectory` on `output/autoware_trajectory`."""

    def __init__(self, node: Node, profile: QoSProfile) -> None:
        """Open the topic.

        Raises:
            SpanvlaError: autoware_planning_msgs is not installed.
        """
        try:
            from autoware_planning_msgs.msg import Trajectory, TrajectoryPoint
        except ImportError as error:
            raise SpanvlaError(
                'guardian: autoware is true but autoware_planning_msgs is not installed; '
                'source the Autoware workspace or set autoware to false'
            ) from error
        self._kind, self._point = Trajectory, TrajectoryPoint
        self._publisher = node.create_publisher(Trajectory, 'output/autoware_trajectory', profile)

    def publish(self, output: GuardianOutput) -> None:
        """Send one output; the steering angles stay 0, as Autoware's own planners leave them."""
        self._publisher.publish(fill_autoware(self._kind(), self._point, output))


def fill_autoware(message: Any, make_point: Any, output: GuardianOutput) -> Any:
    """An empty Autoware trajectory filled with an output."""
    track = output.trajectory
    message.header.frame_id = track.frame_id
    message.header.stamp = Time(nanoseconds=track.stamp_ns).to_msg()
    for time_s, pose, speed, accel, yaw_rate in zip(
        track.times_s.tolist(),
        track.poses.tolist(),
        output.speeds_mps.tolist(),
        output.accels_mps2.tolist(),
        output.yaw_rates_radps.tolist(),
        strict=True,
    ):
        point = make_point()
        point.time_from_start = Duration(nanoseconds=round(time_s * 1e9)).to_msg()
        point.pose.position.x, point.pose.position.y = pose[0], pose[1]
        q = point.pose.orientation
        q.w, q.x, q.y, q.z = euler2quat(0.0, 0.0, math.remainder(pose[2], math.tau))
        point.longitudinal_velocity_mps = speed
        point.acceleration_mps2 = accel
        point.heading_rate_rps = yaw_rate
        message.points.append(point)
    return message
