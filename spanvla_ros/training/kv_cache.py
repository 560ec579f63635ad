"""Training the expert on K/V cached from the frozen backbone.

The backbone is nine tenths of a step of the action-expert stage, and most of what is not scoring
where the flow is reinforced; with it frozen its K/V of a row are the same every time, but for the
noise on its inputs. So a number of rows are prefilled once, each with one draw of that noise, for
all layers, and stored; every run on the same backbone and rows, whatever its stage, head,
interval, source or time sampler, reads them from there.

The price is less augmentation: a row that comes again comes with the same noise on its prompt
(flow times and noise of the flow are drawn anew). K/V are stored in fp16.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.batches import Batch, make_batch
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.sft import run_backbone
from spanvla_ros.types import SpanvlaError, read_json

CHUNK = 32
ABOUT_FILE = 'cache.json'
# What decides the K/V of a row, beside the backbone, the rows and their prompts.
NOISE = (
    'blind', 'camera_drop', 'history_drop', 'route_drop', 'route_noise_m', 'history_noise_m',
    'slot_empty', 'slot_foreign', 'answer_seen',
)  # fmt: skip
# Runs of every seed share one cache.
NOISE_SEED = 0


@dataclass(frozen=True)
class KvCache:
    """Rows with their K/V: `keys` and `values` are `[rows, layers, kv, slots, size]` on disk.

    On a GPU those of the bridged layers are held there, as `[layers, rows, kv, slots, size]`.
    """

    batch: Batch
    keys: np.ndarray
    values: np.ndarray
    layers: tuple[int, ...]
    held: Prefix | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.batch)

    def held_on(self, device: torch.device) -> KvCache:
        """The cache with all that a run reads of it on a GPU."""
        keys, values = (
            torch.stack([torch.from_numpy(stored[:, at].copy()).to(device) for at in self.layers])
            for stored in (self.keys, self.values)
        )
        return replace(self, batch=self.batch.to(device), held=Prefix(keys, values))

    def at(self, indices: np.ndarray) -> Batch:
        """A batch of some rows with the K/V of the bridged layers."""
        chosen = torch.from_numpy(indices)
        if self.held is not None:
            chosen = chosen.to(self.held.keys.device)
            near = Prefix(self.held.keys[:, chosen].float(), self.held.values[:, chosen].float())
            return replace(_picked(self.batch, chosen), prefix=near)
        keys, values = (
            torch.from_numpy(stored[indices][:, list(self.layers)].astype(np.float32))
            for stored in (self.keys, self.values)
        )
        prefix = Prefix(keys.transpose(0, 1), values.transpose(0, 1))
        return replace(_picked(self.batch, chosen), prefix=prefix)


def open_cache(
    folder: Path, policy: Policy, shards: ShardSet, rows: np.ndarray, settings: TrainSettings
) -> KvCache:
    """The cache in `folder`, made first where there is none.

    Args:
        folder: where it is or will be.
        policy: its backbone is frozen; its head says what the batches hold.
        shards: the training rows.
        rows: which of them.
        settings: noise on the inputs.

    Raises:
        SpanvlaError: the folder holds K/V of another backbone, of other rows or other noise.
    """
    about = _about(policy, shards, rows, settings)
    batches = _batches(policy, shards, rows, settings)
    if (folder / ABOUT_FILE).exists():
        found = read_json(folder / ABOUT_FILE, 'remove the folder, it is made again')
        if odd := sorted(name for name in about if found.get(name) != about[name]):
            raise SpanvlaError(
                f'{folder}: holds K/V of another {", ".join(odd)}; name another --set cache=DIR'
            )
        known = [_without_images(batch) for batch in batches]
    else:
        known = _make(folder, policy, batches, len(rows), settings)
        write_text(folder / ABOUT_FILE, json.dumps(about, indent=1) + '\n')
    keys, values = (np.load(folder / f'{name}.npy', mmap_mode='r') for name in ('keys', 'values'))
    cache = KvCache(_joined(known), keys, values, policy.backbone.bridged)
    return cache if policy.device.type == 'cpu' else cache.held_on(policy.device)


def _about(
    policy: Policy, shards: ShardSet, rows: np.ndarray, settings: TrainSettings
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, weight in sorted(policy.backbone.named_parameters()):
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    chosen = '\n'.join(str(shards.scene_ids[row]) for row in rows)
    layout = policy.config
    return {
        'backbone': digest.hexdigest(),
        'rows': hashlib.sha256(chosen.encode()).hexdigest(),
        'noise': [getattr(settings, name) for name in NOISE],
        'prompt': [layout.prompt_tokens, layout.reasoning_slot, layout.answer_tokens],
    }


def _batches(
    policy: Policy, shards: ShardSet, rows: np.ndarray, settings: TrainSettings
) -> Iterator[Batch]:
    """The rows as they are trained on, the noise of each chunk drawn from its own seed."""
    for start in range(0, len(rows), CHUNK):
        rng = np.random.default_rng([NOISE_SEED, start])
        chosen = shards.rows(rows[start : start + CHUNK], policy.config.frames_per_camera)
        yield make_batch(chosen, policy, settings, rng, 'reasoning')


def _make(
    folder: Path,
    policy: Policy,
    batches: Iterator[Batch],
    count: int,
    settings: TrainSettings,
) -> list[Batch]:
    """Prefill all rows; returns their batches without pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone, config = policy.backbone, policy.config
    prompt = len(backbone.text_places) if settings.blind else config.prompt_tokens
    length = prompt + config.answer_tokens
    shape = (count, backbone.layers, backbone.kv_heads, length, backbone.head_size)
    files = {name: folder / f'.{name}.{os.getpid()}.npy' for name in ('keys', 'values')}
    stored = [
        np.lib.format.open_memmap(path, mode='w+', dtype=np.float16, shape=shape)
        for path in files.values()
    ]
    start, known = 0, []
    with tqdm(total=count, desc='K/V', unit='row', disable=None) as bar, torch.no_grad():
        for batch in batches:
            stop = start + len(batch)
            layers = tuple(range(backbone.layers))
            prefix, _, _ = run_backbone(policy, batch.to(policy.device), settings, layers)
            for file, part in zip(stored, (prefix.keys, prefix.values), strict=True):
                kept = part[..., :length, :].transpose(0, 1).cpu()
                file[start:stop, :, :, : kept.shape[3]] = kept.numpy().astype(np.float16)
            known.append(_without_images(batch))
            start = stop
            bar.update(len(batch))
    for file, (name, path) in zip(stored, files.items(), strict=True):
        file.flush()
        path.replace(folder / f'{name}.npy')
    return known


def _without_images(batch: Batch) -> Batch:
    # Rows hold scoring rows, which are read again where they are needed.
    images = batch.images[:, :0].clone()
    return replace(batch, images=images, rows=(), kept={})


def _joined(batches: Sequence[Batch]) -> Batch:
    """All batches as one, without pictures; answers are padded to one length."""
    longest = max(batch.answer.shape[1] for batch in batches)
    parts: dict[str, Any] = {}
    for name in batches[0].tensors():
        tensors = [getattr(batch, name) for batch in batches]
        if name in ('answer', 'reasoning_weight', 'action_weight', 'seen'):
            tensors = [
                torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]))
                for tensor in tensors
            ]
        parts[name] = torch.cat(tensors)
    seen = tuple(one for batch in batches for one in batch.observations)
    return Batch(**parts, observations=seen)


def _picked(batch: Batch, chosen: torch.Tensor) -> Batch:
    picked: dict[str, Any] = {name: one[chosen] for name, one in batch.tensors().items()}
    seen = tuple(batch.observations[row] for row in chosen.tolist())
    return Batch(**picked, observations=seen)
