"""Control back-ends of the follower: one class for each message a vehicle may understand.

A back-end is a class with `send` and `flush` and a line in `CONTROLS`. Those whose message
package is not part of every ROS installation import it when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from geometry_msgs.msg import Twist
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from spanvla_ros.controls import (
    CarlaCar,
    carla_control,
    fill_ackermann,
    fill_carla_control,
    fill_twist,
    read_full_lock,
    set_stamp,
)
from spanvla_ros.types import DriveCommand, SpanvlaError

NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
CARLA = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
CARLA_LATCHED = QoSProfile(
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


class Control(Protocol):
    """What sends drive commands to a vehicle."""

    def send(self, command: DriveCommand, speed_mps: float, stamp_ns: int) -> None:
        """Send one command; `speed_mps` is the present speed."""

    def flush(self, timeout: Duration) -> None:
        """Wait until what was sent has arrived."""


def message_class(control: str, package: str, name: str) -> Any:
    """A message class of a package that need not be installed.

    Raises:
        SpanvlaError: it is not.
    """
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except ImportError as error:
        raise SpanvlaError(
            f'follower: control is {control} but {package} is not installed; '
            f'source a workspace that has it or set control to twist'
        ) from error


class TwistControl:
    """`geometry_msgs/Twist` on `output/twist`."""

    def __init__(self, node: Node, _car: CarlaCar) -> None:
        """Open the topic."""
        self._publisher = node.create_publisher(Twist, 'output/twist', NEWEST)

    def send(self, command: DriveCommand, _speed_mps: float, _stamp_ns: int) -> None:
        """Send the wanted speed and yaw rate."""
        self._publisher.publish(fill_twist(Twist(), command))

    def flush(self, timeout: Duration) -> None:
        """Wait for the last word to arrive."""
        self._publisher.wait_for_all_acked(timeout)


class AckermannControl:
    """`ackermann_msgs/AckermannDrive` on `output/ackermann`."""

    def __init__(self, node: Node, _car: CarlaCar) -> None:
        """Open the topic."""
        self._kind = message_class('ackermann', 'ackermann_msgs', 'AckermannDrive')
        self._publisher = node.create_publisher(self._kind, 'output/ackermann', NEWEST)

    def send(self, command: DriveCommand, _speed_mps: float, _stamp_ns: int) -> None:
        """Send wheel angle and speed."""
        self._publisher.publish(fill_ackermann(self._kind(), command))

    def flush(self, timeout: Duration) -> None:
        """Wait for the last word to arrive."""
        self._publisher.wait_for_all_acked(timeout)


class AckermannStampedControl:
    """`ackermann_msgs/AckermannDriveStamped` on `output/ackermann`, in `base_link`."""

    def __init__(self, node: Node, _car: CarlaCar) -> None:
        """Open the topic."""
        self._kind = message_class('ackermann_stamped', 'ackermann_msgs', 'AckermannDriveStamped')
        self._publisher = node.create_publisher(self._kind, 'output/ackermann', NEWEST)

    def send(self, command: DriveCommand, _speed_mps: float, stamp_ns: int) -> None:
        """Send wheel angle and speed with the time of the command."""
        message = self._kind()
        set_stamp(message.header, stamp_ns)
        message.header.frame_id = 'base_link'
        fill_ackermann(message.drive, command)
        self._publisher.publish(message)

    def flush(self, timeout: Duration) -> None:
        """Wait for the last word to arrive."""
        self._publisher.wait_for_all_acked(timeout)


class CarlaVehicleControl:
    """`carla_msgs/CarlaEgoVehicleControl` on `output/vehicle_control`.

    Full lock is taken from `input/vehicle_info` where the bridge publishes it.
    """

    def __init__(self, node: Node, car: CarlaCar) -> None:
        """Open the topics."""
        self._kind = message_class('carla', 'carla_msgs', 'CarlaEgoVehicleControl')
        info = message_class('carla', 'carla_msgs', 'CarlaEgoVehicleInfo')
        self._node, self.car = node, car
        self._publisher = node.create_publisher(self._kind, 'output/vehicle_control', CARLA)
        node.create_subscription(info, 'input/vehicle_info', self._on_info, CARLA_LATCHED)

    def _on_info(self, message: Any) -> None:
        try:
            self.car = replace(self.car, full_lock_rad=read_full_lock(message))
        except SpanvlaError as error:
            self._node.get_logger().warning(str(error))

    def send(self, command: DriveCommand, speed_mps: float, stamp_ns: int) -> None:
        """Send pedals and steering wheel."""
        control = carla_control(command, speed_mps, self.car)
        self._publisher.publish(fill_carla_control(self._kind(), control, stamp_ns))

    def flush(self, timeout: Duration) -> None:
        """Wait for the last word to arrive."""
        self._publisher.wait_for_all_acked(timeout)


CONTROLS: dict[str, Callable[[Node, CarlaCar], Control]] = {
    'twist': TwistControl,
    'ackermann': AckermannControl,
    'ackermann_stamped': AckermannStampedControl,
    'carla': CarlaVehicleControl,
}
