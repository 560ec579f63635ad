"""Frame after frame on a device, alone or beside a reasoning on a stream of its own.

Two threads share a device without waiting for one another: each has a lane, on which its graph
was recorded and on which it alone puts work and waits. Whatever may stop the whole device (streams
made, graphs recorded, host memory pinned) is done before either starts. A device that hangs all
the same is one sentence after `LIMIT_S`, not a program that never ends.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch

from spanvla_ros.model.flow import decode_trajectory
from spanvla_ros.runtime.timing import WARM, Timing
from spanvla_ros.runtime.torch_graphs import Recorded, Work, cuda_graph, plain
from spanvla_ros.runtime.torch_measure import timing
from spanvla_ros.runtime.torch_sizes import Frame
from spanvla_ros.types import SpanvlaError

PICTURE_SETS = 4
# The longest that one frame or token may take. On a GPU the slowest take a tenth of a second.
LIMIT_S = {'cuda': 20.0, 'cpu': 3600.0}
POLL_S = 0.05


class HungError(SpanvlaError):
    """A loop that no longer moves: whatever waits for the device will wait, too."""


@dataclass(frozen=True)
class Lane:
    """A stream that one thread at a time puts work on and waits for; None on the CPU."""

    stream: torch.cuda.Stream | None

    def record(self, work: Work) -> Recorded:
        """The work as a graph of this lane; before any thread starts."""
        return plain(work) if self.stream is None else cuda_graph(work, self.stream)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """What this thread does goes on the lane."""
        inside = (
            contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        )
        with torch.no_grad(), inside:
            yield

    def wait(self) -> None:
        """Until the lane has done all that it was given; other lanes may go on."""
        if self.stream is not None:
            self.stream.synchronize()


def lane(device: torch.device, priority: int = 0) -> Lane:
    """A lane of its own; of two priorities the lower number runs first."""
    return Lane(torch.cuda.Stream(priority=priority) if device.type == 'cuda' else None)


class Drive:
    """Frames with new pictures each: pictures up, the work, the state down, waypoints."""

    def __init__(self, frame: Frame, run: Recorded) -> None:
        """Draw and pin the pictures.

        Args:
            frame: whose pictures are changed.
            run: what makes the state of these pictures.
        """
        self._frame, (self._outputs, self._replay) = frame, run
        self.device = frame.device
        pinned = frame.device.type == 'cuda'
        shape = frame.images.shape
        pictures = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(PICTURE_SETS)]
        state = torch.empty(self._outputs[0].shape)
        self._pictures = [picture.pin_memory() for picture in pictures] if pinned else pictures
        self._state = state.pin_memory() if pinned else state
        self.done = 0

    def frames(self, count: int, on: Lane, stop: threading.Event | None = None) -> Timing:
        """Wall and CPU times of so many frames, on a lane that this thread has taken.

        Raises:
            SpanvlaError: a waypoint is not finite, or it was told to stop before the end.
        """
        config = self._frame.policy.config
        source, std = np.zeros((config.waypoints, 3)), np.ones((config.waypoints, 3))
        wall_ms, spent_ms = [], []
        for index in range(count + WARM):
            if stop is not None and stop.is_set():
                raise SpanvlaError(f'bench: stopped after {self.done} frames')
            began, used = time.perf_counter(), time.thread_time()
            picture = self._pictures[index % PICTURE_SETS]
            self._frame.images.copy_(picture, non_blocking=True)
            self._replay()
            self._state.copy_(self._outputs[0], non_blocking=True)
            on.wait()
            poses = decode_trajectory(self._state[0, 0].numpy(), source, std)
            if index >= WARM:
                wall_ms.append((time.perf_counter() - began) * 1e3)
                spent_ms.append((time.thread_time() - used) * 1e3)
            self.done += 1
        if not np.isfinite(poses).all():
            raise SpanvlaError('bench: a waypoint is not finite; times of such numbers mislead')
        return timing(wall_ms, spent_ms)


def drive(frame: Frame, run: Recorded, count: int) -> Timing:
    """So many frames alone, on the stream at hand."""
    current = torch.cuda.current_stream() if frame.device.type == 'cuda' else None
    return Drive(frame, run).frames(count, Lane(current))


class _Loop(threading.Thread):
    """A thread on a lane of its own; ends with the process if it no longer moves."""

    def __init__(self, what: str, on: Lane, work: Callable[[], None]) -> None:
        super().__init__(name=what, daemon=True)
        self.failed: Exception | None = None
        self._lane, self._work = on, work

    def run(self) -> None:
        try:
            with self._lane.taken():
                self._work()
        except Exception as error:
            self.failed = error


def drive_beside(
    frames: Drive,
    count: int,
    think: Callable[[], None],
    fast: Lane,
    slow: Lane,
    limit_s: float | None = None,
) -> tuple[Timing, float]:
    """Frames on one lane while another thread thinks without a pause on a second one.

    Args:
        frames: what is driven, recorded on `fast`.
        count: number of frames.
        think: makes one token, recorded on `slow`.
        fast: the lane of the frames.
        slow: the lane of the thoughts.
        limit_s: the longest that either may stand still, by default that of the device.

    Returns:
        The times of the frames, and how often it thought in a second.

    Raises:
        HungError: one of them stands still.
    """
    limit_s = LIMIT_S[frames.device.type] if limit_s is None else limit_s
    found: list[Timing] = []
    thoughts = 0
    stop = threading.Event()

    def decode() -> None:
        nonlocal thoughts
        while not stop.is_set():
            think()
            # The next token needs this one, as in a reasoning.
            slow.wait()
            thoughts += 1

    driving = _Loop('frame', fast, lambda: found.append(frames.frames(count, fast, stop)))
    thinking = _Loop('token', slow, decode)
    watch = _Watch(limit_s, {'frame': lambda: frames.done, 'token': lambda: thoughts})
    began = time.perf_counter()
    for loop in (driving, thinking):
        loop.start()
    try:
        while driving.is_alive():
            driving.join(POLL_S)
            for loop in (driving, thinking):
                if loop.is_alive():
                    watch.check(loop.name)
        spent_s = time.perf_counter() - began
    finally:
        stop.set()
    thinking.join(limit_s)
    if thinking.is_alive():
        watch.give_up(thinking.name)
    for loop in (driving, thinking):
        if loop.failed is not None:
            raise loop.failed
    return found[0], thoughts / spent_s


class _Watch:
    """Looks whether counts still rise."""

    def __init__(self, limit_s: float, counts: dict[str, Callable[[], int]]) -> None:
        self._limit_s, self._counts = limit_s, counts
        self._seen = {name: (count(), time.monotonic()) for name, count in counts.items()}

    def check(self, name: str) -> None:
        """Give it up if it has not moved for too long."""
        (before, since), count, now = self._seen[name], self._counts[name](), time.monotonic()
        if count != before:
            self._seen[name] = count, now
        elif now - since > self._limit_s:
            self.give_up(name)

    def give_up(self, name: str) -> None:
        """Say what stands still, and how far all have come."""
        reached = ' and '.join(f'{count()} {what}s' for what, count in self._counts.items())
        raise HungError(
            f'bench: no {name} for {self._limit_s:g} s after {reached}: the device hangs; end '
            'this process if it does not end by itself, and see nvidia-smi'
        )


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
