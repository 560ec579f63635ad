"""Nothing of a model directory is read before all of it is known to be what was written."""

import json
import os

import pytest

from spanvla_ros.model.checkpoint import load_model_dir, verify, write_manifest
from spanvla_ros.model.config import ModelConfig, dump_config
from spanvla_ros.types import SpanvlaError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / 'model'
    (folder / 'backbone').mkdir(parents=True)
    (folder / 'config.yaml').write_text(dump_config(ModelConfig(name='x')))
    (folder / 'backbone' / 'config.json').write_text('{}')
    (folder / 'expert.safetensors').write_bytes(b'weights')
    write_manifest(folder, training={'steps': 3}, scores={'ade_m': 1.5})
    return folder


def edit(folder, change):
    content = json.loads((folder / 'manifest.json').read_text())
    change(content)
    (folder / 'manifest.json').write_text(json.dumps(content))


def test_a_written_directory_loads(model):
    directory = load_model_dir(model)
    assert directory.config.name == 'x'
    assert directory.training == {'steps': 3}
    assert directory.scores == {'ade_m': 1.5}
    assert directory.file('expert.safetensors').read_bytes() == b'weights'
    assert not directory.has_graphs
    assert sorted(p.name for p in model.iterdir()) == [
        'backbone', 'config.yaml', 'expert.safetensors', 'manifest.json',
    ]  # fmt: skip


def test_notes_and_scores_do_not_rename_the_model_but_weights_do(model):
    before = load_model_dir(model).sha256
    assert write_manifest(model, scores={'ade_m': 1.4}) == before
    assert load_model_dir(model).training == {'steps': 3}
    (model / 'expert.safetensors').write_bytes(b'other')
    assert write_manifest(model) != before


def test_any_changed_byte_is_noticed_before_parsing(model):
    (model / 'config.yaml').write_text('a: [')
    with pytest.raises(SpanvlaError, match=r'config\.yaml differs'):
        load_model_dir(model)


def test_missing_and_unlisted_files_are_named(model):
    (model / 'extra.json').write_text('{}')
    with pytest.raises(SpanvlaError, match=r'extra\.json is not in'):
        verify(model)
    (model / 'extra.json').unlink()
    (model / 'expert.safetensors').unlink()
    with pytest.raises(SpanvlaError, match=r'expert\.safetensors is missing'):
        verify(model)


def test_engines_are_not_part_of_the_exchange(model):
    (model / 'engines').mkdir()
    (model / 'engines' / 'step.plan').write_bytes(b'built here')
    assert load_model_dir(model).files.keys() == {
        'config.yaml', 'backbone/config.json', 'expert.safetensors',
    }  # fmt: skip


@pytest.mark.parametrize('where', ['expert.safetensors', 'backbone', 'engines'])
def test_links_are_refused(model, tmp_path, where):
    target = tmp_path / 'elsewhere'
    if (model / where).exists():
        (model / where).rename(target)
    else:
        target.mkdir()
    (model / where).symlink_to(target)
    with pytest.raises(SpanvlaError, match='symbolic link'):
        verify(model)


@pytest.mark.parametrize('name', ['../secret.json', '/etc/x.json', 'a/../../b.json', 'a\\b.json'])
def test_paths_out_of_the_directory_are_refused(model, name):
    edit(model, lambda content: content['files'].update({name: '0' * 64}))
    with pytest.raises(SpanvlaError, match='refused'):
        verify(model)


@pytest.mark.parametrize('name', ['weights.pkl', 'weights.pt', 'weights.bin', 'setup.py', 'run'])
def test_files_that_can_run_are_refused_on_both_ends(model, name):
    (model / name).write_bytes(b'x')
    with pytest.raises(SpanvlaError, match='not allowed'):
        write_manifest(model)
    edit(model, lambda content: content['files'].update({name: '0' * 64}))
    with pytest.raises(SpanvlaError, match='not allowed'):
        verify(model)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda c: c.update(manifest_version=9), 'manifest_version'),
        (lambda c: c.update(files=[]), 'no files'),
        (lambda c: c.update(training=3), 'training'),
        (lambda c: c['files'].update({'config.yaml': 5}), 'sha256'),
        (lambda c: c.update(training={'stages': 3}), 'stages'),
        (lambda c: c.update(training={'stages': ['sft']}), 'stages'),
        (lambda c: c.update(training={'stages': [{'settings': None}]}), 'stages'),
    ],
)
def test_odd_manifests_are_refused(model, change, words):
    edit(model, change)
    with pytest.raises(SpanvlaError, match=words):
        verify(model)


def test_no_manifest_no_directory_no_json(model, tmp_path):
    with pytest.raises(SpanvlaError, match='no model directory'):
        load_model_dir(tmp_path / 'nowhere')
    for content in (b'{', b'', b'\xff', b'[]', b'[' * 100_000):
        (model / 'manifest.json').write_bytes(content)
        with pytest.raises(SpanvlaError, match='JSON'):
            verify(model)
    (model / 'manifest.json').unlink()
    with pytest.raises(SpanvlaError, match='missing'):
        verify(model)


def test_special_files_are_refused(model):
    os.mkfifo(model / 'pipe.json')
    with pytest.raises(SpanvlaError, match='not a plain file'):
        verify(model)
