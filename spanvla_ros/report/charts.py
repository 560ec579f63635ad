"""Drawn parts of a page as inline SVG: lines over time, a band of states, a view from above."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from spanvla_ros.report.page import escape

# A chart stands in half the page, a band or a view from above in all of it.
WIDTH, WIDE, LEFT, RIGHT, BOTTOM, TOP = 560.0, 1120.0, 40.0, 10.0, 22.0, 14.0
# More points than pixels only make the page heavy.
MAX_POINTS = 900
Axis = Callable[[float], float]
STATE_COLORS = {
    'OK': 'ok',
    'DEGRADED': 'degraded',
    'FALLBACK': 'fallback',
    'FAULT': 'fault',
    'STANDBY': 'standby',
    'STARTING': 'standby',
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; a value that is not finite interrupts it."""

    name: str
    times_s: Float64[np.ndarray, 'n']
    values: Float64[np.ndarray, 'n']


@dataclass(frozen=True)
class Limit:
    """A horizontal line that a value should stay below or above."""

    name: str
    value: float


@dataclass(frozen=True)
class Span:
    """A state held from one time to another."""

    from_s: float
    to_s: float
    state: str


@dataclass(frozen=True)
class Entry:
    """One line of a text timeline."""

    time_s: float
    text: str
    tag: str = ''


@dataclass(frozen=True)
class Shape:
    """A polygon (`closed`) or a line in meters; `paint` is a color name of the stylesheet."""

    points: Float64[np.ndarray, 'n 2']
    paint: str
    closed: bool = False
    width_m: float = 0.3
    opacity: float = 1.0
    label: str = ''


def time_chart(
    title: str,
    series: Sequence[Series],
    unit: str,
    limits: Sequence[Limit] = (),
    height: int = 170,
    across: str = 's',
) -> str:
    """Lines over a common axis of time, from zero up, with a legend and values at the pointer.

    `across` is the unit of the axis, for lines over something else than time.
    """
    shown = [_thinned(line) for line in series]
    from_s, to_s = _range([line.times_s for line in shown])
    low, high = _range([line.values for line in shown])
    low, high = min(0.0, low), max([high, *(limit.value for limit in limits)])
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(time_s: float) -> float:
        return LEFT + (time_s - from_s) / (to_s - from_s) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (height - TOP - BOTTOM)

    parts = [_grid(ticks, nice_ticks(from_s, to_s, 8), x, y, height, across)]
    for limit in limits:
        at = y(limit.value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="var(--bad)" stroke-dasharray="5 4" opacity=".7"/>'
            f'<text x="{WIDTH - RIGHT}" y="{at - 3:.1f}" text-anchor="end">'
            f'{escape(limit.name)}</text>'
        )
    for index, line in enumerate(shown):
        path = _path(line, x, y)
        parts.append(
            f'<path d="{path}" fill="none" stroke="var(--c{index % 7})" stroke-width="1.6" '
            'stroke-linejoin="round"/>'
        )
    legend = ''.join(
        f'<span><b style="background:var(--c{index % 7})"></b>{escape(line.name)}</span>'
        for index, line in enumerate(shown)
    )
    data = {
        'unit': unit,
        'across': across,
        'width': WIDTH,
        'left': LEFT,
        'right': WIDTH - RIGHT,
        'from': from_s,
        'to': to_s,
        'series': [
            {
                'name': escape(line.name),
                't': [round(float(value), 2) for value in line.times_s],
                'v': [float(f'{value:.4g}') for value in line.values],
            }
            for line in (_finite(line) for line in shown)
        ],
    }
    return (
        f'<div class="chart" data-points="{escape(json.dumps(data))}">'
        f'<h3>{escape(title)} [{escape(unit)}]</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {height}">{"".join(parts)}'
        f'<line class="rule" y1="{TOP}" y2="{height - BOTTOM}" stroke="var(--soft)" '
        'style="display:none"/></svg><div class="tip"></div></div>'
    )


def state_band(title: str, spans: Sequence[Span]) -> str:
    """Which state held when, as one colored band over time."""
    from_s = min((span.from_s for span in spans), default=0.0)
    to_s = max((span.to_s for span in spans), default=1.0)
    if to_s <= from_s:
        to_s = from_s + 1.0
    scale = (WIDE - RIGHT - RIGHT) / (to_s - from_s)
    parts, used = [], {}
    for span in spans:
        paint = STATE_COLORS.get(span.state, 'c6')
        used[span.state] = paint
        left, width = RIGHT + (span.from_s - from_s) * scale, (span.to_s - span.from_s) * scale
        parts.append(
            f'<rect x="{left:.1f}" y="4" width="{max(width, 1.0):.1f}" height="22" '
            f'fill="var(--{paint})"><title>{escape(span.state)} '
            f'{span.from_s:.2f} to {span.to_s:.2f} s</title></rect>'
        )
    for tick in nice_ticks(from_s, to_s, 8):
        if from_s <= tick <= to_s:
            at = RIGHT + (tick - from_s) * scale
            parts.append(f'<text x="{at:.1f}" y="40" text-anchor="middle">{tick:g} s</text>')
    legend = ''.join(
        f'<span><b class="block" style="background:var(--{paint})"></b>{escape(state)}</span>'
        for state, paint in used.items()
    )
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDE:.0f} 46">{"".join(parts)}</svg></div>'
    )


def timeline(entries: Sequence[Entry]) -> str:
    """Text over time, one line an entry."""
    lines = ''.join(
        f'<li><time>{entry.time_s:.1f} s</time><span>{escape(entry.text)}</span>'
        + (f'<span class="tag">{escape(entry.tag)}</span>' if entry.tag else '<span></span>')
        + '</li>'
        for entry in entries
    )
    return f'<ol class="timeline">{lines}</ol>'


def bird_view(
    shapes: Sequence[Shape],
    *,
    center: tuple[float, float] | None = None,
    radius_m: float | None = None,
    height: int = 420,
    ground: str = '',
) -> str:
    """Shapes seen from above, x to the right and y up, equal scales, with a bar of length.

    Args:
        shapes: drawn in their order.
        center: middle of the view; None shows everything.
        radius_m: half the height of the view; only with `center`.
        height: of the drawing, in picture units.
        ground: name of a `ground_layer` to draw below.
    """
    width = WIDE
    points = np.concatenate([shape.points for shape in shapes] or [np.zeros((1, 2))])
    if center is None or radius_m is None:
        low, high = points.min(axis=0) - 4.0, points.max(axis=0) + 4.0
        center = (float(low[0] + high[0]) / 2.0, float(low[1] + high[1]) / 2.0)
        radius_m = max((high[1] - low[1]) / 2.0, (high[0] - low[0]) / 2.0 * height / width)
    scale = height / (2.0 * radius_m)
    place = (
        f'translate({width / 2:.1f} {height / 2:.1f}) scale({scale:.4f} {-scale:.4f}) '
        f'translate({-center[0]:.3f} {-center[1]:.3f})'
    )
    body = f'<use href="#{escape(ground)}"/>' if ground else ''
    body += ''.join(_shape(shape) for shape in shapes)
    length = nice_ticks(0.0, radius_m, 3)[1]
    bar = (
        f'<g transform="translate({width - 20 - length * scale:.1f} {height - 16})">'
        f'<line x2="{length * scale:.1f}" stroke="var(--soft)" stroke-width="2"/>'
        f'<text x="{length * scale / 2:.1f}" y="-5" text-anchor="middle">{length:g} m</text></g>'
    )
    return (
        f'<figure><svg viewBox="0 0 {width:.0f} {height}">'
        f'<g transform="{place}">{body}</g>{bar}</svg></figure>'
    )


def ground_layer(name: str, shapes: Sequence[Shape]) -> str:
    """Shapes that many views draw below their own, stored once in the page."""
    body = ''.join(_shape(shape) for shape in shapes)
    return (
        '<svg width="0" height="0" style="position:absolute;width:0;height:0" aria-hidden="true">'
        f'<defs><g id="{escape(name)}">{body}</g></defs></svg>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low, low + 1.0]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, last + 1)]


def _shape(shape: Shape) -> str:
    points = ' '.join(f'{px:.2f},{py:.2f}' for px, py in shape.points)
    title = f'<title>{escape(shape.label)}</title>' if shape.label else ''
    opacity = f' opacity="{shape.opacity:g}"' if shape.opacity < 1.0 else ''
    if shape.closed:
        return f'<polygon points="{points}" fill="var(--{shape.paint})"{opacity}>{title}</polygon>'
    return (
        f'<polyline points="{points}" fill="none" stroke="var(--{shape.paint})" '
        f'stroke-width="{shape.width_m:g}" stroke-linecap="round" stroke-linejoin="round"'
        f'{opacity}>{title}</polyline>'
    )


def _grid(
    ticks: list[float], times: list[float], x: Axis, y: Axis, height: int, across: str
) -> str:
    rows = ''.join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
        f'stroke="var(--grid)"/><text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
        f'{tick:g}</text>'
        for tick in ticks
    )
    marks = ''.join(
        f'<text x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g} '
        f'{escape(across)}</text>'
        for tick in times
        if LEFT - 1 <= x(tick) <= WIDTH - RIGHT + 1
    )
    return rows + marks


def _path(line: Series, x: Axis, y: Axis) -> str:
    words, pen_down = [], False
    for time_s, value in zip(line.times_s, line.values, strict=True):
        if math.isfinite(value):
            words.append(f'{"L" if pen_down else "M"}{x(time_s):.1f} {y(value):.1f}')
        pen_down = math.isfinite(value)
    return ''.join(words)


def _thinned(line: Series) -> Series:
    """At most `MAX_POINTS` points, of every group the one farthest from zero: peaks stay."""
    count = len(line.times_s)
    if count <= MAX_POINTS:
        return line
    edges = np.linspace(0, count, MAX_POINTS + 1).astype(int)
    size = np.where(np.isfinite(line.values), np.abs(line.values), -1.0)
    keep = np.array([start + int(np.argmax(size[start:end])) for start, end in pairwise(edges)])
    return Series(line.name, line.times_s[keep], line.values[keep])


def _finite(line: Series) -> Series:
    keep = np.isfinite(line.values)
    return Series(line.name, line.times_s[keep], line.values[keep])


def _range(arrays: Sequence[Float64[np.ndarray, '_']]) -> tuple[float, float]:
    values = np.concatenate([np.zeros(0), *arrays])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1.0)
