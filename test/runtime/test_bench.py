"""The benches: what they count, what they propose, and the fields of their summaries."""

import argparse
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from spanvla_ros import cli
from spanvla_ros.model.checkpoint import load_model_dir, write_manifest
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.runtime.bench import budget_ms, propose
from spanvla_ros.runtime.decoder_shapes import DecoderShape, decoder_graph
from spanvla_ros.runtime.gate import check_graph
from spanvla_ros.runtime.memory_bench import measure_memory
from spanvla_ros.runtime.onnx_ import OnnxBackend
from spanvla_ros.runtime.roofline import Ceiling, Work, measure_ceiling, work_of
from spanvla_ros.runtime.timing import Timing, stage_calls, time_in_turns

SHAPE = DecoderShape(
    layers=2, width=12, heads=4, kv_heads=2, head_size=6, inner=20, tokens=3, cached=5, samples=2
)


@pytest.fixture(scope='module')
def sized_toy(toy, tmp_path_factory):
    """The toy model with the sizes of a language model written beside it."""
    path = tmp_path_factory.mktemp('sized') / 'toy'
    shutil.copytree(toy.path, path)
    (path / 'backbone').mkdir(exist_ok=True)
    sizes = {
        'hidden_size': 16,
        'num_hidden_layers': 3,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'intermediate_size': 32,
        'vocab_size': 64,
    }
    (path / 'backbone' / 'config.json').write_text(json.dumps({'text_config': sizes}))
    write_manifest(path)
    return path


def product(rows=8, inner=16, columns=32):
    graph = helper.make_graph(
        [helper.make_node('MatMul', ['a', 'b'], ['c'])],
        'product',
        [helper.make_tensor_value_info('a', TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info('c', TensorProto.FLOAT, [rows, columns])],
        [onnx.numpy_helper.from_array(np.ones((inner, columns), np.float32), 'b')],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9)


def test_the_work_of_a_product_is_counted_by_hand():
    work = work_of(product())
    assert work == Work(flop=2 * 8 * 16 * 32, bytes=4 * (8 * 16 + 16 * 32 + 8 * 32))


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    work = Work(flop=2_000_000, bytes=1_000_000)
    assert work.floor_ms(Ceiling(1e9, 1e9)) == pytest.approx(2.0)
    assert work.floor_ms(Ceiling(1e9, 1e8)) == pytest.approx(10.0)


def test_measured_ceilings_are_those_of_a_real_machine():
    ceiling = measure_ceiling()
    assert 1e8 < ceiling.flop_per_s < 1e14
    assert 1e7 < ceiling.bytes_per_s < 1e13


def reference(shape, graph, x, keys, values):
    """The decoder in plain numpy, head by head and token by token."""
    weights = [onnx.numpy_helper.to_array(c) for c in graph.graph.initializer if len(c.dims) == 2]
    size, groups = shape.head_size, shape.heads // shape.kv_heads

    def norm(rows):
        apart = rows - rows.mean(-1, keepdims=True)
        return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5)

    out = x.astype(np.float64)
    for layer in range(shape.layers):
        key_w, value_w, query_w, out_w, gate_w, up_w, down_w = weights[7 * layer : 7 * layer + 7]
        hidden = norm(out)
        mixed = np.zeros((shape.samples, shape.tokens, shape.heads * size))
        for sample in range(shape.samples):
            for head in range(shape.heads):
                group = head // groups
                own = slice(group * size, (group + 1) * size)
                k = np.concatenate([keys[layer, 0, group], (hidden[sample] @ key_w)[:, own]])
                v = np.concatenate([values[layer, 0, group], (hidden[sample] @ value_w)[:, own]])
                mine = slice(head * size, (head + 1) * size)
                scores = (hidden[sample] @ query_w)[:, mine] @ k.T / np.sqrt(size)
                soft = np.exp(scores - scores.max(-1, keepdims=True))
                mixed[sample, :, mine] = soft / soft.sum(-1, keepdims=True) @ v
        out = out + mixed @ out_w
        hidden = norm(out)
        gate = hidden @ gate_w
        out = out + (gate / (1 + np.exp(-gate)) * (hidden @ up_w)) @ down_w
    return out


def test_a_decoder_of_a_shape_really_is_a_transformer_over_a_cache():
    graph = decoder_graph(SHAPE)
    assert check_graph(graph).passed
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 12), np.float32)
    keys, values = (rng.standard_normal(SHAPE.cache, np.float32) for _ in range(2))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    found = session.run(None, {'x': x, 'keys': keys, 'values': values})[0]
    np.testing.assert_allclose(found, reference(SHAPE, graph, x, keys, values), atol=1e-4)


def test_timing_takes_turns_and_counts_every_call():
    order = []
    timed = time_in_turns({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 4)
    assert order == ['a', 'b'] * (4 + 3)
    assert timed['a'].p50_ms <= timed['a'].p99_ms <= timed['a'].max_ms
    assert Timing(1, 1, 1, cpu_ms=6.0, floor_ms=2.0).multiple == 3.0


def test_every_stage_is_called_with_its_own_shapes(toy):
    calls = stage_calls(OnnxBackend(load_model_dir(toy.path)))
    assert list(calls) == ['vision', 'prefill_action', 'prefill_reason', 'decode', 'step']
    assert calls['step']().shape == (1, 1, toy.config.waypoints, 3)


@pytest.mark.parametrize(('text', 'ms'), [('100ms', 100.0), ('0.05s', 50.0), ('33.3ms', 33.3)])
def test_budgets(text, ms):
    assert budget_ms(text) == pytest.approx(ms)


@pytest.mark.parametrize('text', ['100', 'ms', '-5ms', '0ms', 'fast'])
def test_budgets_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match='100ms'):
        budget_ms(text)


def stages(vision, prefill, step):
    return {
        name: Timing(ms / 2, ms, ms, ms)
        for name, ms in (('vision', vision), ('prefill_action', prefill), ('step', step))
    }


@pytest.mark.parametrize(
    ('budget', 'steps', 'every', 'fits'),
    [(100.0, 10, 1, True), (75.0, 5, 1, True), (55.0, 2, 1, True), (42.0, 1, 4, False)],
)
def test_a_proposal_keeps_the_budget_with_most_steps(budget, steps, every, fits):
    # Three pictures of 10 ms, a prefill of 10 ms, 5 ms a step.
    found = propose({'fp32': stages(10.0, 10.0, 5.0)}, ModelConfig(), budget)
    assert (found.steps, found.vision_every, found.fits) == (steps, every, fits)
    assert found.frame_ms == 40.0 + 5.0 * steps
    assert (found.frame_ms <= budget) == fits


def test_a_proposal_that_does_not_fit_says_what_a_frame_takes_on_average(toy, tmp_path, capsys):
    arguments = ['bench', '--only', 'model', '--model', str(toy.path), '--repeats', '1']
    arguments += ['--backend', 'onnxruntime', '--budget', '0.0001ms', '--out', str(tmp_path)]
    assert cli.main(arguments) == 0
    chosen = json.loads((tmp_path / 'summary.json').read_text())['proposal']
    assert (chosen['steps'], chosen['vision_every'], chosen['fits']) == (1, 4, False)
    assert chosen['mean_ms'] < chosen['frame_ms']
    said = capsys.readouterr().out
    assert 'for 0.0001 ms: 1 steps, vision every 4 frames, precision fp32: ' in said
    assert f'which does not fit; {chosen["mean_ms"]:.1f} ms where most frames' in said


@pytest.mark.parametrize(
    ('budget', 'precision', 'steps'),
    [(100.0, 'fp32', 10), (60.0, 'int8', 10), (45.0, 'int8', 5), (36.0, 'int8', 2)],
)
def test_precision_is_given_up_before_steps_fall_below_the_models_own(budget, precision, steps):
    measured = {'fp32': stages(10.0, 10.0, 5.0), 'int8': stages(6.0, 6.0, 3.0)}
    found = propose(measured, ModelConfig(), budget)
    assert (found.precision, found.steps, found.fits) == (precision, steps, True)


def test_where_no_precision_fits_the_fastest_is_named():
    measured = {'fp32': stages(10.0, 10.0, 5.0), 'int8': stages(6.0, 6.0, 3.0)}
    found = propose(measured, ModelConfig(), 20.0)
    assert (found.precision, found.frame_ms, found.fits) == ('int8', 27.0, False)


@pytest.mark.parametrize(('kept', 'grows'), [(0, False), (4096, True)])
def test_memory_that_is_kept_shows(kept, grows):
    hoard = []
    found = measure_memory(lambda: hoard.append(bytearray(kept)) if kept else None, 400)
    assert found.frames == 400
    assert found.samples[0][0] == 0
    assert found.samples[-1][0] == 400
    assert (found.traced_bytes > 4000) == grows
    assert (found.blocks > 350) == grows


def test_the_model_bench_writes_what_it_measured(toy, tmp_path, capsys):
    arguments = ['bench', '--only', 'model', '--model', str(toy.path), '--repeats', '3']
    arguments += ['--backend', 'onnxruntime', '--against', 'onnxruntime', '--budget', '100ms']
    assert cli.main([*arguments, '--out', str(tmp_path)]) == 0
    summary = json.loads((tmp_path / 'summary.json').read_text())
    step = summary['stages']['onnxruntime']['step']
    assert set(step) == {'p50_ms', 'p99_ms', 'max_ms', 'cpu_ms', 'floor_ms', 'multiple_of_floor'}
    assert step['floor_ms'] > 0
    assert set(summary['steps_sweep']['onnxruntime']) == {'1', '2', '5', '10'}
    assert summary['plan']['onnxruntime']['p50_ms'] > 0
    assert summary['memory']['resident_mb'] > 10
    assert (summary['cameras'], summary['repeats'], summary['threads']) == (3, 3, 1)
    assert summary['proposal']['fits']
    assert 'for 100 ms: 10 steps' in capsys.readouterr().out


def test_the_decoder_bench_compares_all_on_one_cache(sized_toy, tmp_path, capsys):
    arguments = ['bench', '--only', 'decoders', '--model', str(sized_toy), '--repeats', '1']
    arguments += ['--backend', 'onnxruntime', '--out', str(tmp_path)]
    assert cli.main(arguments) == 0
    decoders = json.loads((tmp_path / 'summary.json').read_text())['decoders']
    assert set(decoders) == {
        'AR-10', 'AR-50', 'parallel-10', 'parallel-50', 'diffusion-20x2',
        'flow-1', 'flow-2', 'flow-5', 'flow-10',
    }  # fmt: skip
    assert decoders['AR-10']['AR-10_over_this'] == 1.0
    assert 'flow-10' in capsys.readouterr().out


@pytest.mark.parametrize('wrong', [['--budget', 'soon'], ['--repeats', '0']])
def test_bad_options_are_one_sentence_and_leave_nothing(toy, tmp_path, wrong, capsys):
    arguments = [
        'bench',
        '--only',
        'model',
        '--model',
        str(toy.path),
        '--out',
        str(tmp_path / 'o'),
    ]
    try:
        code = cli.main([*arguments, *wrong])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert not (tmp_path / 'o').exists()


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_frames_of_the_toy(toy, tmp_path):
    arguments = ['bench', '--only', 'model', '--model', str(toy.path), '--repeats', '3']
    arguments += ['--frames', '10000']
    assert cli.main([*arguments, '--backend', 'onnxruntime', '--out', str(tmp_path)]) == 0
    memory = json.loads((tmp_path / 'summary.json').read_text())['memory']
    assert memory['growth_mb'] < 8.0
    # Under memory pressure it shrinks: that is no leak.
    assert memory['slope_mb'] < 0.5
    # One object a frame would be 10,000.
    assert abs(memory['blocks']) < 2000
    assert abs(memory['traced_bytes']) < 64.0
