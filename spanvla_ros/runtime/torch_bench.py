"""`spanvla bench --size`: a model of published sizes on a device, each stage beside its floor.

Random weights, real shapes. Each stage runs eagerly and as a CUDA graph, then whole frames from
pinned uint8 pictures to waypoints, then every way from one prefilled cache to a trajectory, then
the fast loop beside a reasoning on a second stream. The shipped model is planned on the device
too, against its golden plans. What fails leaves one line and the rest goes on; `summary.json` is
written after each part. Without a GPU everything runs but the graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir
from spanvla_ros.runtime.bench import STEPS, planning, propose
from spanvla_ros.runtime.golden import waypoint_difference_m
from spanvla_ros.runtime.roofline import Ceiling, Work
from spanvla_ros.runtime.timing import Timing, at_least_one, time_in_turns, write_summary
from spanvla_ros.runtime.torch_ import TorchBackend
from spanvla_ros.runtime.torch_cuda import (
    ALIGNED,
    PRECISIONS,
    TorchCudaBackend,
    align_eyes,
    compile_layers,
)
from spanvla_ros.runtime.torch_drive import Drive, HungError, alarm, drive, drive_beside, lane
from spanvla_ros.runtime.torch_flow import weights_of_a_plan, weights_of_a_step
from spanvla_ros.runtime.torch_graphs import (
    Record,
    Recorded,
    cuda_graph,
    first_line,
    plain,
    recorded,
)
from spanvla_ros.runtime.torch_graphs import (
    Work as Runnable,
)
from spanvla_ros.runtime.torch_measure import (
    eyes_weights,
    language_weights,
    measured_ceiling,
    prefill_weights,
    timed,
    wait,
    work_of_call,
)
from spanvla_ros.runtime.torch_sizes import SIZES, Answer, Frame, sized_policies
from spanvla_ros.runtime.torch_table import ANSWERS, table
from spanvla_ros.types import SpanvlaError

EAGER_REPEATS = 20
FRAMES_PER_REPEAT = 2
SHORT_STEPS = 2
PARALLEL = (10, 50)
ANCHORS, ANCHOR_STEPS = 20, 2
# What is timed once more when compiled, before the frames and after: parts of a frame and both
# sides of every ratio. Each new shape takes seconds to compile.
COMPILED = (
    'flow 10', 'flow 2', 'flow 1', 'AR-1', 'prefill', 'prefill short', 'vision', 'flow short 2',
)  # fmt: skip
COMPILED_LAST = 'parallel-50', 'diffusion-20x2'


def run_size_bench(out_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything of one size; write `summary.json` as it comes, and print a table."""
    device, repeats = torch.device(options.device), at_least_one(options.repeats)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise SpanvlaError('bench --device cuda: torch sees no GPU here; use --device cpu')
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = SizeBench(out_dir, options.size, device, options.precision, repeats)
    with torch.no_grad():
        bench.run(options.model, options.compile_s)
    if options.budget is not None:
        bench.part('proposal', f'{options.budget:g} ms', lambda: bench.proposal(options.budget))
    bench.part('all of', 'table', bench.show)
    return bench.summary


class SizeBench:
    """One run: policies of a size, what is measured of them, and what went wrong."""

    def __init__(
        self, out_dir: Path, size: str, device: torch.device, precision: str, repeats: int
    ) -> None:
        """Prepare; nothing is built yet."""
        self.device, self.repeats, self.precision = device, repeats, precision
        self._out_dir, self._size = out_dir, SIZES[size]
        self._began = time.perf_counter()
        self._record: Record = cuda_graph if device.type == 'cuda' else plain
        self._floors: dict[str, float] = {}
        self._kept: dict[str, Recorded] = {}
        self._runs: dict[str, Runnable] = {}
        self._ceiling = Ceiling(1.0, 1.0)
        self._hung = False
        self.summary: dict[str, Any] = {
            'size': size,
            'precision': precision,
            'repeats': repeats,
            'device': _device_name(device),
            'torch': torch.__version__,
            'recorded_as': 'CUDA graph' if device.type == 'cuda' else 'not: no GPU',
            'failures': {},
            'no_graph': {},
            'seconds': {},
        }

    def part(self, section: str, name: str, measure: Callable[[], Any]) -> None:
        """Measure one thing, or note in one line why not; then write all there is."""
        began = time.perf_counter()
        try:
            found = measure()
            # A number that is not finite fails its own part, not the file.
            json.dumps(found, allow_nan=False)
            if found is not None:
                self.summary.setdefault(section, {})[name] = found
        except Exception as error:  # Whatever fails, the rest is worth its time.
            self._hung = self._hung or isinstance(error, HungError)
            self.summary['failures'][f'{section} {name}'] = first_line(error)
            sys.stdout.write(f'{section} {name}: {first_line(error)}\n')
        spent = time.perf_counter() - began
        self.summary['seconds'][f'{section} {name}'] = round(spent, 2)
        at = time.perf_counter() - self._began
        sys.stdout.write(f'[{at:6.1f} s] {section}: {name} ({spent:.1f} s)\n')
        sys.stdout.flush()
        write_summary(self._out_dir, self.summary)

    def run(self, model: Path | None, compile_s: int) -> None:
        """Measure everything, what matters most first and what may take long last."""
        self.part('machine', 'ceiling', self.ceiling)
        self.part('machine', 'model', self.build)
        if 'machine model' in self.summary['failures']:
            return
        self.part('machine', 'tower', self.tower)
        for section in (self.stages, self.frames, self.decoders):
            self.part('all of', section.__name__, section)
        self.part('machine', 'memory', self.memory)
        self.part('all of', 'shipped', lambda: self.shipped(model))
        self.part('all of', 'beside', self.beside)
        # On a device that hangs nothing runs any more.
        if compile_s > 0 and not self._hung:
            self.part('all of', 'table', self.show)
            self.part('all of', 'compiled', lambda: self.compiled(compile_s))

    def show(self) -> None:
        """Print what there is."""
        sys.stdout.write(table(self.summary))

    def ceiling(self) -> dict[str, float]:
        """What the device does at best."""
        self._ceiling = measured_ceiling(self.device, PRECISIONS[self.precision])
        return asdict(self._ceiling)

    def build(self) -> dict[str, Any]:
        """Draw the weights on the device and lay out the frames."""
        torch.manual_seed(0)
        deep, short = sized_policies(self._size, self.device, self.precision)
        self.deep, self.short = Frame(deep, self.device, ANCHORS), Frame(short, self.device)
        # What stands from here on is never looked through again by the collector.
        gc.collect()
        gc.freeze()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        backbone, config = deep.backbone, deep.config
        visual = len(deep.layout.image_positions)
        return {
            'cameras': len(config.cameras),
            'pictures': len(self.deep.images),
            'pictures_px': [config.width_px, config.height_px],
            'visual_tokens': visual,
            'text_tokens': config.prompt_tokens - visual,
            'slots': config.sequence_tokens,
            'layers': backbone.layers,
            'bridged': list(backbone.bridged),
            'bridged_short': list(short.backbone.bridged),
            'waypoints': config.waypoints,
            'parameters': {
                'vision': _count(eyes_weights(deep)),
                'language': _count(language_weights(deep)),
                'expert': _count(deep.expert.parameters()),
                'expert_short': _count(short.expert.parameters()),
            },
        }

    def tower(self) -> dict[str, Any]:
        """The tower with its own width, before that is aligned for good."""
        frame = self.deep
        weights = eyes_weights(frame.policy)
        work = work_of_call(frame.see, weights, [frame.images, frame.embeds])
        self._floors['vision'] = work.floor_ms(self._ceiling)
        row = self._graph('vision, own width', frame.see)
        align_eyes(frame.policy, ALIGNED)
        return {'own_width': row, 'aligned_to': ALIGNED}

    def stages(self) -> None:
        """Vision, prefills and flows, eagerly and recorded."""
        deep, short = self.deep, self.short
        self.answer = Answer(deep)
        self._stage('vision', deep.see, None)
        for name, frame in (('prefill', deep), ('prefill short', short)):
            moved = [frame.embeds, frame.slots.bridged]
            self._stage(name, frame.prefill, (prefill_weights(frame.policy), moved, 1))
        answer, language = self.answer, language_weights(deep.policy)
        moved = [deep.embeds, answer.keys, answer.values]
        self._stage('prefill all layers', answer.prefill, (language, moved, 1))
        for steps in STEPS:
            self._flow(f'flow {steps}', deep, steps, 1)
        self._flow(f'flow short {SHORT_STEPS}', short, SHORT_STEPS, 1)

    def frames(self) -> None:
        """Whole frames, from pinned pictures to waypoints."""
        for name, frame, prefill, flow, steps in self._variants():
            floor = sum(self._floors.get(part, 0.0) for part in ('vision', prefill, flow))
            self._floors[f'frame {name}'] = floor
            run = self._runs[f'frame {name}'] = frame.whole(steps)
            for how, record, repeats in (
                ('graph', self._record, FRAMES_PER_REPEAT * self.repeats),
                ('eager', plain, min(self.repeats, EAGER_REPEATS)),
            ):
                self.part(
                    'frames',
                    f'{name} {how}',
                    partial(self._drive, f'frame {name}', frame, run, record, repeats),
                )
            self.part(
                'graph_minus_eager',
                f'frame {name}',
                partial(self._apart, f'frame {name}', run),
            )

    def decoders(self) -> None:
        """From one prefilled cache to a trajectory, each in its own way."""
        answer, deep = self.answer, self.deep
        language, cache = language_weights(deep.policy), [self.answer.keys, self.answer.values]
        step: dict[str, Recorded] = {}

        def answered(count: int) -> dict[str, Any]:
            if not step:
                step['AR'] = self._recorded('AR step', answer.step, self._record)
            replay = step['AR'][1]
            many = max(1, self.repeats // 10)
            found = timed(lambda: [replay() for _ in range(count)], many, self.device)
            return self._row(found, f'AR-{count}')

        self._runs['AR-1'] = answer.step
        work = work_of_call(answer.step, language, cache)
        self._floors['AR-1 eager'] = work.floor_ms(self._ceiling)
        self.part(
            'decoders',
            'AR-1 eager',
            lambda: self._row(
                timed(answer.step, min(self.repeats, EAGER_REPEATS), self.device), 'AR-1 eager'
            ),
        )
        for count in (1, *ANSWERS):
            self._floors[f'AR-{count}'] = count * work.floor_ms(self._ceiling)
            self.part('decoders', f'AR-{count}', partial(answered, count))
        for count in PARALLEL:
            name = f'parallel-{count}'
            run = self._runs[name] = answer.parallel(count)
            self._floors[name] = work_of_call(run, language, cache).floor_ms(self._ceiling)
            self.part('decoders', name, partial(self._graph, name, run))
        self._flow(f'diffusion-{ANCHORS}x{ANCHOR_STEPS}', deep, ANCHOR_STEPS, ANCHORS)
        self.part('decoders', 'ratios', self._ratios)

    def beside(self) -> None:
        """The fast loop alone and beside a reasoning that decodes on a second stream."""
        for name, frame, _, _, steps in self._variants():
            if not self._hung:
                self.part('beside', name, partial(self._beside, name, frame, steps))

    def memory(self) -> dict[str, float]:
        """Device memory of everything above together, in MB."""
        if self.device.type != 'cuda':
            return {}
        return {
            'allocated_mb': torch.cuda.memory_allocated() / 1e6,
            'peak_allocated_mb': torch.cuda.max_memory_allocated() / 1e6,
            'reserved_mb': torch.cuda.memory_reserved() / 1e6,
        }

    def shipped(self, model: Path | None) -> None:
        """The shipped model on the device: its golden plans, and whole plans by the planner."""
        directory = load_model_dir(model or shipped_model_dir())
        expected: list[np.ndarray] = []

        def measure(backend: TorchBackend, repeats: int) -> dict[str, Any]:
            apart_m = waypoint_difference_m(backend, directory)
            plan = planning(directory, backend)
            # Before any is timed, so that all see the same first picture.
            poses = np.asarray(plan().trajectory.poses)
            expected[:] = expected or [poses]
            plan_apart_m = np.linalg.norm((poses - expected[0])[:, :2], axis=-1).max()
            found: dict[str, Any] = asdict(time_in_turns({'plan': plan}, repeats)['plan'])
            found |= {'golden_difference_m': apart_m, 'plan_difference_m': float(plan_apart_m)}
            if isinstance(backend, TorchCudaBackend):
                found['no_graph'] = backend.refused
            return found

        def measure_in(precision: str, record: Record, repeats: int) -> dict[str, Any]:
            device = self.device.type
            return measure(
                TorchCudaBackend(directory, precision, device=device, record=record), repeats
            )

        few = min(self.repeats, EAGER_REPEATS)
        self.part('shipped', 'torch on the CPU', lambda: measure(TorchBackend(directory), few))
        for precision in PRECISIONS:
            for how, record, repeats in (
                ('eager', plain, few),
                ('graph', self._record, FRAMES_PER_REPEAT * self.repeats),
            ):
                self.part(
                    'shipped',
                    f'{precision} {how}',
                    partial(measure_in, precision, record, repeats),
                )

    def compiled(self, limit_s: int) -> None:
        """What was recorded once more, its layers compiled before."""
        for frame in (self.deep, self.short):
            compile_layers(frame.policy)
            frame.flows.compile()
        for name in COMPILED:
            self._compile(name, limit_s)
        for name, frame, *_ in self._variants():
            what = f'frame {name}'
            self.part(
                'compiled',
                what,
                partial(
                    self._drive,
                    what,
                    frame,
                    self._runs[what],
                    self._record,
                    FRAMES_PER_REPEAT * self.repeats,
                    ', compiled',
                ),
            )
        for name in COMPILED_LAST:
            self._compile(name, limit_s)

    def proposal(self, budget: float) -> dict[str, Any]:
        """Steps and how often to look that keep a budget, from the recorded stages."""
        stages = self.summary['stages']
        pictures = len(self.deep.images) / 2

        def of(name: str, share: float = 1.0) -> Timing:
            row = stages[name]['graph']
            return Timing(*(row[f] * share for f in ('p50_ms', 'p99_ms', 'max_ms', 'cpu_ms')))

        measured = {
            'vision': of('vision', 1.0 / pictures),
            'prefill_action': of('prefill'),
            'step': of('flow 1'),
        }
        return asdict(propose({self.precision: measured}, self._size.config, budget))

    def _variants(self) -> tuple[tuple[str, Frame, str, str, int], ...]:
        return (
            ('deep 10', self.deep, 'prefill', 'flow 10', 10),
            (
                f'short {SHORT_STEPS}',
                self.short,
                'prefill short',
                f'flow short {SHORT_STEPS}',
                SHORT_STEPS,
            ),
        )

    def _flow(self, name: str, frame: Frame, steps: int, draws: int) -> None:
        expert = frame.policy.expert
        once = [frame.slots.bridged, *weights_of_a_plan(expert)]
        self._stage(name, frame.act(steps, draws), (weights_of_a_step(expert), once, steps))

    def _stage(self, name: str, run: Runnable, needs: tuple[Any, Any, int] | None) -> None:
        self._runs[name] = run

        def measure() -> dict[str, Any]:
            if needs is not None:
                weights, moved, passes = needs
                work: Work = work_of_call(run, weights, moved, passes)
                self._floors[name] = work.floor_ms(self._ceiling)
            eager = timed(run, min(self.repeats, EAGER_REPEATS), self.device)
            return {'eager': self._row(eager, name), 'graph': self._graph(name, run)}

        self.part('stages', name, measure)
        self.part('graph_minus_eager', name, lambda: self._apart(name, run))

    def _drive(
        self,
        name: str,
        frame: Frame,
        run: Runnable,
        record: Record,
        count: int,
        kept_as: str = '',
    ) -> dict[str, Any]:
        kept = self._recorded(f'{name}{kept_as}', run, record)
        return self._row(drive(frame, kept, count), name)

    def _graph(self, name: str, run: Runnable) -> dict[str, Any]:
        replay = self._recorded(name, run, self._record)[1]
        return self._row(timed(replay, self.repeats, self.device), name)

    def _apart(self, name: str, run: Runnable) -> float:
        """Largest difference between what was recorded and the same work run eagerly."""
        outputs, replay = self._recorded(name, run, self._record)
        replay()
        kept = [output.clone() for output in outputs]
        pairs = zip(kept, run(), strict=True)
        return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)

    def _recorded(self, name: str, run: Runnable, record: Record) -> Recorded:
        if record is plain:
            return plain(run)
        if name not in self._kept:
            self._kept[name], refused = recorded(name, run, record)
            if refused:
                self.summary['no_graph'][name] = refused
        return self._kept[name]

    def _row(self, found: Timing, name: str) -> dict[str, Any]:
        floor = self._floors.get(name.partition(',')[0])
        row = {**asdict(found), 'floor_ms': floor}
        row['multiple_of_floor'] = found.p50_ms / floor if floor else None
        return row

    def _beside(self, name: str, frame: Frame, steps: int) -> dict[str, Any]:
        count, what = FRAMES_PER_REPEAT * self.repeats, f'frame {name}'
        # Each on a lane of its own, whatever is recorded elsewhere: see `torch_drive`.
        fast, slow = lane(self.device, priority=-1), lane(self.device)
        run, refused = recorded(what, frame.whole(steps), fast.record)
        (_, think), refused_too = recorded('AR step', self.answer.step, slow.record)
        frames = Drive(frame, run)
        wait(self.device)
        with slow.taken():
            slow_alone = timed(think, self.repeats, self.device)
        with fast.taken():
            alone = frames.frames(count, fast)
        together, tokens_per_s = drive_beside(frames, count, think, fast, slow)
        return {
            'alone': self._row(alone, what),
            'beside': self._row(together, what),
            'slowdown_p50': together.p50_ms / alone.p50_ms,
            'slowdown_p99': together.p99_ms / alone.p99_ms,
            'tokens_per_s_alone': 1e3 / slow_alone.p50_ms,
            'tokens_per_s_beside': tokens_per_s,
            'no_graph': refused or refused_too,
        }

    def _ratios(self) -> dict[str, dict[str, float]]:
        ways = {n: r['p50_ms'] for n, r in self.summary['decoders'].items() if 'p50_ms' in r}
        ways |= {
            name: row['graph']['p50_ms']
            for name, row in self.summary['stages'].items()
            if name.startswith(('flow', 'diffusion'))
        }
        return {
            name: {f'AR-{count}_over_this': ways[f'AR-{count}'] / ms for count in ANSWERS}
            for name, ms in ways.items()
        }

    def _compile(self, name: str, limit_s: int) -> None:
        run = self._runs[name]

        def measure() -> dict[str, Any]:
            began = time.perf_counter()
            with alarm(limit_s):
                run()
            first_call_s = time.perf_counter() - began
            return {**self._graph(f'{name}, compiled', run), 'first_call_s': first_call_s}

        self.part('compiled', name, measure)


def _count(weights: Any) -> int:
    return sum(weight.numel() for weight in {id(w): w for w in weights}.values())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(0) if device.type == 'cuda' else 'cpu'
