"""The five graphs as torch modules, batch 1, tensors in and out: what is exported and compared."""

from __future__ import annotations

from torch import Tensor, nn

from spanvla_ros.model.policy import Policy


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
        return self.expert(x[:, None], time[:, None], ego, keys, values, valid)[:, 0]


def graph_modules(policy: Policy) -> dict[str, nn.Module]:
    """The graphs by name, as `model.checkpoint.GRAPHS` lists them."""
    modules = {
        'vision': _Vision(policy),
        'prefill_action': _PrefillAction(policy),
        'prefill_reason': _PrefillReason(policy),
        'decode': _Decode(policy),
        'step': _Step(policy),
    }
    return {name: module.eval() for name, module in modules.items()}
