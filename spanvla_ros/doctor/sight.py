"""Do the pictures move as the odometry says, seen from where the cameras are said to be?

Corners are tracked from one picture to the next. Under a hypothesis (which mount the camera has,
whether its picture is mirrored or upside down, how its focal length is scaled, whether the motion
is left-handed) each track must obey the geometry of a static world: it lies on its epipolar line,
moves away from the point the car drives to, and, below the horizon, at least as fast as the
ground would, because nothing is seen beneath the ground. The share of tracks that obey is the
hypothesis's score; a better one than the configured names the fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from spanvla_ros.messages import Intrinsics
from spanvla_ros.model.config import CameraSpec

CORNERS = 120
MAX_ROUND_TRIP_PX = 0.7
TOLERANCE_PX = 0.8
TOLERANCE_SHARE = 0.1
NEAREST_M = 0.7
Gray = UInt8[np.ndarray, 'h w']


@dataclass(frozen=True)
class Mount:
    """Where a camera sits in `base_link`: its center, and its optical axes as columns."""

    center_m: Float64[np.ndarray, '3']
    base_from_optical: Float64[np.ndarray, '3 3']

    @staticmethod
    def of(spec: CameraSpec) -> Mount:
        """The mount written in a model's configuration."""
        yaw, pitch = math.radians(spec.yaw_deg), math.radians(spec.pitch_deg)
        cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
        ahead, right = [cp * cy, cp * sy, -sp], [sy, -cy, 0.0]
        down = [-sp * cy, -sp * sy, -cp]
        axes = np.array([right, down, ahead]).T
        return Mount(np.array([spec.x_m, spec.y_m, spec.z_m]), axes)

    @property
    def yaw_deg(self) -> float:
        """How far the optical axis turns left of straight ahead."""
        ahead = self.base_from_optical[:, 2]
        return math.degrees(math.atan2(ahead[1], ahead[0]))


@dataclass(frozen=True)
class Tracks:
    """Corners seen in two pictures: pixels `first` and `second`, and the ego motion between.

    `motion` holds, a row a track, the second pose of `base_link` (x, y, yaw) in the first.
    """

    first: Float64[np.ndarray, 'n 2']
    second: Float64[np.ndarray, 'n 2']
    motion: Float64[np.ndarray, 'n 3']

    @property
    def count(self) -> int:
        """How many tracks there are."""
        return len(self.first)


@dataclass(frozen=True)
class Hypothesis:
    """What may be true of a camera: its mount, its picture, its focal length, the motion."""

    mount: str
    flip: str = 'none'
    scale: float = 1.0
    left_handed: bool = False


@dataclass(frozen=True)
class Score:
    """Shares of tracks that obey the geometry, and that move exactly as the ground."""

    obeying: float
    ground: float


def _followed(first: Gray, second: Gray, points: Any) -> tuple[Any, Any]:
    # OpenCV's types ask for a place to write to where None makes one.
    follow: Any = cv2.calcOpticalFlowPyrLK
    places, found, _ = follow(first, second, points, None, winSize=(15, 15), maxLevel=3)
    return places, found


def track(first: Gray, second: Gray, motion: Float64[np.ndarray, '3']) -> Tracks:
    """Corners of the first picture found again in the second, forth and back."""
    corners: Any = cv2.goodFeaturesToTrack(first, CORNERS, 0.005, 6)
    if corners is None:
        return joined([])
    there, found_there = _followed(first, second, corners)
    back, found_back = _followed(second, first, there)
    trip = np.linalg.norm((back - corners).reshape(-1, 2), axis=1)
    good = (found_there.ravel() == 1) & (found_back.ravel() == 1) & (trip < MAX_ROUND_TRIP_PX)
    a = corners.reshape(-1, 2)[good].astype(np.float64)
    b = there.reshape(-1, 2)[good].astype(np.float64)
    return Tracks(a, b, np.tile(np.asarray(motion, dtype=np.float64), (len(a), 1)))


def joined(parts: Sequence[Tracks]) -> Tracks:
    """All tracks of several pairs of pictures."""
    if not parts:
        return Tracks(np.empty((0, 2)), np.empty((0, 2)), np.empty((0, 3)))
    return Tracks(
        np.concatenate([p.first for p in parts]),
        np.concatenate([p.second for p in parts]),
        np.concatenate([p.motion for p in parts]),
    )


def _rays(
    pixels: Float64[np.ndarray, 'n 2'], info: Intrinsics, mount: Mount, flip: str, scale: float
) -> Float64[np.ndarray, 'n 3']:
    u, v = pixels.T
    if flip != 'none':
        u = info.width_px - 1 - u
    if flip == 'turned':
        v = info.height_px - 1 - v
    rays = np.stack(
        [
            (u - info.center_x_px) / (info.focal_x_px * scale),
            (v - info.center_y_px) / (info.focal_y_px * scale),
            np.ones_like(u),
        ],
        axis=1,
    )
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return np.asarray(rays @ mount.base_from_optical.T)


def score(tracks: Tracks, info: Intrinsics, mount: Mount, idea: Hypothesis) -> Score:
    """How well the tracks fit a static world under a hypothesis.

    Args:
        tracks: of one camera.
        info: its intrinsics.
        mount: the mount the hypothesis names.
        idea: the hypothesis.
    """
    first = _rays(tracks.first, info, mount, idea.flip, idea.scale)
    second = _rays(tracks.second, info, mount, idea.flip, idea.scale)
    hand = -1.0 if idea.left_handed else 1.0
    dx, dy, turn = (tracks.motion * [1.0, hand, hand]).T
    cos, sin = np.cos(turn), np.sin(turn)
    turned = np.stack(
        [cos * second[:, 0] - sin * second[:, 1], sin * second[:, 0] + cos * second[:, 1],
         second[:, 2]], axis=1,
    )  # fmt: skip
    cx, cy, cz = mount.center_m.tolist()
    baseline = np.stack(
        [cos * cx - sin * cy + dx - cx, sin * cx + cos * cy + dy - cy, np.zeros_like(dx)], axis=1
    )
    across = baseline - (baseline * first).sum(axis=1, keepdims=True) * first
    reach = np.linalg.norm(across, axis=1)
    away = -across / np.maximum(reach, 1e-9)[:, None]
    moved = turned - first
    along = (moved * away).sum(axis=1)
    side = moved - along[:, None] * away
    side -= (side * first).sum(axis=1, keepdims=True) * first
    beside = np.linalg.norm(side, axis=1)
    size = np.linalg.norm(second - first, axis=1)
    slack = TOLERANCE_PX / (info.focal_x_px * idea.scale) + TOLERANCE_SHARE * size
    below = first[:, 2] < 0.0
    ground = np.where(below, reach * -first[:, 2] / max(cz, 0.1), 0.0)
    fits = (beside < slack) & (along > 0.85 * ground - slack) & (along < reach / NEAREST_M + slack)
    telling = below & (ground > 3.0 * TOLERANCE_PX / info.focal_x_px)
    level = telling & (beside < slack) & (np.abs(along - ground) < slack)
    return Score(
        float(fits.mean()) if tracks.count else 0.0,
        float(level.sum() / telling.sum()) if telling.any() else 0.0,
    )
