"""The scoring bench measures what it says."""

from __future__ import annotations

import json

import numpy as np

from spanvla_ros.scoring import bench
from spanvla_ros.scoring.pdms import Scorer


def test_summary_holds_every_batch_and_its_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'BATCHES', (64,))
    monkeypatch.setattr(bench, 'REPEATS', 1)
    written = bench.run_scoring_bench(tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'summary.json').read_text()) == written
    assert len(written['times']) == 4
    for entry in written['times']:
        shares = [entry[name] for name in entry if name.endswith('_share')]
        assert len(shares) == 4
        assert all(0.0 <= share <= 1.0 for share in shares)
        assert entry['proposals_per_s'] > 0.0
    assert len(written['ratios']) == 4
    assert written['how'] in capsys.readouterr().out


def test_drawn_plans_differ_in_what_they_score():
    scores = Scorer(bench.drawn_scene(agents=77, lanes=12), 'v2').score(bench.drawn_plans(64))
    assert len(np.unique([score.total for score in scores])) > 5
    assert {score.nc for score in scores} == {0.0, 1.0}
