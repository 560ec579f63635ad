"""The town's cameras: flat-colored polygons drawn with numpy and OpenCV, nothing else.

Painter's order: the ground in the order given, then the boxes from the hidden to the hiding one.
All geometry of a picture runs through one packed array of polygons, so that the cost is that of
the OpenCV fills. No window system, no GPU, no random number: the same pixels on every machine.

Pixel coordinates follow OpenCV: (0, 0) is the middle of the top-left pixel, so the principal
point, the middle of the picture, lies at ((width - 1) / 2, (height - 1) / 2). A mirrored world
gives the mirrored picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float64, UInt8

from spanvla_ros.geometry import ArrayLike
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.elements import MARKING, OTHER, ROAD, Box, GroundPolygon, Tint
from spanvla_ros.town.polygons import (
    Polygons,
    clip,
    following_corners,
    joined,
    pack_ground,
    select,
)
from spanvla_ros.town.solids import Solids

NEAR_M = 0.3
SHIFT = 4
# Fills are clipped a little outside the view: the edge of the cut must not be seen.
SIDE_MARGIN = 1.25
FULL_MARKING_PX = 0.8
FAINTEST = 0.12

Outline = np.ndarray


@dataclass(frozen=True)
class View:
    """A camera in the world: optical center, its forward, left and up directions, intrinsics."""

    center: Float64[np.ndarray, '3']
    axes: Float64[np.ndarray, '3 3']
    focal_px: float
    width_px: int
    height_px: int


def camera_matrix(camera: CameraSpec) -> Float64[np.ndarray, '3 3']:
    """The 3x3 intrinsic matrix, principal point in the middle of the picture."""
    focal = camera.focal_px
    return np.array(
        [
            [focal, 0.0, (camera.width_px - 1) / 2.0],
            [0.0, focal, (camera.height_px - 1) / 2.0],
            [0.0, 0.0, 1.0],
        ]
    )


def view_of(camera: CameraSpec, base_link_pose: ArrayLike = (0.0, 0.0, 0.0)) -> View:
    """The camera's place in the frame in which `base_link_pose` is given.

    Yaw turns counter-clockwise; pitch, a right-handed turn about the left axis, looks down.
    """
    x, y, yaw = (float(value) for value in np.asarray(base_link_pose, dtype=np.float64))
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = yaw + math.radians(camera.yaw_deg)
    ct, st = math.cos(turn), math.sin(turn)
    pitch = math.radians(camera.pitch_deg)
    cp, sp = math.cos(pitch), math.sin(pitch)
    center = np.array(
        [
            x + cos * camera.x_m - sin * camera.y_m,
            y + sin * camera.x_m + cos * camera.y_m,
            camera.z_m,
        ]
    )
    axes = np.array([[cp * ct, cp * st, -sp], [-st, ct, 0.0], [sp * ct, sp * st, cp]])
    return View(center, axes, camera.focal_px, camera.width_px, camera.height_px)


def project(
    points_base_link: ArrayLike, camera: CameraSpec
) -> tuple[Float64[np.ndarray, 'n 2'], Bool[np.ndarray, ' n']]:
    """Pixels of points given in `base_link`, and which of them lie in front of the camera.

    Args:
        points_base_link: `[n, 3]` points, or `[n, 2]` points on the ground, in meters.
        camera: the camera.

    Returns:
        `[n, 2]` columns u, v (not limited to the picture; meaningless where not in front), and
        `[n]` true where the point is beyond the near plane.
    """
    points = np.atleast_2d(np.asarray(points_base_link, dtype=np.float64))
    if points.shape[1] == 2:
        points = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
    view = view_of(camera)
    local = _camera_from_world(view, points)
    in_front = local[:, 0] >= NEAR_M
    safe = np.where(in_front, local[:, 0], 1.0)
    return _pixels(view, np.column_stack([safe, local[:, 1:]])), in_front


class Renderer:
    """Draws the town for a fixed set of cameras of one picture size.

    A ground tuple seen before is not packed again, so hand in the same object each time.
    """

    def __init__(self, cameras: Sequence[CameraSpec]) -> None:
        """Draw for `cameras`, in this order; all must have the same size in pixels."""
        cv2.setNumThreads(1)
        self.cameras = tuple(cameras)
        sizes = {(camera.height_px, camera.width_px) for camera in self.cameras}
        if len(sizes) != 1:
            raise ValueError(f'cameras of one renderer must share one size, not {sorted(sizes)}')
        self.height_px, self.width_px = sizes.pop()
        self._horizon = [_horizon_row(camera) for camera in self.cameras]
        self._ground: Sequence[GroundPolygon] | None = None
        self._packed = pack_ground(())
        self._road_color = np.zeros(3)

    def draw(
        self,
        ground: Sequence[GroundPolygon],
        boxes: Sequence[Box],
        tint: Tint,
        base_link_pose: ArrayLike,
    ) -> UInt8[np.ndarray, 'c h w 3']:
        """RGB pictures of all cameras, of a world seen from `base_link_pose` in its frame."""
        images = self._blank_images()
        for index, polygons, outlines in self._visible(ground, boxes, base_link_pose):
            _paint(images[index], polygons, outlines, self._horizon[index], tint)
        return images

    def draw_classes(
        self, ground: Sequence[GroundPolygon], boxes: Sequence[Box], base_link_pose: ArrayLike
    ) -> UInt8[np.ndarray, 'c h w']:
        """The class id of every pixel of the same pictures, edges not blended."""
        classes = self._blank_classes()
        for index, polygons, outlines in self._visible(ground, boxes, base_link_pose):
            _paint_classes(classes[index], polygons, outlines)
        return classes

    def draw_both(
        self,
        ground: Sequence[GroundPolygon],
        boxes: Sequence[Box],
        tint: Tint,
        base_link_pose: ArrayLike,
    ) -> tuple[UInt8[np.ndarray, 'c h w 3'], UInt8[np.ndarray, 'c h w']]:
        """`draw` and `draw_classes` for the price of one projection."""
        images, classes = self._blank_images(), self._blank_classes()
        for index, polygons, outlines in self._visible(ground, boxes, base_link_pose):
            _paint(images[index], polygons, outlines, self._horizon[index], tint)
            _paint_classes(classes[index], polygons, outlines)
        return images, classes

    def _faded(
        self, polygons: Polygons, pixels: Float64[np.ndarray, 'n 2']
    ) -> tuple[Polygons, Float64[np.ndarray, 'm 2']]:
        """Markings thinner than a pixel, mixed with the road below them or left out.

        An anti-aliased fill is never thinner than a pixel: far lines would cover the road.
        """
        marking = polygons.class_ids == MARKING
        if not marking.any():
            return polygons, pixels
        share = np.minimum(_thickness_px(polygons, pixels) / FULL_MARKING_PX, 1.0)
        share = np.where(marking, share, 1.0)
        keep = share > FAINTEST
        mixed = share[:, None] * polygons.colors + (1.0 - share)[:, None] * self._road_color
        counts = np.diff(np.append(polygons.start, len(pixels)))
        polygons = select(replace(polygons, colors=mixed), polygons.points, keep)
        return polygons, pixels[np.repeat(keep, counts)]

    def _blank_images(self) -> UInt8[np.ndarray, 'c h w 3']:
        return np.empty((len(self.cameras), self.height_px, self.width_px, 3), np.uint8)

    def _blank_classes(self) -> UInt8[np.ndarray, 'c h w']:
        return np.full((len(self.cameras), self.height_px, self.width_px), OTHER, np.uint8)

    def _visible(
        self, ground: Sequence[GroundPolygon], boxes: Sequence[Box], base_link_pose: ArrayLike
    ) -> Iterator[tuple[int, Polygons, list[Outline]]]:
        if self._ground is not ground:
            self._packed = pack_ground(ground)
            self._road_color = _mean_color(self._packed, ROAD)
            # A list could change behind our back, so only a tuple is remembered.
            self._ground = ground if isinstance(ground, tuple) else None
        solids = Solids(boxes)
        faces: dict[tuple[float, ...], Polygons] = {}
        for index, camera in enumerate(self.cameras):
            view = view_of(camera, base_link_pose)
            key = tuple(view.center.tolist())
            if key not in faces:
                faces[key] = solids.faces_towards(view.center)
            polygons = _clipped(
                joined(_reaching(self._packed, view), _reaching(faces[key], view)), view
            )
            pixels = _pixels(view, polygons.points)
            polygons, pixels = self._faded(polygons, pixels)
            yield index, polygons, _outlines(polygons, pixels)


def _camera_from_world(view: View, points: Float64[np.ndarray, 'n 3']) -> np.ndarray:
    # Written out instead of a matrix product: BLAS rounds differently from machine to machine.
    dx, dy, dz = (points - view.center).T
    (fx, fy, fz), (lx, ly, _), (ux, uy, uz) = view.axes.tolist()
    return np.stack(
        [fx * dx + fy * dy + fz * dz, lx * dx + ly * dy, ux * dx + uy * dy + uz * dz], axis=1
    )


def _pixels(view: View, local: Float64[np.ndarray, 'n 3']) -> Float64[np.ndarray, 'n 2']:
    scale = view.focal_px / local[:, 0]
    return np.stack(
        [
            0.5 * (view.width_px - 1) - scale * local[:, 1],
            0.5 * (view.height_px - 1) - scale * local[:, 2],
        ],
        axis=1,
    )


def _half_spans(view: View) -> tuple[float, float]:
    """Tangents of the half angles of view, a pixel wider than the picture."""
    return (
        (0.5 * view.width_px + 1.0) / view.focal_px,
        (0.5 * view.height_px + 1.0) / view.focal_px,
    )


def _reaching(polygons: Polygons, view: View) -> Polygons:
    """Polygons of the world that can reach the picture, now in camera axes."""
    if not len(polygons.start):
        return polygons
    local = _camera_from_world(view, polygons.points)
    depth, left, up = local.T
    wide, high = _half_spans(view)
    across, down = depth * wide, depth * high
    sides = np.stack([depth - NEAR_M, across - left, across + left, down - up, down + up])
    within = np.maximum.reduceat(sides, polygons.start, axis=1) > 0.0
    reaches = np.asarray(within.all(axis=0))
    return select(polygons, local, reaches)


def _clipped(polygons: Polygons, view: View) -> Polygons:
    span = _half_spans(view)[0] * SIDE_MARGIN
    polygons = clip(polygons, (1.0, 0.0, 0.0), -NEAR_M)
    polygons = clip(polygons, (span, -1.0, 0.0), 0.0)
    return clip(polygons, (span, 1.0, 0.0), 0.0)


def _thickness_px(
    polygons: Polygons, pixels: Float64[np.ndarray, 'n 2']
) -> Float64[np.ndarray, ' p']:
    """How wide each polygon is across its long side, by its area and outline."""
    edge = pixels[following_corners(polygons)] - pixels
    twice_area = pixels[:, 0] * edge[:, 1] - pixels[:, 1] * edge[:, 0]
    area = 0.5 * np.abs(np.add.reduceat(twice_area, polygons.start))
    outline = np.add.reduceat(np.sqrt((edge**2).sum(axis=1)), polygons.start)
    return 2.0 * area / np.maximum(outline, 1e-9)


def _mean_color(polygons: Polygons, class_id: int) -> Float64[np.ndarray, '3']:
    chosen = polygons.colors[polygons.class_ids == class_id]
    return chosen.mean(axis=0) if len(chosen) else np.zeros(3)


def _outlines(polygons: Polygons, pixels: Float64[np.ndarray, 'n 2']) -> list[Outline]:
    """Each polygon's corners in fixed-point pixels, as OpenCV's fills take them."""
    corners = np.rint(pixels * (1 << SHIFT)).astype(np.int32)
    start = polygons.start.tolist()
    return [corners[i:j] for i, j in zip(start, [*start, len(corners)][1:], strict=True)]


def _horizon_row(camera: CameraSpec) -> int:
    row = 0.5 * (camera.height_px - 1) - camera.focal_px * math.tan(math.radians(camera.pitch_deg))
    return min(max(math.ceil(row), 0), camera.height_px)


def _shown(color: ArrayLike, gain: ArrayLike) -> np.ndarray:
    scaled = np.asarray(color, dtype=np.float64) * np.asarray(gain)
    return np.asarray(np.rint(np.clip(scaled, 0.0, 255.0)))


def _paint(
    image: UInt8[np.ndarray, 'h w 3'],
    polygons: Polygons,
    outlines: list[Outline],
    horizon_row: int,
    tint: Tint,
) -> None:
    image[:horizon_row] = _shown(tint.sky, tint.gain)
    image[horizon_row:] = _shown(tint.ground, tint.gain)
    gain = np.where(polygons.lit, 1.0, tint.gain)[:, None]
    colors = _shown(polygons.colors, gain).tolist()
    for outline, color, convex in zip(outlines, colors, polygons.convex.tolist(), strict=True):
        if convex:
            cv2.fillConvexPoly(image, outline, color, cv2.LINE_AA, SHIFT)
        else:
            cv2.fillPoly(image, [outline], color, cv2.LINE_AA, SHIFT)


def _paint_classes(
    classes: UInt8[np.ndarray, 'h w'], polygons: Polygons, outlines: list[Outline]
) -> None:
    ids, convex = polygons.class_ids.tolist(), polygons.convex.tolist()
    for outline, class_id, is_convex in zip(outlines, ids, convex, strict=True):
        if is_convex:
            cv2.fillConvexPoly(classes, outline, class_id, cv2.LINE_8, SHIFT)
        else:
            cv2.fillPoly(classes, [outline], class_id, cv2.LINE_8, SHIFT)
