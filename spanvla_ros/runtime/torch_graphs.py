"""Work on fixed device buffers, recorded once as a CUDA graph, replayed from then on.

A graph replays the very kernels and addresses it was recorded with: shapes are static, nothing in
the work may wait for the device or ask it for a number, and noise is an input. What is recorded
runs a few times before, on a stream of its own, so that libraries do their set-up outside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Tensors = tuple[Tensor, ...]
Work = Callable[[], Tensors]
# From work to its outputs at fixed addresses and to what computes them anew.
Recorded = tuple[Tensors, Callable[[], None]]
Record = Callable[[Work], Recorded]

WARM = 3
_log = logging.getLogger(__name__)


def plain(work: Work) -> Recorded:
    """No graph: the work runs again each time, and its outputs go where the first ones are."""
    outputs = work()

    def replay() -> None:
        for kept, new in zip(outputs, work(), strict=True):
            kept.copy_(new)

    return outputs, replay


def cuda_graph(work: Work, aside: torch.cuda.Stream | None = None) -> Recorded:
    """A CUDA graph of the work, on the current device; no other thread may use it meanwhile.

    Graphs recorded on one stream share the workspace of its matrix products (pytorch issue
    193402) and must not run at the same time: `aside` is the stream to record on, one of its own
    if None.

    Raises:
        RuntimeError: the work cannot be recorded.
    """
    before = torch.cuda.current_stream()
    aside = aside or torch.cuda.Stream()
    aside.wait_stream(before)
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            work()
    before.wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile; only calls of this one must be recordable.
    with torch.cuda.graph(graph, stream=aside, capture_error_mode='thread_local'):
        outputs = work()
    return outputs, graph.replay


def recorded(name: str, work: Work, record: Record) -> tuple[Recorded, str]:
    """The work by `record`, or plainly with the reason why not; '' where nothing was refused."""
    if record is plain:
        return plain(work), ''
    try:
        return record(work), ''
    except RuntimeError as error:
        reason = first_line(error)
        _log.warning('%s: no CUDA graph (%s); its kernels are launched one by one', name, reason)
        return plain(work), reason


def first_line(error: BaseException) -> str:
    """What an error says, in at most one line."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else ""}'[:300]


class Stage:
    """A function of tensors behind arrays: pinned in, device buffers, recorded work, pinned out.

    Buffers take the shapes of the first call. Outputs stay on the device until `read`.
    """

    def __init__(
        self, name: str, function: Callable[..., Tensors], device: torch.device, record: Record
    ) -> None:
        """Take what is to run; nothing runs before the first call."""
        self.name = name
        self.refused = ''
        self._function = function
        self._device = device
        self._record = record
        self._on_gpu = device.type == 'cuda'
        self._hosts: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []
        self._recorded: Recorded | None = None
        self._uploaded = torch.cuda.Event() if self._on_gpu else None

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """Outputs of the function on these inputs."""
        self.start(*arrays)
        return self.read()

    @torch.no_grad()
    def start(self, *arrays: Array) -> None:
        """Put the inputs and the work on the stream; returns before the device is done."""
        if not self._inputs:
            kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
            for array, kind in zip(arrays, kinds, strict=True):
                self._hosts.append(self._host(array.shape, kind))
                self._inputs.append(torch.empty(array.shape, dtype=kind, device=self._device))
        if self._uploaded is not None:
            # The pinned inputs may still be on their way for the call before.
            self._uploaded.synchronize()
        for host, buffer, array in zip(self._hosts, self._inputs, arrays, strict=True):
            np.copyto(host.numpy(), array)
            buffer.copy_(host, non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        if self._recorded is None:
            self._recorded, self.refused = recorded(
                self.name, lambda: self._function(*self._inputs), self._record
            )
            self._results = [self._host(t.shape, t.dtype) for t in self._recorded[0]]
        self._recorded[1]()

    @torch.no_grad()
    def read(self) -> tuple[Array, ...]:
        """The outputs of the last `start`, once the device is done."""
        assert self._recorded is not None
        for host, output in zip(self._results, self._recorded[0], strict=True):
            host.copy_(output, non_blocking=True)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return tuple(host.numpy().copy() for host in self._results)

    def _host(self, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, pin_memory=self._on_gpu)
