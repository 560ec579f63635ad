"""Calibration plans as on board, keeps what graphs were asked, and leaves held-out scenes be."""

import json

import numpy as np
import pytest
from random_rows import write_shards

from spanvla_ros.model.checkpoint import GRAPHS, load_model_dir, shipped_model_dir
from spanvla_ros.runtime.onnx_ import INPUTS, OnnxBackend
from spanvla_ros.town.scenarios import HELD_OUT_SEED
from spanvla_ros.training.calibration import CALLS_PER_ROW, record_inputs
from spanvla_ros.training.data.shards import MANIFEST
from spanvla_ros.types import SpanvlaError


@pytest.fixture(scope='module')
def model():
    return load_model_dir(shipped_model_dir())


def test_every_graph_is_recorded_as_it_was_asked(model, tmp_path):
    write_shards(tmp_path / 'scenes', 3, 0)
    found = record_inputs(model, tmp_path / 'scenes', rows=2)
    assert (found.scenes, found.rows) == ('scenes', 2)
    assert set(found.feeds) == set(GRAPHS)
    for graph, feeds in found.feeds.items():
        assert 2 <= len(feeds) <= 2 * CALLS_PER_ROW
        assert all(tuple(feed) == INPUTS[graph] for feed in feeds)
    # The steps of one flow are at different times, and pictures lie within their values.
    assert len({feed['time'].tobytes() for feed in found.feeds['step']}) > 1
    pixels = np.stack([feed['pixels'] for feed in found.feeds['vision']])
    assert 0.0 <= pixels.min() < pixels.max() <= 1.0
    feed = found.feeds['prefill_action'][0]
    keys, _ = OnnxBackend(model).prefill_action(feed['ids'], feed['embeds'], feed['valid'])
    assert np.isfinite(keys).all()


def test_held_out_scenes_are_refused(model, tmp_path):
    scenes = write_shards(tmp_path / 'scenes', 2, 0)
    (scenes / MANIFEST).write_text(json.dumps({'seed': HELD_OUT_SEED}))
    with pytest.raises(SpanvlaError, match='held out'):
        record_inputs(model, scenes)
    # Nor those of a folder below.
    with pytest.raises(SpanvlaError, match=r'held out.*calibrate on'):
        record_inputs(model, tmp_path)
    (scenes / MANIFEST).write_text('{"seed": ')
    with pytest.raises(SpanvlaError, match=r'manifest\.json: not valid JSON .*; run the command'):
        record_inputs(model, scenes)
