"""Many processes, sharded weights, recomputed blocks: all end where one plain process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.checkpoint import read_tensors  # noqa: E402
from spanvla_ros.model.config import ModelConfig, load_config  # noqa: E402
from spanvla_ros.model.policy import new_policy  # noqa: E402
from spanvla_ros.training.batches import make_batch  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.loop import fit_targets, prepare_device  # noqa: E402
from spanvla_ros.training.parallel import Group, launched  # noqa: E402
from spanvla_ros.training.settings import TrainSettings, load_settings  # noqa: E402
from spanvla_ros.training.sharding import recompute_blocks  # noqa: E402
from spanvla_ros.training.stages import grpo, sft  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

ROOT = Path(__file__).parents[2]
# Nothing is drawn, and every row counts as much as any other, whichever process has it.
SMALL = (
    'minutes=0', 'steps=3', 'batch=4', 'compiled=false', "heldout=''", 'camera_drop=0',
    'history_drop=0', 'route_drop=0', 'route_noise_m=0', 'history_noise_m=0', 'slot_empty=1',
    'slot_foreign=0', 'reasoning_weight=0', 'flow_weight=0',
)  # fmt: skip
LAUNCH = {'RANK': '1', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'node0', 'LOCAL_RANK': '1'}


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('scale') / 'train', 40, 0)


@pytest.fixture
def launcher(monkeypatch):
    for name, value in {**LAUNCH, 'LOCAL_WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def words(out, shards, *settings, resume=False):
    found = ['train', 'sft', '--config', str(ROOT / 'config/train/sft.yaml'), '--out', str(out)]
    found += ['--resume'] if resume else []
    for setting in (*SMALL, f'data={shards}', *settings):
        found += ['--set', setting]
    return found


def launch(arguments):
    """The command under torchrun, two processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
    command += ['--master-addr', '127.0.0.1', '--master-port', str(port)]
    command += ['-m', 'spanvla_ros.cli', *arguments]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr


def assert_same(one, other, within):
    for file in ('weights', 'optimizer'):
        first, second = (read_tensors(run / f'state/{file}.safetensors') for run in (one, other))
        assert set(first) == set(second)
        for name, array in first.items():
            np.testing.assert_allclose(array, second[name], rtol=0, atol=within, err_msg=name)


@pytest.mark.slow
def test_two_launched_processes_end_where_one_does_and_go_on_bit_for_bit(shards, tmp_path, capfd):
    assert cli.main(words(tmp_path / 'one', shards, 'processes=1')) == 0
    launch(words(tmp_path / 'two', shards))
    assert_same(tmp_path / 'one', tmp_path / 'two', 1e-5)
    launch(words(tmp_path / 'cut', shards, 'stop_after=2'))
    launch(words(tmp_path / 'cut', shards, resume=True))
    assert_same(tmp_path / 'two', tmp_path / 'cut', 0.0)
    capfd.readouterr()


@pytest.mark.slow
def test_sharded_weights_take_the_same_steps_and_go_on_whole(shards, tmp_path, capfd):
    assert cli.main(words(tmp_path / 'one', shards, 'processes=1')) == 0
    sharded = ('sharding=fsdp', 'gradient_checkpointing=true', f'heldout={shards}',
               'heldout_rows=6', 'evaluate_every_s=0')  # fmt: skip
    launch(words(tmp_path / 'two', shards, *sharded, 'stop_after=2'))
    launch(words(tmp_path / 'two', shards, *sharded, resume=True))
    assert_same(tmp_path / 'one', tmp_path / 'two', 1e-5)
    log = (tmp_path / 'two/log.jsonl').read_text().splitlines()
    assert len(log) == 3
    assert all('ade_m' in line for line in log)
    # The state is whole: a process alone goes on from it.
    assert cli.main(words(tmp_path / 'two', shards, 'processes=1', 'steps=4', resume=True)) == 0
    capfd.readouterr()


def test_the_launcher_tells_the_place_of_a_process(launcher):
    assert launched() == Group(1, 4, 1, 2)
    launcher.setenv('LOCAL_RANK', '2')
    with pytest.raises(SpanvlaError, match='contradict one another'):
        launched()
    launcher.setenv('RANK', 'first')
    with pytest.raises(SpanvlaError, match='not all numbers'):
        launched()
    launcher.delenv('MASTER_ADDR')
    assert launched() is None


@pytest.mark.parametrize('asked', [['--processes', '3'], ['--set', 'processes=3']])
def test_a_number_of_processes_beside_the_launchers_is_refused(
    launcher, shards, tmp_path, capfd, asked
):
    assert cli.main([*words(tmp_path / 'run', shards), *asked]) == 2
    said = capfd.readouterr().err
    assert '3 processes are asked for where the launcher has started 4' in said
    assert said.count('\n') == 1


def test_a_batch_must_divide_among_the_launched(launcher, shards, tmp_path, capfd):
    assert cli.main(words(tmp_path / 'run', shards, 'batch=6')) == 2
    assert 'batch 6 does not divide among 4 processes' in capfd.readouterr().err


def test_each_machine_needs_a_gpu_for_each_of_its_own_processes(monkeypatch):
    settings = TrainSettings(steps=1, device='cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    try:
        assert prepare_device(settings, Group(5, 8, 1, 2)) == torch.device('cuda', 1)
    finally:
        torch.set_float32_matmul_precision('highest')
    with pytest.raises(SpanvlaError, match='4 processes on device cuda need as many GPUs'):
        prepare_device(settings, Group(5, 8, 1, 4))


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        (('sharding=zero',), 'sharding must be one of none, fsdp'),
        (('sharding=fsdp',), 'needs processes of 2 or more'),
        (('gradient_checkpointing=true', 'compiled=true'), 'compiled goes with neither'),
    ],
)
def test_settings_that_do_not_go_together(shards, tmp_path, capfd, settings, sentence):
    assert cli.main(words(tmp_path / 'run', shards, 'processes=1', *settings)) == 2
    assert sentence in capfd.readouterr().err


@pytest.fixture(scope='module')
def policy(shards):
    policy = new_policy(ModelConfig(), seed=0)
    fit_targets(policy, ShardSet(shards))
    policy.expert.velocity.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return policy


def gradients(policy, stage, settings):
    batch = make_batch(random_rows(2, 5), policy, settings, np.random.default_rng(0), 'full')
    policy.zero_grad()
    found = stage.losses(policy, batch, settings, torch.Generator().manual_seed(0))
    torch.stack([loss for loss in found.values() if loss.requires_grad]).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('stage', [sft, grpo], ids=['sft', 'grpo'])
def test_recomputed_blocks_have_the_same_gradients(policy, monkeypatch, stage):
    weights = {'reward_epdms': 0.0, 'reward_goal': 1.0, 'reward_format': 0.5}
    settings = TrainSettings(steps=1, batch=2, group=3, draws=2, detach_bridge=False, **weights)
    backbone = policy.backbone
    plain = gradients(policy, stage, settings)
    real, run = backbone._decode_layer, []

    def counted(*arguments):
        run.append(torch.is_grad_enabled())
        return real(*arguments)

    monkeypatch.setattr(backbone, 'call_block', backbone.call_block)
    monkeypatch.setattr(backbone, '_decode_layer', counted)
    recompute_blocks(policy)
    again = gradients(policy, stage, settings)
    passes = 1 if stage is sft else 2
    assert sum(run) == 2 * passes * backbone.layers
    assert set(again) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    policy.zero_grad()


def test_eyes_of_rate_zero_are_not_trained(policy):
    settings = TrainSettings(steps=1, vision_rate=0.0)
    trained = {id(p) for part in sft.parts(policy, settings) for p in part.parameters()}
    eyes = {id(p) for part in policy.backbone.eyes for p in part.parameters()}
    everything = {id(p) for p in policy.parameters()}
    assert trained == everything - eyes
    whole = sft.parts(policy, replace(settings, vision_rate=0.5))
    assert {id(p) for part in whole for p in part.parameters()} == everything


@pytest.mark.parametrize('name', ['sft', 'action_expert', 'grpo'])
def test_the_settings_for_a_3b_model_on_eight_gpus_are_valid(name):
    settings = load_settings(ROOT / f'config/train/3b/{name}.yaml')
    assert (settings.device, settings.processes, settings.precision) == ('cuda', 8, 'bf16')
    if name == 'sft':
        config = load_config(ROOT / settings.model_config)
        assert (config.family, config.frames_per_camera) == ('qwen2_5_vl', 4)
        assert settings.sharding == 'fsdp'
    if name == 'grpo':
        assert (settings.group, settings.lora_rank, settings.learning_rate) == (64, 8, 3e-5)
