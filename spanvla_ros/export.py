"""`spanvla export`: the graphs of a model in fp32, or its fp32 graphs in another precision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spanvla_ros.model.checkpoint import PRECISIONS, load_model_dir
from spanvla_ros.types import SpanvlaError

WEIGHTS = ('fp16', 'fp32')
ROWS = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla export`."""
    parser.add_argument('--model', required=True, type=Path, help='model directory')
    parser.add_argument(
        '--out', type=Path, help='write the exported model here instead of back into --model'
    )
    parser.add_argument(
        '--target',
        choices=('onnxruntime', 'tensorrt'),
        default='onnxruntime',
        help='tensorrt also builds the engines of the fp32 graphs on this device',
    )
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='fp32 exports from torch; any other is made from the fp32 graphs and put beside them',
    )
    parser.add_argument(
        '--calibrate', type=Path, metavar='SCENES', help='scenes to read ranges off, int8 and fp8'
    )
    parser.add_argument('--rows', type=int, default=ROWS, help='scenes to calibrate on')
    parser.add_argument(
        '--weights', choices=WEIGHTS, default='fp16', help='how fp32 graphs store their weights'
    )


def run(options: argparse.Namespace) -> int:
    """Export, verify, and print what was measured of every graph."""
    out: Path = options.out or options.model
    if options.target == 'tensorrt':
        # Before the long part, so that a missing library costs nothing.
        from spanvla_ros.runtime.tensorrt_build import import_tensorrt

        import_tensorrt()
    export = _export if options.precision == 'fp32' else _convert
    lines = export(options, out)
    if options.target == 'tensorrt':
        from spanvla_ros.runtime.tensorrt_ import TensorRTBackend

        backend = TensorRTBackend(load_model_dir(out))
        lines.append(f'engines: golden plans within {backend.golden_difference_m:.1e} m')
        backend.close()
    size = sum(path.stat().st_size for path in out.rglob('*') if path.is_file())
    sys.stdout.write('\n'.join([*lines, f'{out}: {size / 1e6:.1f} MB in all']) + '\n')
    return 0


def _export(options: argparse.Namespace, out: Path) -> list[str]:
    from spanvla_ros.runtime.export import export_model

    return [
        f'{p.graph:<15}{p.nodes:4d} nodes  max error {p.absolute:.1e} (relative {p.relative:.1e})'
        f'  onnxruntime {p.onnx_ms:6.2f} ms  torch {p.torch_ms:6.2f} ms'
        for p in export_model(options.model, out, options.weights)
    ]


def _convert(options: argparse.Namespace, out: Path) -> list[str]:
    from spanvla_ros.runtime.eight_bit import KINDS
    from spanvla_ros.runtime.precision import convert_model

    directory = load_model_dir(options.model)
    calibration = None
    if options.precision in KINDS:
        if options.calibrate is None:
            raise SpanvlaError(
                f'{options.precision} needs scenes to read ranges off; add --calibrate SCENES'
            )
        from spanvla_ros.training.calibration import record_inputs

        calibration = record_inputs(directory, options.calibrate, options.rows)
    found = convert_model(directory, out, options.precision, calibration)
    lines = [f'{name:<15}{count:4d} nodes' for name, count in found.nodes.items()]
    if found.difference_m is None:
        said = 'passed the static gate; not run: ONNX Runtime has no bf16 on a CPU'
    else:
        said = f'golden plans: largest waypoint difference {found.difference_m:.1e} m'
    return [*lines, f'{options.precision}: {said}']
