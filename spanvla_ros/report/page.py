"""One HTML file with everything inside: no network, no library, readable in light and in dark.

Every building block is a pure function that returns a fragment of HTML; `write_page` joins them.
Text is escaped here, so callers pass plain strings.
"""

from __future__ import annotations

import html
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spanvla_ros.report.style import SCRIPT, STYLE


@dataclass(frozen=True)
class Fact:
    """One number of the headline: what it is, its value, a remark, and whether it is as wished."""

    label: str
    value: str
    note: str = ''
    good: bool | None = None


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, one row of an interval table."""

    name: str
    mean: float
    low: float
    high: float
    unit: str = ''
    note: str = ''


def write_page(path: str | Path, title: str, fragments: Sequence[str]) -> Path:
    """Write the page under a temporary name, then rename it; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix='.new')
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(render_page(title, fragments))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def render_page(title: str, fragments: Sequence[str]) -> str:
    """The whole page as text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n'
        + '\n'.join(fragments)
        + f'\n</main><script>{SCRIPT}</script></body></html>\n'
    )


def escape(text: object) -> str:
    """Text that is safe in HTML and in attribute values."""
    return html.escape(str(text), quote=True)


def headline(title: str, summary: str, facts: Sequence[Fact]) -> str:
    """The top of a page: its title, one sentence, and the numbers that matter most."""
    cards = ''.join(
        f'<div class="fact{_verdict(good=fact.good)}">'
        f'<span class="label">{escape(fact.label)}</span>'
        f'<span class="value">{escape(fact.value)}</span>'
        f'<span class="note">{escape(fact.note)}</span></div>'
        for fact in facts
    )
    return (
        f'<header><h1>{escape(title)}</h1><p class="summary">{escape(summary)}</p></header>'
        f'<div class="facts">{cards}</div>'
    )


def section(title: str, *fragments: str, note: str = '') -> str:
    """A titled card around fragments."""
    remark = f'<p class="remark">{escape(note)}</p>' if note else ''
    return f'<section><h2>{escape(title)}</h2>{remark}{"".join(fragments)}</section>'


def columns(*fragments: str) -> str:
    """Fragments side by side, one below the other where the window is narrow."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in fragments)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers stand right-aligned."""
    top = ''.join(f'<th>{escape(cell)}</th>' for cell in head)
    body = ''.join(f'<tr>{"".join(_cell(cell) for cell in row)}</tr>' for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        '</div>'
    )


def interval_table(title: str, rows: Sequence[Interval]) -> str:
    """Means with their 95 % intervals, as numbers and drawn on one common scale."""
    finite = [row for row in rows if math.isfinite(row.low) and math.isfinite(row.high)]
    low = min([0.0, *(row.low for row in finite)])
    high = max([0.0, *(row.high for row in finite)])
    span = high - low or 1.0
    body = ''
    for row in rows:
        drawn = row in finite
        bar = _interval_bar((row.low - low) / span, (row.high - low) / span) if drawn else ''
        dot = f'{100 * (row.mean - low) / span:.2f}' if math.isfinite(row.mean) else ''
        mark = f'<i class="dot" style="left:{dot}%"></i>' if dot else ''
        body += (
            f'<tr><td>{escape(row.name)}</td>'
            f'<td class="n">{number(row.mean)} {escape(row.unit)}</td>'
            f'<td class="n">{number(row.low)} &ndash; {number(row.high)}</td>'
            f'<td class="bar"><div>{bar}{mark}</div></td>'
            f'<td class="note">{escape(row.note)}</td></tr>'
        )
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(title)}</th><th>mean</th>'
        f'<th>95 % interval</th><th>{number(low)} to {number(high)}</th><th></th></tr></thead>'
        f'<tbody>{body}</tbody></table></div>'
    )


def number(value: object) -> str:
    """A number with about four digits, as a reader wants it; None and NaN are a dash."""
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, int):
        return f'{value}'
    if isinstance(value, float):
        if not math.isfinite(value):
            return '-'
        if value == 0 or abs(value) >= 1000:
            return f'{value:.0f}'
        digits = max(0, 3 - math.floor(math.log10(abs(value))) - 1)
        return f'{value:.{min(digits, 4)}f}'
    return str(value)


def _interval_bar(left: float, right: float) -> str:
    return f'<i style="left:{100 * left:.2f}%;width:{100 * (right - left):.2f}%"></i>'


def _cell(cell: object) -> str:
    numeric = isinstance(cell, int | float) and not isinstance(cell, bool)
    return f'<td class="n">{number(cell)}</td>' if numeric else f'<td>{escape(number(cell))}</td>'


def _verdict(*, good: bool | None) -> str:
    return '' if good is None else ' good' if good else ' bad'
