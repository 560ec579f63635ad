"""AdamW on one flat gradient, its rate schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spanvla_ros.model.policy import Policy
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import SpanvlaError

BETAS = (0.9, 0.98)


class Optimizer:
    """AdamW over named parameters whose gradients are views of one vector.

    One vector makes averaging over processes one message, and the norm one number. Its last
    element carries the first process's word on time used and stop, so that all agree.
    """

    def __init__(
        self, policy: Policy, parts: Sequence[nn.Module], settings: TrainSettings
    ) -> None:
        """Take the parameters of `parts`, named as in `policy`; all others are frozen."""
        freeze_others(policy, parts)
        self.named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self.policy, self.settings = policy, settings
        count = sum(p.numel() for p in self.named.values())
        self.flat = torch.zeros(count + 2, device=policy.device)
        start = 0
        for parameter in self.named.values():
            stop = start + parameter.numel()
            parameter.grad = self.flat[start:stop].view_as(parameter)
            start = stop
        self._adamw = new_adamw(self.named, eye_names(policy), settings)

    def losses(self, work: Callable[..., dict[str, Tensor]], *inputs: Any) -> dict[str, Tensor]:
        """The losses `work(policy, *inputs)`."""
        return work(self.policy, *inputs)

    @contextmanager
    def whole(self) -> Iterator[Policy]:
        """The policy to look at; each process has it whole."""
        yield self.policy

    def zero(self) -> None:
        """Clear the gradient."""
        self.flat.zero_()

    def step(
        self, group: Group, share: float, step: int, word: tuple[float, float]
    ) -> list[float]:
        """Average gradients, clip, and take one step.

        Args:
            group: the processes.
            share: share of the training done, for the schedule.
            step: steps taken before this one, for the warm-up.
            word: two numbers of the first process for all.

        Returns:
            The first process's word.
        """
        said = list(word)
        if group.size > 1:
            self.flat[-2:] = self.flat.new_tensor(word if group.leads else (0.0, 0.0))
            group.sum(self.flat)
            said = self.flat[-2:].tolist()
            self.flat[-2:] = 0.0
            self.flat /= group.size
        factor = clipping(float(self.flat.norm()), step, self.settings)
        if factor < 1.0:
            self.flat *= factor
        take_step(self._adamw, share, step, self.settings)
        return said

    def state(self) -> dict[str, np.ndarray]:
        """Moments and step counts by parameter name."""
        tensors: dict[str, np.ndarray] = {}
        for name, parameter in self.named.items():
            for key, value in self._adamw.state[parameter].items():
                tensors[f'{key}/{name}'] = value.cpu().numpy()
        return tensors

    def restore(self, tensors: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        for name, parameter in self.named.items():
            kept = {
                key: torch.from_numpy(tensors[f'{key}/{name}'].copy()).to(parameter.device)
                for key in ('step', 'exp_avg', 'exp_avg_sq')
                if f'{key}/{name}' in tensors
            }
            if kept:
                self._adamw.state[parameter] = kept


def freeze_others(policy: Policy, parts: Sequence[nn.Module]) -> None:
    """Let the parameters of `parts` have gradients, and no others."""
    wanted = {id(p) for part in parts for p in part.parameters()}
    for parameter in policy.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def eye_names(policy: Policy) -> set[str]:
    """Names of the parameters of the eyes."""
    eyes = {id(p) for part in policy.backbone.eyes for p in part.parameters()}
    return {name for name, parameter in policy.named_parameters() if id(parameter) in eyes}


def new_adamw(
    named: Mapping[str, nn.Parameter], eyes: set[str], settings: TrainSettings
) -> torch.optim.AdamW:
    """AdamW with the rate of the eyes and the decay of matrices apart."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        kind = (name in eyes, parameter.dim() > 1)
        groups.setdefault(kind, []).append(parameter)
    told = [
        {
            'params': parameters,
            'scale': settings.vision_rate if vision else 1.0,
            'weight_decay': settings.decay if matrix else 0.0,
        }
        for (vision, matrix), parameters in groups.items()
    ]
    return torch.optim.AdamW(told, lr=settings.learning_rate, betas=BETAS, fused=True)


def clipping(norm: float, step: int, settings: TrainSettings) -> float:
    """The factor on a gradient of that norm.

    Raises:
        SpanvlaError: the norm is not finite.
    """
    if not math.isfinite(norm):
        raise SpanvlaError(
            f'train: the gradient of step {step} is not finite; lower learning_rate'
        )
    return settings.clip / norm if settings.clip and norm > settings.clip else 1.0


def take_step(adamw: torch.optim.AdamW, share: float, step: int, settings: TrainSettings) -> None:
    """One step at the rate of the schedule."""
    rate = settings.learning_rate * schedule(share, step, settings)
    for part in adamw.param_groups:
        part['lr'] = rate * part['scale']
    adamw.step()


def schedule(share: float, step: int, settings: TrainSettings) -> float:
    """Factor on the rate: linear warm-up in steps, times a cosine over the share of training."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return warm * (settings.final_rate + (1.0 - settings.final_rate) * cosine)


def draw_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Row numbers of one epoch: as many as there are rows, each as often as its weight asks.

    Systematic resampling: a row of mean weight comes once, so that hardly any row is left out.
    """
    rng = np.random.default_rng([seed, epoch])
    edges = np.cumsum(weights / weights.sum())
    points = (rng.random() + np.arange(len(weights))) / len(weights)
    order = np.minimum(np.searchsorted(edges, points, side='right'), len(weights) - 1)
    rng.shuffle(order)
    return order
