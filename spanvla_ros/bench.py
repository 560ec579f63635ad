"""`spanvla bench`: how long the parts take on this machine, each measured by its own module."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.report import charts, page
from spanvla_ros.runtime import bench as model_bench

# Part -> (module, function, whether it takes the options); each writes below its directory.
PARTS = {
    'scoring': ('spanvla_ros.scoring.bench', 'run_scoring_bench', False),
    'model': ('spanvla_ros.runtime.bench', 'run_model_bench', True),
    'decoders': ('spanvla_ros.runtime.decoder_bench', 'run_decoders_bench', True),
    'sweeps': ('spanvla_ros.runtime.sweeps', 'run_sweeps_bench', True),
}
# Takes torch and minutes: only when named.
NAMED_ONLY = ('sweeps',)
STAGES = ('vision', 'prefill_action', 'step')
# What the page shows as lines: the key of the summary, a title, the unit of the axis.
SWEEPS = (
    ('steps', 'a frame by Euler steps', ''),
    ('pictures', 'a frame by visual tokens in all', 'tokens'),
    ('cameras', 'a frame by cameras', ''),
    ('frames', 'a frame by pictures of each camera', ''),
)
SIZED = 'spanvla_ros.runtime.torch_bench', 'run_size_bench', True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--only',
        choices=sorted(PARTS),
        help='measure this part alone (default: every part but sweeps, each into a directory of '
        'its name)',
    )
    what.add_argument(
        '--size',
        choices=('3b', 'tiny'),
        help='measure a model of these sizes and random weights instead, in torch on --device',
    )
    parser.add_argument('--out', type=Path, required=True, help='directory for summary.json')
    model_bench.configure(parser)


def run(options: argparse.Namespace) -> int:
    """Measure the chosen parts one after another, or a model of published sizes alone."""
    every = {name: part for name, part in PARTS.items() if name not in NAMED_ONLY}
    parts = {'size': SIZED} if options.size else PARTS if options.only else every
    for part in [options.only] if options.only else sorted(parts):
        module, function, takes_options = parts[part]
        out = options.out if options.only or options.size else options.out / part
        measure = getattr(import_module(module), function)
        summary = measure(out, options) if takes_options else measure(out)
        if part == 'sweeps':
            write_sweeps_page(out / 'index.html', summary)
    return 0


def write_sweeps_page(path: Path, summary: Mapping[str, Any]) -> None:
    """The pictures of `runtime.sweeps`: a frame and its stages over each axis, with the floor."""
    line = (
        f'{summary["cameras"]} cameras of {" x ".join(map(str, summary["pictures_px"]))}, '
        f'{summary["machine"]["processor"]}, one thread, load {summary["load"]:.1f}'
    )
    swept = summary['sweeps']
    drawn = [
        page.columns(_frame_chart(title, swept[name], unit), _stage_chart(swept[name], unit))
        for name, title, unit in SWEEPS
    ]
    bars = [
        page.Interval(point['at'], ms, point['frame_floor_ms'], ms, 'ms')
        for point in swept['precision']
        for ms in [point['frame_cpu_ms']]
    ]
    head = ('precision', *STAGES, 'frame', 'floor')
    cells = [
        (p['at'], *(p['spent_ms'][s] for s in STAGES), p['frame_cpu_ms'], p['frame_floor_ms'])
        for p in swept['precision']
    ]
    page.write_page(
        path,
        'Sweeps',
        [
            page.headline('Sweeps', line, []),
            *(
                page.section(f'Over {name}', chart)
                for (name, *_), chart in zip(SWEEPS, drawn, strict=True)
            ),
            page.section(
                'Over precision',
                page.table(head, cells),
                page.interval_table('CPU time of a frame; the bar begins at the floor', bars),
                note=summary['how'],
            ),
        ],
    )


def _frame_chart(title: str, points: Sequence[Mapping[str, Any]], unit: str) -> str:
    at = np.array([point['at'] for point in points], np.float64)
    lines = [
        charts.Series(name, at, np.array([point[key] for point in points], np.float64))
        for name, key in (('frame', 'frame_cpu_ms'), ('floor', 'frame_floor_ms'))
    ]
    return charts.time_chart(title, lines, 'CPU ms', across=unit)


def _stage_chart(points: Sequence[Mapping[str, Any]], unit: str) -> str:
    at = np.array([point['at'] for point in points], np.float64)
    lines = []
    for stage in STAGES:
        for name, key in ((stage, 'cpu_ms'), (f'{stage} floor', 'floor_ms')):
            values = [point['stages'][stage][key] for point in points]
            lines.append(charts.Series(name, at, np.array(values, np.float64)))
    return charts.time_chart('one call of each stage', lines, 'CPU ms', across=unit)
