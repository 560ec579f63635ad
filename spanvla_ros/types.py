"""The data vocabulary: frozen dataclasses in SI units, shared by every layer.

Frames follow REP-103 and REP-105: x forward, y left, yaw counter-clockwise, `base_link` on the
ground below the rear axle. A pose is `(x_m, y_m, yaw_rad)`. Stamps are integer nanoseconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Bool, Float64, UInt8

COMMANDS = ('follow', 'left', 'right', 'straight', 'stop')
SCHEDULES = ('sequential', 'concurrent', 'off')
MISSING_CAMERA = ('mask', 'last_valid', 'drop')
PLAN_SCHEMA_VERSION = 1
PLAN_MAX_BYTES = 64_000


class SpanvlaError(Exception):
    """A fault the user can mend: one sentence naming what, where and the fix."""


class MissingExtraError(SpanvlaError):
    """A library of an optional extra is absent; the sentence holds the pip line."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing `package` and the `extra` of this project that brings it."""
        super().__init__(
            f"{package} is not installed; run: pip install 'spanvla_ros[{extra}]'",
        )


class PlanError(SpanvlaError):
    """A plan that does not follow the schema; it is refused whole."""


@dataclass(frozen=True)
class CameraFrame:
    """One picture of one camera, RGB, at the camera's own size."""

    camera: str
    stamp_ns: int
    image: UInt8[np.ndarray, 'h w 3']


@dataclass(frozen=True)
class EgoState:
    """The vehicle at one instant, its pose in the odometry frame, its motion in `base_link`."""

    stamp_ns: int
    x_m: float
    y_m: float
    yaw_rad: float
    speed_mps: float
    accel_mps2: float = 0.0
    yaw_rate_radps: float = 0.0
    steering_rad: float = 0.0

    @property
    def pose(self) -> Float64[np.ndarray, '3']:
        """The pose `(x_m, y_m, yaw_rad)` in the odometry frame."""
        return np.array([self.x_m, self.y_m, self.yaw_rad])


@dataclass(frozen=True)
class Route:
    """The announced path, coarse points in `frame_id`, and the navigation command."""

    stamp_ns: int
    frame_id: str
    points: Float64[np.ndarray, 'n 2']
    command: str = 'follow'


@dataclass(frozen=True)
class Observation:
    """All a model sees for one plan, aligned in time to the anchor image.

    `frames[c][k]` is camera `c` (order of the model's config), frame `k` (oldest first), or None
    where it is missing. `history` holds past poses in `base_link` at `stamp_ns`, oldest first,
    without the present. `route` holds points in `base_link`, or None. `degraded` names, in short
    reason codes such as `camera_missing:front_left`, all that was masked or extrapolated.
    """

    stamp_ns: int
    frames: tuple[tuple[CameraFrame | None, ...], ...]
    ego: EgoState
    history: Float64[np.ndarray, 'h 3']
    history_valid: Bool[np.ndarray, 'h']
    route: Float64[np.ndarray, 'r 2'] | None
    command: str = 'follow'
    reasoning: str = ''
    reasoning_stamp_ns: int | None = None
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """Poses of `base_link` in `frame_id` at `stamp_ns + times_s`, times strictly increasing."""

    stamp_ns: int
    frame_id: str
    times_s: Float64[np.ndarray, 't']
    poses: Float64[np.ndarray, 't 3']


@dataclass(frozen=True)
class StageTimes:
    """Wall time of each part of one plan."""

    observe_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    reason_ms: float = 0.0
    step_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the planner hands to the guardian: a trajectory and all it was made from.

    `trajectory` is in the odometry frame, its stamp is that of the anchor image; `origin` is the
    ego pose there at that time. Speed, acceleration, yaw rate, `history`, `history_valid`,
    `route` (points in `base_link`), `command` and `reasoning` are the inputs as the model saw
    them: with the images of `image_stamps_ns` the plan can be made again. `driver` is `model` for
    a plan of the model, else the name of what stands in its slot.
    """

    plan_id: int
    trajectory: Trajectory
    origin: tuple[float, float, float]
    image_stamps_ns: tuple[int | None, ...]
    kv_stamp_ns: int
    schedule: str
    steps: int
    speed_mps: float = 0.0
    accel_mps2: float = 0.0
    yaw_rate_radps: float = 0.0
    thinking: str = 'none'
    reasoning: str = ''
    reasoning_stamp_ns: int | None = None
    decision: str = ''
    agreement: bool | None = None
    think_alarm: str = ''
    history: tuple[tuple[float, float, float], ...] = ()
    history_valid: tuple[bool, ...] = ()
    route: tuple[tuple[float, float], ...] | None = None
    route_hash: str = ''
    command: str = 'follow'
    degraded: tuple[str, ...] = ()
    stage_ms: StageTimes = StageTimes()
    model_sha256: str = ''
    backend: str = ''
    driver: str = 'model'

    def to_json(self) -> str:
        """The plan as one JSON object, the form it has on the `plan` topic."""
        content = asdict(self)
        content['trajectory'] = {
            'stamp_ns': self.trajectory.stamp_ns,
            'frame_id': self.trajectory.frame_id,
            'times_s': self.trajectory.times_s.tolist(),
            'poses': self.trajectory.poses.tolist(),
        }
        return json.dumps({'schema_version': PLAN_SCHEMA_VERSION, **content}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Parse and check a plan; anything odd raises `PlanError` with its reason."""
        return _parse_plan(text)


def _parse_plan(text: str) -> Plan:
    try:
        if len(text.encode()) > PLAN_MAX_BYTES:
            raise PlanError(f'plan: longer than {PLAN_MAX_BYTES} bytes; shorten its reasoning')
        raw = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(raw, dict):
            raise PlanError('plan: not a JSON object')
        if raw.pop('schema_version', None) != PLAN_SCHEMA_VERSION:
            raise PlanError(f'plan: schema_version is not {PLAN_SCHEMA_VERSION}')
        return _plan_from_fields(raw)
    except PlanError:
        raise
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise PlanError(f'plan: {type(error).__name__}: {error}') from error


def _refuse_constant(name: str) -> float:
    raise PlanError(f'plan: holds {name}, every number must be finite')


def _plan_from_fields(raw: dict[str, Any]) -> Plan:
    track = raw['trajectory']
    times_s = np.asarray(track['times_s'], dtype=np.float64)
    poses = np.asarray(track['poses'], dtype=np.float64)
    if times_s.ndim != 1 or poses.shape != (times_s.size, 3) or times_s.size < 2:
        raise PlanError(f'plan: times {times_s.shape} and poses {poses.shape} do not fit')
    if not (np.isfinite(times_s).all() and np.isfinite(poses).all()):
        raise PlanError('plan: the trajectory holds a number that is not finite')
    if not (np.diff(times_s) > 0).all():
        raise PlanError('plan: times_s must rise strictly')
    reasoning_stamp = raw['reasoning_stamp_ns']
    agreement = raw['agreement']
    if agreement is not None and not isinstance(agreement, bool):
        raise PlanError('plan: agreement must be true, false or null')
    return Plan(
        plan_id=_integer(raw['plan_id']),
        trajectory=Trajectory(
            _integer(track['stamp_ns']), _string(track['frame_id']), times_s, poses
        ),
        origin=_triple(raw['origin']),
        image_stamps_ns=tuple(None if s is None else _integer(s) for s in raw['image_stamps_ns']),
        kv_stamp_ns=_integer(raw['kv_stamp_ns']),
        schedule=_string(raw['schedule']),
        steps=_integer(raw['steps']),
        speed_mps=_number(raw['speed_mps']),
        accel_mps2=_number(raw.get('accel_mps2', 0.0)),
        yaw_rate_radps=_number(raw.get('yaw_rate_radps', 0.0)),
        thinking=_string(raw['thinking']),
        reasoning=_string(raw['reasoning']),
        reasoning_stamp_ns=None if reasoning_stamp is None else _integer(reasoning_stamp),
        decision=_string(raw['decision']),
        agreement=agreement,
        think_alarm=_string(raw.get('think_alarm', '')),
        history=tuple(_triple(pose) for pose in raw['history']),
        history_valid=tuple(_flag(good) for good in raw.get('history_valid', ())),
        route=_route_points(raw.get('route')),
        route_hash=_string(raw['route_hash']),
        command=_string(raw['command']),
        degraded=tuple(_string(reason) for reason in raw['degraded']),
        stage_ms=StageTimes(**{k: _number(v) for k, v in raw['stage_ms'].items()}),
        model_sha256=_string(raw['model_sha256']),
        backend=_string(raw['backend']),
        driver=_string(raw['driver']),
    )


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise PlanError(f'plan: {value!r:.40} is not a 64-bit integer')
    return value


def _number(value: object) -> float:
    if not is_finite_number(value):
        raise PlanError(f'plan: {value!r:.40} is not a finite number')
    return float(value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise PlanError(f'plan: {value!r:.40} is not text')
    # Half a surrogate pair is legal in JSON and in no message.
    value.encode()
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f'plan: {value!r:.40} is not true or false')
    return value


def _route_points(value: object) -> tuple[tuple[float, float], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(not isinstance(p, list) or len(p) != 2 for p in value):
        raise PlanError(f'plan: {value!r:.40} is not a list of points')
    return tuple((_number(x), _number(y)) for x, y in value)


def _triple(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise PlanError(f'plan: {value!r:.40} is not a pose of three numbers')
    return _number(value[0]), _number(value[1]), _number(value[2])


@dataclass(frozen=True)
class SceneAgent:
    """A road user or object over time: `states` columns x, y, yaw, vx, vy in the world frame.

    `kind` is `vehicle`, `pedestrian`, `bicycle` or `static`. One state means it stands there
    always; else it exists from the first to the last time. Poses are of the box center.
    """

    agent_id: str
    kind: str
    length_m: float
    width_m: float
    height_m: float
    times_s: Float64[np.ndarray, 't']
    states: Float64[np.ndarray, 't 5']


@dataclass(frozen=True)
class SceneLane:
    """One lane or connector: its center line in driving direction and its area."""

    lane_id: str
    centerline: Float64[np.ndarray, 'n 2']
    polygon: Float64[np.ndarray, 'm 2']
    speed_limit_mps: float | None
    successors: tuple[str, ...]


@dataclass(frozen=True)
class SceneRoadblock:
    """Lanes side by side in one direction; a connector crosses an intersection."""

    roadblock_id: str
    is_connector: bool
    polygon: Float64[np.ndarray, 'm 2']
    lanes: tuple[SceneLane, ...]


@dataclass(frozen=True)
class SceneLight:
    """A red phase: lane `lane_id` must not be entered from `from_s` to `to_s` (scene time)."""

    lane_id: str
    from_s: float = -math.inf
    to_s: float = math.inf


@dataclass(frozen=True)
class SceneMap:
    """The drivable world around a scene."""

    roadblocks: tuple[SceneRoadblock, ...]
    intersections: tuple[Float64[np.ndarray, '_ 2'], ...] = ()
    carparks: tuple[Float64[np.ndarray, '_ 2'], ...] = ()


@dataclass(frozen=True)
class SceneEgo:
    """The ego vehicle in a scene: rear-axle pose in the world, motion in its body frame."""

    x_m: float
    y_m: float
    yaw_rad: float
    vx_mps: float
    vy_mps: float = 0.0
    ax_mps2: float = 0.0
    ay_mps2: float = 0.0
    steering_rad: float = 0.0
    yaw_rate_radps: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One labeled moment of the world: agents over time, map, lights, route, ego.

    `ego_history` runs at 2 Hz, oldest first, and ends at the present. `human` holds the recorded
    2 Hz poses `(x, y, yaw)` after the present, in the world frame.
    """

    name: str
    ego: SceneEgo
    map: SceneMap
    route: tuple[str, ...]
    agents: tuple[SceneAgent, ...] = ()
    red_lights: tuple[SceneLight, ...] = ()
    ego_history: tuple[SceneEgo, ...] = ()
    human: Float64[np.ndarray, 'h 3'] | None = None
    kind: str = ''
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One training or evaluation example: what was seen, what should follow, and why.

    `future` holds poses in `base_link` at `horizon_s / waypoints` spacing. `label` is `positive`,
    `negative` or `recovery`; `pair_id` joins samples that belong together. `thinking` is `slow`
    where `reasoning` holds a trace, else `fast`.
    """

    observation: Observation
    future: Float64[np.ndarray, 't 3']
    scene_id: str
    family: str
    label: str = 'positive'
    pair_id: str = ''
    reasoning: str = ''
    thinking: str = 'fast'


@dataclass(frozen=True)
class Vehicle:
    """Dimensions and limits of the vehicle; the defaults are NAVSIM's Pacifica.

    `rear_axle_to_center_m` leads from `base_link` to the box center. Limits are magnitudes:
    `max_decel_mps2` is the full service brake, `comfort_decel_mps2` the gentle stop.
    """

    length_m: float = 5.176
    width_m: float = 2.297
    height_m: float = 1.777
    wheelbase_m: float = 3.089
    rear_axle_to_center_m: float = 1.461
    max_steering_rad: float = 0.6
    max_steering_rate_radps: float = 0.8
    max_speed_mps: float = 20.0
    max_accel_mps2: float = 3.0
    max_decel_mps2: float = 7.0
    comfort_decel_mps2: float = 2.5
    max_lateral_accel_mps2: float = 5.0

    @staticmethod
    def load(path: str | Path) -> Vehicle:
        """Read a vehicle file (YAML, the fields above).

        Raises:
            SpanvlaError: no such file, not YAML, an unknown field, or a value no vehicle has.
        """
        raw = read_yaml(path, 'a vehicle file')
        known = {field.name for field in fields(Vehicle)}
        if not isinstance(raw, dict) or not set(raw) <= known:
            odd = sorted(map(str, set(raw) - known)) if isinstance(raw, dict) else 'no mapping'
            raise SpanvlaError(f'{path}: {odd} is not a vehicle field; use {sorted(known)}')
        for name, value in raw.items():
            if not (is_finite_number(value) and value > 0.0):
                raise SpanvlaError(f'{path}: {name} must be a positive number, not {value!r}')
        vehicle = Vehicle(**{name: float(value) for name, value in raw.items()})
        if vehicle.max_steering_rad >= math.pi / 2.0:
            raise SpanvlaError(
                f'{path}: max_steering_rad is {vehicle.max_steering_rad:g}, which no wheel turns '
                'by; give it in radians'
            )
        return vehicle


@dataclass(frozen=True)
class DriveCommand:
    """What the follower asks of the vehicle: target speed, curvature by yaw rate, and why."""

    speed_mps: float
    yaw_rate_radps: float
    accel_mps2: float
    steering_rad: float
    braking: bool = False
    reason: str = ''


def read_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file the user named; `what` it should be is said where it is not.

    Raises:
        SpanvlaError: no such file, or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise SpanvlaError(f'{path}: {error.strerror}; name {what}') from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise SpanvlaError(f'{path}: not valid YAML ({line}); mend that line') from error


def read_json(path: str | Path, fix: str) -> dict[str, Any]:
    """The mapping in a JSON file; `fix` is said where there is none.

    Raises:
        SpanvlaError: no such file, not JSON, nested too deeply, or no mapping.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise SpanvlaError(f'{path}: {error.strerror}; {fix}') from error
    except (ValueError, RecursionError) as error:
        raise SpanvlaError(f'{path}: not valid JSON ({error}); {fix}') from error
    if not isinstance(content, dict):
        raise SpanvlaError(f'{path}: not a JSON mapping; {fix}')
    return content


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a file is a number that can be used; YAML's `true` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
