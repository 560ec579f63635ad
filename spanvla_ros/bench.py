"""`spanvla bench`: how long the parts take on this machine, each measured by its own module."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from spanvla_ros.runtime import bench as model_bench

# Part -> (module, function, whether it takes the options); each writes below its directory.
PARTS = {
    'scoring': ('spanvla_ros.scoring.bench', 'run_scoring_bench', False),
    'model': ('spanvla_ros.runtime.bench', 'run_model_bench', True),
    'decoders': ('spanvla_ros.runtime.decoder_bench', 'run_decoders_bench', True),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument(
        '--only',
        choices=sorted(PARTS),
        help='measure this part alone (default: every part, each into a directory of its name)',
    )
    parser.add_argument('--out', type=Path, required=True, help='directory for summary.json')
    model_bench.configure(parser)


def run(options: argparse.Namespace) -> int:
    """Measure the chosen parts one after another."""
    for part in [options.only] if options.only else sorted(PARTS):
        module, function, takes_options = PARTS[part]
        out = options.out if options.only else options.out / part
        measure = getattr(import_module(module), function)
        if takes_options:
            measure(out, options)
        else:
            measure(out)
    return 0
