"""The expert's flow on a GPU: as few launches a step as torch's own kernels allow.

At batch 1 a step costs what its launches cost, not what it computes. `model.expert.ActionExpert`
keeps its plain form, which trains and exports; here the same function is arranged otherwise:

* what depends on time and ego alone is computed before the loop, for all steps at once: the
  modulations, and each norm's shift carried through the product behind it into that one's bias;
* a norm takes its scale as its weight, a gate multiplies while it adds;
* own keys and values are written behind the bridged ones, in place; the mask is there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spanvla_ros.model.backbone.attention import MASKED
from spanvla_ros.model.expert import EPSILON, ActionExpert, ExpertBlock
from spanvla_ros.model.flow import time_features
from spanvla_ros.model.policy import Policy

# Attention reads masks and keys whose rows are whole multiples of this without copying them.
ALIGNED_ROWS = 8


@dataclass(frozen=True)
class Slots:
    """Bridged keys and values on the device, with rows behind them for the expert's own.

    `kv [blocks, 2, kv, rows, hd]`, keys first: `prefix` bridged rows, then room for those of the
    waypoints. `bias [rows]` is 0 where a bridged row may be attended to, else `MASKED`.
    """

    kv: Tensor
    bias: Tensor
    prefix: int

    @property
    def bridged(self) -> Tensor:
        """What a prefill writes and a flow reads."""
        return self.kv[..., : self.prefix, :]


def empty_slots(policy: Policy, device: torch.device, kind: torch.dtype, draws: int = 1) -> Slots:
    """Slots of a policy, all masked, with room for so many states at once."""
    backbone, prefix = policy.backbone, policy.config.sequence_tokens
    rows = _rows(prefix, draws * policy.config.waypoints)
    shape = (len(backbone.bridged), 2, backbone.kv_heads, rows, backbone.head_size)
    bias = torch.full((rows,), MASKED, dtype=kind, device=device)
    return Slots(torch.zeros(shape, dtype=kind, device=device), bias, prefix)


def fill_slots(policy: Policy, slots: Slots, ids: Tensor, embeds: Tensor, valid: Tensor) -> None:
    """Prefill up to the last bridged layer, written into the first of the slots."""
    prefix = policy.backbone.prefill(ids, embeds, valid, policy.backbone.bridged)
    length = ids.shape[1]
    slots.kv[:, 0, :, :length].copy_(prefix.keys[:, 0])
    slots.kv[:, 1, :, :length].copy_(prefix.values[:, 0])
    slots.bias[:length].copy_((1.0 - valid[0]) * MASKED)


class ExpertFlow:
    """The flows of one expert; `compile` fuses what is between the products of a block."""

    def __init__(self, expert: ActionExpert) -> None:
        """Take the expert, on its device and in its precision."""
        self.expert = expert
        self._run_block: Callable[..., Tensor] = run_block

    def compile(self) -> None:
        """Compile the block once; all blocks run the same code."""
        self._run_block = torch.compile(run_block, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def of(self, slots: Slots, steps: int, draws: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
        """What runs so many Euler steps of `draws` states on what the slots hold.

        It takes a start `[1, D, T, 3]` and ego features `[1, 20]`, and gives the fp32 state at
        time 1. All draws are at the same time.
        """
        expert = self.expert
        blocks: list[ExpertBlock] = list(expert.blocks)  # type: ignore[arg-type]
        device, kind = expert.point.device, expert.point.dtype
        times = expert.time_in(flow_times(steps, device, kind))
        points = draws * expert.waypoints
        rows = _rows(slots.prefix, points)
        kv = slots.kv[..., :rows, :]
        groups = blocks[0].heads // blocks[0].kv_heads
        behind = _behind(draws, expert.waypoints, rows - slots.prefix, groups).to(device, kind)
        assert isinstance(expert.cos, Tensor)
        assert isinstance(expert.sin, Tensor)
        turn = tuple(
            _whole_heads(table.repeat(draws, 1), blocks[0], still)
            for table, still in ((expert.cos, 1.0), (expert.sin, 0.0))
        )
        point = expert.point.repeat(draws, 1)

        def run(start: Tensor, ego: Tensor) -> Tensor:
            condition = times + expert.ego_in(ego.to(kind))
            entry = condition + expert.point_in.bias
            condition = functional.silu(condition)
            plans = [_timed(block, condition) for block in blocks]
            before = slots.bias[: slots.prefix].expand(len(behind), -1)
            bias = torch.cat([before, behind], 1)
            x = start.reshape(points, -1)
            for step in range(steps):
                h = functional.linear(x.to(kind), expert.point_in.weight, entry[step]) + point
                for block, plan, cached in zip(blocks, plans, kv.unbind(0), strict=True):
                    h = self._run_block(
                        h, [part[step] for part in plan], _weights(block), cached, bias,
                        turn, slots.prefix,
                    )  # fmt: skip
                velocity = expert.velocity(functional.rms_norm(h, h.shape[-1:], None, EPSILON))
                x = torch.add(x, velocity, alpha=1.0 / steps)
            return x.reshape(start.shape)

        return run


def run_block(
    h: Tensor,
    timed: list[Tensor],
    weights: list[Tensor],
    cached: Tensor,
    bias: Tensor,
    turn: tuple[Tensor, Tensor],
    prefix: int,
) -> Tensor:
    """One block of the expert on `h [points, width]`.

    Args:
        h: what the block before gave.
        timed: of this step, from `_timed`.
        weights: from `_weights`.
        cached: keys and values `[2, kv, rows, hd]`; own ones are written behind `prefix`.
        bias: added to the scores, `[1 or groups * points, rows]`.
        turn: rotary tables `[heads + 2 kv, points, hd]`, which leave values as they are.
        prefix: number of bridged rows.
    """
    norm_1, bias_1, gate_1, norm_2, bias_2, gate_2 = timed
    in_1, out_1, out_bias_1, in_2, out_2, out_bias_2 = weights
    points, width = h.shape
    kv_heads, size = cached.shape[1], cached.shape[-1]
    heads = in_1.shape[0] // size - 2 * kv_heads
    y = functional.rms_norm(h, (width,), norm_1, EPSILON)
    qkv = functional.linear(y, in_1, bias_1).view(points, -1, size).transpose(0, 1)
    a, b = qkv.chunk(2, -1)
    # Heads come first in memory, so that queries of a group stand below one another as they are.
    turned = torch.cat([b, a], -1).mul_(turn[1]).addcmul_(qkv, turn[0])
    cached[:, :, prefix : prefix + points].copy_(turned[heads:].view(2, kv_heads, points, size))
    queries = turned[:heads].view(1, kv_heads, -1, size)
    keys, values = cached[:, None].unbind(0)
    seen = functional.scaled_dot_product_attention(queries, keys, values, bias[None, None])
    seen = seen.reshape(heads, points, size).transpose(0, 1).reshape(points, -1)
    h = torch.addcmul(h, gate_1, functional.linear(seen, out_1, out_bias_1))
    y = functional.rms_norm(h, (width,), norm_2, EPSILON)
    gate, up = functional.linear(y, in_2, bias_2).chunk(2, -1)
    return torch.addcmul(
        h, gate_2, functional.linear(functional.silu(gate) * up, out_2, out_bias_2)
    )


def _weights(block: ExpertBlock) -> list[Tensor]:
    """What a block reads in every step."""
    return [
        block.qkv.weight, block.out.weight, block.out.bias,
        block.gate_up.weight, block.down.weight, block.down.bias,
    ]  # fmt: skip


def _timed(block: ExpertBlock, condition: Tensor) -> list[Tensor]:
    """What a block reads of each step's time `[steps, ...]`: scale, bias and gate of both halves.

    (n * scale + shift) W + b is (n * scale) W + (shift W + b).
    """
    parts = (block.modulation(condition) + block.identity).chunk(6, -1)
    return [
        parts[0], block.qkv(parts[1]), parts[2], parts[3], block.gate_up(parts[4]), parts[5],
    ]  # fmt: skip


def weights_of_a_step(expert: ActionExpert) -> list[Tensor]:
    """What every step reads."""
    ends: Iterable[Tensor] = chain(expert.velocity.parameters(), [expert.point_in.weight])
    blocks: list[ExpertBlock] = list(expert.blocks)  # type: ignore[arg-type]
    return [*ends, expert.point, *chain.from_iterable(_weights(block) for block in blocks)]


def weights_of_a_plan(expert: ActionExpert) -> list[Tensor]:
    """What a plan reads once, whatever its steps."""
    blocks: list[ExpertBlock] = list(expert.blocks)  # type: ignore[arg-type]
    timed = chain.from_iterable(block.modulation.parameters() for block in blocks)
    return [*expert.ego_in.parameters(), *timed]


def flow_times(steps: int, device: torch.device, kind: torch.dtype) -> Tensor:
    """Features of the time of each Euler step `[steps, 128]`."""
    table = np.stack([time_features(index / steps) for index in range(steps)])
    return torch.from_numpy(table).to(device, kind)


def _rows(prefix: int, points: int) -> int:
    return -(-(prefix + points) // ALIGNED_ROWS) * ALIGNED_ROWS


def _behind(draws: int, waypoints: int, rows: int, groups: int) -> Tensor:
    """The mask behind the prefix: each state sees its own waypoints, nobody the padding.

    One row serves all queries where there is one state.
    """
    seen = torch.zeros((draws * waypoints, rows), dtype=torch.bool)
    same = torch.eye(draws, dtype=torch.bool).repeat_interleave(waypoints, 0)
    seen[:, : draws * waypoints] = same.repeat_interleave(waypoints, 1)
    seen = seen[:1] if draws == 1 else seen.repeat(groups, 1)
    return torch.where(seen, 0.0, MASKED)


def _whole_heads(table: Tensor, block: ExpertBlock, still: float) -> Tensor:
    """A rotary table `[points, hd]` for queries, keys and values `[heads + 2 kv, points, hd]`."""
    turned = table.expand(block.heads + block.kv_heads, -1, -1)
    left = torch.full_like(table, still).expand(block.kv_heads, -1, -1)
    return torch.cat([turned, left])
