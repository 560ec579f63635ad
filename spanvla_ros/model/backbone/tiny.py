"""The tiny Qwen2.5-VL that is trained from scratch and shipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def tiny_network(
    vocabulary: int, special: Mapping[str, int]
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of transformers' own classes, small enough for one CPU core, weights as drawn.

    Args:
        vocabulary: number of tokens, rounded up to a multiple of 64.
        special: ids of Qwen's special tokens by name (`<|image_pad|>` ...).
    """
    return qwen_network(
        {
            'hidden_size': 192,
            'num_hidden_layers': 5,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'intermediate_size': 512,
            'vocab_size': -(-vocabulary // 64) * 64,
            'max_position_embeddings': 1024,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 1e4,
                'mrope_section': [6, 9, 9],
            },
        },
        {
            'depth': 4,
            'hidden_size': 128,
            'num_heads': 4,
            'intermediate_size': 256,
            'out_hidden_size': 192,
            'fullatt_block_indexes': [1, 3],
        },
        special,
    )


def qwen_network(
    text: Mapping[str, Any], vision: Mapping[str, Any], special: Mapping[str, int]
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of given sizes, weights as transformers draws them, on torch's default device.

    Args:
        text: sizes of the language model, by transformers' names.
        vision: sizes of the tower, likewise.
        special: ids of Qwen's special tokens by name (`<|image_pad|>` ...).
    """
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            'tie_word_embeddings': True,
            'use_sliding_window': False,
            'bos_token_id': special['<|im_start|>'],
            'eos_token_id': special['<|im_end|>'],
            'pad_token_id': special['<|endoftext|>'],
        },
        vision_config={
            **vision,
            'patch_size': 14,
            'spatial_merge_size': 2,
            'temporal_patch_size': 2,
            'window_size': 112,
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
    for token, value in numbers.items():
        table[token] = 0.14 * number_waves(value, table.shape[1])


def number_waves(value: float, width: int) -> torch.Tensor:
    """Sines and cosines of a number at wavelengths from 200 down to 2, `[width]`."""
    half = width // 2
    waves = 2 * math.pi * torch.exp(torch.linspace(math.log(1 / 200), math.log(1 / 2), half))
    return torch.cat([torch.sin(value * waves), torch.cos(value * waves)])
