"""`spanvla train STAGE`: one stage of training, supervised or by reinforcement."""

from __future__ import annotations

import argparse
from pathlib import Path

from spanvla_ros.model.checkpoint import settle_directory
from spanvla_ros.training.loop import STAGES, train
from spanvla_ros.training.parallel import run_group
from spanvla_ros.training.run import MODEL_DIR, REFUSED_DIR, STATE_DIR
from spanvla_ros.training.settings import load_settings
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
        '--processes', type=int, help='processes of one thread each that share a batch'
    )
    parser.add_argument(
        '--set', action='append', default=[], metavar='NAME=VALUE', dest='overrides',
        help='override one setting; repeatable',
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the stage; the model is in OUT/model."""
    overrides = list(options.overrides)
    if options.processes is not None:
        overrides.append(f'processes={options.processes}')
    settings = load_settings(options.config, overrides)
    out: Path = options.out
    if options.resume:
        for name in (STATE_DIR, MODEL_DIR, REFUSED_DIR):
            settle_directory(out / name)
    if (out / STATE_DIR).exists() and not options.resume:
        raise SpanvlaError(f'{out}: holds a run already; add --resume or name another --out')
    if options.resume and not (out / STATE_DIR).exists():
        raise SpanvlaError(f'{out}: holds no run to resume; leave --resume out')
    if not settings.data:
        raise SpanvlaError(f'{options.config}: data names no shards; add --set data=DIR')
    init = options.init
    if options.resume:
        init = out / (MODEL_DIR if (out / MODEL_DIR).exists() else REFUSED_DIR)
    if options.stage in ('action-expert', 'grpo') and init is None:
        raise SpanvlaError(f'train {options.stage}: needs a trained model; add --init DIR')
    out.mkdir(parents=True, exist_ok=True)
    resume = out / STATE_DIR if options.resume else None
    arguments = (options.stage, settings, out, init, resume)
    run_group(train, settings.processes, settings.threads, arguments)
    return 0
