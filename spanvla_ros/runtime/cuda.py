"""CUDA memory, copies, one stream and captured graphs, each call checked; through cuda-python.

No torch: a vehicle that plans on TensorRT needs neither it nor its gigabytes.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.types import MissingExtraError, SpanvlaError

DRIVER_FILE = Path('/proc/driver/nvidia/version')
_log = logging.getLogger(__name__)


class CudaError(SpanvlaError):
    """A CUDA call that did not succeed."""


@dataclass(frozen=True)
class Buffer:
    """A tensor on the device and its pinned twin on the host."""

    address: int
    host: np.ndarray

    @property
    def nbytes(self) -> int:
        """Size of either."""
        return self.host.nbytes


class Device:
    """The first visible GPU: all memory of one backend, and the one stream its work is put on."""

    def __init__(self) -> None:
        """Open the device.

        Raises:
            MissingExtraError: cuda-python is not installed.
            CudaError: there is no driver or no GPU.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingExtraError('cuda', 'gpu') from error
        self._api: Any = runtime
        self._device_memory: list[int] = []
        self._pinned_memory: list[int] = []
        self._graphs: list[Any] = []
        self.check('cudaSetDevice', 0)
        self.stream = self.check('cudaStreamCreateWithFlags', runtime.cudaStreamNonBlocking)

    def check(self, function: str, *arguments: Any) -> Any:
        """Call a runtime function; its value, or `CudaError` with the name of the error."""
        error, *values = getattr(self._api, function)(*arguments)
        if error != self._api.cudaError_t.cudaSuccess:
            name = getattr(error, 'name', str(error))
            raise CudaError(f'CUDA: {function} gives {name}; see nvidia-smi and the kernel log')
        return values[0] if values else None

    @property
    def gpu_name(self) -> str:
        """The name of the GPU, as engines record it."""
        name = self.check('cudaGetDeviceProperties', 0).name
        return name.decode().strip('\0') if isinstance(name, bytes) else str(name)

    @property
    def compute_capability(self) -> str:
        """Such as `8.7`."""
        properties = self.check('cudaGetDeviceProperties', 0)
        return f'{properties.major}.{properties.minor}'

    @property
    def driver_version(self) -> str:
        """The kernel driver's version, or that of its CUDA interface where it does not tell."""
        try:
            found = re.search(r'Kernel Module\D*?([\d.]+)', DRIVER_FILE.read_text())
        except OSError:
            found = None
        return found.group(1) if found else f'cuda {self.check("cudaDriverGetVersion")}'

    @property
    def used_bytes(self) -> int:
        """Device memory in use, by all processes."""
        error, free, total = self._api.cudaMemGetInfo()
        if error != self._api.cudaError_t.cudaSuccess:
            raise CudaError('CUDA: cudaMemGetInfo fails; see nvidia-smi and the kernel log')
        return int(total) - int(free)

    def allocate(self, nbytes: int) -> int:
        """Zeroed device memory; freed by `close`."""
        address = int(self.check('cudaMalloc', max(1, nbytes)))
        self._device_memory.append(address)
        self.check('cudaMemsetAsync', address, 0, nbytes, self.stream)
        return address

    def buffer(self, shape: tuple[int, ...], kind: Any) -> Buffer:
        """A tensor of zeros on both sides."""
        kind = np.dtype(kind)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        address = int(self.check('cudaHostAlloc', max(1, nbytes), 0))
        self._pinned_memory.append(address)
        raw = (ctypes.c_uint8 * nbytes).from_address(address)
        host = np.frombuffer(raw, dtype=kind).reshape(shape)
        host[...] = 0
        return Buffer(self.allocate(nbytes), host)

    def upload(self, buffer: Buffer) -> None:
        """Copy the pinned side to the device, in stream order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = buffer.host.ctypes.data
        self.check('cudaMemcpyAsync', buffer.address, source, buffer.nbytes, kind, self.stream)

    def download(self, buffer: Buffer) -> None:
        """Copy the device side to pinned memory, in stream order; read it after `synchronize`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = buffer.host.ctypes.data
        self.check('cudaMemcpyAsync', target, buffer.address, buffer.nbytes, kind, self.stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` pieces of `width` bytes on the device, each a pitch after the one before."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.check(
            'cudaMemcpy2DAsync',
            target,
            target_pitch,
            source,
            source_pitch,
            width,
            rows,
            kind,
            self.stream,
        )

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self.check('cudaStreamSynchronize', self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any | None:
        """A graph of what `enqueue` puts on the stream; None, and a log line, where that fails."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check('cudaStreamBeginCapture', self.stream, mode)
        failure: Exception | None = None
        try:
            enqueue()
        except Exception as error:
            # It comes again in the plain run; here capture must end, or the stream stays in it.
            failure = error
        status, graph = self._api.cudaStreamEndCapture(self.stream)
        success = self._api.cudaError_t.cudaSuccess
        if status == success:
            if failure is None:
                status, launchable = self._api.cudaGraphInstantiate(graph, 0)
            self.check('cudaGraphDestroy', graph)
        if failure is None and status == success:
            self._graphs.append(launchable)
            return launchable
        self._api.cudaGetLastError()
        _log.warning('no CUDA graph (%s); enqueueing each call instead', failure or status)
        return None

    def launch(self, graph: Any) -> None:
        """Put a captured graph on the stream."""
        self.check('cudaGraphLaunch', graph, self.stream)

    def close(self) -> None:
        """Free everything, in the reverse order of use."""
        self.synchronize()
        for graph in self._graphs:
            self.check('cudaGraphExecDestroy', graph)
        for address in self._device_memory:
            self.check('cudaFree', address)
        for address in self._pinned_memory:
            self.check('cudaFreeHost', address)
        self.check('cudaStreamDestroy', self.stream)
        self._graphs, self._device_memory, self._pinned_memory = [], [], []


class Replay:
    """Work that is enqueued plainly once, then captured, then launched as one graph.

    The first plain run is needed: an engine does part of its set-up in its first enqueue, and
    that cannot be captured.
    """

    def __init__(self, device: Device, enqueue: Callable[[], None]) -> None:
        """Replay `enqueue` on the stream of `device`; addresses in it must not change."""
        self._device = device
        self._enqueue = enqueue
        self._ran = self._refused = False
        self._graph: Any | None = None

    @property
    def captured(self) -> bool:
        """Whether it runs as a graph."""
        return self._graph is not None

    def __call__(self) -> None:
        """Put the work on the stream."""
        if self._ran and not self._refused and self._graph is None:
            self._graph = self._device.capture(self._enqueue)
            self._refused = self._graph is None
        if self._graph is not None:
            self._device.launch(self._graph)
        else:
            self._enqueue()
            self._ran = True
