"""Autoware's route, operation mode and minimal risk maneuver as inputs of planner and guardian.

`/localization/kinematic_state` and `/localization/acceleration` need no node: they are of the
types the nodes read, and are remapped.
"""

from __future__ import annotations

import sys
from typing import Any

from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path as PathMessage
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool
from std_srvs.srv import SetBool

from spanvla_ros.autoware import MAP_FRAME, read_engaged, read_mrm, read_route_places
from spanvla_ros.ros.autoware import autoware_class
from spanvla_ros.ros.diagnostics import DiagnosticsPublisher, InputMeter
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.types import SpanvlaError

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
TIMEOUT_S = 2.0
# While a maneuver runs, standby is asked for this often: a guardian that was started again
# meanwhile has forgotten it.
REMIND_NS = 1_000_000_000
# While Autoware stops the vehicle itself, ours must not pull the other way.
STANDBY_STATES = ('operating', 'succeeded', 'failed')


class AutowareInputs:
    """Autoware's topics on a node: route geometry, engagement, minimal risk maneuver."""

    def __init__(self, node: Node) -> None:
        """Open the topics.

        Raises:
            SpanvlaError: a message package is not installed.
        """
        self._node = node
        self._lanelet_route: Any = None
        self._path: Any = None
        # Nothing was asked of the guardian yet: how it starts is its own parameter.
        self._standby = False
        self._asked_ns = 0
        self.meters = {
            name: InputMeter(f'input/{name}', TIMEOUT_S, required=False)
            for name in ('autoware_path', 'lanelet_route', 'operation_mode', 'mrm_state')
        }
        self._route_out = node.create_publisher(PathMessage, 'input/route', LATCHED)
        self._engaged_out = node.create_publisher(Bool, 'input/engaged', LATCHED)
        self._set_enabled: Any = node.create_client(SetBool, 'guardian/set_enabled')
        planning, adapi = 'autoware_planning_msgs', 'autoware_adapi_v1_msgs'
        for package, kind, name, take, profile in (
            (planning, 'Path', 'autoware_path', self._on_path, RELIABLE),
            (planning, 'LaneletRoute', 'lanelet_route', self._on_lanelet_route, LATCHED),
            (adapi, 'OperationModeState', 'operation_mode', self._on_mode, LATCHED),
            (adapi, 'MrmState', 'mrm_state', self._on_mrm, RELIABLE),
        ):
            message_class = autoware_class('autoware', package, kind)
            self.meters[name].subscribe(node, message_class, take, profile)

    def _now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)

    def _on_path(self, message: Any) -> None:
        self._path = message
        self._publish_route('autoware_path')

    def _on_lanelet_route(self, message: Any) -> None:
        self._lanelet_route = message
        self._publish_route('lanelet_route')

    def _publish_route(self, source: str) -> None:
        meter = self.meters[source]
        if self._path is None:
            meter.arrived(self._now_ns())
            return
        try:
            frame_id, places = read_route_places(self._path, self._lanelet_route)
            if frame_id != MAP_FRAME:
                raise SpanvlaError(f'path: frame {frame_id!r:.40} is not {MAP_FRAME!r}')
        except SpanvlaError as error:
            meter.fault(self._now_ns(), str(error))
            return
        meter.arrived(self._now_ns())
        if len(places) < 2:
            return
        route = PathMessage()
        route.header.frame_id = frame_id
        stamp = self._path.header.stamp
        route.header.stamp.sec, route.header.stamp.nanosec = stamp.sec, stamp.nanosec
        for x_m, y_m in places.tolist():
            pose = PoseStamped()
            pose.header = route.header
            pose.pose.position.x, pose.pose.position.y = x_m, y_m
            pose.pose.orientation.w = 1.0
            route.poses.append(pose)
        self._route_out.publish(route)

    def _on_mode(self, message: Any) -> None:
        self.meters['operation_mode'].arrived(self._now_ns())
        self._engaged_out.publish(Bool(data=read_engaged(message)))

    def _on_mrm(self, message: Any) -> None:
        meter = self.meters['mrm_state']
        try:
            state = read_mrm(message)
        except SpanvlaError as error:
            meter.fault(self._now_ns(), str(error))
            return
        meter.arrived(self._now_ns())
        standby, now_ns = state in STANDBY_STATES, self._now_ns()
        due = standby and not 0 <= now_ns - self._asked_ns < REMIND_NS
        if (standby != self._standby or due) and self._set_enabled.service_is_ready():
            self._standby, self._asked_ns = standby, now_ns
            self._set_enabled.call_async(SetBool.Request(data=not standby))


class AutowareNode(QuietNode):
    """Between Autoware and our inputs, node name `autoware`."""

    def __init__(self) -> None:
        """Open the topics."""
        super().__init__('autoware')
        self._inputs = AutowareInputs(self)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)

    def _publish_diagnostics(self) -> None:
        self._diagnostics.publish([], self._inputs.meters.values())


def main() -> int:
    """Translate until a signal."""
    return run_node(AutowareNode)


if __name__ == '__main__':
    sys.exit(main())
