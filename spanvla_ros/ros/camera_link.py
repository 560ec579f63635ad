"""The way of the town's pictures to the bus: some get lost on it, each is late by chance.

What a camera driver and a network do to pictures, made on purpose and repeatable from a seed. The
pictures of one camera stay in order, those of different cameras overtake one another.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np


class CameraLink:
    """Loses and delays what is sent; with neither asked for it sends at once."""

    def __init__(self, loss: float, jitter_s: float, seed: int) -> None:
        """Start the sending thread, where there is something to delay.

        Args:
            loss: share of pictures that never arrive.
            jitter_s: a picture is sent up to this much late, evenly spread.
            seed: of chance.
        """
        self._loss, self._jitter_s = loss, jitter_s
        self._rng = np.random.default_rng(seed)
        self.lost: Counter[str] = Counter()
        self._last_due_s: dict[str, float] = {}
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._news = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if jitter_s > 0.0:
            self._thread = threading.Thread(target=self._run, name='link', daemon=True)
            self._thread.start()

    def send(self, camera: str, publish: Callable[[], None]) -> None:
        """Let a picture of a camera go its way; `publish` is called once or never."""
        # Both are drawn for every picture, so that one option does not shift the other's chance.
        lost, late = self._rng.random(2).tolist()
        if lost < self._loss:
            self.lost[camera] += 1
        elif self._thread is None:
            publish()
        else:
            with self._news:
                due_s = time.monotonic() + late * self._jitter_s
                due_s = max(due_s, self._last_due_s.get(camera, due_s))
                self._last_due_s[camera] = due_s
                heapq.heappush(self._waiting, (due_s, self._count, publish))
                self._count += 1
                self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._closed:
                    wait_s = self._waiting[0][0] - time.monotonic() if self._waiting else None
                    if wait_s is not None and wait_s <= 0.0:
                        break
                    self._news.wait(wait_s)
                if self._closed:
                    return
                publish = heapq.heappop(self._waiting)[2]
            publish()

    def close(self) -> None:
        """Send nothing any more."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
