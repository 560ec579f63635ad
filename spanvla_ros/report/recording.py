"""Reads a recorded drive with rosbags alone, into plain arrays.

Nothing of the driving code is imported: what the drive claims about itself is not believed here,
only what was on the wire and when it arrived.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from spanvla_ros.report.bags import AGAIN, one_line, open_bag
from spanvla_ros.types import SpanvlaError

Ring = Float64[np.ndarray, '_ 2']


@dataclass(frozen=True)
class PlanRecord:
    """One message of the `plan` topic; `received_ns` is when the recorder got it."""

    received_ns: int
    stamp_ns: int
    kv_stamp_ns: int
    image_stamps_ns: tuple[int | None, ...]
    times_s: Float64[np.ndarray, 't']
    poses: Float64[np.ndarray, 't 3']
    stage_ms: tuple[tuple[str, float], ...]
    thinking: str
    agreement: bool | None
    degraded: tuple[str, ...]
    driver: str
    backend: str
    schedule: str
    steps: int
    model_sha256: str


@dataclass(frozen=True)
class OutputRecord:
    """One published trajectory; `tilt` is the distance of its rotations from pure yaw."""

    received_ns: int
    stamp_ns: int
    frame_id: str
    times_s: Float64[np.ndarray, 't']
    poses: Float64[np.ndarray, 't 3']
    speeds_mps: Float64[np.ndarray, 't'] | None
    tilt: float


@dataclass(frozen=True)
class StateRecord:
    """What the guardian said about itself."""

    received_ns: int
    state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ReasoningRecord:
    """A reasoning text and the stamp of the picture it speaks of."""

    received_ns: int
    stamp_ns: int | None
    text: str
    decision: str
    thinking: str
    agreement: bool | None


@dataclass(frozen=True)
class AgentBox:
    """A road user at one instant: box center `(x, y, yaw)` in the world, size in meters."""

    agent_id: str
    kind: str
    pose: tuple[float, float, float]
    length_m: float
    width_m: float


@dataclass(frozen=True)
class SceneRecord:
    """The truth of the town at one instant; `ego` is the rear-axle pose."""

    received_ns: int
    ego: tuple[float, float, float]
    agents: tuple[AgentBox, ...]
    red_lanes: tuple[str, ...]
    route: tuple[str, ...]


@dataclass(frozen=True)
class TownMap:
    """Drivable areas, and of each lane its roadblock, area and center line."""

    drivable: tuple[Ring, ...] = ()
    lanes: dict[str, tuple[str, Ring]] = field(default_factory=dict)
    centerlines: tuple[Ring, ...] = ()


@dataclass(frozen=True)
class PictureRecord:
    """A recorded picture: the raw message bytes are decoded only when a page shows it."""

    received_ns: int
    stamp_ns: int
    camera: str
    encoding: str
    height_px: int
    width_px: int
    data: bytes


@dataclass(frozen=True)
class Recording:
    """All of a drive, each part in the order of arrival.

    `odometry` has the columns x, y, yaw, forward speed, yaw rate. `labels` are the words the town
    adds to its truth: scenario, seed, hash of its ranges. `shadow` are plans that nobody drove.
    """

    plans: tuple[PlanRecord, ...]
    outputs: tuple[OutputRecord, ...]
    states: tuple[StateRecord, ...]
    reasonings: tuple[ReasoningRecord, ...]
    odometry_stamps_ns: Int64[np.ndarray, 'n']
    odometry_received_ns: Int64[np.ndarray, 'n']
    odometry: Float64[np.ndarray, 'n 5']
    route: Float64[np.ndarray, 'r 2'] | None
    scenes: tuple[SceneRecord, ...]
    town_map: TownMap | None
    camera_stamps_ns: dict[str, tuple[int, ...]]
    labels: dict[str, str | int]
    shadow: tuple[PlanRecord, ...] = ()


def read_recording(path: str | Path, namespace: str = '/spanvla') -> Recording:
    """Read `drive.mcap`, a file or a bag directory.

    Raises:
        SpanvlaError: the path holds no readable bag, or one without a trajectory.
    """
    plans, shadow, outputs, states, reasonings, scenes = [], [], [], [], [], []
    odometry: list[tuple[int, int, tuple[float, ...]]] = []
    cameras: dict[str, list[int]] = {}
    labels: dict[str, str | int] = {}
    route, town_map = None, None
    for topic, received_ns, message in _messages(path, namespace):
        with _readable(path, topic):
            if topic == 'plan':
                plans.append(_plan(received_ns, message))
            elif topic == 'shadow/plan':
                shadow.append(_plan(received_ns, message))
            elif topic == 'output/trajectory':
                outputs.append(_output(received_ns, message))
            elif topic == 'output/state':
                states.append(_state(received_ns, message))
            elif topic == 'output/reasoning':
                reasonings.append(_reasoning(received_ns, message))
            elif topic == 'input/odometry':
                odometry.append((stamp_ns(message), received_ns, _motion(message)))
            elif topic == 'input/route':
                route = _route(message)
            elif topic == 'town/scene':
                raw = json.loads(message.data)
                scenes.append(_scene(received_ns, raw))
                labels.update(_labels(raw.get('town') or {}))
                town_map = _map(raw['map']) if raw.get('map') else town_map
            elif topic.endswith('/camera_info'):
                cameras.setdefault(topic.split('/')[1], []).append(stamp_ns(message))
    if not outputs:
        raise SpanvlaError(f'{path}: holds no {namespace}/output/trajectory, so it is no drive')
    table = np.array([row for _, _, row in odometry], dtype=np.float64).reshape(-1, 5)
    return Recording(
        plans=tuple(plans),
        outputs=tuple(outputs),
        states=tuple(states),
        reasonings=tuple(reasonings),
        odometry_stamps_ns=np.array([stamp for stamp, _, _ in odometry], dtype=np.int64),
        odometry_received_ns=np.array([at for _, at, _ in odometry], dtype=np.int64),
        odometry=table,
        route=route,
        scenes=tuple(scenes),
        town_map=town_map,
        camera_stamps_ns={name: tuple(stamps) for name, stamps in cameras.items()},
        labels=labels,
        shadow=tuple(shadow),
    )


def read_pictures(
    path: str | Path, wanted_ns: set[int], namespace: str = '/spanvla'
) -> dict[str, list[PictureRecord]]:
    """The recorded pictures whose stamps are wanted, by camera, in the order of arrival."""
    found: dict[str, list[PictureRecord]] = {}
    for topic, received_ns, message in _messages(path, namespace, ('/image', '/image/compressed')):
        with _readable(path, topic):
            stamp = stamp_ns(message)
            if stamp not in wanted_ns:
                continue
            raw = hasattr(message, 'encoding')
            shot = PictureRecord(
                received_ns,
                stamp,
                topic.split('/')[1],
                message.encoding if raw else 'compressed',
                message.height if raw else 0,
                message.width if raw else 0,
                bytes(message.data),
            )
            found.setdefault(shot.camera, []).append(shot)
    return found


def stamp_ns(message: Any) -> int:
    """The header stamp of a message in nanoseconds."""
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


READ = (
    'plan',
    'shadow/plan',
    'output/trajectory',
    'output/state',
    'output/reasoning',
    'input/odometry',
    'input/route',
    'town/scene',
)


def _messages(
    path: str | Path, namespace: str, endings: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, Any]]:
    prefix = namespace.rstrip('/') + '/'
    with open_bag(path) as bag:
        chosen = [
            connection
            for connection in bag.connections
            if connection.topic.startswith(prefix)
            and _chosen(connection.topic.removeprefix(prefix), endings)
        ]
        for connection, received_ns, _, message in bag.read(chosen):
            yield connection.topic.removeprefix(prefix), received_ns, message


@contextmanager
def _readable(path: str | Path, topic: str) -> Iterator[None]:
    """What a message of another type, or one whose text is damaged, makes of our reading."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise SpanvlaError(
            f'{path}: a message of {topic} is not what it should be ({one_line(error)}); {AGAIN}'
        ) from error


def _chosen(topic: str, endings: tuple[str, ...]) -> bool:
    if endings:
        return topic.startswith('input/') and topic.endswith(endings)
    return topic in READ or topic.endswith('/camera_info')


def _plan(received_ns: int, message: Any) -> PlanRecord:
    raw = json.loads(message.data)
    track = raw['trajectory']
    return PlanRecord(
        received_ns=received_ns,
        stamp_ns=int(track['stamp_ns']),
        kv_stamp_ns=int(raw['kv_stamp_ns']),
        image_stamps_ns=tuple(raw['image_stamps_ns']),
        times_s=np.array(track['times_s'], dtype=np.float64),
        poses=np.array(track['poses'], dtype=np.float64).reshape(-1, 3),
        stage_ms=tuple((name, float(value)) for name, value in raw['stage_ms'].items()),
        thinking=str(raw['thinking']),
        agreement=raw['agreement'],
        degraded=tuple(raw['degraded']),
        driver=str(raw['driver']),
        backend=str(raw['backend']),
        schedule=str(raw['schedule']),
        steps=int(raw['steps']),
        model_sha256=str(raw['model_sha256']),
    )


def _output(received_ns: int, message: Any) -> OutputRecord:
    times_s, poses, speeds, tilt = [], [], [], 0.0
    for point in message.points:
        moved = point.transforms[0]
        turn = moved.rotation
        length = math.sqrt(turn.x**2 + turn.y**2 + turn.z**2 + turn.w**2)
        tilt = max(tilt, abs(length - 1.0), abs(turn.x), abs(turn.y))
        yaw = 2.0 * math.atan2(turn.z, turn.w)
        times_s.append(point.time_from_start.sec + point.time_from_start.nanosec * 1e-9)
        poses.append((moved.translation.x, moved.translation.y, math.remainder(yaw, math.tau)))
        if len(point.velocities):
            linear = point.velocities[0].linear
            speeds.append(math.hypot(linear.x, linear.y))
    return OutputRecord(
        received_ns=received_ns,
        stamp_ns=stamp_ns(message),
        frame_id=str(message.header.frame_id),
        times_s=np.array(times_s, dtype=np.float64),
        poses=np.array(poses, dtype=np.float64).reshape(-1, 3),
        speeds_mps=np.array(speeds) if speeds and len(speeds) == len(times_s) else None,
        tilt=tilt,
    )


def _state(received_ns: int, message: Any) -> StateRecord:
    raw = json.loads(message.data)
    return StateRecord(received_ns, str(raw['state']), tuple(raw.get('reasons', ())))


def _reasoning(received_ns: int, message: Any) -> ReasoningRecord:
    raw = json.loads(message.data)
    return ReasoningRecord(
        received_ns=received_ns,
        stamp_ns=raw.get('stamp_ns'),
        text=str(raw.get('text', '')),
        decision=str(raw.get('decision', '')),
        thinking=str(raw.get('thinking', '')),
        agreement=raw.get('agreement'),
    )


def _motion(message: Any) -> tuple[float, ...]:
    pose, twist = message.pose.pose, message.twist.twist
    turn = pose.orientation
    yaw = math.atan2(
        2.0 * (turn.w * turn.z + turn.x * turn.y), 1.0 - 2.0 * (turn.y**2 + turn.z**2)
    )
    return pose.position.x, pose.position.y, yaw, twist.linear.x, twist.angular.z


def _route(message: Any) -> Float64[np.ndarray, 'r 2'] | None:
    points = [(stop.pose.position.x, stop.pose.position.y) for stop in message.poses]
    return np.array(points, dtype=np.float64) if len(points) > 1 else None


def _scene(received_ns: int, raw: dict[str, Any]) -> SceneRecord:
    ego = raw['ego']
    agents = []
    for agent in raw['agents']:
        now = agent['states'][0]
        pose = (float(now['x']), float(now['y']), float(now['heading']))
        size = (float(agent['length']), float(agent['width']))
        agents.append(AgentBox(str(agent['id']), str(agent['type']), pose, *size))
    return SceneRecord(
        received_ns=received_ns,
        ego=(float(ego['x']), float(ego['y']), float(ego['heading'])),
        agents=tuple(agents),
        red_lanes=tuple(light['lane_id'] for light in raw['red_lights']),
        route=tuple(raw['route']),
    )


def _map(raw: dict[str, Any]) -> TownMap:
    drivable = [ring for kind in ('intersections', 'carparks') for ring in raw[kind]]
    lanes, centerlines = {}, []
    for block in raw['roadblocks']:
        if block['type'] == 'ROADBLOCK':
            drivable.append(block['polygon'])
        for lane in block['lanes']:
            lanes[lane['id']] = (block['id'], np.array(lane['polygon'], dtype=np.float64))
            centerlines.append(np.array(lane['centerline'], dtype=np.float64))
    rings = tuple(np.array(ring, dtype=np.float64) for ring in drivable)
    return TownMap(rings, lanes, tuple(centerlines))


def _labels(raw: dict[str, Any]) -> dict[str, str | int]:
    return {
        name: raw[name]
        for name in ('scenario', 'seed', 'scenario_ranges_sha256')
        if isinstance(raw.get(name), str | int)
    }
