"""Training in several processes of one thread each, gradients averaged over gloo.

On a CPU two processes of one thread train faster than one process of two threads. All processes
hold the same weights and take the same optimiser step, so nothing but gradients travels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from spanvla_ros.types import SpanvlaError

TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Group:
    """This process among those of a run."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)


def run_group(
    work: Callable[..., None], size: int, threads: int, arguments: tuple[Any, ...]
) -> None:
    """Call `work(group, *arguments)` in `size` processes, this one being the first.

    Raises:
        SpanvlaError: another process has failed; its traceback went to stderr.
    """
    torch.set_num_threads(threads)
    if size == 1:
        work(Group(0, 1), *arguments)
        return
    context = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory(prefix='spanvla-train-') as folder:
        meeting = str(Path(folder) / 'meeting')
        others = [
            context.Process(
                target=_member, args=(work, rank, size, threads, meeting, arguments), daemon=True
            )
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        try:
            _member(work, 0, size, threads, meeting, arguments)
        except RuntimeError as error:
            if any(other.exitcode not in (None, 0) for other in others):
                raise SpanvlaError(
                    'train: a process of the group ended early; its error stands above'
                ) from error
            raise
        finally:
            for other in others:
                other.join(timeout=10.0)
                if other.is_alive():
                    other.terminate()


def _member(
    work: Callable[..., None],
    rank: int,
    size: int,
    threads: int,
    meeting: str,
    arguments: tuple[Any, ...],
) -> None:
    # One machine: the loopback address always resolves, the host name may not.
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    torch.set_num_threads(threads)
    # Sums of tensors on GPUs travel by nccl, words between processes by gloo.
    distributed.init_process_group(
        'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
        init_method=f'file://{meeting}',
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        work(Group(rank, size), *arguments)
    finally:
        distributed.destroy_process_group()
