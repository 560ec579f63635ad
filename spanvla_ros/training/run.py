"""A training run on disk and on screen: clock, progress bar, log, saved state."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from tqdm import tqdm

from spanvla_ros.model.backbone.adapters import adapter_layers, merged, save_adapters
from spanvla_ros.model.checkpoint import swap_directory, write_tensors, write_text
from spanvla_ros.model.policy import Policy, save_policy
from spanvla_ros.training.lint import Finding
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.sharding import AnyOptimizer
from spanvla_ros.types import SpanvlaError

MODEL_DIR, STATE_DIR, ADAPTERS_DIR, REFUSED_DIR = 'model', 'state', 'adapters', 'refused'
SETTINGS_FILE, LOG_FILE = 'config.yaml', 'log.jsonl'
EVALUATE, STOP, SAVE = 1, 2, 4


def model_dir_of(path: Path) -> Path:
    """The model directory in a run directory, or the path itself."""
    return path / MODEL_DIR if (path / MODEL_DIR).is_dir() else path


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    elapsed_s: float = 0.0


class Run:
    """Clock, progress bar, log and saved state of a run."""

    def __init__(
        self,
        group: Group,
        stage: str,
        settings: TrainSettings,
        out: Path,
        earlier: list[Any],
        position: Position,
    ) -> None:
        self.group, self.stage, self.settings, self.out = group, stage, settings, out
        self.earlier = earlier
        self.step, self._first_step = position.step, position.step
        self._before_s = position.elapsed_s
        self._started = time.monotonic()
        self.share = self._share(self.step)
        self._evaluated_s = self._saved_s = self.elapsed_s
        self._sums: dict[str, float] = {}
        self._summed = 0
        self._interrupted = False
        self.refused = ''
        self._rows = settings.batch * settings.accumulate
        self._bar: tqdm[Any] | None = None
        self._writer: Any = None
        if group.leads:
            write_text(out / SETTINGS_FILE, yaml.safe_dump(asdict(settings), sort_keys=False))
            self._bar = tqdm(
                total=1.0, initial=self.share, desc=stage, dynamic_ncols=True, disable=None,
                bar_format='{l_bar}{bar}| {elapsed}<{remaining} {postfix}',
            )  # fmt: skip
            if settings.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(out / 'tensorboard'))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt if group.leads else signal.SIG_IGN)

    @property
    def elapsed_s(self) -> float:
        """Wall time of this run, earlier calls included."""
        return self._before_s + time.monotonic() - self._started

    @property
    def save_due(self) -> bool:
        """Whether the last saved state is old."""
        return self.elapsed_s - self._saved_s > self.settings.save_every_s

    def next_word(self) -> tuple[float, float]:
        """What the first process tells all: share done after this step, and what to do then."""
        settings, done = self.settings, self.step + 1
        share = self._share(done)
        code = 0
        stop = self._interrupted or share >= 1.0
        stop = stop or (settings.stop_after > 0 and done >= settings.stop_after)
        if stop:
            code |= STOP
        if stop or self.save_due:
            code |= SAVE
        if share >= 1.0 or self.elapsed_s - self._evaluated_s > settings.evaluate_every_s:
            code |= EVALUATE
        return share, float(code)

    def advance(self, share: float, losses: Mapping[str, float]) -> None:
        """Count one step."""
        self.step += 1
        self.share = share
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._summed += 1
        if self._bar is not None:
            self._bar.n = min(share, 1.0)
            rate = (self.step - self._first_step) / max(time.monotonic() - self._started, 1e-3)
            self._bar.set_postfix_str(
                f'step {self.step}, {rate * self._rows:.1f} rows/s, '
                + ', '.join(f'{k} {v:.3f}' for k, v in losses.items()),
                refresh=False,
            )
            self._bar.update(0)

    def report(self, metrics: Mapping[str, float]) -> None:
        """One line of log: losses since the last, and held-out metrics."""
        self._evaluated_s = self.elapsed_s
        if not self.group.leads:
            return
        rate = (self.step - self._first_step) / max(time.monotonic() - self._started, 1e-3)
        line = {
            'stage': self.stage,
            'step': self.step,
            'minutes': round(self.elapsed_s / 60.0, 2),
            'rows_per_s': round(rate * self._rows, 1),
            **{f'loss_{k}': round(v / self._summed, 4) for k, v in self._sums.items()},
            **{name: round(value, 3) for name, value in metrics.items()},
        }
        self._sums, self._summed = {}, 0
        with (self.out / LOG_FILE).open('a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        tqdm.write(' '.join(f'{k}={v}' for k, v in line.items()), file=sys.stderr)
        if self._writer is not None:
            for name, value in line.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(name, value, self.step)

    def save(
        self, policy: Policy, optimizer: AnyOptimizer, findings: Sequence[Finding] = ()
    ) -> None:
        """Write state and model directory, each whole or not at all; every process calls it.

        With findings of the lint the model is written beside the last one that had none.
        """
        self._saved_s = self.elapsed_s
        moments = optimizer.state()
        if not self.group.leads:
            return
        try:
            self._write(policy, moments, findings)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.out / f'.{STATE_DIR}.tmp', ignore_errors=True)
            raise SpanvlaError(
                f'{self.out}: step {self.step} cannot be written ({error}); make room, then go on '
                'from the last complete state with --resume'
            ) from error

    def _write(
        self, policy: Policy, moments: Mapping[str, np.ndarray], findings: Sequence[Finding]
    ) -> None:
        elapsed_s = self.elapsed_s
        done: dict[str, Any] = {
            'stage': self.stage,
            'steps': self.step,
            'rows': self.step * self._rows,
            'minutes': round(elapsed_s / 60.0, 2),
            'settings': asdict(self.settings),
        }
        self.refused = '; '.join(f'{one.check}: {one.why}' for one in findings)
        if self.refused:
            done['lint'] = [asdict(one) for one in findings]
            tqdm.write(f'not promoted: {self.refused}', file=sys.stderr)
        place = self.out / (REFUSED_DIR if self.refused else MODEL_DIR)
        with merged(policy.expert):
            save_policy(policy, place, {'stages': [*self.earlier, done]})
        if not self.refused:
            shutil.rmtree(self.out / REFUSED_DIR, ignore_errors=True)
        building = self.out / f'.{STATE_DIR}.tmp'
        building.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().cpu().numpy() for n, p in policy.named_parameters()}
        write_tensors(building / 'weights.safetensors', weights)
        write_tensors(building / 'optimizer.safetensors', moments)
        about = {'stage': self.stage, 'step': self.step, 'elapsed_s': elapsed_s}
        write_text(building / 'state.json', json.dumps(about) + '\n')
        swap_directory(building, self.out / STATE_DIR)
        if adapter_layers(policy.backbone.network):
            save_adapters(policy.backbone.network, self.out / ADAPTERS_DIR)

    def close(self) -> None:
        """End the progress bar and the writer."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _share(self, step: int) -> float:
        steps, minutes = self.settings.steps, self.settings.minutes
        share = step / steps if steps else self.elapsed_s / (60.0 * minutes)
        # As it travels between processes, so that a resumed run starts with the same number.
        return float(np.float32(share))

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
