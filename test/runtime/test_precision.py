"""Lower precisions: against arithmetic by hand, on the shipped model, and through the gate."""

import json
import logging
import shutil
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir
from spanvla_ros.runtime import backend, eight_bit, graph_files, halves
from spanvla_ros.runtime.backend import open_backend
from spanvla_ros.runtime.eight_bit import Calibration, inner_products, quantised
from spanvla_ros.runtime.engines import WAYPOINT_BOUNDS_M
from spanvla_ros.runtime.gate import check_graph, inspect_graph
from spanvla_ros.runtime.golden import load_golden
from spanvla_ros.runtime.graph_files import GraphWriter, read_whole
from spanvla_ros.runtime.onnx_ import INPUTS
from spanvla_ros.runtime.precision import convert_model
from spanvla_ros.types import SpanvlaError

WIDTH = 32
RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) for _ in range(2))


def graph(*, norm=True):
    """`y = rms_norm(x @ A) @ B`, or without the norm."""
    nodes = [helper.make_node('MatMul', ['x', 'A'], ['h'], name='first')]
    if norm:
        nodes += [
            helper.make_node('Pow', ['h', 'two'], ['squares']),
            helper.make_node('ReduceMean', ['squares', 'last'], ['mean'], keepdims=1),
            helper.make_node('Add', ['mean', 'tiny'], ['shifted']),
            helper.make_node('Sqrt', ['shifted'], ['root']),
            helper.make_node('Div', ['h', 'root'], ['n']),
        ]
    nodes.append(helper.make_node('MatMul', ['n' if norm else 'h', 'B'], ['y'], name='second'))
    constants = {
        'A': A,
        'B': B,
        'two': np.float32(2.0),
        'last': np.array([-1]),
        'tiny': np.float32(1e-6),
    }
    used = {name for node in nodes for name in node.input}
    body = helper.make_graph(
        nodes,
        'small',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [4, WIDTH])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [4, WIDTH])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid('', 20)], ir_version=9)


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry('session.disable_quant_qdq', '1')
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {'x': x})[0]


def in_numpy(model, x):
    """Each operator in its own precision: ONNX Runtime on a CPU computes several in fp32."""
    return ReferenceEvaluator(model).run(None, {'x': x})[0]


def normed(x):
    h = x.astype(np.float64) @ A
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) @ B


def test_a_norm_of_large_values_stays_finite_in_half_precision(monkeypatch):
    x = 300.0 * RNG.standard_normal((4, WIDTH)).astype(np.float32)
    low = halves.lowered(graph(), 'fp16')
    assert check_graph(low, precision='fp16').passed
    np.testing.assert_allclose(in_numpy(low, x), normed(x), rtol=0.01, atol=0.05)
    np.testing.assert_allclose(run(low, x), normed(x), rtol=0.01, atol=0.05)
    # Squares of the same values do not fit into fp16.
    monkeypatch.setattr(halves, 'WIDE', frozenset(('Cast',)))
    monkeypatch.setattr(halves, 'WIDE_AFTER', {})
    with np.errstate(over='ignore'):
        squashed = in_numpy(halves.lowered(graph(), 'fp16'), x)
    assert not np.allclose(squashed, normed(x), atol=0.05)


def test_bf16_holds_bf16_products_and_fp32_norms_between_fp32_ends():
    low = halves.lowered(graph(), 'bf16')
    assert check_graph(low, precision='bf16').passed
    assert 'no fp16 graph holds' in ' '.join(inspect_graph(low, precision='fp16').faults)
    stored = {t.name: t for t in low.graph.initializer}
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored['A_low']), A.astype(ml_dtypes.bfloat16)
    )
    kinds = {n.op_type for n in low.graph.node}
    assert 'Cast' in kinds
    # x, h into the norm, n out of it, and y.
    assert sum(n.op_type == 'Cast' for n in low.graph.node) == 4


def test_a_graph_that_only_claims_its_precision_is_caught():
    for precision, said in (('fp16', 'not in fp16'), ('bf16', 'not in bf16'), ('int8', 'no prod')):
        assert said in ' '.join(inspect_graph(graph(), precision=precision).faults)


def by_hand(x, largest, round_):
    """`x @ A @ B`, the second product between values rounded as the precision rounds them."""
    h = x @ A
    scale = np.float32(np.abs(h).max() / largest)
    columns = (np.abs(B).max(0) / largest).astype(np.float32)
    return (round_(h / scale) * scale) @ (round_(B / columns) * columns)


ROUNDINGS = {
    'int8': (127.0, lambda v: np.clip(np.rint(v), -127, 127).astype(np.float32)),
    'fp8': (448.0, lambda v: v.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
}


@pytest.mark.parametrize('precision', ['int8', 'fp8'])
def test_eight_bits_round_as_by_hand(precision):
    x = RNG.standard_normal((4, WIDTH)).astype(np.float32)
    whole = graph(norm=False)
    low = quantised(whole, precision, [{'x': x}])
    assert check_graph(low, precision=precision).passed
    assert inner_products(whole) == ['second']
    largest, round_ = ROUNDINGS[precision]
    found, exact = run(low, x), x @ A @ B
    wanted = by_hand(x, largest, round_)
    # One value on the border of two roundings may fall to the other side.
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted - exact).mean()
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05


def test_a_scale_that_is_not_symmetric_is_caught():
    low = quantised(graph(norm=False), 'int8', [{'x': np.ones((4, WIDTH), np.float32)}])
    pair = next(n for n in low.graph.node if n.op_type == 'QuantizeLinear')
    zero = next(t for t in low.graph.initializer if t.name == pair.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    assert 'not symmetric' in ' '.join(inspect_graph(low, precision='int8').faults)


def test_weights_leave_a_graph_before_it_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_files, 'MAX_PROTO_BYTES', 2 * A.nbytes)
    GraphWriter(tmp_path / 'graphs').write('small', graph())
    path = tmp_path / 'graphs' / 'small.onnx'
    assert path.stat().st_size < A.nbytes < (tmp_path / 'graphs/weights.data').stat().st_size
    assert check_graph(path).passed
    assert run(read_whole(path), np.ones((4, WIDTH), np.float32)).shape == (4, WIDTH)
    monkeypatch.setattr(graph_files, 'EXTERNAL_BYTES', 1 << 40)
    with pytest.raises(SpanvlaError, match='graph small takes'):
        GraphWriter(tmp_path / 'others').write('small', graph())


def test_equal_tensors_are_stored_once_and_halved_only_without_loss(tmp_path):
    exact = np.arange(512, dtype=np.float32)
    inexact = np.linspace(0.0, 1.0, 512, dtype=np.float32)
    writer = GraphWriter(tmp_path / 'graphs')
    for name in ('a', 'b'):
        body = helper.make_graph(
            [
                helper.make_node('Add', ['x', 'exact'], ['s']),
                helper.make_node('Mul', ['s', 'inexact'], ['y']),
            ],
            name,
            [helper.make_tensor_value_info('x', TensorProto.FLOAT, [512])],
            [helper.make_tensor_value_info('y', TensorProto.FLOAT, [512])],
            [
                numpy_helper.from_array(exact, 'exact'),
                numpy_helper.from_array(inexact, 'inexact'),
            ],
        )
        opsets = [helper.make_opsetid('', 20)]
        writer.write(name, helper.make_model(body, opset_imports=opsets, ir_version=10))
    assert (tmp_path / 'graphs/weights.data').stat().st_size == 512 * 2 + 512 * 4
    onnx.checker.check_model(str(tmp_path / 'graphs/a.onnx'))
    session = onnxruntime.InferenceSession(str(tmp_path / 'graphs/a.onnx'))
    x = np.ones(512, np.float32)
    np.testing.assert_array_equal(session.run(None, {'x': x})[0], (x + exact) * inexact)
    whole = read_whole(tmp_path / 'graphs/b.onnx')
    assert [n.op_type for n in whole.graph.node] == ['Add', 'Mul']


@pytest.fixture(scope='module')
def shipped():
    return load_model_dir(shipped_model_dir())


def test_the_shipped_model_in_fp16_plans_within_two_centimetres(shipped, tmp_path):
    found = convert_model(shipped, tmp_path / 'model', 'fp16')
    assert 1e-4 < found.difference_m <= WAYPOINT_BOUNDS_M['fp16']
    directory = load_model_dir(tmp_path / 'model')
    assert directory.precisions == ('fp32', 'fp16')
    assert directory.graph_notes['fp16'] == {'waypoint_difference_m': found.difference_m}
    engine = open_backend(directory, 'onnxruntime:fp16')
    assert engine.name == 'onnxruntime:fp16'
    pixels = np.zeros((1, 3, shipped.config.height_px, shipped.config.width_px), np.float32)
    assert engine.vision(pixels).dtype == np.float32
    # The fp32 graphs are as they were.
    assert {k: v for k, v in directory.files.items() if 'fp16' not in k} == shipped.files


def test_bf16_is_written_and_gated_and_refused_on_a_cpu(shipped, tmp_path):
    assert convert_model(shipped, tmp_path / 'model', 'bf16').difference_m is None
    with pytest.raises(SpanvlaError, match='no bf16 on a CPU'):
        open_backend(tmp_path / 'model', 'onnxruntime:bf16')


@pytest.mark.slow
def test_int8_reads_its_ranges_off_and_gets_golden_plans_of_its_own(shipped, tmp_path):
    golden = load_golden(shipped)
    feeds = {name: [] for name in INPUTS}

    class Recorder:
        config = shipped.config

        def __init__(self):
            self._backend = open_backend(shipped, 'onnxruntime')

        def __getattr__(self, graph):
            def call(*arrays):
                feeds[graph].append(dict(zip(INPUTS[graph], arrays, strict=True)))
                return getattr(self._backend, graph)(*arrays)

            return call

    from spanvla_ros.runtime.export import replay_case

    for case in range(2):
        replay_case(Recorder(), golden, case)
    convert_model(shipped, tmp_path / 'model', 'int8', Calibration(feeds, 'golden', 2))
    directory = load_model_dir(tmp_path / 'model')
    assert directory.graph_notes['int8']['calibrated_on'] == {'scenes': 'golden', 'rows': 2}
    assert 'state_int8' in load_golden(directory)
    assert open_backend(directory, 'onnxruntime:int8').name == 'onnxruntime:int8'


@pytest.mark.parametrize('precision', eight_bit.KINDS)
def test_eight_bits_without_calibration_are_refused_and_leave_nothing(
    shipped, tmp_path, precision, capsys
):
    from spanvla_ros import cli

    out = tmp_path / 'model'
    arguments = ['export', '--model', str(shipped.path), '--out', str(out)]
    assert cli.main([*arguments, '--precision', precision]) == 2
    assert '--calibrate SCENES' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_engines_without_tensorrt_are_refused_before_anything_is_exported(
    shipped, tmp_path, monkeypatch, capsys
):
    from spanvla_ros import cli

    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    out = tmp_path / 'model'
    arguments = ['export', '--model', str(shipped.path), '--out', str(out)]
    assert cli.main([*arguments, '--target', 'tensorrt']) == 2
    assert 'spanvla_ros[gpu]' in capsys.readouterr().err
    assert not out.exists()


def test_auto_passes_by_a_gpu_that_plans_otherwise(shipped, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backend, '_load_onnxruntime_cuda', backend._load_onnxruntime)
    assert backend._load_agreeing_cuda(shipped).name == 'onnxruntime'
    monkeypatch.setitem(WAYPOINT_BOUNDS_M, 'fp32', 1e-9)
    assert open_backend(shipped).name == 'onnxruntime'
    assert 'backend onnxruntime-cuda refused' in caplog.text
    assert 'differs from the golden plans' in caplog.text


def test_a_precision_that_was_not_exported_names_the_command(shipped):
    with pytest.raises(SpanvlaError, match='--precision fp16'):
        open_backend(shipped, 'onnxruntime:fp16')
    assert json.dumps(dict(shipped.graph_notes)) == '{}'


def test_a_copy_that_was_tampered_with_is_not_converted(shipped, tmp_path):
    shutil.copytree(shipped.path, tmp_path / 'model')
    (tmp_path / 'model' / 'graphs' / 'step.onnx').write_bytes(b'')
    with pytest.raises(SpanvlaError, match=r'step\.onnx differs'):
        load_model_dir(tmp_path / 'model')
