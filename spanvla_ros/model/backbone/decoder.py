"""The way through a vision-language network with everything static: one size, one layout.

The weights live in transformers' own classes; only the way through them is ours. Whatever
transformers derives from pictures and prompt at run time (rotary angles, multimodal positions,
places of visual tokens) is a buffer or a fixed concatenation here. So the same code trains, plans
and exports without a data-dependent shape, and every batch row costs the same.

A family is a subclass that adds the eyes; the language models differ in so little (norms of
queries and keys, rotation, features added after the first layers) that one pass serves all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spanvla_ros.model.backbone.attention import (
    MASKED,
    attend,
    feed_forward,
    join_heads,
    rms_norm,
    rotary_tables,
    rotate,
    split_heads,
)
from spanvla_ros.model.config import ModelConfig, bridged_layers
from spanvla_ros.types import SpanvlaError

# Language models whose layers `Backbone` runs, by transformers' `model_type`.
TEXT_MODELS = ('qwen2_5_vl_text', 'qwen3_vl_text', 'qwen2', 'qwen3', 'llama')


@dataclass(frozen=True)
class Prefix:
    """What one pass leaves: K/V after rotation `[layers, B, kv, S, hd]`, hidden `[B, S, H]`.

    `hidden` is that of the last layer after the final norm, or None where the pass stopped early.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None


def call_plainly(work: Callable[..., Any], block: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """Run one block of a network; training has other ways (`training.sharding`)."""
    return work(block, *inputs, **settings)


class Backbone(nn.Module, ABC):
    """The static way through one network; a family says how it sees.

    `visual_width` is the width of a visual token as `vision` gives it: `hidden`, and once more
    for each of the `fed` features that are added after the first layers (Qwen3-VL's deepstack).

    Every block of the eyes and every layer of the language model is run by `call_block(work,
    block, *inputs)`, so that training can recompute or shard them.
    """

    network_class: ClassVar[Any]
    pixel_mean: ClassVar[tuple[float, float, float]]
    pixel_std: ClassVar[tuple[float, float, float]]

    def __init__(
        self,
        network: nn.Module,
        config: ModelConfig,
        image_positions: Sequence[int],
        extra_tokens: int,
    ) -> None:
        """Lay out the buffers.

        Args:
            network: the weights.
            config: picture size, prompt length, bridged layers.
            image_positions: places of the visual tokens in the prompt, ascending.
            extra_tokens: room after the prompt, for an answer in training and for waypoints.
        """
        super().__init__()
        self.call_block: Callable[..., Any] = call_plainly
        # transformers builds the parts of its networks by name: nothing below has a type.
        self.network: Any = network
        text: Any = self.network.config.text_config
        _check_text(text, config.prompt_tokens + extra_tokens)
        self.layers: int = text.num_hidden_layers
        self.hidden: int = text.hidden_size
        self.heads: int = text.num_attention_heads
        self.kv_heads: int = text.num_key_value_heads
        self.head_size: int = getattr(text, 'head_dim', None) or self.hidden // self.heads
        self.bridged = bridged_layers(self.layers, config.interval)
        self.prompt_tokens = config.prompt_tokens
        self.epsilon: float = text.rms_norm_eps
        self.patch, self.merge = self.cell(network.config)
        if (self.patch, self.merge) != (config.patch_px, config.patch_merge):
            raise SpanvlaError(
                f'config.yaml: patch_px {config.patch_px} and patch_merge {config.patch_merge} '
                f'where the backbone has {self.patch} and {self.merge}; write these'
            )
        self.rows, self.columns = config.height_px // self.patch, config.width_px // self.patch
        self.image_tokens = config.image_tokens
        self.fed = self.features_fed(network.config)
        self._place_vision(config)
        self._buffer('pixel_middle', torch.tensor(self.pixel_mean).view(3, 1, 1))
        self._buffer('pixel_scale', 1.0 / torch.tensor(self.pixel_std).view(3, 1, 1))
        self._place_prompt(config, list(image_positions), extra_tokens)

    @staticmethod
    @abstractmethod
    def cell(config: Any) -> tuple[int, int]:
        """Pixels along a patch, patches along a visual token, of a transformers configuration."""

    @staticmethod
    def features_fed(config: Any) -> int:
        """How many features of each visual token are added after the first layers."""
        return 0

    @property
    @abstractmethod
    def text(self) -> Any:
        """The language model of the network."""

    @property
    @abstractmethod
    def eyes(self) -> list[nn.Module]:
        """What makes visual tokens of a picture."""

    @property
    @abstractmethod
    def eye_blocks(self) -> list[nn.Module]:
        """The blocks of the eyes, as they follow one another."""

    @property
    def blocks(self) -> list[nn.Module]:
        """All that `call_block` runs."""
        return [*self.eye_blocks, *self.text.layers]

    @abstractmethod
    def _place_vision(self, config: ModelConfig) -> None:
        """Lay out the buffers of the eyes."""

    @abstractmethod
    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, visual_width]`."""

    def _rotary_positions(self, images: list[int], length: int) -> Tensor:
        """Positions as the language model's rotary embedding takes them: `[1, S]`."""
        return torch.arange(length)[None]

    @property
    def visual_width(self) -> int:
        """Width of a visual token as `vision` gives it."""
        return self.hidden * (1 + self.fed)

    @property
    def text_places(self) -> Tensor:
        """Prompt positions that hold no visual token."""
        places = self.text_positions
        assert isinstance(places, Tensor)
        return places

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels - self.pixel_middle) * self.pixel_scale

    def _place_prompt(self, config: ModelConfig, images: list[int], extra: int) -> None:
        pictures = len(config.cameras) * config.frames_per_camera
        if len(images) != pictures * self.image_tokens or images != sorted(images):
            raise SpanvlaError(
                f'prompt: holds {len(images)} visual tokens where {pictures} pictures of '
                f'{self.image_tokens} are given; make prompt and cameras agree'
            )
        length = config.prompt_tokens + extra
        cos, sin = self.text.rotary_emb(torch.zeros(1), self._rotary_positions(images, length))
        cos, sin = rotary_tables(cos[0], sin[0])
        self._buffer('cos', cos)
        self._buffer('sin', sin)
        causal = torch.full((length, length), MASKED).triu(1)
        self._buffer('causal', causal)
        self.spans = _spans(images, config.prompt_tokens)
        kept = torch.ones(config.prompt_tokens, dtype=torch.bool)
        kept[images] = False
        self._buffer('text_positions', torch.nonzero(kept).flatten())

    def _buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.contiguous(), persistent=False)

    def embed(self, ids: Tensor, embeds: Tensor | None) -> Tensor:
        """Token vectors `[B, S, H]` of `ids`, visual tokens `[B, n, H]` put in their places."""
        x = self.text.embed_tokens(ids)
        if embeds is None:
            return x
        parts = [
            embeds[:, visual : visual + stop - start] if visual >= 0 else x[:, start:stop]
            for start, stop, visual in self.spans
        ]
        if ids.shape[1] > self.prompt_tokens:
            parts.append(x[:, self.prompt_tokens :])
        return torch.cat([part.to(x.dtype) for part in parts], 1)

    def _spread(self, features: Tensor, length: int) -> Tensor:
        """Features `[B, n, H]` of visual tokens in their places of `[B, length, H]`, else zero."""
        parts = [
            features[:, visual : visual + stop - start]
            if visual >= 0
            else torch.zeros_like(features[:, :1]).expand(-1, stop - start, -1)
            for start, stop, visual in self.spans
        ]
        if length > self.prompt_tokens:
            rest = length - self.prompt_tokens
            parts.append(torch.zeros_like(features[:, :1]).expand(-1, rest, -1))
        return torch.cat(parts, 1)

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
            embeds: visual tokens `[B, n, visual_width]`, or None where the tokens given hold no
                picture.
            valid: `[B, S]`, 0 where a token must not be attended to.
            layers: keep the K/V of these and stop at the last one's; None keeps all and runs to
                the end.
            positions: places of the tokens in the full sequence where some are left out.
        """
        fed: tuple[Tensor, ...] = ()
        if embeds is not None and self.fed:
            embeds, *rest = embeds.split(self.hidden, -1)
            fed = tuple(self._spread(part, ids.shape[1]) for part in rest)
        x = self.embed(ids, embeds)
        length = x.shape[1]
        if positions is None:
            cos, sin, causal = self.cos[:length], self.sin[:length], self.causal[:length, :length]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
            causal = self.causal[positions][:, positions]
        bias = causal + ((1.0 - valid.to(causal.dtype)) * MASKED)[:, None, None, :]
        kept = range(self.layers) if layers is None else layers
        keys, values = [], []
        for index, layer in enumerate(self.text.layers):
            last = layers is not None and index == layers[-1]
            if last:
                _, k, v = self.call_block(self._begin_layer, layer, x, cos, sin)
            else:
                x, k, v = self.run_layer(layer, x, bias, cos, sin)
            if index in kept:
                keys.append(k)
                values.append(v)
            if last:
                return Prefix(torch.stack(keys), torch.stack(values))
            if index < len(fed):
                x = x + fed[index].to(x.dtype)
        hidden = rms_norm(x, self.text.norm.weight, self.epsilon)
        return Prefix(torch.stack(keys), torch.stack(values), hidden)

    def decode(
        self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> Prefix:
        """One token `[B, 1]` at `position [1]` over cached K/V `[L, B, kv, S, hd]`.

        Returns the token's own K/V `[L, B, kv, 1, hd]` and hidden `[B, 1, H]`. Several tokens at
        once, each with its position, attend to the cache and to one another: parallel decoding.
        """
        x = self.text.embed_tokens(token)
        cos = self.cos.index_select(0, position)
        sin = self.sin.index_select(0, position)
        cached = ((1.0 - valid) * MASKED)[:, None, None, :]
        own = torch.zeros_like(cached[..., : token.shape[1]])
        bias = torch.cat([cached, own], -1)
        new_keys, new_values = [], []
        for index, layer in enumerate(self.text.layers):
            x, k, v = self.run_layer(layer, x, bias, cos, sin, keys[index], values[index])
            new_keys.append(k)
            new_values.append(v)
        hidden = rms_norm(x, self.text.norm.weight, self.epsilon)
        return Prefix(torch.stack(new_keys), torch.stack(new_values), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary of `hidden [..., H]`."""
        return self.network.lm_head(hidden)

    def run_layer(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer of the language model on `x [B, length, H]`.

        Args:
            layer: of `text.layers`.
            x: what the layer before gave.
            bias: added to the scores of `[cached | own]` keys.
            cos: rotary table of the tokens.
            sin: likewise.
            keys: cached keys `[B, kv, S, hd]` that stand before the tokens' own, or None.
            values: likewise.

        Returns:
            What the layer gives, and the tokens' own K/V `[B, kv, length, hd]`.
        """
        found: tuple[Tensor, Tensor, Tensor] = self.call_block(
            self._whole_layer, layer, x, bias, cos, sin, keys, values
        )
        return found

    def _whole_layer(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self._begin_layer(layer, x, cos, sin)
        all_k = k if keys is None else torch.cat([keys, k], 2)
        all_v = v if values is None else torch.cat([values, v], 2)
        return self._decode_layer(layer, x, y, all_k, all_v, bias, cos, sin), k, v

    def _begin_layer(
        self, layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input normed, and the K/V made of it."""
        y = rms_norm(x, layer.input_layernorm.weight, self.epsilon)
        return y, *self._keys_values(layer.self_attn, y, cos, sin)

    def _keys_values(
        self, attention: nn.Module, y: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K after its turn and V, `[B, kv, length, hd]`."""
        k, v = (split_heads(f(y), self.head_size) for f in (attention.k_proj, attention.v_proj))
        return rotate(self._head_norm(attention, 'k_norm', k), cos, sin), v

    def _head_norm(self, attention: nn.Module, name: str, x: Tensor) -> Tensor:
        """Qwen3's norm of each query or key; other language models have none."""
        norm = getattr(attention, name, None)
        return x if norm is None else rms_norm(x, norm.weight, self.epsilon)

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
        attention = layer.self_attn
        q = split_heads(attention.q_proj(y), self.head_size)
        q = rotate(self._head_norm(attention, 'q_norm', q), cos, sin)
        x = x + attention.o_proj(join_heads(attend(q, k, v, bias)))
        y = rms_norm(x, layer.post_attention_layernorm.weight, self.epsilon)
        return x + feed_forward(layer.mlp, y)


def _check_text(text: Any, length: int) -> None:
    """Refuse a language model that this pass would run otherwise than transformers does."""
    if text.model_type not in TEXT_MODELS:
        raise SpanvlaError(
            f'backbone: language model {text.model_type!r} is not known; use one with '
            f'{", ".join(TEXT_MODELS)}'
        )
    if text.hidden_act != 'silu':
        raise SpanvlaError(f'backbone: activation {text.hidden_act!r} is not known; use silu')
    window = getattr(text, 'sliding_window', None)
    slides = 'sliding_attention' in (getattr(text, 'layer_types', None) or ())
    if slides and window is not None and window < length:
        raise SpanvlaError(
            f'backbone: attends to {window} tokens only, prompt and answer have {length}; '
            'use a backbone without sliding window'
        )
    if text.max_position_embeddings < length:
        raise SpanvlaError(
            f'backbone: has {text.max_position_embeddings} positions, prompt and answer take '
            f'{length}; use fewer or smaller pictures'
        )


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
