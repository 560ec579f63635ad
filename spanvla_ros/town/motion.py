"""How the ego moves, and whether two things touch."""

from __future__ import annotations

import math

import numpy as np

from spanvla_ros.types import EgoState, Vehicle

SPEED_RESPONSE_S = 0.25


def boxes_overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rectangles given by their corners overlap (separating axes)."""
    for corners in (a, b):
        for index in (0, 1):
            axis = corners[index + 1] - corners[index]
            first, second = a @ axis, b @ axis
            if first.max() < second.min() or second.max() < first.min():
                return False
    return True


def drive_bicycle(
    ego: EgoState, speed_mps: float, steering_rad: float, vehicle: Vehicle, dt_s: float
) -> EgoState:
    """Kinematic bicycle: speed follows the command with a lag, both within the limits."""
    target = min(max(speed_mps, 0.0), vehicle.max_speed_mps)
    accel = (target - ego.speed_mps) / SPEED_RESPONSE_S
    accel = min(max(accel, -vehicle.max_decel_mps2), vehicle.max_accel_mps2)
    speed = max(0.0, ego.speed_mps + accel * dt_s)
    wanted = min(max(steering_rad, -vehicle.max_steering_rad), vehicle.max_steering_rad)
    reach = vehicle.max_steering_rate_radps * dt_s
    steering = ego.steering_rad + min(max(wanted - ego.steering_rad, -reach), reach)
    mean = 0.5 * (ego.speed_mps + speed)
    rate = mean * math.tan(steering) / vehicle.wheelbase_m
    most = vehicle.max_lateral_accel_mps2 * 1.5 / max(mean, 0.1)
    rate = min(max(rate, -most), most)
    middle = ego.yaw_rad + 0.5 * rate * dt_s
    return EgoState(
        stamp_ns=ego.stamp_ns + round(dt_s * 1e9),
        x_m=ego.x_m + mean * dt_s * math.cos(middle),
        y_m=ego.y_m + mean * dt_s * math.sin(middle),
        yaw_rad=(ego.yaw_rad + rate * dt_s + math.pi) % (2 * math.pi) - math.pi,
        speed_mps=speed,
        accel_mps2=(speed - ego.speed_mps) / dt_s,
        yaw_rate_radps=rate,
        steering_rad=steering,
    )


def inside(area: np.ndarray, x: float, y: float) -> bool:
    """Whether a point lies in a convex polygon, whichever way it turns."""
    step = np.roll(area, -1, axis=0) - area
    cross = step[:, 0] * (y - area[:, 1]) - step[:, 1] * (x - area[:, 0])
    return bool((cross >= 0).all() or (cross <= 0).all())
