"""Pictures inside a page: data URIs with lines drawn over them, strips, and films to step through.

A camera here is a pinhole on a mount over `base_link`, so that a planned path on the ground can be
drawn where the camera saw it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, UInt8

from spanvla_ros.report.page import escape

JPEG_QUALITY = 82
NEAR_M = 0.3


@dataclass(frozen=True)
class CameraView:
    """A pinhole camera: size, horizontal field of view, and its mount in `base_link`.

    `yaw_deg` turns left, `pitch_deg` tilts down where positive. A given focal length wins over the
    field of view.
    """

    name: str
    width_px: int
    height_px: int
    fov_deg: float
    x_m: float = 0.0
    y_m: float = 0.0
    z_m: float = 1.5
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0

    @property
    def focal_px(self) -> float:
        """The focal length that the field of view and the width give."""
        return self.width_px / 2.0 / math.tan(math.radians(self.fov_deg) / 2.0)


@dataclass(frozen=True)
class Overlay:
    """A line over a picture, in its pixels."""

    points: Float64[np.ndarray, 'n 2']
    paint: str = 'c0'
    width_px: float = 3.0


@dataclass(frozen=True)
class Picture:
    """An encoded picture (JPEG or PNG) with its size, caption and overlays."""

    data: bytes
    width_px: int
    height_px: int
    caption: str = ''
    overlays: tuple[Overlay, ...] = ()


def encode_picture(
    image: UInt8[np.ndarray, 'h w 3'],
    caption: str = '',
    overlays: tuple[Overlay, ...] = (),
    max_width_px: int = 640,
) -> Picture:
    """An RGB picture as JPEG, shrunk to `max_width_px`; overlays are given in its own pixels."""
    import cv2

    height_px, width_px = image.shape[:2]
    shrink = min(1.0, max_width_px / width_px)
    if shrink < 1.0:
        size = (round(width_px * shrink), round(height_px * shrink))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    _, jpeg = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return Picture(jpeg.tobytes(), width_px, height_px, caption, overlays)


def project_ground(
    camera: CameraView, points: Float64[np.ndarray, 'n 2']
) -> Float64[np.ndarray, 'm 2']:
    """Pixels of ground points given in `base_link`, cut where the line leaves the near plane."""
    yaw, pitch = math.radians(camera.yaw_deg), math.radians(camera.pitch_deg)
    forward = np.array(
        [
            math.cos(yaw) * math.cos(pitch),
            math.sin(yaw) * math.cos(pitch),
            -math.sin(pitch),
        ]
    )
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    down = np.cross(forward, right)
    mount = np.array([camera.x_m, camera.y_m, camera.z_m])
    offset = np.column_stack([points, np.zeros(len(points))]) - mount
    seen = np.stack([offset @ right, offset @ down, offset @ forward], axis=1)
    seen = _beyond_near_plane(seen)
    depth = seen[:, 2:3]
    middle = np.array([camera.width_px, camera.height_px]) / 2.0
    pixels: Float64[np.ndarray, 'm 2'] = camera.focal_px * seen[:, :2] / depth + middle
    return pixels


def _beyond_near_plane(seen: Float64[np.ndarray, 'n 3']) -> Float64[np.ndarray, 'm 3']:
    """The first stretch in front of the camera, its cut ends put on the near plane."""
    kept: list[Float64[np.ndarray, '3']] = []
    for start, end in pairwise(seen):
        inside = (start[2] >= NEAR_M, end[2] >= NEAR_M)
        if not any(inside):
            if kept:
                break
            continue
        if all(inside):
            kept += [start, end] if not kept else [end]
            continue
        cut = start + (NEAR_M - start[2]) / (end[2] - start[2]) * (end - start)
        kept += [cut, end] if inside[1] else [start, cut] if not kept else [cut]
        if inside[0]:
            break
    return np.array(kept).reshape(-1, 3)


def picture(shot: Picture) -> str:
    """One picture with its overlays."""
    kind = 'png' if shot.data[:4] == b'\x89PNG' else 'jpeg'
    uri = f'data:image/{kind};base64,{base64.b64encode(shot.data).decode()}'
    lines = ''.join(_overlay(line) for line in shot.overlays if len(line.points) > 1)
    caption = f'<figcaption>{escape(shot.caption)}</figcaption>' if shot.caption else ''
    return (
        f'<figure class="picture"><svg viewBox="0 0 {shot.width_px} {shot.height_px}">'
        f'<image href="{uri}" width="{shot.width_px}" height="{shot.height_px}" '
        f'preserveAspectRatio="none"/>{lines}</svg>{caption}</figure>'
    )


def picture_row(pictures: Sequence[Picture]) -> str:
    """The cameras of one moment side by side, in one row."""
    shape = 'trio' if len(pictures) > 1 else 'trio one'
    columns = f' style="grid-template-columns:repeat({len(pictures)},1fr)"'
    return f'<div class="{shape}"{columns}>{"".join(picture(shot) for shot in pictures)}</div>'


def film(frames: Sequence[tuple[str, str]], period_ms: int = 250) -> str:
    """Frames `(label, fragment)` shown one at a time, with a slider and a play button."""
    if not frames:
        return '<p class="remark">No frames were recorded.</p>'
    # Still pages (a print, a thumbnail) show a moment of the drive, not its first instant.
    shown = len(frames) // 3
    body = ''.join(
        f'<div class="frame{" on" if index == shown else ""}" data-label="{escape(label)}">'
        f'{fragment}</div>'
        for index, (label, fragment) in enumerate(frames)
    )
    return (
        f'<div class="film" data-period="{period_ms}">{body}<div class="controls">'
        '<button type="button">Play</button>'
        f'<input type="range" min="0" max="{len(frames) - 1}" value="{shown}" '
        f'aria-label="moment"><output>{escape(frames[shown][0])}</output></div></div>'
    )


def _overlay(line: Overlay) -> str:
    points = ' '.join(f'{x:.1f},{y:.1f}' for x, y in line.points)
    return (
        f'<polyline points="{points}" fill="none" stroke="#fff" stroke-opacity=".55" '
        f'stroke-width="{line.width_px * 1.9:g}" stroke-linejoin="round"/>'
        f'<polyline points="{points}" fill="none" stroke="var(--{line.paint})" '
        f'stroke-width="{line.width_px:g}" stroke-linejoin="round"/>'
    )
