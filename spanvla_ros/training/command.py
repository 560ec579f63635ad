"""`spanvla train STAGE`: one stage of training, supervised or by reinforcement."""

from __future__ import annotations

import argparse
from pathlib import Path

from spanvla_ros.model.checkpoint import settle_directory
from spanvla_ros.training.loop import STAGES, train
from spanvla_ros.training.parallel import Group, launched, run_group
from spanvla_ros.training.run import MODEL_DIR, REFUSED_DIR, STATE_DIR
from spanvla_ros.training.settings import TrainSettings, load_settings
from spanvla_ros.types import SpanvlaError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla train`."""
    parser.add_argument('stage', choices=sorted(STAGES), help='the stage')
    parser.add_argument('--config', required=True, type=Path, help='settings (YAML)')
    parser.add_argument('--out', required=True, type=Path, help='run directory')
    parser.add_argument(
        '--init',
        type=Path,
        help='model or run directory to start from, or a local Hugging Face folder',
    )
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument(
        '--processes', type=int,
        help='processes that share a batch; torchrun and accelerate launch start their own',
    )  # fmt: skip
    parser.add_argument(
        '--set', action='append', default=[], metavar='NAME=VALUE', dest='overrides',
        help='override one setting; repeatable',
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the stage; the model is in OUT/model."""
    overrides = list(options.overrides)
    if options.processes is not None:
        overrides.append(f'processes={options.processes}')
    group = launched()
    if group is not None:
        overrides = _with_processes(overrides, group.size)
    settings = load_settings(options.config, overrides)
    if not settings.data:
        raise SpanvlaError(f'{options.config}: data names no shards; add --set data=DIR')
    init = options.init
    if options.stage in ('action-expert', 'grpo', 'words') and init is None and not options.resume:
        raise SpanvlaError(f'train {options.stage}: needs a trained model; add --init DIR')
    out: Path = options.out
    if group is None or group.leads:
        _prepare(out, resume=options.resume)
    state = out / STATE_DIR if options.resume else None
    arguments = (options.stage, settings, out, init, state)
    run_group(_train, settings.processes, settings.threads, arguments)
    return 0


def _with_processes(overrides: list[str], size: int) -> list[str]:
    """The overrides with the number of processes that a launcher has started.

    Raises:
        SpanvlaError: another number was asked for.
    """
    for override in overrides:
        name, _, value = override.partition('=')
        if name.strip() == 'processes' and value.strip() != str(size):
            raise SpanvlaError(
                f'train: {value.strip()} processes are asked for where the launcher has started '
                f'{size}; leave --processes out'
            )
    return [*overrides, f'processes={size}']


def _prepare(out: Path, *, resume: bool) -> None:
    """Refuse a run directory that does not fit; put one right that a kill has left."""
    if resume:
        for name in (STATE_DIR, MODEL_DIR, REFUSED_DIR):
            settle_directory(out / name)
    if (out / STATE_DIR).exists() and not resume:
        raise SpanvlaError(f'{out}: holds a run already; add --resume or name another --out')
    if resume and not (out / STATE_DIR).exists():
        raise SpanvlaError(f'{out}: holds no run to resume; leave --resume out')
    out.mkdir(parents=True, exist_ok=True)


def _train(
    group: Group,
    stage: str,
    settings: TrainSettings,
    out: Path,
    init: Path | None,
    state: Path | None,
) -> None:
    if state:
        # Only now has the first process put the run directory right for all.
        init = out / (MODEL_DIR if (out / MODEL_DIR).exists() else REFUSED_DIR)
    train(group, stage, settings, out, init, state)
