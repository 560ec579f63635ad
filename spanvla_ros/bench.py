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
SIZED = 'spanvla_ros.runtime.torch_bench', 'run_size_bench', True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--only',
        choices=sorted(PARTS),
        help='measure this part alone (default: every part, each into a directory of its name)',
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
    parts = {'size': SIZED} if options.size else PARTS
    for part in [options.only] if options.only else sorted(parts):
        module, function, takes_options = parts[part]
        out = options.out if options.only or options.size else options.out / part
        measure = getattr(import_module(module), function)
        if takes_options:
            measure(out, options)
        else:
            measure(out)
    return 0
