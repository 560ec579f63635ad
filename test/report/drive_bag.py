"""A small recorded drive whose numbers can be worked out by hand, written with rosbags."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

TYPES = get_typestore(Stores.ROS2_JAZZY)
MS = 1_000_000
SECOND = 1_000_000_000
START_NS = 1_700_000_000 * SECOND
SPEED_MPS = 8.0


def message(kind: str, **values: Any) -> Any:
    return TYPES.types[kind](**values)


def header(stamp_ns: int, frame_id: str = 'odom') -> Any:
    stamp = message(
        'builtin_interfaces/msg/Time', sec=stamp_ns // SECOND, nanosec=stamp_ns % SECOND
    )
    return message('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)


def vector(x: float = 0.0, y: float = 0.0, z: float = 0.0, kind: str = 'Vector3') -> Any:
    return message(f'geometry_msgs/msg/{kind}', x=x, y=y, z=z)


def turned(yaw: float) -> Any:
    return message(
        'geometry_msgs/msg/Quaternion', x=0.0, y=0.0, z=np.sin(yaw / 2), w=np.cos(yaw / 2)
    )


def twist(speed: float = 0.0, yaw_rate: float = 0.0) -> Any:
    return message('geometry_msgs/msg/Twist', linear=vector(speed), angular=vector(z=yaw_rate))


def odometry(stamp_ns: int, x: float, y: float, yaw: float, speed: float) -> Any:
    pose = message(
        'geometry_msgs/msg/Pose', position=vector(x, y, kind='Point'), orientation=turned(yaw)
    )
    zeros = np.zeros(36)
    return message(
        'nav_msgs/msg/Odometry',
        header=header(stamp_ns),
        child_frame_id='base_link',
        pose=message('geometry_msgs/msg/PoseWithCovariance', pose=pose, covariance=zeros),
        twist=message(
            'geometry_msgs/msg/TwistWithCovariance', twist=twist(speed), covariance=zeros
        ),
    )


def route(points: list[tuple[float, float]]) -> Any:
    poses = [
        message(
            'geometry_msgs/msg/PoseStamped',
            header=header(START_NS),
            pose=message(
                'geometry_msgs/msg/Pose',
                position=vector(x, y, kind='Point'),
                orientation=turned(0.0),
            ),
        )
        for x, y in points
    ]
    return message('nav_msgs/msg/Path', header=header(START_NS), poses=poses)


def trajectory(stamp_ns: int, poses: np.ndarray, step_s: float, speed: float) -> Any:
    points = []
    for index, (x, y, yaw) in enumerate(poses):
        at_ns = round(index * step_s * SECOND)
        moved = message(
            'geometry_msgs/msg/Transform', translation=vector(x, y), rotation=turned(yaw)
        )
        points.append(
            message(
                'trajectory_msgs/msg/MultiDOFJointTrajectoryPoint',
                transforms=[moved],
                velocities=[twist(speed)],
                accelerations=[twist()],
                time_from_start=message(
                    'builtin_interfaces/msg/Duration', sec=at_ns // SECOND, nanosec=at_ns % SECOND
                ),
            )
        )
    return message(
        'trajectory_msgs/msg/MultiDOFJointTrajectory',
        header=header(stamp_ns),
        joint_names=['base_link'],
        points=points,
    )


def text(content: dict[str, Any]) -> Any:
    return message('std_msgs/msg/String', data=json.dumps(content))


def picture(stamp_ns: int, width_px: int = 32, height_px: int = 16) -> Any:
    data = np.full((height_px, width_px, 3), (200, 30, 30), dtype=np.uint8)
    return message(
        'sensor_msgs/msg/Image',
        header=header(stamp_ns, 'front_optical_frame'),
        height=height_px,
        width=width_px,
        encoding='rgb8',
        is_bigendian=0,
        step=width_px * 3,
        data=data.ravel(),
    )


def camera_info(stamp_ns: int, width_px: int = 32, height_px: int = 16) -> Any:
    region = message(
        'sensor_msgs/msg/RegionOfInterest',
        x_offset=0,
        y_offset=0,
        height=0,
        width=0,
        do_rectify=False,
    )
    return message(
        'sensor_msgs/msg/CameraInfo',
        header=header(stamp_ns, 'front_optical_frame'),
        height=height_px,
        width=width_px,
        distortion_model='plumb_bob',
        d=np.zeros(5),
        k=np.eye(3).ravel(),
        r=np.eye(3).ravel(),
        p=np.zeros(12),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


def plan(stamp_ns: int, x: float, plan_id: int) -> dict[str, Any]:
    times_s = [0.5 * (k + 1) for k in range(10)]
    return {
        'schema_version': 1,
        'plan_id': plan_id,
        'trajectory': {
            'stamp_ns': stamp_ns,
            'frame_id': 'odom',
            'times_s': times_s,
            'poses': [[x + SPEED_MPS * t, 0.0, 0.0] for t in times_s],
        },
        'origin': [x, 0.0, 0.0],
        'image_stamps_ns': [stamp_ns, None],
        'kv_stamp_ns': stamp_ns,
        'schedule': 'concurrent',
        'steps': 5,
        'thinking': 'slow' if plan_id % 2 else 'fast',
        'agreement': plan_id != 0,
        'degraded': ['camera_missing:front_left'] if plan_id < 5 else [],
        'stage_ms': {'observe_ms': 1.0, 'vision_ms': 10.0, 'total_ms': 30.0},
        'model_sha256': 'abc',
        'backend': 'onnxruntime',
        'driver': 'model',
    }


def scene(x: float, agents: list[tuple[str, float, float]], *, red: bool, whole: bool) -> Any:
    def ring(x0: float, x1: float, half: float) -> list[list[float]]:
        return [[x0, -half], [x1, -half], [x1, half], [x0, half]]

    lanes = {
        'A': {'id': 'A0', 'polygon': ring(-10.0, 30.0, 4.0)},
        'B': {'id': 'B0', 'polygon': ring(30.0, 50.0, 4.0)},
    }
    blocks = [
        {
            'id': name,
            'type': 'ROADBLOCK',
            'polygon': lane['polygon'],
            'lanes': [{**lane, 'centerline': [[lane['polygon'][0][0], 0.0], [50.0, 0.0]]}],
        }
        for name, lane in lanes.items()
    ]
    states = [
        {
            'id': name,
            'type': 'vehicle',
            'length': 4.0,
            'width': 2.0,
            'height': 1.5,
            'states': [{'t': 0.0, 'x': ax, 'y': ay, 'heading': 0.0, 'vx': 0.0, 'vy': 0.0}],
        }
        for name, ax, ay in agents
    ]
    return text(
        {
            'scene': 'now',
            'ego': {'x': x, 'y': 0.0, 'heading': 0.0, 'vx': SPEED_MPS},
            'route': ['A', 'B'],
            'red_lights': [{'lane_id': 'B0'}] if red else [],
            'map': {'roadblocks': blocks, 'intersections': [], 'carparks': []} if whole else None,
            'agents': states,
            'town': {'scenario': 'lane_keeping', 'seed': 3, 'scenario_ranges_sha256': 'f00'},
        }
    )


@dataclass
class Bag:
    """Messages by arrival, in milliseconds after the start."""

    rows: list[tuple[float, str, str, Any]] = field(default_factory=list)

    def add(self, at_ms: float, topic: str, kind: str, content: Any) -> None:
        self.rows.append((at_ms, f'/spanvla/{topic}', kind, content))

    def write(self, path: Path) -> Path:
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {
                (topic, kind): writer.add_connection(topic, kind, typestore=TYPES)
                for topic, kind in {(topic, kind) for _, topic, kind, _ in self.rows}
            }
            for at_ms, topic, kind, content in sorted(self.rows, key=lambda row: row[0]):
                raw = TYPES.serialize_cdr(content, kind)
                writer.write(connections[topic, kind], START_NS + round(at_ms * MS), raw)
        return path


def straight(x: float) -> np.ndarray:
    along = x + SPEED_MPS * 0.1 * np.arange(51)
    return np.stack([along, np.zeros(51), np.zeros(51)], axis=1)


def small_drive(*, red_from_ms: float = 0.0, agents=(('a', 20.0, 0.5), ('b', 20.0, 6.0))):
    """Four seconds at 8 m/s along x, camera 10 Hz, an output each 50 ms."""
    bag = Bag()
    bag.add(0, 'input/route', 'nav_msgs/msg/Path', route([(0, 0), (20, 0), (50, 0)]))
    for at in range(0, 4001, 20):
        stamp = START_NS + at * MS
        bag.add(
            at,
            'input/odometry',
            'nav_msgs/msg/Odometry',
            odometry(stamp, 0.008 * at, 0.0, 0.0, 8.0),
        )
    for at in range(0, 4000, 100):
        stamp, number = START_NS + at * MS, at // 100
        bag.add(
            at,
            'input/front/camera_info',
            'sensor_msgs/msg/CameraInfo',
            camera_info(stamp),
        )
        bag.add(at + 1, 'input/front/image', 'sensor_msgs/msg/Image', picture(stamp))
        planned = text(plan(stamp, 0.008 * at, number))
        if at != 2000:  # one picture is never planned
            bag.add(at + 60, 'plan', 'std_msgs/msg/String', planned)
        if at == 1000:  # and one twice
            again = text(plan(stamp, 0.008 * at, 100))
            bag.add(at + 70, 'plan', 'std_msgs/msg/String', again)
    for at in range(80, 4001, 50):
        if at == 1580:
            continue
        made = trajectory(START_NS + at * MS, straight(0.008 * at), 0.1, 8.0)
        bag.add(at, 'output/trajectory', 'trajectory_msgs/msg/MultiDOFJointTrajectory', made)
    for at, state in ((60, 'OK'), (3000, 'FALLBACK'), (3200, 'OK')):
        told = text({'state': state, 'reasons': []})
        bag.add(at, 'output/state', 'std_msgs/msg/String', told)
    for at, stamp_ms, words in (
        (500, 400, 'lead vehicle 15 m braking'),
        (600, 400, 'lead vehicle 15 m braking'),
        (1500, 1400, 'accelerate , keep'),
    ):
        said = {'text': words, 'stamp_ns': START_NS + stamp_ms * MS, 'thinking': 'slow'}
        bag.add(at, 'output/reasoning', 'std_msgs/msg/String', text(said))
    for at in range(0, 4001, 100):
        truth = scene(0.008 * at, list(agents), red=at >= red_from_ms, whole=at % 1000 == 0)
        bag.add(at, 'town/scene', 'std_msgs/msg/String', truth)
    return bag
