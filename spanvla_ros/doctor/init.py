"""`spanvla init`: a parameter file for the rig at hand, from its bag or from a running graph.

Which topic is which camera is read off the names; where those say nothing, off the directions
the static transforms give. What cannot be seen from outside, the limits of the vehicle, is not
guessed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transforms3d.euler import mat2euler

from spanvla_ros.doctor.command import cameras_of, rig_heard, rig_of_bag
from spanvla_ros.doctor.rig import Camera, Rig
from spanvla_ros.doctor.sight import Mount
from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.runtime.virtual_camera import BODY_FROM_OPTICAL
from spanvla_ros.types import SpanvlaError

PARAMETERS, RIG = 'rig.param.yaml', 'rig.yaml'
# A camera that looks further aside than this from one of the model's is none of them.
NEAREST_DEG = 30.0
DEFAULT_FRAME = 'odom'
FRAMED = ('planner', 'guardian', 'follower')


@dataclass(frozen=True)
class Found:
    """What a rig offers a model: its cameras by the model's names, mounts, topics, frame."""

    cameras: Mapping[str, Camera]
    mounts: Mapping[str, Mount]
    odometry: str
    route: str
    frame: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla init`."""
    parser.add_argument('--bag', default='', help='a recorded drive: folder, .mcap, .db3, .bag')
    parser.add_argument(
        '--seconds', type=float, default=5.0, help='without --bag: how long to listen to a graph'
    )
    parser.add_argument('--model', default='', help='model directory; default: the shipped one')
    parser.add_argument('--out', default='rig', help=f'folder for {PARAMETERS} and {RIG}')


def run(options: argparse.Namespace) -> int:
    """Look, write the files, print the line that launches with them."""
    out = Path(options.out)
    for name in (PARAMETERS, RIG):
        if (out / name).exists():
            raise SpanvlaError(f'{out / name}: exists already; move it away or name another --out')
    specs = cameras_of(options.model)
    rig = rig_of_bag(options.bag, specs) if options.bag else rig_heard(options.seconds, specs)
    found = look(rig)
    out.mkdir(parents=True, exist_ok=True)
    launch = launch_line(found, out, options.model)
    if found.mounts:
        write_text(out / RIG, rig_yaml(found))
    write_text(out / PARAMETERS, parameter_yaml(found, specs, out, launch))
    for spec in specs:
        camera = found.cameras.get(spec.name)
        topic = 'none found' if camera is None else camera.stream.topic.name
        sys.stdout.write(f'{spec.name}: {topic}\n')
    sys.stdout.write(f'{launch}\n')
    return 0


def look(rig: Rig) -> Found:
    """Match a rig with the cameras of a model.

    Raises:
        SpanvlaError: no odometry, or no camera that could be one of the model's.
    """
    if not rig.odometry_topic:
        raise SpanvlaError('init: no odometry was heard; start or record nav_msgs/Odometry')
    cameras = {camera.name: camera for camera in rig.cameras if camera.name}
    for spec in rig.specs:
        if spec.name not in cameras:
            unnamed = [camera for camera in rig.cameras if not camera.name]
            nearest = _nearest(rig, spec, [c for c in unnamed if c not in cameras.values()])
            if nearest is not None:
                cameras[spec.name] = nearest
    if not cameras:
        seen = ', '.join(camera.stream.topic.name for camera in rig.cameras) or 'none'
        raise SpanvlaError(
            f'init: none of the image topics ({seen}) is known for a camera of the model, by its '
            'name or by /tf_static; set planner.camera_topics by hand'
        )
    mounts = {
        name: mount
        for name, camera in cameras.items()
        if (mount := rig.given_mount(camera)) is not None
    }
    every = len(mounts) == len(rig.specs)
    frame = rig.streams[rig.odometry_topic].frame or DEFAULT_FRAME
    return Found(cameras, mounts if every else {}, rig.odometry_topic, rig.route_topic, frame)


def _nearest(rig: Rig, spec: CameraSpec, cameras: Sequence[Camera]) -> Camera | None:
    """The camera that looks where one of the model's does, by the static transforms."""
    off = {}
    for index, camera in enumerate(cameras):
        mount = rig.given_mount(camera)
        if mount is not None:
            turn = math.radians(mount.yaw_deg - spec.yaw_deg)
            off[index] = abs(math.degrees(math.remainder(turn, math.tau)))
    if not off or min(off.values()) > NEAREST_DEG:
        return None
    return cameras[min(off, key=lambda index: off[index])]


def picture_topic(camera: Camera) -> str:
    """The topic of a camera's pictures without the ending of compressed ones."""
    return camera.stream.topic.name.removesuffix('/compressed')


def launch_line(found: Found, out: Path, model: str) -> str:
    """How to launch the nodes on the rig; cameras are given by the base of their topics."""
    words = [f'param_file:={(out / PARAMETERS).resolve()}', f'odometry:={found.odometry}']
    if found.route:
        words.append(f'route:={found.route}')
    if model:
        words.append(f'model_dir:={Path(model).resolve()}')
    if found.frame != DEFAULT_FRAME:
        words.append(f'output_frame:={found.frame}')
    for name, camera in found.cameras.items():
        words.append(f'{name}:={picture_topic(camera).rpartition("/")[0]}')
    return ' '.join(('ros2 launch spanvla_ros vehicle.launch.xml', *words))


def rig_yaml(found: Found) -> str:
    """Mounts as `planner.rig_file` has them, out of the static transforms."""
    cameras: dict[str, dict[str, float]] = {}
    for name, mount in found.mounts.items():
        yaw, pitch, roll = mat2euler(mount.base_from_optical @ BODY_FROM_OPTICAL.T, axes='rzyx')
        numbers = dict(zip(('x_m', 'y_m', 'z_m'), mount.center_m.tolist(), strict=True))
        angles = {'yaw_deg': yaw, 'pitch_deg': pitch, 'roll_deg': roll}
        numbers |= {key: math.degrees(value) for key, value in angles.items()}
        cameras[name] = {key: round(value, 4) + 0.0 for key, value in numbers.items()}
    return '# Where the cameras stand in base_link, out of /tf_static.\n' + yaml.safe_dump(
        {'cameras': cameras}, sort_keys=False
    )


def parameter_yaml(found: Found, specs: Sequence[CameraSpec], out: Path, launch: str) -> str:
    """The parameters of the rig; what is not named keeps its default."""
    nodes: dict[str, dict[str, Any]] = {node: {'output_frame': found.frame} for node in FRAMED}
    planner = nodes['planner']
    others = [
        f'{name}={picture_topic(camera)}'
        for name, camera in found.cameras.items()
        if picture_topic(camera).rpartition('/')[2] != 'image'
    ]
    if others:
        planner['camera_topics'] = others
    if found.mounts:
        planner |= {'extrinsics': 'file', 'rig_file': str((out / RIG).resolve())}
    missing = [spec.name for spec in specs if spec.name not in found.cameras]
    notes = [
        'Parameters of this rig; all others and their meaning: docs/parameters.md.',
        f'Start with: {launch}',
        "The vehicle's dimensions and limits are its own file: config/vehicle.yaml.",
        *(f'No topic was found for camera {name}: plans are DEGRADED.' for name in missing),
    ]
    content = {f'/**/{node}': {'ros__parameters': values} for node, values in nodes.items()}
    return ''.join(f'# {line}\n' for line in notes) + yaml.safe_dump(content, sort_keys=False)
