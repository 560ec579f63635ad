"""ONNX graphs of the right shape and random weights for decoders that a model does not ship.

A decoder here is what runs after one prefill: some tokens of its own through transformer layers
that also attend to cached keys and values. Times of matrix products do not depend on the weights,
so parallel decoding, anchored diffusion, and any model of known sizes can be timed like this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: its own `tokens` in each of `samples`, attending to `cached` slots.

    `vocabulary` is 0 for a decoder that ends in numbers and not in words.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    tokens: int
    cached: int
    samples: int = 1
    vocabulary: int = 0

    @property
    def cache(self) -> tuple[int, int, int, int, int]:
        """Shape of the cached keys, and of the values."""
        return self.layers, 1, self.kv_heads, self.cached, self.head_size


class _Graph:
    """Collects nodes and random weights; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f'{kind.lower()}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f'constant_{len(self.constants)}'
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        weight = self._rng.standard_normal((inputs, outputs), np.float32) / np.sqrt(inputs)
        return self.op('MatMul', x, self.constant(weight.astype(np.float32)))

    def norm(self, x: str, width: int) -> str:
        scale = self.constant(np.ones(width, np.float32))
        return self.op('LayerNormalization', x, scale, axis=-1)

    def shape(self, x: str, *sizes: int) -> str:
        return self.op('Reshape', x, self.constant(np.array(sizes, np.int64)))


def decoder_graph(shape: DecoderShape) -> onnx.ModelProto:
    """`x [A, T, W]` with cached `keys`, `values` [L, 1, kv, S, hd] to `y`: states, or logits."""
    graph = _Graph()
    x = 'x'
    for layer in range(shape.layers):
        index = graph.constant(np.array(layer, np.int64))
        cached = [graph.op('Gather', name, index, axis=0) for name in ('keys', 'values')]
        x = _layer(graph, shape, x, cached[0], cached[1])
    out = shape.width
    if shape.vocabulary:
        x, out = graph.linear(graph.norm(x, shape.width), shape.width, shape.vocabulary), 0
    size = [shape.samples, shape.tokens, out or shape.vocabulary]
    graph.nodes.append(helper.make_node('Identity', [x], ['y']))
    own = [shape.samples, shape.tokens, shape.width]
    body = helper.make_graph(
        graph.nodes,
        'decoder',
        [
            helper.make_tensor_value_info('x', TensorProto.FLOAT, own),
            helper.make_tensor_value_info('keys', TensorProto.FLOAT, list(shape.cache)),
            helper.make_tensor_value_info('values', TensorProto.FLOAT, list(shape.cache)),
        ],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, size)],
        graph.constants,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=9)


def _layer(graph: _Graph, shape: DecoderShape, x: str, keys: str, values: str) -> str:
    samples, tokens, size = shape.samples, shape.tokens, shape.head_size
    groups = shape.heads // shape.kv_heads
    hidden = graph.norm(x, shape.width)

    def heads(count: int) -> str:
        rows = graph.linear(hidden, shape.width, count * size)
        split = graph.shape(rows, samples, tokens, count, size)
        return graph.op('Transpose', split, perm=[0, 2, 1, 3])

    whole = graph.constant(np.array([samples, shape.kv_heads, shape.cached, size], np.int64))
    own = [graph.op('Expand', part, whole) for part in (keys, values)]
    joined = [graph.op('Concat', part, heads(shape.kv_heads), axis=2) for part in own]
    # Grouped queries stand side by side on the rows, so that keys are not repeated.
    query = graph.shape(heads(shape.heads), samples, shape.kv_heads, groups * tokens, size)
    scores = graph.op('MatMul', query, graph.op('Transpose', joined[0], perm=[0, 1, 3, 2]))
    scaled = graph.op('Mul', scores, graph.constant(np.float32(size**-0.5)))
    mixed = graph.op('MatMul', graph.op('Softmax', scaled, axis=-1), joined[1])
    apart = graph.shape(mixed, samples, shape.heads, tokens, size)
    rows = graph.shape(
        graph.op('Transpose', apart, perm=[0, 2, 1, 3]), samples, tokens, shape.heads * size
    )
    x = graph.op('Add', x, graph.linear(rows, shape.heads * size, shape.width))
    hidden = graph.norm(x, shape.width)
    gate = graph.linear(hidden, shape.width, shape.inner)
    gated = graph.op('Mul', gate, graph.op('Sigmoid', gate))
    inner = graph.op('Mul', gated, graph.linear(hidden, shape.width, shape.inner))
    return graph.op('Add', x, graph.linear(inner, shape.inner, shape.width))
