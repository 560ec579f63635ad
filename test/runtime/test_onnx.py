"""What the ONNX Runtime engine refuses, and that it gives what the graphs compute."""

import shutil
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spanvla_ros.model.checkpoint import PRECISIONS, load_model_dir, write_manifest
from spanvla_ros.model.config import dump_config, with_settings
from spanvla_ros.model.flow import euler, time_features
from spanvla_ros.runtime.backend import LOADERS, open_backend
from spanvla_ros.runtime.onnx_ import (
    CPU,
    CUDA,
    TENSORRT,
    OnnxBackend,
    engine_name,
    external_locations,
)
from spanvla_ros.runtime.reasoner import padded
from spanvla_ros.types import MissingExtraError, SpanvlaError


@pytest.fixture
def copy(toy, tmp_path):
    shutil.copytree(toy.path, tmp_path / 'model')
    return tmp_path / 'model'


def test_graphs_give_what_they_compute(toy):
    backend = OnnxBackend(load_model_dir(toy.path))
    image = np.random.default_rng(0).random((1, 3, 112, 224), dtype=np.float32)
    embeds = backend.vision(image)
    np.testing.assert_allclose(embeds[5, :3], image.mean((0, 2, 3)), rtol=1e-4)
    ids = np.arange(164, dtype=np.int64)[None]
    valid = np.ones((1, 164), np.float32)
    keys, values = backend.prefill_action(ids, np.tile(embeds, (3, 1)), valid)
    assert keys.shape == values.shape == (2, 1, 1, 164, 2)
    all_keys, _, logits = backend.prefill_reason(ids, np.tile(embeds, (3, 1)), valid)
    np.testing.assert_array_equal(all_keys[::2], keys)
    assert logits.shape[0] == 1


def test_an_unknown_backend_or_provider_names_the_choices(toy):
    with pytest.raises(SpanvlaError, match='onnxruntime'):
        open_backend(toy.path, 'abacus')
    with pytest.raises(SpanvlaError, match='CPUExecutionProvider'):
        OnnxBackend(load_model_dir(toy.path), providers=('NoSuchProvider',))


def test_without_onnxruntime_the_pip_line_is_named(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(MissingExtraError, match=r'spanvla_ros\[onnx\]'):
        open_backend(toy.path, 'onnxruntime')


def test_a_missing_graph_names_the_export(copy):
    (copy / 'graphs' / 'step.onnx').unlink()
    write_manifest(copy)
    with pytest.raises(SpanvlaError, match='spanvla export'):
        open_backend(copy, 'onnxruntime')


def test_graphs_of_another_layout_are_refused(copy, toy):
    (copy / 'config.yaml').write_text(dump_config(with_settings(toy.config, prompt_tokens=180)))
    write_manifest(copy)
    with pytest.raises(SpanvlaError, match='prefill_action takes ids'):
        open_backend(copy, 'onnxruntime')


def test_a_graph_that_is_none_is_refused_in_one_sentence(copy):
    (copy / 'graphs' / 'step.onnx').write_bytes(b'not a graph')
    write_manifest(copy)
    with pytest.raises(SpanvlaError, match='ONNX Runtime refuses'):
        open_backend(copy, 'onnxruntime')


@pytest.mark.parametrize('location', ['../../secret.data', '/etc/hostname', 'unlisted.data'])
def test_weights_outside_the_model_are_refused(copy, location):
    path = copy / 'graphs' / 'step.onnx'
    graph = onnx.load(str(path))
    outside = TensorProto(name='stolen', data_type=TensorProto.FLOAT, dims=[1])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key='location', value=location)
    graph.graph.initializer.append(outside)
    path.write_bytes(graph.SerializeToString())
    write_manifest(copy)
    with pytest.raises(SpanvlaError, match='not a listed file'):
        open_backend(copy, 'onnxruntime')


def test_external_data_beside_the_graph_is_used_and_found(copy):
    path = copy / 'graphs' / 'decode.onnx'
    graph = onnx.load(str(path))
    onnx.save_model(
        graph, str(path), save_as_external_data=True, location='weights.data', size_threshold=1024
    )
    assert external_locations(path.read_bytes()) == {'weights.data'}
    write_manifest(copy)
    assert OnnxBackend(load_model_dir(copy)).name == 'onnxruntime'


def test_every_engine_of_onnx_runtime_has_the_name_it_is_opened_by():
    named = {
        engine_name(providers, precision)
        for providers in (CPU, CUDA, TENSORRT)
        for precision in PRECISIONS
    }
    assert named == {name for name in LOADERS if name.startswith('onnxruntime')}


def test_inputs_of_other_names_are_refused(copy):
    node = helper.make_node('Identity', ['picture'], ['embeds'])
    shape = [1, 3, 112, 224]
    graph = helper.make_graph(
        [node],
        'vision',
        [helper.make_tensor_value_info('picture', TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info('embeds', TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.save_model(model, str(copy / 'graphs' / 'vision.onnx'))
    write_manifest(copy)
    with pytest.raises(SpanvlaError, match='not those of vision'):
        open_backend(copy, 'onnxruntime')


def test_bound_memory_plans_the_same_as_arrays_handed_over(toy):
    backend, plain = (OnnxBackend(load_model_dir(toy.path)) for _ in range(2))
    rng = np.random.default_rng(0)
    config = toy.config
    pictures = len(config.cameras) * config.frames_per_camera * config.image_tokens
    start = rng.standard_normal((1, config.waypoints, 3)).astype(np.float32)
    ego = rng.standard_normal((1, 20)).astype(np.float32)
    for _ in range(2):
        ids = rng.integers(0, 100, (1, config.prompt_tokens))
        embeds = rng.random((pictures, 4), dtype=np.float32)
        valid = (rng.random((1, config.prompt_tokens)) < 0.8).astype(np.float32)
        cache = backend.condition(ids, embeds, valid)
        keys, values = (
            padded(part, config.sequence_tokens)
            for part in plain.prefill_action(ids, embeds, valid)
        )
        seen = np.pad(valid, ((0, 0), (0, config.answer_room)))

        def velocity(x, when):
            return plain.step(x, time_features(when)[None], ego, keys, values, seen)  # noqa: B023

        found = backend.flow(start, ego, cache, 3)
        np.testing.assert_array_equal(found, euler(velocity, start, 3))
    backend.condition(ids, embeds, valid)
    with pytest.raises(SpanvlaError, match='a later prefill'):
        backend.flow(start, ego, cache, 3)


def test_a_provider_that_quietly_became_another_is_refused(toy, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [*CUDA])
    with (
        pytest.warns(UserWarning, match='CUDAExecutionProvider'),
        pytest.raises(SpanvlaError, match='does not start here'),
    ):
        OnnxBackend(load_model_dir(toy.path), providers=CUDA)
