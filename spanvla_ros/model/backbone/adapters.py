"""LoRA adapters (peft) on the language model of a backbone: attach, switch off, merge, save, load.

The adapters sit in transformers' own modules, so every way through the network uses them. With
all of them off the network is the one it started from: the reference policy of reinforcement.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spanvla_ros.model.checkpoint import read_tensors, write_tensors
from spanvla_ros.types import MissingExtraError, SpanvlaError

ADAPTER_FILE = 'adapter_model.safetensors'
TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
# How peft names tensors in a file: below its own wrapper, without the adapter's name.
_PREFIX, _NAME = 'base_model.model.', 'default'


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale of the adapters, and the projections of each layer that get one.

    `within` is a pattern of the names that lead to them.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    # The eyes of some families have projections of the same names.
    within: str = r'.*(language_model|text_model)\..*\.'


def attach_adapters(network: nn.Module, settings: LoraSettings, seed: int = 0) -> None:
    """Put fresh adapters into a network; its outputs stay as they are until they are trained."""
    lora = _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=rf'{settings.within}({"|".join(settings.targets)})',
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(network, lora)


def _inject(network: nn.Module, lora: Any) -> None:
    if adapter_layers(network):
        raise SpanvlaError('adapters: the network has some already; merge them first')
    try:
        _peft().inject_adapter_in_model(lora, network, _NAME)
    except ValueError as error:
        raise SpanvlaError(
            f'adapters: no layer of the language model fits {lora.target_modules}; name '
            f'projections such as {", ".join(TARGETS)}'
        ) from error


def adapter_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that hold an adapter, by their name in the network."""
    return {name: layer for name, layer in network.named_modules() if hasattr(layer, 'lora_A')}


def adapter_parts(network: nn.Module) -> list[nn.Module]:
    """What is trained of a network with adapters."""
    layers = adapter_layers(network).values()
    return [part for layer in layers for part in (layer.lora_A, layer.lora_B)]


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Run the network as it was before its adapters."""
    layers: Sequence[Any] = list(adapter_layers(network).values())
    trained = [p for part in adapter_parts(network) for p in part.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        # peft freezes what it switches off.
        for parameter in trained:
            parameter.requires_grad = True


def merge_adapters(network: Any) -> None:
    """Replace each layer with an adapter by a plain one of the same outputs, for good."""
    if _replace(network):
        del network.peft_config


@torch.no_grad()
def _replace(network: nn.Module) -> dict[str, Any]:
    layers = adapter_layers(network)
    for name, layer in layers.items():
        plain = copy.deepcopy(layer.get_base_layer())
        plain.weight += layer.get_delta_weight(_NAME)
        _put(network, name, plain)
    return layers


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """The network with its adapters merged, for as long as it takes to save it."""
    layers = _replace(network)
    try:
        yield
    finally:
        for name, layer in layers.items():
            _put(network, name, layer)


def save_adapters(network: nn.Module, folder: Path) -> None:
    """Write the adapters alone, in peft's own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    lora: Any = network.peft_config[_NAME]
    lora.save_pretrained(str(folder))
    tensors = {name: weight.detach().cpu().numpy() for name, weight in _weights(network).items()}
    write_tensors(folder / ADAPTER_FILE, tensors)


@torch.no_grad()
def load_adapters(network: nn.Module, folder: Path) -> None:
    """Attach the adapters of a folder that `save_adapters` or peft wrote."""
    try:
        lora = _peft().LoraConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise SpanvlaError(f'{folder}: holds no LoRA adapters of peft; name another') from error
    tensors = read_tensors(folder / ADAPTER_FILE)
    _inject(network, lora)
    weights = _weights(network)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {name: array.shape for name, array in tensors.items()}:
        merge_adapters(network)
        raise SpanvlaError(f'{folder}: adapters of another network; name those of this one')
    for name, weight in weights.items():
        weight.copy_(torch.from_numpy(tensors[name]))


def _weights(network: nn.Module) -> dict[str, nn.Parameter]:
    return {
        _PREFIX + name.replace(f'.{_NAME}.', '.'): weight
        for name, weight in network.named_parameters()
        if '.lora_A.' in name or '.lora_B.' in name
    }


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(network.get_submodule(parent), child, layer)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingExtraError('peft', 'train') from error
    return peft
