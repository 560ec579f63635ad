"""The summary of `spanvla bench --size` on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ANSWERS = (10, 50)


def table(summary: Mapping[str, Any]) -> str:
    """The summary on one screen."""
    lines = [f'{"":<32}{"p50 ms":>9}{"p99":>9}{"max":>9}{"CPU ms":>9}{"floor":>9}{"x":>7}']
    lines += [_line(name, row) for name, row in _shown(summary)]
    for name, ratios in summary.get('decoders', {}).get('ratios', {}).items():
        shown = ''.join(f'{ratios[f"AR-{count}_over_this"]:9.2f}' for count in ANSWERS)
        lines.append(f'{f"AR-10, AR-50 / {name}":<34}{shown}')
    for name, row in summary.get('beside', {}).items():
        lines.append(
            f'{name} beside reasoning: p50 x{row["slowdown_p50"]:.2f}, p99 '
            f'x{row["slowdown_p99"]:.2f}; {row["tokens_per_s_beside"]:.0f} of '
            f'{row["tokens_per_s_alone"]:.0f} tokens/s'
        )
    for how, row in summary.get('shipped', {}).items():
        refused = row.get('no_graph')
        lines.append(
            f'shipped, {how}: golden {row["golden_difference_m"]:.1e} m, plan '
            f'{row["plan_difference_m"]:.1e} m off; p50 {row["p50_ms"]:.2f} ms, p99 '
            f'{row["p99_ms"]:.2f} ms{f"; no graph: {refused}" if refused else ""}'
        )
    for title in ('machine', 'graph_minus_eager', 'proposal', 'no_graph', 'failures'):
        for name, found in summary.get(title, {}).items():
            if name != 'tower':
                lines.append(f'{title} {name}: {found}')
    return '\n'.join(lines) + '\n'


def _shown(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    tower = summary.get('machine', {}).get('tower')
    if tower:
        yield 'vision, own width', tower['own_width']
    for name, row in summary.get('stages', {}).items():
        for how in ('eager', 'graph'):
            yield f'{name} {how}', row[how]
    for name, row in summary.get('compiled', {}).items():
        yield f'{name} compiled', row
    for name, row in summary.get('frames', {}).items():
        yield f'frame {name}', row
    for name, row in summary.get('decoders', {}).items():
        if 'p50_ms' in row:
            yield name, row
    for name, row in summary.get('beside', {}).items():
        yield f'frame {name} alone', row['alone']
        yield f'frame {name} beside', row['beside']


def _line(name: str, row: Mapping[str, Any]) -> str:
    fields = ('p50_ms', 'p99_ms', 'max_ms', 'cpu_ms')
    line = f'{name:<32}'[:32] + ''.join(f'{row[field]:9.2f}' for field in fields)
    if row['floor_ms']:
        line += f'{row["floor_ms"]:9.2f}{row["multiple_of_floor"]:7.1f}'
    return line
