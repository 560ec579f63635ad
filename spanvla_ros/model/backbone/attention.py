"""What every transformer here is made of: attention, rotation, norm, feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MASKED = -30000.0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x` over its root mean square along the last axis, times `weight`."""
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def feed_forward(mlp: nn.Module, y: Tensor) -> Tensor:
    """A gated feed-forward layer of transformers' naming."""
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
