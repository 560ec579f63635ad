"""The town in a mirror: y, yaw and everything that turns change sign."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spanvla_ros.town.elements import Box, Patch
from spanvla_ros.types import EgoState, Scene, SceneEgo, SceneRoadblock


def flip_ego(ego: EgoState) -> EgoState:
    """An ego state in a mirror."""
    return replace(
        ego,
        y_m=-ego.y_m,
        yaw_rad=-ego.yaw_rad,
        yaw_rate_radps=-ego.yaw_rate_radps,
        steering_rad=-ego.steering_rad,
    )


def flip_box(box: Box) -> Box:
    """A box in a mirror, its faces too."""
    return replace(
        box,
        y_m=-box.y_m,
        yaw_rad=-box.yaw_rad,
        patches=tuple(_flip_patch(patch) for patch in box.patches),
    )


def _flip_patch(patch: Patch) -> Patch:
    other = {'left': 'right', 'right': 'left'}.get(patch.face)
    if other:
        return replace(patch, face=other)
    return replace(patch, left_m=-patch.left_m, right_m=-patch.right_m)


def flip_scene(scene: Scene) -> Scene:
    """A scene in a mirror: y, yaw and all that turns change sign."""
    flip = np.array([1.0, -1.0])

    def block(b: SceneRoadblock) -> SceneRoadblock:
        lanes = tuple(
            replace(x, centerline=x.centerline * flip, polygon=x.polygon * flip) for x in b.lanes
        )
        return replace(b, polygon=b.polygon * flip, lanes=lanes)

    def ego(e: SceneEgo) -> SceneEgo:
        return replace(
            e, y_m=-e.y_m, yaw_rad=-e.yaw_rad, vy_mps=-e.vy_mps, ay_mps2=-e.ay_mps2,
            steering_rad=-e.steering_rad, yaw_rate_radps=-e.yaw_rate_radps,
        )  # fmt: skip

    return replace(
        scene,
        ego=ego(scene.ego),
        ego_history=tuple(ego(e) for e in scene.ego_history),
        map=replace(
            scene.map,
            roadblocks=tuple(block(b) for b in scene.map.roadblocks),
            intersections=tuple(p * flip for p in scene.map.intersections),
        ),
        agents=tuple(
            replace(a, states=a.states * [1.0, -1.0, -1.0, 1.0, -1.0]) for a in scene.agents
        ),
        human=None if scene.human is None else scene.human * [1.0, -1.0, -1.0],
    )
