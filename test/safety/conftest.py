"""An independent, slow validator and a plan maker for the safety tests.

The validator is written from the contract of the output alone, in scalar arithmetic, and shares
no code with the package.
"""

import json
import math

import numpy as np
import pytest

from spanvla_ros.types import EgoState, Plan, Trajectory, Vehicle

SECOND = 1_000_000_000


def _angle(a):
    return math.atan2(math.sin(a), math.cos(a))


def complaint(output, ego, vehicle):
    """What is wrong with a published output, or an empty text."""
    track = output.trajectory
    times = [float(t) for t in track.times_s]
    poses = [[float(v) for v in row] for row in track.poses]
    if len(times) != 51 or len(poses) != 51:
        return f'{len(times)} points'
    if any(abs(t - 0.1 * i) > 1e-9 for i, t in enumerate(times)):
        return 'times are not 0.1 s apart'
    rows = [*poses, output.speeds_mps, output.accels_mps2, output.yaw_rates_radps]
    if not all(math.isfinite(v) for row in rows for v in row):
        return 'not finite'
    if track.stamp_ns != ego.stamp_ns:
        return 'stamp is not that of the odometry'
    if math.dist(poses[0][:2], (ego.x_m, ego.y_m)) > 1e-6:
        return 'does not start at the ego'
    if abs(_angle(poses[0][2] - ego.yaw_rad)) > 1e-6:
        return 'does not start along the ego'
    start = max(ego.speed_mps, 0.0)
    top = max(start, vehicle.max_speed_mps)
    before, wheel_before = start, None
    for i in range(50):
        (xa, ya, ha), (xb, yb, hb) = poses[i], poses[i + 1]
        turn = _angle(hb - ha)
        chord = math.dist((xa, ya), (xb, yb))
        arc = chord * (turn / 2) / math.sin(turn / 2) if abs(turn) > 1e-09 else chord
        if chord > 1e-6:
            # An arc leaves its start turned by half of what it turns in all.
            slip = _angle(math.atan2(yb - ya, xb - xa) - ha - turn / 2)
            if abs(slip) * chord > 1e-3:
                return f'slips or reverses by {slip:.3g} rad at {i}'
        said_a, said_b = float(output.speeds_mps[i]), float(output.speeds_mps[i + 1])
        if abs(arc - 0.05 * (said_a + said_b)) > 1e-3 + 1e-4 * arc:
            return f'speeds {said_a:.3g}, {said_b:.3g} against {arc:.3g} m at {i}'
        if i == 0 and abs(said_a - start) > 1e-6:
            return 'speed steps at the start'
        if said_b < 0 or said_b > top + 0.05:
            return f'speed {said_b:.3g} at {i}'
        accel = (said_b - said_a) / 0.1
        if accel > vehicle.max_accel_mps2 + 1e-6 or accel < -vehicle.max_decel_mps2 - 1e-6:
            return f'acceleration {accel:.3g} at {i}'
        if abs(accel - float(output.accels_mps2[i])) > 1e-6:
            return f'acceleration said {output.accels_mps2[i]:.3g}, is {accel:.3g} at {i}'
        if arc > 0.02:
            curvature = turn / arc
            wheel = math.atan(vehicle.wheelbase_m * curvature)
            if abs(wheel) > vehicle.max_steering_rad * 1.01:
                return f'steering {wheel:.3g} at {i}'
            if abs(curvature) * said_a * said_b > vehicle.max_lateral_accel_mps2 * 1.01:
                return f'lateral acceleration at {i}'
            rate = 0.0 if wheel_before is None else abs(wheel - wheel_before) / 0.1
            if rate > vehicle.max_steering_rate_radps * 1.03:
                return f'steering rate {rate:.3g} at {i}'
            wheel_before = wheel
        else:
            wheel_before = None
        before = said_b
    if before > start and before > vehicle.max_speed_mps + 0.05:
        return 'ends too fast'
    if not output.state or output.state not in ('STANDBY', 'OK', 'DEGRADED', 'FALLBACK', 'FAULT'):
        return f'state {output.state!r}'
    if output.state != 'OK' and not output.reasons:
        return 'a state without a reason'
    if all(row[:2] == poses[0][:2] for row in poses) and 'standing' not in output.reasons:
        return 'holds without saying so'
    return ''


def arc_plan(
    *,
    stamp_ns=SECOND,
    plan_id=1,
    start=(0.0, 0.0, 0.0),
    speed=8.0,
    accel=0.0,
    curvature=0.0,
    count=10,
    spacing_s=0.5,
    **changes,
):
    """A plan along an arc at steady acceleration, from `start`, never reversing."""
    times = spacing_s * np.arange(1, count + 1)
    stop = speed / -accel if accel < 0 else math.inf
    moving = np.minimum(times, stop)
    along = np.maximum(speed * moving + 0.5 * accel * moving**2, 0.0)
    x0, y0, yaw0 = start
    turn = curvature * along
    size = along * np.sinc(turn / (2 * np.pi))
    poses = np.stack(
        [
            x0 + size * np.cos(yaw0 + turn / 2),
            y0 + size * np.sin(yaw0 + turn / 2),
            yaw0 + turn,
        ],
        axis=1,
    )
    values = {
        'plan_id': plan_id,
        'trajectory': Trajectory(stamp_ns, 'odom', times, poses),
        'origin': tuple(float(v) for v in start),
        'image_stamps_ns': (stamp_ns, None),
        'kv_stamp_ns': stamp_ns,
        'schedule': 'off',
        'steps': 5,
        'speed_mps': float(speed),
    }
    return Plan(**(values | changes))


def moving_ego(*, stamp_ns=SECOND, speed=8.0, **changes):
    values = {'x_m': 0.0, 'y_m': 0.0, 'yaw_rad': 0.0, 'speed_mps': speed}
    return EgoState(stamp_ns, **(values | changes))


def edited(plan, **changes):
    """The JSON text of a plan with fields of the raw object replaced."""
    return json.dumps(json.loads(plan.to_json()) | changes)


@pytest.fixture(scope='session')
def complain():
    return complaint


@pytest.fixture(scope='session')
def make_plan():
    return arc_plan


@pytest.fixture(scope='session')
def make_ego():
    return moving_ego


@pytest.fixture(scope='session')
def edit():
    return edited


@pytest.fixture(scope='session')
def vehicle():
    return Vehicle()
