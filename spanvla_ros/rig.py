"""`spanvla rig`: a model's cameras as the CARLA ros-bridge's `objects.json`, written or checked.

The bridge's `spawn_point` is a ROS pose in the vehicle (y left, yaw to the left, pitch down, as
`carla_spawn_objects.create_spawn_point` takes it), from the vehicle's origin; a model's cameras
stand in `base_link`, the rear axle. So only x is shifted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir, write_text
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.types import SpanvlaError, read_json

CAMERA = 'sensor.camera.rgb'
PSEUDO_SENSORS = (
    ('sensor.pseudo.tf', 'tf'),
    ('sensor.pseudo.odom', 'odometry'),
    ('sensor.pseudo.speedometer', 'speedometer'),
    ('sensor.other.collision', 'collision'),
    ('actor.pseudo.control', 'control'),
)
TOLERANCE_M = 0.02
TOLERANCE_DEG = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla rig`."""
    parser.add_argument('--model', help='model directory; default: the shipped town model')
    parser.add_argument('--out', help='objects.json to write')
    parser.add_argument('--check', help='an existing objects.json to hold against the model')
    parser.add_argument('--role-name', default='ego_vehicle', help='role name of the ego vehicle')
    parser.add_argument('--vehicle', default='vehicle.tesla.model3', help='blueprint of CARLA')
    parser.add_argument(
        '--origin-ahead-m',
        type=float,
        default=1.4,
        help='how far the origin of the vehicle lies ahead of its rear axle',
    )
    parser.add_argument(
        '--scale',
        type=int,
        default=2,
        help='pixels of a CARLA picture for one of the model along each side',
    )


def run(options: argparse.Namespace) -> int:
    """Write or check a rig; 1 where a checked one does not fit."""
    if not (options.out or options.check):
        raise SpanvlaError('nothing to do; give --out FILE or --check FILE')
    if options.scale < 1:
        raise SpanvlaError(f'--scale {options.scale}: give a whole number from 1 on')
    model_dir = Path(options.model) if options.model else shipped_model_dir()
    cameras = load_model_dir(model_dir).config.cameras
    if options.out:
        rig = rig_objects(
            cameras, options.role_name, options.vehicle, options.origin_ahead_m, options.scale
        )
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(options.out), json.dumps(rig, indent=2) + '\n')
        names = ', '.join(camera.name for camera in cameras)
        print(f'rig: {len(cameras)} cameras ({names}) in {options.out}')  # noqa: T201
    faults: list[str] = []
    if options.check:
        faults = rig_faults(
            _read(Path(options.check)), cameras, options.role_name, options.origin_ahead_m
        )
        for fault in faults:
            print(f'rig: {fault}')  # noqa: T201
        if not faults:
            print(f'rig: {options.check} fits the model')  # noqa: T201
    return 1 if faults else 0


def rig_objects(
    cameras: Sequence[CameraSpec], role_name: str, vehicle: str, origin_ahead_m: float, scale: int
) -> dict[str, Any]:
    """The content of `objects.json`.

    Args:
        cameras: of the model.
        role_name: of the ego vehicle, a part of its topics.
        vehicle: CARLA's blueprint.
        origin_ahead_m: how far the vehicle's origin lies ahead of its rear axle.
        scale: pixels for one pixel of the model; the planner averages them.
    """
    sensors: list[dict[str, Any]] = [
        {
            'type': CAMERA,
            'id': camera.name,
            'spawn_point': {
                'x': round(camera.x_m - origin_ahead_m, 4),
                'y': camera.y_m,
                'z': camera.z_m,
                'roll': 0.0,
                'pitch': camera.pitch_deg,
                'yaw': camera.yaw_deg,
            },
            'image_size_x': camera.width_px * scale,
            'image_size_y': camera.height_px * scale,
            'fov': camera.fov_deg,
        }
        for camera in cameras
    ]
    sensors += [{'type': kind, 'id': name} for kind, name in PSEUDO_SENSORS]
    return {
        'objects': [
            {'type': 'sensor.pseudo.objects', 'id': 'objects'},
            {'type': 'sensor.pseudo.actor_list', 'id': 'actor_list'},
            {'type': 'sensor.pseudo.opendrive_map', 'id': 'map'},
            {'type': vehicle, 'id': role_name, 'sensors': sensors},
        ]
    }


def rig_faults(
    rig: dict[str, Any], cameras: Sequence[CameraSpec], role_name: str, origin_ahead_m: float
) -> list[str]:
    """What in an `objects.json` does not fit the model's cameras, a sentence each."""
    egos = [item for item in rig['objects'] if item.get('id') == role_name]
    if not egos:
        return [f'no vehicle with id {role_name}; give --role-name']
    sensors = {item.get('id'): item for item in egos[0].get('sensors', ())}
    faults = []
    for camera in cameras:
        found = sensors.get(camera.name)
        if found is None or found.get('type') != CAMERA:
            faults.append(f'{camera.name}: no {CAMERA} of that id')
        else:
            faults += [f'{camera.name}: {text}' for text in _faults(found, camera, origin_ahead_m)]
    for kind, name in PSEUDO_SENSORS[1:2]:
        if kind not in [item.get('type') for item in sensors.values()]:
            faults.append(f'{name}: no {kind}, so no odometry')
    return faults


def _faults(found: dict[str, Any], camera: CameraSpec, origin_ahead_m: float) -> list[str]:
    spawn = found.get('spawn_point', {})
    wanted = {
        'x': (camera.x_m - origin_ahead_m, TOLERANCE_M),
        'y': (camera.y_m, TOLERANCE_M),
        'z': (camera.z_m, TOLERANCE_M),
        'roll': (0.0, TOLERANCE_DEG),
        'pitch': (camera.pitch_deg, TOLERANCE_DEG),
        'yaw': (camera.yaw_deg, TOLERANCE_DEG),
    }
    faults = [
        f'{name} is {float(spawn.get(name, 0.0)):g}, the model was trained at {value:g}'
        for name, (value, tolerance) in wanted.items()
        if abs(float(spawn.get(name, 0.0)) - value) > tolerance
    ]
    fov = float(found.get('fov', 90.0))
    if abs(fov - camera.fov_deg) > TOLERANCE_DEG:
        faults.append(f'fov is {fov:g}, the model was trained at {camera.fov_deg:g}')
    width, height = int(found.get('image_size_x', 800)), int(found.get('image_size_y', 600))
    if width * camera.height_px != height * camera.width_px:
        faults.append(
            f'{width}x{height} pixels are not of the shape {camera.width_px}x{camera.height_px}'
        )
    elif width < camera.width_px:
        faults.append(f'{width}x{height} pixels are fewer than the model takes')
    return faults


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, 'name a rig of the ros-bridge')
    if not isinstance(content.get('objects'), list):
        raise SpanvlaError(f'{path}: no list "objects"; it is not a rig of the ros-bridge')
    for item in content['objects']:
        sensors = item.get('sensors', []) if isinstance(item, dict) else None
        if not isinstance(sensors, list) or not all(map(_is_sensor, sensors)):
            raise SpanvlaError(f'{path}: {item!r:.60} is no object of the ros-bridge; mend it')
    return content


def _is_sensor(item: object) -> bool:
    """Whether this is a mapping, and what is a number in a sensor's is one."""
    if not isinstance(item, dict):
        return False
    place = item.get('spawn_point', {})
    if not isinstance(place, dict):
        return False
    numbers = [item.get(name, 0) for name in ('fov', 'image_size_x', 'image_size_y')]
    return all(
        isinstance(value, int | float) and math.isfinite(value)
        for value in (*numbers, *place.values())
    )
