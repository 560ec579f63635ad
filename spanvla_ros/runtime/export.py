"""The five ONNX graphs of a model in fp32, and the proof that they match it.

All shapes are static. Weights are rounded to fp16 once; safetensors and graphs then hold the same
numbers, the graphs as fp16 initialisers with a cast that the engine folds when it loads, in one
data file that all graphs share. Tables that fp16 cannot hold exactly (rotary angles) stay fp32.
Computation is fp32.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from tqdm import tqdm

from spanvla_ros.model.action_heads import expert_draws
from spanvla_ros.model.checkpoint import (
    GRAPHS_DIR,
    load_model_dir,
    swap_directory,
    write_manifest,
    write_tensors,
)
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.expert import EGO_FEATURES
from spanvla_ros.model.flow import TIME_FEATURES, euler, time_features
from spanvla_ros.model.policy import Policy, load_policy, save_policy
from spanvla_ros.model.prompt import PromptLayout
from spanvla_ros.runtime.backend import Backend, ask_expert
from spanvla_ros.runtime.gate import check_graph
from spanvla_ros.runtime.golden import GOLDEN_FILE
from spanvla_ros.runtime.graph_files import GraphWriter
from spanvla_ros.runtime.onnx_ import INPUTS, OUTPUTS, OnnxBackend
from spanvla_ros.runtime.torch_ import TorchBackend, graph_modules
from spanvla_ros.runtime.torch_cuda import ALIGNED, align_eyes
from spanvla_ros.types import SpanvlaError

OPSET = 20
GOLDEN_CASES = 4
MAX_STATE_ERROR = 1e-3
WEIGHTS = ('fp16', 'fp32')


@dataclass(frozen=True)
class Parity:
    """Largest difference between ONNX Runtime and torch of one graph on the golden inputs."""

    graph: str
    nodes: int
    absolute: float
    relative: float
    onnx_ms: float
    torch_ms: float


@dataclass(frozen=True)
class Measured:
    """What one engine makes of all golden cases, by graph, and the end of its flow (`state`)."""

    outputs: Mapping[str, np.ndarray]
    graph_ms: Mapping[str, float]


def export_model(model_dir: Path, out: Path, weights: str = 'fp16') -> list[Parity]:
    """Write a model with graphs and golden inputs to `out`, whole or not at all.

    Args:
        model_dir: a trained model.
        out: where to; the same directory is replaced.
        weights: how they are stored, one of `WEIGHTS`; `fp16` rounds them and leaves the training
            heads out.

    Raises:
        SpanvlaError: the model is not verified or trained, a graph breaks the static rules, or
            the two engines disagree.
    """
    directory = load_model_dir(model_dir)
    policy = load_policy(model_dir)
    if policy.normalization is None:
        raise SpanvlaError(f'{model_dir}: has no normalization.json; train it first')
    building = out.with_name(f'.{out.name}.{os.getpid()}.export')
    try:
        notes = directory.training
        save_policy(policy, building, notes, shipped=weights == 'fp16', scores=directory.scores)
        # One copy of the weights at a time: of a large model two do not fit.
        del policy
        gc.collect()
        policy = load_policy(building)
        counts = _write_graphs(policy, building / GRAPHS_DIR)
        golden = golden_inputs(policy.layout)
        examples = example_inputs(policy)
        theirs = measured(TorchBackend(policy), golden, examples)
        del policy
        gc.collect()
        _write_golden({**golden, 'state': theirs.outputs['state'][:, 0]}, building)
        write_manifest(building)
        ours = measured(OnnxBackend(load_model_dir(building)), golden, examples)
        report = compared(ours, theirs, counts)
        if (model_dir / 'engines').is_dir() and out.resolve() == model_dir.resolve():
            shutil.copytree(model_dir / 'engines', building / 'engines')
        swap_directory(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return report


def _write_graphs(policy: Policy, folder: Path) -> dict[str, int]:
    examples = example_inputs(policy)
    writer = GraphWriter(folder)
    counts: dict[str, int] = {}
    align_eyes(policy, ALIGNED)
    for name, module in tqdm(graph_modules(policy).items(), desc='graphs', unit='graph'):
        counts[name] = writer.write(name, trace(module, name, examples[name]))
        check_graph(folder / f'{name}.onnx')
    return counts


def trace(module: nn.Module, name: str, examples: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """One graph as an ONNX model with its weights inside."""
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            module,
            examples,
            input_names=list(INPUTS[name]),
            output_names=list(OUTPUTS[name]),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    # Traces name source files of the machine; a shipped graph has no use for them.
    for node in model.graph.node:
        node.ClearField('doc_string')
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    return model


def _states(config: ModelConfig) -> tuple[int, ...]:
    """Shape of the states in one question to the expert, axes left out."""
    if config.expert_graph == 'step':
        return (config.waypoints,)
    return expert_draws(config), config.waypoints


def example_inputs(policy: Policy) -> dict[str, tuple[torch.Tensor, ...]]:
    """Zero inputs of the right shapes for every graph."""
    config, backbone = policy.config, policy.backbone
    prompt, whole = config.prompt_tokens, config.sequence_tokens
    tokens = len(policy.layout.image_positions)
    one, size = backbone.kv_heads, backbone.head_size

    def cache(layers: int) -> torch.Tensor:
        return torch.zeros(layers, 1, one, whole, size)

    ids = torch.zeros(1, prompt, dtype=torch.int64)
    prefill = (ids, torch.zeros(tokens, backbone.visual_width), torch.ones(1, prompt))
    bridged, layers = len(backbone.bridged), backbone.layers
    valid = torch.ones(1, whole)
    return {
        'vision': (torch.zeros(1, 3, config.height_px, config.width_px),),
        'prefill_action': prefill,
        'prefill_reason': prefill,
        'decode': (
            torch.zeros(1, 1, dtype=torch.int64),
            torch.full((1,), prompt, dtype=torch.int64),
            cache(layers),
            cache(layers),
            valid,
        ),
        config.expert_graph: (
            torch.zeros(1, *_states(config), 3),
            torch.zeros(1, TIME_FEATURES),
            torch.zeros(1, EGO_FEATURES),
            cache(bridged),
            cache(bridged),
            valid,
        ),
    }


def golden_inputs(layout: PromptLayout, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a few plans, drawn from a seed: smooth pictures, prompts with words and gaps."""
    config = layout.config
    rng = np.random.default_rng(seed)
    pictures = len(config.cameras) * config.frames_per_camera
    shape = (GOLDEN_CASES, pictures, config.height_px, config.width_px, 3)
    coarse = rng.random((GOLDEN_CASES, pictures, 7, 14, 3))
    rows = np.arange(shape[2]) * 7 // shape[2]
    columns = np.arange(shape[3]) * 14 // shape[3]
    images = coarse[:, :, rows][:, :, :, columns] + 0.1 * rng.random(shape)
    ids = rng.integers(0, layout.tokenizer.get_vocab_size(), (GOLDEN_CASES, config.prompt_tokens))
    ids[:, layout.image_positions] = 0
    valid = np.ones((GOLDEN_CASES, config.prompt_tokens), np.float32)
    # One case with an empty reasoning slot, one with a camera missing.
    valid[1, layout.slot] = 0.0
    valid[2, layout.image_positions[: config.image_tokens]] = 0.0
    return {
        'images': (images * (255.0 / 1.1)).astype(np.uint8),
        'ids': ids.astype(np.int64),
        'valid': valid,
        'ego': rng.standard_normal((GOLDEN_CASES, 20)).astype(np.float32),
        'answer': rng.integers(0, 100, (GOLDEN_CASES,)).astype(np.int64),
    }


def _write_golden(golden: Mapping[str, np.ndarray], folder: Path) -> None:
    path = folder / GOLDEN_FILE
    path.parent.mkdir(parents=True)
    write_tensors(path, golden)
    path.chmod(0o644)


def replay_case(
    backend: Backend, golden: Mapping[str, np.ndarray], case: int
) -> dict[str, np.ndarray]:
    """All five functions of a backend on one golden case; `state` is the end of the flow."""
    config = backend.config
    pixels = golden['images'][case].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255.0)
    embeds = np.concatenate([backend.vision(picture[None]) for picture in pixels])
    ids, valid = golden['ids'][case : case + 1], golden['valid'][case : case + 1]
    keys, values = backend.prefill_action(ids, embeds, valid)
    all_keys, all_values, logits = backend.prefill_reason(ids, embeds, valid)
    answer_room = ((0, 0), (0, 0), (0, 0), (0, config.answer_room), (0, 0))
    seen = np.pad(valid, ((0, 0), (0, config.answer_room)))
    token = golden['answer'][case].reshape(1, 1)
    position = np.array([config.prompt_tokens], dtype=np.int64)
    decoded = backend.decode(
        token, position, np.pad(all_keys, answer_room), np.pad(all_values, answer_room), seen
    )
    keys_all, values_all = np.pad(keys, answer_room), np.pad(values, answer_room)
    ego = golden['ego'][case : case + 1]

    def answer(x: np.ndarray, when: float) -> np.ndarray:
        states = x if x.ndim == 4 else x[:, None]
        found = ask_expert(
            backend, states, time_features(when)[None], ego, keys_all, values_all, seen
        )
        return found if x.ndim == 4 else found[:, 0]

    start = np.zeros((1, *_states(config), 3), np.float32)
    once = answer(start, 0.0)
    return {
        'vision': embeds,
        'prefill_action': np.stack([keys, values]),
        'prefill_reason': np.concatenate([all_keys.ravel(), all_values.ravel(), logits.ravel()]),
        'decode': np.concatenate([array.ravel() for array in decoded]),
        config.expert_graph: once,
        'state': euler(answer, start, config.steps) if config.expert_graph == 'step' else once,
    }


def measured(
    backend: Backend,
    golden: Mapping[str, np.ndarray],
    examples: Mapping[str, tuple[torch.Tensor, ...]],
) -> Measured:
    """What an engine makes of the golden inputs, and how long each graph takes it."""
    cases = [replay_case(backend, golden, case) for case in range(GOLDEN_CASES)]
    return Measured(
        {name: np.stack([case[name] for case in cases]) for name in cases[0]},
        {name: _time_ms(backend, name, tensors) for name, tensors in examples.items()},
    )


def compared(ours: Measured, theirs: Measured, counts: Mapping[str, int]) -> list[Parity]:
    """ONNX Runtime against torch; too large a difference raises `SpanvlaError`."""
    apart = {
        name: ours.outputs[name].astype(np.float64) - theirs.outputs[name] for name in ours.outputs
    }
    largest = float(np.abs(apart['state']).max())
    if not largest <= MAX_STATE_ERROR:
        raise SpanvlaError(
            f'export: ONNX Runtime and torch differ by {largest:.1e} in the normalised '
            f'trajectory, allowed are {MAX_STATE_ERROR:g}; the graphs are not written'
        )
    return [
        Parity(
            name,
            nodes,
            float(np.abs(apart[name]).max()),
            float(np.linalg.norm(apart[name]) / max(np.linalg.norm(theirs.outputs[name]), 1e-12)),
            ours.graph_ms[name],
            theirs.graph_ms[name],
        )
        for name, nodes in counts.items()
    ]


def _time_ms(
    backend: Backend, name: str, tensors: tuple[torch.Tensor, ...], repeats: int = 9
) -> float:
    arrays = [tensor.numpy() for tensor in tensors]
    function = getattr(backend, name)
    function(*arrays)
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arrays)
        spent.append(time.perf_counter() - start)
    return 1e3 * float(np.median(spent))


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator stands in a graph."""
    return Counter(node.op_type for node in model.graph.node)
