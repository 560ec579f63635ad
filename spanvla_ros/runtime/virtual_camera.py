"""The rig's cameras as the model's: undistorted, turned and cut to the trained rig.

Pictures of one place differ between two cameras by lens, focal length and direction; all three
are undone exactly, by looking up for each pixel of the model's camera where its ray meets the
picture at hand. A camera that stands elsewhere sees around other corners, which no warp undoes:
that, and a field of view that lies elsewhere, is told with its fix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from jaxtyping import Bool, Float32, Float64, UInt8
from transforms3d.euler import euler2mat
from transforms3d.quaternions import quat2mat

from spanvla_ros.messages import Intrinsics, MessageError
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.types import SpanvlaError

# Optical axes (right, down, ahead) in those of the body (ahead, left, up).
BODY_FROM_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
ANGLES = ('yaw_deg', 'pitch_deg', 'roll_deg')
PLACE = ('x_m', 'y_m', 'z_m')
SAME_PX = 0.6
WIDEST_RAD = math.radians(85.0)
REFUSED_BELOW = 0.5
WARNED_BELOW = 0.8
WARNED_OFFSET_M = 0.5


@dataclass(frozen=True)
class Mount:
    """Where a camera stands in `base_link`, and how its optical axes lie there."""

    place_m: Float64[np.ndarray, '3']
    base_from_optical: Float64[np.ndarray, '3 3']

    @staticmethod
    def of_angles(
        place_m: tuple[float, float, float], yaw_deg: float, pitch_deg: float, roll_deg: float
    ) -> Mount:
        """Yaw turns left, pitch tilts down, roll lowers the right side, in this order."""
        angles = (math.radians(angle) for angle in (yaw_deg, pitch_deg, roll_deg))
        turn = euler2mat(*angles, axes='rzyx')
        return Mount(np.array(place_m, dtype=np.float64), turn @ BODY_FROM_OPTICAL)


def model_mount(camera: CameraSpec) -> Mount:
    """The mount a model was trained with."""
    place_m = (camera.x_m, camera.y_m, camera.z_m)
    return Mount.of_angles(place_m, camera.yaw_deg, camera.pitch_deg, 0.0)


def read_rig(path: str | Path) -> dict[str, Mount]:
    """Mounts by camera name out of a rig file.

    The file is YAML: `cameras:` with, for each name, `x_m y_m z_m` of the camera in `base_link`
    and `yaw_deg pitch_deg roll_deg`; angles left out are zero.

    Raises:
        SpanvlaError: no such file, or one of another form.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise SpanvlaError(f'{path}: no rig file ({line}); name one by rig_file') from error
    cameras = raw.get('cameras') if isinstance(raw, dict) else None
    if not isinstance(cameras, dict) or not cameras:
        raise SpanvlaError(f'{path}: holds no mapping `cameras:` of names to mounts; write one')
    return {str(name): _mount(entry, f'{path}: camera {name}') for name, entry in cameras.items()}


def _mount(entry: object, where: str) -> Mount:
    known = (*PLACE, *ANGLES)
    if not isinstance(entry, dict) or not set(PLACE) <= set(entry) <= set(known):
        raise SpanvlaError(f'{where}: needs {", ".join(PLACE)} and may have {", ".join(ANGLES)}')
    for name, value in entry.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not (good and math.isfinite(value)):
            raise SpanvlaError(f'{where}: {name} must be a number, not {value!r:.40}')
    x_m, y_m, z_m = (float(entry[name]) for name in PLACE)
    yaw_deg, pitch_deg, roll_deg = (float(entry.get(name, 0.0)) for name in ANGLES)
    return Mount.of_angles((x_m, y_m, z_m), yaw_deg, pitch_deg, roll_deg)


class FrameTree:
    """Static transforms, as `/tf_static` brings them in any number of messages."""

    def __init__(self) -> None:
        """Start empty."""
        self._parents: dict[str, tuple[str, Float64[np.ndarray, '4 4']]] = {}

    def add(self, message: Any) -> None:
        """Take a `tf2_msgs/TFMessage`; a transform that is none is left out."""
        for entry in message.transforms:
            t, q = entry.transform.translation, entry.transform.rotation
            numbers = np.array([t.x, t.y, t.z, q.w, q.x, q.y, q.z], dtype=np.float64)
            if not np.isfinite(numbers).all() or abs(np.linalg.norm(numbers[3:]) - 1.0) > 0.05:
                continue
            parent_from_child = np.eye(4)
            parent_from_child[:3, :3] = quat2mat(numbers[3:])
            parent_from_child[:3, 3] = numbers[:3]
            child = str(entry.child_frame_id).lstrip('/')
            self._parents[child] = (str(entry.header.frame_id).lstrip('/'), parent_from_child)

    def mount(self, base_frame: str, optical_frame: str) -> Mount | None:
        """The mount of a camera by its optical frame; None where no chain leads to the base."""
        to_base = self._root_from(base_frame.lstrip('/'))
        to_camera = self._root_from(optical_frame.lstrip('/'))
        if to_base[0] != to_camera[0]:
            return None
        base_from_camera = np.linalg.inv(to_base[1]) @ to_camera[1]
        return Mount(base_from_camera[:3, 3], base_from_camera[:3, :3])

    def _root_from(self, frame: str) -> tuple[str, Float64[np.ndarray, '4 4']]:
        root_from_frame = np.eye(4)
        # A ring of frames would lead nowhere for ever.
        for _ in range(len(self._parents) + 1):
            if frame not in self._parents:
                break
            frame, parent_from_child = self._parents[frame]
            root_from_frame = parent_from_child @ root_from_frame
        return frame, root_from_frame


class VirtualCamera:
    """One camera of the model, looked through one of the rig's."""

    def __init__(self, camera: CameraSpec, source: Intrinsics, mount: Mount | None = None) -> None:
        """Work out where each of its pixels lies in the source picture.

        Args:
            camera: the model's camera.
            source: lens and size of the rig's camera.
            mount: of the rig's camera; None takes it to look where the model's does.

        Raises:
            MessageError: a lens model that is not known.
        """
        self._size = (source.width_px, source.height_px)
        rays = _rays(camera)
        offset_m = 0.0
        if mount is not None:
            wanted = model_mount(camera)
            offset_m = float(np.linalg.norm(mount.place_m - wanted.place_m))
            rays = rays @ (mount.base_from_optical.T @ wanted.base_from_optical).T
        pixels, known = _project(source, rays.reshape(-1, 3))
        inside = (pixels > -0.5).all(axis=1) & (pixels < np.array(self._size) - 0.5).all(axis=1)
        self.seen = float((known & inside).mean())
        self.fault, self.warning = _judged(camera, self.seen, offset_m)
        self._maps = pixels.reshape(camera.height_px, camera.width_px, 2)
        self._same = self._size == (camera.width_px, camera.height_px) and bool(
            np.abs(self._maps - _grid(camera)).max() < SAME_PX
        )
        self._cut()

    def _cut(self) -> None:
        """The part of the source that is looked at, how far to shrink it, and where to look."""
        steps = np.abs(np.diff(self._maps[:, :, 0], axis=1)).ravel()
        self._shrink = max(1, int(np.median(steps)))
        limit = np.array(self._size) - 1
        low = np.clip(np.floor(self._maps.min(axis=(0, 1))) - 1, 0, limit - 1).astype(int)
        high = np.clip(np.ceil(self._maps.max(axis=(0, 1))) + 2, low + 1, limit + 1).astype(int)
        # Whole blocks of pixels; the last one is moved in rather than cut off.
        blocks = np.maximum((high - low) // self._shrink, 1)
        self._low, self._high = low, np.minimum(low + blocks * self._shrink, limit + 1)
        self._blocks = (int(blocks[0]), int(blocks[1]))
        scale = (self._high - low) / blocks
        self._lookup: Float32[np.ndarray, 'h w 2'] = (
            (self._maps - low + 0.5) / scale - 0.5
        ).astype(np.float32)

    def fit(self, picture: UInt8[np.ndarray, 'h w *c']) -> UInt8[np.ndarray, 'rows columns *c']:
        """The picture as the model's camera would have taken it, whatever its channels mean.

        What the source does not see is filled with the pixels of its edge, never with black.
        """
        if (picture.shape[1], picture.shape[0]) != self._size:
            raise MessageError(
                f'image: {picture.shape[1]}x{picture.shape[0]} against '
                f'{self._size[0]}x{self._size[1]} in camera_info'
            )
        if self._same:
            return picture
        (left, top), (right, bottom) = self._low, self._high
        part = picture[top:bottom, left:right]
        if self._shrink > 1:
            part = cv2.resize(part, self._blocks, interpolation=cv2.INTER_AREA)
        columns, rows = self._lookup[:, :, 0], self._lookup[:, :, 1]
        fitted = cv2.remap(part, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(fitted, dtype=np.uint8)


def centered(
    picture: UInt8[np.ndarray, 'h w *c'], camera: CameraSpec
) -> UInt8[np.ndarray, 'rows columns *c']:
    """Without a `camera_info`: the largest middle part of the right shape, in the model's size."""
    rows, columns = picture.shape[:2]
    if (columns, rows) == (camera.width_px, camera.height_px):
        return picture
    scale = min(columns / camera.width_px, rows / camera.height_px)
    width, height = max(round(scale * camera.width_px), 1), max(round(scale * camera.height_px), 1)
    left, top = (columns - width) // 2, (rows - height) // 2
    part = picture[top : top + height, left : left + width]
    shrinks = part.shape[1] > camera.width_px
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (camera.width_px, camera.height_px), interpolation=interpolation)


def check_rig(rig: Mapping[str, Mount], cameras: tuple[CameraSpec, ...], path: str) -> None:
    """Refuse a rig file that lacks a camera of the model.

    Raises:
        SpanvlaError: naming the cameras.
    """
    missing = [camera.name for camera in cameras if camera.name not in rig]
    if missing:
        raise SpanvlaError(f'{path}: lacks {", ".join(missing)} of the model; add their mounts')


def _grid(camera: CameraSpec) -> Float64[np.ndarray, 'h w 2']:
    columns, rows = np.meshgrid(np.arange(camera.width_px), np.arange(camera.height_px))
    return np.stack([columns, rows], axis=-1).astype(np.float64)


def _rays(camera: CameraSpec) -> Float64[np.ndarray, 'h w 3']:
    """Directions of the model's pixels along its optical axes; the middle of a pixel counts."""
    middle = np.array([camera.width_px - 1, camera.height_px - 1]) / 2.0
    aside = (_grid(camera) - middle) / camera.focal_px
    return np.concatenate([aside, np.ones((*aside.shape[:2], 1))], axis=-1)


def _project(
    source: Intrinsics, rays: Float64[np.ndarray, 'n 3']
) -> tuple[Float64[np.ndarray, 'n 2'], Bool[np.ndarray, 'n']]:
    """Pixels of directions, and which of them the lens model speaks of.

    Beyond the angle at which a lens polynomial turns back, it says nothing: those directions are
    drawn in to that angle.
    """
    aside = np.linalg.norm(rays[:, :2], axis=1)
    angle = np.arctan2(aside, rays[:, 2])
    widest = _widest(source)
    known = angle <= widest
    radius = np.tan(np.minimum(angle, widest))
    slopes = rays[:, :2] / np.maximum(aside, 1e-12)[:, None] * radius[:, None]
    return _lens(source, slopes), known


def _widest(source: Intrinsics) -> float:
    """The angle off the axis up to which the picture of the lens still moves outward."""
    angles = np.linspace(0.0, WIDEST_RAD, 341)
    slopes = np.stack([np.tan(angles), np.zeros(len(angles))], axis=1)
    turned = np.flatnonzero(np.diff(_lens(source, slopes)[:, 0]) <= 0.0)
    return float(angles[turned[0]]) if len(turned) else WIDEST_RAD


def _lens(source: Intrinsics, slopes: Float64[np.ndarray, 'n 2']) -> Float64[np.ndarray, 'n 2']:
    """Pixels of directions given as (right, down) per unit ahead."""
    focal = np.array([source.focal_x_px, source.focal_y_px])
    center = np.array([source.center_x_px, source.center_y_px])
    lens = np.array(source.distortion, dtype=np.float64)
    if not lens.any():
        return np.asarray(slopes * focal + center, dtype=np.float64)
    matrix = np.array([[focal[0], 0.0, center[0]], [0.0, focal[1], center[1]], [0.0, 0.0, 1.0]])
    if source.distortion_model in ('equidistant', 'fisheye') and len(lens) == 4:
        bent = cv2.fisheye.distortPoints(slopes[:, None, :], matrix, lens)
        return np.asarray(bent[:, 0], dtype=np.float64)
    if source.distortion_model in ('plumb_bob', 'rational_polynomial') and len(lens) in (
        4,
        5,
        8,
        12,
        14,
    ):
        ahead = np.concatenate([slopes, np.ones((len(slopes), 1))], axis=1)
        bent = cv2.projectPoints(ahead, np.zeros(3), np.zeros(3), matrix, lens)[0]
        return np.asarray(bent[:, 0], dtype=np.float64)
    raise MessageError(
        f'camera_info: {len(lens)} coefficients of lens model {source.distortion_model!r:.40} '
        'are not known; rectify the pictures and set pictures to rectified'
    )


def _judged(camera: CameraSpec, seen: float, offset_m: float) -> tuple[str, str]:
    """The fault and the warning of a camera, empty where there is none."""
    if seen < WARNED_BELOW:
        words = (
            f'{camera.name} sees {100.0 * seen:.0f} % of what the camera of the model sees; turn '
            f'it to yaw {camera.yaw_deg:g} and pitch {camera.pitch_deg:g} deg with '
            f'{camera.fov_deg:g} deg of view, or correct its camera_info and extrinsics'
        )
        return (f'rig: {words}', '') if seen < REFUSED_BELOW else ('', words)
    if offset_m > WARNED_OFFSET_M:
        return '', (
            f'{camera.name} stands {offset_m:.1f} m from where the model was trained; move it to '
            f'x {camera.x_m:g}, y {camera.y_m:g}, z {camera.z_m:g} m'
        )
    return '', ''
