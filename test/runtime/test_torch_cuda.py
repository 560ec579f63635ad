"""The torch engine for GPUs, run here on the CPU: recorded work against the plain engine.

A CUDA graph replays recorded kernels on fixed buffers without asking Python again. The stand-in
here does the same with torch's own tracer: each operator of the work, recorded once, on the very
same buffers. What a GPU adds, launching them as one, is not run.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.backbone import qwen_network  # noqa: E402
from spanvla_ros.model.config import CameraSpec, ModelConfig  # noqa: E402
from spanvla_ros.model.flow import euler, time_features  # noqa: E402
from spanvla_ros.model.policy import new_policy  # noqa: E402
from spanvla_ros.model.prompt import build_tokenizer, prompt_length  # noqa: E402
from spanvla_ros.runtime.backend import DeviceBackend  # noqa: E402
from spanvla_ros.runtime.roofline import Ceiling  # noqa: E402
from spanvla_ros.runtime.torch_ import TorchBackend  # noqa: E402
from spanvla_ros.runtime.torch_bench import SizeBench  # noqa: E402
from spanvla_ros.runtime.torch_cuda import TorchCudaBackend, align  # noqa: E402
from spanvla_ros.runtime.torch_graphs import plain  # noqa: E402
from spanvla_ros.runtime.torch_measure import eyes_weights, work_of_call  # noqa: E402
from spanvla_ros.runtime.torch_sizes import SIZES, Answer, Frame, sized_policies  # noqa: E402
from spanvla_ros.runtime.torch_table import table  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

CPU = torch.device('cpu')


def traced(work):
    """Operators recorded once and replayed on the same buffers, outputs at fixed addresses."""
    operators = make_fx(work)()
    outputs = operators()

    def replay():
        for kept, new in zip(outputs, operators(), strict=True):
            kept.copy_(new)

    return outputs, replay


@pytest.fixture(scope='module')
def policy():
    cameras = (CameraSpec('front', 84, 56, 60.0, 1.5, 0.0, 1.5, 0.0),)
    config = replace(ModelConfig(), cameras=cameras, answer_tokens=8)
    config = replace(config, prompt_tokens=prompt_length(config, build_tokenizer()))
    made = new_policy(config, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.expert.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return made


@pytest.fixture(scope='module', params=[plain, pytest.param(traced, marks=pytest.mark.slow)])
def engines(request, policy):
    return TorchBackend(policy), TorchCudaBackend(policy, device='cpu', record=request.param)


def inputs(config, hidden, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 100, (1, config.prompt_tokens))
    embeds = rng.standard_normal((config.image_tokens, hidden), np.float32)
    valid = (rng.random((1, config.prompt_tokens)) < 0.9).astype(np.float32)
    valid[0, 0] = 1.0
    return ids, embeds, valid


def test_recorded_graphs_follow_their_inputs_as_the_plain_engine_does(engines, policy):
    plain_engine, recorded = engines
    config, hidden = policy.config, policy.backbone.hidden
    rng = np.random.default_rng(0)
    for seed in range(3):
        pixels = rng.random((1, 3, config.height_px, config.width_px), np.float32)
        np.testing.assert_allclose(recorded.vision(pixels), plain_engine.vision(pixels), atol=1e-5)
        prompt = inputs(config, hidden, seed)
        for graph in ('prefill_action', 'prefill_reason'):
            found, wanted = (
                getattr(recorded, graph)(*prompt),
                getattr(plain_engine, graph)(*prompt),
            )
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert recorded.refused == {}
    assert recorded.name == 'torch-cuda'


@pytest.mark.parametrize('steps', [1, 3])
def test_a_flow_on_the_device_is_the_euler_loop_of_the_plain_engine(engines, policy, steps):
    plain_engine, recorded = engines
    config = policy.config
    assert isinstance(recorded, DeviceBackend)
    rng = np.random.default_rng(1)
    room = config.answer_room
    for seed in range(3):
        ids, embeds, valid = inputs(config, policy.backbone.hidden, seed)
        ego = rng.standard_normal((1, 20), np.float32)
        start = rng.standard_normal((1, config.waypoints, 3), np.float32)
        pairs = ((0, 0),) * 3
        keys, values = (
            np.pad(part, (*pairs, (0, room), (0, 0)))
            for part in plain_engine.prefill_action(ids, embeds, valid)
        )
        seen = np.pad(valid, ((0, 0), (0, room)))

        def velocity(x, at, ego=ego, keys=keys, values=values, seen=seen):
            return plain_engine.step(x, time_features(at)[None], ego, keys, values, seen)

        wanted = euler(velocity, start, steps)
        cache = recorded.condition(ids, embeds, valid)
        np.testing.assert_allclose(recorded.flow(start, ego, cache, steps), wanted, atol=1e-4)
    recorded.condition(ids, embeds, valid)
    with pytest.raises(SpanvlaError, match='condition again'):
        recorded.flow(start, ego, cache, steps)


def test_decoding_keeps_its_cache_in_place_from_token_to_token(engines, policy):
    plain_engine, recorded = engines
    config = policy.config
    prompt = inputs(config, policy.backbone.hidden, 5)
    for episode in range(2):
        keys, values, _ = plain_engine.prefill_reason(*prompt)
        room = ((0, 0),) * 3 + ((0, config.answer_room), (0, 0))
        keys, values = np.pad(keys, room), np.pad(values, room)
        seen = np.pad(prompt[2], ((0, 0), (0, config.answer_room)))
        for index in range(4):
            at = config.prompt_tokens + index
            asked = np.array([[7 + index + episode]]), np.array([at]), keys, values, seen
            wanted, found = plain_engine.decode(*asked), recorded.decode(*asked)
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)
            keys[:, :, :, at], values[:, :, :, at] = wanted[1][..., 0, :], wanted[2][..., 0, :]
            seen[0, at] = 1.0


def test_what_cannot_be_recorded_runs_plainly_and_says_why(policy, caplog):
    def refuses(_work):
        raise RuntimeError('operation not permitted when stream is capturing\nmore')

    engine = TorchCudaBackend(policy, device='cpu', record=refuses)
    pixels = np.full((1, 3, policy.config.height_px, policy.config.width_px), 0.5, np.float32)
    with caplog.at_level(logging.WARNING):
        first = engine.vision(pixels)
    np.testing.assert_allclose(first, TorchBackend(policy).vision(pixels), atol=1e-5)
    assert 'not permitted when stream is capturing' in engine.refused['vision']
    assert 'vision: no CUDA graph' in caplog.text


@pytest.mark.parametrize(('precision', 'apart'), [('fp16', 5e-3), ('bf16', 5e-2)])
def test_lower_precision_stays_near(policy, precision, apart):
    engine = TorchCudaBackend(policy, precision, device='cpu', record=plain)
    pixels = np.random.default_rng(0).random((1, 3, 56, 84), np.float32)
    found, wanted = engine.vision(pixels), TorchBackend(policy).vision(pixels)
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < apart


def test_a_policy_handed_over_is_left_as_it_was(policy):
    TorchCudaBackend(policy, 'bf16', device='cpu', record=plain)
    assert policy.expert.point.dtype == torch.float32


def test_without_a_gpu_the_engine_says_so(policy):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(SpanvlaError, match='no GPU'):
        TorchCudaBackend(policy)
    with pytest.raises(SpanvlaError, match='fp32, fp16, bf16'):
        TorchCudaBackend(policy, 'int3', device='cpu')


@torch.no_grad()
def test_an_aligned_layer_is_the_same_function():
    network = sized_policies(SIZES['tiny'], CPU, 'fp32')[0].backbone.network
    mlp = network.model.visual.blocks[0].mlp
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    mlp.up_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    before = mlp(x)
    align(mlp, 64)
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features) == (64, 64)
    torch.testing.assert_close(mlp(x), before)


def test_the_3b_size_is_the_published_one():
    size = SIZES['3b']
    special = build_tokenizer(size.config.action_tokens).get_vocab(with_added_tokens=True)
    with torch.device('meta'):
        network = qwen_network(size.text, size.vision, special)
    # The number of parameters in the index of the published Qwen2.5-VL-3B, head tied.
    assert sum(weight.numel() for weight in network.parameters()) == 3_754_622_976
    config = size.config
    grids = len(config.cameras) * config.frames_per_camera
    assert (grids * config.image_tokens, config.prompt_tokens) == (840, 1000)
    assert len(range(0, size.text['num_hidden_layers'], config.interval)) == 12


@pytest.fixture(scope='module')
def tiny():
    with torch.no_grad():
        return Frame(sized_policies(SIZES['tiny'], CPU, 'fp32')[0], CPU)


@torch.no_grad()
def test_the_work_of_vision_is_counted_by_hand(tiny):
    # Six grids of 4 x 6 patches, width 32, inner width 52, one window of 24 a picture; 2 blocks.
    patches, width = 6 * 24, 32
    block = 4 * width * width + 3 * width * 52
    attention = 2 * 24 * width
    merger = (128 * 128 + 128 * 64) / 4
    products = patches * (588 * width + 2 * (block + attention) + merger)
    work = work_of_call(tiny.see, eyes_weights(tiny.policy), [tiny.embeds], passes=3)
    assert work.flop == 2 * products
    weights = sum(w.numel() for w in tiny.policy.backbone.network.model.visual.parameters())
    assert work.bytes == 4 * (3 * weights + 36 * 64)
    slow_memory = Ceiling(1e12, 1e6)
    assert work.floor_ms(slow_memory) == pytest.approx(work.bytes / 1e3)


@torch.no_grad()
def test_tokens_decoded_in_place_are_those_of_one_whole_pass(tiny):
    answer = Answer(tiny)
    backbone = tiny.policy.backbone
    said = [5, *(int(answer.step()[0]) for _ in range(3))]
    ids = torch.cat([tiny.ids, torch.tensor([said])], 1)
    prefix = backbone.prefill(ids, tiny.embeds, torch.ones(ids.shape))
    wanted = backbone.logits(prefix.hidden[0, -4:-1]).argmax(-1)
    assert wanted.tolist() == said[1:]
    assert torch.allclose(answer.keys[:, :, :, 160:163], prefix.keys[:, :, :, 160:163], atol=1e-5)


@torch.no_grad()
def test_tokens_decoded_at_once_see_the_cache_and_one_another(tiny):
    backbone = tiny.policy.backbone
    answer = Answer(tiny)
    ids, places = torch.tensor([[3, 4, 5]]), torch.arange(160, 163)
    found = backbone.decode(ids, places, answer.keys, answer.values, answer.seen)
    swapped = backbone.decode(ids.flip(1), places.flip(0), answer.keys, answer.values, answer.seen)
    torch.testing.assert_close(found.hidden.flip(1), swapped.hidden)
    alone = backbone.decode(ids[:, :1], places[:1], answer.keys, answer.values, answer.seen)
    assert not torch.allclose(found.hidden[:, 0], alone.hidden[:, 0], atol=1e-4)


def test_a_part_that_fails_leaves_one_line_and_the_rest(tmp_path, capsys):
    bench = SizeBench(tmp_path, 'tiny', CPU, 'fp32', 1)

    def fails():
        raise RuntimeError('CUDA out of memory.\nTried to allocate')

    bench.part('frames', 'first', fails)
    bench.part('frames', 'second', lambda: {'p50_ms': 1.0})
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['failures'] == {'frames first': 'RuntimeError: CUDA out of memory.'}
    assert summary['frames'] == {'second': {'p50_ms': 1.0}}
    assert 'CUDA out of memory' in capsys.readouterr().out


def test_a_bench_on_a_gpu_that_is_not_there_is_one_sentence(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert cli.main(['bench', '--size', '3b', '--out', str(tmp_path / 'o')]) == 2
    assert 'torch sees no GPU' in capsys.readouterr().err
    assert not (tmp_path / 'o').exists()


@pytest.mark.slow
def test_the_whole_bench_runs_at_a_tiny_size(tmp_path, capsys):
    arguments = ['bench', '--size', 'tiny', '--device', 'cpu', '--precision', 'fp32']
    arguments += ['--repeats', '1', '--compile-s', '0', '--budget', '10s']
    assert cli.main([*arguments, '--out', str(tmp_path)]) == 0
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['failures'] == {}
    assert summary['no_graph'] == {}
    assert set(summary['frames']) == {
        'deep 10 graph', 'deep 10 eager', 'short 2 graph', 'short 2 eager',
    }  # fmt: skip
    for row in summary['frames'].values():
        assert row['multiple_of_floor'] > 1.0
    floors = {name: row['graph']['floor_ms'] for name, row in summary['stages'].items()}
    assert floors['flow 10'] == pytest.approx(10 * floors['flow 1'], rel=0.2)
    assert floors['prefill short'] < floors['prefill'] < floors['prefill all layers']
    assert set(summary['graph_minus_eager'].values()) == {0.0}
    assert summary['decoders']['ratios']['AR-50']['AR-50_over_this'] == 1.0
    assert summary['shipped']['fp32 graph']['golden_difference_m'] < 1e-3
    assert summary['beside']['short 2']['tokens_per_s_beside'] > 0
    assert summary['proposal']['10000 ms']['steps'] == 10
    assert table(summary) in capsys.readouterr().out
