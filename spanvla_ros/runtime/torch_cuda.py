"""The torch engine on an NVIDIA GPU: every graph recorded once, K/V kept there between them.

Three launches make a plan of one picture: its vision, the prefill up to the last bridged layer,
and the whole flow with all its steps. Where a recording fails, the kernels are launched one by
one, and a line says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from spanvla_ros.model.checkpoint import ModelDirectory
from spanvla_ros.model.policy import Policy, load_policy
from spanvla_ros.runtime.backend import DeviceCache
from spanvla_ros.runtime.torch_ import TorchBackend, graph_modules
from spanvla_ros.runtime.torch_flow import ExpertFlow, empty_slots, fill_slots
from spanvla_ros.runtime.torch_graphs import Record, Stage, Tensors, cuda_graph
from spanvla_ros.types import SpanvlaError

Array = np.ndarray
PRECISIONS = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
MAX_STEPS = 50
# Rows of a matrix start where a tensor core can load them; Qwen's tower has width 3420.
ALIGNED = 64


class TorchCudaBackend(TorchBackend):
    """A model in torch on a GPU; implements `runtime.backend.Backend` and `DeviceBackend`."""

    def __init__(
        self,
        model: ModelDirectory | Policy,
        precision: str = 'fp32',
        *,
        device: str = 'cuda',
        record: Record = cuda_graph,
        compiled: bool = False,
    ) -> None:
        """Put a verified model directory, or a copy of a policy in memory, on the device.

        Args:
            model: the model.
            precision: `fp32` (products in full fp32, not tf32), `fp16` or `bf16`, for weights and
                activations; the flow's state and sums over steps stay fp32.
            device: where to run.
            record: how work is replayed; `torch_graphs.plain` launches kernels one by one.
            compiled: fuse what is between the products with `torch.compile`, which takes half a
                minute at the first start.

        Raises:
            SpanvlaError: no such precision, no GPU, or a head that is no flow.
        """
        if precision not in PRECISIONS:
            raise SpanvlaError(
                f'precision {precision!r} is not known; use {", ".join(PRECISIONS)}'
            )
        self.device = torch.device(device)
        if self.device.type == 'cuda' and not torch.cuda.is_available():
            raise SpanvlaError('torch-cuda: torch sees no GPU here; use torch, or see nvidia-smi')
        policy = copy.deepcopy(model) if isinstance(model, Policy) else load_policy(model.path)
        self.config = policy.config
        if self.config.expert_graph != 'step':
            raise SpanvlaError(f'torch-cuda: runs no head {self.config.head}; use torch')
        self.name = 'torch-cuda' if precision == 'fp32' else f'torch-cuda:{precision}'
        if precision == 'fp32':
            torch.backends.cuda.matmul.allow_tf32 = False
        self.kind = PRECISIONS[precision]
        self.policy = placed(policy, self.device, self.kind)
        align_eyes(policy, ALIGNED)
        if compiled:
            compile_layers(policy)
        self._modules = graph_modules(policy)
        self._record = record
        self._stages = {name: self._stage(name, self._graph(name)) for name in self._modules}
        self._slots = empty_slots(policy, self.device, self.kind)
        self._flows = ExpertFlow(policy.expert)
        if compiled:
            self._flows.compile()
        self._stages['condition'] = self._stage('condition', self._fill_slots)
        self._conditioned = 0
        self._answer = self._empty_answer()
        self._stages['decode'] = self._stage('decode', self._decode_in_place)
        self._decoding: tuple[Array, Array, int] | None = None

    @property
    def refused(self) -> dict[str, str]:
        """What did not become a graph, and why."""
        return {name: stage.refused for name, stage in self._stages.items() if stage.refused}

    def condition(
        self,
        ids: Int64[Array, '1 p'],
        embeds: Float32[Array, 'i d'],
        valid: Float32[Array, '1 p'],
    ) -> DeviceCache:
        """Prefill into the slots that `flow` attends to; returns before the GPU is done."""
        self._stages['condition'].start(ids, embeds, valid)
        self._conditioned += 1
        return DeviceCache(self._conditioned)

    def flow(
        self,
        start: Float32[Array, '1 t 3'],
        ego: Float32[Array, '1 m'],
        cache: DeviceCache,
        steps: int,
    ) -> Float32[Array, '1 t 3']:
        """The state at time 1 after `steps` Euler steps on what `condition` prefilled last."""
        if cache.version != self._conditioned:
            raise SpanvlaError('flow: a later prefill overwrote that cache; condition again')
        if not 1 <= steps <= MAX_STEPS:
            raise SpanvlaError(f'flow: {steps} steps; use 1 to {MAX_STEPS}')
        name = f'flow {steps}'
        if name not in self._stages:
            self._stages[name] = self._stage(name, self._flow_of(steps))
        return self._stages[name](start, ego)[0]

    def decode(
        self,
        token: Int64[Array, '1 1'],
        position: Int64[Array, '1'],
        keys: Float32[Array, 'l 1 g s e'],
        values: Float32[Array, 'l 1 g s e'],
        valid: Float32[Array, '1 s'],
    ) -> tuple[Float32[Array, '1 v'], Float32[Array, 'l 1 g 1 e'], Float32[Array, 'l 1 g 1 e']]:
        """Logits after one more token, and its keys and values.

        The cache is uploaded once an episode: when the very arrays of the last call come again
        at the next position, what was returned then is already in its place on the device.
        """
        at, before = int(position[0]), self._decoding
        if before is None or before[0] is not keys or before[1] is not values or before[2] != at:
            for slots, array in zip(self._answer, (keys, values), strict=True):
                slots.copy_(torch.from_numpy(array))
        logits, new_keys, new_values = self._stages['decode'](token, position, valid)
        self._decoding = (keys, values, at + 1)
        return logits, new_keys, new_values

    def _run(self, graph: str, *arrays: Array) -> tuple[Array, ...]:
        return self._stages[graph](*arrays)

    def _stage(self, name: str, function: Callable[..., Tensors]) -> Stage:
        return Stage(name, function, self.device, self._record)

    def _graph(self, name: str) -> Callable[..., Tensors]:
        """A graph in this precision, fp32 outside; pictures are normalised in fp32."""
        module = self._modules[name]

        def run(*tensors: Tensor) -> Tensors:
            if name != 'vision':
                tensors = tuple(t.to(self.kind) if t.is_floating_point() else t for t in tensors)
            found = module(*tensors)
            return tuple(t.float() for t in (found if isinstance(found, tuple) else (found,)))

        return run

    def _empty_answer(self) -> tuple[Tensor, Tensor]:
        """Keys and values of an answer's cache `[layers, 1, kv, S, hd]`."""
        backbone, slots = self.policy.backbone, self.config.sequence_tokens
        shape = (backbone.layers, 1, backbone.kv_heads, slots, backbone.head_size)
        keys, values = (torch.zeros(shape, dtype=self.kind, device=self.device) for _ in range(2))
        return keys, values

    def _fill_slots(self, ids: Tensor, embeds: Tensor, valid: Tensor) -> Tensors:
        fill_slots(self.policy, self._slots, ids, embeds[None].to(self.kind), valid)
        return ()

    def _flow_of(self, steps: int) -> Callable[..., Tensors]:
        flow = self._flows.of(self._slots, steps)

        def run(start: Tensor, ego: Tensor) -> Tensors:
            return (flow(start[:, None], ego)[:, 0],)

        return run

    def _decode_in_place(self, token: Tensor, position: Tensor, valid: Tensor) -> Tensors:
        keys, values = self._answer
        module = self._modules['decode']
        logits, new_keys, new_values = module(token, position, keys, values, valid.to(self.kind))
        keys.index_copy_(3, position, new_keys)
        values.index_copy_(3, position, new_values)
        return logits.float(), new_keys.float(), new_values.float()


def placed(policy: Policy, device: torch.device, kind: torch.dtype) -> Policy:
    """The policy itself, on a device and in a precision.

    Rotary tables and masks are rounded as they would be in each product anyway.
    """
    backbone = policy.backbone
    exact = {name: getattr(backbone, name) for name in ('pixel_middle', 'pixel_scale')}
    policy.to(device=device, dtype=kind)
    for name, buffer in exact.items():
        setattr(backbone, name, buffer.to(device))
    return policy.eval()


def align_eyes(policy: Policy, multiple: int) -> None:
    """Align the gated feed-forward layers of the tower."""
    for tower in policy.backbone.eyes:
        for module in tower.modules():
            if hasattr(module, 'gate_proj'):
                align(module, multiple)


def compile_layers(policy: Policy) -> None:
    """Compile each kind of layer of the backbone once; all of a kind run the same code.

    Whole networks would be compiled layer by layer, which takes minutes and gains little more.
    """
    backbone: Any = policy.backbone
    for name in ('_decode_layer', '_see_layer'):
        if hasattr(backbone, name):
            setattr(backbone, name, torch.compile(getattr(backbone, name), dynamic=False))


@torch.no_grad()
def align(mlp: Any, multiple: int) -> None:
    """Widen a gated feed-forward layer by zeros to a whole multiple; its function stays the same.

    silu(0) * 0 is exactly 0, and so is its share of what goes down.
    """
    inner = mlp.gate_proj.out_features
    width = -(-inner // multiple) * multiple
    if width == inner:
        return
    mlp.gate_proj = _widened(mlp.gate_proj, width, mlp.gate_proj.in_features)
    mlp.up_proj = _widened(mlp.up_proj, width, mlp.up_proj.in_features)
    mlp.down_proj = _widened(mlp.down_proj, mlp.down_proj.out_features, width)


def _widened(linear: nn.Linear, outputs: int, inputs: int) -> nn.Linear:
    weight, bias = linear.weight, linear.bias
    wide = nn.Linear(
        inputs, outputs, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    wide.weight.zero_()
    wide.weight[: weight.shape[0], : weight.shape[1]] = weight
    if bias is not None:
        wide.bias.zero_()
        wide.bias[: bias.shape[0]] = bias
    return wide.requires_grad_(weight.requires_grad)
