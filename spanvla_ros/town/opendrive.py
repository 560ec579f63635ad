"""A small OpenDRIVE reader: roads of lines, arcs, spirals and cubics, their lanes and links.

What it does not know (superelevation, lane borders, other shapes) is refused with one sentence,
not skipped: a map that is nearly right would be drawn as if it were right. Elevation is kept only
as whether there is any. Coordinates are the map's own: x east, y north, in meters, as CARLA's
ros-bridge has them in `map`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float64

from spanvla_ros.types import SpanvlaError

# Nodes and weights on [-1, 1]: exact enough for a spiral that turns by a few full circles.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
MPS_OF_UNIT = {'m/s': 1.0, 'mph': 0.44704, 'km/h': 1.0 / 3.6}
CURVE_STEP_M = 0.05


@dataclass(frozen=True)
class Cubic:
    """`a + b d + c d^2 + e d^3` with `d` counted from `start_m`."""

    start_m: float
    a: float
    b: float
    c: float
    e: float


@dataclass(frozen=True)
class Shape:
    """One piece of a reference line: kind, where it starts, and the numbers of its kind.

    `line` has none, `arc` its curvature, `spiral` its curvatures at both ends, `poly3` the four
    of v(u), `paramPoly3` the four of u(p), the four of v(p) and the largest p.
    """

    kind: str
    start_m: float
    length_m: float
    x_m: float
    y_m: float
    yaw_rad: float
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mark:
    """The painted line on a lane's outer edge, or on the road's middle, from `start_m` on."""

    start_m: float
    kind: str
    color: str


@dataclass(frozen=True)
class Lane:
    """One lane of a section; positive numbers lie left of the reference line, 0 on it."""

    number: int
    kind: str
    widths: tuple[Cubic, ...]
    marks: tuple[Mark, ...]
    predecessor: int | None = None
    successor: int | None = None


@dataclass(frozen=True)
class Section:
    """The lanes of a road from `start_m` to `end_m`, from the rightmost to the leftmost."""

    start_m: float
    end_m: float
    lanes: tuple[Lane, ...]

    def lane(self, number: int) -> Lane | None:
        """The lane of that number."""
        return next((lane for lane in self.lanes if lane.number == number), None)


@dataclass(frozen=True)
class Link:
    """What a road joins: a `road` at its `start` or `end`, or a `junction`."""

    kind: str
    road_id: str
    contact: str = ''


@dataclass(frozen=True)
class Connection:
    """A way into a junction: from a road, through a connecting road entered at `contact`."""

    incoming: str
    connecting: str
    contact: str
    lanes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Road:
    """One road: reference line, lane offsets, sections, links, speed limit."""

    road_id: str
    length_m: float
    junction: str
    shapes: tuple[Shape, ...]
    offsets: tuple[Cubic, ...]
    sections: tuple[Section, ...]
    predecessor: Link | None = None
    successor: Link | None = None
    speed_mps: float | None = None
    keeps_left: bool = False

    def poses(self, s_m: Float64[np.ndarray, 'n']) -> Float64[np.ndarray, 'n 3']:
        """Poses on the reference line."""
        starts = np.array([shape.start_m for shape in self.shapes])
        piece = np.clip(np.searchsorted(starts, s_m, side='right') - 1, 0, len(starts) - 1)
        out = np.empty((len(s_m), 3))
        for index in np.unique(piece):
            chosen = piece == index
            shape = self.shapes[index]
            out[chosen] = _shape_poses(shape, s_m[chosen] - shape.start_m)
        return out

    def at(
        self, s_m: Float64[np.ndarray, 'n'], d_m: Float64[np.ndarray, 'n']
    ) -> Float64[np.ndarray, 'n 2']:
        """Places `d_m` to the left of the reference line."""
        poses = self.poses(s_m)
        return np.stack(
            [poses[:, 0] - np.sin(poses[:, 2]) * d_m, poses[:, 1] + np.cos(poses[:, 2]) * d_m],
            axis=1,
        )

    def edges(
        self, section: Section, number: int, s_m: Float64[np.ndarray, 'n']
    ) -> tuple[Float64[np.ndarray, 'n'], Float64[np.ndarray, 'n']]:
        """Offsets of a lane's inner and outer edge; both that of the middle for number 0."""
        inner = _cubic_values(self.offsets, s_m)
        sign = 1 if number > 0 else -1
        local = s_m - section.start_m
        for step in range(1, abs(number)):
            lane = section.lane(sign * step)
            if lane is not None:
                inner = inner + sign * _cubic_values(lane.widths, local)
        lane = section.lane(number)
        if lane is None or not number:
            return inner, inner
        return inner, inner + sign * _cubic_values(lane.widths, local)

    def center(
        self, section: Section, number: int, s_m: Float64[np.ndarray, 'n']
    ) -> Float64[np.ndarray, 'n 2']:
        """Places in the middle of a lane."""
        inner, outer = self.edges(section, number, s_m)
        return self.at(s_m, 0.5 * (inner + outer))

    def drives_forward(self, number: int) -> bool:
        """Whether a lane is driven along the reference line."""
        return (number < 0) != self.keeps_left

    @cached_property
    def bends_m(self) -> tuple[tuple[float, float, bool], ...]:
        """Start, end and straightness of each piece of the reference line."""
        return tuple((s.start_m, s.start_m + s.length_m, s.kind == 'line') for s in self.shapes)


@dataclass(frozen=True)
class OpenDriveMap:
    """A read map; `climbs` where a road has any elevation or grade."""

    name: str
    roads: dict[str, Road]
    connections: dict[str, tuple[Connection, ...]]
    climbs: bool


def load_opendrive(path: str | Path) -> OpenDriveMap:
    """Read an `.xodr` file.

    Raises:
        SpanvlaError: no such file, not OpenDRIVE, or something this reader does not know.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise SpanvlaError(f'{path}: {error.strerror}; name an .xodr file') from error
    except UnicodeDecodeError as error:
        raise SpanvlaError(f'{path.name}: not a text in UTF-8; name an .xodr file') from error
    if '<!DOCTYPE' in text or '<!ENTITY' in text:
        raise SpanvlaError(f'{path.name}: holds a DOCTYPE, which no OpenDRIVE file needs')
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise SpanvlaError(f'{path.name}: not XML ({error})') from error
    if root.tag != 'OpenDRIVE':
        raise SpanvlaError(f'{path.name}: an XML file of {root.tag!r:.40}, not of OpenDRIVE')
    try:
        roads = [_road(element) for element in root.iter('road')]
        connections = {
            _text(element, 'id'): tuple(_connection(item) for item in element.iter('connection'))
            for element in root.iter('junction')
        }
    except SpanvlaError as error:
        raise SpanvlaError(f'{path.name}: {error}') from error
    if not roads:
        raise SpanvlaError(f'{path.name}: no road in it')
    climbs = any(
        abs(_number(item, key)) > 1e-6 for item in root.iter('elevation') for key in 'abcd'
    )
    return OpenDriveMap(path.stem, {road.road_id: road for road in roads}, connections, climbs)


# Parsing.


def _text(element: ElementTree.Element, name: str) -> str:
    value = element.get(name)
    if value is None:
        raise SpanvlaError(f'<{element.tag}> without {name}')
    return value


def _number(element: ElementTree.Element, name: str) -> float:
    try:
        value = float(_text(element, name))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpanvlaError(f'<{element.tag}> with {name}={element.get(name)!r:.40}, not a number')
    return value


def _road(element: ElementTree.Element) -> Road:
    road_id = _text(element, 'id')
    try:
        return _read_road(element, road_id)
    except SpanvlaError as error:
        raise SpanvlaError(f'road {road_id}: {error}') from error


def _read_road(element: ElementTree.Element, road_id: str) -> Road:
    for lateral in element.iter('lateralProfile'):
        for item in lateral:
            if item.tag == 'shape' or any(abs(_number(item, key)) > 1e-9 for key in 'abcd'):
                raise SpanvlaError(f'<{item.tag}> is not read; flatten the road')
    shapes = tuple(_shape(item) for item in element.findall('planView/geometry'))
    if not shapes:
        raise SpanvlaError('no geometry')
    length_m = _number(element, 'length')
    starts = [_number(item, 's') for item in element.findall('lanes/laneSection')]
    ends = [*starts[1:], length_m]
    sections = tuple(
        Section(start_m, end_m, _lanes(item))
        for item, start_m, end_m in zip(
            element.findall('lanes/laneSection'), starts, ends, strict=True
        )
        if end_m - start_m > 1e-6
    )
    return Road(
        road_id,
        length_m,
        element.get('junction', '-1'),
        shapes,
        _cubics(element.findall('lanes/laneOffset'), 's'),
        sections,
        _link(element.find('link/predecessor')),
        _link(element.find('link/successor')),
        _speed(element),
        element.get('rule', 'RHT') == 'LHT',
    )


def _shape(element: ElementTree.Element) -> Shape:
    inner = [item for item in element if item.tag != 'userData']
    if len(inner) != 1:
        raise SpanvlaError(f'a geometry of {len(inner)} shapes; one is expected')
    item = inner[0]
    if item.tag == 'line':
        numbers: tuple[float, ...] = ()
    elif item.tag == 'arc':
        numbers = (_number(item, 'curvature'),)
    elif item.tag == 'spiral':
        numbers = (_number(item, 'curvStart'), _number(item, 'curvEnd'))
    elif item.tag == 'poly3':
        numbers = tuple(_number(item, key) for key in 'abcd')
    elif item.tag == 'paramPoly3':
        keys = [f'{letter}{axis}' for axis in 'UV' for letter in 'abcd']
        numbers = tuple(_number(item, key) for key in keys)
        by_length = item.get('pRange', 'normalized') == 'arcLength'
        numbers = (*numbers, _number(element, 'length') if by_length else 1.0)
    else:
        raise SpanvlaError(
            f'<{item.tag}> is not read; known are line, arc, spiral, poly3 and paramPoly3'
        )
    start_m, length_m, x_m, y_m, yaw_rad = (
        _number(element, key) for key in ('s', 'length', 'x', 'y', 'hdg')
    )
    return Shape(item.tag, start_m, length_m, x_m, y_m, yaw_rad, numbers)


def _lanes(element: ElementTree.Element) -> tuple[Lane, ...]:
    lanes = []
    for item in element.iter('lane'):
        if item.find('border') is not None:
            raise SpanvlaError('a lane with <border> is not read; give its width')
        number = round(_number(item, 'id'))
        marks = tuple(
            Mark(_number(mark, 'sOffset'), mark.get('type', 'none'), mark.get('color', 'standard'))
            for mark in item.findall('roadMark')
        )
        ends = [
            None if end is None else round(_number(end, 'id'))
            for end in (item.find('link/predecessor'), item.find('link/successor'))
        ]
        widths = _cubics(item.findall('width'), 'sOffset')
        lanes.append(Lane(number, item.get('type', 'none'), widths, marks, *ends))
    return tuple(sorted(lanes, key=lambda lane: lane.number))


def _cubics(elements: list[ElementTree.Element], start: str) -> tuple[Cubic, ...]:
    return tuple(
        Cubic(_number(item, start), *(_number(item, key) for key in 'abcd')) for item in elements
    )


def _link(element: ElementTree.Element | None) -> Link | None:
    if element is None:
        return None
    contact = element.get('contactPoint', '')
    return Link(_text(element, 'elementType'), _text(element, 'elementId'), contact)


def _connection(element: ElementTree.Element) -> Connection:
    lanes = tuple(
        (round(_number(item, 'from')), round(_number(item, 'to')))
        for item in element.findall('laneLink')
    )
    return Connection(
        _text(element, 'incomingRoad'),
        _text(element, 'connectingRoad'),
        element.get('contactPoint', 'start'),
        lanes,
    )


def _speed(element: ElementTree.Element) -> float | None:
    speed = element.find('type/speed')
    if speed is None or speed.get('max') in (None, 'no limit', 'undefined'):
        return None
    unit = speed.get('unit', 'm/s')
    if unit not in MPS_OF_UNIT:
        raise SpanvlaError(f'a speed in {unit!r:.20}; known are {", ".join(MPS_OF_UNIT)}')
    return _number(speed, 'max') * MPS_OF_UNIT[unit]


# Geometry.


def _cubic_values(
    cubics: tuple[Cubic, ...], at_m: Float64[np.ndarray, 'n']
) -> Float64[np.ndarray, 'n']:
    """A piecewise cubic; 0 where there is none."""
    if not cubics:
        return np.zeros(len(at_m))
    table = np.array([(c.start_m, c.a, c.b, c.c, c.e) for c in cubics])
    # The first piece also serves what a rounding error puts before it.
    row = table[np.clip(np.searchsorted(table[:, 0], at_m, side='right') - 1, 0, len(table) - 1)]
    d = at_m - row[:, 0]
    return np.asarray(row[:, 1] + d * (row[:, 2] + d * (row[:, 3] + d * row[:, 4])))


def _shape_poses(shape: Shape, s_m: Float64[np.ndarray, 'n']) -> Float64[np.ndarray, 'n 3']:
    """Poses along one shape: its own frame first, then placed."""
    if shape.kind == 'line':
        local = np.stack([s_m, np.zeros_like(s_m), np.zeros_like(s_m)], axis=1)
    elif shape.kind in ('arc', 'spiral'):
        local = _clothoid(shape, s_m)
    else:
        local = _polynomial(shape, s_m)
    cos, sin = math.cos(shape.yaw_rad), math.sin(shape.yaw_rad)
    return np.stack(
        [
            shape.x_m + cos * local[:, 0] - sin * local[:, 1],
            shape.y_m + sin * local[:, 0] + cos * local[:, 1],
            shape.yaw_rad + local[:, 2],
        ],
        axis=1,
    )


def _clothoid(shape: Shape, s_m: Float64[np.ndarray, 'n']) -> Float64[np.ndarray, 'n 3']:
    """Curvature linear in length; an arc is the case without change. Gauss-Legendre."""
    first, last = shape.numbers[0], shape.numbers[-1]
    rate = (last - first) / max(shape.length_m, 1e-9)
    u = 0.5 * s_m[:, None] * (1.0 + _NODES)
    yaw = u * (first + 0.5 * rate * u)
    half = 0.5 * s_m
    return np.stack(
        [
            half * (np.cos(yaw) * _WEIGHTS).sum(axis=1),
            half * (np.sin(yaw) * _WEIGHTS).sum(axis=1),
            s_m * (first + 0.5 * rate * s_m),
        ],
        axis=1,
    )


def _polynomial(shape: Shape, s_m: Float64[np.ndarray, 'n']) -> Float64[np.ndarray, 'n 3']:
    """Cubics by their own parameter, which is looked up by length along the curve."""
    u_of: tuple[float, ...]
    if shape.kind == 'poly3':
        u_of, v_of, most = (0.0, 1.0, 0.0, 0.0), shape.numbers, shape.length_m
    else:
        u_of, v_of, most = shape.numbers[:4], shape.numbers[4:8], shape.numbers[8]
    count = max(32, math.ceil(shape.length_m / CURVE_STEP_M)) + 1
    p = np.linspace(0.0, most, count)
    du, dv = _slope(u_of, p), _slope(v_of, p)
    speed = np.hypot(du, dv)
    along = np.concatenate([[0.0], np.cumsum(0.5 * (speed[1:] + speed[:-1]) * np.diff(p))])
    at = np.interp(s_m, along, p)
    yaw = np.arctan2(_slope(v_of, at), _slope(u_of, at))
    return np.stack([_value(u_of, at), _value(v_of, at), yaw], axis=1)


def _value(of: tuple[float, ...], p: np.ndarray) -> np.ndarray:
    return np.asarray(of[0] + p * (of[1] + p * (of[2] + p * of[3])))


def _slope(of: tuple[float, ...], p: np.ndarray) -> np.ndarray:
    return np.asarray(of[1] + p * (2.0 * of[2] + p * 3.0 * of[3]))
