"""One training stage from first step to model directory; can stop anywhere and go on.

A step is a function of weights, optimiser state and (seed, step, process) alone, so on a CPU a
run that was stopped and resumed ends bit for bit where an unbroken one ends, as long as its
length is given in steps.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from spanvla_ros.model.action_heads import fit_anchors
from spanvla_ros.model.action_tokens import fit_codebook, segments_of
from spanvla_ros.model.backbone.adapters import (
    LoraSettings,
    attach_adapters,
)
from spanvla_ros.model.backbone.folder import is_network_folder
from spanvla_ros.model.checkpoint import load_model_dir, read_tensors
from spanvla_ros.model.config import ModelConfig, load_config, with_settings
from spanvla_ros.model.flow import Normalization, encode_trajectory, source_path
from spanvla_ros.model.policy import (
    Policy,
    load_policy,
    new_policy,
    policy_from_folder,
    with_config,
)
from spanvla_ros.model.prompt import prompt_length
from spanvla_ros.training.data.shards import ShardSet, refuse_held_out
from spanvla_ros.training.feed import Feed
from spanvla_ros.training.heldout import HeldOut
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.promotion import Promotion
from spanvla_ros.training.run import (
    EVALUATE,
    MODEL_DIR,
    REFUSED_DIR,
    SAVE,
    STOP,
    Position,
    Run,
    model_dir_of,
)
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.sharding import AnyOptimizer, make_optimizer, recompute_blocks
from spanvla_ros.training.stages import action_expert, grpo, knowledge, sft, words
from spanvla_ros.types import SpanvlaError

STAGES: dict[str, ModuleType] = {
    'knowledge': knowledge,
    'sft': sft,
    'action-expert': action_expert,
    'grpo': grpo,
    'words': words,
}
# What is measured on held-out rows, where it is not the plans.
LOOKS = {'knowledge': HeldOut.seeing, 'words': HeldOut.speaking}
FIT_ROWS = 2000
LEAST_STD = (0.05, 0.05, 0.005)


def train(
    group: Group,
    stage: str,
    settings: TrainSettings,
    out: Path,
    init: Path | None,
    resume: Path | None,
) -> None:
    """Run one stage in this process of the group; see `TrainSettings` for its length."""
    device = prepare_device(settings, group)
    module = STAGES[stage]
    if settings.sharding == 'fsdp' and stage == 'grpo':
        raise SpanvlaError(
            'train grpo: answers of different lengths would leave processes waiting for each '
            "other's weights; use sharding=none, for adapters need little room"
        )
    flow = stage == 'grpo' and settings.rollout_policy != 'tokens'
    if settings.cache and not flow and stage != 'action-expert':
        raise SpanvlaError(f'train {stage}: changes the backbone; leave cache out')
    shards = _training_rows(settings)
    policy = start_policy(settings, init)
    if settings.lora_rank and not flow:
        targets = tuple(settings.lora_targets.split())
        lora = LoraSettings(settings.lora_rank, settings.lora_alpha, targets)
        attach_adapters(policy.backbone.network, lora, settings.seed)
    earlier = [] if init is None or is_network_folder(init) else trained_before(init)
    if resume:
        earlier = earlier[:-1]
    fit_targets(policy, shards)
    parts = module.parts(policy, settings)
    position = restore_weights(policy, resume, stage) if resume else Position()
    if settings.gradient_checkpointing:
        recompute_blocks(policy)
    optimizer = make_optimizer(policy.to(device), parts, settings, group)
    if resume:
        optimizer.restore(read_tensors(resume / 'optimizer.safetensors'))
    run = Run(group, stage, settings, out, earlier, position)
    heldout = None
    if settings.heldout:
        heldout = HeldOut(ShardSet(settings.heldout), policy, settings, group)
    promotion = _promotion(group, stage, settings)
    if settings.compiled:
        compile_vision(policy)
    parted = settings.accumulate
    steps = Feed(module.ANSWERS, shards, policy, settings, group).steps(run.step * parted)
    half = settings.precision == 'bf16'
    code = 0
    while not code & STOP:
        taken = list(itertools.islice(steps, parted))
        batches = [step.batch.to(device) for step in taken]
        generators = [torch.Generator().manual_seed(step.seed) for step in taken]
        word = run.next_word()
        for _ in range(settings.updates):
            optimizer.zero()
            means: dict[str, float] = {}
            for step, batch, generator in zip(taken, batches, generators, strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    losses = optimizer.losses(module.losses, batch, settings, generator)
                check_losses(losses, run.step, shards, step.indices)
                # What has no gradient is only reported.
                minimised = [loss for loss in losses.values() if loss.requires_grad]
                (torch.stack(minimised).sum() / parted).backward()
                for name, loss in losses.items():
                    means[name] = means.get(name, 0.0) + float(loss.detach()) / parted
            share, flags = optimizer.step(group, run.share, run.step, word)
        code = int(flags)
        run.advance(share, means)
        if code:
            with optimizer.whole() as whole:
                look_and_save(run, whole, optimizer, code, heldout, promotion)
    run.close()
    if run.refused:
        raise SpanvlaError(
            f'{out / REFUSED_DIR}: not promoted, {run.refused}; {out / MODEL_DIR} is the last '
            'checkpoint that was'
        )


def look_and_save(
    run: Run,
    policy: Policy,
    optimizer: AnyOptimizer,
    code: int,
    heldout: HeldOut | None,
    promotion: Promotion | None,
) -> None:
    """Measure, report and save as the first process says."""
    if heldout is not None and code & EVALUATE:
        measure = LOOKS.get(run.stage, HeldOut.driving)
        run.report(measure(heldout, policy))
    elif code & EVALUATE:
        run.report({})
    if code & SAVE:
        run.save(policy, optimizer, promotion.findings(policy) if promotion else [])


def prepare_device(settings: TrainSettings, group: Group) -> torch.device:
    """Where this process trains; only on a CPU is a run the same bit for bit.

    Raises:
        SpanvlaError: there is no GPU for this process.
    """
    if settings.device == 'cpu':
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # Filling fresh memory is a debugging aid of that mode; nothing here reads it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return torch.device('cpu')
    if torch.cuda.device_count() < group.local_size:
        raise SpanvlaError(
            f'train: {group.local_size} processes on device cuda need as many GPUs, torch finds '
            f'{torch.cuda.device_count()}; start fewer processes, or set device=cpu'
        )
    torch.set_float32_matmul_precision('high')
    device = torch.device('cuda', group.local_rank)
    torch.cuda.set_device(device)
    return device


def _training_rows(settings: TrainSettings) -> ShardSet:
    shards = ShardSet(settings.data)
    refuse_held_out(shards.path, 'train on')
    return shards


def _promotion(group: Group, stage: str, settings: TrainSettings) -> Promotion | None:
    """What a checkpoint of reinforcement learning has to pass."""
    if stage != 'grpo' or not settings.lint_rows or not group.leads:
        return None
    if not settings.heldout:
        raise SpanvlaError('train grpo: the lint needs heldout; give it, or lint_rows=0')
    return Promotion(ShardSet(settings.heldout), settings)


def check_losses(
    losses: Mapping[str, torch.Tensor], step: int, shards: ShardSet, indices: np.ndarray
) -> None:
    """Refuse a loss that is not finite, naming the rows it came from."""
    for name, loss in losses.items():
        if not torch.isfinite(loss):
            rows = ', '.join(shards.where(index) for index in indices[:4])
            raise SpanvlaError(
                f'train: loss {name} of step {step} is {float(loss.detach())}; look at '
                f'{rows}{" ..." if len(indices) > 4 else ""}, or lower learning_rate'
            )


def start_policy(settings: TrainSettings, init: Path | None) -> Policy:
    """The model of `init`, or a fresh one, with the configuration that the settings ask for."""
    config = load_config(settings.model_config) if settings.model_config else None
    if init is None:
        return new_policy(with_settings(config or ModelConfig(), **settings.model), settings.seed)
    if is_network_folder(init):
        return policy_from_folder(init, config, settings.seed, **settings.model)
    policy = open_model(init)
    changes = dict(settings.model)
    if changes.get('frames_per_camera', policy.config.frames_per_camera) != (
        policy.config.frames_per_camera
    ):
        longer = with_settings(policy.config, **changes)
        changes.setdefault('prompt_tokens', prompt_length(longer, policy.layout.tokenizer))
    config = with_settings(policy.config, **changes)
    if config == policy.config and not settings.fresh_expert:
        return policy
    return with_config(policy, config, settings.seed, fresh_expert=settings.fresh_expert)


def open_model(path: Path) -> Policy:
    """The policy of a model directory or of a run directory that holds one."""
    return load_policy(model_dir_of(path))


def trained_before(path: Path) -> list[Any]:
    """The stages a model has been through, as its manifest tells."""
    return list(load_model_dir(model_dir_of(path)).training.get('stages', []))


def fit_targets(policy: Policy, shards: ShardSet) -> None:
    """Give a new policy its normalisation and action codebook, read off the data."""
    config = policy.config
    if shards.futures.shape[1] != config.waypoints:
        raise SpanvlaError(
            f'{shards.path}: futures have {shards.futures.shape[1]} waypoints, the model '
            f'{config.waypoints}; draw scenes for this model'
        )
    if policy.codebook is None:
        chosen = np.unique(np.linspace(0, len(shards) - 1, FIT_ROWS).astype(int))
        segments = np.concatenate([segments_of(shards.futures[i]) for i in chosen])
        policy.codebook = fit_codebook(segments, config.action_tokens)
    normalization = policy.normalization
    if normalization is None:
        std = np.maximum(_states(policy, shards, np.ones((config.waypoints, 3))).std(0), LEAST_STD)
        normalization = Normalization(config.source, std)
    if config.head == 'diffusion' and normalization.anchors is None:
        anchors = fit_anchors(_states(policy, shards, normalization.std), config.anchors)
        normalization = replace(normalization, anchors=anchors)
    policy.normalization = replace(normalization, codebook=policy.codebook)


def _states(policy: Policy, shards: ShardSet, std: np.ndarray) -> np.ndarray:
    """Trajectories of some rows as the flow sees them, in units of `std`."""
    config = policy.config
    chosen = np.unique(np.linspace(0, len(shards) - 1, FIT_ROWS).astype(int))
    found = []
    for row in shards.rows(chosen):
        source = source_path(config.source, row.sample.observation, config.times_s)
        found.append(encode_trajectory(row.sample.future, source, std))
    return np.stack(found).astype(np.float64)


def compile_vision(policy: Policy) -> None:
    """Let torch fuse the vision tower's small operations; a quarter faster on a CPU."""
    if not any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++')):
        raise SpanvlaError('train: compiled needs a C++ compiler; add --set compiled=false')
    eager = policy.backbone.vision
    fused = torch.compile(eager, dynamic=False)

    def vision(pixels: torch.Tensor) -> torch.Tensor:
        # Held-out batches have other sizes; compiling for them would cost more than it saves.
        found: torch.Tensor = fused(pixels) if torch.is_grad_enabled() else eager(pixels)
        return found

    policy.backbone.vision = vision  # type: ignore[method-assign]


def restore_weights(policy: Policy, folder: Path, stage: str) -> Position:
    """Take weights and position from a saved state."""
    try:
        about = json.loads((folder / 'state.json').read_text(encoding='utf-8'))
        position = Position(int(about['step']), float(about['elapsed_s']))
        kind = about['stage']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpanvlaError(f'{folder}: no state to resume; start without --resume') from error
    if kind != stage:
        raise SpanvlaError(f'{folder}: is of stage {kind}, not {stage}; name another --out')
    weights = read_tensors(folder / 'weights.safetensors')
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return position
