"""The whole model in torch: backbone, action expert, training heads, and their directory.

A directory holds `config.yaml`, `backbone/` (a Hugging Face folder), `expert.safetensors`,
`normalization.json`, `action_codebook.safetensors` and, until it is shipped,
`training_heads.safetensors`. It is written beside its place and then renamed.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from spanvla_ros.model.action_heads import ExpertHead, expert_outputs, head_of
from spanvla_ros.model.action_tokens import (
    CODEBOOK_FILE,
    ActionCodebook,
    load_codebook,
    write_codebook,
)
from spanvla_ros.model.backbone import (
    BACKBONE_DIR,
    BACKBONES,
    Prefix,
    draw_weights,
    open_backbone,
    tiny_network,
)
from spanvla_ros.model.backbone.adapters import merged
from spanvla_ros.model.backbone.folder import TOKENIZER_JSON, load_network
from spanvla_ros.model.backbone.vocabulary import grow_vocabulary
from spanvla_ros.model.checkpoint import (
    load_model_dir,
    read_tensors,
    swap_directory,
    write_manifest,
    write_tensors,
    write_text,
)
from spanvla_ros.model.config import CONFIG_FILE, ModelConfig, dump_config, with_settings
from spanvla_ros.model.expert import ActionExpert
from spanvla_ros.model.flow import (
    NORMALIZATION_FILE,
    Normalization,
    load_normalization,
    time_features,
    write_normalization,
)
from spanvla_ros.model.heads import PictureHeads
from spanvla_ros.model.prompt import (
    ACTION_WORDS,
    PromptLayout,
    build_tokenizer,
    extend_tokenizer,
    load_tokenizer,
    number_tokens,
    prompt_length,
    read_tokenizer,
    write_tokenizer,
)
from spanvla_ros.types import SpanvlaError

EXPERT_FILE = 'expert.safetensors'
HEADS_FILE = 'training_heads.safetensors'
ANSWER_ACTIONS = 10
PICTURE_SETTINGS = ('frames_per_camera', 'frame_lag_s', 'prompt_tokens')


class Policy(nn.Module):
    """A model as it trains: `normalization` and `codebook` are None until data has been seen."""

    def __init__(self, config: ModelConfig, layout: PromptLayout, network: nn.Module) -> None:
        """Join a backbone network to a fresh expert and fresh heads."""
        super().__init__()
        self.config = config
        self.layout = layout
        extra = config.answer_room + max(config.waypoints, ANSWER_ACTIONS) + 2
        self.backbone = open_backbone(network, config, layout.image_positions.tolist(), extra)
        self.expert = ActionExpert(
            self.backbone,
            config.expert_width,
            config.waypoints,
            config.sequence_tokens,
            expert_outputs(config),
        )
        self.heads = PictureHeads(self.backbone.hidden, len(layout.image_positions))
        self.normalization: Normalization | None = None
        self.codebook: ActionCodebook | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.expert.point.device

    def look(self, images: Tensor) -> Tensor:
        """Visual tokens `[B, pictures * n, H]` of uint8 RGB pictures `[B, pictures, h, w, 3]`."""
        batch, pictures = images.shape[:2]
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() * (1.0 / 255.0)
        tokens = self.backbone.vision(pixels)
        return tokens.reshape(batch, pictures * tokens.shape[1], -1)

    @torch.no_grad()
    def plan(
        self,
        prefix: Prefix,
        ego: Tensor,
        valid: Tensor,
        sources: Float64[np.ndarray, 'b t 3'],
        steps: int | None = None,
    ) -> Float64[np.ndarray, 'b t 3']:
        """Poses in `base_link` by an expert head, from the noise-free source.

        Args:
            prefix: K/V of the bridged layers.
            ego: ego features `[B, 20]`.
            valid: slots that may be attended `[B, S]`.
            sources: source paths.
            steps: number of Euler steps, the configuration's if None.
        """
        head = head_of(self.config)
        if not isinstance(head, ExpertHead) or self.normalization is None:
            raise SpanvlaError(f'head {self.config.head}: plans only by `runtime.planner`')

        def ask(x: np.ndarray, at: float) -> np.ndarray:
            time = torch.from_numpy(time_features(at)).to(ego.device).expand(*x.shape[:2], -1)
            state = torch.from_numpy(x).to(ego.device)
            found = self.expert(state, time, ego, prefix.keys, prefix.values, valid)
            return np.asarray(found.float().cpu().numpy())

        return head.plan(self.config, self.normalization, ask, steps or self.config.steps, sources)


def new_policy(config: ModelConfig, seed: int = 0) -> Policy:
    """A tiny policy with freshly drawn weights, the same for the same seed."""
    tokenizer = build_tokenizer(max(ACTION_WORDS, config.action_tokens))
    special = tokenizer.get_vocab(with_added_tokens=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = tiny_network(tokenizer.get_vocab_size(), special)
        ids, values = number_tokens(tokenizer)
        numbers = dict(zip(ids.tolist(), values.tolist(), strict=True))
        draw_weights(network, numbers, torch.Generator().manual_seed(seed))
        return Policy(config, PromptLayout(config, tokenizer), network)


def with_config(
    policy: Policy, config: ModelConfig, seed: int = 0, *, fresh_expert: bool = False
) -> Policy:
    """The same backbone under another configuration.

    The expert is fresh, or on `fresh_expert`, but where nothing other than the number of pictures
    changes: then no weight has another shape or sense, and it is kept. What was read off the data
    is kept as far as it still means the same, training heads where they still fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = PromptLayout(config, policy.layout.tokenizer)
        changed = Policy(config, layout, policy.backbone.network)
    _copy_known(changed.heads, _arrays(policy.heads, np.float32))
    before = policy.config
    pictures = {name: getattr(config, name) for name in PICTURE_SETTINGS}
    if not fresh_expert and replace(before, **pictures) == config:
        changed.expert.load_state_dict(policy.expert.state_dict())
    same_points = (before.waypoints, before.horizon_s) == (config.waypoints, config.horizon_s)
    if same_points and before.action_tokens == config.action_tokens:
        changed.codebook = policy.codebook
    if same_points and before.source == config.source and policy.normalization is not None:
        changed.normalization = replace(
            policy.normalization, anchors=None, codebook=changed.codebook
        )
    return changed


def policy_from_folder(
    folder: str | Path, config: ModelConfig | None = None, seed: int = 0, **changes: Any
) -> Policy:
    """A policy on the network of a local Hugging Face folder, with a fresh expert.

    The tokenizer gets our marks, numbers and actions, the prompt is laid out with its tokens and
    the family's image marks, and the expert has the head count and head size of the backbone.

    Args:
        folder: written by `save_pretrained`, tokenizer included.
        config: cameras, horizon, bridge and widths; family, patches and prompt length are the
            folder's. None takes the town's three cameras, enlarged to whole visual tokens.
        seed: of the expert and the vectors of new tokens.
        changes: fields of the configuration to set otherwise.

    Raises:
        SpanvlaError: the folder is refused (`folder.check_folder`), or does not fit `config`.
    """
    path = Path(folder)
    network = load_network(path)
    family = network.config.model_type
    tokenizer = read_tokenizer(path / TOKENIZER_JSON)
    patch, merge = BACKBONES[family].cell(network.config)
    if config is None:
        config = _town_config(family, patch, merge)
    config = with_settings(config, **changes)
    if config.head == 'text':
        raise SpanvlaError(
            f'{path}: head text says numbers as words of the tiny tokenizer; use head tokens'
        )
    if (config.family, config.patch_px, config.patch_merge) != (family, patch, merge):
        raise SpanvlaError(
            f'{path}: is {family} with patch_px {patch} and patch_merge {merge}, the model '
            f'settings say {config.family}, {config.patch_px}, {config.patch_merge}; write these'
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = extend_tokenizer(tokenizer, config.action_tokens)
        ids, values = number_tokens(tokenizer)
        numbers = dict(zip(ids.tolist(), values.tolist(), strict=True))
        grow_vocabulary(network, new, numbers, torch.Generator().manual_seed(seed))
        config = with_settings(config, prompt_tokens=prompt_length(config, tokenizer))
        return Policy(config, PromptLayout(config, tokenizer), network)


def _town_config(family: str, patch: int, merge: int) -> ModelConfig:
    """The defaults for another family, pictures enlarged to whole visual tokens."""
    cell = patch * merge
    cameras = tuple(
        replace(
            camera,
            width_px=-(-camera.width_px // cell) * cell,
            height_px=-(-camera.height_px // cell) * cell,
        )
        for camera in ModelConfig().cameras
    )
    return with_settings(
        ModelConfig(), name=family, family=family, cameras=cameras, patch_px=patch,
        patch_merge=merge, reasoning_slot=48, answer_tokens=64,
    )  # fmt: skip


def load_policy(model_dir: str | Path) -> Policy:
    """Read a model directory (verified first); the training heads are fresh where it has none."""
    directory = load_model_dir(model_dir)
    folder, config = directory.path, directory.config
    layout = PromptLayout(config, load_tokenizer(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(config, layout, load_network(folder / BACKBONE_DIR))
    _fill(policy.expert, folder / EXPERT_FILE)
    if HEADS_FILE in directory.files:
        _copy_known(policy.heads, read_tensors(folder / HEADS_FILE))
    if NORMALIZATION_FILE in directory.files:
        policy.normalization = load_normalization(folder, config)
    if CODEBOOK_FILE in directory.files:
        policy.codebook = load_codebook(folder)
    return policy


def save_policy(
    policy: Policy,
    model_dir: str | Path,
    training: Mapping[str, Any],
    *,
    shipped: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> str:
    """Write a model directory in place of an earlier one and return its sha256.

    Args:
        policy: the model.
        model_dir: where to.
        training: how it was trained, for the manifest.
        shipped: round weights to fp16 and leave the training heads out.
        scores: scores for the manifest.
    """
    folder = Path(model_dir)
    building = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        write_text(building / CONFIG_FILE, dump_config(policy.config))
        with merged(policy.backbone.network):
            network = policy.backbone.network
            if shipped:
                network = copy.deepcopy(network).half()
            network.save_pretrained(building / BACKBONE_DIR)
        write_tokenizer(building, policy.layout.tokenizer)
        kind = np.float16 if shipped else np.float32
        write_tensors(building / EXPERT_FILE, _arrays(policy.expert, kind))
        if not shipped:
            write_tensors(building / HEADS_FILE, _arrays(policy.heads, kind))
        if policy.normalization is not None:
            write_normalization(building, policy.normalization)
        if policy.codebook is not None:
            write_codebook(building, policy.codebook)
        sha256 = write_manifest(building, training, scores or {})
        for path in building.rglob('*'):
            path.chmod(0o755 if path.is_dir() else 0o644)
        swap_directory(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return sha256


def _arrays(module: nn.Module, kind: type[np.floating[Any]]) -> dict[str, np.ndarray]:
    return {name: p.detach().cpu().numpy().astype(kind) for name, p in module.named_parameters()}


@torch.no_grad()
def _fill(module: nn.Module, path: Path) -> None:
    tensors = read_tensors(path)
    parameters = dict(module.named_parameters())
    if set(tensors) != set(parameters):
        odd = sorted(set(tensors) ^ set(parameters))[0]
        raise SpanvlaError(f'{path}: does not fit config.yaml (tensor {odd}); fetch it again')
    for name, parameter in parameters.items():
        if tensors[name].shape != tuple(parameter.shape):
            raise SpanvlaError(
                f'{path}: {name} is {tensors[name].shape}, config.yaml asks '
                f'{tuple(parameter.shape)}; fetch it again'
            )
        parameter.copy_(torch.from_numpy(tensors[name].astype(np.float32)))


@torch.no_grad()
def _copy_known(module: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Fill what still has its name and shape; heads may change between two stages."""
    for name, parameter in module.named_parameters():
        if name in tensors and tensors[name].shape == tuple(parameter.shape):
            parameter.copy_(torch.from_numpy(tensors[name].astype(np.float32)))
