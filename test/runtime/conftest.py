"""A toy model of five small ONNX graphs with the real signatures, run by ONNX Runtime."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spanvla_ros.model.checkpoint import write_manifest, write_text
from spanvla_ros.model.config import ModelConfig, dump_config
from spanvla_ros.model.flow import Normalization, write_normalization
from spanvla_ros.model.prompt import (
    PromptLayout,
    build_tokenizer,
    token_id,
    write_tokenizer,
)

LAYERS, BRIDGED, HEAD_SIZE, HIDDEN = 3, 2, 2, 4
SAID = '<think> lead vehicle 15 m braking ; decelerate , keep lane </think>'
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


@dataclass(frozen=True)
class ToyModel:
    """The toy's files and layout, and what its graphs compute, in numpy."""

    path: object
    config: ModelConfig
    layout: PromptLayout
    std: np.ndarray

    def pooled(self, ids, valid, embeds):
        """What the toy's expert reads off prompt keys."""
        row = ids * valid * 1e-3 + embeds.mean()
        return (row * valid).sum() / valid.sum()

    def velocity(self, x, pooled, ego, time):
        return pooled + 0.01 * ego.mean() - 0.5 * x + 0.1 * time.mean()


def _value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def _graph(name, nodes, inputs, outputs, constants):
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def vision_graph(config):
    nodes = [
        _node('ReduceMean', 'pixels axes', 'mean', keepdims=0),
        _node('Pad', 'mean pads', 'padded'),
        _node('Expand', 'padded shape', 'embeds'),
    ]
    constants = {
        'axes': np.array([2, 3]),
        'pads': np.array([0, 0, 0, HIDDEN - 3]),
        'shape': np.array([config.image_tokens, HIDDEN]),
    }
    return _graph(
        'vision',
        nodes,
        [_value('pixels', FLOAT, [1, 3, config.height_px, config.width_px])],
        [_value('embeds', FLOAT, [config.image_tokens, HIDDEN])],
        constants,
    )


def prefill_graph(config, layers, vocabulary=None):
    length = config.prompt_tokens
    shape = [layers, 1, 1, length, HEAD_SIZE]
    nodes = [
        _node('Cast', 'ids', 'ids_f', to=FLOAT),
        _node('Mul', 'ids_f valid', 'masked'),
        _node('Mul', 'masked milli', 'small'),
        _node('ReduceMean', 'embeds', 'seen', keepdims=0),
        _node('Add', 'small seen', 'row'),
        _node('Reshape', 'row column', 'tall'),
        _node('Expand', 'tall shape', 'keys'),
        _node('Mul', 'keys two', 'values'),
    ]
    constants = {
        'milli': np.float32(1e-3),
        'two': np.float32(2.0),
        'column': np.array([1, 1, 1, length, 1]),
        'shape': np.array(shape),
    }
    outputs = [_value('keys', FLOAT, shape), _value('values', FLOAT, shape)]
    if vocabulary:
        nodes += [_node('Identity', 'zeros', 'logits')]
        constants['zeros'] = np.zeros((1, vocabulary), np.float32)
        outputs.append(_value('logits', FLOAT, [1, vocabulary]))
    pictures = len(config.cameras) * config.frames_per_camera * config.image_tokens
    return _graph(
        'prefill',
        nodes,
        [
            _value('ids', INT, [1, length]),
            _value('embeds', FLOAT, [pictures, HIDDEN]),
            _value('valid', FLOAT, [1, length]),
        ],
        outputs,
        constants,
    )


def decode_graph(config, next_token, loud_token):
    """Says the next word of a fixed chain, and shouts one token that is never allowed."""
    vocabulary = len(next_token)
    cache = [LAYERS, 1, 1, config.sequence_tokens, HEAD_SIZE]
    new = [LAYERS, 1, 1, 1, HEAD_SIZE]
    loud = np.zeros((1, vocabulary), np.float32)
    loud[0, loud_token] = 5.0
    nodes = [
        _node('Gather', 'table token', 'next'),
        _node('Reshape', 'next one', 'next_flat'),
        _node('OneHot', 'next_flat depth range', 'hot', axis=-1),
        _node('Add', 'hot loud', 'logits'),
        _node('Cast', 'token', 'token_raw', to=FLOAT),
        _node('Mul', 'token_raw milli', 'token_f'),
        _node('Reshape', 'token_f five', 'token_5'),
        _node('Expand', 'token_5 shape', 'new_keys'),
        _node('ReduceSum', 'keys', 'sum_keys', keepdims=0),
        _node('ReduceSum', 'values', 'sum_values', keepdims=0),
        _node('ReduceSum', 'valid', 'sum_valid', keepdims=0),
        _node('Cast', 'position', 'position_f', to=FLOAT),
        _node('Add', 'sum_keys sum_values', 'sums'),
        _node('Mul', 'sums zero', 'nothing'),
        _node('Add', 'sum_valid nothing', 'seen'),
        _node('Sub', 'position_f seen', 'off'),
        _node('Add', 'new_keys off', 'new_values'),
    ]
    constants = {
        'table': next_token,
        'one': np.array([1]),
        'depth': np.array(vocabulary),
        'range': np.array([0.0, 1.0], np.float32),
        'loud': loud,
        'five': np.array([1, 1, 1, 1, 1]),
        'shape': np.array(new),
        'zero': np.float32(0.0),
        'milli': np.float32(1e-3),
    }
    return _graph(
        'decode',
        nodes,
        [
            _value('token', INT, [1, 1]),
            _value('position', INT, [1]),
            _value('keys', FLOAT, cache),
            _value('values', FLOAT, cache),
            _value('valid', FLOAT, [1, config.sequence_tokens]),
        ],
        [
            _value('logits', FLOAT, [1, vocabulary]),
            _value('new_keys', FLOAT, new),
            _value('new_values', FLOAT, new),
        ],
        constants,
    )


def step_graph(config):
    length = config.sequence_tokens
    cache = [BRIDGED, 1, 1, length, HEAD_SIZE]
    nodes = [
        _node('ReduceMean', 'keys outer', 'row', keepdims=0),
        _node('Mul', 'row valid', 'masked'),
        _node('ReduceSum', 'masked', 'total', keepdims=0),
        _node('ReduceSum', 'valid', 'count', keepdims=0),
        _node('Div', 'total count', 'pooled'),
        _node('ReduceMean', 'ego', 'ego_mean', keepdims=0),
        _node('Mul', 'ego_mean centi', 'ego_part'),
        _node('ReduceMean', 'time', 'time_mean', keepdims=0),
        _node('Mul', 'time_mean tenth', 'time_part'),
        _node('Mul', 'x half', 'pull'),
        _node('ReduceMean', 'values', 'values_mean', keepdims=0),
        _node('Mul', 'values_mean zero', 'values_part'),
        _node('Add', 'pooled ego_part', 'a'),
        _node('Add', 'a time_part', 'b'),
        _node('Add', 'b values_part', 'c'),
        _node('Sub', 'c pull', 'velocity'),
    ]
    constants = {
        'outer': np.array([0, 1, 2, 4]),
        'centi': np.float32(0.01),
        'tenth': np.float32(0.1),
        'half': np.float32(0.5),
        'zero': np.float32(0.0),
    }
    shape = [1, config.waypoints, 3]
    return _graph(
        'step',
        nodes,
        [
            _value('x', FLOAT, shape),
            _value('time', FLOAT, [1, 128]),
            _value('ego', FLOAT, [1, 20]),
            _value('keys', FLOAT, cache),
            _value('values', FLOAT, cache),
            _value('valid', FLOAT, [1, length]),
        ],
        [_value('velocity', FLOAT, shape)],
        constants,
    )


def build_toy(path, config=None, said=SAID):
    """Write a whole toy model directory that says `said` when it reasons."""
    config = config or ModelConfig()
    tokenizer = build_tokenizer()
    layout = PromptLayout(config, tokenizer)
    vocabulary = tokenizer.get_vocab_size()
    chain = [token_id(tokenizer, word) for word in said.split()]
    next_token = np.zeros(vocabulary, np.int64)
    next_token[chain[:-1]] = chain[1:]
    (path / 'graphs').mkdir(parents=True)
    graphs = {
        'vision': vision_graph(config),
        'prefill_action': prefill_graph(config, BRIDGED),
        'prefill_reason': prefill_graph(config, LAYERS, vocabulary),
        'decode': decode_graph(config, next_token, int(layout.action_ids[0])),
        'step': step_graph(config),
    }
    for name, graph in graphs.items():
        onnx.save_model(graph, str(path / 'graphs' / f'{name}.onnx'))
    write_text(path / 'config.yaml', dump_config(config))
    write_tokenizer(path, tokenizer)
    std = np.tile([2.0, 0.5, 0.1], (config.waypoints, 1))
    write_normalization(path, Normalization(config.source, std))
    write_manifest(path, training={'how': 'by hand'})
    return ToyModel(path, config, layout, std)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp('models') / 'toy')


@pytest.fixture(scope='session')
def exported_model(tmp_path_factory):
    """A whole model directory with fresh weights, its five graphs made by `spanvla export`."""
    from spanvla_ros.model.policy import new_policy, save_policy
    from spanvla_ros.runtime.export import export_model

    config = ModelConfig()
    policy = new_policy(config)
    std = np.tile([2.0, 0.5, 0.1], (config.waypoints, 1))
    policy.normalization = Normalization(config.source, std)
    path = tmp_path_factory.mktemp('exported') / 'model'
    save_policy(policy, path, training={'how': 'fresh weights'})
    export_model(path, path)
    return path
