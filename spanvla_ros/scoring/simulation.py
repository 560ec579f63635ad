"""The closed-loop simulation behind every score: an LQR tracker driving a kinematic bicycle.

A plan is sampled at 10 Hz for 4 s, tracked from the true start state, and what the bicycle does
is what is scored. The definition is nuPlan's and NAVSIM's tracker; the algebra here differs so
that a batch costs little more than a single plan: the speed fit is one constant matrix, the
curvature fit a tridiagonal system, and the ten-step look-ahead a polynomial in speed and
acceleration whose coefficients depend on the plan alone. All is float64.

State columns: x, y, heading, vx, vy, ax, ay, steering angle, steering rate, yaw rate, yaw
acceleration of the rear axle (m, s, rad; the first three in the world, the rest in the body).
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import wrap_angle
from spanvla_ros.types import SceneEgo, SpanvlaError, Vehicle

STEP_S = 0.1
STEPS = 40
STATE_SIZE = 11
X, Y, YAW, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCEL = range(STATE_SIZE)

PACIFICA = Vehicle()

_LOOKAHEAD = 10
_JERK_PENALTY = 1e-4
_CURVATURE_RATE_PENALTY = 1e-2
_FIRST_CURVATURE_PENALTY = 1e-10
_STOP_SPEED_MPS = 0.2
_STOP_GAIN = 0.5
_SPEED_GAIN = 10.0 / 11.0
_HEADING_WEIGHT = 10.0
_MAX_STEERING_RAD = np.pi / 3.0
_ACCEL_LAG = STEP_S / (STEP_S + 0.2)
_STEERING_LAG = STEP_S / (STEP_S + 0.05)
# The official code samples at whole microseconds of an absolute clock near this time, cut off
# after float64 arithmetic, so its samples lie up to a microsecond early.
_CLOCK_S = 1.6e9


def state_of_ego(ego: SceneEgo) -> Float64[np.ndarray, '11']:
    """The state vector of an ego; steering rate and yaw acceleration are taken as 0."""
    return np.array(
        [
            ego.x_m,
            ego.y_m,
            ego.yaw_rad,
            ego.vx_mps,
            ego.vy_mps,
            ego.ax_mps2,
            ego.ay_mps2,
            ego.steering_rad,
            0.0,
            ego.yaw_rate_radps,
            0.0,
        ]
    )


def resample(
    poses: Float64[np.ndarray, 'n t 3'], hz: int, start: Float64[np.ndarray, 'n 3']
) -> Float64[np.ndarray, 'n 41 3']:
    """Plans at 10 Hz from t = 0 to 4 s, linear in between, the short way round in heading.

    Args:
        poses: rear-axle poses in the world, the first at `1 / hz`; those after 4 s are not read.
        hz: 2 or 10.
        start: the pose each plan starts from, t = 0.

    Raises:
        SpanvlaError: a plan is shorter than 4 s.
    """
    knots = 4 * hz
    if poses.shape[1] < knots:
        raise SpanvlaError(f'trajectory: {poses.shape[1]} poses at {hz} Hz are shorter than 4 s')
    known = np.concatenate([start[:, None], poses[:, :knots]], axis=1)
    known[..., 2] = np.unwrap(known[..., 2], axis=1)
    sampled: Float64[np.ndarray, 'n 41 3'] = np.matmul(_sampling_matrix(hz), known)
    sampled[..., 2] = wrap_angle(sampled[..., 2])
    return sampled


def simulate(
    plans: Float64[np.ndarray, 'n 41 3'],
    start: Float64[np.ndarray, 'n 11'],
    vehicle: Vehicle = PACIFICA,
) -> Float64[np.ndarray, 'n 41 11']:
    """What the vehicle does when it tracks each plan for 4 s from its start state.

    Args:
        plans: 10 Hz rear-axle poses, the first at t = 0.
        start: start states, one a plan.
        vehicle: only the wheelbase is used.
    """
    count = len(plans)
    plan = np.ascontiguousarray(np.moveaxis(plans, 0, -1))
    plan_x, plan_y, plan_yaw = plan[:, 0], plan[:, 1], plan[:, 2]
    sin, cos = np.sin(plan_yaw), np.cos(plan_yaw)
    speed = _fit_speed(plan_x, plan_y, sin, cos)
    bends = _LOOKAHEAD_WEIGHTS @ _windows(_fit_curvature(plan_yaw, speed))
    target = speed[np.minimum(np.arange(STEPS) + _LOOKAHEAD, STEPS - 1)]

    states = np.zeros((STEPS + 1, STATE_SIZE, count))
    states[0] = start.T
    for k in range(STEPS):
        now, after = states[k], states[k + 1]
        dx, dy = now[X] - plan_x[k], now[Y] - plan_y[k]
        lateral = dy * cos[k] - dx * sin[k]
        heading = wrap_angle(now[YAW] - plan_yaw[k])
        accel, steering_rate = _control(
            now[VX], now[STEERING], lateral, heading, target[k], bends[k], vehicle.wheelbase_m
        )
        _drive(now, accel, steering_rate, vehicle.wheelbase_m, after)
    return np.ascontiguousarray(np.moveaxis(states, -1, 0))


def _control(
    speed: Float64[np.ndarray, 'n'],
    steering: Float64[np.ndarray, 'n'],
    lateral: Float64[np.ndarray, 'n'],
    heading: Float64[np.ndarray, 'n'],
    target: Float64[np.ndarray, 'n'],
    bends: Float64[np.ndarray, '5 n'],
    wheelbase_m: float,
) -> tuple[Float64[np.ndarray, 'n'], Float64[np.ndarray, 'n']]:
    # Ten linearised steps at speed v + a dt j collapse into polynomials of m0 = v dt and
    # m1 = a dt^2; `bends` holds the sums that the plan's curvature contributes.
    gap = speed - target
    stopping = (target <= _STOP_SPEED_MPS) & (speed <= _STOP_SPEED_MPS)
    accel = np.where(stopping, -_STOP_GAIN * gap, -_SPEED_GAIN * gap)
    m0, m1 = speed * STEP_S, accel * STEP_S**2
    m00, m01, m11 = m0 * m0, m0 * m1, m1 * m1
    travel = 10.0 * m0 + 45.0 * m1
    turn = steering / wheelbase_m
    heading_end = heading + travel * turn - (m0 * bends[0] + m1 * bends[1])
    lateral_end = (
        lateral
        + travel * heading
        + turn * (_SWEEP[0] * m00 + _SWEEP[1] * m01 + _SWEEP[2] * m11)
        - (m00 * bends[2] + m01 * bends[3] + m11 * bends[4])
    )
    scale = STEP_S / wheelbase_m
    by_heading = scale * (45.0 * m0 + 285.0 * m1)
    by_lateral = scale * (_LEVER[0] * m00 + _LEVER[1] * m01 + _LEVER[2] * m11)
    effort = by_lateral * lateral_end + _HEADING_WEIGHT * by_heading * wrap_angle(heading_end)
    cost = by_lateral * by_lateral + _HEADING_WEIGHT * by_heading * by_heading + 1.0
    return accel, np.where(stopping, 0.0, -effort / cost)


def _drive(
    now: Float64[np.ndarray, '11 n'],
    accel: Float64[np.ndarray, 'n'],
    steering_rate: Float64[np.ndarray, 'n'],
    wheelbase_m: float,
    after: Float64[np.ndarray, '11 n'],
) -> None:
    speed, steering = now[VX], now[STEERING]
    after[AX] = now[AX] + _ACCEL_LAG * (accel - now[AX])
    after[STEERING_RATE] = _STEERING_LAG * steering_rate
    after[X] = now[X] + speed * np.cos(now[YAW]) * STEP_S
    after[Y] = now[Y] + speed * np.sin(now[YAW]) * STEP_S
    after[YAW] = wrap_angle(now[YAW] + speed * np.tan(steering) / wheelbase_m * STEP_S)
    after[VX] = speed + after[AX] * STEP_S
    turned = steering + after[STEERING_RATE] * STEP_S
    after[STEERING] = np.minimum(np.maximum(turned, -_MAX_STEERING_RAD), _MAX_STEERING_RAD)
    after[YAW_RATE] = after[VX] * np.tan(after[STEERING]) / wheelbase_m
    after[YAW_ACCEL] = (after[YAW_RATE] - now[YAW_RATE]) / STEP_S


def _fit_speed(
    x: Float64[np.ndarray, '41 n'],
    y: Float64[np.ndarray, '41 n'],
    sin: Float64[np.ndarray, '41 n'],
    cos: Float64[np.ndarray, '41 n'],
) -> Float64[np.ndarray, '40 n']:
    # cos^2 + sin^2 = 1 takes the headings out of the normal equations: the matrix is constant.
    forward = np.diff(x, axis=0) * cos[:-1] + np.diff(y, axis=0) * sin[:-1]
    speed: Float64[np.ndarray, '40 n'] = _SPEED_FIT @ forward
    return speed


def _fit_curvature(
    yaw: Float64[np.ndarray, '41 n'], speed: Float64[np.ndarray, '40 n']
) -> Float64[np.ndarray, '40 n']:
    # In the curvatures themselves, not their rates, the regularised fit is tridiagonal.
    turned = wrap_angle(np.diff(yaw, axis=0))
    step = speed * STEP_S
    stiffness = _CURVATURE_RATE_PENALTY / STEP_S**2
    diagonal = step * step + 2.0 * stiffness
    diagonal[0] += _FIRST_CURVATURE_PENALTY - stiffness
    diagonal[-1] -= stiffness
    solved: Float64[np.ndarray, '40 n'] = step * turned
    for i in range(1, STEPS):
        factor = stiffness / diagonal[i - 1]
        diagonal[i] -= factor * stiffness
        solved[i] += factor * solved[i - 1]
    solved[-1] /= diagonal[-1]
    for i in range(STEPS - 2, -1, -1):
        solved[i] = (solved[i] + stiffness * solved[i + 1]) / diagonal[i]
    return solved


def _windows(
    curvature: Float64[np.ndarray, '40 n'],
) -> Float64[np.ndarray, '40 10 n']:
    last = np.broadcast_to(curvature[-1], (_LOOKAHEAD, curvature.shape[1]))
    padded = np.concatenate([curvature, last])
    windows: Float64[np.ndarray, '40 10 n'] = padded[
        np.arange(STEPS)[:, None] + np.arange(_LOOKAHEAD)
    ]
    return windows


@functools.cache
def _sampling_matrix(hz: int) -> Float64[np.ndarray, '41 k']:
    at_us = np.floor((np.arange(STEPS + 1) * STEP_S + _CLOCK_S) * 1e6)
    knots_us = np.floor((np.arange(0.0, 4.0, 1.0 / hz) + 1.0 / hz + _CLOCK_S) * 1e6)
    knots_us = np.concatenate([[_CLOCK_S * 1e6], knots_us]) - _CLOCK_S * 1e6
    at_us = np.clip(at_us - _CLOCK_S * 1e6, 0.0, knots_us[-1])
    return np.stack([np.interp(at_us, knots_us, row) for row in np.eye(4 * hz + 1)], axis=1)


def _speed_fit() -> Float64[np.ndarray, '40 40']:
    # Meant as a penalty on jerk, the official difference matrix has its upper diagonal overwritten
    # but for the last row, so it penalizes the accelerations themselves and one single jerk.
    accel = np.diff(np.eye(STEPS), axis=0) / STEP_S
    penalised = accel[:-1].copy()
    penalised[-1] -= accel[-1]
    normal = STEP_S**2 * np.eye(STEPS) + _JERK_PENALTY * penalised.T @ penalised
    fit: Float64[np.ndarray, '40 40'] = np.linalg.inv(normal) * STEP_S
    return fit


_SPEED_FIT = _speed_fit()
_J = np.arange(_LOOKAHEAD, dtype=np.float64)
_LATER0, _LATER1 = 9.0 - _J, 45.0 - 0.5 * _J * (_J + 1.0)
_PAIRS = np.stack([_LATER0, _LATER0 * _J + _LATER1, _LATER1 * _J])
_SWEEP = _PAIRS.sum(axis=1)
_LEVER = (_PAIRS * _J).sum(axis=1)
_LOOKAHEAD_WEIGHTS = np.concatenate([np.ones((1, _LOOKAHEAD)), _J[None], _PAIRS])
