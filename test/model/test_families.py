"""Our static way through each family against transformers' own forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from tiny_folders import (  # noqa: E402
    FAMILIES,
    ids_of,
    network_of,
    qwen2_5_3b,
    tokenizer_of,
)

from spanvla_ros.model import config as model_config  # noqa: E402
from spanvla_ros.model.backbone import BACKBONES, open_backbone  # noqa: E402
from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.prompt import MARKS  # noqa: E402

LIMIT = 1e-4
ANSWER = 3
# Height, width, cameras, batch, padded. Windows of Qwen2.5-VL have one and four shapes here.
CASES = [
    (2, 2, 1, 1, False),
    (2, 4, 3, 1, True),
    (3, 5, 3, 3, True),
    (6, 5, 1, 3, False),
]


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


class Case:
    """One network, one layout, one batch of prompts, and what transformers makes of them."""

    def __init__(self, family, cells_down, cells_across, cameras, batch, padded, network=None):
        tokenizer = tokenizer_of(family)
        self.network = network or network_of(family, tokenizer, seed=1)
        kind = BACKBONES[family]
        patch, merge = kind.cell(self.network.config)
        self.rows, self.columns, self.merge = cells_down * merge, cells_across * merge, merge
        height, width = self.rows * patch, self.columns * patch
        tokens = cells_down * cells_across
        self.positions = [
            3 + camera * (tokens + 4) + index
            for camera in range(cameras)
            for index in range(tokens)
        ]
        prompt = self.positions[-1] + 20
        self.config = ModelConfig(
            family=family,
            cameras=tuple(
                replace(camera, width_px=width, height_px=height)
                for camera in ModelConfig().cameras[:cameras]
            ),
            prompt_tokens=prompt,
            patch_px=patch,
            patch_merge=merge,
        )
        self.backbone = open_backbone(self.network, self.config, self.positions, 20)
        draw = torch.Generator().manual_seed(cells_down + 10 * batch)
        self.batch, self.cameras, self.length = batch, cameras, prompt + ANSWER
        self.pixels = torch.rand(batch * cameras, 3, height, width, generator=draw)
        image = tokenizer.token_to_id(MARKS[family].image)
        self.ids = torch.randint(40, 300, (batch, self.length), generator=draw)
        self.ids[:, self.positions] = image
        self.valid = torch.ones(batch, self.length)
        if padded:
            self.valid[:, -14:-9] = 0.0
            # One row lacks a whole picture, another more words.
            self.valid[0, self.positions[:tokens]] = 0.0
            self.valid[-1, -16:-9] = 0.0
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (kind.pixel_mean, kind.pixel_std))
        self.normal = (self.pixels - mean) / std

    def rope(self):
        """Positions of every place of the layout, masked or not."""
        kinds = torch.zeros(1, self.length, dtype=torch.int32)
        kinds[0, self.positions] = 1
        grids = torch.tensor([[1, self.rows, self.columns]] * self.cameras)
        found, _ = self.network.model.get_rope_index(kinds.long(), kinds, image_grid_thw=grids)
        return found.expand(-1, self.batch, -1)

    def ours(self, layers=None):
        """Visual tokens, and K/V and hidden states of one pass on them."""
        seen = self.backbone.vision(self.pixels)
        embeds = seen.reshape(self.batch, -1, self.backbone.visual_width)
        return seen, self.backbone.prefill(self.ids, embeds, self.valid, layers)


def theirs_qwen(case):
    """Qwen2.5-VL and Qwen3-VL from patches, as their processors hand them over."""
    merge, count = case.merge, len(case.pixels)
    patch = case.config.patch_px
    down, across = case.rows // merge, case.columns // merge
    x = case.normal[:, None].expand(-1, 2, -1, -1, -1)
    x = x.reshape(count, 2, 3, down, merge, patch, across, merge, patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(count * case.rows * case.columns, -1)
    grids = torch.tensor([[1, case.rows, case.columns]] * count)
    found = case.network.model.visual(x, grids)
    seen = [found.pooler_output, *(getattr(found, 'deepstack_features', None) or [])]
    # Where nothing is masked, transformers counts positions itself.
    masked = bool((case.valid == 0).any())
    whole = case.network.model(
        input_ids=case.ids,
        attention_mask=case.valid.long(),
        position_ids=case.rope() if masked else None,
        mm_token_type_ids=(case.ids == case.network.config.image_token_id).int(),
        pixel_values=x,
        image_grid_thw=grids,
        use_cache=True,
    )
    return torch.cat(seen, -1), whole


def theirs_internvl(case):
    model = case.network.model
    if case.rows == case.columns:
        whole = model(
            input_ids=case.ids,
            attention_mask=case.valid.long(),
            pixel_values=case.normal,
            use_cache=True,
        )
        return whole.image_hidden_states.flatten(0, 1), whole
    # On other rectangles transformers' own tower, shuffle and projector are called one by one.
    features = model.vision_tower(case.normal).last_hidden_state[:, 1:]
    features = features.reshape(len(features), case.rows, case.columns, -1)
    shuffled = model.pixel_shuffle(features, 0.5)
    seen = model.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1)
    return seen, _language(case, model.language_model, seen)


def theirs_smolvlm(case):
    model = case.network.model
    if case.rows == case.columns:
        pictures = case.normal.unflatten(0, (case.batch, case.cameras))
        seen = torch.cat(model.get_image_features(pictures).pooler_output)
        whole = model(
            input_ids=case.ids,
            attention_mask=case.valid.long(),
            pixel_values=pictures,
            use_cache=True,
        )
        return seen, whole
    features = model.vision_model(case.normal).last_hidden_state
    grid = features.reshape(len(features), case.rows, case.columns, -1)
    merge = case.merge
    cells = [
        grid[:, row : row + merge, column : column + merge].flatten(1)
        for row in range(0, case.rows, merge)
        for column in range(0, case.columns, merge)
    ]
    seen = model.connector.modality_projection(torch.stack(cells, 1)).flatten(0, 1)
    return seen, _language(case, model.text_model, seen)


def _language(case, text, seen):
    embeds = text.embed_tokens(case.ids)
    places = case.ids == case.network.config.image_token_id
    embeds = embeds.masked_scatter(places[..., None], seen)
    return text(inputs_embeds=embeds, attention_mask=case.valid.long(), use_cache=True)


THEIRS = {
    'qwen2_5_vl': theirs_qwen,
    'qwen3_vl': theirs_qwen,
    'internvl': theirs_internvl,
    'smolvlm': theirs_smolvlm,
}


@pytest.mark.parametrize('shape', CASES)
@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_vision_keys_values_and_hidden_states_are_transformers_own(family, shape):
    case = Case(family, *shape)
    agree(case, THEIRS[family](case))


def agree(case, theirs_all):
    """Both ways give the same at every place that may be attended."""
    seen, ours = case.ours()
    theirs_seen, theirs = theirs_all
    assert relative(seen.flatten(0, 1), theirs_seen) < LIMIT
    real = case.valid.bool()
    assert relative(ours.hidden[real], theirs.last_hidden_state[real]) < LIMIT
    for index, layer in enumerate(theirs.past_key_values.layers):
        for found, wanted in ((ours.keys, layer.keys), (ours.values, layer.values)):
            places = (found[index].transpose(1, 2)[real], wanted.transpose(1, 2)[real])
            assert relative(*places) < LIMIT, index


@pytest.mark.slow
@torch.no_grad()
def test_the_widths_of_the_released_3b_model_agree_too():
    """Its own configuration but for layers and words; pictures and cameras of config/model."""
    path = Path(__file__).parents[2] / 'config/model/qwen2_5_vl_3b.yaml'
    config = model_config.load_config(path)
    assert (config.image_tokens, len(config.cameras), config.frames_per_camera) == (128, 3, 4)
    tokenizer = tokenizer_of('qwen2_5_vl')
    torch.manual_seed(0)
    network = qwen2_5_3b(ids_of('qwen2_5_vl', tokenizer), 1024, layers=2)
    case = Case('qwen2_5_vl', 8, 16, 3, 1, True, network)
    assert case.config.image_tokens == config.image_tokens
    agree(case, theirs_qwen(case))
    assert (case.backbone.heads, case.backbone.kv_heads, case.backbone.head_size) == (16, 2, 128)


@pytest.mark.parametrize('interval', [0, 1, 2, 3])
@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_a_pass_that_stops_early_leaves_what_the_full_one_leaves(family, interval):
    case = Case(family, 2, 4, 1, 1, True)
    layers = model_config.bridged_layers(5, interval)
    assert layers == {0: (4,), 1: (0, 1, 2, 3, 4), 2: (0, 2, 4), 3: (0, 3)}[interval]
    _, whole = case.ours()
    _, part = case.ours(layers)
    assert part.hidden is None
    assert torch.equal(part.keys, whole.keys[list(layers)])
    assert torch.equal(part.values, whole.values[list(layers)])


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_every_block_is_run_by_the_one_call(family):
    case, run = Case(family, 2, 4, 1, 1, False), []
    plain = case.backbone.call_block

    def noted(work, block, *inputs, **settings):
        run.append(block)
        return plain(work, block, *inputs, **settings)

    case.backbone.call_block = noted
    case.ours()
    assert run == case.backbone.blocks
    assert len(run) == len(set(map(id, run))) > 5


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_a_picture_seen_before_is_as_good_as_seen_again(family):
    case = Case(family, 3, 5, 3, 1, False)
    together = case.backbone.vision(case.pixels)
    for index, picture in enumerate(case.pixels):
        alone = case.backbone.vision(picture[None])[0]
        assert torch.equal(alone, case.backbone.vision(picture[None].clone())[0])
        assert relative(alone, together[index]) < 1e-5
    # The cached tokens of a picture do not depend on what stands beside it in the prompt.
    _, fresh = case.ours()
    parts = [case.backbone.vision(picture[None]) for picture in case.pixels]
    cached = case.backbone.prefill(case.ids, torch.cat(parts, 1), case.valid)
    assert relative(cached.keys, fresh.keys) < 1e-5


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_decoding_is_one_longer_pass(family):
    case = Case(family, 2, 4, 3, 1, True)
    prompt = case.config.prompt_tokens
    seen, whole = case.ours()
    start = case.backbone.prefill(
        case.ids[:, :prompt], seen.reshape(1, -1, seen.shape[-1]), case.valid[:, :prompt]
    )
    keys, values = (
        torch.nn.functional.pad(part, (0, 0, 0, ANSWER)) for part in (start.keys, start.values)
    )
    valid = case.valid.clone()
    valid[:, prompt:] = 0.0
    for at in range(prompt, prompt + ANSWER):
        token = case.ids[:, at : at + 1]
        found = case.backbone.decode(token, torch.tensor([at]), keys, values, valid)
        keys[..., at : at + 1, :], values[..., at : at + 1, :] = found.keys, found.values
        valid[:, at] = 1.0
        assert relative(found.hidden[:, 0], whole.hidden[:, at]) < LIMIT


def test_every_family_of_the_settings_has_a_backbone_and_marks():
    assert set(model_config.FAMILIES) == set(BACKBONES) == set(MARKS) == set(FAMILIES)
