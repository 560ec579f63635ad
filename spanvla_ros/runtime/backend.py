"""The five functions every engine offers, on numpy arrays of static shape, batch 1.

Sizes: C cameras, K frames a camera, n visual tokens a picture, P prompt tokens, R answer tokens,
S = P + R, L layers, B bridged layers (`model.config.bridged_layers`), V vocabulary, T waypoints.
Keys are stored after their rotary turn. `valid` is 1 for a token that may be attended and 0 for
one that is masked. The Euler loop, the schedule and sampling belong to the planner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from spanvla_ros.model.checkpoint import PRECISIONS, ModelDirectory, load_model_dir
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.types import MissingExtraError, SpanvlaError

Array = np.ndarray
_log = logging.getLogger(__name__)


@runtime_checkable
class Backend(Protocol):
    """One loaded model on one engine; not safe for use from two threads at once."""

    @property
    def name(self) -> str:
        """The engine's name, as plans and reports show it."""

    @property
    def config(self) -> ModelConfig:
        """The configuration of the loaded model."""

    def vision(self, pixels: Float32[Array, '1 3 h w']) -> Float32[Array, 'n d']:
        """Visual tokens of one picture with values in 0..1."""

    def prefill_action(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'b 1 g p e'], Float32[Array, 'b 1 g p e']]:
        """Keys and values of the bridged layers; `embeds` holds all pictures, [C*K*n, hidden]."""

    def prefill_reason(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'l 1 g p e'], Float32[Array, 'l 1 g p e'], Float32[Array, '1 v']]:
        """Keys and values of all layers, and the logits after the last prompt token."""

    def decode(
        self,
        token: Int64[Array, '1 1'],
        position: Int64[Array, '1'],
        keys: Float32[Array, 'l 1 g s e'],
        values: Float32[Array, 'l 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> tuple[Float32[Array, '1 v'], Float32[Array, 'l 1 g 1 e'], Float32[Array, 'l 1 g 1 e']]:
        """Logits after one more token at sequence index `position` >= P, and its keys, values.

        Whoever passes the same two arrays again at the next position has written into them, at
        `position`, what this returned, and nothing else: an engine may keep them on its device.
        """

    def step(
        self,
        x: Float32[Array, '1 t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 t 3']:
        """Velocity of the flow at normalized trajectory `x`."""


@runtime_checkable
class ProposingBackend(Protocol):
    """An engine that runs the expert of a head with several states or other numbers (`propose`).

    D draws, A numbers a waypoint: `model.action_heads.ExpertHead`.
    """

    def propose(
        self,
        x: Float32[Array, '1 d t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 d t a']:
        """The expert's answer at the states `x`."""


def ask_expert(
    backend: Backend,
    x: Float32[Array, '1 d t 3'],
    time: Float32[Array, '1 f'],
    ego: Float32[Array, '1 m'],
    keys: Float32[Array, 'b 1 g s e'],
    values: Float32[Array, 'b 1 g s e'],
    valid: Float32[Array, '1 s'],
) -> Float32[Array, '1 d t a']:
    """Run the graph of an expert head once; `step` takes one draw."""
    if backend.config.expert_graph == 'step':
        return backend.step(x[:, 0], time, ego, keys, values, valid)[:, None]
    if not isinstance(backend, ProposingBackend):
        raise SpanvlaError(
            f'backend {backend.name}: runs no head {backend.config.head}; use onnxruntime or torch'
        )
    return backend.propose(x, time, ego, keys, values, valid)


@dataclass(frozen=True)
class DeviceCache:
    """Bridged keys and values that stay on the device of the engine that made them."""

    version: int


@runtime_checkable
class DeviceBackend(Protocol):
    """An engine that runs a plan without bringing keys, values or flow states to the host."""

    def condition(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> DeviceCache:
        """Prefill for the expert; holds until the next `condition` or `step`."""

    def flow(
        self,
        start: Float32[Array, '1 t 3'],
        ego: Float32[Array, '1 m'],
        cache: DeviceCache,
        steps: int,
    ) -> Float32[Array, '1 t 3']:
        """The state at time 1 after `steps` Euler steps from `start` at time 0."""


def _load_tensorrt(directory: ModelDirectory, *, may_build: bool = True) -> Backend:
    from spanvla_ros.runtime.tensorrt_ import TensorRTBackend

    if directory.config.expert_graph != 'step':
        raise SpanvlaError(
            f'{directory.path}: TensorRT runs no head {directory.config.head}; use onnxruntime'
        )
    return TensorRTBackend(directory, may_build=may_build)


def _load_onnxruntime(directory: ModelDirectory, precision: str = 'fp32') -> Backend:
    from spanvla_ros.runtime.onnx_ import OnnxBackend

    return OnnxBackend(directory, precision=precision)


def _load_onnxruntime_cuda(directory: ModelDirectory, precision: str = 'fp32') -> Backend:
    from spanvla_ros.runtime.onnx_ import CUDA, OnnxBackend

    return OnnxBackend(directory, CUDA, precision=precision)


def _load_onnxruntime_tensorrt(directory: ModelDirectory, precision: str = 'fp32') -> Backend:
    from spanvla_ros.runtime.onnx_ import TENSORRT, OnnxBackend

    return OnnxBackend(directory, TENSORRT, precision=precision)


def _load_torch(directory: ModelDirectory) -> Backend:
    try:
        from spanvla_ros.runtime.torch_ import TorchBackend
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] in ('torch', 'transformers'):
            raise MissingExtraError(str(error.name), 'train') from error
        raise
    backend: Backend = TorchBackend(directory)
    return backend


def _load_torch_cuda(directory: ModelDirectory, precision: str = 'fp32') -> Backend:
    try:
        from spanvla_ros.runtime.torch_cuda import TorchCudaBackend
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] in ('torch', 'transformers'):
            raise MissingExtraError(str(error.name), 'train') from error
        raise
    return TorchCudaBackend(directory, precision)


def _load_built_tensorrt(directory: ModelDirectory) -> Backend:
    return _load_tensorrt(directory, may_build=False)


def _load_agreeing_cuda(directory: ModelDirectory) -> Backend:
    """ONNX Runtime on a GPU, if it plans the golden inputs as fp32 must."""
    from spanvla_ros.runtime.engines import WAYPOINT_BOUNDS_M
    from spanvla_ros.runtime.golden import waypoint_difference_m

    backend = _load_onnxruntime_cuda(directory)
    found, allowed = waypoint_difference_m(backend, directory), WAYPOINT_BOUNDS_M['fp32']
    if not found <= allowed:
        raise SpanvlaError(
            f'{directory.path}: differs from the golden plans by {found:.4f} m on this GPU, '
            f'allowed are {allowed:g} m; use onnxruntime'
        )
    return backend


_ONNX_LOADERS = {
    'onnxruntime': _load_onnxruntime,
    'onnxruntime-cuda': _load_onnxruntime_cuda,
    'onnxruntime-tensorrt': _load_onnxruntime_tensorrt,
}
# By name, or by name and precision, such as `onnxruntime:int8`.
LOADERS: dict[str, Callable[[ModelDirectory], Backend]] = {
    'tensorrt': _load_tensorrt,
    **_ONNX_LOADERS,
    'torch': _load_torch,
    'torch-cuda': _load_torch_cuda,
    'torch-cuda:fp16': partial(_load_torch_cuda, precision='fp16'),
    'torch-cuda:bf16': partial(_load_torch_cuda, precision='bf16'),
    **{
        f'{name}:{precision}': partial(load, precision=precision)
        for name, load in _ONNX_LOADERS.items()
        for precision in PRECISIONS[1:]
    },
}
# `auto` starts nothing that takes minutes, and nothing that plans otherwise: TensorRT where the
# engines are built, a GPU where it agrees with the golden plans.
AUTO_LOADERS: dict[str, Callable[[ModelDirectory], Backend]] = {
    'tensorrt': _load_built_tensorrt,
    'onnxruntime-cuda': _load_agreeing_cuda,
    'onnxruntime': _load_onnxruntime,
    'torch': _load_torch,
}


def open_backend(model_dir: str | Path | ModelDirectory, name: str = 'auto') -> Backend:
    """Verify a model directory and load it on an engine.

    Args:
        model_dir: the model directory, or one already verified.
        name: `tensorrt`, `onnxruntime-cuda`, `onnxruntime` (CPU), `torch`, or `auto`: the first
            of these that can run the model here; why each one before it was refused is logged.
            The others are taken only when named. Those of ONNX Runtime also run graphs of another
            precision: `onnxruntime:int8`.

    Raises:
        SpanvlaError: an unknown engine, a directory that does not verify, or a missing library.
    """
    if name != 'auto' and name not in LOADERS:
        raise SpanvlaError(f'backend {name!r} is not known; use auto, {", ".join(LOADERS)}')
    directory = model_dir if isinstance(model_dir, ModelDirectory) else load_model_dir(model_dir)
    if name != 'auto':
        return LOADERS[name](directory)
    refusals: list[str] = []
    for candidate in AUTO_LOADERS:
        backend = _try(candidate, directory, refusals)
        if backend is not None:
            return backend
    raise SpanvlaError(f'{directory.path}: no backend runs it here; {"; ".join(refusals)}')


def _try(name: str, directory: ModelDirectory, refusals: list[str]) -> Backend | None:
    try:
        return AUTO_LOADERS[name](directory)
    except SpanvlaError as error:
        _log.info('backend %s refused: %s', name, error)
        refusals.append(f'{name}: {error}')
        return None
