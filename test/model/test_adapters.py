"""LoRA adapters against peft's own model and against the arithmetic they stand for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

from tiny_folders import FAMILIES, network_of, tokenizer_of  # noqa: E402

from spanvla_ros.model.backbone.adapters import (  # noqa: E402
    LoraSettings,
    adapter_layers,
    adapters_off,
    attach_adapters,
    load_adapters,
    merge_adapters,
    merged,
    save_adapters,
)
from spanvla_ros.types import SpanvlaError  # noqa: E402

SETTINGS = LoraSettings(rank=4, alpha=8.0)
IDS = torch.arange(50, 90)[None]


def text_of(network):
    return getattr(network.model, 'language_model', None) or network.model.text_model


@torch.no_grad()
def hidden(network):
    return text_of(network)(input_ids=IDS).last_hidden_state


def trained(family, seed=3):
    """A network with adapters that do something."""
    network = network_of(family, tokenizer_of(family))
    attach_adapters(network, SETTINGS, seed)
    with torch.no_grad():
        for layer in adapter_layers(network).values():
            layer.lora_B['default'].weight.normal_(0.0, 0.2)
    return network


@pytest.mark.parametrize('family', FAMILIES)
def test_merged_and_unmerged_outputs_are_equal_and_off_is_the_reference(family):
    before = hidden(network_of(family, tokenizer_of(family)))
    network = trained(family)
    layers = adapter_layers(network)
    assert len(layers) == 5 * 4
    assert not any('vision' in name or 'visual' in name for name in layers)
    after = hidden(network)
    assert (after - before).norm() > 0.01 * before.norm()
    with adapters_off(network):
        assert torch.equal(hidden(network), before)
    assert torch.equal(hidden(network), after)
    with merged(network):
        assert not adapter_layers(network)
        assert (hidden(network) - after).norm() < 1e-5 * after.norm()
    assert torch.equal(hidden(network), after)
    layer = next(iter(layers.values()))
    base, a, b = (
        part.weight.detach()
        for part in (layer.get_base_layer(), layer.lora_A['default'], layer.lora_B['default'])
    )
    name = next(iter(layers))
    merge_adapters(network)
    plain = network.get_submodule(name).weight
    torch.testing.assert_close(plain, base + SETTINGS.alpha / SETTINGS.rank * (b @ a))


def test_adapters_start_as_nothing_and_are_the_same_for_the_same_seed():
    tokenizer = tokenizer_of('internvl')
    network = network_of('internvl', tokenizer)
    before = hidden(network)
    attach_adapters(network, SETTINGS, seed=5)
    assert torch.equal(hidden(network), before)
    twin = network_of('internvl', tokenizer)
    attach_adapters(twin, SETTINGS, seed=5)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(SpanvlaError, match='merge them first'):
        attach_adapters(network, SETTINGS)


# peft asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')
@pytest.mark.parametrize('family', FAMILIES)
def test_saved_adapters_come_back_here_and_in_peft(family, tmp_path):
    network = trained(family)
    after = hidden(network)
    save_adapters(network, tmp_path / 'adapters')
    fresh = network_of(family, tokenizer_of(family))
    load_adapters(fresh, tmp_path / 'adapters')
    assert torch.equal(hidden(fresh), after)
    theirs = peft.PeftModel.from_pretrained(
        network_of(family, tokenizer_of(family)), str(tmp_path / 'adapters')
    )
    assert torch.equal(hidden(theirs.base_model.model), after)


def test_foreign_adapters_and_unknown_projections_are_refused(tmp_path):
    save_adapters(trained('internvl'), tmp_path / 'adapters')
    other = network_of('qwen3_vl', tokenizer_of('qwen3_vl'))
    before = hidden(other)
    with pytest.raises(SpanvlaError, match='adapters of another network'):
        load_adapters(other, tmp_path / 'adapters')
    assert torch.equal(hidden(other), before)
    with pytest.raises(SpanvlaError, match='holds no LoRA adapters'):
        load_adapters(other, tmp_path)
    with pytest.raises(SpanvlaError, match='no layer of the language model'):
        attach_adapters(other, LoraSettings(rank=2, targets=('nothing',)))
