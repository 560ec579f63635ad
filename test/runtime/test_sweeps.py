"""The sweeps: a frame is the sum of its stages, drawn beside its floor."""

import json

import pytest

from spanvla_ros import bench, cli
from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.runtime import sweeps
from spanvla_ros.runtime.timing import Timing

STAGES = {
    'vision': Timing(6.0, 7.0, 8.0, cpu_ms=5.0, floor_ms=4.0),
    'prefill_action': Timing(12.0, 13.0, 14.0, cpu_ms=10.0, floor_ms=9.0),
    'step': Timing(2.0, 3.0, 4.0, cpu_ms=1.0, floor_ms=0.5),
}


def test_a_frame_is_its_pictures_a_prefill_and_its_steps():
    point = sweeps._point(2, ModelConfig(), STAGES, steps=2)
    assert point['frame_cpu_ms'] == 3 * 5.0 + 10.0 + 2 * 1.0
    assert point['frame_floor_ms'] == 3 * 4.0 + 9.0 + 2 * 0.5
    assert point['spent_ms'] == {'vision': 15.0, 'prefill_action': 10.0, 'step': 2.0}


def test_other_pictures_and_cameras_fit_their_prompt():
    directory = load_model_dir(shipped_model_dir())
    small = sweeps._with_pictures(directory, 112)
    # A visual token is 28 pixels square: 4 x 2 in place of 8 x 4.
    assert sweeps._tokens(directory.config) - sweeps._tokens(small) == 3 * (32 - 8)
    one, six = (sweeps._with_cameras(directory, count) for count in (1, 6))
    assert len({camera.name for camera in six.cameras}) == 6
    assert six.prompt_tokens - one.prompt_tokens >= 5 * 32
    four = sweeps._with_frames(directory, 4)
    # Each more picture is 32 tokens, its camera's name and the two marks around it.
    more = four.prompt_tokens - directory.config.prompt_tokens
    assert (sweeps._tokens(four), more) == (4 * 96, 9 * (32 + 3))


def test_the_page_draws_each_sweep_with_its_floor(tmp_path):
    points = [sweeps._point(n, ModelConfig(), STAGES, steps=n) for n in (1, 5)]
    summary = {
        'cameras': 3,
        'pictures_px': [224, 112],
        'machine': {'processor': 'a <processor>'},
        'load': 0.5,
        'how': 'one thread',
        'sweeps': {
            'steps': points,
            'pictures': points,
            'cameras': points,
            'frames': points,
            'precision': [sweeps._point('fp32', ModelConfig(), STAGES)],
        },
    }
    bench.write_sweeps_page(tmp_path / 'index.html', summary)
    page = (tmp_path / 'index.html').read_text()
    assert page.count('class="chart"') == 8
    assert 'prefill_action floor' in page
    assert 'a &lt;processor&gt;' in page
    assert '5 tokens</text>' in page


@pytest.mark.slow
def test_the_sweeps_run_on_the_shipped_model(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    monkeypatch.setattr(sweeps, 'WIDTHS_PX', (112,))
    monkeypatch.setattr(sweeps, 'CAMERAS', (1,))
    monkeypatch.setattr(sweeps, 'FRAMES', (2,))
    arguments = ['bench', '--only', 'sweeps', '--repeats', '1', '--out', str(tmp_path)]
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert set(summary['sweeps']) == {'steps', 'precision', 'pictures', 'cameras', 'frames'}
    for points in summary['sweeps'].values():
        for point in points:
            assert point['frame_cpu_ms'] > 0.5 * point['frame_floor_ms'] > 0
    assert (tmp_path / 'index.html').exists()
