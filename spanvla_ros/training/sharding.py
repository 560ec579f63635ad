"""What lets a model be trained that a GPU cannot hold: recomputation, and FSDP over processes.

The way through a backbone is ours (`model.backbone.decoder`): its layers are never called as
modules, so that FSDP's hooks would not run. `call_block` is the one place where every block is
run, and there the hooks are. What is not in a block (token vectors, norms, the heads) is one more
part, whole from a step's first loss to the end of its backward pass.

The state on disk is the same as without: any number of processes, sharded or not, goes on from it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from spanvla_ros.model.backbone.decoder import call_plainly
from spanvla_ros.model.policy import Policy
from spanvla_ros.training.optimizer import (
    Optimizer,
    clipping,
    eye_names,
    freeze_others,
    new_adamw,
    take_step,
)
from spanvla_ros.training.parallel import Group
from spanvla_ros.training.settings import TrainSettings


def recompute_blocks(policy: Policy) -> None:
    """Keep only what goes into each block of the backbone, and run it again for its gradient."""
    policy.backbone.call_block = _call_again


def _call_again(work: Callable[..., Any], block: nn.Module, *inputs: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return work(block, *inputs, **settings)
    # No block draws at random.
    return checkpoint(
        work, block, *inputs, use_reentrant=False, preserve_rng_state=False, **settings
    )


class ShardedOptimizer:
    """AdamW over parameters of which each process holds its part (FSDP2).

    Blocks are gathered for their forward and their backward pass and freed after each. Weights,
    gradients and moments are fp32; `precision: bf16` is autocast inside the blocks, as without.
    """

    def __init__(
        self,
        policy: Policy,
        parts: Sequence[nn.Module],
        settings: TrainSettings,
        group: Group,
    ) -> None:
        """Shard the policy, in place; the parameters of `parts` are trained."""
        freeze_others(policy, parts)
        # A layer's K/V are views, and nothing here writes into them.
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
        self.policy, self.settings, self._group = policy, settings, group
        backbone = policy.backbone
        self._call = backbone.call_block
        # Buffers and all else are copied; the weights are filled in when there is a look at them.
        nothing: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device='meta'), requires_grad=p.requires_grad)
            for p in policy.parameters()
        }
        self._plain = copy.deepcopy(policy, nothing)
        mesh = init_device_mesh(policy.device.type, (group.size,))
        for block in (*backbone.blocks, *policy.expert.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        parts_run: list[Any] = [*backbone.blocks, policy]
        for part in parts_run:
            part.run_sharded = MethodType(_run, part)
            register_fsdp_forward_method(part, 'run_sharded')
        backbone.call_block = self._call_sharded
        self.named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        # AdamW works element by element: it steps on the parts that are here.
        self._parts = {name: nn.Parameter(_own(p.detach())) for name, p in self.named.items()}
        self._adamw = new_adamw(self._parts, eye_names(policy), settings)

    def _call_sharded(
        self, work: Callable[..., Any], block: Any, *inputs: Any, **settings: Any
    ) -> Any:
        return block.run_sharded(self._call, work, *inputs, **settings)

    def losses(self, work: Callable[..., dict[str, Tensor]], *inputs: Any) -> dict[str, Tensor]:
        """The losses `work(policy, *inputs)`."""
        policy: Any = self.policy
        found: dict[str, Tensor] = policy.run_sharded(call_plainly, work, *inputs)
        return found

    @contextmanager
    def whole(self) -> Iterator[Policy]:
        """A copy of the policy, whole in every process, to look at; all enter together."""
        parameters = dict(self._plain.named_parameters())
        for name, parameter in self.policy.named_parameters():
            assert isinstance(parameter, DTensor)
            sharded: Any = parameter.detach()
            _swap(parameters[name], sharded.full_tensor())
        try:
            yield self._plain
        finally:
            for parameter in parameters.values():
                _swap(parameter, torch.empty_like(parameter, device='meta'))

    def zero(self) -> None:
        """Clear the gradient."""
        for parameter in self.named.values():
            parameter.grad = None

    def step(
        self, group: Group, share: float, step: int, word: tuple[float, float]
    ) -> list[float]:
        """Clip the gradient, already averaged, and take one step; as `Optimizer.step`."""
        for name, part in self._parts.items():
            found = self.named[name].grad
            part.grad = torch.zeros_like(part) if found is None else _own(found)
        own = [part.grad for part in self._parts.values() if part.grad is not None]
        squares = torch.stack([grad.double().square().sum() for grad in own]).sum()
        said = squares.new_tensor([*(word if group.leads else (0.0, 0.0)), float(squares)])
        group.sum(said)
        share_said, code, total = said.tolist()
        factor = clipping(total**0.5, step, self.settings)
        if factor < 1.0:
            torch._foreach_mul_(own, factor)
        take_step(self._adamw, share, step, self.settings)
        return [share_said, code]

    def state(self) -> dict[str, np.ndarray]:
        """Moments and step counts by parameter name; all processes gather, the first keeps."""
        tensors: dict[str, np.ndarray] = {}
        for name, part in self._parts.items():
            for key, value in self._adamw.state[part].items():
                full = value if key == 'step' else self._gathered(name, value)
                if self._group.leads:
                    tensors[f'{key}/{name}'] = full.cpu().numpy()
        return tensors

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        for name, part in self._parts.items():
            if f'step/{name}' not in tensors:
                continue
            here = self.named[name]
            assert isinstance(here, DTensor)
            kept = {}
            for key in ('step', 'exp_avg', 'exp_avg_sq'):
                full = torch.from_numpy(tensors[f'{key}/{name}'].copy()).to(part.device)
                if key != 'step':
                    full = _own(distribute_tensor(full, here.device_mesh, here.placements))
                kept[key] = full
            self._adamw.state[part] = kept

    def _gathered(self, name: str, own: Tensor) -> Tensor:
        here = self.named[name]
        assert isinstance(here, DTensor)
        whole = DTensor.from_local(
            own, here.device_mesh, here.placements, shape=here.shape, stride=here.stride()
        )
        full: Tensor = whole.full_tensor()
        return full


AnyOptimizer: TypeAlias = Optimizer | ShardedOptimizer


def make_optimizer(
    policy: Policy, parts: Sequence[nn.Module], settings: TrainSettings, group: Group
) -> AnyOptimizer:
    """The optimizer that the setting `sharding` names."""
    if settings.sharding == 'fsdp':
        return ShardedOptimizer(policy, parts, settings, group)
    return Optimizer(policy, parts, settings)


def _run(
    block: nn.Module,
    call: Callable[..., Any],
    work: Callable[..., Any],
    *inputs: Any,
    **settings: Any,
) -> Any:
    return call(work, block, *inputs, **settings)


def _swap(parameter: nn.Parameter, content: Tensor) -> None:
    """Put another tensor into a parameter, wherever modules hold it."""
    fresh = nn.Parameter(content, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, fresh)


def _own(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    assert isinstance(tensor, DTensor)
    own: Tensor = tensor.to_local()
    return own
