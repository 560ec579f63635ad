"""From a Hugging Face folder of each family to plans on ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('onnxscript')

from random_rows import random_rows, write_shards  # noqa: E402
from tiny_folders import FAMILIES, write_folder  # noqa: E402

from spanvla_ros.cli import main  # noqa: E402
from spanvla_ros.model.backbone.adapters import (  # noqa: E402
    adapter_layers,
    load_adapters,
    merge_adapters,
)
from spanvla_ros.model.checkpoint import load_model_dir  # noqa: E402
from spanvla_ros.model.flow import load_normalization  # noqa: E402
from spanvla_ros.model.policy import load_policy, policy_from_folder  # noqa: E402
from spanvla_ros.runtime.planner import Planner  # noqa: E402


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('data') / 'scenes', 60, 1)


def train(folder, out, data, *overrides, resume=False):
    """Two steps of SFT by the command line."""
    settings = out.with_suffix('.yaml')
    settings.write_text('steps: 2\nbatch: 4\nauxiliary_weight: 0.0\n')
    arguments = ['train', 'sft', '--config', str(settings), '--init', str(folder)]
    arguments += ['--out', str(out), '--set', f'data={data}']
    arguments += ['--resume'] if resume else []
    for override in overrides:
        arguments += ['--set', override]
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_a_folder_is_trained_exported_and_plans(family, shards, tmp_path, capfd):
    folder = write_folder(tmp_path / 'folder', family)
    assert train(folder, tmp_path / 'run', shards) == 0
    model = tmp_path / 'run/model'
    assert load_model_dir(model).config.family == family
    assert main(['export', '--model', str(model), '--out', str(tmp_path / 'shipped')]) == 0
    capfd.readouterr()
    onnx, yardstick = (
        Planner.open(tmp_path / 'shipped', name, schedule='concurrent')
        for name in ('onnxruntime', 'torch')
    )
    seen = [replace(row.sample.observation, reasoning='') for row in random_rows(2, 5)]
    ends = []
    for observation in seen:
        onnx.reset()
        yardstick.reset()
        ours, theirs = (engine.plan(observation) for engine in (onnx, yardstick))
        np.testing.assert_allclose(ours.trajectory.poses, theirs.trajectory.poses, atol=1e-3)
        ends.append(ours.trajectory.poses[-1])
    assert not np.allclose(*ends, atol=0.5)
    # Pictures that were seen before come from the cache, and give the very same plan.
    encoded = onnx.pictures_encoded
    again = onnx.plan(seen[-1])
    assert onnx.pictures_encoded == encoded
    assert np.array_equal(again.trajectory.poses, ours.trajectory.poses)
    said = onnx.reason_slice(budget_ms=float('inf'))
    while said is None:
        said = onnx.reason_slice(budget_ms=float('inf'))
    assert said.thinking in ('slow', 'fast')
    normalization = load_normalization(tmp_path / 'shipped', onnx.config)
    sequential = Planner(onnx.backend, onnx.layout, normalization, schedule='sequential')
    assert np.isfinite(sequential.plan(seen[0]).trajectory.poses).all()


@pytest.mark.slow
def test_a_folder_starts_a_run_with_its_own_settings(shards, tmp_path, capfd):
    folder = write_folder(tmp_path / 'folder', 'internvl')
    settings = tmp_path / 'model.yaml'
    settings.write_text('name: mine\nfamily: internvl\ninterval: 0\nexpert_width: 48\n')
    assert train(folder, tmp_path / 'run', shards, f'model_config={settings}') == 0
    config = load_model_dir(tmp_path / 'run/model').config
    assert (config.name, config.interval, config.expert_width) == ('mine', 0, 48)
    notes = json.loads((tmp_path / 'run/model/manifest.json').read_text())
    assert [stage['stage'] for stage in notes['training']['stages']] == ['sft']
    settings.write_text('family: qwen2_5_vl\n')
    assert train(folder, tmp_path / 'other', shards, f'model_config={settings}') == 2
    assert 'is internvl with patch_px 14' in capfd.readouterr().err


def test_picture_targets_of_other_visual_tokens_are_refused(shards, tmp_path, capfd):
    folder = write_folder(tmp_path / 'folder', 'smolvlm')
    assert train(folder, tmp_path / 'run', shards, 'auxiliary_weight=0.5') == 2
    assert 'add --set auxiliary_weight=0' in capfd.readouterr().err


@pytest.mark.slow
def test_adapters_train_in_place_of_the_backbone_and_a_run_goes_on(shards, tmp_path, capfd):
    folder = write_folder(tmp_path / 'folder', 'internvl')
    lora = ('lora_rank=2', 'lora_embeddings=false', 'stop_after=1', 'detach_bridge=false')
    assert train(folder, tmp_path / 'run', shards, *lora) == 0
    assert train(folder, tmp_path / 'run', shards, *lora[:2], *lora[3:], resume=True) == 0
    assert train(folder, tmp_path / 'whole', shards, *lora[:2], *lora[3:]) == 0
    capfd.readouterr()
    ours, theirs = (
        (tmp_path / run / 'state/weights.safetensors').read_bytes() for run in ('run', 'whole')
    )
    assert ours == theirs
    # The model directory holds the merged weights: base of the folder, adapters of the run.
    merged = load_policy(tmp_path / 'run/model').backbone.network
    start = policy_from_folder(folder).backbone.network
    load_adapters(start, tmp_path / 'run/adapters')
    adapters = adapter_layers(start).values()
    assert sum(bool(layer.lora_B['default'].weight.any()) for layer in adapters) == 5 * 4
    merge_adapters(start)
    weights = dict(merged.named_parameters())
    for name, weight in start.named_parameters():
        torch.testing.assert_close(weights[name], weight, msg=name)
