"""The stand-in for CARLA and its ros-bridge on a live graph, in synchronous mode.

Ticks, publishes, and waits for one control message before the next tick, as the bridge does with
`synchronous_mode_wait_for_vehicle_control_command`. `carla_msgs` has no wheel: without it the
control is a Twist, everything else is as it is with CARLA.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

from geometry_msgs.msg import Twist
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.ros.controls import CARLA, message_class
from spanvla_ros.ros.diagnostics import OK, WARN, DiagnosticsPublisher, status
from spanvla_ros.ros.parameters import BridgeSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.safety.state import load_vehicle
from spanvla_ros.town.bodies import Paint
from spanvla_ros.town.carla_stand_in import StandIn, Topic
from spanvla_ros.town.opendrive import load_opendrive
from spanvla_ros.town.opendrive_ground import paint_map
from spanvla_ros.town.opendrive_routes import route_world
from spanvla_ros.types import SpanvlaError

# The bridge's VEHICLE_CONTROL_TIMEOUT.
CONTROL_TIMEOUT_S = 1.0
BRIDGE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


def make_message(kind: str) -> Any:
    """An empty ROS message of a type such as `nav_msgs/msg/Odometry`."""
    package, _, name = kind.split('/')
    return getattr(importlib.import_module(f'{package}.msg'), name)()


class BridgeNode(QuietNode):
    """One ego vehicle on a map, node name `bridge`."""

    def __init__(self) -> None:
        """Read the map, draw the route, start ticking.

        Raises:
            SpanvlaError: no map, or a control message whose package is not installed.
        """
        super().__init__('bridge')
        self.settings = settings = declare(self, BridgeSettings)
        if not settings.map:
            raise SpanvlaError('bridge: no map; give the parameter map, an .xodr file')
        found = load_opendrive(Path(settings.map))
        vehicle = load_vehicle(settings.vehicle_file)
        world = route_world(
            found, paint_map(found, Paint()), settings.seed, settings.route_m, vehicle
        )
        self._stand_in = StandIn(world, TOWN_CAMERAS, make_message, role_name=settings.role_name)
        self._outs: dict[str, Any] = {}
        self._ticks = 0
        self._timeouts = 0
        self._control = threading.Event()
        self._stop = threading.Event()
        base = f'/carla/{settings.role_name}'
        if settings.control == 'twist':
            self.create_subscription(Twist, f'{base}/twist_cmd', self._on_control, CARLA)
        else:
            kind = message_class('carla', 'carla_msgs', 'CarlaEgoVehicleControl')
            self.create_subscription(kind, f'{base}/vehicle_control_cmd', self._on_control, CARLA)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)
        self._thread = threading.Thread(target=self._run, name='ticks', daemon=True)
        self._thread.start()

    def _on_control(self, message: Any) -> None:
        if isinstance(message, Twist):
            self._stand_in.apply_twist(message)
        else:
            self._stand_in.apply_control(message)
        self._control.set()

    def _run(self) -> None:
        for topic in self._stand_in.latched():
            self._publish(topic, LATCHED)
        while not self._stop.is_set() and not self._stand_in.world.finished:
            self._control.clear()
            for topic in self._stand_in.tick():
                self._publish(topic, BRIDGE)
            self._ticks += 1
            if not self._control.wait(CONTROL_TIMEOUT_S):
                self._timeouts += 1
        self.get_logger().info(json.dumps(self._result()))

    def _publish(self, topic: Topic, profile: QoSProfile) -> None:
        if topic.name not in self._outs:
            self._outs[topic.name] = self.create_publisher(
                type(topic.message), topic.name, profile
            )
        self._outs[topic.name].publish(topic.message)

    def _result(self) -> dict[str, Any]:
        outcome = self._stand_in.world.outcome()
        return {
            'ticks': self._ticks,
            'timeouts': self._timeouts,
            'completion': round(outcome.completion, 4),
            'distance_m': round(outcome.distance_m, 2),
            'collided_with': outcome.collided_with,
            'offroad_m': round(outcome.offroad_m, 2),
            'finished': self._stand_in.world.finished,
        }

    def _publish_diagnostics(self) -> None:
        values = {name: str(value) for name, value in self._result().items()}
        waiting = self._timeouts and self._timeouts >= self._ticks - 1
        level, text = (WARN, 'no control message comes') if waiting else (OK, 'ticking')
        self._diagnostics.publish([status('world', level, text, values)])

    def close(self) -> None:
        """Stop ticking."""
        self._stop.set()
        self._control.set()
        if hasattr(self, '_thread'):
            self._thread.join(timeout=2.0)


def main() -> int:
    """Tick until the route ends or a signal comes."""
    return run_node(BridgeNode)


if __name__ == '__main__':
    sys.exit(main())
