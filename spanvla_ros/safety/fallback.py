"""The chain that never ends: plan in use -> comfortable stop -> hard stop.

Every link starts in the present state of the ego and is a 5 s roll-out of the bicycle, so that
one link follows another without a step.
"""

from __future__ import annotations

from spanvla_ros.safety.rollout import Motion, Path, Profile, roll_out
from spanvla_ros.types import EgoState, Vehicle

MAX_PATH_OFFSET_M = 2.0
MAX_PATH_TURN_RAD = 1.0


def follow_plan(
    ego: EgoState, frame_id: str, vehicle: Vehicle, path: Path, profile: Profile
) -> Motion:
    """The plan in use, re-timed to the present: its path at the speeds it has from now on."""
    return roll_out(ego, frame_id, vehicle, path, profile)


def comfortable_stop(ego: EgoState, frame_id: str, vehicle: Vehicle, path: Path) -> Motion:
    """A gentle stop along the last path, firmer where that path ends earlier.

    A plan that meant to stop at a line ends there; the fallback must not drive past it.
    """
    along_m, _, _ = path.offset(ego.x_m, ego.y_m, ego.yaw_rad)
    remaining_m = max(path.length_m - along_m, 0.1)
    needed = max(ego.speed_mps, 0.0) ** 2 / (2.0 * remaining_m)
    decel = min(max(needed, vehicle.comfort_decel_mps2), vehicle.max_decel_mps2)
    return roll_out(ego, frame_id, vehicle, path, decel)


def hard_stop(ego: EgoState, frame_id: str, vehicle: Vehicle, path: Path | None = None) -> Motion:
    """Full braking, along the path where one is given, else with the steering as it is."""
    return roll_out(ego, frame_id, vehicle, path, vehicle.max_decel_mps2)


def usable(path: Path | None, ego: EgoState) -> bool:
    """Whether the ego is still near a path and faces along it."""
    if path is None:
        return False
    _, left_m, turn_rad = path.offset(ego.x_m, ego.y_m, ego.yaw_rad)
    return abs(left_m) <= MAX_PATH_OFFSET_M and turn_rad <= MAX_PATH_TURN_RAD
