"""Observations: pictures, ego states and route aligned in time to the anchor picture.

Planner node, replay and lockstep feed the same `ObservationBuilder`, so that a recorded drive and
a live one give the model the same numbers. Whatever is missing is masked or extrapolated and
named in `Observation.degraded`; only a plan without picture or ego pose is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64

from spanvla_ros.geometry import (
    arc_length,
    local_from_world,
    project_on_polyline,
    sample_polyline,
)
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import arc
from spanvla_ros.types import (
    COMMANDS,
    MISSING_CAMERA,
    CameraFrame,
    EgoState,
    Observation,
    Plan,
    Route,
    SpanvlaError,
)

IMAGE_TOLERANCE_S = 0.05
EGO_GAP_S = 0.3
EGO_EXTRAPOLATE_S = 0.2
EGO_LATE_S = 0.05
JUMP_SLACK_M = 0.5
JUMP_SPEED_FACTOR = 1.5
CLOCK_BACK_S = 0.5
ACCEL_WINDOW_S = 0.2
MAX_ACCEL_MPS2 = 8.0
EGO_KEEP_S = 1.0
FRAME_KEEP_S = 0.3
ROUTE_FAR_M = 30.0
ROUTE_END_M = 2.0
ROUTE_AGAINST_RAD = 2.3
ROUTE_HEADING_M = 2.0
ROUTE_BACK_WINDOW_M = 10.0
ROUTE_AHEAD_WINDOW_M = 60.0
COMMAND_TURN_RAD = 0.7
COMMAND_AHEAD_POINTS = 3
NS = 1_000_000_000


class ObservationBuilder:
    """Buffers of recent inputs, and the observation of any anchor stamp in them.

    `add_frame`, `add_ego` and `set_route` return `''`, or a short reason why the input was not
    taken. A clock that runs back by more than half a second empties the buffers and is counted in
    `resets`.
    """

    def __init__(
        self,
        config: ModelConfig,
        image_tolerance_s: float = IMAGE_TOLERANCE_S,
        *,
        missing_camera: str = 'mask',
        last_valid_max_age_s: float = FRAME_KEEP_S,
    ) -> None:
        """Start empty.

        Args:
            config: of the model.
            image_tolerance_s: how far a picture's stamp may be off the one asked for.
            missing_camera: what stands for a camera without a picture: `mask` leaves it out,
                `last_valid` takes its last one, `drop` refuses the observation.
            last_valid_max_age_s: how old that last one may be, before it is masked after all.
        """
        if missing_camera not in MISSING_CAMERA:
            raise SpanvlaError(
                f'missing_camera {missing_camera!r}: use one of {", ".join(MISSING_CAMERA)}'
            )
        self._config = config
        self._missing_camera = missing_camera
        self._last_valid_ns = round(last_valid_max_age_s * NS)
        self._tolerance_ns = round(image_tolerance_s * NS)
        span_s = (config.frames_per_camera - 1) * config.frame_lag_s
        self._frame_keep_ns = round((span_s + max(FRAME_KEEP_S, last_valid_max_age_s)) * NS)
        self._ego_keep_ns = round((config.history_s + EGO_KEEP_S) * NS)
        self._lags_ns = tuple(
            round((config.frames_per_camera - 1 - k) * config.frame_lag_s * NS)
            for k in range(config.frames_per_camera)
        )
        self._history_ns = tuple(round(t * NS) for t in config.history_times_s.tolist())
        route_at_m = config.route_step_m * np.arange(1.0, config.route_points + 1.0)
        self._sample_at_m = np.concatenate([[0.0, ROUTE_HEADING_M], route_at_m])
        self._route: Route | None = None
        self._along = np.zeros(1)
        self._command: str | None = None
        self.resets = 0
        self.refusal = ''
        self.reset()

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The model's cameras; the pictures of the first anchor the observations."""
        return self._config.camera_names

    def reset(self) -> None:
        """Forget pictures and ego states; the announced route and command stay."""
        self._frames: dict[str, list[CameraFrame]] = {n: [] for n in self._config.camera_names}
        self._egos: list[EgoState] = []
        self._ego_stamps: list[int] = []
        self._jump_stamp_ns: int | None = None
        self._progress_m: float | None = None

    def clock_jumped(self) -> None:
        """Empty the buffers, as stamps before and after have nothing to do with one another."""
        self.resets += 1
        self.reset()

    def add_frame(self, frame: CameraFrame) -> str:
        """Take one picture; pictures of cameras the model does not have are refused."""
        frames = self._frames.get(frame.camera)
        if frames is None:
            return 'camera_unknown'
        if frames and frame.stamp_ns <= frames[-1].stamp_ns:
            if frames[-1].stamp_ns - frame.stamp_ns <= CLOCK_BACK_S * NS:
                return 'image_out_of_order'
            self.clock_jumped()
            frames = self._frames[frame.camera]
        frames.append(frame)
        oldest_ns = frame.stamp_ns - self._frame_keep_ns
        while len(frames) > 1 and frames[0].stamp_ns < oldest_ns:
            frames.pop(0)
        return ''

    def add_ego(self, ego: EgoState) -> str:
        """Take one ego state; the first after a jump of the odometry starts a new history."""
        if not all(map(math.isfinite, (ego.x_m, ego.y_m, ego.yaw_rad, ego.speed_mps))):
            return 'ego_not_finite'
        if not (math.isfinite(ego.accel_mps2) and math.isfinite(ego.yaw_rate_radps)):
            return 'ego_not_finite'
        if self._egos:
            last = self._egos[-1]
            if ego.stamp_ns <= last.stamp_ns:
                if last.stamp_ns - ego.stamp_ns <= CLOCK_BACK_S * NS:
                    return 'ego_out_of_order'
                self.clock_jumped()
            elif _jumped(last, ego):
                self._egos.clear()
                self._ego_stamps.clear()
                self._jump_stamp_ns = ego.stamp_ns
                self._progress_m = None
        self._egos.append(ego)
        self._ego_stamps.append(ego.stamp_ns)
        old = bisect_left(self._ego_stamps, ego.stamp_ns - self._ego_keep_ns)
        if old > 32:
            del self._egos[:old], self._ego_stamps[:old]
        return ''

    def set_route(self, route: Route | None) -> str:
        """Take an announced route, points in the odometry frame; None takes it away."""
        if route is not None and not np.isfinite(route.points).all():
            return 'route_not_finite'
        known = None if self._route is None else self._route.points
        if route is None or known is None or not np.array_equal(route.points, known):
            self._progress_m = None
        self._route = route
        long_enough = route is not None and len(route.points) > 1
        self._along = arc_length(route.points) if route and long_enough else np.zeros(1)
        return ''

    def set_command(self, command: str | None) -> None:
        """Set the navigation command; None infers it from the route again."""
        if command is not None and command not in COMMANDS:
            raise SpanvlaError(f'command {command!r} is not known; use {", ".join(COMMANDS)}')
        self._command = command

    def build(self, anchor_stamp_ns: int) -> Observation | None:
        """The observation at an anchor picture's stamp; None leaves the reason in `refusal`."""
        degraded: list[str] = []
        frames = self._aligned_frames(anchor_stamp_ns, degraded)
        if frames[0][-1] is None:
            self.refusal = 'anchor_image_missing'
            return None
        if self._missing_camera == 'drop' and degraded:
            self.refusal = degraded[0]
            return None
        ego = self._ego_at(anchor_stamp_ns, degraded)
        if ego is None:
            self.refusal = 'ego_stale' if self._egos else 'ego_missing'
            return None
        history, valid = self._history(ego, degraded)
        route = self._local_route(ego, degraded)
        self.refusal = ''
        return Observation(
            stamp_ns=anchor_stamp_ns,
            frames=frames,
            ego=ego,
            history=history,
            history_valid=valid,
            route=route,
            command=self._current_command(route),
            degraded=tuple(degraded),
        )

    def _aligned_frames(
        self, anchor_ns: int, degraded: list[str]
    ) -> tuple[tuple[CameraFrame | None, ...], ...]:
        aligned = []
        for name, frames in self._frames.items():
            row = tuple(self._nearest(frames, anchor_ns - lag_ns) for lag_ns in self._lags_ns)
            late = self._last_valid(frames, anchor_ns) if row[-1] is None else None
            if late is not None:
                row = (*row[:-1], late)
                degraded.append(f'camera_late:{name}')
            elif row[-1] is None:
                degraded.append(f'camera_missing:{name}')
            elif None in row:
                degraded.append(f'frames_short:{name}')
            aligned.append(row)
        return tuple(aligned)

    def _last_valid(self, frames: list[CameraFrame], anchor_ns: int) -> CameraFrame | None:
        """The newest picture from before the anchor's that may stand in for a missing one."""
        if self._missing_camera != 'last_valid' or frames is self._frames[self.camera_names[0]]:
            return None
        oldest_ns = anchor_ns - self._last_valid_ns
        fitting = (f for f in reversed(frames) if oldest_ns <= f.stamp_ns <= anchor_ns)
        return next(fitting, None)

    def _nearest(self, frames: list[CameraFrame], stamp_ns: int) -> CameraFrame | None:
        best: CameraFrame | None = None
        best_ns = self._tolerance_ns + 1
        for frame in reversed(frames):
            off_ns = abs(frame.stamp_ns - stamp_ns)
            if off_ns < best_ns:
                best, best_ns = frame, off_ns
            elif frame.stamp_ns < stamp_ns:
                break
        return best

    def _ego_at(self, stamp_ns: int, degraded: list[str]) -> EgoState | None:
        if not self._egos:
            return None
        first, last = self._egos[0], self._egos[-1]
        late_s = (stamp_ns - last.stamp_ns) / NS
        if late_s > EGO_EXTRAPOLATE_S or (first.stamp_ns - stamp_ns) / NS > EGO_EXTRAPOLATE_S:
            return None
        if late_s > 0:
            if late_s > EGO_LATE_S:
                degraded.append('ego_extrapolated')
            ego = _moved_on(last, late_s)
        elif stamp_ns <= first.stamp_ns:
            ego = _moved_on(first, (stamp_ns - first.stamp_ns) / NS)
        else:
            after = bisect_left(self._ego_stamps, stamp_ns)
            before, behind = self._egos[after - 1], self._egos[after]
            if behind.stamp_ns - before.stamp_ns > EGO_GAP_S * NS:
                degraded.append('ego_gap')
            ego = _between(before, behind, stamp_ns)
        if ego.accel_mps2 == 0.0:
            ego = replace(ego, accel_mps2=self._derived_accel(ego))
        return ego

    def _derived_accel(self, ego: EgoState) -> float:
        """Odometry carries no acceleration: the change of its speed over the last 0.2 s."""
        index = bisect_right(self._ego_stamps, ego.stamp_ns - round(ACCEL_WINDOW_S * NS)) - 1
        past = self._egos[max(index, 0)]
        span_s = (ego.stamp_ns - past.stamp_ns) / NS
        if not 0.5 * ACCEL_WINDOW_S <= span_s <= 2.0 * ACCEL_WINDOW_S:
            return 0.0
        accel = (ego.speed_mps - past.speed_mps) / span_s
        return min(max(accel, -MAX_ACCEL_MPS2), MAX_ACCEL_MPS2)

    def _history(
        self, ego: EgoState, degraded: list[str]
    ) -> tuple[Float64[np.ndarray, 'h 3'], Bool[np.ndarray, 'h']]:
        curvature = ego.yaw_rate_radps / max(abs(ego.speed_mps), 1.0)
        local = arc(ego.speed_mps, curvature, self._config.history_times_s)
        valid = np.zeros(len(local), dtype=np.bool_)
        stamps = self._ego_stamps
        past_poses, rows, reasons = [], [], set()
        for row, offset_ns in enumerate(self._history_ns):
            at_ns = ego.stamp_ns + offset_ns
            after = bisect_left(stamps, at_ns)
            if at_ns < stamps[0] or after == len(stamps):
                jumped = self._jump_stamp_ns is not None and at_ns < self._jump_stamp_ns
                reasons.add('odometry_jump' if jumped else 'history_short')
                continue
            past = self._egos[after]
            if stamps[after] != at_ns:
                if stamps[after] - stamps[after - 1] > EGO_GAP_S * NS:
                    reasons.add('history_gap')
                    continue
                past = _between(self._egos[after - 1], past, at_ns)
            past_poses.append((past.x_m, past.y_m, past.yaw_rad))
            rows.append(row)
        if rows:
            local[rows] = local_from_world(ego.pose, past_poses)
            valid[rows] = True
        degraded.extend(sorted(reasons))
        return local, valid

    def _local_route(
        self, ego: EgoState, degraded: list[str]
    ) -> Float64[np.ndarray, 'r 2'] | None:
        if self._route is None:
            degraded.append('route_missing')
            return None
        points, along = self._route.points, self._along
        if along[-1] < 1e-3:
            degraded.append('route_empty')
            return None
        start_m, offset_m = self._project(points, along, ego)
        left_m = float(along[-1]) - start_m
        ahead = sample_polyline(points, start_m + self._sample_at_m)
        (x0, y0), (x1, y1) = ahead[:2].tolist()
        off_rad = math.remainder(math.atan2(y1 - y0, x1 - x0) - ego.yaw_rad, 2.0 * math.pi)
        if left_m < ROUTE_END_M or abs(off_rad) > ROUTE_AGAINST_RAD:
            degraded.append('route_behind')
            return None
        if abs(offset_m) > ROUTE_FAR_M:
            degraded.append('route_far')
            return None
        if left_m < self._sample_at_m[-1]:
            degraded.append('route_short')
        self._progress_m = start_m
        return local_from_world(ego.pose, ahead[2:])

    def _project(
        self, points: Float64[np.ndarray, 'n 2'], along: Float64[np.ndarray, 'n'], ego: EgoState
    ) -> tuple[float, float]:
        """Arc length and offset of the ego on the route, near the last progress if there is one.

        A route that crosses itself has two nearest places; the one reached next is meant.
        """
        query = np.array([[ego.x_m, ego.y_m]])
        if self._progress_m is not None:
            low = int(np.searchsorted(along, self._progress_m - ROUTE_BACK_WINDOW_M)) - 1
            high = int(np.searchsorted(along, self._progress_m + ROUTE_AHEAD_WINDOW_M)) + 1
            low = max(low, 0)
            window = points[low:high]
            if len(window) > 1 and along[min(high, len(along)) - 1] > along[low]:
                start, offset = project_on_polyline(window, query)
                if abs(offset[0]) < ROUTE_FAR_M:
                    return float(along[low] + start[0]), float(offset[0])
        start, offset = project_on_polyline(points, query)
        return float(start[0]), float(offset[0])

    def _current_command(self, route: Float64[np.ndarray, 'r 2'] | None) -> str:
        if self._command is not None:
            return self._command
        if self._route is not None and self._route.command != 'follow':
            return self._route.command
        return 'follow' if route is None else command_from_route(route)


def command_from_route(route: Float64[np.ndarray, 'r 2']) -> str:
    """`left` or `right` where the next route points in `base_link` turn by over 40 degrees."""
    points = np.concatenate([np.zeros((1, 2)), route[:COMMAND_AHEAD_POINTS]])
    step = np.diff(points, axis=0)
    yaw = np.unwrap(np.concatenate([[0.0], np.arctan2(step[:, 1], step[:, 0])]))
    turn = float(yaw[np.argmax(np.abs(yaw))])
    if abs(turn) < COMMAND_TURN_RAD:
        return 'follow'
    return 'left' if turn > 0 else 'right'


def observation_of(plan: Plan, frames: tuple[tuple[CameraFrame | None, ...], ...]) -> Observation:
    """The observation a plan was made from, out of its record and its pictures.

    Args:
        plan: a plan of the model.
        frames: pictures in model order with the stamps of `plan.image_stamps_ns`.
    """
    stamps = tuple(None if f is None else f.stamp_ns for camera in frames for f in camera)
    if stamps != plan.image_stamps_ns:
        raise SpanvlaError(
            f'plan {plan.plan_id}: needs pictures of {plan.image_stamps_ns}, got {stamps}'
        )
    x, y, yaw = plan.origin
    stamp_ns = plan.trajectory.stamp_ns
    return Observation(
        stamp_ns=stamp_ns,
        frames=frames,
        ego=EgoState(stamp_ns, x, y, yaw, plan.speed_mps, plan.accel_mps2, plan.yaw_rate_radps),
        history=np.array(plan.history, dtype=np.float64).reshape(-1, 3),
        history_valid=np.array(plan.history_valid, dtype=np.bool_),
        route=None if plan.route is None else np.array(plan.route, dtype=np.float64),
        command=plan.command,
        reasoning=plan.reasoning,
        reasoning_stamp_ns=plan.reasoning_stamp_ns,
        degraded=plan.degraded,
    )


def _jumped(before: EgoState, after: EgoState) -> bool:
    seconds = (after.stamp_ns - before.stamp_ns) / NS
    distance_m = math.hypot(after.x_m - before.x_m, after.y_m - before.y_m)
    speed = max(abs(before.speed_mps), abs(after.speed_mps))
    return distance_m > JUMP_SPEED_FACTOR * speed * seconds + JUMP_SLACK_M


def _between(before: EgoState, after: EgoState, stamp_ns: int) -> EgoState:
    share = (stamp_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
    turn = math.remainder(after.yaw_rad - before.yaw_rad, 2.0 * math.pi)

    def mixed(a: float, b: float) -> float:
        return a + share * (b - a)

    return EgoState(
        stamp_ns,
        mixed(before.x_m, after.x_m),
        mixed(before.y_m, after.y_m),
        math.remainder(before.yaw_rad + share * turn, 2.0 * math.pi),
        mixed(before.speed_mps, after.speed_mps),
        mixed(before.accel_mps2, after.accel_mps2),
        mixed(before.yaw_rate_radps, after.yaw_rate_radps),
        mixed(before.steering_rad, after.steering_rad),
    )


def _moved_on(ego: EgoState, seconds: float) -> EgoState:
    """The ego state some time later (or earlier) at unchanged speed and yaw rate."""
    turn = ego.yaw_rate_radps * seconds
    yaw = ego.yaw_rad + 0.5 * turn
    distance = ego.speed_mps * seconds
    return replace(
        ego,
        stamp_ns=ego.stamp_ns + round(seconds * NS),
        x_m=ego.x_m + distance * math.cos(yaw),
        y_m=ego.y_m + distance * math.sin(yaw),
        yaw_rad=math.remainder(ego.yaw_rad + turn, 2.0 * math.pi),
    )
