"""The TensorRT engine on a recording, computing stand-in for the GPU libraries.

No NVIDIA driver runs here. The stand-in holds every name, argument and enum against what the
published Python bindings of two TensorRT versions and of cuda-python declare
(published_gpu_api.json); it keeps device memory of its own, does nothing before the stream is
waited for, freezes addresses when work is captured, and computes an engine with ONNX Runtime from
the bytes at the bound addresses. So a wrong address, shape, order, stream or missing wait gives a
wrong plan or a failed assertion. It says nothing of what TensorRT itself makes of a graph.
"""

import ctypes
import enum
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from spanvla_ros.model.checkpoint import load_model_dir, write_manifest, write_tensors
from spanvla_ros.runtime import selftest
from spanvla_ros.runtime.backend import DeviceBackend, DeviceCache, open_backend
from spanvla_ros.runtime.cuda import CudaError, Device
from spanvla_ros.runtime.golden import GOLDEN_FILE, golden_state
from spanvla_ros.runtime.onnx_ import OnnxBackend
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.runtime.reasoner import Prompt, Reasoner
from spanvla_ros.runtime.tensorrt_ import TensorRTBackend
from spanvla_ros.runtime.tensorrt_build import BuildSettings
from spanvla_ros.types import (
    CameraFrame,
    EgoState,
    MissingExtraError,
    Observation,
    SpanvlaError,
)

PUBLISHED = json.loads(Path(__file__).with_name('published_gpu_api.json').read_text())
VERSIONS = ('10.3.0', '11.4.0')
NUMPY_OF = {onnx.TensorProto.FLOAT: 'FLOAT', onnx.TensorProto.INT64: 'INT64'}
SUCCESS, NO_DEVICE, BAD_CAPTURE = 0, 100, 900


def fits(parameters, arguments, keywords):
    """Whether a call fits one published signature; a `?` ends the name of an optional one."""
    names = [name.rstrip('?') for name in parameters]
    if len(arguments) > len(names) or not set(keywords) <= set(names[len(arguments) :]):
        return False
    given = {*names[: len(arguments)], *keywords}
    return all(name.endswith('?') or name in given for name in parameters)


class Published:
    """An object of the fake library: it has what its published class has, and no more."""

    _kind = ''

    def __init__(self, gpu):
        self._gpu = gpu

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name.startswith('_'):
            return value
        gpu, full = self._gpu, f'{self._kind}.{name}'
        overloads = gpu.published['members'][full]
        if not callable(value):
            assert overloads is None, f'{full} is a method'
            return value

        def call(*arguments, **keywords):
            assert any(fits(o, arguments, keywords) for o in overloads), f'{full}{arguments}'
            gpu.calls.append((full, arguments))
            return value(*arguments, **keywords)

        return call

    def __setattr__(self, name, value):
        if not name.startswith('_'):
            assert self._gpu.published['members'][f'{self._kind}.{name}'] is None
            self._gpu.calls.append((f'{self._kind}.{name}', (value,)))
        object.__setattr__(self, name, value)


class Tensor(Published):
    _kind = 'ITensor'

    def __init__(self, gpu, name, kind, shape):
        super().__init__(gpu)
        self._dtype, self._shape = kind, tuple(shape)
        object.__setattr__(self, 'name', name)


class Layer(Published):
    _kind = 'ILayer'

    def __init__(self, gpu, output):
        super().__init__(gpu)
        self._output = output

    def get_output(self, index):
        assert index == 0
        return self._output


class Network(Published):
    _kind = 'INetworkDefinition'

    def __init__(self, gpu, flags):
        super().__init__(gpu)
        self._flags, self._inputs, self._outputs, self._layers = flags, [], [], []
        self._path = None

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]

    def add_input(self, name, dtype, shape):
        self._inputs.append(Tensor(self._gpu, name, dtype.name, shape))
        return self._inputs[-1]

    def add_elementwise(self, input1, input2, op):
        shape = np.broadcast_shapes(input1._shape, input2._shape)
        output = Tensor(self._gpu, f'layer {len(self._layers)}', input1._dtype, shape)
        self._layers.append((input1, input2, op.name, output))
        return Layer(self._gpu, output)

    def mark_output(self, tensor):
        self._outputs.append(tensor)


class ParserError(Published):
    _kind = 'ParserError'

    def desc(self):
        return 'operator Foo is odd'


class Parser(Published):
    _kind = 'OnnxParser'

    def __init__(self, network, logger):
        super().__init__(network._gpu)
        self._network = network

    num_errors = property(lambda self: 1)

    def get_error(self, index):
        assert index == 0
        return types.SimpleNamespace(desc=lambda: 'operator Foo is odd')

    def parse_from_file(self, model):
        assert isinstance(model, str)
        if self._gpu.refuses_graphs:
            return False
        graph = onnx.load(model).graph
        for values, into in ((graph.input, '_inputs'), (graph.output, '_outputs')):
            for value in values:
                tensor = value.type.tensor_type
                shape = [d.dim_value for d in tensor.shape.dim]
                kind = NUMPY_OF[tensor.elem_type]
                getattr(self._network, into).append(Tensor(self._gpu, value.name, kind, shape))
        self._network._path = model
        return True


class TimingCache(Published):
    _kind = 'ITimingCache'

    def __init__(self, gpu, content):
        super().__init__(gpu)
        self._content = content

    def serialize(self):
        return self._content + b'timing '


class Config(Published):
    _kind = 'IBuilderConfig'

    def __init__(self, gpu):
        super().__init__(gpu)
        self._flags = {'TF32'}
        self._cache = None
        object.__setattr__(self, 'builder_optimization_level', 3)

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        assert pool.name == 'WORKSPACE'

    def create_timing_cache(self, serialized_timing_cache):
        if serialized_timing_cache.startswith(b'broken'):
            return None
        return TimingCache(self._gpu, serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class Builder(Published):
    _kind = 'Builder'

    def create_network(self, flags=0):
        return Network(self._gpu, flags)

    def create_builder_config(self):
        return Config(self._gpu)

    def build_serialized_network(self, network, config):
        self._gpu.built.append((Path(network._path).stem, network._flags, set(config._flags)))
        if self._gpu.builds_nothing:
            return None
        layers = [(a.name, b.name, op, out.name) for a, b, op, out in network._layers]
        tensors = [(t.name, t._dtype, t._shape) for t in (*network._inputs, *network._outputs)]
        inputs = [tensor.name for tensor in network._inputs]
        plan = {'path': network._path, 'layers': layers, 'tensors': tensors, 'inputs': inputs}
        return json.dumps(plan).encode()


class Runtime(Published):
    _kind = 'Runtime'

    def deserialize_cuda_engine(self, serialized_engine):
        return CudaEngine(self._gpu, json.loads(serialized_engine))


class CudaEngine(Published):
    _kind = 'ICudaEngine'

    def __init__(self, gpu, plan):
        super().__init__(gpu)
        self._plan = plan
        self._tensors = {name: (kind, tuple(shape)) for name, kind, shape in plan['tensors']}
        object.__setattr__(self, 'weight_streaming_budget_v2', 0)

    num_io_tensors = property(lambda self: len(self._tensors))

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_shape(self, name):
        return self._tensors[name][1]

    def get_tensor_dtype(self, name):
        return self._gpu.tensorrt.DataType[self._tensors[name][0]]

    def create_execution_context(self):
        return Context(self._gpu, self)


class Context(Published):
    _kind = 'IExecutionContext'

    def __init__(self, gpu, engine):
        super().__init__(gpu)
        self._engine, self._bound = engine, {}

    def set_tensor_address(self, name, memory):
        kind, shape = self._engine._tensors[name]
        nbytes = int(np.prod(shape)) * (8 if kind == 'INT64' else 4)
        assert memory % 256 == 0, f'{name} is not aligned'
        self._gpu.device(memory, nbytes)
        self._bound[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        gpu, bound = self._gpu, dict(self._bound)
        assert stream_handle == int(gpu.stream)
        assert set(bound) == set(self._engine._tensors)
        if gpu.capturing is not None and gpu.refuses_capture:
            return False
        gpu.enqueue(lambda: self._compute(bound))
        return True

    def _compute(self, bound):
        plan, tensors = self._engine._plan, self._engine._tensors
        session = self._gpu.session(plan['path'])

        def view(name):
            kind, shape = tensors[name]
            dtype = np.dtype('i8' if kind == 'INT64' else 'f4')
            raw = self._gpu.device(bound[name], int(np.prod(shape)) * dtype.itemsize)
            return np.frombuffer(raw, dtype).reshape(shape)

        known = {name: view(name).copy() for name in plan['inputs']}
        wanted = [output.name for output in session.get_outputs()]
        feed = {i.name: known[i.name] for i in session.get_inputs()}
        known |= dict(zip(wanted, session.run(wanted, feed), strict=True))
        if 'velocity' in known:
            known['velocity'] = known['velocity'] * np.float32(self._gpu.velocity_error)
        for first, second, op, out in plan['layers']:
            known[out] = {'PROD': np.multiply, 'SUM': np.add}[op](known[first], known[second])
        for name in set(tensors) - set(plan['inputs']):
            view(name)[...] = known[name]


class FakeGpu:
    """The device, cuda-python's runtime module and the tensorrt module."""

    def __init__(self, version):
        self.published = PUBLISHED[f'tensorrt {version}']
        self.calls, self.built, self.pending = [], [], []
        self.memory, self.pinned, self.graphs = {}, {}, {}
        self.capturing = None
        self.stream = 0
        self.next_address = 1 << 40
        self.error_now = SUCCESS
        self.refuses_graphs = self.builds_nothing = self.refuses_capture = False
        self.velocity_error = 1.0
        # Captured and not yet destroyed: what can be launched is made of it and is another thing.
        self.captured_graphs = 0
        self._sessions = {}
        self.runtime, self.tensorrt = self._runtime_module(), self._tensorrt_module(version)

    def session(self, path):
        if path not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[path] = onnxruntime.InferenceSession(path, options)
        return self._sessions[path]

    def device(self, address, nbytes):
        """The bytes of device memory at an address; a piece no allocation holds is an error."""
        for base, content in self.memory.items():
            if base <= address and address + nbytes <= base + len(content):
                return memoryview(content)[address - base : address - base + nbytes]
        raise AssertionError(f'{address:#x} + {nbytes} is not device memory')

    def host(self, address, nbytes):
        for base, content in self.pinned.items():
            if base <= address and address + nbytes <= base + len(content):
                return memoryview(content).cast('B')[address - base : address - base + nbytes]
        raise AssertionError('copies go to and from pinned memory only')

    def enqueue(self, work):
        (self.pending if self.capturing is None else self.capturing).append(work)

    def copies(self, direction, nbytes=None):
        found = [a for name, a in self.calls if name == 'cudaMemcpyAsync' and a[3] == direction]
        return [a for a in found if nbytes is None or a[2] == nbytes]

    def _runtime_module(self):
        module = types.ModuleType('cuda.bindings.runtime')
        module.cudaStreamNonBlocking = 1
        module.cudaError_t = enum.IntEnum(
            'cudaError_t', {'cudaSuccess': 0, 'cudaErrorNoDevice': 100, 'captureError': 900}
        )
        module.cudaMemcpyKind = enum.IntEnum(
            'cudaMemcpyKind',
            {
                'cudaMemcpyHostToDevice': 1,
                'cudaMemcpyDeviceToHost': 2,
                'cudaMemcpyDeviceToDevice': 3,
            },
        )
        module.cudaStreamCaptureMode = enum.IntEnum(
            'cudaStreamCaptureMode', {'cudaStreamCaptureModeThreadLocal': 1}
        )
        for name, parameters in PUBLISHED['cuda-bindings 13.5.0'].items():
            setattr(module, name, self._checked(name, parameters, module))
        return module

    def _checked(self, name, parameters, module):
        work = getattr(self, f'_{name}')

        def call(*arguments):
            assert fits(parameters, arguments, {}), name
            if 'stream' in parameters:
                assert arguments[parameters.index('stream')] is self.stream
            self.calls.append((name, arguments))
            error, *values = work(*arguments)
            return (module.cudaError_t(error), *values)

        return call

    def _tensorrt_module(self, version):
        module = types.ModuleType('tensorrt')
        module.__version__ = version
        for name, members in self.published['enums'].items():
            setattr(module, name, enum.IntEnum(name, members))
        module.Logger = type('Logger', (), {'WARNING': 2, '__init__': lambda self, level: None})
        module.Builder = lambda logger: Builder(self)
        module.OnnxParser = Parser
        module.Runtime = lambda logger: Runtime(self)
        return module

    def _cudaSetDevice(self, device):  # noqa: N802
        return (self.error_now,)

    def _cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        self.stream = type('Stream', (), {'__int__': lambda self: 4096})()
        return SUCCESS, self.stream

    def _cudaGetDeviceProperties(self, device):  # noqa: N802
        return SUCCESS, types.SimpleNamespace(name=b'NVIDIA Fake', major=8, minor=7)

    def _cudaDriverGetVersion(self):  # noqa: N802
        return SUCCESS, 12060

    def _cudaMemGetInfo(self):  # noqa: N802
        return SUCCESS, 6_000_000, 8_000_000

    def _cudaMalloc(self, size):  # noqa: N802
        assert self.capturing is None
        address, self.next_address = self.next_address, self.next_address + size + 4096
        self.next_address -= self.next_address % 4096
        self.memory[address] = bytearray(b'\xee' * size)
        return SUCCESS, address

    def _cudaMemsetAsync(self, address, value, count, stream):  # noqa: N802
        self.enqueue(lambda: self.device(address, count).__setitem__(slice(None), bytes(count)))
        return (SUCCESS,)

    def _cudaHostAlloc(self, size, flags):  # noqa: N802
        content = (ctypes.c_uint8 * size)()
        self.pinned[ctypes.addressof(content)] = content
        return SUCCESS, ctypes.addressof(content)

    def _cudaMemcpyAsync(self, target, source, count, kind, stream):  # noqa: N802
        sides = {1: (self.device, self.host), 2: (self.host, self.device)}[int(kind)]

        def copy():
            sides[0](target, count)[:] = sides[1](source, count)

        self.enqueue(copy)
        return (SUCCESS,)

    def _cudaMemcpy2DAsync(self, target, tp, source, sp, width, rows, kind, stream):  # noqa: N802
        assert int(kind) == 3
        assert width <= min(tp, sp)

        def copy():
            for row in range(rows):
                piece = self.device(source + row * sp, width)
                self.device(target + row * tp, width)[:] = piece

        self.enqueue(copy)
        return (SUCCESS,)

    def _cudaStreamSynchronize(self, stream):  # noqa: N802
        assert self.capturing is None
        while self.pending:
            self.pending.pop(0)()
        return (SUCCESS,)

    def _cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        assert self.capturing is None
        self.capturing = []
        return (SUCCESS,)

    def _cudaStreamEndCapture(self, stream):  # noqa: N802
        captured, self.capturing = self.capturing, None
        if self.refuses_capture:
            return BAD_CAPTURE, None
        self.captured_graphs += 1
        return SUCCESS, captured

    def _cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        self.graphs[id(graph)] = graph
        return SUCCESS, id(graph)

    def _cudaGraphDestroy(self, graph):  # noqa: N802
        self.captured_graphs -= 1
        return (SUCCESS,)

    def _cudaGetLastError(self):  # noqa: N802
        return (BAD_CAPTURE,)

    def _cudaGraphLaunch(self, graph, stream):  # noqa: N802
        for work in self.graphs[graph]:
            self.enqueue(work)
        return (SUCCESS,)

    def _cudaGraphExecDestroy(self, graph):  # noqa: N802
        del self.graphs[graph]
        return (SUCCESS,)

    def _cudaFree(self, address):  # noqa: N802
        del self.memory[address]
        return (SUCCESS,)

    def _cudaFreeHost(self, address):  # noqa: N802
        del self.pinned[address]
        return (SUCCESS,)

    def _cudaStreamDestroy(self, stream):  # noqa: N802
        return (SUCCESS,)


def install(monkeypatch, version):
    gpu = FakeGpu(version)
    bindings, cuda = types.ModuleType('cuda.bindings'), types.ModuleType('cuda')
    bindings.runtime, cuda.bindings = gpu.runtime, bindings
    monkeypatch.setitem(sys.modules, 'cuda', cuda)
    monkeypatch.setitem(sys.modules, 'cuda.bindings', bindings)
    monkeypatch.setitem(sys.modules, 'cuda.bindings.runtime', gpu.runtime)
    monkeypatch.setitem(sys.modules, 'tensorrt', gpu.tensorrt)
    return gpu


@pytest.fixture(params=VERSIONS)
def gpu(request, monkeypatch):
    return install(monkeypatch, request.param)


@pytest.fixture
def old_gpu(monkeypatch):
    return install(monkeypatch, VERSIONS[0])


@pytest.fixture(scope='module')
def golden_toy(toy, tmp_path_factory):
    """The toy model with golden inputs, as ONNX Runtime plans them."""
    path = tmp_path_factory.mktemp('golden') / 'toy'
    shutil.copytree(toy.path, path)
    config, rng = toy.config, np.random.default_rng(0)
    pictures = len(config.cameras) * config.frames_per_camera
    golden = {
        'images': rng.integers(
            0, 255, (1, pictures, config.height_px, config.width_px, 3), dtype=np.uint8
        ),
        'ids': rng.integers(0, 90, (1, config.prompt_tokens)),
        'valid': (rng.random((1, config.prompt_tokens)) > 0.2).astype(np.float32),
        'ego': rng.standard_normal((1, 20)).astype(np.float32),
    }
    golden['state'] = golden_state(OnnxBackend(load_model_dir(path)), golden, 0)
    (path / 'golden_inputs').mkdir()
    write_tensors(path / GOLDEN_FILE, golden)
    write_manifest(path)
    return path


@pytest.fixture
def directory(golden_toy, tmp_path):
    shutil.copytree(golden_toy, tmp_path / 'model')
    return load_model_dir(tmp_path / 'model')


def prompt(config, seed=1):
    rng = np.random.default_rng(seed)
    images = len(config.cameras) * config.frames_per_camera * config.image_tokens
    ids = rng.integers(0, 90, (1, config.prompt_tokens))
    embeds = rng.standard_normal((images, 4)).astype(np.float32)
    valid = (rng.random((1, config.prompt_tokens)) > 0.2).astype(np.float32)
    return ids, embeds, valid


def observation(config, stamp_ns):
    rng = np.random.default_rng(stamp_ns // 1000)
    shape = (config.height_px, config.width_px, 3)
    frames = tuple(
        (CameraFrame(name, stamp_ns, rng.integers(0, 255, shape, dtype=np.uint8)),)
        for name in config.camera_names
    )
    return Observation(
        stamp_ns=stamp_ns,
        frames=frames,
        ego=EgoState(stamp_ns, 0.0, 0.0, 0.0, 5.0),
        history=np.array([[-7.5, 0.1, 0.0], [-5.0, 0.0, 0.0], [-2.5, 0.0, 0.0]]),
        history_valid=np.ones(3, dtype=np.bool_),
        route=None,
    )


def test_all_five_functions_give_what_the_graphs_compute(gpu, directory):
    backend, reference = TensorRTBackend(directory), OnnxBackend(directory)
    assert isinstance(backend, DeviceBackend)
    config, rng = directory.config, np.random.default_rng(2)
    ids, embeds, valid = prompt(config)
    slots = config.sequence_tokens
    seen = np.ones((1, slots), np.float32)
    all_cache = rng.standard_normal((2, 3, 1, 1, slots, 2)).astype(np.float32)
    cache = rng.standard_normal((2, 2, 1, 1, slots, 2)).astype(np.float32)
    at = np.array([config.prompt_tokens])
    calls = {
        'vision': [rng.random((1, 3, config.height_px, config.width_px), dtype=np.float32)],
        'prefill_action': [ids, embeds, valid],
        'prefill_reason': [ids, embeds, valid],
        'decode': [np.array([[7]]), at, *all_cache, seen],
        'step': [
            rng.standard_normal((1, config.waypoints, 3)).astype(np.float32),
            rng.standard_normal((1, 128)).astype(np.float32),
            rng.standard_normal((1, 20)).astype(np.float32),
            *cache,
            seen,
        ],
    }
    for name, arguments in calls.items():
        for _ in range(3):
            ours = getattr(backend, name)(*arguments)
            theirs = getattr(reference, name)(*arguments)
            for one, other in zip(
                ours if isinstance(ours, tuple) else [ours],
                theirs if isinstance(theirs, tuple) else [theirs],
                strict=True,
            ):
                np.testing.assert_array_equal(one, other)
    assert set(calls) <= set(backend.captured)


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_plans_equal_those_of_onnx_runtime_and_caches_stay_on_the_device(
    gpu, directory, toy, steps
):
    from spanvla_ros.model.flow import load_normalization

    plans = {}
    normalization = load_normalization(directory.path, directory.config)
    for backend in (TensorRTBackend(directory), OnnxBackend(directory)):
        planner = Planner(backend, toy.layout, normalization, steps=steps, schedule='off')
        for frame in range(4):
            gpu.calls.clear()
            plan = planner.plan(observation(directory.config, frame * 100_000_000))
            if backend.name == 'tensorrt' and frame == 3:
                check_traffic(gpu, backend, steps)
            plans.setdefault(frame, []).append(plan.trajectory.poses)
    for ours, theirs in plans.values():
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def check_traffic(gpu, backend, steps):
    """A plan by now: a graph a picture, one for the prefill, one for the whole flow."""
    assert {'vision', 'condition', f'flow {steps}'} <= set(backend.captured)
    names = [name for name, _ in gpu.calls]
    assert names.count('cudaGraphLaunch') == 3 + 1 + 1
    assert 'IExecutionContext.execute_async_v3' not in names
    assert 'cudaMalloc' not in names
    config = backend.config
    cache_bytes = 2 * config.sequence_tokens * 2 * 4
    moved = [arguments[2] for name, arguments in gpu.calls if name == 'cudaMemcpyAsync']
    # What is copied outside the graphs: three pictures in, their tokens out.
    picture, tokens = 3 * config.height_px * config.width_px * 4, config.image_tokens * 4 * 4
    assert sorted(moved) == sorted([picture, tokens] * 3)
    assert cache_bytes not in moved


def test_where_capture_fails_calls_are_enqueued(gpu, directory, caplog):
    gpu.refuses_capture = True
    backend = TensorRTBackend(directory)
    ids, embeds, valid = prompt(directory.config)
    ego = np.ones((1, 20), np.float32)
    start = np.zeros((1, directory.config.waypoints, 3), np.float32)
    with caplog.at_level(logging.WARNING):
        states = [
            backend.flow(start, ego, backend.condition(ids, embeds, valid), 5) for _ in range(4)
        ]
    assert 'no CUDA graph' in caplog.text
    assert backend.captured == ()
    gpu.refuses_capture = False
    again = TensorRTBackend(directory)
    for _ in range(3):
        state = again.flow(start, ego, again.condition(ids, embeds, valid), 5)
    assert 'flow 5' in again.captured
    for other in states:
        np.testing.assert_array_equal(state, other)


def test_what_was_captured_is_given_back_even_where_enqueueing_fails(old_gpu):
    def fails():
        raise CudaError('TensorRT does not enqueue; its log above says why')

    device = Device()
    assert device.capture(fails) is None
    assert device.capture(lambda: None) is not None
    assert old_gpu.captured_graphs == 0


def test_a_reasoning_is_the_same_and_its_cache_goes_up_once(gpu, directory, toy):
    ids, embeds, valid = prompt(directory.config)
    said = []
    for backend in (TensorRTBackend(directory), OnnxBackend(directory)):
        for _ in range(2):
            gpu.calls.clear()
            reasoning, answer = Reasoner(backend, toy.layout).run(Prompt(0, ids, embeds, valid))
            cache = answer.cache
            said.append((reasoning, cache.keys, cache.values))
            if backend.name == 'tensorrt':
                assert len(gpu.copies(1, cache.keys.nbytes)) == 2
                assert not gpu.copies(2, cache.keys.nbytes)
    for reasoning, keys, values in said[1:]:
        assert reasoning == said[0][0]
        np.testing.assert_array_equal(keys, said[0][1])
        np.testing.assert_array_equal(values, said[0][2])
    assert said[0][0].text.startswith('lead vehicle')


def test_what_a_later_prefill_overwrote_is_refused(old_gpu, directory):
    backend = TensorRTBackend(directory)
    ids, embeds, valid = prompt(directory.config)
    start = np.zeros((1, directory.config.waypoints, 3), np.float32)
    ego = np.zeros((1, 20), np.float32)
    earlier = backend.condition(ids, embeds, valid)
    backend.condition(ids, embeds, valid)
    with pytest.raises(SpanvlaError, match='later prefill'):
        backend.flow(start, ego, earlier, 2)
    with pytest.raises(SpanvlaError, match='use 1 to'):
        backend.flow(start, ego, backend.condition(ids, embeds, valid), 0)
    with pytest.raises(SpanvlaError, match=r'input ids is int32.*takes int64'):
        backend.condition(ids.astype(np.int32), embeds, valid)
    assert DeviceCache(1) == DeviceCache(1)


def test_engines_are_strongly_typed_and_built_once(gpu, directory):
    TensorRTBackend(directory)
    typed = 1 << int(gpu.tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert [graph for graph, _, _ in gpu.built] == [
        'vision',
        'prefill_action',
        'prefill_reason',
        'decode',
        'step',
    ]
    assert all(flags == typed and options == set() for _, flags, options in gpu.built)
    caches = [a[0] for name, a in gpu.calls if name == 'IBuilderConfig.create_timing_cache']
    assert caches == [b'timing ' * n for n in range(5)]
    added = [a[0] for name, a in gpu.calls if name == 'INetworkDefinition.add_input']
    assert added == ['scale']
    gpu.built.clear()
    again = TensorRTBackend(directory, may_build=False)
    assert gpu.built == []
    assert all(engine.rebuilt_for is None for engine in again.engines.values())
    assert again.golden_difference_m <= 1e-5


def test_settings_reach_the_builder_and_the_key(old_gpu, directory):
    room = BuildSettings('tf32', workspace_bytes=10**9, streamed_bytes=10**8, level=5)
    backend = TensorRTBackend(directory, room)
    assert all(options == {'TF32', 'WEIGHT_STREAMING'} for _, _, options in old_gpu.built)
    calls = dict(old_gpu.calls)
    assert calls['IBuilderConfig.set_memory_pool_limit'][1] == 10**9
    assert calls['IBuilderConfig.builder_optimization_level'] == (5,)
    assert calls['ICudaEngine.weight_streaming_budget_v2'] == (10**8,)
    assert all('tf32' in engine.path.name for engine in backend.engines.values())
    old_gpu.built.clear()
    TensorRTBackend(directory, BuildSettings('fp16'))
    assert all(flags == 0 and 'FP16' in options for _, flags, options in old_gpu.built)
    with pytest.raises(SpanvlaError, match='fp8'):
        TensorRTBackend(directory, BuildSettings('fp8'))
    with pytest.raises(SpanvlaError, match='streamed in fp32'):
        TensorRTBackend(directory, BuildSettings('fp16', streamed_bytes=1))


def test_fp16_by_flag_ends_with_tensorrt_10(monkeypatch, directory):
    install(monkeypatch, VERSIONS[1])
    with pytest.raises(SpanvlaError, match='no fp16 flag'):
        TensorRTBackend(directory, BuildSettings('fp16'))


def test_a_broken_timing_cache_is_started_anew(old_gpu, directory, caplog):
    TensorRTBackend(directory)
    cache = next((directory.path / 'engines').glob('timing-*.cache'))
    cache.write_bytes(b'broken')
    TensorRTBackend(directory, BuildSettings(level=2))
    assert 'not a timing cache' in caplog.text
    assert cache.read_bytes() == b'timing ' * 5


def test_engines_that_plan_otherwise_are_refused(old_gpu, directory):
    old_gpu.velocity_error = 1.1
    with pytest.raises(SpanvlaError, match=r'freshly built fp32 engines differ'):
        TensorRTBackend(directory)
    assert not list((directory.path / 'engines').glob('*.engine'))


def test_auto_takes_built_engines_only_and_says_why(gpu, directory, caplog):
    caplog.set_level(logging.INFO)
    assert open_backend(directory).name == 'onnxruntime'
    assert 'backend tensorrt refused' in caplog.text
    assert 'no engine was built yet' in caplog.text
    assert '--build-only' in caplog.text
    assert gpu.built == []
    assert open_backend(directory, 'tensorrt').name == 'tensorrt'
    assert open_backend(directory).name == 'tensorrt'


@pytest.mark.parametrize('name', ['onnxruntime-cuda', 'onnxruntime-tensorrt'])
def test_an_execution_provider_that_is_not_in_the_build_is_named(directory, name, monkeypatch):
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['CPUExecutionProvider'])
    with pytest.raises(SpanvlaError, match=r'provider \w+ExecutionProvider is not in this build'):
        open_backend(directory, name)


def test_without_the_libraries_or_a_gpu_auto_goes_on(monkeypatch, directory, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(MissingExtraError, match=r'spanvla_ros\[gpu\]'):
        open_backend(directory, 'tensorrt')
    assert open_backend(directory).name == 'onnxruntime'
    gpu = install(monkeypatch, VERSIONS[0])
    gpu.error_now = NO_DEVICE
    with pytest.raises(CudaError, match='cudaSetDevice gives cudaErrorNoDevice'):
        open_backend(directory, 'tensorrt')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setitem(sys.modules, 'spanvla_ros.runtime.torch_', None)
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises((SpanvlaError, ModuleNotFoundError)):
        open_backend(directory)


def test_what_tensorrt_cannot_read_or_build_is_one_sentence(old_gpu, directory):
    old_gpu.builds_nothing = True
    with pytest.raises(SpanvlaError, match='builds no engine from it'):
        TensorRTBackend(directory)
    old_gpu.refuses_graphs = True
    with pytest.raises(SpanvlaError, match=r'cannot read it \(operator Foo is odd\)'):
        TensorRTBackend(directory)


def test_close_gives_everything_back(old_gpu, directory):
    backend = TensorRTBackend(directory)
    ids, embeds, valid = prompt(directory.config)
    for _ in range(3):
        backend.prefill_action(ids, embeds, valid)
    backend.close()
    assert (old_gpu.memory, old_gpu.pinned, old_gpu.graphs) == ({}, {}, {})


def test_the_driver_file_names_the_driver(old_gpu, tmp_path, monkeypatch):
    text = (
        'NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 9\nGCC version: 12\n'
    )
    (tmp_path / 'version').write_text(text)
    monkeypatch.setattr('spanvla_ros.runtime.cuda.DRIVER_FILE', tmp_path / 'version')
    assert Device().driver_version == '570.86.15'
    monkeypatch.setattr('spanvla_ros.runtime.cuda.DRIVER_FILE', tmp_path / 'none')
    device = Device()
    assert (device.driver_version, device.used_bytes) == ('cuda 12060', 2_000_000)


def test_the_selftest_prints_its_block(old_gpu, directory, capsys):
    model = ['--model', str(directory.path)]
    assert selftest.main(['--build-only', *model]) == 0
    assert 'built (no engine was built yet)' in capsys.readouterr().out
    small = directory.path / 'graphs' / 'decode.onnx'
    assert small.is_file()
    assert selftest.main(['--selftest', '--repeats', '3', *model]) == 0
    out = capsys.readouterr().out
    for line in (
        'NVIDIA Fake',
        'largest waypoint difference',
        'flow, 10 steps',
        'frame, 3 pictures',
        'decoded tokens 32 of 32 as onnxruntime',
    ):
        assert line in out
    assert selftest.main(['--selftest', '--model', str(directory.path / 'none')]) == 2
