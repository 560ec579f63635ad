"""How the town looks: painted ground of a corridor, and boxes for cars, people, lights, houses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spanvla_ros.geometry import world_from_local
from spanvla_ros.town import elements
from spanvla_ros.town.elements import Box, Color, GroundPolygon, Patch
from spanvla_ros.town.roads import (
    CROSSWALK_BEFORE_M,
    LANE_WIDTH_M,
    SHOULDER_M,
    SPACING_M,
    Corridor,
    CrossSection,
    Junction,
)
from spanvla_ros.town.roundabouts import IN_M

WINDOW: Color = (45, 50, 60)
LAMP_DARK: Color = (90, 20, 20)
LAMP_LIT: Color = (255, 30, 20)
HEADLAMP: Color = (250, 250, 220)
INDICATOR: Color = (255, 150, 0)
CONE: Color = (255, 110, 10)
SIGN_RED: Color = (215, 20, 25)
SIGNAL_RED: Color = (255, 20, 20)
SIGNAL_GREEN: Color = (40, 255, 60)
SKINS: tuple[Color, ...] = ((225, 180, 150), (150, 105, 75), (95, 65, 45))
CLOTHES: tuple[Color, ...] = (
    (245, 120, 20), (250, 220, 40), (235, 50, 160),
    (60, 210, 235), (130, 60, 220), (240, 240, 245),
)  # fmt: skip
LINE_HALF_M = 0.09
DASH_M = 3.0
DASH_PERIOD_M = 8.0


@dataclass(frozen=True)
class Paint:
    """Colors of one corridor's ground."""

    road: Color = (85, 85, 88)
    verge: Color = (150, 150, 150)
    line: Color = (235, 235, 235)
    divider: Color = (235, 200, 70)
    divider_dashed: bool = False
    verge_m: float = 2.5


def paint_ground(corridor: Corridor, paint: Paint) -> tuple[GroundPolygon, ...]:
    """All ground of a corridor as convex polygons: verges, road areas, then markings."""
    verges: list[GroundPolygon] = []
    roads: list[GroundPolygon] = []
    marks: list[GroundPolygon] = []
    for stretch in corridor.stretches:
        section = stretch.section
        cuts = _cuts(corridor, stretch.start_m, stretch.end_m)
        low, high = section.right_m, section.left_m
        verge = (low - paint.verge_m, high + paint.verge_m)
        verges += _strips(corridor, cuts, *verge, paint.verge, elements.OTHER)
        roads += _strips(corridor, cuts, low, high, paint.road, elements.ROAD)
        for edge in (low + SHOULDER_M, high - SHOULDER_M):
            marks += _line(corridor, cuts, edge, paint.line)
        marks += _lane_lines(corridor, cuts, section, paint)
    for junction in corridor.junctions:
        roads += [GroundPolygon(area, paint.road, elements.ROAD) for area in junction.areas]
        if junction.ring is not None:
            edge = junction.ring.radius_m - IN_M
            marks += [
                GroundPolygon(area, paint.line, elements.MARKING)
                for area in junction.ring.sectors(edge + 0.2, edge + 0.4)
            ]
        for arm in junction.arms:
            low, high = arm.edges_m
            verges.append(
                GroundPolygon(arm.strip(low - paint.verge_m, high + paint.verge_m),
                              paint.verge, elements.OTHER)
            )  # fmt: skip
            roads.append(GroundPolygon(arm.strip(low, high, -0.2), paint.road, elements.ROAD))
            for d, color in ((low + SHOULDER_M, paint.line), (0.0, paint.divider),
                             (high - SHOULDER_M, paint.line)):  # fmt: skip
                strip = arm.strip(d - LINE_HALF_M, d + LINE_HALF_M, 1.0)
                marks.append(GroundPolygon(strip, color, elements.MARKING))
        marks += _crossing(corridor, junction, paint)
    return (*verges, *roads, *marks)


def _cuts(corridor: Corridor, start_m: float, end_m: float) -> list[float]:
    """Places to cut strips, so that each piece is convex and within 5 cm of the true curve."""
    cuts = [start_m]
    while cuts[-1] < end_m - 0.1:
        at = cuts[-1]
        piece = slice(int(at / SPACING_M), int((at + 15.0) / SPACING_M) + 1)
        bend = float(np.abs(corridor.curvature_per_m[piece]).max(initial=0.0))
        cuts.append(min(end_m, at + min(15.0, max(2.0, math.sqrt(0.4 / max(bend, 1e-4))))))
    return cuts


def _strips(
    corridor: Corridor, cuts: list[float], low: float, high: float, color: Color, kind: int
) -> list[GroundPolygon]:
    start, end = np.array(cuts[:-1]), np.array(cuts[1:])
    # A little overlap hides the seam that anti-aliased edges would leave.
    over = np.minimum(end + 0.15, corridor.length_m)
    corners = [
        corridor.places(s, d)[:, :2]
        for s, d in ((start, low), (over, low), (over, high), (start, high))
    ]
    return [GroundPolygon(points, color, kind) for points in np.stack(corners, axis=1)]


def _line(corridor: Corridor, cuts: list[float], d_m: float, color: Color) -> list[GroundPolygon]:
    return _strips(corridor, cuts, d_m - LINE_HALF_M, d_m + LINE_HALF_M, color, elements.MARKING)


def _lane_lines(
    corridor: Corridor, cuts: list[float], section: CrossSection, paint: Paint
) -> list[GroundPolygon]:
    marks: list[GroundPolygon] = []
    if section.opposing:
        if paint.divider_dashed and section.forward == 1:
            marks += _dashes(corridor, cuts, section.divider_m, paint.divider)
        else:
            marks += _line(corridor, cuts, section.divider_m, paint.divider)
    inner = [
        section.right_m + SHOULDER_M + LANE_WIDTH_M * (lane + 1)
        for lane in range(section.forward + section.opposing - 1)
    ]
    for d in inner:
        if abs(d - section.divider_m) > 0.1:
            marks += _dashes(corridor, cuts, d, paint.line)
    return marks


def _dashes(
    corridor: Corridor, cuts: list[float], d_m: float, color: Color
) -> list[GroundPolygon]:
    start = np.arange(cuts[0] + 1.0, cuts[-1] - DASH_M, DASH_PERIOD_M)
    corners = [
        corridor.places(start + ahead, d_m + side)[:, :2]
        for ahead, side in ((0.0, -LINE_HALF_M), (DASH_M, -LINE_HALF_M),
                            (DASH_M, LINE_HALF_M), (0.0, LINE_HALF_M))
    ]  # fmt: skip
    return [GroundPolygon(points, color, elements.MARKING) for points in np.stack(corners, axis=1)]


def _crossing(corridor: Corridor, junction: Junction, paint: Paint) -> list[GroundPolygon]:
    section = corridor.section_at(junction.start_m - 0.1)
    low, high = section.right_m + SHOULDER_M, section.left_m - SHOULDER_M
    marks = []
    if junction.signal:
        marks.append(corridor.band(junction.stop_m, junction.stop_m + 0.5, low, section.divider_m))
    marks += [
        corridor.band(
            junction.start_m - CROSSWALK_BEFORE_M[0],
            junction.start_m - CROSSWALK_BEFORE_M[1],
            d,
            d + 0.5,
        )
        for d in np.arange(low + 0.3, high - 0.6, 1.0)
    ]
    return [GroundPolygon(points, paint.line, elements.MARKING) for points in marks]


def zebra(corridor: Corridor, s_m: float, paint: Paint) -> list[GroundPolygon]:
    """A crosswalk with its middle at `s_m`."""
    section = corridor.section_at(s_m)
    low, high = section.right_m + SHOULDER_M, section.left_m - SHOULDER_M
    return [
        GroundPolygon(
            corridor.band(s_m - 1.5, s_m + 1.5, d, d + 0.5, 3.0), paint.line, elements.MARKING
        )
        for d in np.arange(low + 0.3, high - 0.6, 1.0)
    ]


def car(
    pose: tuple[float, float, float],
    size: tuple[float, float, float],
    color: Color,
    *,
    braking: bool,
    blinks: int = 0,
) -> Box:
    """A car by its center pose and length, width, height; braking lights its rear lamps.

    `blinks`: 1 lights the indicators of its left side, -1 those of its right.
    """
    length, width, height = size
    half = width / 2
    rear, lamp = (LAMP_LIT, elements.BRAKE) if braking else (LAMP_DARK, elements.VEHICLE)
    patches = [
        Patch('rear', side * half * 0.95, side * half * 0.45, 0.7, 1.1, rear, lamp, lit=braking)
        for side in (1, -1)
    ]
    patches += [
        Patch('front', side * half * 0.9, side * half * 0.5, 0.6, 0.9, HEADLAMP, elements.VEHICLE)
        for side in (1, -1)
    ]
    patches += [
        Patch(face, half * 0.8, -half * 0.8, 1.12, height - 0.12, WINDOW, elements.VEHICLE)
        for face in ('rear', 'front')
    ]
    patches += [
        Patch(face, length * 0.3, -length * 0.3, 1.05, height - 0.12, WINDOW, elements.VEHICLE)
        for face in ('left', 'right')
    ]
    if blinks:
        edge = blinks * half
        patches += [
            Patch('rear', max(edge, 0.5 * edge), min(edge, 0.5 * edge), 1.12, 1.4, INDICATOR,
                  elements.VEHICLE, lit=True),
            Patch('left' if blinks > 0 else 'right', length * 0.5, length * 0.4, 0.7, 1.0,
                  INDICATOR, elements.VEHICLE, lit=True),
        ]  # fmt: skip
    return Box(*pose, length, width, height - 0.25, color, elements.VEHICLE, 0.25, tuple(patches))


def person(
    pose: tuple[float, float, float], shirt: Color, trousers: Color, skin: Color
) -> tuple[Box, ...]:
    """A stout pedestrian facing along the pose; the rucksack shows which way it walks."""
    kind = elements.PEDESTRIAN
    pack = world_from_local(pose, [-0.38, 0.0])
    head = world_from_local(pose, [0.08, 0.0])
    return (
        Box(*pose, 0.55, 0.6, 0.85, trousers, kind, 0.0),
        Box(*pose, 0.55, 0.7, 0.7, shirt, kind, 0.85),
        Box(float(pack[0]), float(pack[1]), pose[2], 0.25, 0.5, 0.5, (40, 40, 45), kind, 0.95),
        Box(float(head[0]), float(head[1]), pose[2], 0.36, 0.36, 0.35, skin, kind, 1.55),
    )


def signal(pose: tuple[float, float, float], *, red: bool) -> tuple[Box, ...]:
    """A traffic light on a pole; `pose` faces along the traffic, which sees its rear face.

    It hangs low: a car waiting at the line, 6 m before it, must still have red in its picture.
    """
    lamps = (
        Patch('rear', 0.4, -0.4, 2.4, 3.05, SIGNAL_RED if red else (60, 25, 25),
              elements.RED if red else elements.OTHER, lit=red),
        Patch('rear', 0.4, -0.4, 1.65, 2.3, (25, 60, 30) if red else SIGNAL_GREEN,
              elements.OTHER if red else elements.GREEN, lit=not red),
    )  # fmt: skip
    return (
        Box(*pose, 0.2, 0.2, 1.6, (70, 70, 70), elements.OTHER),
        Box(*pose, 0.3, 1.0, 1.5, (25, 25, 25), elements.OTHER, 1.6, lamps),
    )


def stop_sign(pose: tuple[float, float, float]) -> tuple[Box, ...]:
    """An octagonal stop sign on a pole, as large and low as a signal's lamps; faces as theirs."""
    sign = elements.RED
    face = (
        Patch('rear', 0.35, -0.35, 1.6, 1.85, SIGN_RED, sign),
        Patch('rear', 0.6, -0.6, 1.85, 2.55, SIGN_RED, sign),
        Patch('rear', 0.35, -0.35, 2.55, 2.8, SIGN_RED, sign),
        Patch('rear', 0.45, -0.45, 2.1, 2.3, (245, 245, 245), elements.OTHER),
    )
    return (Box(*pose, 0.15, 0.15, 2.8, (120, 120, 120), elements.OTHER, 0.0, face),)


def cone(pose: tuple[float, float, float]) -> Box:
    """A large traffic cone with a white collar."""
    collar = tuple(
        Patch(face, 0.25, -0.25, 0.45, 0.65, (245, 245, 245), elements.OTHER)
        for face in ('rear', 'front', 'left', 'right')
    )
    return Box(*pose, 0.45, 0.45, 0.95, CONE, elements.OTHER, 0.0, collar)


def barrier(pose: tuple[float, float, float], width_m: float) -> Box:
    """A striped board across a closed lane; its rear faces the traffic."""
    count = max(2, round(width_m / 0.5))
    edges = np.linspace(width_m / 2, -width_m / 2, count + 1).tolist()
    stripes = tuple(
        Patch(face, edges[i], edges[i + 1], 0.5, 1.2,
              SIGN_RED if i % 2 == 0 else (245, 245, 245), elements.OTHER)
        for i in range(count)
        for face in ('rear', 'front')
    )  # fmt: skip
    return Box(*pose, 0.4, width_m, 1.25, CONE, elements.OTHER, 0.0, stripes)


def house(pose: tuple[float, float, float], size: tuple[float, float, float], color: Color) -> Box:
    """A building by its center pose and length, width, height."""
    return Box(*pose, *size, color, elements.OTHER)
