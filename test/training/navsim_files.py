"""A drive in the town, written as NAVSIM's log, pictures and metric cache.

Classes of the names and attributes that NAVSIM and nuPlan have (navsim 2.2, nuplan-devkit 1.2)
are made here, so that the pickles name what real ones name.
"""

from __future__ import annotations

import lzma
import math
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely

from spanvla_ros.geometry import local_from_world
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.runtime.virtual_camera import model_mount
from spanvla_ros.scoring.reference import pdm_closed
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.driver import reference_plan
from spanvla_ros.town.snapshots import Snapshot, labelled_scene
from spanvla_ros.town.traffic import World
from spanvla_ros.training.data.mistakes import drive_along
from spanvla_ros.types import Scene

STATE = 'nuplan.common.actor_state'
PDM = 'navsim.planning.simulation.planner.pdm_planner'
LAYERS = {'lane': 0, 'intersection': 1, 'connector': 11, 'roadblock': 17}
CAMERAS = {'CAM_F0': 'front', 'CAM_L0': 'front_left', 'CAM_R0': 'front_right'}
NOW = 3


@dataclass
class Written:
    """Where everything lies, and the truth it was made from."""

    logs: Path
    sensors: Path
    cache: Path
    token: str
    scene: Scene
    world: World
    images: np.ndarray
    plan: np.ndarray


class Foreign:
    """Classes under foreign names, registered as modules while pickles are written."""

    def __init__(self, monkeypatch: Any) -> None:
        self._patch = monkeypatch

    def make(
        self, module: str, name: str, *, slots: tuple[str, ...] = (), args: bool = False
    ) -> type:
        """A class; with `args` it is pickled by its constructor, with `slots` it has no dict."""
        for depth in range(1, module.count('.') + 2):
            part = '.'.join(module.split('.')[:depth])
            if part not in sys.modules:
                self._patch.setitem(sys.modules, part, types.ModuleType(part))
        body: dict[str, Any] = {'__module__': module, '__qualname__': name}
        if slots:
            body['__slots__'] = slots
        if args:
            body['__init__'] = lambda self, *given: setattr(self, 'given', given)
            body['__reduce__'] = lambda self: (type(self), self.given)
        made = type(name, (), body)
        self._patch.setattr(sys.modules[module], name, made, raising=False)
        return made


def filled(made: type, **values: Any) -> Any:
    one = made()
    for name, value in values.items():
        setattr(one, name, value)
    return one


def write_drive(tmp_path: Path, monkeypatch: Any, world: World) -> Written:
    """14 frames of the reference's drive; the fourth is the present."""
    renderer = Renderer(TOWN_CAMERAS)
    logs, sensors = tmp_path / 'logs', tmp_path / 'sensors'
    cache = tmp_path / 'cache'
    logs.mkdir()
    frames = []
    kept: dict[str, Any] = {}
    for number in range(14):
        images = renderer.draw(world.ground(), world.boxes(), world.tint, world.ego.pose)
        if number == NOW:
            plan = reference_plan(world)
            snapshot = Snapshot(world.clone(), world.ego, np.zeros((3, 3)), plan)
            kept = {'scene': labelled_scene(snapshot), 'world': world.clone(), 'images': images}
        frames.append(frame_of(world, number, images, sensors))
        drive_along(world, reference_plan(world).poses, 5)
    with open(logs / 'a_log.pkl', 'wb') as file:
        pickle.dump(frames, file, protocol=4)
    token = frames[NOW]['token']
    reference = pdm_closed(kept['scene'], 'v2', world.vehicle)
    path = cache / 'a_log' / 'unknown' / token / 'metric_cache.pkl'
    path.parent.mkdir(parents=True)
    content = cache_of(Foreign(monkeypatch), kept['scene'], reference)
    path.write_bytes(lzma.compress(pickle.dumps(content, protocol=5), preset=0))
    return Written(logs, sensors, cache, token, plan=reference.plan, **kept)


def frame_of(world: World, number: int, images: np.ndarray, sensors: Path) -> dict[str, Any]:
    ego, scene = world.ego, world.scene()
    boxes, names, speeds = [], [], []
    for agent in scene.agents:
        x, y, yaw = local_from_world(ego.pose, agent.states[0, :3])
        vx, vy = local_from_world([0.0, 0.0, ego.yaw_rad], agent.states[0, 3:5])
        boxes.append([x, y, 0.5, agent.length_m, agent.width_m, agent.height_m, yaw])
        names.append(agent.kind)
        speeds.append([vx, vy, 0.0])
    cams = {}
    for spec, image in zip(TOWN_CAMERAS, images, strict=True):
        label = next(key for key, name in CAMERAS.items() if name == spec.name)
        file = f'a_log/{label}/{number}.png'
        (sensors / file).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(sensors / file), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        mount = model_mount(spec)
        middle = (np.array([spec.width_px, spec.height_px]) - 1) / 2
        matrix = [[spec.focal_px, 0, middle[0]], [0, spec.focal_px, middle[1]], [0, 0, 1]]
        cams[label] = {
            'data_path': file,
            'sensor2lidar_rotation': mount.base_from_optical,
            'sensor2lidar_translation': mount.place_m,
            'cam_intrinsic': np.array(matrix),
            'distortion': np.zeros(5),
        }
    half = 0.5 * ego.yaw_rad
    command = {'left': 0, 'right': 2}.get(world.command(), 1)
    return {
        'token': f'{number:016x}',
        'timestamp': 1_600_000_000_000_000 + 500_000 * number,
        'log_name': 'a_log',
        'map_location': 'us-nv-las-vegas-strip',
        'roadblock_ids': list(scene.route),
        'traffic_lights': [(light.lane_id, True) for light in scene.red_lights],
        'ego2global_translation': np.array([ego.x_m, ego.y_m, 0.0]),
        'ego2global_rotation': [math.cos(half), 0.0, 0.0, math.sin(half)],
        'ego_dynamic_state': [ego.speed_mps, 0.0, ego.accel_mps2, 0.0],
        'driving_command': np.eye(4, dtype=int)[command],
        'anns': {
            'gt_boxes': np.array(boxes, dtype=np.float32).reshape(-1, 7),
            'gt_names': np.array(names),
            'gt_velocity_3d': np.array(speeds, dtype=np.float32).reshape(-1, 3),
            'instance_tokens': [f'i{i}' for i in range(len(boxes))],
            'track_tokens': [agent.agent_id for agent in scene.agents],
        },
        'cams': cams,
    }


def cache_of(foreign: Foreign, scene: Scene, reference: Any) -> Any:
    pose_of = foreign.make(
        f'{STATE}.state_representation', 'StateSE2', slots=('x', 'y', 'heading')
    )
    time_of = foreign.make(f'{STATE}.state_representation', 'TimePoint', slots=('time_us',))
    car_of = foreign.make(f'{STATE}.vehicle_parameters', 'VehicleParameters', args=True)
    footprint_of = foreign.make(f'{STATE}.car_footprint', 'CarFootprint')
    ego_of = foreign.make(f'{STATE}.ego_state', 'EgoState')
    trajectory_of = foreign.make(
        'nuplan.planning.simulation.trajectory.interpolated_trajectory', 'InterpolatedTrajectory',
        args=True,
    )  # fmt: skip
    path_of = foreign.make(f'{PDM}.utils.pdm_path', 'PDMPath', args=True)
    map_of = foreign.make(f'{PDM}.observation.pdm_occupancy_map', 'PDMDrivableMap', args=True)
    layer_of = foreign.make('nuplan.common.maps.maps_datatypes', 'SemanticMapLayer', args=True)
    cache_class = foreign.make('navsim.planning.metric_caching.metric_cache', 'MetricCache')
    car = car_of(2.297, 4.049, 1.127, 1.67, 3.089, 'pacifica', 'gen1', 1.777)

    def pose(x: float, y: float, yaw: float) -> Any:
        return filled(pose_of, x=float(x), y=float(y), heading=float(yaw))

    states = []
    for number, (x, y, yaw) in enumerate(reference.plan.tolist()):
        ahead = pose(x + 1.461 * math.cos(yaw), y + 1.461 * math.sin(yaw), yaw)
        box = filled(footprint_of, _center=ahead, _length=5.176, _vehicle_parameters=car)
        when = filled(time_of, time_us=1_600_000_001_500_000 + 100_000 * number)
        states.append(filled(ego_of, _car_footprint=box, _time_point=when))
    names, layers, shapes = [], [], []

    def add(name: str, layer: str, ring: np.ndarray) -> None:
        names.append(name)
        layers.append(layer_of(LAYERS[layer]))
        shapes.append(shapely.Polygon(ring))

    blocks = scene.map.roadblocks
    for block in blocks:
        if not block.is_connector:
            add(block.roadblock_id, 'roadblock', block.polygon)
    for block in blocks:
        for lane in block.lanes:
            add(lane.lane_id, 'connector' if block.is_connector else 'lane', lane.polygon)
    for number, ring in enumerate(scene.map.intersections):
        add(f'crossing{number}', 'intersection', ring)
    line = reference.centerline
    return filled(
        cache_class,
        file_path=None,
        log_name='a_log',
        trajectory=trajectory_of(states),
        ego_state=states[0],
        centerline=path_of([pose(x, y, 0.0) for x, y in line.tolist()]),
        route_lane_ids=list(reference.route_lane_ids),
        drivable_area_map=map_of(names, layers, np.array(shapes, dtype=object), 10),
    )
