"""`spanvla bench --only decoders`: every way from one prefilled cache to a trajectory, compared.

Both sides of a ratio are compiled by the same engine and run on one thread; CPU time, because a
shared machine makes wall time meaningless. The 50 action tokens of the paper stand beside the 10
that are enough for a trajectory of 10 waypoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spanvla_ros.model.checkpoint import ModelDirectory, load_model_dir, shipped_model_dir
from spanvla_ros.model.config import bridged_layers
from spanvla_ros.model.flow import euler
from spanvla_ros.runtime.backend import Backend, open_backend
from spanvla_ros.runtime.decoder_shapes import DecoderShape, decoder_graph
from spanvla_ros.runtime.reasoner import padded
from spanvla_ros.runtime.timing import (
    at_least_one,
    circumstances,
    stage_calls,
    time_in_turns,
    write_summary,
)
from spanvla_ros.types import SpanvlaError

STEPS = (1, 2, 5, 10)
ANCHORS, ANCHOR_STEPS = 20, 2
ANSWERS = (10, 50)
TEXT_SIZES = (
    'num_hidden_layers',
    'hidden_size',
    'num_attention_heads',
    'num_key_value_heads',
    'intermediate_size',
    'vocab_size',
)


def run_decoders_bench(out_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CPU time of every decoder on one prefilled cache; write `summary.json` and print."""
    directory = load_model_dir(options.model or shipped_model_dir())
    backend = open_backend(directory, options.backend)
    repeats = at_least_one(options.repeats)
    calls = decoder_calls(backend, directory)
    timed = {name: time_in_turns({name: call}, repeats)[name] for name, call in calls.items()}
    reference = {f'AR-{count}': timed[f'AR-{count}'].cpu_ms for count in ANSWERS}
    summary = {
        **circumstances(directory, repeats),
        'backend': backend.name,
        'decoders': {
            name: {
                **asdict(timing),
                **{f'{key}_over_this': ms / timing.cpu_ms for key, ms in reference.items()},
            }
            for name, timing in timed.items()
        },
        'how': 'CPU time, one thread, one prefilled cache. AR: the decode graph of the model, '
        'greedy, its positions wrapping where the answer is longer than its slots (the graph is '
        'static, so the cost is the same). Flow: the step graph. Parallel and anchored diffusion: '
        'graphs of the same sizes with random weights, compiled by ONNX Runtime like the others.',
    }
    write_summary(out_dir, summary)
    sys.stdout.write(_table(summary))
    return summary


def decoder_calls(backend: Backend, directory: ModelDirectory) -> dict[str, Callable[[], object]]:
    """Every decoder as a call, all on caches of the same length."""
    config = backend.config
    stages = stage_calls(backend)
    cache = _prefilled(backend)
    calls: dict[str, Callable[[], object]] = {
        f'AR-{count}': partial(_answer, backend, cache, count) for count in ANSWERS
    }
    sizes = _sizes(directory)
    for count in ANSWERS:
        calls[f'parallel-{count}'] = shape_call(replace(sizes, tokens=count))
    expert = replace(
        sizes,
        layers=len(bridged_layers(sizes.layers, config.interval)),
        width=config.expert_width,
        inner=3 * config.expert_width,
        tokens=config.waypoints,
        vocabulary=0,
    )
    anchored = shape_call(replace(expert, samples=ANCHORS))
    calls[f'diffusion-{ANCHORS}x{ANCHOR_STEPS}'] = lambda: [
        anchored() for _ in range(ANCHOR_STEPS)
    ]
    step = stages['step']
    start = np.zeros((1, 1, config.waypoints, 3), np.float32)

    def velocity(_x: np.ndarray, _time: float) -> np.ndarray:
        return np.asarray(step())

    for steps in STEPS:
        calls[f'flow-{steps}'] = partial(euler, velocity, start, steps)
    return calls


def shape_call(shape: DecoderShape) -> Callable[[], object]:
    """One run of a decoder of a shape with random weights, on ONNX Runtime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    graph = decoder_graph(shape).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    rng = np.random.default_rng(0)
    feed = {
        'x': rng.standard_normal((shape.samples, shape.tokens, shape.width), np.float32),
        'keys': rng.standard_normal(shape.cache, np.float32),
        'values': rng.standard_normal(shape.cache, np.float32),
    }
    return lambda: session.run(None, feed)


def _answer(backend: Backend, cache: tuple[np.ndarray, np.ndarray], count: int) -> None:
    """Greedy decoding of `count` tokens, each fed back, keys and values put into their slots."""
    config = backend.config
    seen = np.ones((1, config.sequence_tokens), np.float32)
    token = np.array([[5]])
    for index in range(count):
        slot = config.prompt_tokens + index % config.answer_tokens
        logits, keys, values = backend.decode(token, np.array([slot]), *cache, seen)
        cache[0][:, :, :, slot : slot + 1] = keys
        cache[1][:, :, :, slot : slot + 1] = values
        token = np.array([[int(logits.argmax())]])


def _prefilled(backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """The one cache all answers start from, in S slots."""
    config = backend.config
    pixels = np.zeros((1, 3, config.height_px, config.width_px), np.float32)
    pictures = len(config.cameras) * config.frames_per_camera
    embeds = np.tile(backend.vision(pixels), (pictures, 1))
    ids = np.zeros((1, config.prompt_tokens), np.int64)
    valid = np.ones((1, config.prompt_tokens), np.float32)
    keys, values, _ = backend.prefill_reason(ids, embeds, valid)
    return padded(keys, config.sequence_tokens), padded(values, config.sequence_tokens)


def _sizes(directory: ModelDirectory) -> DecoderShape:
    """The backbone's language model as a decoder of one token."""
    path = directory.file('backbone/config.json')
    content = json.loads(path.read_text(encoding='utf-8'))
    text = content.get('text_config', content)
    if missing := [name for name in TEXT_SIZES if name not in text]:
        raise SpanvlaError(f'{path}: holds no {missing[0]}; it is not a language model')
    layers, width, heads, kv_heads, inner, vocabulary = (int(text[name]) for name in TEXT_SIZES)
    return DecoderShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=width // heads,
        inner=inner,
        tokens=1,
        cached=directory.config.sequence_tokens,
        vocabulary=vocabulary,
    )


def _table(summary: Mapping[str, Any]) -> str:
    lines = [f'{"decoder":<18}{"CPU ms":>9}{"AR-10 / this":>14}{"AR-50 / this":>14}']
    for name, row in summary['decoders'].items():
        lines.append(
            f'{name:<18}{row["cpu_ms"]:9.2f}{row["AR-10_over_this"]:14.2f}'
            f'{row["AR-50_over_this"]:14.2f}'
        )
    return '\n'.join(lines) + '\n'
