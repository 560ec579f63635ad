"""ONNX files of a model: weights of all graphs of one precision in one data file beside them.

A protobuf message ends at 2 GB, and a model of three billion weights does not fit: tensors leave a
graph before anything serialises or checks it. Equal tensors are stored once. What fp16 holds
without loss is stored as fp16 with a cast, which an engine folds when it loads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spanvla_ros.types import SpanvlaError

DATA_FILE = 'weights.data'
EXTERNAL_BYTES = 1024
ALIGNMENT = 64
MAX_PROTO_BYTES = 2**31 - 1
_HALF = '_half'


class GraphWriter:
    """Writes the graphs of one folder and their common data file."""

    def __init__(self, folder: Path) -> None:
        """Make `folder` and an empty data file."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._end = 0
        self._places: dict[str, tuple[int, int]] = {}
        (folder / DATA_FILE).touch()

    def write(self, name: str, model: onnx.ModelProto) -> int:
        """Write one graph, its large tensors moved out of `model`; returns its nodes.

        Raises:
            SpanvlaError: what is left is too long for a protobuf message.
        """
        count = len(model.graph.node)
        casts = [cast for tensor in model.graph.initializer if (cast := self._move(tensor))]
        nodes = [*casts, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        if (size := model.ByteSize()) > MAX_PROTO_BYTES:
            raise SpanvlaError(
                f'export: graph {name} takes {size} bytes without its weights, an ONNX file holds '
                f'{MAX_PROTO_BYTES}; use fewer tables'
            )
        content = model.SerializeToString(deterministic=True)
        (self._folder / f'{name}.onnx').write_bytes(content)
        return count

    def _move(self, tensor: TensorProto) -> onnx.NodeProto | None:
        """Put a large tensor into the data file; a cast where it is stored as fp16."""
        array = numpy_helper.to_array(tensor)
        if array.nbytes < EXTERNAL_BYTES:
            return None
        name, kind, cast = tensor.name, tensor.data_type, None
        if array.dtype == np.float32:
            with np.errstate(over='ignore'):
                half = array.astype(np.float16)
            if np.array_equal(half.astype(np.float32), array):
                array, kind = half, TensorProto.FLOAT16
                cast = helper.make_node('Cast', [name + _HALF], [name], to=TensorProto.FLOAT)
                name += _HALF
        offset, length = self._store(array)
        dims = list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type = name, kind
        tensor.dims.extend(dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (('location', DATA_FILE), ('offset', offset), ('length', length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        return cast

    def _store(self, array: np.ndarray) -> tuple[int, int]:
        content = np.ascontiguousarray(array).tobytes()
        key = f'{array.dtype.name} {hashlib.sha256(content).hexdigest()}'
        if key not in self._places:
            padding = -self._end % ALIGNMENT
            with (self._folder / DATA_FILE).open('ab') as file:
                file.write(bytes(padding) + content)
            self._places[key] = (self._end + padding, len(content))
            self._end += padding + len(content)
        return self._places[key]


def read_whole(path: Path) -> onnx.ModelProto:
    """A graph with its weights inside, as fp32, without the casts of storage."""
    model = onnx.load(str(path))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == 'Cast' else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT16:
            kept.append(node)
            continue
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model
