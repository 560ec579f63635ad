"""The last touch on a plan: a car that stands or stops does not wriggle or roll back.

A generated trajectory wavers by centimeters. While the car moves that is nothing; near standstill
the same centimeters are headings in any direction and small reversals, which a follower would
answer with steering and creeping.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

STANDSTILL_MPS = 0.3
STANDSTILL_TRAVEL_M = 0.5
CREEP_MPS = 0.2
ROLL_BACK_M = 2.0


def settled(
    poses: Float64[np.ndarray, 't 3'], times_s: Float64[np.ndarray, 't'], speed_mps: float
) -> Float64[np.ndarray, 't 3']:
    """The plan without wriggling near standstill and without reversing.

    A pose that has not moved on along the last kept pose's heading by at least 0.2 m/s since the
    previous time repeats the kept pose; progress adds up, so slow starts stay, and a plan that
    overshoots its halt by less than 2 m does not roll back. A plan that reverses farther is left
    for the guardian to refuse. A standing car whose whole plan leads less than 0.5 m
    ahead stays where it is. Parts of a plan that move on are never touched.

    Args:
        poses: poses in `base_link`.
        times_s: their times.
        speed_mps: present speed.
    """
    calm: Float64[np.ndarray, 't 3'] = poses.copy()
    kept = np.zeros(3)
    for index, step_s in enumerate(np.diff(times_s, prepend=0.0)):
        dx, dy = poses[index, 0] - kept[0], poses[index, 1] - kept[1]
        ahead_m = np.cos(kept[2]) * dx + np.sin(kept[2]) * dy
        if ahead_m < -ROLL_BACK_M:
            return np.array(poses)
        turned = ahead_m > 0.0 and np.hypot(dx, dy) >= STANDSTILL_TRAVEL_M
        if ahead_m >= CREEP_MPS * step_s or turned:
            kept = poses[index]
        calm[index] = kept
    if abs(speed_mps) < STANDSTILL_MPS and np.hypot(*calm[-1, :2]) < STANDSTILL_TRAVEL_M:
        calm[:] = 0.0
    return calm
