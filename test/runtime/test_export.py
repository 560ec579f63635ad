"""The exported graphs against torch, and what the export refuses."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('onnxscript')

import onnx  # noqa: E402

from spanvla_ros.model.action_tokens import ActionCodebook  # noqa: E402
from spanvla_ros.model.checkpoint import GRAPHS, read_tensors  # noqa: E402
from spanvla_ros.model.config import ModelConfig  # noqa: E402
from spanvla_ros.model.flow import Normalization  # noqa: E402
from spanvla_ros.model.policy import new_policy, save_policy  # noqa: E402
from spanvla_ros.runtime import export  # noqa: E402
from spanvla_ros.runtime.backend import open_backend  # noqa: E402
from spanvla_ros.runtime.gate import check_graph  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402


@pytest.fixture(scope='module')
def policy():
    policy = new_policy(ModelConfig(), seed=0)
    with torch.no_grad():
        policy.expert.velocity.weight.normal_(0.0, 0.3)
        for block in policy.expert.blocks:
            block.modulation.weight.normal_(0.0, 0.05)
    policy.normalization = Normalization('history', np.ones((10, 3)))
    policy.codebook = ActionCodebook(np.zeros((256, 3)))
    return policy


@pytest.mark.slow
def test_an_exported_model_plans_like_the_trained_one(policy, tmp_path):
    save_policy(policy, tmp_path / 'model', {'stages': []})
    report = export.export_model(tmp_path / 'model', tmp_path / 'shipped')
    assert [entry.graph for entry in report] == list(GRAPHS)
    assert max(entry.relative for entry in report) < 1e-5
    files = [p for p in (tmp_path / 'shipped').rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 24e6
    assert max(p.stat().st_size for p in files) < 15e6
    golden = read_tensors(tmp_path / 'shipped' / export.GOLDEN_FILE)
    for name in ('onnxruntime', 'torch'):
        backend = open_backend(tmp_path / 'shipped', name)
        for case in range(export.GOLDEN_CASES):
            state = export.replay_case(backend, golden, case)['state']
            np.testing.assert_allclose(state[0], golden['state'][case], atol=1e-4)
    assert np.abs(golden['state']).max() > 0.1
    # The same weights again are the same bytes.
    first = {p.name: p.read_bytes() for p in (tmp_path / 'shipped/graphs').iterdir()}
    export.export_model(tmp_path / 'shipped', tmp_path / 'again')
    assert first == {p.name: p.read_bytes() for p in (tmp_path / 'again/graphs').iterdir()}


def test_a_graph_is_static_and_holds_no_path_of_this_machine(policy):
    module = export.graph_modules(policy)['step']
    model = export.trace(module, 'step', export.example_inputs(policy)['step'])
    assert check_graph(model, 'step').passed
    assert b'/spanvla_ros/' not in model.SerializeToString()
    assert {i.domain for i in model.opset_import if i.domain} == set()


def test_an_untrained_model_is_not_exported(tmp_path):
    save_policy(new_policy(ModelConfig()), tmp_path / 'model', {})
    with pytest.raises(SpanvlaError, match='train it first'):
        export.export_model(tmp_path / 'model', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_onnx_runtime_joins_every_norm_and_gate_of_a_graph(policy, tmp_path):
    import onnxruntime

    module = export.graph_modules(policy)['step']
    model = export.trace(module, 'step', export.example_inputs(policy)['step'])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / 'optimised.onnx')
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    joined = export.operators(onnx.load(tmp_path / 'optimised.onnx'))
    blocks = len(policy.expert.blocks)
    assert joined['SimplifiedLayerNormalization'] == 2 * blocks + 1
    assert joined['QuickGelu'] == blocks + 2
    assert joined['Sqrt'] == joined['Pow'] == joined['Sigmoid'] == 0
