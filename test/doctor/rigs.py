"""Recorded rigs, right ones and mis-set ones: a drive through the town written as a bag."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from drives import Drive, scaled, town_drive
from rosbags.interfaces import (
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from spanvla_ros.doctor.sight import Mount
from spanvla_ros.model.config import TOWN_CAMERAS

TYPES = get_typestore(Stores.LATEST)
IMAGE = 'sensor_msgs/msg/Image'
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
COMPRESSED = 'sensor_msgs/msg/CompressedImage'
BEGIN_S = 1000.0


def message(kind: str, **fields: object) -> Any:
    return TYPES.types[kind](**fields)


@dataclass
class Event:
    """One message of a rig before it is written; its stamp may be changed until then."""

    topic: str
    kind: str
    received_s: float
    stamp_s: float
    frame: str
    make: Callable[[Any], Any]


@dataclass
class RecordedRig:
    """Events of a drive, and the offers of its topics (reliable, latched)."""

    drive: Drive
    events: list[Event]
    offers: dict[str, tuple[bool, bool]]

    def of(self, word: str) -> list[Event]:
        return [event for event in self.events if word in event.topic]


def odometry_fields(drive: Drive) -> list[SimpleNamespace]:
    """What an odometry message holds, ready to be spoilt."""
    return [
        SimpleNamespace(x=x, y=y, yaw=yaw, vx=drive.speed_mps, vy=0.0, wz=wz, roll=0.0)
        for (x, y, yaw), wz in zip(
            drive.poses.tolist(), drive.yaw_rate_radps.tolist(), strict=True
        )
    ]


def record(
    drive: Drive,
    *,
    spoil_odometry: Callable[[SimpleNamespace], None] = lambda _: None,
    spoil_picture: Callable[[str, np.ndarray], np.ndarray] = lambda _, picture: picture,
    picture_of: Callable[[str], str] = lambda name: name,
    info_focal: Callable[[str], float] = lambda _: 1.0,
    info_size: Callable[[str], float] = lambda _: 1.0,
    raw: bool = False,
    row_padding: int = 0,
    transforms: bool = False,
    route_points: np.ndarray | None = None,
    noise: np.random.Generator | None = None,
) -> RecordedRig:
    """A rig that recorded the drive, with one place for each kind of fault."""
    events: list[Event] = []
    names = [camera.name for camera in drive.cameras]
    points = drive.route if route_points is None else route_points
    events.append(Event('/route', 'nav_msgs/msg/Path', BEGIN_S, BEGIN_S, 'odom',
                        lambda header: path(header, points)))  # fmt: skip
    if transforms:
        events.append(Event('/tf_static', 'tf2_msgs/msg/TFMessage', BEGIN_S, BEGIN_S, 'base_link',
                            lambda header: mounts(header, drive)))  # fmt: skip
    for k, fields in enumerate(odometry_fields(drive)):
        spoil_odometry(fields)
        if noise is not None:
            fields.x, fields.y = (
                fields.x + noise.normal(0, 0.005),
                fields.y + noise.normal(0, 0.005),
            )
            fields.yaw += noise.normal(0, 0.001)
            fields.vx += noise.normal(0, 0.05)
            fields.wz += noise.normal(0, 0.003)
        time_s = BEGIN_S + float(drive.ego_s[k])
        events.append(Event('/odom', 'nav_msgs/msg/Odometry', time_s + 0.002, time_s, 'odom',
                            lambda header, f=fields: odometry(header, f)))  # fmt: skip
    kind, tail = (IMAGE, 'image') if raw else (COMPRESSED, 'image/compressed')
    for camera in drive.cameras:
        base, source = f'/cam/{camera.name}', names.index(picture_of(camera.name))
        for k, time in enumerate(drive.picture_s.tolist()):
            picture = spoil_picture(camera.name, drive.pictures[k, source])
            time_s = BEGIN_S + time
            frame, came_s = f'{camera.name}_optical', time_s + 0.03

            def picture_message(header: Any, p: np.ndarray = picture) -> Any:
                return image(header, p, row_padding) if raw else jpeg(header, p)

            def info_message(header: Any, c: Any = camera) -> Any:
                return info(header, c, info_focal(c.name), info_size(c.name))

            events.append(Event(f'{base}/{tail}', kind, came_s, time_s, frame, picture_message))
            events.append(
                Event(f'{base}/camera_info', CAMERA_INFO, came_s, time_s, frame, info_message)
            )
    offers = {event.topic: (True, event.topic in ('/route', '/tf_static')) for event in events}
    return RecordedRig(drive, events, offers)


def write(rig: RecordedRig, folder: Path, storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """The rig as a bag."""
    with Writer(folder, version=9, storage_plugin=storage) as writer:
        connections = {}
        for event in sorted(rig.events, key=lambda e: e.received_s):
            if event.topic not in connections:
                connections[event.topic] = writer.add_connection(
                    event.topic, event.kind, typestore=TYPES,
                    offered_qos_profiles=[qos(*rig.offers[event.topic])],
                )  # fmt: skip
            content = event.make(header_of(event))
            data = TYPES.serialize_cdr(content, event.kind)
            writer.write(connections[event.topic], round(event.received_s * 1e9), data)
    return folder


def qos(reliable: bool, latched: bool) -> Qos:
    return Qos(
        QosHistory.KEEP_LAST, 1,
        QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        QosTime(0, 0), QosTime(0, 0), QosLiveliness.AUTOMATIC, QosTime(0, 0), False,
    )  # fmt: skip


def header_of(event: Event) -> Any:
    seconds, nanoseconds = divmod(round(event.stamp_s * 1e9), 1_000_000_000)
    stamp = message('builtin_interfaces/msg/Time', sec=seconds, nanosec=nanoseconds)
    return message('std_msgs/msg/Header', stamp=stamp, frame_id=event.frame)


def vector(x: float, y: float, z: float) -> Any:
    return message('geometry_msgs/msg/Vector3', x=float(x), y=float(y), z=float(z))


def pose(x: float, y: float, yaw: float, roll: float = 0.0) -> Any:
    cy, sy = math.cos(yaw / 2), math.sin(yaw / 2)
    cr, sr = math.cos(roll / 2), math.sin(roll / 2)
    turn = {'w': cy * cr, 'x': cy * sr, 'y': sy * sr, 'z': sy * cr}
    return message(
        'geometry_msgs/msg/Pose',
        position=message('geometry_msgs/msg/Point', x=float(x), y=float(y), z=0.0),
        orientation=message('geometry_msgs/msg/Quaternion', **turn),
    )


def odometry(header: Any, f: SimpleNamespace) -> Any:
    zeros = np.zeros(36)
    twist = message(
        'geometry_msgs/msg/Twist', linear=vector(f.vx, f.vy, 0), angular=vector(0, 0, f.wz)
    )
    return message(
        'nav_msgs/msg/Odometry', header=header, child_frame_id='base_link',
        pose=message('geometry_msgs/msg/PoseWithCovariance', pose=pose(f.x, f.y, f.yaw, f.roll),
                     covariance=zeros),
        twist=message('geometry_msgs/msg/TwistWithCovariance', twist=twist, covariance=zeros),
    )  # fmt: skip


def path(header: Any, points: np.ndarray) -> Any:
    poses = [
        message('geometry_msgs/msg/PoseStamped', header=header, pose=pose(x, y, 0.0))
        for x, y in points.tolist()
    ]
    return message('nav_msgs/msg/Path', header=header, poses=poses)


def mounts(header: Any, drive: Drive) -> Any:
    from transforms3d.quaternions import mat2quat

    found = []
    for camera in drive.cameras:
        w, x, y, z = mat2quat(Mount.of(camera).base_from_optical).tolist()
        transform = message(
            'geometry_msgs/msg/Transform', translation=vector(camera.x_m, camera.y_m, camera.z_m),
            rotation=message('geometry_msgs/msg/Quaternion', w=w, x=x, y=y, z=z),
        )  # fmt: skip
        found.append(
            message('geometry_msgs/msg/TransformStamped', header=header,
                    child_frame_id=f'{camera.name}_optical', transform=transform)
        )  # fmt: skip
    return message('tf2_msgs/msg/TFMessage', transforms=found)


def jpeg(header: Any, picture: np.ndarray) -> Any:
    _, data = cv2.imencode('.jpg', picture[:, :, ::-1])
    return message(COMPRESSED, header=header, format='jpeg', data=data.ravel())


def image(header: Any, picture: np.ndarray, row_padding: int) -> Any:
    height, width = picture.shape[:2]
    rows = picture.reshape(height, width * 3)
    rows = np.pad(rows, ((0, 0), (0, row_padding)))
    return message(
        IMAGE, header=header, height=height, width=width, encoding='rgb8', is_bigendian=0,
        step=rows.shape[1], data=rows.ravel(),
    )  # fmt: skip


def info(header: Any, camera: Any, focal: float, size: float) -> Any:
    f = camera.focal_px * focal * size
    width, height = round(camera.width_px * size), round(camera.height_px * size)
    cx, cy = (width - 1) / 2, (height - 1) / 2
    return message(
        'sensor_msgs/msg/CameraInfo', header=header, height=height, width=width,
        distortion_model='plumb_bob', d=np.zeros(5),
        k=np.array([f, 0, cx, 0, f, cy, 0, 0, 1.0]), r=np.eye(3).ravel(),
        p=np.array([f, 0, cx, 0, 0, f, cy, 0, 0, 0, 1.0, 0]), binning_x=0, binning_y=0,
        roi=message('sensor_msgs/msg/RegionOfInterest', x_offset=0, y_offset=0, height=0, width=0,
                    do_rectify=False),
    )  # fmt: skip


# The mis-set rigs. Each takes the drive and a generator that draws what the fault leaves open.


def swapped(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    pairs = [('front_left', 'front_right'), ('front', 'front_left'), ('front', 'front_right')]
    a, b = pairs[int(rng.integers(3))]
    return record(drive, picture_of=lambda name: {a: b, b: a}.get(name, name), **more)


def mirrored(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    which = drive.cameras[int(rng.integers(3))].name
    return record(drive, spoil_picture=lambda name, p: p[:, ::-1] if name == which else p, **more)


def upside_down(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    which = drive.cameras[int(rng.integers(3))].name
    return record(
        drive, spoil_picture=lambda name, p: p[::-1, ::-1] if name == which else p, **more
    )


def wrong_size(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    which, factor = drive.cameras[int(rng.integers(3))].name, float(rng.choice([0.5, 2.0]))
    return record(drive, info_size=lambda name: factor if name == which else 1.0, **more)


def wrong_focal(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    factor = float(rng.choice([0.55, 0.65, 1.5, 1.8]))
    return record(drive, info_focal=lambda name: factor if name == 'front' else 1.0, **more)


def left_handed(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    def spoil(f: SimpleNamespace) -> None:
        f.y, f.yaw, f.wz = -f.y, -f.yaw, -f.wz

    return record(drive, spoil_odometry=spoil, **more)


def ned(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    def spoil(f: SimpleNamespace) -> None:
        f.x, f.y, f.yaw, f.wz = f.y, f.x, math.pi / 2 - f.yaw, -f.wz

    return record(drive, spoil_odometry=spoil, **more)


def degrees(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    def spoil(f: SimpleNamespace) -> None:
        f.yaw, f.wz = math.degrees(f.yaw), math.degrees(f.wz)

    return record(drive, spoil_odometry=spoil, **more)


def twist_in_world(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    def spoil(f: SimpleNamespace) -> None:
        f.vx, f.vy = f.vx * math.cos(f.yaw), f.vx * math.sin(f.yaw)

    return record(drive, spoil_odometry=spoil, **more)


def twist_units(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    factor = float(rng.choice([3.6, 0.0, -1.0, 0.5]))

    def spoil(f: SimpleNamespace) -> None:
        f.vx *= factor

    return record(drive, spoil_odometry=spoil, **more)


def skewed(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    rig = record(drive, **more)
    shift_s = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 2.0))
    for event in rig.of('/cam/'):
        event.stamp_s += shift_s
    return rig


def disordered(drive: Drive, rng: np.random.Generator, **more: Any) -> RecordedRig:
    rig = record(drive, **more)
    events = rig.of(str(rng.choice(['/odom', '/cam/front/image'])))
    for k in range(3, len(events) - 1, 7):
        events[k].stamp_s, events[k + 1].stamp_s = events[k + 1].stamp_s, events[k].stamp_s
    return rig


# The twelve listed in docs/doctor.md: what is planted, and the finding that must name it.
MIS_SET: dict[str, tuple[Callable[..., RecordedRig], str]] = {
    'two cameras swapped': (swapped, 'cameras_swapped'),
    'a camera mirrored': (mirrored, 'camera_mirrored'),
    'a camera upside down': (upside_down, 'camera_upside_down'),
    'pictures of another size than camera_info': (wrong_size, 'camera_size'),
    'a wrong focal length in camera_info': (wrong_focal, 'camera_scale'),
    'a left-handed odometry (y and yaw)': (left_handed, 'frame_left_handed'),
    'an odometry in north, east, down': (ned, 'frame_ned'),
    'yaw in degrees': (degrees, 'odometry_degrees'),
    'a twist in the odometry frame': (twist_in_world, 'twist_frame'),
    'a twist that disagrees with the poses': (twist_units, 'twist_disagrees'),
    'camera clocks that are off': (skewed, 'clock_skew'),
    'stamps out of order': (disordered, 'stamps_order'),
}


def jittered(drive_cameras: tuple, rng: np.random.Generator) -> tuple:
    """The same cameras on another vehicle."""
    fov = float(rng.uniform(55.0, 90.0))
    return tuple(
        replace(
            c, fov_deg=fov, x_m=float(rng.uniform(0.3, 2.2)), y_m=float(rng.uniform(-0.4, 0.4)),
            z_m=float(rng.uniform(1.2, 2.0)), yaw_deg=c.yaw_deg + float(rng.uniform(-12.0, 12.0)),
            pitch_deg=float(rng.uniform(-2.0, 4.0)),
        )
        for c in drive_cameras
    )  # fmt: skip


VISUAL = ('cameras_swapped', 'camera_mirrored', 'camera_upside_down', 'camera_size',
          'camera_scale', 'frame_left_handed', 'frame_ned')  # fmt: skip
BEND_RAD = 0.4
FAMILIES = ('turns', 'lane_keeping', 'lead_vehicle', 'red_light', 'pedestrian')


def random_rig(
    rng: np.random.Generator, faults: tuple[str, ...] = (), seconds: float = 3.0
) -> RecordedRig:
    """A rig drawn at random: road, vehicle, cameras, rates, noise; with the faults named."""
    cameras = jittered(scaled(TOWN_CAMERAS, 2), rng)
    turned_rad = -1.0
    # On a straight road a mirrored picture, a mirrored frame and a yaw in degrees look right:
    # what is to be named is planted where the road bends.
    while turned_rad < (BEND_RAD if faults else 0.0):
        drive = town_drive(
            str(rng.choice(FAMILIES)),
            int(rng.integers(10_000)),
            cameras,
            seconds=seconds,
            camera_hz=float(rng.choice([10.0, 15.0])),
            ego_hz=float(rng.choice([20.0, 50.0, 100.0])),
            speed_mps=float(rng.uniform(5.0, 11.0)),
            mirror=bool(rng.random() < 0.5),
        )
        turned_rad = float(np.ptp(drive.poses[:, 2]))
    more: dict[str, Any] = {'transforms': True, 'noise': rng, 'raw': bool(rng.random() < 0.4)}
    rig = record(drive, **more)
    spoilt = [MIS_SET[fault][0] for fault in faults]
    if spoilt:
        rig = spoilt[0](drive, rng, **more)
    if len(spoilt) == 2:
        # The topics that the second fault changes are taken from a rig with that fault.
        second = spoilt[1](drive, rng, **more)
        other = '/odom' if MIS_SET[faults[1]][1] not in VISUAL else '/cam/'
        rig.events = [e for e in rig.events if other not in e.topic] + second.of(other)
    return rig


def random_faults(rng: np.random.Generator) -> tuple[str, ...]:
    """One fault of the list, or one of the pictures and one of the odometry."""
    names = list(MIS_SET)
    if rng.random() < 0.5:
        return (str(rng.choice(names)),)
    pictures = [n for n in names if MIS_SET[n][1].startswith('camera')]
    odometry = ['yaw in degrees', 'a twist in the odometry frame',
                'a twist that disagrees with the poses']  # fmt: skip
    return (str(rng.choice(pictures)), str(rng.choice(odometry)))
