"""`summary.json` of a drive, computed from its recording and from nothing else.

Times of arrival are those at the recorder, on the clock that also stamps the messages. The drive
is measured from the arrival of its first plan to that of the last odometry: before lies loading,
after it the town is gone and the car has nothing to follow.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from spanvla_ros import __version__
from spanvla_ros.geometry import arc_length, box_corners, sample_polyline, world_from_local
from spanvla_ros.report.recording import OutputRecord, Recording, SceneRecord, read_recording
from spanvla_ros.report.shadow import disagreement
from spanvla_ros.report.validator import boxes_overlap, distance_to_line, faults_of, inside
from spanvla_ros.types import SpanvlaError, Vehicle

FRESH_PERIODS = 1.5
FOLLOWING = ('OK', 'DEGRADED')
SEAM_M = 0.05
PROGRESS_STEP_M = 0.5
PROGRESS_AHEAD_M = 40.0
PROGRESS_BEHIND_M = 5.0
VERSIONED = ('numpy', 'onnxruntime', 'opencv-python-headless', 'ros-rclpy', 'torch')


@dataclass(frozen=True)
class Window:
    """The part of a recording that is measured, by time of arrival."""

    from_ns: int
    to_ns: int

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return (self.to_ns - self.from_ns) * 1e-9

    def holds(self, received_ns: int) -> bool:
        """Whether something that arrived then belongs to the drive."""
        return self.from_ns <= received_ns <= self.to_ns


def summarise(
    path: str | Path, vehicle: Vehicle | None = None, namespace: str = '/spanvla'
) -> dict[str, Any]:
    """The content of `summary.json`; `cpu_share` and `steal_share` are for the caller to fill.

    Raises:
        SpanvlaError: the file is no recording of a drive.
    """
    return summary_of(read_recording(path, namespace), vehicle or Vehicle())


def summary_of(recording: Recording, vehicle: Vehicle) -> dict[str, Any]:
    """The same for a recording that was read already."""
    window = window_of(recording)
    plans = [plan for plan in recording.plans if window.holds(plan.received_ns)]
    outputs = [output for output in recording.outputs if window.holds(output.received_ns)]
    columns = list(zip(*(plan.image_stamps_ns for plan in plans), strict=False))
    # A camera that is never there is never encoded and says nothing about the rate.
    seen = [len({stamp for stamp in column if stamp is not None}) for column in columns]
    seen = [count for count in seen if count]
    fresh, output_ages_ms = _freshness(recording, outputs)
    faults = _faults(recording, outputs, vehicle)
    stages: dict[str, list[float]] = {}
    for plan in plans:
        for name, value in plan.stage_ms:
            stages.setdefault(name.removesuffix('_ms'), []).append(value)
    judged = [plan.agreement for plan in plans if plan.agreement is not None]
    return {
        'seconds': round(window.seconds, 3),
        'scenario': recording.labels.get('scenario'),
        'seed': recording.labels.get('seed'),
        'driver': _named(plan.driver for plan in plans),
        'backend': _named(plan.backend for plan in plans),
        'schedule': _named(plan.schedule for plan in plans),
        'steps': _named(str(plan.steps) for plan in plans),
        'model_sha256': _named(plan.model_sha256 for plan in plans),
        'camera_hz': _rounded(_rate(camera_period_s(recording))),
        'plans': len(plans),
        'plan_hz': _rounded(len({plan.stamp_ns for plan in plans}) / window.seconds),
        'vision_hz': _rounded(min(seen, default=0) / window.seconds),
        'output_hz': _rounded(len(outputs) / window.seconds),
        'fresh_share': _rounded(fresh),
        'output_gap_ms': _spread(output_gaps_ms(outputs), peak=True),
        'output_stamp_gap_ms': _spread(stamp_gaps_ms(outputs), peak=True),
        'output_silence_at_end_ms': _rounded(
            (window.to_ns - max((o.received_ns for o in outputs), default=window.from_ns)) * 1e-6
        ),
        'kv_age_ms': _spread([(p.received_ns - p.kv_stamp_ns) * 1e-6 for p in plans], peak=True),
        'output_kv_age_ms': _spread(output_ages_ms, peak=True),
        'stage_ms': {name: _spread(values) for name, values in stages.items()},
        'states': state_shares(recording, window),
        'degraded': dict(Counter(reason for plan in plans for reason in plan.degraded)),
        **_driving(recording, window, vehicle),
        'invalid_trajectories': sum(1 for found in faults if found),
        'invalid_reasons': dict(Counter(word for found in faults for word in found)),
        'reasoning': _reasoning(recording, window),
        'agreement': _rounded(sum(judged) / len(judged)) if judged else None,
        'slow_share': _share(plan.thinking == 'slow' for plan in plans),
        'shadow': _shadow(recording, window),
        'cpu_share': None,
        'steal_share': None,
        'scenario_ranges_sha256': recording.labels.get('scenario_ranges_sha256'),
        'versions': versions(),
    }


def window_of(recording: Recording) -> Window:
    """From the arrival of the first plan (else output) to that of the last odometry.

    Where the recorder found the odometry later than the plans, from its arrival on.
    """
    first = recording.plans[0].received_ns if recording.plans else recording.outputs[0].received_ns
    if not len(recording.odometry_received_ns):
        raise SpanvlaError('the recording holds no odometry, so nothing can be measured')
    first = max(first, int(recording.odometry_received_ns[0]))
    last = int(recording.odometry_received_ns[-1])
    if last <= first:
        raise SpanvlaError('the recording ends before its first plan, so nothing can be measured')
    return Window(first, last)


def camera_period_s(recording: Recording) -> float | None:
    """Median time between pictures of the fastest camera, else between planned pictures."""
    tracks = [*recording.camera_stamps_ns.values()]
    tracks = tracks or [tuple(sorted({plan.stamp_ns for plan in recording.plans}))]
    gaps = [float(np.median(np.diff(track))) * 1e-9 for track in tracks if len(track) > 2]
    return min(gaps, default=None)


def output_gaps_ms(outputs: Sequence[OutputRecord]) -> Float64[np.ndarray, 'n']:
    """Times between consecutive outputs, as they arrived."""
    return np.diff(np.array([output.received_ns for output in outputs], dtype=np.int64)) * 1e-6


def stamp_gaps_ms(outputs: Sequence[OutputRecord]) -> Float64[np.ndarray, 'n']:
    """Times between the outputs' own stamps, which a recorder that stood still cannot stretch."""
    return np.diff(np.array([output.stamp_ns for output in outputs], dtype=np.int64)) * 1e-6


def state_shares(recording: Recording, window: Window) -> dict[str, float]:
    """How much of the time each state held, as the guardian said."""
    held: dict[str, int] = {}
    states = recording.states
    for index, told in enumerate(states):
        until = states[index + 1].received_ns if index + 1 < len(states) else window.to_ns
        span = min(until, window.to_ns) - max(told.received_ns, window.from_ns)
        if span > 0:
            held[told.state] = held.get(told.state, 0) + span
    total = sum(held.values())
    return {state: round(span / total, 4) for state, span in held.items()}


def versions() -> dict[str, str]:
    """What computed and drove: this package, Python, and the libraries that matter."""
    found = {'spanvla_ros': __version__, 'python': platform.python_version()}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _freshness(
    recording: Recording, outputs: Sequence[OutputRecord]
) -> tuple[float | None, list[float]]:
    """Share of outputs on a plan of the last 1.5 camera periods, and the K/V age of each output.

    An output counts only while the guardian says that it follows a plan.
    """
    period_s = camera_period_s(recording)
    if period_s is None or not recording.plans or not outputs:
        return None, []
    arrivals = np.array([plan.received_ns for plan in recording.plans], dtype=np.int64)
    told = np.array([state.received_ns for state in recording.states], dtype=np.int64)
    fresh, ages_ms = 0, []
    for output in outputs:
        latest = int(np.searchsorted(arrivals, output.received_ns, side='right')) - 1
        if latest < 0:
            continue
        plan = recording.plans[latest]
        following = True
        if len(told):
            # The state of an output is published right after it.
            row = int(np.searchsorted(told, output.received_ns + 5_000_000, side='right')) - 1
            following = row >= 0 and recording.states[row].state in FOLLOWING
        age_s = (output.received_ns - plan.received_ns) * 1e-9
        fresh += following and age_s <= FRESH_PERIODS * period_s
        ages_ms.append((output.received_ns - plan.kv_stamp_ns) * 1e-6)
    return fresh / len(outputs), ages_ms


def _faults(
    recording: Recording, outputs: Sequence[OutputRecord], vehicle: Vehicle
) -> list[list[str]]:
    previous = None
    found = []
    for output in outputs:
        found.append(faults_of(output, previous, recording, vehicle))
        previous = output
    return found


def _driving(recording: Recording, window: Window, vehicle: Vehicle) -> dict[str, Any]:
    inside_window = [window.holds(int(at)) for at in recording.odometry_received_ns]
    track = recording.odometry[np.array(inside_window, dtype=bool)]
    steps_m = np.hypot(*np.diff(track[:, :2], axis=0).T) if len(track) > 1 else np.zeros(0)
    scenes = [scene for scene in recording.scenes if window.holds(scene.received_ns)]
    known = bool(scenes) and recording.town_map is not None
    return {
        'distance_m': _rounded(float(steps_m.sum())),
        'route_completion': _rounded(route_completion(recording.route, track[:, :2])),
        'collisions': collisions(scenes, vehicle) if scenes else None,
        'offroad_m': _rounded(_offroad_m(recording, scenes, vehicle)) if known else None,
        'red_lights_run': _red_lights_run(recording, scenes, vehicle) if known else None,
    }


def route_completion(
    route: Float64[np.ndarray, 'r 2'] | None, track: Float64[np.ndarray, 'n 2']
) -> float | None:
    """Share of the route ahead of the start that was driven; its points are taken in order."""
    if route is None or not len(track):
        return None
    length_m = float(arc_length(route)[-1])
    along = np.arange(0.0, length_m, PROGRESS_STEP_M)
    dense = sample_polyline(route, along)
    start_m = progress_m = float(along[_nearest(dense, track[0])])
    for point in track[:: max(1, len(track) // 2000)]:
        near = (along >= progress_m - PROGRESS_BEHIND_M) & (along <= progress_m + PROGRESS_AHEAD_M)
        progress_m = max(progress_m, float(along[near][_nearest(dense[near], point)]))
    ahead_m = length_m - PROGRESS_STEP_M - start_m
    return min(1.0, (progress_m - start_m) / ahead_m) if ahead_m > 0 else 1.0


def collisions(scenes: Sequence[SceneRecord], vehicle: Vehicle) -> int:
    """How many different road users or objects the vehicle's box overlapped."""
    hit = set()
    for scene in scenes:
        ego = _ego_corners(scene, vehicle)
        for agent in scene.agents:
            if agent.agent_id in hit or _far(scene, agent.pose):
                continue
            if boxes_overlap(ego, box_corners(agent.pose, agent.length_m, agent.width_m)):
                hit.add(agent.agent_id)
    return len(hit)


def _far(scene: SceneRecord, pose: tuple[float, float, float]) -> bool:
    return bool(np.hypot(pose[0] - scene.ego[0], pose[1] - scene.ego[1]) > 25.0)


def _offroad_m(recording: Recording, scenes: Sequence[SceneRecord], vehicle: Vehicle) -> float:
    total_m, before = 0.0, None
    rings = recording.town_map.drivable if recording.town_map else ()
    for scene in scenes:
        if before is not None and not all(
            _on_road(corner, rings) for corner in _ego_corners(scene, vehicle)
        ):
            total_m += float(np.hypot(scene.ego[0] - before.ego[0], scene.ego[1] - before.ego[1]))
        before = scene
    return total_m


def _on_road(point: Float64[np.ndarray, '2'], rings: Sequence[Float64[np.ndarray, '_ 2']]) -> bool:
    if any(inside(point, ring) for ring in rings):
        return True
    # Between two areas that meet, rounding leaves a crack.
    closed = (np.concatenate([ring, ring[:1]]) for ring in rings)
    return any(distance_to_line(point, ring) <= SEAM_M for ring in closed)


def _red_lights_run(recording: Recording, scenes: Sequence[SceneRecord], vehicle: Vehicle) -> int:
    """How often the front bumper entered a lane of the route while that lane was red."""
    lanes = recording.town_map.lanes if recording.town_map else {}
    reach_m = vehicle.rear_axle_to_center_m + 0.5 * vehicle.length_m
    run, before = 0, None
    for scene in scenes:
        front = world_from_local(scene.ego, np.array([[reach_m, 0.0]]))[0]
        for lane_id in scene.red_lanes:
            block, ring = lanes.get(lane_id, ('', None))
            if ring is None or block not in scene.route or before is None:
                continue
            run += inside(front, ring) and not inside(before, ring)
        before = front
    return run


def _ego_corners(scene: SceneRecord, vehicle: Vehicle) -> Float64[np.ndarray, '4 2']:
    middle = world_from_local(scene.ego, np.array([[vehicle.rear_axle_to_center_m, 0.0, 0.0]]))[0]
    return box_corners(middle, vehicle.length_m, vehicle.width_m)


def _shadow(recording: Recording, window: Window) -> dict[str, Any] | None:
    """What a planner that nobody followed would have done otherwise."""
    found = disagreement(recording, window.from_ns, window.to_ns)
    if found is None:
        return None
    return {
        'plans': found.plans,
        'compared': len(found.mean_m),
        'mean_m': _spread(found.mean_m, peak=True),
        'end_m': _spread(found.end_m, peak=True),
        'model_sha256': _named(plan.model_sha256 for plan in recording.shadow),
        'backend': _named(plan.backend for plan in recording.shadow),
        'schedule': _named(plan.schedule for plan in recording.shadow),
    }


def _reasoning(recording: Recording, window: Window) -> dict[str, Any]:
    """Different texts (by the picture they speak of) and their words a second."""
    told = [said for said in recording.reasonings if window.holds(said.received_ns) and said.text]
    episodes = {said.stamp_ns: said.text for said in told}
    words = sum(len(text.split()) for text in episodes.values())
    return {
        'episodes': len(episodes),
        'tokens_per_s': _rounded(words / window.seconds),
        'last': told[-1].text if told else '',
    }


def _nearest(points: Float64[np.ndarray, 'n 2'], query: Float64[np.ndarray, '2']) -> int:
    return int(np.argmin(((points - query) ** 2).sum(axis=1)))


def _spread(
    values: Sequence[float] | Float64[np.ndarray, '_'], *, peak: bool = False
) -> dict[str, float | None]:
    if not len(values):
        return {'p50': None, 'p99': None, **({'max': None} if peak else {})}
    middle, high = np.percentile(np.asarray(values, dtype=np.float64), [50.0, 99.0])
    spread = {'p50': _rounded(float(middle)), 'p99': _rounded(float(high))}
    return {**spread, 'max': _rounded(float(np.max(values)))} if peak else spread


def _named(words: Any) -> str:
    return ', '.join(sorted({word for word in words if word}))


def _share(flags: Any) -> float | None:
    known = list(flags)
    return round(sum(known) / len(known), 4) if known else None


def _rate(period_s: float | None) -> float | None:
    return 1.0 / period_s if period_s else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def stamps_s(stamps_ns: Sequence[int], zero_ns: int) -> Float64[np.ndarray, 'n']:
    """Stamps as seconds since `zero_ns`."""
    stamps: Int64[np.ndarray, 'n'] = np.array(stamps_ns, dtype=np.int64)
    return (stamps - zero_ns) * 1e-9
