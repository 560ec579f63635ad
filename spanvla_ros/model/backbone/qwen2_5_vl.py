"""Qwen2.5-VL: a tower with windows, multimodal positions.

Window order, rotary angles and positions are buffers, and windows of one length run as one batch.
Two rewritings leave the mathematics as it is: a still picture is one frame, so the two temporal
kernels of the patch embedding are summed; and attention weights of masked keys are exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from spanvla_ros.model.backbone.attention import (
    attend,
    feed_forward,
    join_heads,
    rms_norm,
    rotary_tables,
    rotate,
    split_heads,
)
from spanvla_ros.model.backbone.decoder import Backbone
from spanvla_ros.model.backbone.pictures import patches
from spanvla_ros.model.config import ModelConfig


class Qwen25Backbone(Backbone):
    """The static way through a Qwen2.5-VL network."""

    network_class = Qwen2_5_VLForConditionalGeneration
    pixel_mean = (0.48145466, 0.4578275, 0.40821073)
    pixel_std = (0.26862954, 0.26130258, 0.27577711)

    @staticmethod
    def cell(config: Any) -> tuple[int, int]:
        """Pixels along a patch, patches along a visual token."""
        return config.vision_config.patch_size, config.vision_config.spatial_merge_size

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
        vision, merge = self.network.config.vision_config, self.merge
        grid = torch.tensor([[1, self.rows, self.columns]])
        windows, bounds = get_vision_window_index(grid, merge, vision.window_size, self.patch)
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        starts = [bound // merge**2 for bound in bounds[:-1].tolist()]
        # Windows of one length are made neighbors, so that each length is one batch.
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        windows = torch.cat(
            [windows[starts[i] : starts[i] + lengths[i] // merge**2] for i in order]
        )
        lengths = [lengths[i] for i in order]
        self.window_groups = [(n, lengths.count(n)) for n in sorted(set(lengths), reverse=True)]
        places = (windows[:, None] * merge**2 + torch.arange(merge**2)).reshape(-1)
        cos, sin = self.network.model.visual.rotary_pos_emb(
            torch.zeros(1), get_vision_position_ids(grid, merge)
        )
        cos, sin = rotary_tables(cos, sin)
        self._buffer('window_order', places)
        self._buffer('picture_order', torch.argsort(windows))
        self._buffer('vision_cos', cos[places])
        self._buffer('vision_sin', sin[places])

    def _rotary_positions(self, images: list[int], length: int) -> Tensor:
        return multimodal_positions(self.network.model, images, length, self.rows, self.columns)

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, hidden]`."""
        tower, count = self.network.model.visual, pixels.shape[0]
        cut = patches(self._normalized(pixels), self.patch, self.merge)
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
        cut = cut.index_select(1, self.window_order).to(kernel.dtype)
        # Where training rounds products to bf16, the sums between blocks keep the weights' type.
        x = functional.linear(cut, kernel).to(kernel.dtype)
        for index, block in enumerate(self.eye_blocks):
            everywhere = index in tower.fullatt_block_indexes
            x = self.call_block(self._see_layer, block, x, everywhere=everywhere)
        y = rms_norm(x, tower.merger.ln_q.weight, 1e-6)
        y = tower.merger.mlp(y.reshape(count, self.image_tokens, -1))
        return y.index_select(1, self.picture_order)

    def _see_layer(self, block: nn.Module, x: Tensor, *, everywhere: bool) -> Tensor:
        y = rms_norm(x, block.norm1.weight, 1e-6)
        x = x + self._look(block.attn, y, everywhere=everywhere)
        return x + feed_forward(block.mlp, rms_norm(x, block.norm2.weight, 1e-6))

    def _look(self, attention: Any, y: Tensor, *, everywhere: bool) -> Tensor:
        heads = attention.num_heads
        qkv = split_heads(attention.qkv(y), y.shape[-1] // heads)
        qk = rotate(qkv[:, : 2 * heads], self.vision_cos, self.vision_sin)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, 2 * heads :]
        if everywhere:
            return attention.proj(join_heads(attend(q, k, v)))
        parts, start = [], 0
        for size, number in self.window_groups:
            stop = start + size * number
            # A window is a head of its own: none sees another.
            cut = [t[:, :, start:stop].reshape(-1, number, size, t.shape[-1]) for t in (q, k, v)]
            parts.append(attend(*cut).reshape(-1, heads, stop - start, q.shape[-1]))
            start = stop
        seen = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return attention.proj(join_heads(seen))


def multimodal_positions(
    model: nn.Module, images: list[int], length: int, rows: int, columns: int
) -> Tensor:
    """Time, row and column `[3, 1, S]` of every place, as transformers itself counts them."""
    kinds = torch.zeros(1, length, dtype=torch.int32)
    kinds[0, images] = 1
    merge = model.config.vision_config.spatial_merge_size
    pictures = len(images) * merge**2 // (rows * columns)
    grids = torch.tensor([[1, rows, columns]] * pictures)
    positions, _ = model.get_rope_index(kinds.long(), kinds, image_grid_thw=grids)
    return positions
