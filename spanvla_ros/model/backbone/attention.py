"""What every transformer here is made of: attention, rotation, norm, feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MASKED = -30000.0


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`x` over its root mean square along the last axis, times `weight`."""
    if not torch.compiler.is_exporting():
        return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)
    # The one form that ONNX Runtime joins to a single operator, and only with a weight.
    if weight is None:
        weight = torch.ones(x.shape[-1])
    size = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return x / size * weight


def feed_forward(mlp: nn.Module, y: Tensor) -> Tensor:
    """A gated feed-forward layer of transformers' naming."""
    return mlp.down_proj(functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


def split_heads(x: Tensor, size: int) -> Tensor:
    """`[B, length, heads * size]` as `[B, heads, length, size]`."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`[B, heads, length, size]` as `[B, length, heads * size]`."""
    return x.transpose(1, 2).flatten(2)


def rotary_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables `rotate` takes, from those of transformers `[length, size]`."""
    half = sin.shape[-1] // 2
    return cos.float(), torch.cat([-sin[..., :half], sin[..., half:]], -1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [..., length, size]`; tables of `rotary_tables`."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([b, a], -1) * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over `[B, heads, length, size]`, K/V heads shared by groups of query heads.

    The queries of a group stand below one another as rows, so that keys are not repeated.
    """
    batch, heads, length, size = q.shape
    groups = heads // k.shape[1]
    if groups > 1:
        q = q.reshape(batch, -1, groups * length, size)
        if bias is not None and bias.shape[-2] > 1:
            bias = bias.repeat(1, 1, groups, 1)
    if bias is not None:
        bias = bias.to(q.dtype)
    seen = functional.scaled_dot_product_attention(q, k, v, bias)
    return seen.reshape(batch, heads, length, size) if groups > 1 else seen
