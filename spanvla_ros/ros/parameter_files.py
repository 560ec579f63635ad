"""`config/spanvla.param.yaml` and `docs/parameters.md`, written from the settings of the nodes.

Run `python -m spanvla_ros.ros.parameter_files` in the repository after a setting was changed.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.ros.parameters import SETTINGS

YAML_FILE = Path('config') / 'spanvla.param.yaml'
PAGE_FILE = Path('docs') / 'parameters.md'
TYPES = {bool: 'bool', int: 'integer', float: 'double', str: 'string', tuple: 'strings'}


def parameter_yaml() -> str:
    """Every parameter with its default, its description as a comment."""
    lines = ['# Parameters of all nodes: the defaults of spanvla_ros/ros/parameters.py.']
    for node, kind in SETTINGS.items():
        lines += [f'/**/{node}:', '  ros__parameters:']
        for entry in fields(kind):
            choices = entry.metadata['choices']
            words = f' ({", ".join(choices)})' if choices else ''
            lines += [
                f'    # {entry.metadata["text"]}{words}',
                f'    {entry.name}: {_value(entry)}',
            ]
    return '\n'.join(lines) + '\n'


def parameter_page() -> str:
    """The reference: a table a node with default, type, range, and whether it may be set live."""
    lines = [
        '# Parameters',
        '',
        'Written by `python -m spanvla_ros.ros.parameter_files` from '
        '`spanvla_ros/ros/parameters.py`; a test holds it to be current.',
        'A live parameter may be set while its node runs (`ros2 param set`); the others are '
        'read-only then.',
        'A value of another type, out of its range or not among its words is refused, at the '
        'start with status 2.',
        'All of them with their defaults stand in `config/spanvla.param.yaml`.',
    ]
    for node, kind in SETTINGS.items():
        lines += ['', f'## {node}', '']
        if node == 'shadow':
            lines.append('The second planner of `shadow:=true`: the parameters of the planner.')
            continue
        lines += ['| parameter | default | type | allowed | live | meaning |']
        lines += ['|---|---|---|---|---|---|']
        lines += [_row(node, entry) for entry in fields(kind)]
    return '\n'.join(lines) + '\n'


def _row(node: str, entry: Any) -> str:
    low, high, choices, live, text = (
        entry.metadata[key] for key in ('low', 'high', 'choices', 'live', 'text')
    )
    allowed = ', '.join(f'`{word}`' for word in choices)
    if low is not None:
        allowed = f'{low:g} to {high:.10g}'
    shown = f'`{_value(entry)}`' if entry.default != '' else 'empty'
    cells = (f'`{node}.{entry.name}`', shown, TYPES[type(entry.default)], allowed or 'any')
    return f'| {" | ".join((*cells, "yes" if live else "no", text))} |'


def _value(entry: Any) -> str:
    default = entry.default
    value = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix('\n').removesuffix('\n...')


def main() -> int:
    """Write both files below the present directory."""
    write_text(YAML_FILE, parameter_yaml())
    write_text(PAGE_FILE, parameter_page())
    return 0


if __name__ == '__main__':
    sys.exit(main())
