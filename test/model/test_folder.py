"""What a Hugging Face folder must hold, each fault refused with one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_folders import FAMILIES, write_folder  # noqa: E402

from spanvla_ros.model.backbone.folder import check_folder, load_network  # noqa: E402
from spanvla_ros.model.config import ModelConfig, with_settings  # noqa: E402
from spanvla_ros.model.policy import policy_from_folder  # noqa: E402
from spanvla_ros.model.prompt import NUMBER_MARK, number_word  # noqa: E402
from spanvla_ros.types import EgoState, Observation, SpanvlaError  # noqa: E402


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp('folders')
    return {family: write_folder(top / family, family) for family in FAMILIES}


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders['qwen2_5_vl'], tmp_path / 'folder')


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder):
    """The weights as two shards with an index, as large models come."""
    tensors = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(tensors)
    half = len(names) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f'model-0000{number}-of-00002.safetensors'
        save_file({name: tensors[name] for name in part}, folder / file, {'format': 'pt'})
        index |= dict.fromkeys(part, file)
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {}, 'weight_map': index})
    )
    return index


@pytest.mark.parametrize('family', FAMILIES)
def test_a_whole_folder_passes_by_its_own_model_type(folders, family):
    assert check_folder(folders[family]) == family


def test_shards_are_read_and_equal_the_single_file(folders, folder):
    shard(folder)
    theirs = dict(load_network(folders['qwen2_5_vl']).named_parameters())
    for name, weight in load_network(folder).named_parameters():
        assert torch.equal(weight, theirs[name])


def test_released_qwen_checkpoints_name_their_parts_otherwise_and_still_load(folders, folder):
    """On the hub, layers are `model.layers...` and `visual...`, text settings lie flat."""
    path = folder / 'model.safetensors'
    renamed = {
        name.replace('model.language_model.', 'model.').replace('model.visual.', 'visual.'): value
        for name, value in load_file(path).items()
    }
    save_file(renamed, path, {'format': 'pt'})
    content = json.loads((folder / 'config.json').read_text())
    text = content.pop('text_config')
    text.pop('model_type')
    (folder / 'config.json').write_text(json.dumps({**text, **content}))
    theirs = dict(load_network(folders['qwen2_5_vl']).named_parameters())
    for name, weight in load_network(folder).named_parameters():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'model.safetensors'])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SpanvlaError, match=f'holds no {name}'):
        check_folder(folder)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'weights.pt', 'last.ckpt'])
def test_pickles_are_refused(folder, name):
    (folder / name).write_bytes(b'\x80\x04.')
    with pytest.raises(SpanvlaError, match=f'{name} is a pickle'):
        check_folder(folder)


@pytest.mark.parametrize('place', ['../stolen.safetensors', '/etc/passwd', 'a\\b.safetensors'])
def test_an_index_that_points_outside_is_refused(folder, place):
    index = shard(folder)
    index[next(iter(index))] = place
    edit_json(folder / 'model.safetensors.index.json', weight_map=index)
    with pytest.raises(SpanvlaError, match='outside the folder; refused'):
        check_folder(folder)


def test_a_missing_or_pickled_shard_is_refused(folder):
    index = shard(folder)
    (folder / index[min(index)]).unlink()
    with pytest.raises(SpanvlaError, match=r'shard model-00001\S+ is missing'):
        check_folder(folder)
    index = dict.fromkeys(index, 'shard.bin')
    edit_json(folder / 'model.safetensors.index.json', weight_map=index)
    with pytest.raises(SpanvlaError, match='no safetensors; refused'):
        check_folder(folder)


def test_another_vocabulary_than_the_configuration_says_is_refused(folder, folders, tmp_path):
    content = json.loads((folder / 'config.json').read_text())
    for vocabulary, sentence in ((100, 'has token 419'), (500, 'has 432 token vectors')):
        content['text_config']['vocab_size'] = vocabulary
        (folder / 'config.json').write_text(json.dumps(content))
        with pytest.raises(SpanvlaError, match=sentence):
            check_folder(folder)
    other = shutil.copytree(folders['qwen2_5_vl'], tmp_path / 'other')
    edit_json(other / 'config.json', image_token_id=7)
    with pytest.raises(SpanvlaError, match=r'image_pad\|> is token \d+ in .* and 7 in'):
        check_folder(other)


def test_weights_that_are_broken_or_not_all_there_are_refused(folder):
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    name = next(name for name in tensors if 'k_proj.weight' in name)
    save_file({k: v for k, v in tensors.items() if k != name}, path, {'format': 'pt'})
    with pytest.raises(SpanvlaError, match=r'its weights lack .*k_proj\.weight'):
        load_network(folder)
    path.write_bytes(b'no tensors at all')
    with pytest.raises(SpanvlaError, match='not readable as safetensors'):
        check_folder(folder)


def test_unknown_models_and_other_pixels_are_refused(folder):
    (folder / 'preprocessor_config.json').write_text(json.dumps({'image_mean': [0.5, 0.5, 0.5]}))
    with pytest.raises(SpanvlaError, match='image_mean'):
        check_folder(folder)
    edit_json(folder / 'config.json', model_type='mamba')
    with pytest.raises(SpanvlaError, match="model_type is 'mamba'; known backbones are"):
        check_folder(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(SpanvlaError, match='not valid JSON'):
        check_folder(folder)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_new_words_are_one_token_each_with_vectors_like_the_known_ones(folders, family):
    theirs = load_network(folders[family])
    known = theirs.get_input_embeddings().weight.detach()[:420]
    policy = policy_from_folder(folders[family])
    layout, network = policy.layout, policy.backbone.network
    table = network.get_input_embeddings().weight.detach()
    assert torch.equal(table[:420], known)
    assert network.config.get_text_config().vocab_size == len(table) == 1088
    assert network.lm_head.weight.shape == table.shape
    assert (network.lm_head.weight is network.get_input_embeddings().weight) == (
        theirs.lm_head.weight is theirs.get_input_embeddings().weight
    )
    assert 0.8 < float(table[420:].std() / known.std()) < 1.2
    text = 'speed ' + ' '.join(NUMBER_MARK.format(number_word(v)) for v in (-80, 0, 12.5, 99.5))
    words = layout.tokenizer.encode(' '.join(['x', text]), add_special_tokens=False).ids
    said = ['<num_-80>', '<num_0>', '<num_12.5>', '<num_99.5>']
    assert [layout.tokenizer.id_to_token(index) for index in words[-4:]] == said
    ids = [layout.tokenizer.token_to_id(NUMBER_MARK.format(n)) for n in ('10', '10.5', '40')]
    middle = known.mean(0)
    ten, near, far = (table[index] - middle for index in ids)
    assert float(ten @ near) > float(ten @ far) + 0.2 * float(ten @ ten)
    # The reasoning comes back word for word through the pretrained tokenizer.
    said = 'lead vehicle 15 m braking ; decelerate , keep lane'
    answer = layout.encode_answer(said, 'slow', [3, 200])
    assert layout.decode_answer(answer.tolist()) == said
    assert layout.decode_actions(answer.tolist()) == [3, 200]
    allowed = layout.reasoning_mask(len(table))
    assert not allowed[ids].any()
    assert not allowed[layout.action_ids].any()
    assert allowed[layout.tokenizer.encode('lead vehicle 15').ids].all()


@pytest.mark.parametrize('family', FAMILIES)
def test_every_prompt_fits_exactly_and_pictures_stand_between_the_familys_marks(folders, family):
    layout = policy_from_folder(folders[family]).layout
    assert layout.spare_tokens() == 0
    config = layout.config
    poses = np.full((config.history_poses, 3), -7.5)
    for route in (None, np.full((config.route_points, 2), 33.0)):
        for command in ('follow', 'straight'):
            frames = tuple((None,) for _ in config.cameras)
            ego = EgoState(0, 0.0, 0.0, 0.0, 7.7, -3.1)
            seen = Observation(
                0, frames, ego, poses, np.array([False, True, True]), route, command, 'lead car'
            )
            ids, valid = layout.encode(seen)
            assert len(ids) == config.prompt_tokens
            assert valid[-1]
            assert not valid[layout.image_positions].any()
    before = layout.image_positions[0] - 1
    after = layout.image_positions[config.image_tokens - 1] + 1
    marks = {
        'qwen2_5_vl': ('<|vision_start|>', '<|vision_end|>'),
        'qwen3_vl': ('<|vision_start|>', '<|vision_end|>'),
        'internvl': ('<img>', '</img>'),
        'smolvlm': ('<global-img>', '<fake_token_around_image>'),
    }[family]
    assert tuple(layout.tokenizer.id_to_token(int(ids[at])) for at in (before, after)) == marks


def test_settings_that_do_not_fit_the_folder_are_refused(folders):
    with pytest.raises(SpanvlaError, match='is qwen3_vl with patch_px 16'):
        policy_from_folder(folders['qwen3_vl'], ModelConfig())
    wide = with_settings(ModelConfig(), waypoints=50, expert_width=24, interval=1)
    policy = policy_from_folder(folders['qwen2_5_vl'], wide)
    assert len(policy.expert.blocks) == 5
    assert policy.expert.blocks[0].heads == 4
    assert policy.expert.blocks[0].head_size == 16
    assert policy.expert.point.shape == (50, 24)
