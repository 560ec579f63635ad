"""What the town's camera draws: flat ground areas, boxes with colored patches, a tint.

Positions are in the world frame, meters; colors are RGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

CLASSES = ('other', 'road', 'marking', 'vehicle', 'brake', 'pedestrian', 'red', 'green')
OTHER, ROAD, MARKING, VEHICLE, BRAKE, PEDESTRIAN, RED, GREEN = range(8)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class GroundPolygon:
    """A flat area on the ground; later polygons of a sequence cover earlier ones."""

    points: Float64[np.ndarray, 'n 2']
    color: Color
    class_id: int


@dataclass(frozen=True)
class Patch:
    """A colored rectangle on one upright face of a box, such as a lamp or a window.

    `left_m` and `right_m` run along the face: positive to the left of the box on its rear and
    front, positive forward on its left and right. `bottom_m` and `top_m` are heights above the
    ground. A lit patch keeps its color in any light.
    """

    face: str
    left_m: float
    right_m: float
    bottom_m: float
    top_m: float
    color: Color
    class_id: int
    lit: bool = False


@dataclass(frozen=True)
class Box:
    """An upright box that stands `base_m` above the ground; faces: rear, front, left, right."""

    x_m: float
    y_m: float
    yaw_rad: float
    length_m: float
    width_m: float
    height_m: float
    color: Color
    class_id: int
    base_m: float = 0.0
    patches: tuple[Patch, ...] = ()


@dataclass(frozen=True)
class Tint:
    """Brightness of the whole picture, and the colors of sky and open ground."""

    gain: float = 1.0
    sky: Color = (160, 190, 220)
    ground: Color = (90, 125, 90)
