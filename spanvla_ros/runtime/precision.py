"""The graphs of a model once more in another precision, made from its fp32 graphs.

They lie in `graphs/<precision>/` and take and give fp32, so that a backend needs to know nothing
of a precision but its folder. ONNX Runtime on a CPU computes eight-bit graphs as they are written,
rounding between fp32 products, and fp16 operator by operator; it has no bf16, whose graphs pass
the static gate here and are compared on a GPU.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spanvla_ros.model.checkpoint import (
    ModelDirectory,
    graphs_dir,
    graphs_of,
    load_model_dir,
    swap_directory,
    write_manifest,
    write_tensors,
)
from spanvla_ros.runtime import eight_bit, halves
from spanvla_ros.runtime.eight_bit import Calibration
from spanvla_ros.runtime.engines import WAYPOINT_BOUNDS_M
from spanvla_ros.runtime.gate import check_graph
from spanvla_ros.runtime.golden import GOLDEN_FILE, golden_states, load_golden, states_apart_m
from spanvla_ros.runtime.graph_files import GraphWriter, read_whole
from spanvla_ros.runtime.onnx_ import OnnxBackend
from spanvla_ros.types import SpanvlaError

# Of these ONNX Runtime has no kernels on a CPU.
GPU_ONLY = ('bf16',)


@dataclass(frozen=True)
class Conversion:
    """Nodes of each graph, and the largest waypoint difference from the golden plans of fp32.

    Golden inputs are noise, on which rounding to eight bits moves plans by metres: what it costs
    on scenes `spanvla evaluate` tells. None where this machine cannot run the precision.
    """

    precision: str
    nodes: dict[str, int]
    difference_m: float | None


def convert_model(
    directory: ModelDirectory,
    out: Path,
    precision: str,
    calibration: Calibration | None = None,
) -> Conversion:
    """Write the model to `out` with its graphs in one more precision, whole or not at all.

    Args:
        directory: a verified model with graphs in fp32.
        out: where to; the model's own directory is replaced.
        precision: one of `checkpoint.PRECISIONS` below fp32.
        calibration: inputs of every graph, for int8 and fp8.

    Raises:
        SpanvlaError: no calibration, a graph that breaks the static rules, or one that is off by
            more than its precision may be.
    """
    if precision in eight_bit.KINDS and calibration is None:
        raise SpanvlaError(f'export: {precision} needs ranges; add --calibrate SCENES')
    if directory.config.expert_graph != 'step':
        raise SpanvlaError(
            f'export: head {directory.config.head} has no golden plans to hold {precision} to; '
            'use fp32'
        )
    building = out.with_name(f'.{out.name}.{os.getpid()}.export')
    try:
        shutil.copytree(directory.path, building)
        shutil.rmtree(building / graphs_dir(precision), ignore_errors=True)
        nodes = _write_graphs(directory, building / graphs_dir(precision), precision, calibration)
        write_manifest(building)
        difference_m = _compare(load_model_dir(building), precision)
        note: dict[str, object] = {'waypoint_difference_m': difference_m}
        if calibration is not None:
            note['calibrated_on'] = {'scenes': calibration.scenes, 'rows': calibration.rows}
        write_manifest(building, graph_notes={**directory.graph_notes, precision: note})
        swap_directory(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Conversion(precision, nodes, difference_m)


def _write_graphs(
    directory: ModelDirectory, folder: Path, precision: str, calibration: Calibration | None
) -> dict[str, int]:
    writer = GraphWriter(folder)
    nodes = {}
    for name in tqdm(graphs_of(directory.config), desc=f'{precision} graphs', unit='graph'):
        whole = read_whole(directory.graph(name))
        if calibration is None or precision not in eight_bit.KINDS:
            found = halves.lowered(whole, precision)
        else:
            found = eight_bit.quantised(whole, precision, calibration.feeds[name])
        nodes[name] = writer.write(name, found)
        check_graph(folder / f'{name}.onnx', name, precision)
    return nodes


def _compare(directory: ModelDirectory, precision: str) -> float | None:
    """Run the new graphs on the golden inputs; eight-bit ones get golden plans of their own."""
    if precision in GPU_ONLY:
        return None
    golden = load_golden(directory)
    states = golden_states(OnnxBackend(directory, precision=precision), golden)
    found = states_apart_m(states, golden['state'], directory)
    if precision in eight_bit.KINDS:
        write_tensors(directory.file(GOLDEN_FILE), {**golden, f'state_{precision}': states})
        write_manifest(directory.path)
    elif not found <= WAYPOINT_BOUNDS_M[precision]:
        raise SpanvlaError(
            f'export: {precision} graphs are off the golden plans by {found:.3f} m, allowed are '
            f'{WAYPOINT_BOUNDS_M[precision]:g} m; use another precision'
        )
    if not np.isfinite(found):
        raise SpanvlaError(f'export: {precision} graphs give numbers that are not finite')
    return found
