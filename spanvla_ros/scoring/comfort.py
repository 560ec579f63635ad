"""Comfort of simulated states: six bounds on filtered signals, and the two-frame comparison.

Savitzky-Golay filters are linear, so each is one constant matrix here. Three habits of the
official code are kept because scores depend on them: v1 filters accelerations and differentiates
jerk over the whole 4 s at once, an even window is evaluated half a step late, and yaw signals
always use a window of five.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from spanvla_ros.scoring import simulation
from spanvla_ros.scoring.prepared import Version

FLAGS = ('lon_accel', 'lat_accel', 'jerk', 'lon_jerk', 'yaw_accel', 'yaw_rate')
EXTENDED_LIMITS = {'acceleration': 0.7, 'jerk': 0.5, 'yaw_rate': 0.1, 'yaw_accel': 0.1}

_LON_ACCEL_MPS2 = (-4.05, 2.40)
_LAT_ACCEL_MPS2 = 4.89
_JERK_MPS3 = 8.37
_LON_JERK_MPS3 = 4.13
_YAW_ACCEL_RADPS2 = 1.93
_YAW_RATE_RADPS = 0.95
_SHORT, _JERK, _YAW = 8, 15, 5
_DECIMALS = 8

States = Float64[np.ndarray, 'n t 11']


@dataclass(frozen=True)
class ExtendedComfort:
    """Root mean square differences between two plans made 0.5 s apart, over their overlap."""

    acceleration: float
    jerk: float
    yaw_rate: float
    yaw_accel: float

    @property
    def passed(self) -> bool:
        """Whether all four are within their limits."""
        return all(getattr(self, name) <= limit for name, limit in EXTENDED_LIMITS.items())


def comfort_flags(states: States, version: Version) -> Bool[np.ndarray, 'n 6']:
    """Whether each signal named in `FLAGS` stays strictly within its bound.

    v1 looks at rear-axle acceleration over 4 s; v2 at the box center's, with the past prepended
    by `with_history`.
    """
    size = states.shape[1]
    x, y, window, slope = states[..., simulation.AX], states[..., simulation.AY], _SHORT, _JERK
    if version == 'v1':
        window = slope = size
    magnitude = np.hypot(x, y)
    if version == 'v2':
        # The official shift adds the yaw terms to the longitudinal axis only.
        rate, change = states[..., simulation.YAW_RATE], states[..., simulation.YAW_ACCEL]
        x = x + simulation.PACIFICA.rear_axle_to_center_m * (rate * rate + change)
    lon, lat = _filtered(x, window), _filtered(y, window)
    signals = (
        _slope(_filtered(magnitude, _SHORT), slope),
        _slope(_filtered(x, _SHORT), slope),
        _yaw_slope(states, 2, 3),
        _yaw_slope(states, 1, 2),
    )
    bounds = (_JERK_MPS3, _LON_JERK_MPS3, _YAW_ACCEL_RADPS2, _YAW_RATE_RADPS)
    low, high = _LON_ACCEL_MPS2
    flags = [((lon > low) & (lon < high)).all(axis=-1), (np.abs(lat) < _LAT_ACCEL_MPS2).all(-1)]
    flags += [
        (np.abs(signal) < bound).all(axis=-1)
        for signal, bound in zip(signals, bounds, strict=True)
    ]
    return np.stack(flags, axis=-1)


def with_history(
    states: States, history: Float64[np.ndarray, 'h 11']
) -> Float64[np.ndarray, 'n h+t 11']:
    """The past prepended to each proposal."""
    past = np.broadcast_to(history, (len(states), *history.shape))
    return np.concatenate([past, states], axis=1)


def extended_comfort(
    now: Float64[np.ndarray, '41 11'], before: Float64[np.ndarray, '41 11'], gap_steps: int = 5
) -> ExtendedComfort:
    """Compare a plan's simulation with that of the plan made `gap_steps` of 0.1 s earlier."""
    pair = np.stack([now[:-gap_steps], before[gap_steps:]])
    magnitude = np.hypot(pair[..., simulation.AX], pair[..., simulation.AY])
    accel = _filtered(magnitude, _SHORT)
    signals = (accel, _slope(accel, _JERK), _yaw_slope(pair, 1, 2), _yaw_slope(pair, 2, 2))
    rms = [float(np.sqrt(np.mean((s[0] - s[1]) ** 2))) for s in signals]
    return ExtendedComfort(*rms)


def _filtered(signal: Float64[np.ndarray, 'n t'], window: int) -> Float64[np.ndarray, 'n t']:
    return _apply(signal, window, 2, 0)


def _slope(signal: Float64[np.ndarray, 'n t'], window: int) -> Float64[np.ndarray, 'n t']:
    return _apply(signal, window, 2, 1)


def _yaw_slope(states: States, derivative: int, order: int) -> Float64[np.ndarray, 'n t']:
    return _apply(np.unwrap(states[..., simulation.YAW], axis=-1), _YAW, order, derivative)


def _apply(
    signal: Float64[np.ndarray, 'n t'], window: int, order: int, derivative: int
) -> Float64[np.ndarray, 'n t']:
    matrix = savgol_matrix(signal.shape[-1], window, order, derivative)
    filtered: Float64[np.ndarray, 'n t'] = np.round(signal @ matrix.T, _DECIMALS)
    return filtered


@functools.cache
def savgol_matrix(
    size: int, window: int, order: int, derivative: int
) -> Float64[np.ndarray, 't t']:
    """The Savitzky-Golay filter at 10 Hz as a matrix; the ends follow the outermost fit."""
    window = min(window, size)
    half = window // 2
    even = window % 2 == 0
    scale = math.factorial(derivative) / simulation.STEP_S**derivative
    matrix = np.zeros((size, size))
    for row in range(size):
        inner = half <= row < size - half
        first = min(max(row - half, 0), size - window)
        at = float(row)
        if even and inner:
            first, at = row - half + 1, row + 0.5
        powers = np.vander(np.arange(first, first + window) - at, order + 1, increasing=True)
        matrix[row, first : first + window] = np.linalg.pinv(powers)[derivative] * scale
    return matrix
