"""`spanvla bench`: how long the parts take on this machine, each measured by its own module."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

# Part -> (module, function); a function measures, writes below its directory and prints.
PARTS = {'scoring': ('spanvla_ros.scoring.bench', 'run_scoring_bench')}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument(
        '--only', choices=sorted(PARTS), help='measure this part alone (default: every part)'
    )
    parser.add_argument('--out', type=Path, required=True, help='directory for summary.json')


def run(options: argparse.Namespace) -> int:
    """Measure the chosen parts one after another."""
    parts = [options.only] if options.only else sorted(PARTS)
    for part in parts:
        module, function = PARTS[part]
        getattr(import_module(module), function)(options.out)
    return 0
