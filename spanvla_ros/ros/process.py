"""The life of one node process: start, spin, stop on a signal, never hang at the end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from spanvla_ros.types import SpanvlaError

HARD_EXIT_S = 2.8
# `mallopt` of the C library: from what size on memory comes from the kernel piece by piece (this
# is the most it takes), and how much freed memory is kept.
M_MMAP_THRESHOLD, PIECE_BYTES = -3, 32 * 2**20
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 512 * 2**20
# A drive names itself here to the nodes it starts.
PARENT_VARIABLE = 'SPANVLA_PARENT_PID'


def run_node(make: Callable[[], Node]) -> int:
    """Make a node, spin it until SIGINT or SIGTERM, stop it; returns the exit status.

    A node with threads or files of its own has a `close`, called before it is destroyed.
    A second signal during shutdown is ignored, and a shutdown that hangs is cut after
    `HARD_EXIT_S`: a middleware blocked in its own locks would otherwise outlive the drive.
    """
    stopping = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            _arm_hard_exit()

    try:
        rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:
        # ROS arguments, a parameter file or a domain that are none; rclpy has a type for each.
        _say(f'{Path(sys.argv[0]).stem}: {" ".join(str(error).split()):.300}')
        return 2
    executor = SingleThreadedExecutor()
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    node: Node | None = None
    status = 0
    try:
        node = make()
        executor.add_node(node)
        while rclpy.ok() and not stopping and not _orphaned():
            executor.spin_once(timeout_sec=0.2)
    except SpanvlaError as error:
        _say(str(error))
        status = 2
    except ExternalShutdownException:
        pass
    finally:
        # A node that could not be made, or ends by itself, can hang at its end like any other.
        if not stopping:
            _arm_hard_exit()
        stopping = True
        _close(node)
    return status


def keep_freed_memory() -> None:
    """Hold freed memory for the next pictures, where the C library can be told to.

    A picture of megabytes is three buffers on its way to Python. Given back to the kernel and
    zeroed and mapped again for each picture, they cost more than all copying.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, PIECE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _orphaned() -> bool:
    """Whether the drive that started this node is gone, killed without a chance to stop it."""
    parent = os.environ.get(PARENT_VARIABLE)
    return parent is not None and str(os.getppid()) != parent


def _arm_hard_exit() -> None:
    """Let the kernel end the process later: a thread of ours might never get to run again."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, HARD_EXIT_S)


def _close(node: Node | None) -> None:
    for name in ('close', 'destroy_node'):
        _try(getattr(node, name, None))
    _try(rclpy.try_shutdown)


def _try(end: Callable[[], object] | None) -> None:
    """Do one thing of the end; whatever comes of it, the next one is done too."""
    try:
        if end is not None:
            end()
    except Exception as error:
        _say(f'shutdown: {type(error).__name__}: {error}')


def _say(text: str) -> None:
    sys.stderr.write(f'{text}\n')
    sys.stderr.flush()
