"""The ONNX Runtime engine: five sessions on exported graphs, no torch.

One thread and no spinning by default: on board the planner shares its cores with cameras and
safety, and a spinning pool would take them between frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from spanvla_ros.model.action_heads import expert_draws
from spanvla_ros.model.checkpoint import ModelDirectory, graphs_of
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import euler, time_features
from spanvla_ros.runtime.backend import DeviceCache
from spanvla_ros.runtime.onnx_memory import BoundSession
from spanvla_ros.types import MissingExtraError, SpanvlaError

Array = np.ndarray
CPU = ('CPUExecutionProvider',)
CUDA = ('CUDAExecutionProvider', *CPU)
# Its default rounds fp32 products to 10 bits, further off than fp32 may be.
_PROVIDER_OPTIONS = {'CUDAExecutionProvider': {'use_tf32': '0'}}
TENSORRT = ('TensorrtExecutionProvider', *CUDA)
EIGHT_BIT = ('int8', 'fp8')
# As `runtime.backend.LOADERS` calls them.
ENGINES = {CPU: 'onnxruntime', CUDA: 'onnxruntime-cuda', TENSORRT: 'onnxruntime-tensorrt'}
INPUTS: Mapping[str, tuple[str, ...]] = {
    'vision': ('pixels',),
    'prefill_action': ('ids', 'embeds', 'valid'),
    'prefill_reason': ('ids', 'embeds', 'valid'),
    'decode': ('token', 'position', 'keys', 'values', 'valid'),
    'step': ('x', 'time', 'ego', 'keys', 'values', 'valid'),
    'propose': ('x', 'time', 'ego', 'keys', 'values', 'valid'),
}
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    'vision': ('embeds',),
    'prefill_action': ('keys', 'values'),
    'prefill_reason': ('keys', 'values', 'logits'),
    'decode': ('logits', 'new_keys', 'new_values'),
    'step': ('velocity',),
    'propose': ('answer',),
}
_LOCATION_KEY = b'\x0a\x08location\x12'


class OnnxBackend:
    """A model on ONNX Runtime; implements `runtime.backend.Backend` and `DeviceBackend`."""

    def __init__(
        self,
        directory: ModelDirectory,
        providers: Sequence[str] = CPU,
        threads: int = 1,
        precision: str = 'fp32',
    ) -> None:
        """Open all five graphs.

        Args:
            directory: a verified model directory.
            providers: execution providers in order of wish.
            threads: threads inside one operator.
            precision: which graphs of the model, one of `model.checkpoint.PRECISIONS`.

        Raises:
            SpanvlaError: ONNX Runtime or a provider is missing, or a graph does not fit.
        """
        self.config: ModelConfig = directory.config
        self.name = engine_name(providers, precision)
        if precision == 'bf16' and tuple(providers) == CPU:
            raise SpanvlaError(
                f'{directory.path}: ONNX Runtime has no bf16 on a CPU; use onnxruntime-cuda:bf16'
            )
        self._sessions = {
            name: _open_session(directory, name, precision, providers, threads)
            for name in graphs_of(self.config)
        }
        _check_shapes(self._sessions, directory)
        device = 'cpu' if tuple(providers) == CPU else 'cuda'
        self._prefill = self._bound('prefill_action', device)
        self._step = None if 'step' not in self._sessions else self._bound('step', device)
        self._version = 0

    def _bound(self, graph: str, device: str) -> BoundSession:
        return BoundSession(self._sessions[graph], OUTPUTS[graph], device)

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
        """Logits after one more token, and its keys and values."""
        logits, new_keys, new_values = self._run('decode', token, position, keys, values, valid)
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
        """Velocity of the flow."""
        return self._run('step', x, time, ego, keys, values, valid)[0]

    def propose(
        self,
        x: Float32[Array, '1 d t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 d t a']:
        """The expert's answer at several states."""
        return self._run('propose', x, time, ego, keys, values, valid)[0]

    def condition(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> DeviceCache:
        """Prefill into the slots that `flow` attends to; holds until the next `condition`."""
        assert self._step is not None
        for name, array in zip(INPUTS['prefill_action'], (ids, embeds, valid), strict=True):
            self._prefill.put(name, array)
        self._prefill.run()
        for name in OUTPUTS['prefill_action']:
            self._step.put(name, self._prefill.get(name))
        self._step.put('valid', valid)
        self._version += 1
        return DeviceCache(self._version)

    def flow(
        self,
        start: Float32[Array, '1 t 3'],
        ego: Float32[Array, '1 m'],
        cache: DeviceCache,
        steps: int,
    ) -> Float32[Array, '1 t 3']:
        """The state at time 1 after `steps` Euler steps; keys and values stay where they are."""
        bound = self._step
        assert bound is not None
        if cache.version != self._version:
            raise SpanvlaError(
                'onnxruntime: a later prefill has overwritten these keys; plan anew'
            )
        bound.put('ego', ego)

        def velocity(x: Array, when: float) -> Array:
            bound.put('x', x)
            bound.put('time', time_features(when)[None])
            bound.run()
            return bound.get('velocity')

        found: Float32[Array, '1 t 3'] = euler(velocity, start, steps)
        return found

    def _run(self, graph: str, *arrays: Array) -> list[Array]:
        feed = dict(zip(INPUTS[graph], arrays, strict=True))
        outputs: list[Array] = self._sessions[graph].run(OUTPUTS[graph], feed)
        return outputs


def engine_name(providers: Sequence[str], precision: str) -> str:
    """What plans and reports call the engine; two that run elsewhere must not share a name."""
    engine = ENGINES.get(tuple(providers), 'onnxruntime')
    return engine if precision == 'fp32' else f'{engine}:{precision}'


def _open_session(
    directory: ModelDirectory, name: str, precision: str, providers: Sequence[str], threads: int
) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError('onnxruntime', 'onnx') from error
    path = directory.graph(name, precision)
    _check_external_data(path, directory)
    absent = sorted(set(providers) - set(onnxruntime.get_available_providers()))
    if absent:
        raise SpanvlaError(
            f'onnxruntime: provider {absent[0]} is not in this build; '
            f'use one of {", ".join(onnxruntime.get_available_providers())}'
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    for key in ('session.intra_op.allow_spinning', 'session.inter_op.allow_spinning'):
        options.add_session_config_entry(key, '0')
    if precision in EIGHT_BIT and tuple(providers) == CPU:
        # Its eight-bit products saturate without VNNI, are slower than fp32, and know no fp8.
        options.add_session_config_entry('session.disable_quant_qdq', '1')
    try:
        chosen = [(name, _PROVIDER_OPTIONS.get(name, {})) for name in providers]
        session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise SpanvlaError(
            f'{path}: ONNX Runtime refuses it ({reason:.200}); run: '
            f'spanvla export --model {directory.path}'
        ) from error
    if (used := session.get_providers()[0]) != providers[0]:
        raise SpanvlaError(
            f'onnxruntime: {providers[0]} does not start here and {used} would run instead; '
            'check driver and CUDA libraries, or use --backend onnxruntime'
        )
    names = (
        tuple(i.name for i in session.get_inputs()),
        tuple(o.name for o in session.get_outputs()),
    )
    if set(names[0]) != set(INPUTS[name]) or not set(OUTPUTS[name]) <= set(names[1]):
        raise SpanvlaError(
            f'{path}: inputs {names[0]} and outputs {names[1]} are not those of {name}; run: '
            f'spanvla export --model {directory.path}'
        )
    return session


def _check_external_data(path: Path, directory: ModelDirectory) -> None:
    """Refuse weights outside the manifest before ONNX Runtime follows the file's own paths."""
    folder = path.parent.relative_to(directory.path).as_posix()
    for location in external_locations(path.read_bytes()):
        pure = PurePosixPath(location)
        listed = f'{folder}/{location}' in directory.files
        if pure.is_absolute() or '..' in pure.parts or not listed:
            raise SpanvlaError(
                f'{path}: keeps weights in {location!r}, which is not a listed file of the model; '
                'fetch the model again'
            )


def external_locations(graph: bytes) -> set[str]:
    """File names an ONNX file keeps weights in, read off its `external_data` entries."""
    found: set[str] = set()
    start = graph.find(_LOCATION_KEY)
    while start >= 0:
        at = start + len(_LOCATION_KEY)
        size = shift = 0
        while at < len(graph):
            byte = graph[at]
            size |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not byte & 0x80:
                break
        found.add(graph[at : at + size].decode('utf-8', errors='replace'))
        start = graph.find(_LOCATION_KEY, at)
    return found


def _check_shapes(sessions: Mapping[str, Any], directory: ModelDirectory) -> None:
    config = directory.config
    wanted: dict[tuple[str, str], tuple[int | None, ...]] = {
        ('vision', 'pixels'): (1, 3, config.height_px, config.width_px),
        ('prefill_action', 'ids'): (1, config.prompt_tokens),
        ('prefill_reason', 'ids'): (1, config.prompt_tokens),
        ('decode', 'valid'): (1, config.sequence_tokens),
        (config.expert_graph, 'valid'): (1, config.sequence_tokens),
    }
    if config.expert_graph == 'step':
        wanted['step', 'x'] = (1, config.waypoints, 3)
    else:
        wanted['propose', 'x'] = (1, expert_draws(config), config.waypoints, 3)
    for (graph, name), shape in wanted.items():
        actual = next(tuple(i.shape) for i in sessions[graph].get_inputs() if i.name == name)
        if actual != shape:
            raise SpanvlaError(
                f'{directory.path}: graph {graph} takes {name} {actual}, config.yaml says '
                f'{shape}; run: spanvla export --model {directory.path}'
            )
