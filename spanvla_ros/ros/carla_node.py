"""The CARLA ros-bridge's ego topics as the inputs of planner, guardian and follower.

Odometry is moved from the vehicle's origin to the rear axle, waypoints become the route, and the
speedometer is held against the odometry. Pictures need no node: the planner reads bgra8.
"""

from __future__ import annotations

import sys
from typing import Any

from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float32

from spanvla_ros.carla import MAP_FRAME, speedometer_fault, thin_route, to_rear_axle
from spanvla_ros.messages import MessageError, read_odometry, read_route
from spanvla_ros.ros.diagnostics import DiagnosticsPublisher, InputMeter
from spanvla_ros.ros.parameters import CarlaSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode

# The bridge publishes reliably, ten deep.
BRIDGE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
ODOMETRY = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
VOLATILE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
CLOCK_OFF_S = 5.0


class CarlaNode(QuietNode):
    """Between the bridge and our inputs, node name `carla`."""

    def __init__(self) -> None:
        """Open the bridge's topics and ours."""
        super().__init__('carla')
        self.settings = settings = declare(self, CarlaSettings)
        timeout_s = settings.input_timeout_s
        self._speed_mps: float | None = None
        base = f'/carla/{settings.role_name}'
        self._meters = {
            'odometry': InputMeter(f'{base}/odometry', timeout_s),
            'waypoints': InputMeter(f'{base}/waypoints', timeout_s, required=False),
            'speedometer': InputMeter(f'{base}/speedometer', timeout_s, required=False),
        }
        self._odometry_out = self.create_publisher(Odometry, 'input/odometry', ODOMETRY)
        self._route_out = self.create_publisher(PathMessage, 'input/route', LATCHED)
        meters = self._meters
        meters['odometry'].subscribe(self, Odometry, self._on_odometry, BRIDGE)
        meters['speedometer'].subscribe(self, Float32, self._on_speedometer, BRIDGE)
        # A bag offers latched waypoints as volatile, which a latched subscription never sees.
        for profile in (LATCHED, VOLATILE):
            meters['waypoints'].subscribe(self, PathMessage, self._on_waypoints, profile)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_odometry(self, message: Odometry) -> None:
        now_ns, meter = self._now_ns(), self._meters['odometry']
        try:
            ego = read_odometry(message)
            self._check_frame(message)
        except MessageError as error:
            meter.fault(now_ns, str(error))
            return
        self._speed_mps = ego.speed_mps
        self._odometry_out.publish(to_rear_axle(message, self.settings.origin_ahead_m))
        off_s = (now_ns - ego.stamp_ns) / 1e9
        if abs(off_s) > CLOCK_OFF_S:
            meter.fault(
                now_ns,
                f'clock: stamps are {off_s:.0f} s off the clock of this node; '
                'set use_sim_time to true on every node',
            )
        else:
            meter.arrived(now_ns, ego.stamp_ns)

    def _check_frame(self, message: Any) -> None:
        frame_id = str(message.header.frame_id)
        if frame_id != MAP_FRAME:
            raise MessageError(f'frame {frame_id!r:.40} is not {MAP_FRAME!r}')

    def _on_speedometer(self, message: Float32) -> None:
        now_ns, meter = self._now_ns(), self._meters['speedometer']
        fault = '' if self._speed_mps is None else speedometer_fault(message.data, self._speed_mps)
        if fault:
            meter.fault(now_ns, fault)
        else:
            meter.arrived(now_ns)

    def _on_waypoints(self, message: PathMessage) -> None:
        now_ns, meter = self._now_ns(), self._meters['waypoints']
        try:
            self._check_frame(message)
            kept = thin_route(read_route(message).points)
        except MessageError as error:
            meter.fault(now_ns, str(error))
            return
        if len(kept) < 2:
            meter.fault(now_ns, f'waypoints: {len(kept)} different ones, no route')
            return
        meter.arrived(now_ns)
        message.poses = [message.poses[index] for index in kept]
        self._route_out.publish(message)

    def _publish_diagnostics(self) -> None:
        self._diagnostics.publish([], self._meters.values())


def main() -> int:
    """Translate until a signal."""
    return run_node(CarlaNode)


if __name__ == '__main__':
    sys.exit(main())
