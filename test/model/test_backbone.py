"""What the backbone and the expert of the tiny model promise; parity is in test_families."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402


@pytest.fixture(scope='module')
def policy():
    return new_policy(ModelConfig(), seed=1).eval()


def prompt_ids(policy, generator):
    ids = torch.randint(10, 700, (1, policy.config.prompt_tokens), generator=generator)
    token = policy.backbone.network.config.image_token_id
    ids[ids == token] = token + 1
    ids[0, policy.layout.image_positions] = token
    return ids


@torch.no_grad()
def test_a_masked_token_is_as_good_as_absent(policy):
    generator = torch.Generator().manual_seed(3)
    backbone = policy.backbone
    ids = prompt_ids(policy, generator)
    embeds = torch.randn(1, len(policy.layout.image_positions), backbone.hidden)
    valid = torch.ones(ids.shape)
    valid[:, policy.layout.image_positions] = 0.0
    masked = backbone.prefill(ids, embeds, valid)
    places = backbone.text_positions
    absent = backbone.prefill(ids[:, places], None, valid[:, places], None, places)
    torch.testing.assert_close(masked.keys[..., places, :], absent.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.hidden[:, -1], absent.hidden[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_token_by_token_is_one_longer_pass(policy):
    generator = torch.Generator().manual_seed(4)
    backbone, config = policy.backbone, policy.config
    ids = prompt_ids(policy, generator)
    embeds = torch.randn(1, len(policy.layout.image_positions), backbone.hidden)
    answer = torch.tensor([[20, 30, 40]])
    length = config.prompt_tokens
    whole = backbone.prefill(torch.cat([ids, answer], 1), embeds, torch.ones(1, length + 3))
    start = backbone.prefill(ids, embeds, torch.ones(1, length))
    room = (0, 0, 0, config.answer_tokens)
    keys, values = (torch.nn.functional.pad(t, room) for t in (start.keys, start.values))
    valid = torch.zeros(1, config.sequence_tokens)
    valid[:, :length] = 1.0
    for index in range(3):
        at = length + index
        token = answer[:, index : index + 1]
        found = backbone.decode(token, torch.tensor([at]), keys, values, valid)
        keys[..., at : at + 1, :], values[..., at : at + 1, :] = found.keys, found.values
        valid[:, at] = 1.0
        torch.testing.assert_close(found.hidden[:, 0], whole.hidden[:, at], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_draws_of_one_prefix_do_not_see_each_other(policy):
    torch.manual_seed(5)
    expert, config = policy.expert, policy.config
    for parameter in expert.parameters():
        parameter.normal_(0.0, 0.1)
    shape = (len(policy.backbone.bridged), 2, 2, config.sequence_tokens, 48)
    keys, values = torch.randn(shape), torch.randn(shape)
    valid = (torch.rand(2, config.sequence_tokens) > 0.2).float()
    x, time, ego = torch.randn(2, 4, 10, 3), torch.randn(2, 4, 128), torch.randn(2, 20)
    together = expert(x, time, ego, keys, values, valid)
    for draw in range(4):
        part = slice(draw, draw + 1)
        alone = expert(x[:, part], time[:, part], ego, keys, values, valid)
        torch.testing.assert_close(together[:, part], alone, atol=1e-5, rtol=1e-4)
    hidden = values.clone()
    hidden[..., valid[0] == 0, :] = 100.0
    first = expert(x[:1], time[:1], ego[:1], keys[:, :1], hidden[:, :1], valid[:1])
    torch.testing.assert_close(first, together[:1], atol=1e-5, rtol=1e-4)
    # Each bridged layer counts.
    for layer in range(3):
        swapped = values.clone()
        swapped[layer] = values[layer].flip(0)
        assert not torch.allclose(expert(x, time, ego, keys, swapped, valid), together, atol=1e-3)


def test_a_saved_policy_comes_back_and_ships_in_half_precision(policy, tmp_path):
    save_policy(policy, tmp_path / 'full', {'stages': []})
    back = load_policy(tmp_path / 'full')
    for (name, ours), (_, theirs) in zip(
        policy.named_parameters(), back.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    save_policy(policy, tmp_path / 'shipped', {}, shipped=True)
    shipped = load_policy(tmp_path / 'shipped')
    weight = policy.expert.blocks[0].qkv.weight
    assert torch.equal(shipped.expert.blocks[0].qkv.weight, weight.half().float())
    size = sum(p.stat().st_size for p in (tmp_path / 'shipped').rglob('*') if p.is_file())
    assert size < 12e6
    assert not (tmp_path / 'shipped' / 'training_heads.safetensors').exists()


def test_a_changed_weight_file_is_refused(policy, tmp_path):
    save_policy(policy, tmp_path / 'model', {})
    path = tmp_path / 'model' / 'expert.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    with pytest.raises(SpanvlaError, match=r'expert\.safetensors differs'):
        load_policy(tmp_path / 'model')


def test_near_numbers_start_alike(policy):
    table = policy.backbone.network.model.language_model.embed_tokens.weight.detach()
    vocabulary = policy.layout.tokenizer
    ten, near, far = (table[vocabulary.token_to_id(w)].numpy() for w in ('10', '10.5', '40'))
    assert np.dot(ten, near) > np.dot(ten, far) + 0.2 * np.dot(ten, ten)
