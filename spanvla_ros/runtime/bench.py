"""`spanvla bench --only model`: stage times beside their floor, whole plans, a budget kept.

Wall times tell what a vehicle would see on this machine as it is now; CPU times hold on a shared
one. Graphs run on one thread. Floors: `runtime.roofline`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.model.checkpoint import (
    GRAPHS,
    ModelDirectory,
    graphs_of,
    load_model_dir,
    shipped_model_dir,
)
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import load_normalization
from spanvla_ros.model.prompt import PromptLayout, load_tokenizer
from spanvla_ros.runtime.backend import LOADERS, Backend, open_backend
from spanvla_ros.runtime.memory_bench import measure_memory
from spanvla_ros.runtime.planner import Planner
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
from spanvla_ros.types import CameraFrame, EgoState, Observation, Plan, SpanvlaError

REPEATS = 100
STEPS = (1, 2, 5, 10)
CAMERA_HZ = 15.0
FRAME_NS = 100_000_000
FRAME_STAGES = ('vision', 'prefill_action', 'step')
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """Settings that keep a frame within a budget, from measured stages."""

    steps: int
    vision_every: int
    precision: str
    frame_ms: float
    mean_ms: float
    fits: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the parts `model` and `decoders`, and of a model by `--size`."""
    parser.add_argument('--model', type=Path, help='model directory (default: the town model)')
    parser.add_argument('--backend', default='auto', help='engine to measure (default: auto)')
    parser.add_argument('--against', help='a second engine, measured in turns with the first')
    parser.add_argument('--repeats', type=int, default=REPEATS, help='runs of each stage')
    parser.add_argument(
        '--frames', type=int, default=0, help='plans to watch memory over (default: --repeats)'
    )
    parser.add_argument('--budget', type=budget_ms, help='time for a frame, such as 100ms')
    sized = parser.add_argument_group('with --size')
    sized.add_argument('--device', default='cuda', choices=('cuda', 'cpu'), help='where to run')
    sized.add_argument('--precision', default='bf16', choices=('bf16', 'fp16', 'fp32'))
    sized.add_argument(
        '--compile-s', type=int, default=45, help='most seconds for each torch.compile; 0: none'
    )


def budget_ms(text: str) -> float:
    """Milliseconds of a text such as `100ms`."""
    found = re.fullmatch(r'(\d+(?:\.\d+)?)(ms|s)', text)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a time such as 100ms')
    return float(found[1]) * (1e3 if found[2] == 's' else 1.0)


def run_model_bench(out_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure stages, whole plans and a sweep of steps; write `summary.json` and print."""
    directory = load_model_dir(options.model or shipped_model_dir())
    config, repeats = directory.config, at_least_one(options.repeats)
    names = [options.backend, *([options.against] if options.against else [])]
    backends = {backend.name: backend for backend in (open_backend(directory, n) for n in names)}
    ceiling = measure_ceiling()
    floors = _floors(directory, ceiling)
    calls = {name: stage_calls(backend) for name, backend in backends.items()}
    stages: dict[str, dict[str, Timing]] = {name: {} for name in backends}
    for stage in next(iter(calls.values())):
        timed = time_in_turns({name: calls[name][stage] for name in backends}, repeats)
        for name, timing in timed.items():
            stages[name][stage] = replace(timing, floor_ms=floors.get(stage))
    plans = time_in_turns(
        {name: planning(directory, backend) for name, backend in backends.items()}, repeats
    )
    first = next(iter(backends))
    summary = {
        **circumstances(directory, repeats),
        'ceiling': asdict(ceiling),
        'stages': {name: rows(timings) for name, timings in stages.items()},
        'plan': rows(plans),
        'steps_sweep': {name: rows(_sweep(timings, config)) for name, timings in stages.items()},
        'memory': asdict(
            measure_memory(planning(directory, backends[first]), options.frames or repeats)
        ),
    }
    if options.budget is not None:
        summary['budget_ms'] = options.budget
        measured = _in_precisions(directory, backends[first], stages[first], repeats)
        summary['proposal'] = asdict(propose(measured, config, options.budget))
    write_summary(out_dir, summary)
    sys.stdout.write(_table(summary))
    return summary


def propose(
    measured: Mapping[str, Mapping[str, Timing]], config: ModelConfig, budget: float
) -> Proposal:
    """The widest precision, and in it the most steps, whose frame ends within the budget at p99.

    Precision is given up before steps fall below the model's own, and these before vision waits:
    between vision frames only the flow runs, on K/V no older than `kv_max_age_s`, but a vision
    frame itself must fit, or the plan of that frame is late and `fits` is False.

    Args:
        measured: times of the stages in each precision, the widest first.
        config: of the model.
        budget: time for a frame in ms.
    """
    pictures = len(config.cameras) * config.frames_per_camera
    seen_ms = {
        name: pictures * stages['vision'].p99_ms + stages['prefill_action'].p99_ms
        for name, stages in measured.items()
    }
    step_ms = {name: stages['step'].p99_ms for name, stages in measured.items()}
    choices = sorted({*STEPS, config.steps}, reverse=True)
    enough = [steps for steps in choices if steps >= config.steps]
    for allowed in (enough, choices):
        for name in measured:
            for steps in allowed:
                frame_ms = seen_ms[name] + steps * step_ms[name]
                if frame_ms <= budget:
                    return Proposal(steps, 1, name, frame_ms, frame_ms, fits=True)
    fastest = min(measured, key=lambda name: seen_ms[name] + step_ms[name])
    oldest = max(1, int(config.kv_max_age_s * CAMERA_HZ))
    frame_ms = seen_ms[fastest] + step_ms[fastest]
    mean_ms = seen_ms[fastest] / oldest + step_ms[fastest]
    return Proposal(1, oldest, fastest, frame_ms, mean_ms, fits=False)


def _in_precisions(
    directory: ModelDirectory, backend: Backend, stages: Mapping[str, Timing], repeats: int
) -> dict[str, Mapping[str, Timing]]:
    """The measured stages, and those of the same engine in other precisions of the model."""
    engine, _, chosen = backend.name.partition(':')
    found: dict[str, Mapping[str, Timing]] = {}
    for precision in directory.precisions:
        if precision == (chosen or 'fp32'):
            found[precision] = stages
        elif f'{engine}:{precision}' in LOADERS:
            try:
                other = open_backend(directory, f'{engine}:{precision}')
            except SpanvlaError as error:
                _log.info('%s', error)
                continue
            calls = stage_calls(other)
            found[precision] = time_in_turns({s: calls[s] for s in FRAME_STAGES}, repeats)
    return found or {chosen or 'fp32': stages}


def _floors(directory: ModelDirectory, ceiling: Ceiling) -> dict[str, float]:
    if not directory.has_graphs:
        return {}
    graphs = zip(GRAPHS, graphs_of(directory.config), strict=True)
    return {name: work_of(directory.graph(graph)).floor_ms(ceiling) for name, graph in graphs}


def planning(directory: ModelDirectory, backend: Backend) -> Callable[[], Plan]:
    """Plans on pictures that are new each time, every stage included, nothing cached."""
    planner = Planner(
        backend,
        PromptLayout(directory.config, load_tokenizer(directory.path)),
        load_normalization(directory.path, directory.config),
        schedule='off',
    )
    frame = 0

    def call() -> Plan:
        nonlocal frame
        frame += 1
        return planner.plan(_observation(directory.config, frame * FRAME_NS))

    return call


def _observation(config: ModelConfig, stamp_ns: int) -> Observation:
    image = np.full((config.height_px, config.width_px, 3), stamp_ns // FRAME_NS % 255, np.uint8)
    frames = tuple(
        (CameraFrame(name, stamp_ns, image),) * config.frames_per_camera
        for name in config.camera_names
    )
    return Observation(
        stamp_ns=stamp_ns,
        frames=frames,
        ego=EgoState(stamp_ns, 0.0, 0.0, 0.0, 5.0),
        history=np.zeros((config.history_poses, 3)),
        history_valid=np.zeros(config.history_poses, dtype=np.bool_),
        route=None,
    )


def _sweep(stages: Mapping[str, Timing], config: ModelConfig) -> dict[str, Timing]:
    """A frame at other numbers of steps, as the sum of its measured stages."""
    pictures = len(config.cameras) * config.frames_per_camera

    def frame(steps: int, field: str) -> float:
        seen = pictures * getattr(stages['vision'], field)
        step = steps * getattr(stages['step'], field)
        return float(seen + getattr(stages['prefill_action'], field) + step)

    fields = ('p50_ms', 'p99_ms', 'max_ms', 'cpu_ms')
    return {str(steps): Timing(*(frame(steps, field) for field in fields)) for steps in STEPS}


def _table(summary: Mapping[str, Any]) -> str:
    lines = [f'{"":<28}{"p50 ms":>9}{"p99":>9}{"max":>9}{"CPU ms":>9}{"floor":>8}{"x":>6}']
    shown = [
        *(
            (f'{backend} {stage}', row)
            for backend, stages in summary['stages'].items()
            for stage, row in stages.items()
        ),
        *((f'{backend} plan', row) for backend, row in summary['plan'].items()),
    ]
    for name, row in shown:
        line = f'{name:<28}' + ''.join(
            f'{row[field]:9.2f}' for field in ('p50_ms', 'p99_ms', 'max_ms', 'cpu_ms')
        )
        if row['floor_ms'] is not None:
            line += f'{row["floor_ms"]:8.2f}{row["multiple_of_floor"]:6.1f}'
        lines.append(line)
    memory = summary['memory']
    lines.append(
        f'memory over {memory["frames"]} frames: {memory["resident_mb"]:.1f} MB, grown by '
        f'{memory["growth_mb"]:+.2f} MB, lately {memory["slope_mb"]:+.3f} MB a 1000 frames, '
        f'{memory["blocks"]:+d} blocks, {memory["traced_bytes"]:+.1f} bytes a frame'
    )
    if 'proposal' in summary:
        chosen = summary['proposal']
        late = (
            ''
            if chosen['fits']
            else f', which does not fit; {chosen["mean_ms"]:.1f} ms where most frames go without'
        )
        lines.append(
            f'for {summary["budget_ms"]:g} ms: {chosen["steps"]} steps, vision every '
            f'{chosen["vision_every"]} frames, precision {chosen["precision"]}: '
            f'{chosen["frame_ms"]:.1f} ms with vision{late}'
        )
    return '\n'.join(lines) + '\n'
