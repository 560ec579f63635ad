"""Backbones: transformers' own networks, run in a static way; one module a family.

A new family is a subclass of `Backbone` in a module of its own, a line in `BACKBONES`, and its
marks in `model.prompt.MARKS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spanvla_ros.model.backbone.attention import (
    MASKED,
    attend,
    join_heads,
    rms_norm,
    rotate,
    split_heads,
)
from spanvla_ros.model.backbone.decoder import Backbone, Prefix
from spanvla_ros.model.backbone.internvl import InternVLBackbone
from spanvla_ros.model.backbone.qwen2_5_vl import Qwen25Backbone
from spanvla_ros.model.backbone.qwen3_vl import Qwen3Backbone
from spanvla_ros.model.backbone.smolvlm import SmolVLMBackbone
from spanvla_ros.model.backbone.tiny import draw_weights, qwen_network, tiny_network
from spanvla_ros.model.config import ModelConfig

__all__ = [
    'BACKBONES',
    'BACKBONE_DIR',
    'MASKED',
    'Backbone',
    'Prefix',
    'attend',
    'draw_weights',
    'join_heads',
    'open_backbone',
    'qwen_network',
    'rms_norm',
    'rotate',
    'split_heads',
    'tiny_network',
]

BACKBONE_DIR = 'backbone'
# By the `model_type` of the folder's config.json.
BACKBONES: dict[str, type[Backbone]] = {
    'qwen2_5_vl': Qwen25Backbone,
    'internvl': InternVLBackbone,
    'qwen3_vl': Qwen3Backbone,
    'smolvlm': SmolVLMBackbone,
}


def open_backbone(
    network: nn.Module, config: ModelConfig, image_positions: Sequence[int], extra_tokens: int
) -> Backbone:
    """The static way through a network of any family; arguments as `Backbone` takes them."""
    kind = BACKBONES[network.config.model_type]
    return kind(network, config, image_positions, extra_tokens)
