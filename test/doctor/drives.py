"""Short drives through the town, seen by cameras of any mount: what test rigs are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.scenarios import make_world
from spanvla_ros.types import EgoState

LATERAL_MPS2 = 2.5


@dataclass(frozen=True)
class Drive:
    """What happened: pictures `[n, c, h, w, 3]` at `picture_s`, poses at `ego_s`."""

    cameras: tuple[CameraSpec, ...]
    picture_s: np.ndarray
    pictures: np.ndarray
    ego_s: np.ndarray
    poses: np.ndarray
    speed_mps: float
    yaw_rate_radps: np.ndarray
    route: np.ndarray


def town_drive(
    family: str,
    seed: int,
    cameras: tuple[CameraSpec, ...],
    *,
    seconds: float = 3.0,
    camera_hz: float = 10.0,
    ego_hz: float = 50.0,
    speed_mps: float = 7.0,
    mirror: bool = False,
) -> Drive:
    """Along the lane at constant speed, where the road bends most."""
    world = make_world(family, seed).without_hazard('lead')
    corridor = world.corridor
    s_m = np.arange(world.around.start_m, world.around.goal_m, 1.0)
    yaw = np.unwrap([corridor.place(float(s), 0.0)[2] for s in s_m])
    bend = np.abs(np.diff(yaw))
    window = max(round(speed_mps * seconds), 2)
    sums = np.convolve(bend, np.ones(window), 'valid') if len(bend) > window else np.zeros(1)
    first = int(np.argmax(sums))
    sharpest = max(float(bend[first : first + window].max()), 1e-6)
    speed_mps = min(speed_mps, math.sqrt(LATERAL_MPS2 / sharpest))
    world.mirror = mirror

    offset_m = world.ego_d_m
    latest_m = world.around.goal_m - speed_mps * seconds

    def place(time_s: float) -> EgoState:
        world.ego_s_m = min(float(s_m[first]), latest_m) + speed_mps * time_s
        x, y, heading = corridor.place(world.ego_s_m, offset_m)
        return EgoState(0, x, y, heading, speed_mps)

    ego_s = np.arange(0.0, seconds, 1.0 / ego_hz)
    picture_s = np.arange(0.0, seconds, 1.0 / camera_hz)
    poses = []
    for time_s in ego_s.tolist():
        world.place_ego(place(time_s))
        poses.append(world.ego.pose)
    renderer = Renderer(cameras)
    pictures = []
    for time_s in picture_s.tolist():
        world.place_ego(place(time_s))
        pictures.append(renderer.draw(world.ground(), world.boxes(), world.tint, world.ego.pose))
        world.advance(1.0 / camera_hz)
    table = np.array(poses)
    table[:, 2] = np.unwrap(table[:, 2])
    return Drive(
        cameras,
        picture_s,
        np.array(pictures),
        ego_s,
        table,
        speed_mps,
        np.gradient(table[:, 2], 1.0 / ego_hz),
        world.route().points,
    )


def scaled(cameras: tuple[CameraSpec, ...], factor: int) -> tuple[CameraSpec, ...]:
    """The same cameras with more pixels."""
    return tuple(
        replace(c, width_px=c.width_px * factor, height_px=c.height_px * factor) for c in cameras
    )
