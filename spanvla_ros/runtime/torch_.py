"""The torch engine: the model as it was trained, one row at a time; the yardstick of others."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from spanvla_ros.model.checkpoint import ModelDirectory
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.policy import Policy, load_policy

Array = np.ndarray


class TorchBackend:
    """A model in torch on the CPU; implements `runtime.backend.Backend`."""

    name = 'torch'

    def __init__(self, model: ModelDirectory | Policy, threads: int = 1) -> None:
        """Read a verified model directory, or wrap a policy in memory.

        `threads` holds for all of torch in this process.
        """
        torch.set_num_threads(threads)
        policy = model if isinstance(model, Policy) else load_policy(model.path)
        self.config: ModelConfig = policy.config
        self._modules = graph_modules(policy)

    def vision(self, pixels: Float32[Array, '1 3 h w']) -> Float32[Array, 'n d']:
        """Visual tokens of one picture."""
        return self._run('vision', pixels)[0]

    def prefill_action(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'b 1 g p e'], Float32[Array, 'b 1 g p e']]:
        """Keys and values of the bridged layers."""
        keys, values = self._run('prefill_action', ids, embeds, valid)
        return keys, values

    def prefill_reason(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> tuple[Float32[Array, 'l 1 g p e'], Float32[Array, 'l 1 g p e'], Float32[Array, '1 v']]:
        """Keys and values of all layers, logits after the last prompt token."""
        keys, values, logits = self._run('prefill_reason', ids, embeds, valid)
        return keys, values, logits

    def decode(
        self,
        token: Int64[Array, '1 1'],
        position: Int64[Array, '1'],
        keys: Float32[Array, 'l 1 g s e'],
        values: Float32[Array, 'l 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> tuple[Float32[Array, '1 v'], Float32[Array, 'l 1 g 1 e'], Float32[Array, 'l 1 g 1 e']]:
        """Logits after one more token, and its keys and values."""
        logits, new_keys, new_values = self._run('decode', token, position, keys, values, valid)
        return logits, new_keys, new_values

    def step(
        self,
        x: Float32[Array, '1 t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 t 3']:
        """Velocity of the flow."""
        return self._run('step', x, time, ego, keys, values, valid)[0]

    def propose(
        self,
        x: Float32[Array, '1 d t 3'],
        time: Float32[Array, '1 f'],
        ego: Float32[Array, '1 m'],
        keys: Float32[Array, 'b 1 g s e'],
        values: Float32[Array, 'b 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> Float32[Array, '1 d t a']:
        """The expert's answer at several states."""
        return self._run('propose', x, time, ego, keys, values, valid)[0]

    @torch.no_grad()
    def _run(self, graph: str, *arrays: Array) -> tuple[Array, ...]:
        found = self._modules[graph](*(torch.from_numpy(array) for array in arrays))
        tensors: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
        return tuple(tensor.numpy() for tensor in tensors)


class _Vision(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.backbone = policy.backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone.vision(pixels)[0]


class _PrefillAction(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.backbone = policy.backbone

    def forward(self, ids: Tensor, embeds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.backbone.prefill(ids, embeds[None], valid, self.backbone.bridged)
        return prefix.keys, prefix.values


class _PrefillReason(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.backbone = policy.backbone

    def forward(self, ids: Tensor, embeds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prefix = self.backbone.prefill(ids, embeds[None], valid)
        assert prefix.hidden is not None
        return prefix.keys, prefix.values, self.backbone.logits(prefix.hidden[:, -1])


class _Decode(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.backbone = policy.backbone

    def forward(
        self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        prefix = self.backbone.decode(token, position, keys, values, valid)
        assert prefix.hidden is not None
        return self.backbone.logits(prefix.hidden[:, 0]), prefix.keys, prefix.values


class _Step(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.expert = policy.expert

    def forward(
        self, x: Tensor, time: Tensor, ego: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> Tensor:
        velocity: Tensor = self.expert(x[:, None], time[:, None], ego, keys, values, valid)
        return velocity[:, 0]


class _Propose(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.expert = policy.expert

    def forward(
        self, x: Tensor, time: Tensor, ego: Tensor, keys: Tensor, values: Tensor, valid: Tensor
    ) -> Tensor:
        time = time[:, None].expand(-1, x.shape[1], -1)
        answer: Tensor = self.expert(x, time, ego, keys, values, valid)
        return answer


def graph_modules(policy: Policy) -> dict[str, nn.Module]:
    """The graphs by name, as `model.checkpoint.graphs_of` lists them."""
    expert = policy.config.expert_graph
    modules = {
        'vision': _Vision(policy),
        'prefill_action': _PrefillAction(policy),
        'prefill_reason': _PrefillReason(policy),
        'decode': _Decode(policy),
        expert: _Propose(policy) if expert == 'propose' else _Step(policy),
    }
    return {name: module.eval() for name, module in modules.items()}
