"""Qwen3-VL: a learned and a rotary position, features of earlier blocks added to early layers.

Those features (deepstack) ride along in the visual tokens, one after the other in their width, so
that a cached picture stays one array and the graphs keep their signature. A still picture is one
frame, so the two temporal kernels of the patch embedding are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids

from spanvla_ros.model.backbone.attention import (
    attend,
    join_heads,
    rotary_tables,
    rotate,
    split_heads,
)
from spanvla_ros.model.backbone.decoder import Backbone
from spanvla_ros.model.backbone.pictures import cells_first, patches, resampled, resampling
from spanvla_ros.model.backbone.qwen2_5_vl import multimodal_positions
from spanvla_ros.model.config import ModelConfig


class Qwen3Backbone(Backbone):
    """The static way through a Qwen3-VL network."""

    network_class = Qwen3VLForConditionalGeneration
    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.5, 0.5, 0.5)

    @staticmethod
    def cell(config: Any) -> tuple[int, int]:
        """Pixels along a patch, patches along a visual token."""
        return config.vision_config.patch_size, config.vision_config.spatial_merge_size

    @staticmethod
    def features_fed(config: Any) -> int:
        """How many features of each visual token are added after the first layers."""
        return len(config.vision_config.deepstack_visual_indexes)

    @property
    def text(self) -> Any:
        """The language model of the network."""
        return self.network.model.language_model

    @property
    def eyes(self) -> list[nn.Module]:
        """What makes visual tokens of a picture."""
        return [self.network.model.visual]

    @property
    def eye_blocks(self) -> list[nn.Module]:
        """The blocks of the eyes, as they follow one another."""
        return list(self.network.model.visual.blocks)

    def _place_vision(self, config: ModelConfig) -> None:
        tower = self.network.model.visual
        grid = torch.tensor([[1, self.rows, self.columns]])
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, self.merge))
        cos, sin = rotary_tables(cos, sin)
        self._buffer('vision_cos', cos)
        self._buffer('vision_sin', sin)
        side = tower.num_grid_per_side
        for name, size in (('down', self.rows), ('across', self.columns)):
            self._buffer(name, resampling(side, size, 'bilinear', align_corners=True))

    def _rotary_positions(self, images: list[int], length: int) -> Tensor:
        return multimodal_positions(self.network.model, images, length, self.rows, self.columns)

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, visual_width]`."""
        tower, count = self.network.model.visual, pixels.shape[0]
        cut = patches(self._normalized(pixels), self.patch, self.merge)
        embedding = tower.patch_embed.proj
        x = functional.linear(cut, embedding.weight.sum(2).flatten(1), embedding.bias)
        place = resampled(tower.pos_embed.weight, self.down, self.across)
        x = x + cells_first(place, self.rows, self.columns, self.merge)
        fed: list[Tensor] = []
        for index, block in enumerate(self.eye_blocks):
            x = self.call_block(self._see_layer, block, x)
            if index in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[len(fed)]
                fed.append(merger(x).reshape(count, self.image_tokens, -1))
        seen = tower.merger(x).reshape(count, self.image_tokens, -1)
        return torch.cat([seen, *fed], -1)

    def _see_layer(self, block: Any, x: Tensor) -> Tensor:
        x = x + self._look(block.attn, block.norm1(x))
        seen: Tensor = x + block.mlp(block.norm2(x))
        return seen

    def _look(self, attention: nn.Module, y: Tensor) -> Tensor:
        heads = attention.num_heads
        qkv = split_heads(attention.qkv(y), y.shape[-1] // heads)
        qk = rotate(qkv[:, : 2 * heads], self.vision_cos, self.vision_sin)
        return attention.proj(
            join_heads(attend(qk[:, :heads], qk[:, heads:], qkv[:, 2 * heads :]))
        )
