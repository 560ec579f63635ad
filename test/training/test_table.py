"""`spanvla table`: plans in batches are those of the planner, lines are paired row by row."""

import json

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

from pathlib import Path  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.policy import save_policy  # noqa: E402
from spanvla_ros.training import table  # noqa: E402
from spanvla_ros.training.batch_plans import Entry, plan_entry  # noqa: E402
from spanvla_ros.training.contestants import Contestant, open_planner  # noqa: E402
from spanvla_ros.training.data.shards import ShardSet  # noqa: E402
from spanvla_ros.training.loop import start_policy  # noqa: E402
from spanvla_ros.training.open_loop import plan_rows  # noqa: E402
from spanvla_ros.training.settings import TrainSettings  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

TOWN = Path(__file__).parents[2] / 'models/town'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('table') / 'scenes'
    words = ['scenes', '--count', '6', '--seed', '1000500', '--workers', '1', '--out']
    assert cli.main([*words, str(folder)]) == 0
    return folder


def test_batched_plans_are_those_of_the_planner(scenes):
    shards = ShardSet(scenes)
    rows = table.choose(shards, 0)
    planner = open_planner(Contestant(TOWN, 'onnxruntime', 'off', 3))
    wanted = plan_rows(planner, planner.config, shards.rows(rows))
    found = plan_entry(Entry('m', TOWN, 3), shards, rows, torch.device('cpu'))
    assert np.abs(found.planned - wanted).max() < 1e-3


def test_tokens_of_the_answer_plan_too(scenes):
    shards = ShardSet(scenes)
    rows = table.choose(shards, 3)
    found = plan_entry(Entry('t', TOWN, tokens=True), shards, rows, torch.device('cpu'))
    error = np.linalg.norm(found.planned - shards.futures[rows], axis=-1)[..., 0]
    assert found.planned.shape == shards.futures[rows].shape
    assert np.nanmean(error) < 2.0
    # An action a waypoint, and the end of the turn; before it at least the marks around nothing.
    assert (found.tokens[:, 1] == 11).all()
    assert (found.tokens[:, 0] >= 2).all()


def test_an_answer_in_words_that_is_none_is_counted_and_no_plan(scenes, tmp_path, capsys):
    # Words were never taught to be waypoints.
    policy = start_policy(TrainSettings(steps=1, model={'head': 'text'}), TOWN)
    save_policy(policy, tmp_path / 'text', {'stages': []})
    words = ['table', f'five={TOWN}', f'text={tmp_path / "text"}', '--scenes', str(scenes)]
    assert cli.main([*words, '--rows', '3', '--workers', '1', '--out', str(tmp_path)]) == 0
    lines = json.loads((tmp_path / 'table.json').read_text())['lines']
    assert lines['text']['answered']['mean'] == 0.0
    assert lines['text']['ade_m']['mean'] is None
    assert lines['text']['action_tokens']['mean'] >= 1.0
    assert (lines['five']['answered']['mean'], lines['five']['action_tokens']['mean']) == (1.0, 0)
    page = capsys.readouterr().out
    assert '| answered | words | action |' in page
    assert '| 0.000 [0.000, 0.000] |' in page


def test_lines_are_paired_with_the_first_and_kept_plans_are_taken(scenes, tmp_path, capsys):
    words = ['table', f'five={TOWN}', f'one={TOWN}:1', '--scenes', str(scenes), '--workers', '1']
    assert cli.main([*words, '--plans-only', '--out', str(tmp_path)]) == 0
    kept = dict(np.load(tmp_path / 'plans/one.npz'))
    # A line that drives exactly as the reference does has no error.
    shards = ShardSet(scenes)
    kept['planned'] = shards.futures[table.choose(shards, 0)]
    np.savez(tmp_path / 'plans/one.npz', **kept)
    assert cli.main([*words, '--out', str(tmp_path)]) == 0
    lines = json.loads((tmp_path / 'table.json').read_text())['lines']
    assert lines['one']['ade_m']['mean'] == pytest.approx(0.0, abs=1e-6)
    five = lines['five']['ade_m']['mean']
    assert lines['one']['minus_first']['ade_m']['mean'] == pytest.approx(-five, abs=1e-6)
    assert lines['five']['minus_first']['pdms']['mean'] == 0.0
    assert '| one | 0.00' in capsys.readouterr().out


def test_plans_for_other_rows_are_refused(scenes, tmp_path, capsys):
    words = ['table', f'five={TOWN}', '--scenes', str(scenes), '--plans-only']
    assert cli.main([*words, '--rows', '2', '--out', str(tmp_path)]) == 0
    assert cli.main([*words, '--rows', '3', '--out', str(tmp_path)]) == 2
    assert 'other rows' in capsys.readouterr().err


@pytest.mark.parametrize('keep', [0.0, 0.2, 0.9, 0.999, -1.0])
def test_damaged_plans_are_refused(scenes, tmp_path, keep):
    path = tmp_path / 'plans/five.npz'
    words = ['table', f'five={TOWN}', '--scenes', str(scenes), '--rows', '2', '--plans-only']
    assert cli.main([*words, '--out', str(tmp_path)]) == 0
    content = bytearray(path.read_bytes())
    if keep < 0.0:
        # Within the compressed plans.
        content[len(content) // 3] ^= 0xFF
    path.write_bytes(content[: round(abs(keep) * len(content))])
    ids = ShardSet(scenes)
    rows = table.choose(ids, 2)
    with pytest.raises(SpanvlaError, match='delete it'):
        table.opened(path, table.parse_entry(words[1]), ids, rows, None)


@pytest.mark.parametrize('text', ['models/town', 'a=', '=models', 'a=models:0', 'a/b=models'])
def test_a_line_typed_wrong_is_refused(text):
    with pytest.raises(SpanvlaError, match='NAME=DIR'):
        table.parse_entry(text)


def test_lines_as_typed():
    assert table.parse_entry('a=out/x:3') == Entry('a', Path('out/x'), 3)
    assert table.parse_entry('a=out/x:tokens') == Entry('a', Path('out/x'), tokens=True)
    assert table.parse_entry('a=out/x') == Entry('a', Path('out/x'))
