"""A drive command in the words of foreign interfaces: Twist, Ackermann, CARLA's pedals.

Pure functions that fill messages by attribute; no ROS package is imported, so that signs and
units can be tested wherever Python runs. Steering is positive to the left here (REP-103).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from spanvla_ros.types import DriveCommand, SpanvlaError

# Reasons of a command that is not an emergency.
FOLLOWS = ('following', 'standing')
STAND_MPS = 0.1


def set_stamp(header: Any, stamp_ns: int) -> None:
    """Write integer nanoseconds into a `std_msgs/Header`."""
    header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)


def fill_twist(message: Any, command: DriveCommand) -> Any:
    """A `geometry_msgs/Twist`: wanted speed and yaw rate in the body frame."""
    message.linear.x = float(command.speed_mps)
    message.angular.z = float(command.yaw_rate_radps)
    return message


def fill_ackermann(message: Any, command: DriveCommand) -> Any:
    """An `ackermann_msgs/AckermannDrive`: wheel angle in radians, left positive, speed in m/s.

    Rates, acceleration and jerk stay 0, which the message defines as "as quickly as possible":
    the follower's speed is limited already. A magnitude would be unsafe, since the message takes
    it for both directions and CARLA's Ackermann controller takes its sign.
    """
    message.steering_angle = float(command.steering_rad)
    message.steering_angle_velocity = 0.0
    message.speed = float(command.speed_mps)
    message.acceleration = 0.0
    message.jerk = 0.0
    return message


@dataclass(frozen=True)
class CarlaCar:
    """How a CARLA vehicle answers its pedals and its steering wheel.

    `full_lock_rad` is the wheel angle at `steer` = 1. The other defaults are those of the
    ros-bridge's Ackermann controller: 3 m/s2 at full throttle, 8 m/s2 at full brake, 500 N of
    engine brake and 1500 kg; air and tires resist with `resistance_mps2` and `drag_per_m` times
    the speed squared.
    """

    full_lock_rad: float = math.radians(70.0)
    full_throttle_mps2: float = 3.0
    full_brake_mps2: float = 8.0
    engine_brake_mps2: float = 500.0 / 1500.0
    resistance_mps2: float = 0.1
    drag_per_m: float = 0.00028


@dataclass(frozen=True)
class CarlaControl:
    """CARLA's vehicle control: throttle and brake from 0 to 1, steer from -1 to 1 (right)."""

    throttle: float
    steer: float
    brake: float
    hand_brake: bool = False


def carla_control(command: DriveCommand, speed_mps: float, car: CarlaCar) -> CarlaControl:
    """The pedals that give a command's acceleration, and the steering wheel.

    CARLA steers to the right with a positive number, so the sign turns. One pedal is pressed at
    a time; between them lies what the engine brakes by itself. A command that brakes because it
    cannot follow, or that is no number, is the full brake.

    Args:
        command: of the follower.
        speed_mps: the present speed.
        car: how the vehicle answers.
    """
    steer = -command.steering_rad / car.full_lock_rad
    steer = min(max(steer, -1.0), 1.0) if math.isfinite(steer) else 0.0
    speed_mps = max(speed_mps, 0.0) if math.isfinite(speed_mps) else 0.0
    emergency = command.braking and command.reason not in FOLLOWS
    halted = command.braking and speed_mps < STAND_MPS
    if emergency or halted or not math.isfinite(command.accel_mps2):
        return CarlaControl(0.0, steer, 1.0)
    effort = command.accel_mps2 + car.resistance_mps2 + car.drag_per_m * speed_mps**2
    if effort >= 0.0 and not command.braking:
        return CarlaControl(min(effort / car.full_throttle_mps2, 1.0), steer, 0.0)
    wanted = max(-effort - car.engine_brake_mps2, 0.0)
    return CarlaControl(0.0, steer, min(wanted / car.full_brake_mps2, 1.0))


def fill_carla_control(message: Any, control: CarlaControl, stamp_ns: int) -> Any:
    """A `carla_msgs/CarlaEgoVehicleControl`, in automatic gear and forward."""
    set_stamp(message.header, stamp_ns)
    message.throttle = float(control.throttle)
    message.steer = float(control.steer)
    message.brake = float(control.brake)
    message.hand_brake = bool(control.hand_brake)
    message.reverse = False
    message.gear = 0
    message.manual_gear_shift = False
    return message


def read_full_lock(message: Any) -> float:
    """The wheel angle at full lock in radians, of a `carla_msgs/CarlaEgoVehicleInfo`.

    Rear wheels do not turn, so the largest angle counts.

    Raises:
        SpanvlaError: no wheel turns.
    """
    angles = [float(wheel.max_steer_angle) for wheel in message.wheels]
    full_lock_rad = max((angle for angle in angles if math.isfinite(angle)), default=0.0)
    if not 0.0 < full_lock_rad < math.pi / 2.0:
        raise SpanvlaError(f'vehicle_info: wheels turn by {angles} rad; give full_lock_rad')
    return full_lock_rad
