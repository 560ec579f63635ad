"""Building TensorRT engines on the target from the ONNX graphs of a model directory.

Checked against the published Python bindings of TensorRT 10.3 and 11.4: networks are always
explicit-batch there and, from 11 on, always strongly typed; precision flags exist in 10 only.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spanvla_ros.model.checkpoint import GRAPHS, ModelDirectory
from spanvla_ros.runtime.cuda import Device
from spanvla_ros.runtime.engines import (
    Diagnosis,
    EngineKey,
    EngineStore,
    Platform,
    engine_key,
    write_durably,
)
from spanvla_ros.types import MissingExtraError, SpanvlaError

PRECISIONS = ('fp32', 'tf32', 'fp16')
# Raise it when what is added to a parsed network changes: engines are then built again.
ADDITIONS = 'euler 1'
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built; all of it is in their passports.

    `streamed_bytes` is the room on the device for weights, the rest is streamed from the host
    (None: all stay on the device). `workspace_bytes` bounds what one layer may use (None: all).
    `fp16` lets TensorRT 10 choose half precision layer by layer; later versions take precision
    from the graph alone.
    """

    precision: str = 'fp32'
    workspace_bytes: int | None = None
    streamed_bytes: int | None = None
    level: int = 3

    @property
    def profile(self) -> str:
        """The settings beside the precision, as a passport names them."""
        weights = 'resident' if self.streamed_bytes is None else 'streamed'
        room = 'all' if self.workspace_bytes is None else str(self.workspace_bytes)
        return f'static, {ADDITIONS}, weights {weights}, workspace {room}, level {self.level}'


class EngineBuilder:
    """Builds the engines of one model directory on this device."""

    def __init__(
        self, trt: Any, directory: ModelDirectory, settings: BuildSettings, platform: Platform
    ) -> None:
        """Take the library, a verified model with graphs, and where the engines will run."""
        if settings.precision not in PRECISIONS:
            raise SpanvlaError(
                f'precision {settings.precision!r} is not known to tensorrt; use one of '
                f'{", ".join(PRECISIONS)}'
            )
        if settings.precision == 'fp16' and not hasattr(trt.BuilderFlag, 'FP16'):
            raise SpanvlaError(
                f'TensorRT {platform.tensorrt_version} has no fp16 flag; use --precision tf32'
            )
        if settings.precision == 'fp16' and settings.streamed_bytes is not None:
            raise SpanvlaError('weights can be streamed in fp32 and tf32 only; choose one')
        self.logger = trt.Logger(trt.Logger.WARNING)
        self._trt = trt
        self._directory = directory
        self._settings = settings
        self._platform = platform
        self.keys: Mapping[str, EngineKey] = {
            graph: engine_key(directory, graph, settings.precision, settings.profile, platform)
            for graph in GRAPHS
        }

    def build(self, graph: str) -> bytes:
        """Build the engine of one graph; takes seconds to minutes.

        Raises:
            SpanvlaError: TensorRT does not read the graph or builds nothing from it.
        """
        trt, path = self._trt, self._directory.graph(graph)
        began = time.monotonic()
        builder = trt.Builder(self.logger)
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(path)):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise SpanvlaError(
                f'{path}: TensorRT {self._platform.tensorrt_version} cannot read it '
                f'({"; ".join(reasons) or "no reason given":.300}); use --backend onnxruntime'
            )
        if graph == 'step':
            add_euler_update(trt, network)
        config = builder.create_builder_config()
        self._configure(config)
        cache_path = self._timing_cache_path()
        self._set_timing_cache(config, cache_path)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise SpanvlaError(
                f'{path}: TensorRT {self._platform.tensorrt_version} builds no engine from it; '
                'its log above says why; use --backend onnxruntime'
            )
        write_durably(cache_path, bytes(config.get_timing_cache().serialize()))
        engine = bytes(plan)
        spent_s = time.monotonic() - began
        _log.info('engine of graph %s: %.1f MB in %.0f s', graph, len(engine) / 1e6, spent_s)
        return engine

    def _network_flags(self) -> int:
        # Weak typing is the only way to let 10.x choose half precision.
        if self._settings.precision == 'fp16':
            return 0
        return 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _configure(self, config: Any) -> None:
        flags, settings = self._trt.BuilderFlag, self._settings
        config.builder_optimization_level = settings.level
        # On by default; it costs fp32 its bound on the golden plans.
        if settings.precision == 'fp32':
            config.clear_flag(flags.TF32)
        if settings.precision == 'fp16':
            config.set_flag(flags.FP16)
        if settings.streamed_bytes is not None:
            config.set_flag(flags.WEIGHT_STREAMING)
        if settings.workspace_bytes is not None:
            pool = self._trt.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, settings.workspace_bytes)

    def _timing_cache_path(self) -> Path:
        """Timings hold for one device and version; the folder is there while a build runs."""
        known = f'{self._platform.gpu_name} {self._platform.tensorrt_version}'
        digest = hashlib.sha256(known.encode()).hexdigest()[:16]
        return EngineStore(self._directory.path).folder / f'timing-{digest}.cache'

    def _set_timing_cache(self, config: Any, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b''
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            _log.warning('%s: not a timing cache of this device; starting a new one', path)
            config.set_timing_cache(config.create_timing_cache(b''), ignore_mismatch=False)


def add_euler_update(trt: Any, network: Any) -> None:
    """Give the step network `x_next = x + scale * velocity`, so that no step leaves the device."""
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    velocity = next(tensor for tensor in outputs if tensor.name == 'velocity')
    scale = network.add_input('scale', trt.DataType.FLOAT, (1, 1, 1))
    product, total = trt.ElementWiseOperation.PROD, trt.ElementWiseOperation.SUM
    moved = network.add_elementwise(velocity, scale, product).get_output(0)
    ahead = network.add_elementwise(inputs['x'], moved, total).get_output(0)
    ahead.name = 'x_next'
    network.mark_output(ahead)


def require_built(store: EngineStore, keys: Mapping[str, EngineKey], model_dir: Path) -> None:
    """Refuse, with the reason and the command, where an engine would have to be built first."""
    for graph, key in keys.items():
        found = store.find(key)
        if isinstance(found, Diagnosis):
            raise SpanvlaError(
                f'{store.folder}: engine of graph {graph}: {found}; run: python -m '
                f'spanvla_ros.runtime.tensorrt_ --build-only --model {model_dir}'
            )


def import_tensorrt() -> Any:
    """The library; `MissingExtraError` where it or what it links to is not installed."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise MissingExtraError('tensorrt', 'gpu') from error
    return tensorrt


def platform_of(trt: Any, device: Device) -> Platform:
    """What engines of this process belong to; we load no plug-ins."""
    return Platform(
        gpu_name=device.gpu_name,
        compute_capability=device.compute_capability,
        driver_version=device.driver_version,
        tensorrt_version=str(trt.__version__),
    )
