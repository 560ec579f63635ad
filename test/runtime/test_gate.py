"""The static gate lets good graphs through and names what is wrong with planted bad ones."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spanvla_ros.model.checkpoint import GRAPHS
from spanvla_ros.runtime.gate import check_graph, inspect_graph
from spanvla_ros.types import SpanvlaError

FLOAT = TensorProto.FLOAT


def model(nodes, *, inputs=(), outputs=(), constants=(), opset=20, domains=()):
    """A model; inputs and outputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        'planted',
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    opsets = [helper.make_opsetid('', opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def relu(shape=(1, 4), kind=FLOAT, opset=20, op='Relu'):
    return model(
        [helper.make_node(op, ['x'], ['y'])],
        inputs=[('x', kind, list(shape))],
        outputs=[('y', kind, list(shape))],
        opset=opset,
    )


def faults(graph):
    report = inspect_graph(graph)
    assert not report.passed
    return ' | '.join(report.faults)


def test_a_plain_static_graph_passes():
    report = check_graph(relu())
    assert report.passed
    assert (report.opset, report.nodes, report.tensors) == (20, 1, 2)


def test_a_planted_dynamic_shape_is_caught():
    assert 'a dimension of x is not a number' in faults(relu(shape=('batch', 4)))


def test_a_shape_that_becomes_dynamic_inside_is_caught():
    graph = model(
        [
            helper.make_node('Reshape', ['x', 'shape'], ['y']),
            helper.make_node('Relu', ['y'], ['z']),
        ],
        inputs=[('x', FLOAT, [1, 4]), ('shape', TensorProto.INT64, [2])],
        outputs=[('z', FLOAT, [4, 1])],
    )
    assert 'y' in faults(graph)


def test_shapes_computed_from_constants_pass():
    nodes = [
        helper.make_node('Shape', ['x'], ['s']),
        helper.make_node('Gather', ['s', 'first'], ['n']),
        helper.make_node('Concat', ['n', 'minus'], ['t'], axis=0),
        helper.make_node('Reshape', ['x', 't'], ['y']),
    ]
    constants = [('first', np.array([0])), ('minus', np.array([-1]))]
    graph = model(
        nodes,
        inputs=[('x', FLOAT, [2, 3, 4])],
        outputs=[('y', FLOAT, [2, 12])],
        constants=constants,
    )
    assert check_graph(graph).passed


def test_a_data_dependent_operator_is_caught():
    graph = model(
        [helper.make_node('NonZero', ['x'], ['y'])],
        inputs=[('x', FLOAT, [1, 4])],
        outputs=[('y', TensorProto.INT64, [2, None])],
    )
    found = faults(graph)
    assert 'NonZero depends on data' in found
    assert 'a dimension of y' in found


def test_a_branch_is_caught():
    inner = [
        helper.make_graph(
            [helper.make_node('Constant', [], [name], value_float=1.0)],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, [])],
        )
        for name in ('a', 'b')
    ]
    node = helper.make_node('If', ['c'], ['y'], then_branch=inner[0], else_branch=inner[1])
    graph = model([node], inputs=[('c', TensorProto.BOOL, [])], outputs=[('y', FLOAT, [])])
    assert 'If depends on data' in faults(graph)


@pytest.mark.parametrize('opset', [20, 22])
def test_a_cosine_in_bfloat16_is_caught(opset):
    found = faults(relu(kind=TensorProto.BFLOAT16, opset=opset, op='Cos'))
    assert 'Cos of x in BFLOAT16' in found
    assert check_graph(relu(op='Cos')).passed


def test_double_precision_is_caught():
    assert 'DOUBLE' in faults(relu(kind=TensorProto.DOUBLE))


@pytest.mark.parametrize('opset', [11, 23])
def test_an_opset_out_of_bounds_is_caught(opset):
    graph = relu(opset=opset)
    assert f'opset {opset}' in faults(graph)


def test_an_operator_outside_the_list_is_caught():
    assert 'Hardmax is not an operator of the allow-list' in faults(relu(op='Hardmax'))


def test_a_domain_of_somebodys_own_is_refused():
    node = helper.make_node('FusedThing', ['x'], ['y'], domain='com.example')
    graph = model(
        [node],
        inputs=[('x', FLOAT, [1])],
        outputs=[('y', FLOAT, [1])],
        domains=['com.example'],
    )
    assert "domain 'com.example'" in faults(graph)


def test_a_type_error_inside_is_caught():
    graph = model(
        [helper.make_node('Add', ['x', 'i'], ['y'])],
        inputs=[('x', FLOAT, [1, 4]), ('i', TensorProto.INT64, [1, 4])],
        outputs=[('y', FLOAT, [1, 4])],
    )
    assert 'not valid ONNX' in faults(graph)


def test_a_file_that_is_none_is_one_fault(tmp_path):
    path = tmp_path / 'step.onnx'
    path.write_bytes(b'\xff\xffnot a graph')
    with pytest.raises(SpanvlaError, match='graph step: no engine can be built'):
        check_graph(path)


def test_missing_weights_beside_the_file_are_a_fault(tmp_path):
    weight = np.ones((64, 64), np.float32)
    graph = model(
        [helper.make_node('MatMul', ['x', 'w'], ['y'])],
        inputs=[('x', FLOAT, [1, 64])],
        outputs=[('y', FLOAT, [1, 64])],
        constants=[('w', weight)],
    )
    path = tmp_path / 'graph.onnx'
    onnx.save_model(
        graph, str(path), save_as_external_data=True, location='w.data', size_threshold=0
    )
    assert check_graph(path).passed
    (tmp_path / 'w.data').unlink()
    assert not inspect_graph(path).passed


def test_the_sentence_names_the_first_faults_and_counts_the_rest():
    with pytest.raises(SpanvlaError, match=r'opset 11.*and \d more.*change the exported module'):
        check_graph(
            model(
                [
                    helper.make_node('NonZero', ['x'], ['y']),
                    helper.make_node('Unique', ['x'], ['z']),
                ],
                inputs=[('x', FLOAT, [4])],
                outputs=[
                    ('y', TensorProto.INT64, [1, None]),
                    ('z', FLOAT, [None]),
                ],
                opset=11,
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize('name', GRAPHS)
def test_every_exported_graph_passes(name, exported_model):
    report = check_graph(exported_model / 'graphs' / f'{name}.onnx')
    assert report.passed
    assert report.nodes > 10


def test_the_toy_graphs_pass_but_for_what_no_engine_takes(toy):
    for name in ('vision', 'prefill_action', 'prefill_reason', 'step'):
        assert check_graph(toy.path / 'graphs' / f'{name}.onnx').passed
