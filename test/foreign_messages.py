"""Message classes of packages that have no wheel, made by rosbags from the public definitions.

Fields as they stand upstream, in upstream's order; comments and constants left out where no test
needs them. Sources, at these commits:

* carla_msgs: github.com/carla-simulator/ros-carla-msgs 081fdcdc8a4f8d4ce936b792c4ef13aba3fd7478
* ackermann_msgs: github.com/ros-drivers/ackermann_msgs 843a4836ba942038db088e06fe626160c09249f0
* autoware_planning_msgs: github.com/autowarefoundation/autoware_msgs
  7025d8f7df0ead43037d86f8a4ffda8b397d0293
* autoware_internal_planning_msgs: github.com/autowarefoundation/autoware_internal_msgs
  1856e5b23172b0e4c1fb53b3baf8365d6a773007
* autoware_adapi_v1_msgs: github.com/autowarefoundation/autoware_adapi_msgs
  35a7aeb97dfbbbc363c49fc032ded0c8ba172e24
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

DEFINITIONS = {
    'carla_msgs/msg/CarlaEgoVehicleControl': """
std_msgs/Header header
float32 throttle
float32 steer
float32 brake
bool hand_brake
bool reverse
int32 gear
bool manual_gear_shift
""",
    'carla_msgs/msg/CarlaEgoVehicleInfoWheel': """
float32 tire_friction
float32 damping_rate
float32 max_steer_angle
float32 radius
float32 max_brake_torque
float32 max_handbrake_torque
geometry_msgs/Vector3 position
""",
    'carla_msgs/msg/CarlaEgoVehicleInfo': """
uint32 id
string type
string rolename
carla_msgs/CarlaEgoVehicleInfoWheel[] wheels
float32 max_rpm
float32 moi
float32 damping_rate_full_throttle
float32 damping_rate_zero_throttle_clutch_engaged
float32 damping_rate_zero_throttle_clutch_disengaged
bool use_gear_autobox
float32 gear_switch_time
float32 clutch_strength
float32 mass
float32 drag_coefficient
geometry_msgs/Vector3 center_of_mass
""",
    'ackermann_msgs/msg/AckermannDrive': """
float32 steering_angle
float32 steering_angle_velocity
float32 speed
float32 acceleration
float32 jerk
""",
    'ackermann_msgs/msg/AckermannDriveStamped': """
std_msgs/Header header
ackermann_msgs/AckermannDrive drive
""",
    'autoware_planning_msgs/msg/TrajectoryPoint': """
builtin_interfaces/Duration time_from_start
geometry_msgs/Pose pose
float32 longitudinal_velocity_mps
float32 lateral_velocity_mps
float32 acceleration_mps2
float32 heading_rate_rps
float32 front_wheel_angle_rad
float32 rear_wheel_angle_rad
""",
    'autoware_planning_msgs/msg/Trajectory': """
std_msgs/Header header
autoware_planning_msgs/TrajectoryPoint[] points
""",
    'autoware_planning_msgs/msg/PathPoint': """
geometry_msgs/Pose pose
float32 longitudinal_velocity_mps
float32 lateral_velocity_mps
float32 heading_rate_rps
bool is_final
""",
    'autoware_planning_msgs/msg/Path': """
std_msgs/Header header
autoware_planning_msgs/PathPoint[] points
geometry_msgs/Point[] left_bound
geometry_msgs/Point[] right_bound
""",
    'autoware_planning_msgs/msg/LaneletPrimitive': """
int64 id
string primitive_type
""",
    'autoware_planning_msgs/msg/LaneletSegment': """
autoware_planning_msgs/LaneletPrimitive preferred_primitive
autoware_planning_msgs/LaneletPrimitive[] primitives
""",
    'autoware_planning_msgs/msg/LaneletRoute': """
std_msgs/Header header
geometry_msgs/Pose start_pose
geometry_msgs/Pose goal_pose
autoware_planning_msgs/LaneletSegment[] segments
unique_identifier_msgs/UUID uuid
bool allow_modification
""",
    'autoware_internal_planning_msgs/msg/CandidateTrajectory': """
std_msgs/Header header
unique_identifier_msgs/UUID generator_id
autoware_planning_msgs/TrajectoryPoint[] points
""",
    'autoware_internal_planning_msgs/msg/GeneratorInfo': """
unique_identifier_msgs/UUID generator_id
std_msgs/String generator_name
""",
    'autoware_internal_planning_msgs/msg/CandidateTrajectories': """
autoware_internal_planning_msgs/CandidateTrajectory[] candidate_trajectories
autoware_internal_planning_msgs/GeneratorInfo[] generator_info
""",
    'autoware_adapi_v1_msgs/msg/MrmState': """
uint16 UNKNOWN=0
uint16 NORMAL=1
uint16 MRM_OPERATING=2
uint16 MRM_SUCCEEDED=3
uint16 MRM_FAILED=4
uint16 NONE=1
uint16 EMERGENCY_STOP=2
uint16 COMFORTABLE_STOP=3
uint16 PULL_OVER=4
builtin_interfaces/Time stamp
uint16 state
uint16 behavior
""",
    'autoware_adapi_v1_msgs/msg/OperationModeState': """
uint8 UNKNOWN=0
uint8 STOP=1
uint8 AUTONOMOUS=2
uint8 LOCAL=3
uint8 REMOTE=4
builtin_interfaces/Time stamp
uint8 mode
bool is_autoware_control_enabled
bool is_in_transition
bool is_stop_mode_available
bool is_autonomous_mode_available
bool is_local_mode_available
bool is_remote_mode_available
""",
}
ZEROS = {'string': '', 'bool': False, 'float32': 0.0, 'float64': 0.0}

TYPES = get_typestore(Stores.LATEST)
_made: dict[str, Any] = {}
for _name, _text in DEFINITIONS.items():
    _made.update(get_types_from_msg(_text, _name))
TYPES.register(_made)


def empty(name: str) -> Any:
    """A message of a type with every field at its default, as ROS's own classes make it."""
    layout = TYPES.get_msgdef(name).fields
    return TYPES.types[name](**{field: _default(kind) for field, kind in layout})


def _default(description: Any) -> Any:
    node, detail = description
    if node.name == 'NAME':
        return empty(detail)
    if node.name == 'BASE':
        return ZEROS.get(detail[0], 0)
    length = detail[1] if node.name == 'ARRAY' else 0
    return np.zeros(length, dtype=np.uint8) if node.name == 'ARRAY' else []


def round_trip(message: Any) -> Any:
    """The message through its wire format: wrong types and values out of range do not survive."""
    name = message.__msgtype__
    return TYPES.deserialize_cdr(TYPES.serialize_cdr(message, name), name)


def install(monkeypatch: Any, *packages: str) -> None:
    """Make `<package>.msg` importable, its classes made here."""
    for package in packages:
        module = ModuleType(f'{package}.msg')
        for name in DEFINITIONS:
            if name.startswith(f'{package}/'):
                setattr(module, name.rsplit('/', 1)[1], _maker(name))
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, f'{package}.msg', module)


def _maker(name: str) -> Any:
    def make() -> Any:
        return empty(name)

    make.msgtype = name
    return make


class Desk:
    """Takes publishers, subscriptions and clients as a node does and keeps what they carry.

    No publisher of rclpy takes classes that rosbags made.
    """

    def __init__(self, **parameters: object) -> None:
        self.parameters = parameters
        self.sent: list[Any] = []
        self.topics: dict[str, tuple[Any, Any]] = {}
        self.callbacks: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.calls: list[tuple[str, Any]] = []

    def get_parameter(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.parameters[name])

    def create_publisher(self, kind: Any, topic: str, profile: Any) -> SimpleNamespace:
        self.topics[topic] = (kind, profile)
        return SimpleNamespace(publish=self.sent.append, wait_for_all_acked=lambda _: True)

    def create_subscription(self, kind: Any, topic: str, callback: Any, profile: Any) -> None:
        self.topics[topic] = (kind, profile)
        self.callbacks[topic] = callback

    def create_client(self, _kind: Any, name: str) -> SimpleNamespace:
        def call(request: Any) -> None:
            self.calls.append((name, request))

        return SimpleNamespace(service_is_ready=lambda: True, call_async=call)

    def get_clock(self) -> SimpleNamespace:
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=1_000_000_000))

    def get_logger(self) -> SimpleNamespace:
        return SimpleNamespace(warning=self.warnings.append)
