"""The floor of a graph: its arithmetic and its bytes against what this machine was measured to do.

Only matrix products count as arithmetic, and weights, inputs and outputs as bytes, each moved
once: nothing can be faster, and a good engine comes within small factors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

FLOAT_BYTES = 4
PRODUCT = 512
COPY_BYTES = 64_000_000
TRIALS = 5
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Ceiling:
    """What one thread of this machine does: fp32 matrix products, and moving memory."""

    flop_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """What a graph cannot do without."""

    flop: int
    bytes: int

    def floor_ms(self, ceiling: Ceiling) -> float:
        """The larger of the times for its arithmetic and for its bytes."""
        return 1e3 * max(self.flop / ceiling.flop_per_s, self.bytes / ceiling.bytes_per_s)


def measure_ceiling() -> Ceiling:
    """Best of a few matrix products in ONNX Runtime, and of a few copies, on one thread."""
    import onnxruntime

    shape = [PRODUCT, PRODUCT]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in 'abc']
    node = helper.make_node('MatMul', ['a', 'b'], ['c'])
    graph = helper.make_graph([node], 'product', values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {name: np.ones(shape, np.float32) for name in 'ab'}
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    product_s = _best_s(lambda: session.run(None, feed))
    copy_s = _best_s(lambda: np.copyto(target, source))
    # A copy reads and writes.
    return Ceiling(2 * PRODUCT**3 / product_s, 2 * COPY_BYTES / copy_s)


def work_of(graph: str | Path | onnx.ModelProto) -> Work:
    """Arithmetic and bytes of a static graph, its weights counted as fp32."""
    if isinstance(graph, onnx.ModelProto):
        model = graph
    else:
        model = onnx.load(str(graph), load_external_data=False)
    body = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*body.input, *body.output, *body.value_info)
    }
    weights = [constant for constant in body.initializer if constant.data_type in _FLOATS]
    shapes |= {constant.name: list(constant.dims) for constant in body.initializer}
    moved = sum(_size(constant.dims) for constant in weights)
    moved += sum(_size(shapes[value.name]) for value in (*body.input, *body.output))
    return Work(sum(_flop(node, shapes) for node in body.node), FLOAT_BYTES * moved)


def _flop(node: Any, shapes: dict[str, list[int]]) -> int:
    if node.op_type == 'MatMul':
        return 2 * _size(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == 'Gemm':
        transposed = any(a.name == 'transA' and a.i for a in node.attribute)
        return 2 * _size(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
    if node.op_type == 'Conv':
        return 2 * _size(shapes[node.output[0]]) * _size(shapes[node.input[1]][1:])
    return 0


def _size(shape: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) if len(shape) else 1


def _best_s(work: Callable[[], object]) -> float:
    work()
    spent = []
    for _ in range(TRIALS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return max(min(spent), 1e-9)
