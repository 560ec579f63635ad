"""The follower: from the newest trajectory to a drive command, or to the brake.

Pure pursuit (Coulter 1992) from where the vehicle will be when the command takes effect, with a
speed that reaches the trajectory's a moment later. No trajectory in time means full braking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spanvla_ros.geometry import arc_length, sample_polyline
from spanvla_ros.safety.clock import ClockWatch
from spanvla_ros.types import DriveCommand, EgoState, Trajectory, Vehicle

FUTURE_TOLERANCE_S = 0.1
STAND_MPS = 0.1
STAND_M = 0.15
LATER_S = 1.0


@dataclass(frozen=True)
class FollowerParameters:
    """Timing of the follower.

    `latency_s` is the time from odometry to the wheels, `preview_s` how far ahead of that the
    commanded speed lies: the response time of the vehicle's own speed control.
    """

    trajectory_timeout_s: float = 0.3
    odometry_timeout_s: float = 0.3
    latency_s: float = 0.1
    preview_s: float = 0.25
    lookahead_s: float = 0.7
    min_lookahead_m: float = 3.5
    clock_gap_s: float = 2.0


class Follower:
    """One vehicle's follower; keeps the last steering, so that it brakes without jerking it."""

    def __init__(self, vehicle: Vehicle, parameters: FollowerParameters | None = None) -> None:
        """Start braking; the first fresh trajectory releases the brake."""
        self.vehicle = vehicle
        self.parameters = parameters or FollowerParameters()
        self._clock = ClockWatch(self.parameters.clock_gap_s)
        self._not_before_ns: int | None = None
        self._steering_rad = 0.0
        self._command_ns: int | None = None

    def command(
        self, trajectory: Trajectory | None, ego: EgoState | None, now_ns: int
    ) -> DriveCommand:
        """The command for now.

        Args:
            trajectory: the newest one received, in the frame of `ego`; None before the first.
            ego: the newest odometry; None before the first.
            now_ns: the present on the clock of the stamps.
        """
        if self._clock.observe(now_ns) is not None:
            self._not_before_ns = now_ns
        reason = self._fault(trajectory, ego, now_ns)
        if trajectory is None or ego is None or reason:
            return self.brake(ego, reason)
        return self._follow(trajectory, ego, now_ns)

    def brake(self, ego: EgoState | None, reason: str) -> DriveCommand:
        """Full service brake with the wheels where they are."""
        speed_mps = 0.0 if ego is None else max(ego.speed_mps, 0.0)
        turning = speed_mps * math.tan(self._steering_rad) / self.vehicle.wheelbase_m
        if not math.isfinite(turning):
            turning = 0.0
        return DriveCommand(
            speed_mps=0.0,
            yaw_rate_radps=turning,
            accel_mps2=-self.vehicle.max_decel_mps2,
            steering_rad=self._steering_rad,
            braking=True,
            reason=reason,
        )

    def _fault(self, trajectory: Trajectory | None, ego: EgoState | None, now_ns: int) -> str:
        if trajectory is None:
            return 'no_trajectory'
        if ego is None:
            return 'no_odometry'
        if self._not_before_ns is not None and trajectory.stamp_ns < self._not_before_ns:
            return 'clock_jump'
        bounds = self.parameters
        for name, stamp_ns, timeout_s in (
            ('trajectory', trajectory.stamp_ns, bounds.trajectory_timeout_s),
            ('odometry', ego.stamp_ns, bounds.odometry_timeout_s),
        ):
            if now_ns - stamp_ns > timeout_s * 1e9:
                return f'{name}_timeout'
            if stamp_ns - now_ns > FUTURE_TOLERANCE_S * 1e9:
                return f'{name}_from_future'
        state = (ego.x_m, ego.y_m, ego.yaw_rad, ego.speed_mps, ego.yaw_rate_radps)
        if not (np.isfinite(state).all() and np.isfinite(trajectory.poses).all()):
            return 'not_finite'
        return ''

    def _follow(self, trajectory: Trajectory, ego: EgoState, now_ns: int) -> DriveCommand:
        bounds, vehicle = self.parameters, self.vehicle
        along = arc_length(trajectory.poses)
        times_s = trajectory.times_s
        effect_s = (now_ns - trajectory.stamp_ns) * 1e-9 + bounds.latency_s
        speeds = np.gradient(along, times_s)
        effect_mps, target_mps, later_mps = np.interp(
            effect_s + np.array([0.0, bounds.preview_s, LATER_S]), times_s, speeds
        ).tolist()
        speed_mps = max(ego.speed_mps, 0.0)
        if along[-1] < STAND_M and speed_mps < 2.0 * STAND_MPS:
            self._command_ns = now_ns
            return self._hold()
        since_s = (now_ns - ego.stamp_ns) * 1e-9 + bounds.latency_s
        self._turn(self._pursue(trajectory, along, ego, since_s), now_ns)
        # Half of what separates the vehicle from the trajectory, on top of its own change.
        wanted_mps = speed_mps + (target_mps - effect_mps) + 0.5 * (effect_mps - speed_mps)
        if max(target_mps, later_mps) < STAND_MPS and wanted_mps < 3.0 * STAND_MPS:
            wanted_mps = 0.0
        accel = (max(wanted_mps, 0.0) - speed_mps) / bounds.preview_s
        accel = min(max(accel, -vehicle.max_decel_mps2), vehicle.max_accel_mps2)
        wanted_mps = max(speed_mps + accel * bounds.preview_s, 0.0)
        # An odometry that reads too high must not be answered by driving that fast.
        wanted_mps = min(wanted_mps, vehicle.max_speed_mps)
        curvature = math.tan(self._steering_rad) / vehicle.wheelbase_m
        yaw_rate = max(wanted_mps, speed_mps) * curvature
        return DriveCommand(
            speed_mps=wanted_mps,
            yaw_rate_radps=yaw_rate,
            accel_mps2=accel,
            steering_rad=self._steering_rad,
            braking=wanted_mps == 0.0,
            reason='following',
        )

    def _hold(self) -> DriveCommand:
        return DriveCommand(
            speed_mps=0.0,
            yaw_rate_radps=0.0,
            accel_mps2=-self.vehicle.comfort_decel_mps2,
            steering_rad=self._steering_rad,
            braking=True,
            reason='standing',
        )

    def _pursue(
        self,
        trajectory: Trajectory,
        along: np.ndarray,
        ego: EgoState,
        since_s: float,
    ) -> float:
        """The steering angle towards the path, from where the vehicle will then be."""
        bounds, vehicle = self.parameters, self.vehicle
        speed_mps = max(ego.speed_mps, 0.0)
        distance_m = speed_mps * since_s
        turn = ego.yaw_rate_radps * since_s
        x_m = ego.x_m + distance_m * math.cos(ego.yaw_rad + 0.5 * turn)
        y_m = ego.y_m + distance_m * math.sin(ego.yaw_rad + 0.5 * turn)
        yaw_rad = ego.yaw_rad + turn
        gaps = np.hypot(trajectory.poses[:, 0] - x_m, trajectory.poses[:, 1] - y_m)
        nearest_m = float(along[int(np.argmin(gaps))])
        reach_m = max(bounds.min_lookahead_m, bounds.lookahead_s * speed_mps)
        target = self._point(trajectory, along, nearest_m + reach_m)
        dx, dy = target[0] - x_m, target[1] - y_m
        left_m = -math.sin(yaw_rad) * dx + math.cos(yaw_rad) * dy
        curvature = 2.0 * left_m / max(dx * dx + dy * dy, 1.0)
        limit = vehicle.max_lateral_accel_mps2 / max(speed_mps * speed_mps, 1e-6)
        curvature = min(max(curvature, -limit), limit)
        return math.atan(vehicle.wheelbase_m * curvature)

    def _point(
        self, trajectory: Trajectory, along: np.ndarray, at_m: float
    ) -> tuple[float, float]:
        beyond_m = at_m - float(along[-1])
        if beyond_m > 0.0:
            # Past a stop the last heading leads on; a last piece of millimeters has no direction.
            x_m, y_m, yaw_rad = trajectory.poses[-1].tolist()
            return x_m + beyond_m * math.cos(yaw_rad), y_m + beyond_m * math.sin(yaw_rad)
        x_m, y_m = sample_polyline(trajectory.poses[:, :2], np.array([at_m]))[0].tolist()
        return x_m, y_m

    def _turn(self, steering_rad: float, now_ns: int) -> None:
        """Move the steering towards a value no faster than the vehicle's wheels turn."""
        since_s = 0.1 if self._command_ns is None else (now_ns - self._command_ns) * 1e-9
        self._command_ns = now_ns
        limit = self.vehicle.max_steering_rad
        change = self.vehicle.max_steering_rate_radps * min(max(since_s, 0.0), 0.2)
        steering_rad = min(max(steering_rad, -limit), limit)
        self._steering_rad = min(
            max(steering_rad, self._steering_rad - change), self._steering_rad + change
        )
