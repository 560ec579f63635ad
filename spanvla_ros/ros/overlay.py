"""What the planner shows people: the plan drawn into the anchor picture, the reasoning as JSON."""

from __future__ import annotations

import json

import cv2
import numpy as np
from jaxtyping import UInt8

from spanvla_ros.geometry import local_from_world
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.camera import project
from spanvla_ros.types import Plan

SCALE = 2
TEXT_COLOR = (255, 255, 255)
PATH_COLOR = (60, 220, 90)


def draw_overlay(picture: UInt8[np.ndarray, 'h w 3'], plan: Plan, camera: CameraSpec) -> bytes:
    """The picture with the planned path on the ground and the plan's words, as JPEG.

    Args:
        picture: RGB picture of `camera`, in the model's size.
        plan: a plan made from this picture; its trajectory is in the odometry frame.
        camera: the camera's size, field of view and mount.
    """
    size = (picture.shape[1] * SCALE, picture.shape[0] * SCALE)
    canvas = cv2.resize(picture[:, :, ::-1], size, interpolation=cv2.INTER_NEAREST)
    path = local_from_world(np.array(plan.origin), plan.trajectory.poses)[:, :2]
    pixels, in_front = project(path, camera)
    seen = np.round((pixels[in_front] + 0.5) * SCALE).astype(np.int32)
    # A point just beyond the near plane may lie anywhere; far outside it draws nothing useful.
    seen = seen[(np.abs(seen) < 4 * max(size)).all(axis=1)]
    if len(seen) > 1:
        cv2.polylines(canvas, [seen], isClosed=False, color=PATH_COLOR, thickness=2)
    for point in seen:
        cv2.circle(canvas, (int(point[0]), int(point[1])), 3, PATH_COLOR, -1)
    words = (plan.reasoning or plan.decision or plan.thinking).split(' ; ')
    driver = '' if plan.driver == 'model' else f' [{plan.driver}]'
    lines = (f'{plan.speed_mps:.1f} m/s {plan.schedule}{driver}', *words)
    for row, line in enumerate(lines):
        place = (6, 14 + 13 * row)
        cv2.putText(canvas, line[:70], place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 2)
        cv2.putText(canvas, line[:70], place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, TEXT_COLOR, 1)
    _, jpeg = cv2.imencode('.jpg', canvas, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return jpeg.tobytes()


def reasoning_json(plan: Plan, now_ns: int) -> str:
    """What `output/reasoning` says: text, decision, kind of thinking, age, agreement, alarm."""
    stamp_ns = plan.reasoning_stamp_ns
    return json.dumps(
        {
            'text': plan.reasoning,
            'decision': plan.decision,
            'thinking': plan.thinking,
            'schedule': plan.schedule,
            'stamp_ns': stamp_ns,
            'age_s': None if stamp_ns is None else round((now_ns - stamp_ns) / 1e9, 3),
            'plan_stamp_ns': plan.trajectory.stamp_ns,
            'agreement': plan.agreement,
            'alarm': plan.think_alarm,
            'driver': plan.driver,
        },
        allow_nan=False,
    )
