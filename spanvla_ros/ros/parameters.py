"""Node parameters: one frozen dataclass a node is the only place a parameter is written.

`declare` turns its fields into declared ROS parameters with description and range, and reads the
values given by launch or YAML back into an instance. Most are read-only; the few marked live may
be set while the node runs, and are refused or applied as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

from spanvla_ros.types import MISSING_CAMERA, SCHEDULES, SpanvlaError

Settings = TypeVar('Settings')


def setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A dataclass field that is a parameter.

    Args:
        default: its value, which also gives its type.
        text: its description.
        low: lowest value.
        high: highest value.
        choices: allowed words.
        live: whether it may be set while the node runs.
    """
    metadata = {'text': text, 'low': low, 'high': high, 'choices': choices, 'live': live}
    return field(default=default, metadata=metadata)


def declare(
    node: Node, kind: type[Settings], changed: Callable[[Settings], None] | None = None
) -> Settings:
    """Declare every field of `kind` on `node` and return the values given.

    Args:
        node: the node.
        kind: its settings.
        changed: called with all values after live ones were set.

    Raises:
        SpanvlaError: a value of the wrong type, out of its range or not an allowed word.
    """
    values = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        try:
            node.declare_parameter(entry.name, entry.default, _descriptor(entry))
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise SpanvlaError(f'{node.get_name()}: parameter {entry.name}: {error}') from error
        value = node.get_parameter(entry.name).value
        reason = _refusal(entry, value)
        if reason:
            raise SpanvlaError(f'{node.get_name()}: parameter {reason}')
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    current = kind(**values)
    if changed is not None:
        node.add_on_set_parameters_callback(_Applier(current, changed))
    return current


class _Applier:
    """Judges values set while the node runs; ROS has looked at types, ranges, read-only."""

    def __init__(self, current: Any, changed: Callable[[Any], None]) -> None:
        self._current, self._changed = current, changed
        self._entries = {entry.name: entry for entry in fields(current)}

    def __call__(self, parameters: Sequence[Any]) -> SetParametersResult:
        values = {p.name: p.value for p in parameters if p.name in self._entries}
        for name, value in values.items():
            reason = _refusal(self._entries[name], value)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        if values:
            self._current = replace(self._current, **values)
            self._changed(self._current)
        return SetParametersResult(successful=True)


def _refusal(entry: Any, value: Any) -> str:
    """Why ROS should not have let a value through; it knows no words, and NaN is in any range."""
    choices = entry.metadata['choices']
    if choices and value not in choices:
        return f'{entry.name} is {value!r}; choose from {", ".join(choices)}'
    if isinstance(value, float) and not math.isfinite(value):
        return f'{entry.name} is {value}; give a finite number'
    return ''


def _descriptor(entry: Any) -> ParameterDescriptor:
    text, low, high, live = (entry.metadata[key] for key in ('text', 'low', 'high', 'live'))
    descriptor = ParameterDescriptor(description=text, read_only=not live)
    choices = entry.metadata['choices']
    if choices:
        descriptor.additional_constraints = f'one of {", ".join(choices)}'
    if low is None or high is None:
        return descriptor
    if isinstance(entry.default, float):
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(low), to_value=float(high))
        ]
    else:
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
    return descriptor


@dataclass(frozen=True)
class PlannerSettings:
    """Parameters of the planner node."""

    model_dir: str = setting('models/town', 'model directory, verified against its manifest')
    backend: str = setting(
        'auto',
        'inference backend; each that auto refuses is logged with its reason',
        choices=(
            'auto',
            'onnxruntime',
            'onnxruntime-cuda',
            'onnxruntime-tensorrt',
            'torch',
            'torch-cuda',
            'tensorrt',
        ),
    )
    precision: str = setting(
        'fp32',
        'graphs to run; below fp32 those of a named backend that were exported so',
        choices=('fp32', 'fp16', 'bf16', 'int8', 'fp8'),
    )
    schedule: str = setting(
        'model',
        'reasoning schedule; model takes the default of the model',
        choices=('model', *SCHEDULES),
    )
    steps: int = setting(0, 'flow steps; 0 takes the default of the model', low=0, high=100)
    autostart: bool = setting(
        default=True, text='configure and activate without a lifecycle manager'
    )
    camera_topics: tuple[str, ...] = setting(
        ('',), 'pairs camera=topic that replace input/<camera>/image'
    )
    use_cv_bridge: bool = setting(
        default=False, text='convert every raw image with cv_bridge where it is installed'
    )
    pictures: str = setting(
        'auto',
        'which picture of camera_info the cameras send; auto goes by rect in the topic',
        choices=('auto', 'raw', 'rectified'),
    )
    extrinsics: str = setting(
        'model',
        'where the cameras stand: as in the model, by rig_file, or by /tf_static',
        choices=('model', 'file', 'tf'),
    )
    rig_file: str = setting('', 'mounts of the cameras, for extrinsics file')
    base_frame: str = setting('base_link', 'frame of the rear axle, for extrinsics tf')
    missing_camera: str = setting(
        'mask',
        'what stands for a camera without a picture: nothing, its last one, or no plan at all',
        choices=MISSING_CAMERA,
    )
    last_valid_max_age_s: float = setting(
        0.3, 'missing_camera last_valid: oldest picture that may stand in', low=0.0, high=2.0
    )
    sync_tolerance_ms: float = setting(
        50.0, 'how far a picture may be off the anchor in time', low=1.0, high=500.0
    )
    sync_wait_ms: float = setting(
        8.0,
        'how long the other cameras are waited for after the anchor',
        low=0.0,
        high=100.0,
        live=True,
    )
    reason_slice_ms: float = setting(
        10.0, 'longest slice of reasoning between frames', low=1.0, high=50.0, live=True
    )
    reason_quota: int = setting(
        2,
        'tokens of reasoning after each plan, even where the next picture waits',
        low=0,
        high=64,
        live=True,
    )
    overlay_hz: float = setting(
        2.0, 'rate of the overlay picture; 0 is off', low=0.0, high=30.0, live=True
    )
    vision_every: int = setting(
        1, 'encode pictures on every n-th frame', low=1, high=10, live=True
    )
    think_tokens: int = setting(
        0, 'most tokens of one reasoning; 0 takes the room of the model', low=0, high=4096
    )
    think_budget: int = setting(
        0, 'tokens of reasoning a drive may take, then it is fast; 0 is no end', low=0, high=10**7
    )
    think_window: int = setting(
        100, 'reasonings that the think rate and its alarm look back on', low=1, high=10**5
    )
    output_frame: str = setting('odom', 'frame of odometry, route and plan')
    input_timeout_s: float = setting(
        0.5, 'an input older than this is reported as stale', low=0.05, high=60.0
    )


@dataclass(frozen=True)
class GuardianSettings:
    """Parameters of the guardian node."""

    vehicle_file: str = setting('', 'vehicle file; empty is the built-in vehicle')
    output_frame: str = setting('odom', 'frame of odometry, route, plan and trajectory')
    output_hz: float = setting(20.0, 'trajectories a second', low=10.0, high=100.0)
    enabled: bool = setting(default=True, text='follow plans from the start; false is STANDBY')
    plan_fresh_s: float = setting(
        0.35, 'age of its image from which a plan is followed with a warning', low=0.05, high=2.0
    )
    plan_max_age_s: float = setting(
        1.0, 'age of its image from which a plan is no longer followed', low=0.1, high=3.0
    )
    odometry_timeout_s: float = setting(
        0.3, 'without odometry for this long the guardian brakes hard', low=0.05, high=2.0
    )
    display_hz: float = setting(
        5.0, 'rate of path and markers; 0 is off', low=0.0, high=30.0, live=True
    )
    autoware: bool = setting(
        default=False,
        text='publish output/autoware_trajectory too; needs autoware_planning_msgs',
    )
    autoware_generator: str = setting(
        '', 'name under which output/autoware_candidates is published; empty is not at all'
    )


@dataclass(frozen=True)
class FollowerSettings:
    """Parameters of the follower node."""

    vehicle_file: str = setting('', 'vehicle file; empty is the built-in vehicle')
    output_frame: str = setting('odom', 'frame of odometry and trajectory')
    command_hz: float = setting(30.0, 'commands a second', low=10.0, high=200.0)
    trajectory_timeout_s: float = setting(
        0.3, 'without a trajectory for this long the follower brakes fully', low=0.1, high=2.0
    )
    odometry_timeout_s: float = setting(
        0.3, 'without odometry for this long the follower brakes fully', low=0.05, high=2.0
    )
    latency_s: float = setting(0.1, 'time from odometry to the wheels', low=0.0, high=0.5)
    preview_s: float = setting(
        0.25, 'response time of the speed control of the vehicle', low=0.05, high=2.0
    )
    control: str = setting(
        'twist',
        'message for the vehicle; all but twist need a message package',
        choices=('twist', 'ackermann', 'ackermann_stamped', 'carla'),
    )
    trigger: str = setting(
        'timer',
        'what a command answers: the clock, or each odometry (synchronous simulators)',
        choices=('timer', 'odometry'),
    )
    full_lock_rad: float = setting(
        1.22, 'control carla: wheel angle at steer 1 until vehicle_info tells', low=0.1, high=1.5
    )
    full_throttle_mps2: float = setting(
        3.0, 'control carla: acceleration at full throttle', low=0.5, high=20.0
    )
    full_brake_mps2: float = setting(
        8.0, 'control carla: deceleration at full brake', low=1.0, high=20.0
    )


@dataclass(frozen=True)
class RecorderSettings:
    """Parameters of the recorder node."""

    out: str = setting('drive.mcap', 'file to write; an existing one is not touched')
    cameras: tuple[str, ...] = setting(
        ('front', 'front_left', 'front_right'), 'cameras whose pictures are recorded'
    )
    record_images: bool = setting(default=True, text='record camera pictures')
    flush_s: float = setting(0.5, 'most that a kill may lose', low=0.05, high=10.0)
    incident_s: float = setting(20.0, 'length of what save_incident keeps', low=1.0, high=120.0)
    incident_mb: int = setting(128, 'memory for what save_incident keeps', low=1, high=4096)
    incident_dir: str = setting('incidents', 'folder for saved incidents')


@dataclass(frozen=True)
class TownSettings:
    """Parameters of the town node."""

    scenario: str = setting('mix', 'scenario family')
    seed: int = setting(0, 'seed of the world', low=0, high=2**31 - 1)
    camera_hz: float = setting(15.0, 'pictures a second and camera', low=1.0, high=60.0)
    image_transport: str = setting('raw', 'form of the pictures', choices=('raw', 'compressed'))
    camera_loss: float = setting(0.0, 'share of pictures lost on purpose', low=0.0, high=0.95)
    camera_jitter_ms: float = setting(
        0.0, 'pictures are sent up to this much late, by chance', low=0.0, high=500.0
    )
    camera_skew_ms: float = setting(
        0.0,
        'how far the other cameras expose after and before the first, by turns',
        low=0.0,
        high=100.0,
    )
    vehicle_file: str = setting('', 'vehicle file; empty is the built-in vehicle')
    wait_for_driver: bool = setting(
        default=True, text='hold the world still until the first command that moves the car'
    )
    command_timeout_s: float = setting(
        0.5, 'without a command for this long the car brakes by itself', low=0.05, high=5.0
    )


@dataclass(frozen=True)
class CarlaSettings:
    """Parameters of the carla node."""

    role_name: str = setting('ego_vehicle', 'role name of the ego vehicle in CARLA')
    origin_ahead_m: float = setting(
        1.4, 'how far the origin of the vehicle lies ahead of its rear axle', low=-5.0, high=5.0
    )
    input_timeout_s: float = setting(
        0.5, 'an input older than this is reported as stale', low=0.05, high=60.0
    )


@dataclass(frozen=True)
class ReplaySettings:
    """Parameters of the replay node."""

    bag: str = setting('', 'bag folder, .mcap or .db3 file')
    rate: float = setting(1.0, 'speed of the replay', low=0.01, high=100.0)
    loop: bool = setting(default=False, text='begin again at the end; the clock runs back')
    clock: bool = setting(default=True, text='publish /clock, that of the bag where it has one')
    clock_hz: float = setting(100.0, 'rate of /clock on the clock of the wall', low=1.0, high=1e3)
    start_s: float = setting(0.0, 'begin this long after the start of the bag', low=0.0, high=1e6)
    wait_s: float = setting(1.0, 'time for subscribers before the first message', low=0.0, high=60)
    topics: tuple[str, ...] = setting(('',), 'topics to replay; empty is all')
    remaps: tuple[str, ...] = setting(('',), 'pairs recorded:=published of topic names')
    latched: tuple[str, ...] = setting(
        ('',), 'topics to latch where the bag does not say with which QoS they were recorded'
    )
    at_end: str = setting(
        'exit', 'after the last message; stay keeps latched topics', choices=('exit', 'stay')
    )


@dataclass(frozen=True)
class BridgeSettings:
    """Parameters of the bridge node, the stand-in for CARLA."""

    map: str = setting('', 'OpenDRIVE map, such as Town01.xodr')
    seed: int = setting(0, 'seed of route and traffic', low=0, high=2**31 - 1)
    route_m: float = setting(250.0, 'length of the route', low=20.0, high=5000.0)
    role_name: str = setting('ego_vehicle', 'role name of the ego vehicle')
    control: str = setting(
        'twist', 'control message; carla needs carla_msgs', choices=('twist', 'carla')
    )
    vehicle_file: str = setting('', 'vehicle file; empty is the built-in vehicle')


SETTINGS: Mapping[str, type] = {
    'planner': PlannerSettings,
    'shadow': PlannerSettings,
    'guardian': GuardianSettings,
    'follower': FollowerSettings,
    'recorder': RecorderSettings,
    'town': TownSettings,
    'carla': CarlaSettings,
    'replay': ReplaySettings,
    'bridge': BridgeSettings,
}
