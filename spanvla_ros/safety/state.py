"""The guardian: from plans of any quality to one trajectory that is always valid.

It holds the newest odometry, the announced route and the last accepted plan, and answers `tick`
with a trajectory whatever arrived or did not. States: STARTING until the first odometry (the only
silence), STANDBY while disabled, OK, DEGRADED (a plan is followed, with a reservation), FALLBACK
(no usable plan: stopping or holding), FAULT (the guardian cannot trust its own inputs).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from spanvla_ros.safety.checks import (
    CORRIDOR_M,
    PlanContext,
    Reason,
    Rejection,
    check_motion,
    check_plan,
    knots,
    route_offsets,
)
from spanvla_ros.safety.clock import ClockWatch
from spanvla_ros.safety.fallback import comfortable_stop, follow_plan, hard_stop, usable
from spanvla_ros.safety.rollout import Motion, Path, Profile, reference
from spanvla_ros.types import EgoState, Plan, PlanError, Route, Trajectory, Vehicle

STARTING = 'STARTING'
STANDBY = 'STANDBY'
OK = 'OK'
DEGRADED = 'DEGRADED'
FALLBACK = 'FALLBACK'
FAULT = 'FAULT'
STATES = (STARTING, STANDBY, OK, DEGRADED, FALLBACK, FAULT)

MAX_COORDINATE_M = 1e7
MAX_SPEED_MPS = 100.0
MAX_YAW_RAD = 1e3
ROUTE_SPAN_M = 300.0


@dataclass(frozen=True)
class GuardianParameters:
    """Bounds on age; the vehicle's own bounds are in its file.

    `plan_max_age_s` is how long after its image a plan is followed at all, `plan_fresh_s` how
    long without reservation.
    """

    frame_id: str = 'odom'
    plan_fresh_s: float = 0.35
    plan_max_age_s: float = 1.0
    odometry_timeout_s: float = 0.3
    clock_gap_s: float = 2.0


@dataclass(frozen=True)
class GuardianOutput:
    """What is published: a trajectory of 51 points 0.1 s apart and how it came about.

    Ages are against the time of the tick, None where there is no plan in use. `driver` is that of
    the plan in use.
    """

    trajectory: Trajectory
    speeds_mps: Float64[np.ndarray, 't']
    accels_mps2: Float64[np.ndarray, 't']
    yaw_rates_radps: Float64[np.ndarray, 't']
    state: str
    reasons: tuple[str, ...]
    odometry_age_s: float
    plan_id: int | None = None
    plan_age_s: float | None = None
    image_age_s: float | None = None
    kv_age_s: float | None = None
    driver: str = ''


@dataclass(frozen=True)
class Counts:
    """How often each thing happened since the start."""

    accepted: int
    refused: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _PlanInUse:
    plan: Plan
    received_ns: int
    path: Path
    profile: Profile


class Guardian:
    """One vehicle's safety kernel; not thread-safe, call it from one thread or under a lock."""

    def __init__(self, vehicle: Vehicle, parameters: GuardianParameters | None = None) -> None:
        """Start silent: no odometry, no route, no plan, enabled."""
        self.vehicle = vehicle
        self.parameters = parameters or GuardianParameters()
        self._clock = ClockWatch(self.parameters.clock_gap_s)
        self._enabled = True
        self._ego: EgoState | None = None
        self._route: Route | None = None
        self._route_fault = 'route_missing'
        self._plan: _PlanInUse | None = None
        self._path: Path | None = None
        self._rejection = ''
        self._distrust = ''
        self._accepted = 0
        self._refused: Counter[str] = Counter()

    @property
    def counts(self) -> Counts:
        """Accepted plans, and refusals of every input by `input:reason`."""
        return Counts(self._accepted, tuple(sorted(self._refused.items())))

    @property
    def clock_jumps(self) -> int:
        """How often the clock has jumped."""
        return self._clock.jumps

    @property
    def ego(self) -> EgoState | None:
        """The newest odometry accepted."""
        return self._ego

    @property
    def plan(self) -> Plan | None:
        """The plan in use."""
        return None if self._plan is None else self._plan.plan

    def set_enabled(self, enabled: bool) -> None:  # noqa: FBT001 (the service's own argument)
        """Follow plans, or stand by: stop gently and hold."""
        self._enabled = enabled

    def reset(self) -> None:
        """Forget plan, path and complaints; odometry and route stay, so output goes on."""
        self._plan = None
        self._path = None
        self._rejection = ''
        self._distrust = ''

    def refuse(self, source: str, reason: str) -> None:
        """Count an input that was unreadable before it reached the guardian."""
        self._refused[f'{source}:{reason}'] += 1
        if source == 'route':
            self._route = None
            self._route_fault = f'route_{reason}'

    def on_ego(self, ego: EgoState, now_ns: int) -> str | None:
        """Take newer odometry; the reason where it is refused."""
        self._watch(now_ns)
        reason = self._ego_fault(ego, now_ns)
        if reason is not None:
            self.refuse('odometry', reason)
            return reason
        if self._ego is not None and self._jumped(self._ego, ego):
            # The odometry frame is continuous by definition; after a jump no plan in it holds.
            self.refuse('odometry', 'jump')
            self.reset()
        self._ego = ego
        self._distrust = ''
        return None

    def _ego_fault(self, ego: EgoState, now_ns: int) -> str | None:
        motion = (ego.speed_mps, ego.accel_mps2, ego.yaw_rate_radps, ego.steering_rad)
        if not all(math.isfinite(value) for value in (*motion, ego.x_m, ego.y_m, ego.yaw_rad)):
            return 'not_finite'
        if max(abs(ego.x_m), abs(ego.y_m)) > MAX_COORDINATE_M or abs(ego.yaw_rad) > MAX_YAW_RAD:
            return 'implausible_pose'
        if max(abs(value) for value in motion) > MAX_SPEED_MPS:
            return 'implausible_motion'
        if ego.stamp_ns > now_ns + 100_000_000:
            return 'from_future'
        behind_ns = 0 if self._ego is None else self._ego.stamp_ns - ego.stamp_ns
        if behind_ns > 0:
            # Packets overtake one another by milliseconds; by a second only clocks run back.
            return 'out_of_order' if behind_ns < 1_000_000_000 else 'clock_backwards'
        return None

    @staticmethod
    def _jumped(last: EgoState, ego: EgoState) -> bool:
        since_s = (ego.stamp_ns - last.stamp_ns) * 1e-9
        fastest_mps = max(abs(last.speed_mps), abs(ego.speed_mps)) + 5.0
        return math.hypot(ego.x_m - last.x_m, ego.y_m - last.y_m) > 2.0 + fastest_mps * since_s

    def on_route(self, route: Route) -> str | None:
        """Take the announced path; a bad one leaves none, and its reason is returned."""
        reason = self._route_reason(route)
        if reason is not None:
            self.refuse('route', reason)
            return reason
        self._route, self._route_fault = route, ''
        return None

    def _route_reason(self, route: Route) -> str | None:
        if route.frame_id != self.parameters.frame_id:
            return 'frame'
        if len(route.points) == 0:
            return 'empty'
        if not np.isfinite(route.points).all() or np.abs(route.points).max() > MAX_COORDINATE_M:
            return 'not_finite'
        if len(route.points) < 2 or np.hypot(*np.diff(route.points, axis=0).T).min() < 1e-3:
            return 'repeated_points'
        return None

    def on_plan_text(self, text: str, now_ns: int) -> Rejection | None:
        """Parse and judge a plan; accepted it comes into use, else the refusal is returned."""
        self._watch(now_ns)
        try:
            plan = Plan.from_json(text)
        except PlanError as error:
            return self._refuse_plan(Rejection(Reason.SCHEMA, str(error)[:200]))
        ego = self._ego
        if ego is None:
            return self._refuse_plan(Rejection(Reason.NO_ODOMETRY, 'no odometry yet'))
        in_use = self._plan_within_age(now_ns)
        route, _ = self._route_now(ego)
        context = PlanContext(
            now_ns,
            ego,
            self.parameters.frame_id,
            self.vehicle,
            self.parameters.plan_max_age_s,
            route,
            None if in_use is None else in_use.plan,
        )
        rejection = check_plan(plan, context)
        if rejection is not None:
            return self._refuse_plan(rejection)
        times_s, poses = knots(plan)
        path, profile = reference(plan.trajectory.stamp_ns, times_s, poses, ego.speed_mps)
        self._plan = _PlanInUse(plan, now_ns, path, profile)
        self._path = path
        self._rejection = ''
        self._accepted += 1
        return None

    def _refuse_plan(self, rejection: Rejection) -> Rejection:
        self._rejection = f'rejected:{rejection.reason.value}'
        self.refuse('plan', rejection.reason.value)
        return rejection

    def _watch(self, now_ns: int) -> None:
        jump = self._clock.observe(now_ns)
        if jump is None:
            return
        self.refuse('clock', jump)
        self.reset()
        if self._ego is not None:
            # Its place still holds, its time no longer means anything.
            self._ego = replace(self._ego, stamp_ns=now_ns)
            self._distrust = jump

    def _plan_within_age(self, now_ns: int) -> _PlanInUse | None:
        if self._plan is None:
            return None
        age_ns = now_ns - self._plan.plan.trajectory.stamp_ns
        return self._plan if age_ns <= self.parameters.plan_max_age_s * 1e9 else None

    def _route_now(self, ego: EgoState) -> tuple[Float64[np.ndarray, 'n 2'] | None, str]:
        """The route near the ego if plans can be held to it, else why they cannot."""
        if self._route is None:
            return None, self._route_fault
        points = self._route.points
        gaps_m = np.hypot(points[:, 0] - ego.x_m, points[:, 1] - ego.y_m)
        nearest = int(np.argmin(gaps_m))
        near = np.flatnonzero(gaps_m < ROUTE_SPAN_M)
        if len(near):
            points = points[max(near[0] - 1, 0) : near[-1] + 2]
        ahead = (self._route.points - ego.pose[:2]) @ np.array(
            [math.cos(ego.yaw_rad), math.sin(ego.yaw_rad)]
        )
        if nearest == len(gaps_m) - 1 and (ahead < -2.0).all():
            return None, 'route_behind'
        if abs(route_offsets(points, ego.pose[None, :2])[0]) > CORRIDOR_M:
            return None, 'off_route'
        return points, ''

    def tick(self, now_ns: int) -> GuardianOutput | None:
        """The trajectory to publish now; None only before the first odometry."""
        self._watch(now_ns)
        ego = self._ego
        if ego is None:
            return None
        motion, state, reasons = self._choose(ego, now_ns)
        rejection = check_motion(motion, ego, self.vehicle)
        if rejection is not None:
            # Not reachable by any input known; what stands behind a proof is a plain brake.
            self.refuse('output', rejection.reason.value)
            motion = hard_stop(replace(ego, yaw_rate_radps=0.0, steering_rad=0.0), *self._bounds)
            state, reasons = FAULT, (f'output:{rejection.reason.value}', 'hard_stop')
        if motion.stands:
            reasons = (*reasons, 'standing')
        in_use = self._plan_within_age(now_ns)
        output = GuardianOutput(
            motion.trajectory,
            motion.speeds_mps,
            motion.accels_mps2,
            motion.yaw_rates_radps,
            state,
            reasons,
            _age_s(now_ns, ego.stamp_ns),
        )
        if in_use is None:
            return output
        return replace(
            output,
            plan_id=in_use.plan.plan_id,
            plan_age_s=_age_s(now_ns, in_use.received_ns),
            image_age_s=_age_s(now_ns, in_use.plan.trajectory.stamp_ns),
            kv_age_s=_age_s(now_ns, in_use.plan.kv_stamp_ns),
            driver=in_use.plan.driver,
        )

    @property
    def _bounds(self) -> tuple[str, Vehicle]:
        return self.parameters.frame_id, self.vehicle

    def _choose(self, ego: EgoState, now_ns: int) -> tuple[Motion, str, tuple[str, ...]]:
        path = self._path if usable(self._path, ego) else None
        if self._distrust:
            return hard_stop(ego, *self._bounds, path), FAULT, (self._distrust, 'hard_stop')
        if now_ns - ego.stamp_ns > self.parameters.odometry_timeout_s * 1e9:
            return hard_stop(ego, *self._bounds, path), FAULT, ('odometry_stale', 'hard_stop')
        if not self._enabled:
            motion, stop = self._stop(ego, path)
            return motion, STANDBY, ('disabled', stop)
        in_use = self._plan_within_age(now_ns)
        if in_use is None or path is None:
            motion, stop = self._stop(ego, path)
            return motion, FALLBACK, (self._why_no_plan(in_use), stop)
        motion = follow_plan(ego, *self._bounds, in_use.path, in_use.profile)
        reasons = self._reservations(in_use, ego, now_ns)
        return motion, DEGRADED if reasons else OK, reasons

    def _why_no_plan(self, in_use: _PlanInUse | None) -> str:
        if in_use is not None:
            return 'off_path'
        return self._rejection or ('no_plan' if self._plan is None else 'plan_too_old')

    def _stop(self, ego: EgoState, path: Path | None) -> tuple[Motion, str]:
        if path is None:
            return hard_stop(ego, *self._bounds), 'hard_stop'
        return comfortable_stop(ego, *self._bounds, path), 'comfortable_stop'

    def _reservations(self, in_use: _PlanInUse, ego: EgoState, now_ns: int) -> tuple[str, ...]:
        age_ns = now_ns - in_use.plan.trajectory.stamp_ns
        _, route_fault = self._route_now(ego)
        candidates = (
            'plan_old' if age_ns > self.parameters.plan_fresh_s * 1e9 else '',
            self._rejection,
            route_fault,
            *(reason[:80] for reason in in_use.plan.degraded[:16]),
        )
        return tuple(dict.fromkeys(reason for reason in candidates if reason))


def _age_s(now_ns: int, stamp_ns: int) -> float:
    """Time since a stamp; one that lies ahead within the tolerances has no age yet."""
    return max(now_ns - stamp_ns, 0) * 1e-9


def load_vehicle(path: str) -> Vehicle:
    """The vehicle of a file, or the default one where `path` is empty.

    Raises:
        SpanvlaError: the file is absent or not a vehicle file.
    """
    return Vehicle.load(path) if path else Vehicle()
