"""A graph in half precision: products and activations in fp16 or bf16, norms in fp32.

Inputs and outputs stay fp32. No kept converter writes bf16, and the one for fp16 that comes with
ONNX Runtime rounds between two operators that it was told to leave alone, so that the square of a
norm overflows: hence this walk, which casts only where the precision changes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS = {'fp16': TensorProto.FLOAT16, 'bf16': TensorProto.BFLOAT16}
_ARRAYS: dict[int, Any] = {
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
}
FLOAT = TensorProto.FLOAT
# Squares and means of a norm overflow in fp16; the others say their type themselves.
WIDE = frozenset(
    ('Cast', 'Constant', 'ConstantOfShape', 'Pow', 'Range', 'ReduceMean', 'Resize', 'Sqrt')
)
# What continues a norm: epsilon added to the mean, the value over the root.
WIDE_AFTER = {'Add': 'ReduceMean', 'Div': 'Sqrt'}


def lowered(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """`model` in `precision` (a key of `KINDS`); its weights are inside, fp32."""
    return _Walk(model, KINDS[precision]).result()


class _Walk:
    """Goes through the nodes in order; every fp32 tensor gets a low twin where one is needed."""

    def __init__(self, model: onnx.ModelProto, kind: int) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        graph = inferred.graph
        self._model, self._kind = model, kind
        self._floats = {
            value.name
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.tensor_type.elem_type == FLOAT
        }
        self._weights = {
            tensor.name: tensor for tensor in graph.initializer if tensor.data_type == FLOAT
        }
        self._floats |= set(self._weights)
        self._maker = {out: node.op_type for node in graph.node for out in node.output}
        self._outputs = {value.name for value in graph.output}
        self._nodes: list[onnx.NodeProto] = []
        self._twins: dict[str, str] = {}
        self._low: set[str] = set()
        self._stored: dict[str, TensorProto] = {}

    def result(self) -> onnx.ModelProto:
        """The same graph, lowered."""
        for node in self._model.graph.node:
            self._take(node)
        found = onnx.ModelProto()
        found.CopyFrom(self._model)
        del found.graph.node[:], found.graph.initializer[:], found.graph.value_info[:]
        found.graph.node.extend(self._nodes)
        others = [t for t in self._model.graph.initializer if t.name not in self._weights]
        found.graph.initializer.extend([*others, *self._stored.values()])
        return found

    def _take(self, node: onnx.NodeProto) -> None:
        wide = node.op_type in WIDE or any(
            self._maker.get(name) == WIDE_AFTER.get(node.op_type, '') for name in node.input
        )
        mine = onnx.NodeProto()
        mine.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self._floats:
                mine.input[index] = self._wide(name) if wide else self._lower(name)
        self._nodes.append(mine)
        if wide:
            return
        for index, name in enumerate(node.output):
            if name in self._floats:
                mine.output[index] = self._twins[name] = f'{name}_low'
                self._low.add(name)
                if name in self._outputs:
                    self._cast(self._twins[name], name, FLOAT)

    def _wide(self, name: str) -> str:
        if name in self._weights:
            self._stored[name] = self._weights[name]
        elif name in self._low:
            self._low.discard(name)
            if name not in self._outputs:
                self._cast(self._twins[name], name, FLOAT)
        return name

    def _lower(self, name: str) -> str:
        if name in self._twins:
            return self._twins[name]
        twin = self._twins[name] = f'{name}_low'
        if name in self._weights:
            array = numpy_helper.to_array(self._weights[name]).astype(_ARRAYS[self._kind])
            self._stored[twin] = numpy_helper.from_array(array, twin)
        else:
            self._cast(name, twin, self._kind)
        return twin

    def _cast(self, source: str, target: str, kind: int) -> None:
        self._nodes.append(helper.make_node('Cast', [source], [target], to=kind))
