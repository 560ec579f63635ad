"""An OpenDRIVE map as ground for the town's cameras: road surface, sidewalks, painted lines.

Only what lies on the ground is in such a file, so no house, car or light is drawn; and the ground
is flat, so a map that climbs is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from spanvla_ros.town import elements
from spanvla_ros.town.bodies import DASH_M, DASH_PERIOD_M, LINE_HALF_M, Paint
from spanvla_ros.town.elements import Color, GroundPolygon
from spanvla_ros.town.opendrive import Mark, OpenDriveMap, Road, Section
from spanvla_ros.types import SpanvlaError

ROADWAY = (
    'driving', 'stop', 'shoulder', 'parking', 'biking', 'bidirectional',
    'entry', 'exit', 'onRamp', 'offRamp', 'connectingRamp', 'slipLane', 'bus', 'taxi', 'HOV',
)  # fmt: skip
BESIDE = ('sidewalk', 'walking', 'curb', 'median')
STRAIGHT_STEP_M = 15.0
BENT_STEP_M = 2.0
# A little overlap hides the seam that anti-aliased edges would leave.
OVERLAP_M = 0.15
DOUBLE_GAP_M = 0.14

Corners = Float64[np.ndarray, 'n 4 2']


def paint_map(found: OpenDriveMap, paint: Paint) -> tuple[GroundPolygon, ...]:
    """All ground of a map as convex polygons: what lies beside, roadways, then lines.

    Raises:
        SpanvlaError: the map climbs.
    """
    if found.climbs:
        raise SpanvlaError(f'{found.name}: its roads climb; only a flat map is drawn right')
    beside: list[GroundPolygon] = []
    roadways: list[GroundPolygon] = []
    lines: list[GroundPolygon] = []
    for road in found.roads.values():
        for section in road.sections:
            cuts = _cuts(road, section)
            for lane in section.lanes:
                if lane.kind in ROADWAY:
                    roadways += _lane(road, section, lane.number, cuts, paint.road, elements.ROAD)
                elif lane.kind in BESIDE:
                    beside += _lane(road, section, lane.number, cuts, paint.verge, elements.OTHER)
            for number, mark, start_m, end_m in _marks(section):
                lines += _line(road, section, number, mark, (start_m, end_m), paint)
    return (*beside, *roadways, *lines)


def _cuts(road: Road, section: Section) -> Float64[np.ndarray, 'n']:
    """Places to cut a section, so that each piece is nearly straight and convex."""
    breaks = {section.start_m, section.end_m, *(cubic.start_m for cubic in road.offsets)}
    curved = any(cubic.c or cubic.e for cubic in road.offsets)
    for lane in section.lanes:
        breaks |= {section.start_m + cubic.start_m for cubic in lane.widths}
        curved |= any(cubic.c or cubic.e for cubic in lane.widths)
    for start_m, end_m, _ in road.bends_m:
        breaks |= {start_m, end_m}
    inside = sorted(at for at in breaks if section.start_m <= at <= section.end_m)
    cuts = [np.array(inside[:1])]
    for start_m, end_m in itertools.pairwise(inside):
        middle = 0.5 * (start_m + end_m)
        straight = any(low <= middle <= high and line for low, high, line in road.bends_m)
        step_m = STRAIGHT_STEP_M if straight and not curved else BENT_STEP_M
        count = max(1, int(np.ceil((end_m - start_m) / step_m)))
        cuts.append(np.linspace(start_m, end_m, count + 1)[1:])
    return np.concatenate(cuts)


def _lane(
    road: Road,
    section: Section,
    number: int,
    cuts: Float64[np.ndarray, 'n'],
    color: Color,
    class_id: int,
) -> list[GroundPolygon]:
    start, end = cuts[:-1], cuts[1:]
    inner_start, outer_start = road.edges(section, number, start)
    inner_end, outer_end = road.edges(section, number, end)
    corners = [
        road.at(start, inner_start),
        road.at(end + OVERLAP_M, inner_end),
        road.at(end + OVERLAP_M, outer_end),
        road.at(start, outer_start),
    ]
    wide = np.maximum(np.abs(outer_start - inner_start), np.abs(outer_end - inner_end)) > 0.01
    return _polygons(np.stack(corners, axis=1)[wide], color, class_id)


def _marks(section: Section) -> Iterator[tuple[int, Mark, float, float]]:
    """Each painted line with its lane and where it begins and ends."""
    for lane in section.lanes:
        for index, mark in enumerate(lane.marks):
            start_m = section.start_m + mark.start_m
            later = [after.start_m for after in lane.marks[index + 1 :]]
            end_m = min([section.end_m, *(section.start_m + at for at in later)])
            if end_m > start_m:
                yield lane.number, mark, start_m, end_m


def _line(
    road: Road,
    section: Section,
    number: int,
    mark: Mark,
    span_m: tuple[float, float],
    paint: Paint,
) -> list[GroundPolygon]:
    """One line, or the two of a double one; kinds that are no paint, such as curbs, give none."""
    color = paint.divider if mark.color == 'yellow' else paint.line
    kinds = [word for word in mark.kind.replace('botts dots', 'broken').split()
             if word in ('solid', 'broken')]  # fmt: skip
    sides = (0.0,) if len(kinds) == 1 else (-DOUBLE_GAP_M, DOUBLE_GAP_M)
    found: list[GroundPolygon] = []
    for kind, side in zip(kinds, sides, strict=False):
        if kind == 'broken':
            start = np.arange(span_m[0] + 1.0, span_m[1] - DASH_M, DASH_PERIOD_M)
            end = start + DASH_M
        else:
            cuts = _cuts(road, section)
            inside = cuts[(cuts > span_m[0]) & (cuts < span_m[1])]
            cuts = np.concatenate([span_m[:1], inside, span_m[1:]])
            start, end = cuts[:-1], cuts[1:] + OVERLAP_M
        corners = []
        for at, half in ((start, -1.0), (end, -1.0), (end, 1.0), (start, 1.0)):
            edge = road.edges(section, number, at)[1]
            corners.append(road.at(at, edge + side + half * LINE_HALF_M))
        found += _polygons(np.stack(corners, axis=1), color, elements.MARKING)
    return found


def _polygons(corners: Corners, color: Color, class_id: int) -> list[GroundPolygon]:
    return [GroundPolygon(points, color, class_id) for points in corners]
