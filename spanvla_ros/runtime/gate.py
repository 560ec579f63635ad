"""The static gate: what an ONNX graph must be before an engine is built from it.

TensorRT can neither parse nor build where no NVIDIA driver is, so this is what can be proved
anywhere: the graph is valid, every dimension of every tensor is a number, every operator and
every type is one TensorRT's parser knows, and nothing depends on data. It is a necessary
condition, not a build. Operators and types: the support matrix of the ONNX parser of TensorRT
10.3, the oldest version the `gpu` extra takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from spanvla_ros.types import SpanvlaError

OPSETS = (17, 20)
ONNX_DOMAINS = ('', 'ai.onnx')
_EVERYWHERE = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
# What a graph of each precision may hold. Weights of the wide ones are stored as fp16.
TYPES = {
    'fp32': frozenset((*_EVERYWHERE, TensorProto.FLOAT16)),
    'fp16': frozenset((*_EVERYWHERE, TensorProto.FLOAT16)),
    'bf16': frozenset((*_EVERYWHERE, TensorProto.BFLOAT16)),
    'int8': frozenset((*_EVERYWHERE, TensorProto.FLOAT16, TensorProto.INT8)),
    'fp8': frozenset((*_EVERYWHERE, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN)),
}
# The type each lower precision is named for.
NAMED_FOR = {
    'fp16': TensorProto.FLOAT16,
    'bf16': TensorProto.BFLOAT16,
    'int8': TensorProto.INT8,
    'fp8': TensorProto.FLOAT8E4M3FN,
}
# The result's shape, or which nodes run, depends on values.
DATA_DEPENDENT = frozenset(
    (
        'Compress',
        'If',
        'Loop',
        'NonMaxSuppression',
        'NonZero',
        'Scan',
        'SequenceAt',
        'SplitToSequence',
        'StringNormalizer',
        'Unique',
    )
)
_OPERATOR_LIST = """
Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum
DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND
Gelu Gemm Greater GreaterOrEqual Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log
MatMul Max Mean Min Mod Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceL2
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze
Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATOR_LIST.split())
# In bfloat16 these lose all meaning for the angles of a rotary turn or of flow time.
ANGULAR = frozenset(('Cos', 'Sin'))


@dataclass(frozen=True)
class GateReport:
    """What the gate found in one graph; `faults` is empty where it passes."""

    graph: str
    opset: int
    nodes: int
    tensors: int
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether an engine may be built from the graph."""
        return not self.faults


def check_graph(
    graph: str | Path | onnx.ModelProto, name: str = '', precision: str = 'fp32'
) -> GateReport:
    """Put a graph through the gate.

    Args:
        graph: an ONNX file, its weights beside it or inside, or a model in memory.
        name: what to call it; a file's own name if empty.
        precision: a key of `TYPES`; inputs and outputs are fp32 in every one.

    Raises:
        SpanvlaError: it does not pass; the sentence names the first faults.
    """
    report = inspect_graph(graph, name, precision)
    if not report.passed:
        shown = '; '.join(report.faults[:3])
        rest = len(report.faults) - 3
        more = f' and {rest} more' if rest > 0 else ''
        raise SpanvlaError(
            f'graph {report.graph}: no engine can be built from it: {shown}{more}; '
            'change the exported module'
        )
    return report


def inspect_graph(
    graph: str | Path | onnx.ModelProto, name: str = '', precision: str = 'fp32'
) -> GateReport:
    """All faults of a graph; nothing is raised for them."""
    if isinstance(graph, onnx.ModelProto):
        name, model, faults = name or graph.graph.name, graph, _check_validity(graph)
        folder = ''
    else:
        path = Path(graph)
        name, folder = name or path.stem, str(path.parent)
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception as error:
            return GateReport(name, 0, 0, 0, (f'not an ONNX file ({_sentence(error)})',))
        # By path, so that the checker finds the weights.
        faults = _check_validity(str(path))
    opset = next((o.version for o in model.opset_import if o.domain in ONNX_DOMAINS), 0)
    faults += _check_operators(model, opset)
    inferred, failure = _infer(model)
    faults += failure
    tensors = list(_values(inferred.graph))
    faults += _check_tensors(inferred.graph, tensors)
    faults += _check_types(inferred.graph, tensors, precision)
    faults += _check_precision(inferred.graph, tensors, precision)
    faults += _check_scales(inferred.graph, tensors, precision, folder)
    return GateReport(name, opset, len(model.graph.node), len(tensors), tuple(faults))


def _check_validity(graph: onnx.ModelProto | str) -> list[str]:
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:
        return [f'not valid ONNX ({_sentence(error)})']
    return []


def _infer(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    try:
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:
        return model, [f'strict shape inference fails ({_sentence(error)})']
    return inferred, []


def _check_operators(model: onnx.ModelProto, opset: int) -> list[str]:
    faults = []
    if not OPSETS[0] <= opset <= OPSETS[1]:
        faults.append(f'opset {opset} is not one of {OPSETS[0]}..{OPSETS[1]}')
    foreign = {o.domain for o in model.opset_import} - set(ONNX_DOMAINS)
    foreign |= {node.domain for node in model.graph.node} - set(ONNX_DOMAINS)
    faults += [f'operators of domain {domain!r} are not ONNX' for domain in sorted(foreign)]
    if model.functions:
        faults.append(f'holds functions of its own ({model.functions[0].name})')
    for kind in sorted({node.op_type for node in model.graph.node}):
        if kind in DATA_DEPENDENT:
            faults.append(f'{kind} depends on data')
        elif kind not in OPERATORS:
            faults.append(f'{kind} is not an operator of the allow-list')
    return faults


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    seen = set()
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name not in seen:
            seen.add(value.name)
            yield value


def _check_tensors(graph: onnx.GraphProto, values: list[onnx.ValueInfoProto]) -> list[str]:
    faults = []
    for value in values:
        tensor = value.type.tensor_type
        if not value.type.HasField('tensor_type') or not tensor.HasField('shape'):
            faults.append(f'{value.name} is not a tensor of known shape')
        elif not all(d.HasField('dim_value') and d.dim_value > 0 for d in tensor.shape.dim):
            faults.append(f'a dimension of {value.name} is not a number above zero')
    known = {value.name for value in values}
    for node in graph.node:
        unknown = [name for name in node.output if name and name not in known]
        faults += [f'nothing is known of {name}, made by {node.op_type}' for name in unknown]
    return faults


def _types(graph: onnx.GraphProto, values: list[onnx.ValueInfoProto]) -> dict[str, int]:
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {constant.name: constant.data_type for constant in graph.initializer}


def _check_types(
    graph: onnx.GraphProto, values: list[onnx.ValueInfoProto], precision: str
) -> list[str]:
    types = _types(graph, values)
    faults = []
    for kind in sorted(set(types.values()) - TYPES[precision]):
        example = min(name for name, other in types.items() if other == kind)
        faults.append(f'{example} is of type {_type_name(kind)}, which no {precision} graph holds')
    faults += [
        f'{node.op_type} of {node.input[0]} in BFLOAT16; make it a table'
        for node in graph.node
        if node.op_type in ANGULAR and types.get(node.input[0]) == TensorProto.BFLOAT16
    ]
    return faults


def _check_precision(
    graph: onnx.GraphProto, values: list[onnx.ValueInfoProto], precision: str
) -> list[str]:
    """Whether a graph of a lower precision is one: what enters it, what multiplies in it."""
    if precision not in NAMED_FOR:
        return []
    types, kind = _types(graph, values), NAMED_FOR[precision]
    makers = {name: node.op_type for node in graph.node for name in node.output}
    faults = [
        f'{value.name} is {_type_name(types[value.name])}; inputs and outputs are fp32 or integer'
        for value in (*graph.input, *graph.output)
        if types[value.name] not in _EVERYWHERE
    ]
    products = [node for node in graph.node if node.op_type in ('MatMul', 'Gemm')]
    if precision in ('fp16', 'bf16'):
        wrong = [node for node in products if types.get(node.input[1]) != kind]
        return faults + [f'{n.op_type} of {n.input[0]} is not in {precision}' for n in wrong]
    pairs = [[makers.get(name, '') for name in node.input[:2]] for node in products]
    if ['DequantizeLinear'] * 2 not in pairs:
        faults.append(f'no product is in {precision}')
    return faults + [
        f'{node.op_type} of {node.input[0]} has one side in {precision} only'
        for node, pair in zip(products, pairs, strict=True)
        if ('DequantizeLinear' in pair) and pair != ['DequantizeLinear'] * 2
    ]


def _check_scales(
    graph: onnx.GraphProto, values: list[onnx.ValueInfoProto], precision: str, folder: str
) -> list[str]:
    """Whether what quantizes does it in the named type, about zero, by stored scales."""
    types, faults = _types(graph, values), []
    stored = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        zero = stored.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.data_type != NAMED_FOR.get(precision):
            faults.append(f'{node.op_type} of {node.input[0]} is not in {precision}')
        elif np.any(numpy_helper.to_array(zero, folder).astype(np.float32)):
            faults.append(f'{node.op_type} of {node.input[0]} is not symmetric')
        if types.get(node.input[1]) != TensorProto.FLOAT or node.input[1] not in stored:
            faults.append(f'{node.op_type} of {node.input[0]} has no stored scale in fp32')
    return faults


def _type_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else str(kind)


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{lines[0] if lines else type(error).__name__:.160}'
