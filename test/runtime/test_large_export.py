"""An export whose weights are longer than a protobuf message may be, through the real command.

A Qwen2.5-VL of the 3B's own widths, cut to six layers and two blocks of the tower, random weights
in fp32: each language graph has more than 2 GiB of them.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('onnxscript')

from spanvla_ros.model.action_tokens import ActionCodebook  # noqa: E402
from spanvla_ros.model.backbone import qwen_network  # noqa: E402
from spanvla_ros.model.checkpoint import load_model_dir  # noqa: E402
from spanvla_ros.model.config import CameraSpec, ModelConfig  # noqa: E402
from spanvla_ros.model.flow import Normalization  # noqa: E402
from spanvla_ros.model.policy import Policy, save_policy  # noqa: E402
from spanvla_ros.model.prompt import PromptLayout, build_tokenizer, prompt_length  # noqa: E402
from spanvla_ros.runtime.engines import WAYPOINT_BOUNDS_M  # noqa: E402
from spanvla_ros.runtime.gate import check_graph  # noqa: E402
from spanvla_ros.runtime.golden import waypoint_difference_m  # noqa: E402
from spanvla_ros.runtime.graph_files import DATA_FILE  # noqa: E402
from spanvla_ros.runtime.onnx_ import OnnxBackend  # noqa: E402
from spanvla_ros.runtime.torch_sizes import SIZES  # noqa: E402

LIMIT_BYTES = 2**31
ROOM_BYTES = 12e9
MEMORY_BYTES = 10e9


def large_policy():
    size = SIZES['3b']
    camera = CameraSpec('front', 84, 56, 60.0, 1.5, 0.0, 1.5, 0.0)
    config = replace(
        ModelConfig(), name='large', cameras=(camera,), interval=6, expert_width=256,
        answer_tokens=8,
    )  # fmt: skip
    tokenizer = build_tokenizer()
    config = replace(config, prompt_tokens=prompt_length(config, tokenizer))
    text = {**size.text, 'num_hidden_layers': 6, 'vocab_size': 40_960}
    vision = {**size.vision, 'depth': 2, 'fullatt_block_indexes': [1]}
    torch.manual_seed(0)
    network = qwen_network(text, vision, tokenizer.get_vocab(with_added_tokens=True))
    policy = Policy(config, PromptLayout(config, tokenizer), network)
    with torch.no_grad():
        for weight in policy.expert.parameters():
            weight.normal_(0.0, 0.05)
    policy.normalization = Normalization(config.source, np.ones((config.waypoints, 3)))
    policy.codebook = ActionCodebook(np.zeros((config.action_tokens, 3)))
    return policy


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_exported_gated_and_planned_with(tmp_path):
    if shutil.disk_usage(tmp_path).free < ROOM_BYTES:
        pytest.skip('less than 12 GB of disk are free')
    if os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') < MEMORY_BYTES:
        pytest.skip('less than 10 GB of memory are free')
    save_policy(large_policy(), tmp_path / 'model', {'stages': []})
    command = [sys.executable, '-m', 'spanvla_ros.cli', 'export', '--weights', 'fp32']
    command += ['--model', str(tmp_path / 'model'), '--out', str(tmp_path / 'out')]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    graphs = tmp_path / 'out' / 'graphs'
    sys.stdout.write(f'\n{said.stdout}peak {peak_gb:.1f} GB\n')
    assert (graphs / DATA_FILE).stat().st_size > LIMIT_BYTES
    for name in ('prefill_reason', 'decode'):
        path = graphs / f'{name}.onnx'
        assert check_graph(path).passed
        model = onnx.load(str(path), load_external_data=False)
        stored = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        assert sum(int(e.value) for e in stored if e.key == 'length') > LIMIT_BYTES
    # By torch the golden plans were written; ONNX Runtime plans from the files alone.
    directory = load_model_dir(tmp_path / 'out')
    assert waypoint_difference_m(OnnxBackend(directory), directory) <= WAYPOINT_BOUNDS_M['fp32']
    shutil.rmtree(tmp_path / 'model')
    shutil.rmtree(tmp_path / 'out')
