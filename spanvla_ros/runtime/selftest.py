"""What to run once on a target with an NVIDIA GPU: build, compare, time, and print it all.

The printed block goes into docs/results.md; until it is there for a device, TensorRT on that
device is ready by static gate and nothing more.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from spanvla_ros.model.checkpoint import GRAPHS, ModelDirectory, load_model_dir, shipped_model_dir
from spanvla_ros.runtime.backend import Backend
from spanvla_ros.runtime.gate import check_graph
from spanvla_ros.runtime.golden import load_golden
from spanvla_ros.runtime.onnx_ import OnnxBackend
from spanvla_ros.runtime.reasoner import Answer, Prompt
from spanvla_ros.runtime.tensorrt_ import TensorRTBackend
from spanvla_ros.runtime.tensorrt_build import PRECISIONS, BuildSettings
from spanvla_ros.types import SpanvlaError

REPEATS = 200
TOKENS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the engines of a model, and with `--selftest` compare and time them."""
    parser = argparse.ArgumentParser(
        prog='python -m spanvla_ros.runtime.tensorrt_', description=__doc__
    )
    parser.add_argument('--model', type=Path, help='model directory (default: the town model)')
    parser.add_argument('--precision', choices=PRECISIONS, default='fp32')
    parser.add_argument('--workspace-mb', type=int, help='most memory the builder may use')
    parser.add_argument('--stream-weights-mb', type=int, help='room for weights on the device')
    parser.add_argument('--repeats', type=int, default=REPEATS, help='timed runs of each stage')
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument('--build-only', action='store_true', help='build and activate, then stop')
    todo.add_argument('--selftest', action='store_true', help='build, compare and time')
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    settings = BuildSettings(
        precision=options.precision,
        workspace_bytes=_bytes(options.workspace_mb),
        streamed_bytes=_bytes(options.stream_weights_mb),
    )
    try:
        directory = load_model_dir(options.model or shipped_model_dir())
        sys.stdout.write('\n'.join(_run(directory, settings, options)) + '\n')
    except SpanvlaError as error:
        sys.stderr.write(f'tensorrt: {error}\n')
        return 2
    return 0


def _run(
    directory: ModelDirectory, settings: BuildSettings, options: argparse.Namespace
) -> list[str]:
    for name in GRAPHS:
        check_graph(directory.graph(name), name)
    backend = TensorRTBackend(directory, settings)
    platform = backend.platform
    lines = [
        f'model {directory.sha256[:16]}, {settings.precision}, {settings.profile}',
        f'{platform.gpu_name}, compute capability {platform.compute_capability}, driver '
        f'{platform.driver_version}, TensorRT {platform.tensorrt_version}',
        f'golden plans: largest waypoint difference {backend.golden_difference_m:.1e} m',
    ]
    for name, engine in backend.engines.items():
        how = 'found' if engine.rebuilt_for is None else f'built ({engine.rebuilt_for})'
        lines.append(f'{name:<15}{len(engine.content) / 1e6:8.1f} MB  {how}')
    if options.selftest:
        lines += _compare(backend, OnnxBackend(directory), directory)
        lines += _time_stages(backend, directory, options.repeats)
    backend.close()
    return lines


def _compare(backend: Backend, reference: Backend, directory: ModelDirectory) -> list[str]:
    """Largest absolute difference from ONNX Runtime, graph by graph, on a golden input."""
    golden, config = load_golden(directory), directory.config
    pixels = golden['images'][0, 0].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    pictures = len(config.cameras) * config.frames_per_camera
    embeds = np.tile(reference.vision(pixels), (pictures, 1))
    ids, valid = golden['ids'][:1], golden['valid'][:1]
    calls: dict[str, Callable[[Backend], tuple[np.ndarray, ...]]] = {
        'vision': lambda engine: (engine.vision(pixels),),
        'prefill_action': lambda engine: engine.prefill_action(ids, embeds, valid),
        'prefill_reason': lambda engine: engine.prefill_reason(ids, embeds, valid),
        'decode': lambda engine: _decode(engine, reference, (ids, embeds, valid)),
    }
    lines = []
    for name, call in calls.items():
        pairs = zip(call(backend), call(reference), strict=True)
        apart = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
        lines.append(f'{name:<15}largest difference from onnxruntime {apart:.1e}')
    prompt = Prompt(0, ids, embeds, valid)
    first = int(reference.prefill_reason(ids, embeds, valid)[2].argmax())
    ours, theirs = (_greedy(engine, prompt, first) for engine in (backend, reference))
    alike = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1),
                 len(ours))  # fmt: skip
    lines.append(
        f'decoded tokens {alike} of {len(ours)} as onnxruntime, up to the first other one'
    )
    return lines


def _greedy(engine: Backend, prompt: Prompt, first: int) -> list[int]:
    """Tokens after `first`, each the most probable one, over the cache that the engine keeps."""
    answer, said = Answer(engine, prompt), [first]
    for _ in range(min(TOKENS, engine.config.answer_tokens)):
        answer.feed(said[-1])
        assert answer.logits is not None
        said.append(int(answer.logits.argmax()))
    return said[1:]


def _decode(
    engine: Backend, reference: Backend, prompt: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, ...]:
    config = engine.config
    keys, values, logits = reference.prefill_reason(*prompt)
    room = ((0, 0), (0, 0), (0, 0), (0, config.answer_room), (0, 0))
    token = np.array([[int(logits.argmax())]], dtype=np.int64)
    position = np.array([config.prompt_tokens], dtype=np.int64)
    valid = np.pad(prompt[2], ((0, 0), (0, config.answer_room)))
    return engine.decode(token, position, np.pad(keys, room), np.pad(values, room), valid)


def _time_stages(backend: TensorRTBackend, directory: ModelDirectory, repeats: int) -> list[str]:
    golden, config = load_golden(directory), directory.config
    pixels = golden['images'][0, 0].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    pictures = len(config.cameras) * config.frames_per_camera
    embeds = np.tile(backend.vision(pixels), (pictures, 1))
    ids, valid, ego = golden['ids'][:1], golden['valid'][:1], golden['ego'][:1]
    start = np.zeros((1, config.waypoints, 3), np.float32)
    cache = backend.condition(ids, embeds, valid)

    def condition() -> None:
        nonlocal cache
        cache = backend.condition(ids, embeds, valid)
        backend.device.synchronize()

    def frame() -> None:
        for _ in range(pictures):
            backend.vision(pixels)
        backend.flow(start, ego, backend.condition(ids, embeds, valid), config.steps)

    def flow(steps: int) -> None:
        backend.flow(start, ego, cache, steps)

    stages: dict[str, Callable[[], object]] = {
        'vision, one picture': lambda: backend.vision(pixels),
        'prefill': condition,
        **{
            f'flow, {steps} steps': partial(flow, steps)
            for steps in sorted({1, 2, 5, 10, config.steps})
        },
        f'frame, {pictures} pictures': frame,
    }
    lines = [_timing(name, stage, repeats) for name, stage in stages.items()]
    lines.append(f'captured as CUDA graphs: {", ".join(backend.captured) or "none"}')
    lines.append(f'device memory in use: {backend.device.used_bytes / 1e6:.0f} MB')
    return lines


def _timing(name: str, stage: Callable[[], object], repeats: int) -> str:
    spent_ms = []
    for index in range(repeats + 5):
        began = time.perf_counter()
        stage()
        if index >= 5:
            spent_ms.append((time.perf_counter() - began) * 1e3)
    p50, p99 = np.percentile(spent_ms, (50, 99))
    return f'{name:<24}p50 {p50:7.2f} ms  p99 {p99:7.2f}  max {max(spent_ms):7.2f}'


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * 1_000_000
