"""Training in several processes: started here on one machine, or joined under a launcher.

`torchrun` and `accelerate launch` start the processes of one or of many machines and tell each its
place in the environment; without them the processes are started here.

On a CPU two processes of one thread train faster than one process of two threads. All processes
hold the same weights and take the same optimizer step, so nothing but gradients travels.
"""

from __future__ import annotations

import os
import sys
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
LAUNCHED = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')


@dataclass(frozen=True)
class Group:
    """This process among those of a run, and among those on its machine."""

    rank: int
    size: int
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)


def launched() -> Group | None:
    """The group a launcher has put this process into, or None where there is none.

    Raises:
        SpanvlaError: the launcher's variables are no numbers, or contradict one another.
    """
    if not all(name in os.environ for name in LAUNCHED):
        return None
    told = {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE')}
    told['LOCAL_RANK'] = os.environ.get('LOCAL_RANK', '0')
    told['LOCAL_WORLD_SIZE'] = os.environ.get('LOCAL_WORLD_SIZE', '1')
    try:
        group = Group(*(int(value) for value in told.values()))
    except ValueError as error:
        raise SpanvlaError(f'train: {told} are not all numbers; unset them') from error
    if not (0 <= group.rank < group.size and 0 <= group.local_rank < group.local_size):
        raise SpanvlaError(f'train: {told} contradict one another; unset them')
    return group


def run_group(
    work: Callable[..., None], size: int, threads: int, arguments: tuple[Any, ...]
) -> None:
    """Call `work(group, *arguments)` in `size` processes, this one being the first.

    Under a launcher the processes are there already, and this one joins them.

    Raises:
        SpanvlaError: another process has failed; its fault went to stderr.
    """
    torch.set_num_threads(threads)
    joined = launched()
    if joined is not None and joined.size > 1:
        _member(work, joined, threads, 'env://', arguments)
        return
    if size == 1:
        work(Group(0, 1), *arguments)
        return
    context = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory(prefix='spanvla-train-') as folder:
        meeting = f'file://{Path(folder) / "meeting"}'
        others = [
            context.Process(
                target=_other,
                args=(work, Group(rank, size, rank, size), threads, meeting, arguments),
                daemon=True,
            )
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        try:
            _member(work, Group(0, size, 0, size), threads, meeting, arguments)
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


def _other(
    work: Callable[..., None],
    group: Group,
    threads: int,
    meeting: str,
    arguments: tuple[Any, ...],
) -> None:
    """One of the processes started here; a user's fault is one sentence in it, too."""
    try:
        _member(work, group, threads, meeting, arguments)
    except SpanvlaError as error:
        sys.stderr.write(f'process {group.rank}: {error}\n')
        raise SystemExit(2) from None


def _member(
    work: Callable[..., None],
    group: Group,
    threads: int,
    meeting: str,
    arguments: tuple[Any, ...],
) -> None:
    if group.local_size == group.size:
        # One machine: the loopback address always resolves, the host name may not.
        os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    torch.set_num_threads(threads)
    # Sums of tensors on GPUs travel by nccl, words between processes by gloo.
    distributed.init_process_group(
        'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
        init_method=meeting,
        rank=group.rank,
        world_size=group.size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        work(group, *arguments)
    finally:
        distributed.destroy_process_group()
