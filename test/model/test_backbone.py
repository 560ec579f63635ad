"""Our static way through Qwen2.5-VL against transformers' own forward pass."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.model.backbone import PIXEL_MEAN, PIXEL_STD  # noqa: E402
from spanvla_ros.model.config import TOWN_CAMERAS, CameraSpec, ModelConfig  # noqa: E402
from spanvla_ros.model.policy import load_policy, new_policy, save_policy  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

LIMIT = 1e-4


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def hf_patches(pixels, patch=14, merge=2):
    """Pictures as transformers' processor hands them over: one still frame, repeated."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    n, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    x = ((pixels - mean) / std)[:, None].expand(-1, 2, -1, -1, -1)
    x = x.reshape(n, 2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(n * rows * columns, -1)
    return x, torch.tensor([[1, rows, columns]] * n)


def config_of(height, width):
    if (height, width) == (112, 224):
        return ModelConfig()
    cameras = tuple(
        CameraSpec(c.name, width, height, c.fov_deg, c.x_m, c.y_m, c.z_m, c.yaw_deg)
        for c in TOWN_CAMERAS
    )
    return ModelConfig(cameras=cameras, prompt_tokens=300)


@pytest.fixture(scope='module')
def policy():
    return new_policy(ModelConfig(), seed=1).eval()


def prompt_ids(policy, generator):
    ids = torch.randint(10, 700, (1, policy.config.prompt_tokens), generator=generator)
    token = policy.backbone.network.config.image_token_id
    ids[ids == token] = token + 1
    ids[0, policy.layout.image_positions] = token
    return ids


# The second size has windows of four different shapes.
@pytest.mark.parametrize('size', [(112, 224), (140, 196)])
@torch.no_grad()
def test_hidden_states_keys_and_values_are_transformers_own(size):
    policy = new_policy(config_of(*size), seed=2).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, *size, generator=generator)
    ids = prompt_ids(policy, generator)
    patches, grids = hf_patches(pixels)
    network = policy.backbone.network
    theirs_seen = network.model.visual(patches, grids).pooler_output
    theirs = network.model(
        input_ids=ids,
        mm_token_type_ids=(ids == network.config.image_token_id).int(),
        pixel_values=patches,
        image_grid_thw=grids,
        use_cache=True,
    )
    seen = policy.backbone.vision(pixels).flatten(0, 1)
    assert relative(seen, theirs_seen) < LIMIT
    ours = policy.backbone.prefill(ids, seen[None], torch.ones(ids.shape))
    cache = theirs.past_key_values.layers
    assert relative(ours.hidden, theirs.last_hidden_state) < LIMIT
    assert relative(ours.keys, torch.stack([layer.keys for layer in cache])) < LIMIT
    assert relative(ours.values, torch.stack([layer.values for layer in cache])) < LIMIT
    sparse = policy.backbone.prefill(ids, seen[None], torch.ones(ids.shape), (0, 2, 4))
    torch.testing.assert_close(sparse.keys, ours.keys[[0, 2, 4]])


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
