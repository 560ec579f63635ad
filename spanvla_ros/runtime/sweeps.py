"""`spanvla bench --only sweeps`: a frame by steps, precision, pictures, cameras and frames.

Steps and precision are those of the model. For other pictures and cameras the graphs of a model
of the same sizes are exported with random weights, since times do not depend on what weights say;
that needs torch and a few minutes. One thread, CPU time, each stage beside its floor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from spanvla_ros.model.checkpoint import ModelDirectory, load_model_dir, shipped_model_dir
from spanvla_ros.model.config import ModelConfig, with_settings
from spanvla_ros.model.prompt import load_tokenizer, prompt_length
from spanvla_ros.runtime.backend import open_backend
from spanvla_ros.runtime.precision import GPU_ONLY
from spanvla_ros.runtime.roofline import Ceiling, measure_ceiling, work_of
from spanvla_ros.runtime.timing import (
    Timing,
    at_least_one,
    circumstances,
    rows,
    stage_calls,
    time_in_turns,
    write_summary,
)
from spanvla_ros.types import SpanvlaError

STEPS = (1, 2, 5, 10)
CAMERAS = (1, 3, 6)
FRAMES = (1, 2, 4)
# Width in pixels; the height is half of it. Multiples of a visual token and of a window.
WIDTHS_PX = (112, 224, 336, 448)
YAWS_DEG = (0.0, 55.0, -55.0, 110.0, -110.0, 180.0)
FRAME_STAGES = ('vision', 'prefill_action', 'step')

Stages = Mapping[str, Timing]


def run_sweeps_bench(out_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all sweeps; write `summary.json` and print."""
    directory = load_model_dir(options.model or shipped_model_dir())
    config, repeats = directory.config, at_least_one(options.repeats)
    if config.expert_graph != 'step':
        raise SpanvlaError(f'bench: head {config.head} has no steps to sweep; use a flow model')
    ceiling = measure_ceiling()
    own = _own_stages(directory, ceiling, repeats)
    base = own['fp32']
    pictures = [_with_pictures(directory, width) for width in WIDTHS_PX]
    cameras = [_with_cameras(directory, count) for count in CAMERAS]
    frames = [_with_frames(directory, count) for count in FRAMES]
    summary = {
        **circumstances(directory, repeats),
        'sweeps': {
            'steps': [_point(steps, config, base, steps) for steps in STEPS],
            'precision': [_point(name, config, stages) for name, stages in own.items()],
            'pictures': [
                _point(_tokens(c), c, random_stages(c, ceiling, repeats)) for c in pictures
            ],
            'cameras': [
                _point(len(c.cameras), c, random_stages(c, ceiling, repeats)) for c in cameras
            ],
            'frames': [
                _point(c.frames_per_camera, c, random_stages(c, ceiling, repeats)) for c in frames
            ],
        },
        'how': 'One thread, CPU time, median; a frame is every picture, a prefill and the steps. '
        'On board an earlier picture of a camera was encoded when it was new; here all are. '
        'Eight-bit graphs are computed between fp32 products on a CPU, and fp16 operator by '
        'operator: their times say nothing of a GPU.',
    }
    write_summary(out_dir, summary)
    sys.stdout.write(table(summary))
    return summary


def random_stages(config: ModelConfig, ceiling: Ceiling, repeats: int) -> Stages:
    """Stages of a frame of a model of the shipped sizes with random weights."""
    import onnxruntime

    from spanvla_ros.model.policy import new_policy
    from spanvla_ros.runtime.export import example_inputs, trace
    from spanvla_ros.runtime.graph_files import GraphWriter
    from spanvla_ros.runtime.torch_ import graph_modules

    policy = new_policy(config)
    examples, modules = example_inputs(policy), graph_modules(policy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = GraphWriter(Path(folder) / 'graphs')
        for name in FRAME_STAGES:
            writer.write(name, trace(modules[name], name, examples[name]))
            path = Path(folder) / 'graphs' / f'{name}.onnx'
            session = onnxruntime.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider']
            )
            names = [value.name for value in session.get_inputs()]
            feed = dict(zip(names, (t.numpy() for t in examples[name]), strict=True))
            timing = time_in_turns({name: partial(session.run, None, feed)}, repeats)[name]
            found[name] = replace(timing, floor_ms=work_of(path).floor_ms(ceiling))
    return found


def _own_stages(directory: ModelDirectory, ceiling: Ceiling, repeats: int) -> dict[str, Stages]:
    """Stages of the model in each precision it has here, all beside the floor of fp32."""
    names = [name for name in directory.precisions if name not in GPU_ONLY]
    if 'fp32' not in names:
        raise SpanvlaError(
            f'{directory.path}: has no graphs; run: spanvla export --model {directory.path}'
        )
    engines = {n: 'onnxruntime' if n == 'fp32' else f'onnxruntime:{n}' for n in names}
    calls = {n: stage_calls(open_backend(directory, engine)) for n, engine in engines.items()}
    found: dict[str, dict[str, Timing]] = {name: {} for name in names}
    for stage in FRAME_STAGES:
        floor_ms = work_of(directory.graph(stage)).floor_ms(ceiling)
        turns: dict[str, Callable[[], object]] = {n: calls[n][stage] for n in names}
        for name, timing in time_in_turns(turns, repeats).items():
            found[name][stage] = replace(timing, floor_ms=floor_ms)
    return dict(found)


def _with_pictures(directory: ModelDirectory, width_px: int) -> ModelConfig:
    cameras = tuple(
        replace(camera, width_px=width_px, height_px=width_px // 2)
        for camera in directory.config.cameras
    )
    return _fitted(directory, cameras=cameras)


def _with_cameras(directory: ModelDirectory, count: int) -> ModelConfig:
    first = directory.config.cameras[0]
    cameras = tuple(
        replace(first, name=f'camera_{index}', yaw_deg=YAWS_DEG[index]) for index in range(count)
    )
    return _fitted(directory, cameras=cameras)


def _with_frames(directory: ModelDirectory, count: int) -> ModelConfig:
    return _fitted(directory, frames_per_camera=count)


def _fitted(directory: ModelDirectory, **changes: Any) -> ModelConfig:
    config = replace(directory.config, **changes)
    length = prompt_length(config, load_tokenizer(directory.path))
    return with_settings(config, prompt_tokens=length)


def _tokens(config: ModelConfig) -> int:
    return len(config.cameras) * config.frames_per_camera * config.image_tokens


def _point(
    at: int | str, config: ModelConfig, stages: Stages, steps: int | None = None
) -> dict[str, Any]:
    """One point of a sweep: the stages, and the frame that they make up, in CPU time."""
    counts = {
        'vision': len(config.cameras) * config.frames_per_camera,
        'prefill_action': 1,
        'step': steps or config.steps,
    }
    return {
        'at': at,
        'prompt_tokens': config.prompt_tokens,
        'stages': rows(stages),
        'frame_cpu_ms': sum(n * stages[name].cpu_ms for name, n in counts.items()),
        'frame_floor_ms': sum(n * (stages[name].floor_ms or 0.0) for name, n in counts.items()),
        'spent_ms': {name: n * stages[name].cpu_ms for name, n in counts.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The sweeps as lines of text."""
    lines = [
        f'{"CPU ms of a frame":<24}{"vision":>9}{"prefill":>9}{"steps":>9}{"frame":>9}{"floor":>9}'
    ]
    for sweep, points in summary['sweeps'].items():
        for point in points:
            spent = ''.join(f'{point["spent_ms"][name]:9.2f}' for name in FRAME_STAGES)
            what = f'{sweep} {point["at"]}'
            lines.append(
                f'{what:<24}{spent}{point["frame_cpu_ms"]:9.2f}{point["frame_floor_ms"]:9.2f}'
            )
    return '\n'.join(lines) + '\n'
