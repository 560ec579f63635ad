"""A graph with its weight products in eight bits: int8, or fp8 in the E4M3 form.

Quantize-dequantize form: each product reads its input and its weights through a pair of
QuantizeLinear and DequantizeLinear, which an engine joins to one eight-bit product. All scales are
symmetric, as TensorRT asks: one for an input, from calibration, one for each column of the
weights. Attention, norms, sums and what a product gives stay fp32, and so do the products that
come first, which read pictures and numbers: few of all, and a third of the error of `step`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime import quantization

KINDS = ('int8', 'fp8')
PRODUCTS = ('MatMul', 'Gemm')
INT8_MAX, E4M3_MAX = 127.0, 448.0
_STORED = '_quantized'
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """Inputs of every graph by its name, and where they come from."""

    feeds: Mapping[str, Sequence[Feed]]
    scenes: str
    rows: int


def quantised(model: onnx.ModelProto, precision: str, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """`model` in `precision` (one of `KINDS`); its weights are inside, fp32.

    Args:
        model: a graph as `graph_files.read_whole` gives it.
        precision: `int8` or `fp8`.
        feeds: inputs of this graph; the largest value seen anywhere is the largest there is.
    """
    # It moves the weights out of the model it is given.
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / 'quantised.onnx'
        quantization.quantize_static(
            whole,
            path,
            _Reader(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=inner_products(model),
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={
                'ActivationSymmetric': True,
                'WeightSymmetric': True,
                'MatMulConstBOnly': True,
                'QuantizeBias': False,
                'OpTypesToExcludeOutputQuantization': list(PRODUCTS),
            },
        )
        found: onnx.ModelProto = onnx.load(path)
    if precision == 'fp8':
        _to_fp8(found, {t.name: t for t in model.graph.initializer})
    return found


def inner_products(model: onnx.ModelProto) -> list[str]:
    """Names of the products with stored weights that read what such a product made."""
    stored = {tensor.name for tensor in model.graph.initializer}
    behind: set[str] = set()
    found = []
    for node in model.graph.node:
        weighs = node.op_type in PRODUCTS and node.input[1] in stored
        inside = any(name in behind for name in node.input)
        if weighs and inside:
            found.append(node.name)
        if weighs or inside:
            behind.update(node.output)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantizer says on the root logger; none of it concerns static graphs."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime's own way to ask for one input after another."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _to_fp8(model: onnx.ModelProto, weights: Mapping[str, TensorProto]) -> None:
    """Put E4M3 in the place of int8: the largest value becomes 448, weights are rounded anew.

    ONNX Runtime's own ranges for fp8 come from the deviation of the values and cut off what this
    model needs.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear')]
    rescaled: dict[str, np.ndarray] = {}
    for name in {node.input[1] for node in pairs}:
        scale = numpy_helper.to_array(stored[name])
        rescaled[name] = (scale * (INT8_MAX / E4M3_MAX)).astype(scale.dtype)
        stored[name].CopyFrom(numpy_helper.from_array(rescaled[name], name))
    for name in {node.input[2] for node in pairs}:
        zero = np.zeros(tuple(stored[name].dims), ml_dtypes.float8_e4m3fn)
        stored[name].CopyFrom(numpy_helper.from_array(zero, name))
    for node in pairs:
        name = node.input[0]
        if node.op_type == 'DequantizeLinear' and name in stored:
            exact = numpy_helper.to_array(weights[name.removesuffix(_STORED)])
            axis = next((a.i for a in node.attribute if a.name == 'axis'), 1)
            shape = [1] * exact.ndim
            shape[axis] = -1
            values = exact / rescaled[node.input[1]].reshape(shape)
            rounded = np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
            stored[name].CopyFrom(numpy_helper.from_array(rounded, name))
