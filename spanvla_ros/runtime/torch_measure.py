"""Times, ceilings and unavoidable work of calls in torch, on a GPU or on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spanvla_ros.model.policy import Policy
from spanvla_ros.runtime.roofline import Ceiling, Work
from spanvla_ros.runtime.timing import WARM, Timing

PRODUCT = {'cuda': 8192, 'cpu': 256}
COPY_BYTES = {'cuda': 1 << 30, 'cpu': 1 << 22}
TRIALS = 10
# Operators that make a tensor without a kernel, and functions that are one kernel on a GPU.
_NO_KERNEL = frozenset(('aten::empty', 'aten::empty_like', 'aten::_unsafe_view'))
_ONE_KERNEL = (functional.rms_norm, functional.scaled_dot_product_attention)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def timed(call: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    """Times of single calls: by CUDA events on a GPU, gaps between kernels included."""
    for _ in range(WARM):
        call()
    wait(device)
    spans_ms, spent_ms = [], []
    for _ in range(repeats):
        used = time.process_time()
        spans_ms.append(_span_ms(call, device))
        spent_ms.append((time.process_time() - used) * 1e3)
    return timing(spans_ms, spent_ms)


def timing(spans_ms: Sequence[float], spent_ms: Sequence[float]) -> Timing:
    """What of many wall and CPU times is kept."""
    return Timing(
        float(np.percentile(spans_ms, 50)),
        float(np.percentile(spans_ms, 99)),
        max(spans_ms),
        float(np.median(spent_ms)),
    )


def measured_ceiling(device: torch.device, kind: torch.dtype) -> Ceiling:
    """Best of a few products of random matrices, and of a few copies (read and written)."""
    side, size = PRODUCT[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_ms = _best_ms(lambda: a @ b, device)
    copy_ms = _best_ms(lambda: target.copy_(source), device)
    return Ceiling(2 * side**3 / product_ms * 1e3, 2 * size / copy_ms * 1e3)


def work_of_call(
    call: Callable[[], object], weights: Iterable[Tensor], moved: Iterable[Tensor], passes: int = 1
) -> Work:
    """Matrix products of a call as it runs, and its bytes: weights each pass, the rest once.

    Attention is counted as the two products that it is, masked places included.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    once = {id(weight): weight for weight in weights}.values()
    return Work(counter.get_total_flops(), passes * _bytes(once) + _bytes(moved))


def eyes_weights(policy: Policy) -> list[Tensor]:
    """What vision reads."""
    return [weight for tower in policy.backbone.eyes for weight in tower.parameters()]


def prefill_weights(policy: Policy) -> list[Tensor]:
    """What a prefill reads that stops at keys and values of the last bridged layer."""
    last = policy.backbone.bridged[-1]
    layers: Any = policy.backbone.text.layers
    end: list[nn.Module] = [layers[last].input_layernorm]
    end += [layers[last].self_attn.k_proj, layers[last].self_attn.v_proj]
    parts = [*layers[:last], *end]
    return list(chain.from_iterable(part.parameters() for part in parts))


def language_weights(policy: Policy) -> list[Tensor]:
    """What all layers and the scores over the vocabulary read."""
    backbone = policy.backbone
    parts = [backbone.text.layers, backbone.text.norm, backbone.network.lm_head]
    return list(chain.from_iterable(part.parameters() for part in parts))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARM):
        call()
    return min(_span_ms(call, device) for _ in range(TRIALS))


def _span_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != 'cuda':
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def launches(call: Callable[[], object]) -> int:
    """How many kernels a call would put on a GPU, counted on the CPU: operators that are no views.

    What is one kernel there and several operators here counts as one.
    """
    counter = _Counter()
    with counter, _Joined(counter):
        call()
    return counter.found


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: int = 0
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        silent = self.inside or func.is_view or func._schema.name in _NO_KERNEL
        self.found += int(not silent)
        return func(*args, **(kwargs or {}))


class _Joined(TorchFunctionMode):
    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ONE_KERNEL:
            return func(*args, **(kwargs or {}))
        self._counter.found += 1
        self._counter.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._counter.inside = False
