"""The page of an evaluation: every number of its summary with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spanvla_ros.report import page
from spanvla_ros.training.worst_clips import Clip, clips_section

UNITS = {'_m': 'm', '_mps': 'm/s', '_per_km': '/km'}
TITLES = {
    'model': 'model',
    'twin': 'twin without pictures',
    'constant_velocity': 'constant velocity',
    'blind_route_follower': 'blind route follower',
    'reference_driver': 'reference driver',
}
DRAWN_NOTE = (
    'The town is drawn in flat colours: nothing here is a claim about real cameras. Intervals are '
    '95 %, by the bootstrap over drives.'
)


def write_evaluation_page(
    path: Path, summary: Mapping[str, Any], line: str, worst: Sequence[Clip] = ()
) -> None:
    """Write the page of a summary as `evaluate` makes it, with the worst clips if any."""
    stamp = summary['stamp']
    fragments = [
        page.headline(f'Evaluation of {stamp["model"]}', line, _facts(summary)),
        page.section('Open loop', *_drivers(summary['open_loop']), note=DRAWN_NOTE),
        page.section(
            'Hazards: the same moment with and without',
            *[
                page.interval_table(f'{_title(name)}: {kind}', _rows(found))
                for name, kinds in summary['hazard_pairs'].items()
                for kind, found in kinds.items()
            ],
            note='Pairs in which the reference is slower by over 1 m/s at 3 s with the hazard.',
        ),
        page.section(
            'Mirror and bridge',
            page.interval_table('plans of mirrored observations', _rows(summary['mirror'])),
            *[
                page.interval_table(f'K/V of another scene: {layer}', _rows(found))
                for layer, found in summary['bridge'].items()
            ],
        ),
    ]
    if 'scores_model_minus' in summary:
        tables = [
            page.interval_table(f'model minus {_title(name)}', _rows(found))
            for name, found in summary['scores_model_minus'].items()
        ]
        fragments.append(page.section('Scores, paired on the same moments', *tables))
    if worst:
        fragments.append(clips_section(worst))
    if 'closed_loop' in summary:
        fragments.append(page.section('Closed loop', *_drivers(summary['closed_loop'])))
    for name in ('open_loop_twin_minus_model', 'closed_loop_twin_minus_model'):
        if name in summary:
            title = f'{name.split("_")[0]} loop: twin minus model, paired'
            fragments.append(
                page.section(title, page.interval_table('difference', _rows(summary[name])))
            )
    rows = [(key, value) for key, value in stamp.items() if value is not None]
    fragments.append(page.section('What made these numbers', page.table(('what', 'value'), rows)))
    page.write_page(path, f'Evaluation of {stamp["model"]}', fragments)


def _facts(summary: Mapping[str, Any]) -> list[page.Fact]:
    wanted = (
        ('pdms', 'PDMS', ''),
        ('epdms', 'EPDMS', ''),
        ('ade_m', 'ADE', 'm'),
        ('fde_m', 'FDE', 'm'),
        ('success_rate', 'success', ''),
        ('route_completion', 'completion', ''),
        ('collisions_per_km', 'collisions', '/km'),
    )
    facts = []
    for key, label, unit in wanted:
        found = summary[key]
        if found['mean'] is not None:
            note = f'{found["low"]:.2f} to {found["high"]:.2f}'
            facts.append(page.Fact(label, f'{found["mean"]:.2f} {unit}'.strip(), note))
    return facts


def _drivers(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """One table a family, with a row for every driver and number."""
    families = list(next(iter(groups.values()))) if groups else []
    names = list(next(iter(groups.values()))[families[0]]) if families else []
    fragments = []
    for family in families:
        for name in names:
            rows = [
                _interval(_title(driver), found[family][name], _unit(name))
                for driver, found in groups.items()
                if family in found and found[family][name]['mean'] is not None
            ]
            if rows and (family == 'all' or name in MAIN):
                fragments.append(page.interval_table(f'{family}: {name}', rows))
    return fragments


MAIN = ('pdms', 'epdms', 'ade_m', 'success_rate', 'collision_rate', 'route_completion')


def _rows(measures: Mapping[str, Any]) -> list[page.Interval]:
    return [
        _interval(name, found, _unit(name))
        for name, found in measures.items()
        if found['mean'] is not None
    ]


def _interval(name: str, found: Mapping[str, Any], unit: str) -> page.Interval:
    return page.Interval(
        name, found['mean'], found['low'], found['high'], unit, f'n = {found["count"]}'
    )


def _unit(name: str) -> str:
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), '')


def _title(driver: str) -> str:
    return TITLES.get(driver, driver)
