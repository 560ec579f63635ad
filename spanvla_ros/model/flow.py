"""The flow's host side: source, normalization, time features, Euler loop, decoding.

Paper: SpanVLA 3.2, flow matching with historical initialization: x_t = (1 - t) x0 + t x1, target
x1 - x0, five Euler steps. Time runs from 0 (source) to 1 (trajectory). The source path is
parameter-free, so that the target cannot be learned away; the normalized flow state is the
trajectory's difference from the source path, divided by its spread for each waypoint and axis:
the source itself is x = 0, to which training adds noise. `gaussian` (the paper's ablation) has no
source path and starts from N(0, 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from spanvla_ros.geometry import wrap_angle
from spanvla_ros.model.action_tokens import CODEBOOK_FILE, ActionCodebook, load_codebook
from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.model.config import SOURCES, ModelConfig
from spanvla_ros.types import Observation, SpanvlaError, read_json

NORMALIZATION_FILE = 'normalization.json'
TIME_FEATURES = 128
TIME_PERIODS = (4e-3, 4.0)
MAX_CURVATURE_PER_M = 0.2
CURVATURE_PRIOR_M2 = 1.0
STANDSTILL_MPS = 0.05
MAX_HALF_TURN_RAD = 1.2


@dataclass(frozen=True)
class Normalization:
    """What a head's numbers mean in meters.

    `std` is the spread of trajectory minus source path for each waypoint and axis (x m, y m, yaw
    rad); `anchors`, of the diffusion head, are differences in that unit; `codebook` is there where
    the head speaks in action tokens.
    """

    source: str
    std: Float64[np.ndarray, 't 3']
    anchors: Float64[np.ndarray, 'k t 3'] | None = None
    codebook: ActionCodebook | None = None

    @property
    def actions(self) -> ActionCodebook:
        """The codebook; a model without raises `SpanvlaError`."""
        if self.codebook is None:
            raise SpanvlaError('the model has no action codebook; train this head first')
        return self.codebook


def load_normalization(model_dir: str | Path, config: ModelConfig) -> Normalization:
    """Read `normalization.json`, and the codebook where there is one; check both."""
    path = Path(model_dir) / NORMALIZATION_FILE
    raw = read_json(path, 'train or fetch the model')
    try:
        std = np.asarray(raw['std'], dtype=np.float64)
        source = raw['source']
        anchors = np.asarray(raw['anchors'], dtype=np.float64) if 'anchors' in raw else None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise SpanvlaError(f'{path}: not readable ({error}); train or fetch the model') from error
    if std.shape != (config.waypoints, 3) or not (np.isfinite(std).all() and (std > 0).all()):
        raise SpanvlaError(f'{path}: std must be {config.waypoints} x 3 positive numbers')
    if source != config.source:
        raise SpanvlaError(
            f'{path}: made for source {source!r}, config.yaml has {config.source!r}'
        )
    if anchors is not None and (anchors.shape[1:] != std.shape or not np.isfinite(anchors).all()):
        raise SpanvlaError(f'{path}: anchors must be finite, of {config.waypoints} x 3 each')
    codebook = None
    if (Path(model_dir) / CODEBOOK_FILE).is_file():
        codebook = load_codebook(model_dir)
    return Normalization(source, std, anchors, codebook)


def write_normalization(model_dir: str | Path, normalization: Normalization) -> None:
    """Write `normalization.json` in one atomic step."""
    content: dict[str, object] = {
        'source': normalization.source,
        'std': normalization.std.tolist(),
    }
    if normalization.anchors is not None:
        content['anchors'] = normalization.anchors.tolist()
    write_text(Path(model_dir) / NORMALIZATION_FILE, json.dumps(content, indent=1) + '\n')


def arc(
    speed_mps: float, curvature_per_m: float, times_s: Float64[np.ndarray, 't']
) -> Float64[np.ndarray, 't 3']:
    """Poses in `base_link` when speed and curvature stay as they are."""
    along = speed_mps * times_s
    half = 0.5 * curvature_per_m * along
    chord = along * np.sinc(half / np.pi)
    return np.stack([chord * np.cos(half), chord * np.sin(half), 2.0 * half], axis=-1)


def fit_curvature(
    history: Float64[np.ndarray, 'h 3'], speed_mps: float, yaw_rate_radps: float
) -> float:
    """Least-squares curvature of the arc through the present pose along the driven path, 1/m.

    Each past pose gives two readings of its turn: its yaw, and twice the direction of its chord;
    on an arc both equal curvature times arc length. The measured yaw rate counts as one more
    meter-scale reading. A prior of zero with the weight of one meter driven keeps the result
    small near standstill, where headings mean nothing.

    Args:
        history: past poses in `base_link`, any order, possibly none.
        speed_mps: present speed.
        yaw_rate_radps: present yaw rate.
    """
    weight = speed_mps * speed_mps + CURVATURE_PRIOR_M2
    moment = speed_mps * yaw_rate_radps
    for x, y, yaw in history.tolist():
        sign = 1.0 if x >= 0.0 else -1.0
        half = np.arctan2(sign * y, sign * x)
        half = min(max(half, -MAX_HALF_TURN_RAD), MAX_HALF_TURN_RAD)
        along = sign * np.hypot(x, y) / np.sinc(half / np.pi)
        moment += along * (0.5 * yaw + half)
        weight += along * along
    return float(np.clip(moment / weight, -MAX_CURVATURE_PER_M, MAX_CURVATURE_PER_M))


def history_source(
    observation: Observation, times_s: Float64[np.ndarray, 't']
) -> Float64[np.ndarray, 't 3']:
    """The arc of present speed and of the driven path's curvature, in `base_link`.

    The speed is the measured one: a speed fitted to 1.5 s of path lags whenever the car brakes.
    """
    ego = observation.ego
    past = observation.history[observation.history_valid]
    if abs(ego.speed_mps) < STANDSTILL_MPS:
        return np.zeros((len(times_s), 3))
    return arc(ego.speed_mps, fit_curvature(past, ego.speed_mps, ego.yaw_rate_radps), times_s)


def constant_velocity(
    observation: Observation, times_s: Float64[np.ndarray, 't']
) -> Float64[np.ndarray, 't 3']:
    """Straight on at the present speed, in `base_link`."""
    return arc(observation.ego.speed_mps, 0.0, times_s)


def source_path(
    source: str, observation: Observation, times_s: Float64[np.ndarray, 't']
) -> Float64[np.ndarray, 't 3']:
    """The source path of the flow; `gaussian` has none and gives zeros."""
    if source == 'history':
        return history_source(observation, times_s)
    if source == 'constant_velocity':
        return constant_velocity(observation, times_s)
    if source == 'gaussian':
        return np.zeros((len(times_s), 3))
    raise SpanvlaError(f'source {source!r} is not known; use one of {", ".join(SOURCES)}')


def start_state(source: str, waypoints: int, seed: int = 0) -> Float32[np.ndarray, 't 3']:
    """State at time 0 of a plan: zeros, or for `gaussian` one reproducible draw of N(0, 1)."""
    if source == 'gaussian':
        return np.random.default_rng(seed).standard_normal((waypoints, 3)).astype(np.float32)
    return np.zeros((waypoints, 3), dtype=np.float32)


def encode_trajectory(
    poses: Float64[np.ndarray, 't 3'],
    source: Float64[np.ndarray, 't 3'],
    std: Float64[np.ndarray, 't 3'],
) -> Float32[np.ndarray, 't 3']:
    """Normalized x of a trajectory given in `base_link`."""
    difference = poses - source
    difference[:, 2] = wrap_angle(difference[:, 2])
    return (difference / std).astype(np.float32)


def decode_trajectory(
    x: Float32[np.ndarray, 't 3'],
    source: Float64[np.ndarray, 't 3'],
    std: Float64[np.ndarray, 't 3'],
) -> Float64[np.ndarray, 't 3']:
    """Poses in `base_link` of a normalized x; inverse of `encode_trajectory`."""
    poses = source + x.astype(np.float64) * std
    poses[:, 2] = wrap_angle(poses[:, 2])
    return poses


_ANGULAR = 2.0 * np.pi / np.geomspace(TIME_PERIODS[1], TIME_PERIODS[0], TIME_FEATURES // 2)


def time_features(time: float | Float64[np.ndarray, '*n']) -> Float32[np.ndarray, '*n 128']:
    """Sines and cosines of flow times, made here so that no graph needs them."""
    phase = np.multiply.outer(time, _ANGULAR)
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=-1).astype(np.float32)


def euler(
    velocity: Callable[[np.ndarray, float], np.ndarray],
    start: Float32[np.ndarray, '*n'],
    steps: int,
) -> Float32[np.ndarray, '*n']:
    """Integrate `velocity(x, time)` from time 0 to 1 in equal steps."""
    x = start
    for index in range(steps):
        x = x + np.float32(1.0 / steps) * velocity(x, index / steps)
    return x
