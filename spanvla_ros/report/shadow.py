"""How far a shadow planner, whose plans nobody drove, disagrees with the one that drove."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.report.recording import PlanRecord, Recording


@dataclass(frozen=True)
class Disagreement:
    """Shadow plans beside the driven plans from the same picture, in the order of arrival.

    `mean_m` is the mean distance over the waypoints of both, `end_m` that of the last ones.
    """

    plans: int
    received_ns: tuple[int, ...]
    mean_m: Float64[np.ndarray, 'n']
    end_m: Float64[np.ndarray, 'n']


def disagreement(recording: Recording, from_ns: int, to_ns: int) -> Disagreement | None:
    """The disagreement of a drive between two times of arrival; None without a shadow planner."""
    shadow = [plan for plan in recording.shadow if from_ns <= plan.received_ns <= to_ns]
    if not shadow:
        return None
    driven = {plan.stamp_ns: plan for plan in recording.plans}
    pairs = [(plan, driven[plan.stamp_ns]) for plan in shadow if plan.stamp_ns in driven]
    apart_m = [_distances_m(plan, other) for plan, other in pairs]
    return Disagreement(
        len(shadow),
        tuple(plan.received_ns for plan, _ in pairs),
        np.array([float(row.mean()) for row in apart_m]),
        np.array([float(row[-1]) for row in apart_m]),
    )


def _distances_m(plan: PlanRecord, other: PlanRecord) -> Float64[np.ndarray, 't']:
    """Distances at the times of `plan` that `other` reaches as well."""
    times_s = plan.times_s[plan.times_s <= other.times_s[-1] + 1e-6]
    times_s = times_s if len(times_s) else plan.times_s[:1]
    mine = plan.poses[: len(times_s), :2]
    theirs = [np.interp(times_s, other.times_s, other.poses[:, axis]) for axis in (0, 1)]
    apart_m: Float64[np.ndarray, 't'] = np.hypot(mine[:, 0] - theirs[0], mine[:, 1] - theirs[1])
    return apart_m
