"""Qwen2.5-VL with everything static: one picture size, one prompt layout, one pass.

The weights live in transformers' own `Qwen2_5_VLForConditionalGeneration`; only the way through
them is ours. Whatever transformers derives from the picture grid at run time (window order,
rotary angles, multimodal positions) is a buffer here, windows of one length run as one batch, and
visual tokens are joined to the text by a fixed concatenation. So the same code trains, plans and
exports without a data-dependent shape, and every batch row costs the same.

Two rewritings leave the mathematics as it is: a still picture is one frame, so the two temporal
kernels of the patch embedding are summed; and attention weights of masked keys are exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from spanvla_ros.model.config import ModelConfig, bridged_layers
from spanvla_ros.types import SpanvlaError

transformers_logging.disable_progress_bar()

BACKBONE_DIR = 'backbone'
MASKED = -30000.0
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Prefix:
    """What one pass leaves: K/V after rotation `[layers, B, kv, S, hd]`, hidden `[B, S, H]`.

    `hidden` is that of the last layer after the final norm, or None where the pass stopped early.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None


def tiny_network(
    vocabulary: int, special: Mapping[str, int]
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of transformers' own classes, small enough for one CPU core, weights as drawn.

    Args:
        vocabulary: number of tokens, rounded up to a multiple of 64.
        special: ids of Qwen's special tokens by name (`<|image_pad|>` ...).
    """
    config = Qwen2_5_VLConfig(
        text_config={
            'hidden_size': 192,
            'num_hidden_layers': 5,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'intermediate_size': 512,
            'vocab_size': -(-vocabulary // 64) * 64,
            'max_position_embeddings': 1024,
            'tie_word_embeddings': True,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 1e4,
                'mrope_section': [6, 9, 9],
            },
            'use_sliding_window': False,
            'bos_token_id': special['<|im_start|>'],
            'eos_token_id': special['<|im_end|>'],
            'pad_token_id': special['<|endoftext|>'],
        },
        vision_config={
            'depth': 4,
            'hidden_size': 128,
            'num_heads': 4,
            'intermediate_size': 256,
            'out_hidden_size': 192,
            'patch_size': 14,
            'spatial_merge_size': 2,
            'temporal_patch_size': 2,
            'window_size': 112,
            'fullatt_block_indexes': [1, 3],
            'in_channels': 3,
        },
        image_token_id=special['<|image_pad|>'],
        vision_start_token_id=special['<|vision_start|>'],
        vision_end_token_id=special['<|vision_end|>'],
        video_token_id=special['<|image_pad|>'],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@torch.no_grad()
def draw_weights(
    network: Qwen2_5_VLForConditionalGeneration,
    numbers: Mapping[int, float],
    generator: torch.Generator,
) -> None:
    """Draw the weights for training from scratch.

    Matrices have deviation 1/sqrt(fan-in), residual outputs further divided by sqrt(2 layers);
    a number token starts as Fourier features of its value, so near numbers start alike.
    """
    depths = {
        'visual': len(network.model.visual.blocks),
        'language_model': len(network.model.language_model.layers),
    }
    for name, weight in network.named_parameters():
        if weight.dim() < 2:
            continue
        if 'embed_tokens' in name or 'lm_head' in name:
            weight.normal_(0.0, 0.1, generator=generator)
            continue
        deviation = 1.0 / math.sqrt(weight[0].numel())
        if name.endswith(('o_proj.weight', 'down_proj.weight', 'attn.proj.weight')):
            deviation /= math.sqrt(
                2 * depths['visual' if '.visual.' in name else 'language_model']
            )
        weight.normal_(0.0, deviation, generator=generator)
    table = network.model.language_model.embed_tokens.weight
    half = table.shape[1] // 2
    waves = 2 * math.pi * torch.exp(torch.linspace(math.log(1 / 200), math.log(1 / 2), half))
    for token, value in numbers.items():
        table[token] = 0.14 * torch.cat([torch.sin(value * waves), torch.cos(value * waves)])


def load_network(folder: str | Path) -> Qwen2_5_VLForConditionalGeneration:
    """The network of a local Hugging Face folder in fp32; never looks beyond this machine."""
    if not (Path(folder) / 'config.json').is_file():
        raise SpanvlaError(f'{folder}: holds no config.json; name a Hugging Face model folder')
    try:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise SpanvlaError(f'{folder}: is no Qwen2.5-VL backbone ({line})') from error


class Backbone(nn.Module):
    """The static way through a Qwen2.5-VL network."""

    def __init__(
        self,
        network: Qwen2_5_VLForConditionalGeneration,
        config: ModelConfig,
        image_positions: Sequence[int],
        extra_tokens: int,
    ) -> None:
        """Lay out the buffers.

        Args:
            network: the weights.
            config: picture size and prompt length.
            image_positions: places of the visual tokens in the prompt, ascending.
            extra_tokens: room after the prompt, for an answer in training and for waypoints.
        """
        super().__init__()
        self.network = network
        text = network.config.text_config
        self.layers: int = text.num_hidden_layers
        self.hidden: int = text.hidden_size
        self.heads: int = text.num_attention_heads
        self.kv_heads: int = text.num_key_value_heads
        self.head_size: int = self.hidden // self.heads
        self.bridged = bridged_layers(self.layers, config.interval)
        self.prompt_tokens = config.prompt_tokens
        self.epsilon: float = text.rms_norm_eps
        self._place_vision(config)
        self._place_prompt(config, list(image_positions), extra_tokens)

    def _place_vision(self, config: ModelConfig) -> None:
        vision = self.network.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        rows, columns = config.height_px // patch, config.width_px // patch
        grid = torch.tensor([[1, rows, columns]])
        windows, bounds = get_vision_window_index(grid, merge, vision.window_size, patch)
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        starts = [bound // merge**2 for bound in bounds[:-1].tolist()]
        # Windows of one length are made neighbours, so that each length is one batch.
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        windows = torch.cat(
            [windows[starts[i] : starts[i] + lengths[i] // merge**2] for i in order]
        )
        lengths = [lengths[i] for i in order]
        self.window_groups = [(n, lengths.count(n)) for n in sorted(set(lengths), reverse=True)]
        self.patch, self.merge = patch, merge
        self.rows, self.columns = rows, columns
        self.image_tokens = rows * columns // merge**2
        places = (windows[:, None] * merge**2 + torch.arange(merge**2)).reshape(-1)
        cos, sin = self.network.model.visual.rotary_pos_emb(
            torch.zeros(1), get_vision_position_ids(grid, merge)
        )
        half = cos.shape[-1] // 2
        self._buffer('window_order', places)
        self._buffer('picture_order', torch.argsort(windows))
        self._buffer('vision_cos', cos[places, None, :half].float())
        self._buffer('vision_sin', sin[places, None, :half].float())
        self._buffer('pixel_mean', torch.tensor(PIXEL_MEAN).view(3, 1, 1))
        self._buffer('pixel_scale', 1.0 / torch.tensor(PIXEL_STD).view(3, 1, 1))

    def _place_prompt(self, config: ModelConfig, images: list[int], extra: int) -> None:
        pictures = len(config.cameras) * config.frames_per_camera
        if len(images) != pictures * self.image_tokens or images != sorted(images):
            raise SpanvlaError(
                f'prompt: holds {len(images)} visual tokens where {pictures} pictures of '
                f'{self.image_tokens} are given; make prompt and cameras agree'
            )
        length = config.prompt_tokens + extra
        kinds = torch.zeros(1, length, dtype=torch.int32)
        kinds[0, images] = 1
        grids = torch.tensor([[1, self.rows, self.columns]] * pictures)
        positions, _ = self.network.model.get_rope_index(kinds.long(), kinds, image_grid_thw=grids)
        cos, sin = self.network.model.language_model.rotary_emb(torch.zeros(1), positions)
        half = self.head_size // 2
        self._buffer('cos', cos[0, :, :half].float())
        self._buffer('sin', sin[0, :, :half].float())
        causal = torch.full((length, length), MASKED).triu(1)
        self._buffer('causal', causal)
        self.spans = _spans(images, config.prompt_tokens)
        kept = torch.ones(config.prompt_tokens, dtype=torch.bool)
        kept[images] = False
        self._buffer('text_positions', torch.nonzero(kept).flatten())

    @property
    def text_places(self) -> Tensor:
        """Prompt positions that hold no visual token."""
        places = self.text_positions
        assert isinstance(places, Tensor)
        return places

    def _buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.contiguous(), persistent=False)

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, hidden]`."""
        tower = self.network.model.visual
        count, merge, patch = pixels.shape[0], self.merge, self.patch
        rows, columns = self.rows // merge, self.columns // merge
        pixels = (pixels - self.pixel_mean) * self.pixel_scale
        patches = pixels.reshape(count, 3, rows, merge, patch, columns, merge, patch)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, 3 * patch * patch)
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
        x = functional.linear(patches.index_select(1, self.window_order), kernel).float()
        for index, block in enumerate(tower.blocks):
            y = _rms_norm(x, block.norm1.weight, 1e-6)
            x = x + self._look(block.attn, y, everywhere=index in tower.fullatt_block_indexes)
            y = _rms_norm(x, block.norm2.weight, 1e-6)
            x = x + _feed_forward(block.mlp, y)
        y = _rms_norm(x, tower.merger.ln_q.weight, 1e-6)
        y = tower.merger.mlp(y.reshape(count, self.image_tokens, -1))
        return y.index_select(1, self.picture_order)

    def _look(self, attention: nn.Module, y: Tensor, *, everywhere: bool) -> Tensor:
        count, length, width = y.shape
        heads = attention.num_heads
        qkv = attention.qkv(y).view(count, length, 3 * heads, width // heads)
        qk = rotate(qkv[:, :, : 2 * heads], self.vision_cos, self.vision_sin)
        q, k = qk.split(heads, 2)
        v = qkv[:, :, 2 * heads :]
        if everywhere:
            return attention.proj(attend(q, k, v).reshape(count, length, width))
        parts, start = [], 0
        for size, number in self.window_groups:
            stop = start + size * number
            cut = [t[:, start:stop].reshape(count * number, size, heads, -1) for t in (q, k, v)]
            parts.append(attend(*cut).reshape(count, stop - start, width))
            start = stop
        return attention.proj(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def embed(self, ids: Tensor, embeds: Tensor | None) -> Tensor:
        """Token vectors `[B, S, H]` of `ids`, visual tokens `[B, n, H]` put in their places."""
        x = self.network.model.language_model.embed_tokens(ids)
        if embeds is None:
            return x
        parts = [
            embeds[:, visual : visual + stop - start] if visual >= 0 else x[:, start:stop]
            for start, stop, visual in self.spans
        ]
        if ids.shape[1] > self.prompt_tokens:
            parts.append(x[:, self.prompt_tokens :])
        return torch.cat([part.to(x.dtype) for part in parts], 1)

    def prefill(
        self,
        ids: Tensor,
        embeds: Tensor | None,
        valid: Tensor,
        layers: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ) -> Prefix:
        """One causal pass over `ids [B, S]`, a prompt with or without an answer behind it.

        Args:
            ids: tokens; those of pictures are replaced by `embeds`.
            embeds: visual tokens `[B, n, H]`, or None where the tokens given hold no picture.
            valid: `[B, S]`, 0 where a token must not be attended to.
            layers: keep the K/V of these and stop at the last one's; None keeps all and runs to
                the end.
            positions: places of the tokens in the full sequence where some are left out.
        """
        x = self.embed(ids, embeds)
        length = x.shape[1]
        if positions is None:
            cos, sin, causal = self.cos[:length], self.sin[:length], self.causal[:length, :length]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
            causal = self.causal[positions][:, positions]
        bias = causal + ((1.0 - valid.to(causal.dtype)) * MASKED)[:, None, None, :]
        cos, sin = cos[:, None], sin[:, None]
        kept = range(self.layers) if layers is None else layers
        keys, values = [], []
        for index, layer in enumerate(self.network.model.language_model.layers):
            y = _rms_norm(x, layer.input_layernorm.weight, self.epsilon)
            k, v = self._keys_values(layer.self_attn, y, cos, sin)
            if index in kept:
                keys.append(k.transpose(1, 2))
                values.append(v.transpose(1, 2))
            if layers is not None and index == layers[-1]:
                return Prefix(torch.stack(keys), torch.stack(values))
            x = self._decode_layer(layer, x, y, k, v, bias, cos, sin)
        norm = self.network.model.language_model.norm
        hidden = _rms_norm(x, norm.weight, self.epsilon)
        return Prefix(torch.stack(keys), torch.stack(values), hidden)

    def decode(
        self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> Prefix:
        """One token `[B, 1]` at `position [1]` over cached K/V `[L, B, kv, S, hd]`.

        Returns the token's own K/V `[L, B, kv, 1, hd]` and hidden `[B, 1, H]`.
        """
        x = self.network.model.language_model.embed_tokens(token)
        cos = self.cos.index_select(0, position)[:, None]
        sin = self.sin.index_select(0, position)[:, None]
        cached = ((1.0 - valid) * MASKED)[:, None, None, :]
        bias = torch.cat([cached, torch.zeros_like(cached[..., :1])], -1)
        new_keys, new_values = [], []
        for index, layer in enumerate(self.network.model.language_model.layers):
            y = _rms_norm(x, layer.input_layernorm.weight, self.epsilon)
            k, v = self._keys_values(layer.self_attn, y, cos, sin)
            new_keys.append(k.transpose(1, 2))
            new_values.append(v.transpose(1, 2))
            k = torch.cat([keys[index].transpose(1, 2), k], 1)
            v = torch.cat([values[index].transpose(1, 2), v], 1)
            x = self._decode_layer(layer, x, y, k, v, bias, cos, sin)
        hidden = _rms_norm(x, self.network.model.language_model.norm.weight, self.epsilon)
        return Prefix(torch.stack(new_keys), torch.stack(new_values), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary of `hidden [..., H]`."""
        return functional.linear(hidden, self.network.lm_head.weight)

    def _keys_values(
        self, attention: nn.Module, y: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = (*y.shape[:2], self.kv_heads, self.head_size)
        k = rotate(attention.k_proj(y).view(shape), cos, sin)
        return k, attention.v_proj(y).view(shape)

    def _decode_layer(
        self,
        layer: nn.Module,
        x: Tensor,
        y: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        batch, length = y.shape[:2]
        attention = layer.self_attn
        q = attention.q_proj(y).view(batch, length, self.heads, self.head_size)
        q = rotate(q, cos, sin)
        out = attend(q, k, v, bias).reshape(batch, length, self.hidden)
        x = x + attention.o_proj(out)
        y = _rms_norm(x, layer.post_attention_layernorm.weight, self.epsilon)
        return x + _feed_forward(layer.mlp, y)


def _spans(images: list[int], length: int) -> list[tuple[int, int, int]]:
    """Runs of one kind as (start, stop, first visual token or -1 for text)."""
    spans: list[tuple[int, int, int]] = []
    visual = set(images)
    used = start = 0
    for stop in range(1, length + 1):
        if stop < length and (stop in visual) == (start in visual):
            continue
        spans.append((start, stop, used if start in visual else -1))
        used += stop - start if start in visual else 0
        start = stop
    return spans


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _feed_forward(mlp: nn.Module, y: Tensor) -> Tensor:
    return mlp.down_proj(functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [..., length, heads, size]`; the tables hold half the size."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over `[B, length, heads, size]`, K/V heads shared by groups of query heads."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = (_repeat_heads(t, groups) for t in (k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, size = x.shape
    return (
        x[:, :, None]
        .expand(batch, heads, groups, length, size)
        .reshape(batch, heads * groups, length, size)
    )
