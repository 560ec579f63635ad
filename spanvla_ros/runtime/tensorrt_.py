"""The TensorRT engine: static engines on the target, run without torch.

Keys and values stay on the device: `condition` prefills into the very slots that `flow` attends
to, and `decode` writes a new token into its place. The Euler update is part of the step engine,
so that all steps of a plan are one CUDA graph; so is the prefill, and a picture. Host memory is
pinned. An engine set plans only after it agreed with the model's golden inputs.

On the target, `python -m spanvla_ros.runtime.tensorrt_ --selftest` builds, compares and times.
Only that proves it: no engine was built where this was written (docs/engines.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from spanvla_ros.model.checkpoint import ModelDirectory
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import TIME_FEATURES, time_features
from spanvla_ros.runtime.backend import DeviceCache
from spanvla_ros.runtime.cuda import Buffer, CudaError, Device, Replay
from spanvla_ros.runtime.engines import Engine, EngineStore, open_activated
from spanvla_ros.runtime.golden import waypoint_difference_m
from spanvla_ros.runtime.onnx_ import INPUTS, OUTPUTS
from spanvla_ros.runtime.tensorrt_build import (
    BuildSettings,
    EngineBuilder,
    import_tensorrt,
    platform_of,
    require_built,
)
from spanvla_ros.types import SpanvlaError

Array = np.ndarray
FLOAT_BYTES = 4
MAX_STEPS = 64
_KINDS = {'FLOAT': 'f4', 'HALF': 'f2', 'INT64': 'i8', 'INT32': 'i4', 'BOOL': '?'}


class TensorRTBackend:
    """A model on TensorRT; implements `runtime.backend.Backend` and `DeviceBackend`."""

    name = 'tensorrt'

    def __init__(
        self,
        directory: ModelDirectory,
        settings: BuildSettings | None = None,
        *,
        may_build: bool = True,
    ) -> None:
        """Open the engines of a model, building those that no passport covers.

        Args:
            directory: a verified model directory with graphs and golden inputs.
            settings: how to build.
            may_build: False refuses where an engine is missing, instead of building for minutes.

        Raises:
            SpanvlaError: TensorRT or the GPU is missing, an engine cannot be built, or the
                engines disagree with the model's golden inputs.
        """
        self.config: ModelConfig = directory.config
        self._directory = directory
        self._settings = settings or BuildSettings()
        trt = import_tensorrt()
        self.device = Device()
        self.platform = platform_of(trt, self.device)
        builder = EngineBuilder(trt, directory, self._settings, self.platform)
        store = EngineStore(directory.path)
        if not may_build:
            require_built(store, builder.keys, directory.path)
        self._trt = trt
        self._runtime = trt.Runtime(builder.logger)
        self._networks: dict[str, _Network] = {}
        self._replays: dict[str, Replay] = {}
        # The cache `decode` holds on the device: the host's arrays, and the next position.
        self._decoding: tuple[Array, Array, int] | None = None
        self._conditioned = 0
        self.engines: Mapping[str, Engine] = {}
        self.golden_difference_m = float('nan')
        open_activated(store, builder.keys, builder.build, self._open, self._compare)

    def vision(self, pixels: Float32[Array, '1 3 h w']) -> Float32[Array, 'n d']:
        """Visual tokens of one picture."""
        return self._run('vision', pixels)[0]

    def prefill_action(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'b 1 g p e'], Float32[Array, 'b 1 g p e']]:
        """Keys and values of the bridged layers."""
        keys, values = self._run('prefill_action', ids, embeds, valid)
        return keys, values

    def prefill_reason(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'l 1 g p e'], Float32[Array, 'l 1 g p e'], Float32[Array, '1 v']]:
        """Keys and values of all layers, logits after the last prompt token."""
        keys, values, logits = self._run('prefill_reason', ids, embeds, valid)
        return keys, values, logits

    def decode(
        self,
        token: Int64[Array, '1 1'],
        position: Int64[Array, '1'],
        keys: Float32[Array, 'l 1 g s e'],
        values: Float32[Array, 'l 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> tuple[Float32[Array, '1 v'], Float32[Array, 'l 1 g 1 e'], Float32[Array, 'l 1 g 1 e']]:
        """Logits after one more token, and its keys and values.

        The cache is uploaded once an episode: when the very arrays of the last call come again
        at the next position, what was returned then is already in its place on the device.
        """
        network, at = self._networks['decode'], int(position[0])
        resident = self._decoding
        follows = resident is not None and resident[0] is keys and resident[1] is values
        if not (follows and resident is not None and resident[2] == at):
            network.fill('keys', keys)
            network.fill('values', values)
        network.fill('token', token)
        network.fill('position', position)
        network.fill('valid', valid)
        self._replays['decode']()
        for name in ('keys', 'values'):
            self._into_slot(network.buffers[f'new_{name}'], network.buffers[name], at)
        logits, new_keys, new_values = network.read(self.device, OUTPUTS['decode'])
        self._decoding = (keys, values, at + 1)
        return logits, new_keys, new_values

    def step(
        self,
        x: Float32[Array, '1 t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 t 3']:
        """Velocity of the flow; uploads the whole cache, `flow` does not."""
        self._conditioned += 1
        return self._run('step', x, time, ego, keys, values, valid)[0]

    def condition(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> DeviceCache:
        """Prefill into the slots of the step engine; returns before the GPU is done."""
        prefill, step = self._networks['prefill_action'], self._networks['step']
        # The pinned inputs may still be on their way to the device for the frame before.
        self.device.synchronize()
        for name, array in (('ids', ids), ('embeds', embeds), ('valid', valid)):
            prefill.stage(name, array)
        step.stage('valid', np.pad(valid, ((0, 0), (0, self.config.answer_room))))
        self._replays['condition']()
        self._conditioned += 1
        return DeviceCache(self._conditioned)

    def flow(
        self,
        start: Float32[Array, '1 t 3'],
        ego: Float32[Array, '1 m'],
        cache: DeviceCache,
        steps: int,
    ) -> Float32[Array, '1 t 3']:
        """The state at time 1 after `steps` Euler steps on what `condition` prefilled last."""
        if cache.version != self._conditioned:
            raise SpanvlaError('flow: a later prefill overwrote that cache; condition again')
        if not 1 <= steps <= MAX_STEPS:
            raise SpanvlaError(f'flow: {steps} steps; use 1 to {MAX_STEPS}')
        network = self._networks['step']
        name = f'flow {steps}'
        if name not in self._replays:
            self._replays[name] = Replay(self.device, self._flow_of(steps))
        network.stage('x', start)
        network.stage('ego', ego)
        self._replays[name]()
        self.device.synchronize()
        state: Array = self._states[steps % 2].host.copy()
        return state

    def close(self) -> None:
        """Free the device; the backend is of no use afterwards."""
        self._networks = {}
        self.device.close()

    @property
    def captured(self) -> tuple[str, ...]:
        """What runs as a CUDA graph by now."""
        return tuple(name for name, replay in self._replays.items() if replay.captured)

    def _open(self, engines: Mapping[str, Engine]) -> TensorRTBackend:
        self.engines = engines
        self._networks = {
            name: _Network(self._deserialize(name, engine), self.device)
            for name, engine in engines.items()
        }
        for name, network in self._networks.items():
            network.expect(name)
        step = self._networks['step']
        # Two states, read and written in turn; the second one's buffer is the engine's output.
        self._states = (step.buffers['x'], step.buffers['x_next'])
        self._replays = {
            name: Replay(self.device, network.enqueue) for name, network in self._networks.items()
        }
        self._replays['condition'] = Replay(self.device, self._enqueue_condition)
        return self

    def _deserialize(self, name: str, engine: Engine) -> Any:
        opened = self._runtime.deserialize_cuda_engine(engine.content)
        if opened is None:
            raise SpanvlaError(
                f'{engine.path}: TensorRT does not read this engine of {name}; remove the file'
            )
        if self._settings.streamed_bytes is not None:
            opened.weight_streaming_budget_v2 = self._settings.streamed_bytes
        return opened

    def _compare(self, opened: TensorRTBackend) -> float:
        self.golden_difference_m = waypoint_difference_m(opened, self._directory)
        return self.golden_difference_m

    def _run(self, graph: str, *arrays: Array) -> list[Array]:
        network = self._networks[graph]
        # `condition` may still be reading pinned memory.
        self.device.synchronize()
        for name, array in zip(INPUTS[graph], arrays, strict=True):
            network.fill(name, array)
        self._replays[graph]()
        return network.read(self.device, OUTPUTS[graph])

    def _enqueue_condition(self) -> None:
        prefill, step = self._networks['prefill_action'], self._networks['step']
        for name in INPUTS['prefill_action']:
            self.device.upload(prefill.buffers[name])
        self.device.upload(step.buffers['valid'])
        prefill.enqueue()
        for name in ('keys', 'values'):
            self._into_slot(prefill.buffers[name], step.buffers[name], 0)

    def _into_slot(self, source: Buffer, target: Buffer, at: int) -> None:
        """Copy tokens [.., p, e] to slots `at`.. of [.., s, e] on the device."""
        *rows, tokens, size = source.host.shape
        slots = target.host.shape[-2]
        item = source.host.itemsize * size
        if not 0 <= at <= slots - tokens:
            raise SpanvlaError(f'tokens at {at} do not fit the {slots} slots of the cache')
        self.device.copy_rows(
            target.address + at * item,
            slots * item,
            source.address,
            tokens * item,
            tokens * item,
            int(np.prod(rows)),
        )

    def _flow_of(self, steps: int) -> Any:
        """What enqueues a whole flow; its times and its step length are on the device before."""
        network, device = self._networks['step'], self.device
        table = device.buffer((steps, TIME_FEATURES), np.float32)
        table.host[:] = [time_features(index / steps) for index in range(steps)]
        scale = device.buffer((1, 1, 1), np.float32)
        scale.host[:] = 1.0 / steps
        device.upload(table)
        device.upload(scale)
        row = TIME_FEATURES * FLOAT_BYTES

        def enqueue() -> None:
            device.upload(self._states[0])
            device.upload(network.buffers['ego'])
            for index in range(steps):
                network.bind('x', self._states[index % 2].address)
                network.bind('x_next', self._states[(index + 1) % 2].address)
                network.bind('time', table.address + index * row)
                network.bind('scale', scale.address)
                network.enqueue()
            network.bind_all()
            device.download(self._states[steps % 2])

        return enqueue


class _Network:
    """One engine, its execution context, and a buffer bound to each of its tensors."""

    def __init__(self, engine: Any, device: Device) -> None:
        self._engine = engine
        self._device = device
        self._context = engine.create_execution_context()
        if self._context is None:
            raise CudaError('TensorRT gives no execution context; is the device out of memory?')
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.buffers = {
            name: device.buffer(
                tuple(engine.get_tensor_shape(name)), _KINDS[engine.get_tensor_dtype(name).name]
            )
            for name in names
        }
        self.bind_all()

    def expect(self, graph: str) -> None:
        """Refuse an engine whose tensors are not those of `graph`."""
        added = {'scale', 'x_next'} if graph == 'step' else set()
        wanted = {*INPUTS[graph], *OUTPUTS[graph], *added}
        if set(self.buffers) != wanted:
            odd = sorted(set(self.buffers) ^ wanted)[0]
            raise SpanvlaError(f'engine of {graph}: tensor {odd} is odd; remove the engine')

    def bind(self, name: str, address: int) -> None:
        """Let a tensor live at a device address from the next enqueue on."""
        if not self._context.set_tensor_address(name, address):
            raise CudaError(f'TensorRT refuses the address of tensor {name}')

    def bind_all(self) -> None:
        """Let every tensor live in its own buffer."""
        for name, buffer in self.buffers.items():
            self.bind(name, buffer.address)

    def stage(self, name: str, array: Array) -> None:
        """Put an input into pinned memory; whoever enqueues uploads it."""
        host = self.buffers[name].host
        if array.shape != host.shape or array.dtype != host.dtype:
            raise SpanvlaError(
                f'input {name} is {array.dtype}{list(array.shape)}, the engine takes '
                f'{host.dtype}{list(host.shape)}'
            )
        host[...] = array

    def fill(self, name: str, array: Array) -> None:
        """Put an input into pinned memory and on its way to the device."""
        self.stage(name, array)
        self._device.upload(self.buffers[name])

    def enqueue(self) -> None:
        """Put one run of the engine on the stream."""
        if not self._context.execute_async_v3(int(self._device.stream)):
            raise CudaError('TensorRT does not enqueue; its log above says why')

    def read(self, device: Device, names: tuple[str, ...]) -> list[Array]:
        """Wait, and copy outputs out of pinned memory."""
        for name in names:
            device.download(self.buffers[name])
        device.synchronize()
        return [self.buffers[name].host.copy() for name in names]


if __name__ == '__main__':
    from spanvla_ros.runtime.selftest import main

    sys.exit(main())
