"""Whether planning keeps its memory: what many frames add to it, seen from three sides.

The operating system tells what is resident, the interpreter how many blocks its allocator holds,
and `tracemalloc` how many bytes of Python and numpy are alive. The first also sees what a library
keeps; the second is exact and does not.
"""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

PAGE_BYTES = resource.getpagesize()
# The cache of pictures is full after two seconds of them; numpy's pools fill more slowly.
WARM_FRAMES = 200
SAMPLES = 20
TRACED_FRAMES = 500


@dataclass(frozen=True)
class Memory:
    """Growth over `frames` plans after warming up.

    `slope_mb` is resident memory a thousand frames, fitted to the second half; `blocks` counts
    what Python's allocator holds more at the end; `traced_bytes` is what one of the last frames
    left alive; `samples` are frames and resident MB.
    """

    frames: int
    resident_mb: float
    growth_mb: float
    slope_mb: float
    blocks: int
    traced_bytes: float
    peak_mb: float
    samples: tuple[tuple[int, float], ...]


def measure_memory(plan: Callable[[], object], frames: int) -> Memory:
    """Make `frames` plans and watch memory; some more under `tracemalloc` follow."""
    for _ in range(min(WARM_FRAMES, frames)):
        plan()
    gc.collect()
    blocks = sys.getallocatedblocks()
    samples = [(0, resident_mb())]
    ends = np.unique(np.linspace(0, frames, SAMPLES + 1).astype(int)).tolist()
    for begin, end in pairwise(ends):
        for _ in range(end - begin):
            plan()
        samples.append((end, resident_mb()))
    gc.collect()
    blocks = sys.getallocatedblocks() - blocks
    half = np.array(samples[len(samples) // 2 :], np.float64)
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) * 1e3 if len(half) > 1 else 0.0
    return Memory(
        frames=frames,
        resident_mb=samples[-1][1],
        growth_mb=samples[-1][1] - samples[0][1],
        slope_mb=slope,
        blocks=blocks,
        traced_bytes=_traced_bytes(plan, min(TRACED_FRAMES, frames)),
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        samples=tuple(samples),
    )


def _traced_bytes(plan: Callable[[], object], frames: int) -> float:
    """Bytes alive that one frame adds, once all that a frame replaces was made under tracing."""
    tracemalloc.start()
    try:
        for _ in range(frames):
            plan()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(frames):
            plan()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / frames


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * PAGE_BYTES / 1e6
