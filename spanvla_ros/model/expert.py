"""The action expert: a small transformer that turns bridged K/V into a velocity field.

One block per bridged layer, shallow to deep. Each waypoint attends jointly to the backbone's
cached keys and to all waypoints of its own draw, with the backbone's head count and head size but
a smaller width, so that the bridge needs no weights and no copy (SpanVLA section 3.2: "same number
of attention heads but a smaller embedding dimension"). Flow time and ego state act through
adaptive layer norm. The output layer starts at zero: an untrained expert keeps the source.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spanvla_ros.model.backbone import (
    MASKED,
    Backbone,
    attend,
    join_heads,
    rms_norm,
    rotate,
    split_heads,
)

TIME_FEATURES = 128
EGO_FEATURES = 20
AXES = 3
EPSILON = 1e-6


class ExpertBlock(nn.Module):
    """Joint attention to [bridged K/V | own waypoints], then a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_size: int) -> None:
        """Make a block; modulation starts at the identity."""
        super().__init__()
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        identity = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).repeat_interleave(width)
        self.register_buffer('identity', identity, persistent=False)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_size)
        self.out = nn.Linear(heads * head_size, width)
        self.gate_up = nn.Linear(width, 6 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(
        self,
        h: Tensor,
        condition: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Pass `h [B, D, T, width]` on; `condition [B, D, width]`, K/V `[B, kv, S, hd]`."""
        batch, draws, points, _ = h.shape
        parts = (self.modulation(condition) + self.identity)[:, :, None].chunk(6, -1)
        y = rms_norm(h, None, EPSILON) * parts[0] + parts[1]
        qkv = split_heads(self.qkv(y).view(batch, draws * points, -1), self.head_size)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        # All draws are queries of one attention call: the prefix is read, never copied.
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        k = torch.cat([keys.to(k.dtype), k], 2)
        v = torch.cat([values.to(v.dtype), v], 2)
        seen = join_heads(attend(q, k, v, bias)).view(batch, draws, points, -1)
        h = h + parts[2] * self.out(seen)
        y = rms_norm(h, None, EPSILON) * parts[3] + parts[4]
        gate, up = self.gate_up(y).chunk(2, -1)
        return h + parts[5] * self.down(functional.silu(gate) * up)


class ActionExpert(nn.Module):
    """The velocity of a flow from source to trajectory, given bridged K/V.

    For other heads of `model.action_heads` the same network gives `outputs` other numbers.
    """

    def __init__(
        self, backbone: Backbone, width: int, waypoints: int, sequence: int, outputs: int = AXES
    ) -> None:
        """Fit an expert to `backbone`; waypoints stand at rotary positions after `sequence`."""
        super().__init__()
        heads, kv_heads, size = backbone.heads, backbone.kv_heads, backbone.head_size
        self.waypoints = waypoints
        self.point_in = nn.Linear(AXES, width)
        self.point = nn.Parameter(torch.randn(waypoints, width) * 0.1)
        self.time_in = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.ego_in = nn.Linear(EGO_FEATURES, width)
        self.blocks = nn.ModuleList(
            ExpertBlock(width, heads, kv_heads, size) for _ in backbone.bridged
        )
        self.velocity = nn.Linear(width, outputs)
        nn.init.zeros_(self.velocity.weight)
        nn.init.zeros_(self.velocity.bias)
        places = slice(sequence, sequence + waypoints)
        self.register_buffer('cos', backbone.cos[places].clone(), persistent=False)
        self.register_buffer('sin', backbone.sin[places].clone(), persistent=False)

    def forward(
        self, x: Tensor, time: Tensor, ego: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> Tensor:
        """Velocity (or outputs) `[B, D, T, 3]` of D independent draws a scene on one prefix.

        Args:
            x: states of the flow `[B, D, T, 3]`, normalized.
            time: features of the flow time `[B, D, 128]`.
            ego: ego features `[B, 20]`.
            keys: bridged keys `[blocks, B, kv, S, hd]`.
            values: bridged values, the same shape.
            valid: `[B, S]`, 0 where a slot must not be attended to.
        """
        draws = x.shape[1]
        condition = self.time_in(time) + self.ego_in(ego)[:, None]
        h = self.point_in(x) + self.point + condition[:, :, None]
        bias = self._bias(valid, draws)
        cos, sin = self.cos.repeat(draws, 1), self.sin.repeat(draws, 1)
        condition = functional.silu(condition)
        for index, block in enumerate(self.blocks):
            h = block(h, condition, keys[index], values[index], bias, cos, sin)
        return self.velocity(rms_norm(h, None, EPSILON))

    def _bias(self, valid: Tensor, draws: int) -> Tensor:
        points = self.waypoints
        prefix = ((1.0 - valid.float()) * MASKED)[:, None, None, :]
        prefix = prefix.expand(-1, 1, draws * points, -1)
        same = torch.eye(draws, device=valid.device)[:, None, :, None]
        same = same.expand(-1, points, -1, points).reshape(draws * points, draws * points)
        own = ((1.0 - same) * MASKED).expand(valid.shape[0], 1, -1, -1)
        return torch.cat([prefix, own], -1)
