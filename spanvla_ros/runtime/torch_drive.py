"""Frame after frame on a device, alone or beside a reasoning on a stream of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np
import torch

from spanvla_ros.model.flow import decode_trajectory
from spanvla_ros.runtime.timing import WARM, Timing
from spanvla_ros.runtime.torch_graphs import Recorded
from spanvla_ros.runtime.torch_measure import timing
from spanvla_ros.runtime.torch_sizes import Frame
from spanvla_ros.types import SpanvlaError

PICTURE_SETS = 4


def drive(frame: Frame, run: Recorded, count: int) -> Timing:
    """So many frames: pictures up, the work, the state down, waypoints; wall time of each.

    Args:
        frame: whose pictures are changed.
        run: what makes the state of these pictures.
        count: number of frames.

    Raises:
        SpanvlaError: a waypoint is not finite.
    """
    outputs, replay = run
    pinned, config = frame.device.type == 'cuda', frame.policy.config
    pictures = [
        torch.randint(0, 256, frame.images.shape, dtype=torch.uint8) for _ in range(PICTURE_SETS)
    ]
    if pinned:
        pictures = [picture.pin_memory() for picture in pictures]
    state = torch.empty(outputs[0].shape, pin_memory=pinned)
    source, std = np.zeros((config.waypoints, 3)), np.ones((config.waypoints, 3))
    wall_ms, spent_ms = [], []
    for index in range(count + WARM):
        began, used = time.perf_counter(), time.process_time()
        frame.images.copy_(pictures[index % PICTURE_SETS], non_blocking=True)
        replay()
        state.copy_(outputs[0], non_blocking=True)
        if pinned:
            torch.cuda.current_stream().synchronize()
        poses = decode_trajectory(state[0, 0].numpy(), source, std)
        if index >= WARM:
            wall_ms.append((time.perf_counter() - began) * 1e3)
            spent_ms.append((time.process_time() - used) * 1e3)
    if not np.isfinite(poses).all():
        raise SpanvlaError('bench: a waypoint is not finite; times of such numbers mislead')
    return timing(wall_ms, spent_ms)


def drive_beside(
    frame: Frame, run: Recorded, count: int, think: Callable[[], None]
) -> tuple[Timing, float]:
    """As `drive`, while a thread thinks without a pause on a stream of lower priority.

    Returns the times of the frames, and how often it thought in a second.
    """
    thoughts = 0
    failed: list[Exception] = []
    stop = threading.Event()

    def loop() -> None:
        nonlocal thoughts
        try:
            with torch.no_grad(), stream(frame.device, priority=0):
                while not stop.is_set():
                    think()
                    # The next token needs this one, as in a reasoning.
                    if frame.device.type == 'cuda':
                        torch.cuda.current_stream().synchronize()
                    thoughts += 1
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    began = time.perf_counter()
    thread.start()
    try:
        with stream(frame.device, priority=-1):
            together = drive(frame, run, count)
    finally:
        spent_s = time.perf_counter() - began
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
    return together, thoughts / spent_s


@contextlib.contextmanager
def stream(device: torch.device, priority: int) -> Iterator[None]:
    """A CUDA stream of its own for what follows, after all before it; lower runs first."""
    if device.type != 'cuda':
        yield
        return
    own = torch.cuda.Stream(priority=priority)
    # Waiting for the whole device would never end beside a thread that keeps it busy.
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        yield
        torch.cuda.current_stream().synchronize()


@contextlib.contextmanager
def alarm(limit_s: int) -> Iterator[None]:
    """Give up what takes longer, as far as Python is asked in between; main thread only."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f'not done after {limit_s} s')

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
