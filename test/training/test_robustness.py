"""Kills, full disks, broken shards and losses: a clear word, and never anything half-written."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from random_rows import random_rows, write_shards  # noqa: E402

from spanvla_ros import cli  # noqa: E402
from spanvla_ros.model.checkpoint import settle_directory  # noqa: E402
from spanvla_ros.training import parallel  # noqa: E402
from spanvla_ros.training.data.shards import MANIFEST, ShardSet, write_shard  # noqa: E402
from spanvla_ros.training.settings import load_settings  # noqa: E402
from spanvla_ros.training.stages import sft  # noqa: E402
from spanvla_ros.types import SpanvlaError  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('shards') / 'train', 40, 0)


def words(out, shards, *settings, resume=False):
    found = ['train', 'sft', '--config', str(ROOT / 'config/train/sft.yaml'), '--out', str(out)]
    found += ['--resume'] if resume else []
    small = (
        'minutes=0',
        'batch=2',
        'processes=1',
        'compiled=false',
        "heldout=''",
        f'data={shards}',
    )
    for setting in (*small, *settings):
        found += ['--set', setting]
    return found


KILLED = """
    import os, signal, sys
    from spanvla_ros import cli
    from spanvla_ros.model import policy
    from spanvla_ros.training import run

    place, count = sys.argv[1], 0

    def at(name, real):
        def call(*arguments, **options):
            global count
            count += name == place
            # The first state is written whole; the writing of the second is cut off.
            if name == place and count == {'state': 3, 'tensors': 4, 'rename': 4}[name]:
                if name == 'rename':
                    arguments[1].rename(arguments[1].with_name(f'.{arguments[1].name}.1.old'))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

    run.write_text = at('state', run.write_text)
    run.write_tensors = at('tensors', run.write_tensors)
    run.swap_directory = policy.swap_directory = at('rename', run.swap_directory)
    # Save after every step.
    run.Run.save_due = True
    sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('place', ['tensors', 'state', 'rename'])
def test_a_kill_while_a_state_is_written_loses_that_state_alone(shards, tmp_path, capfd, place):
    assert cli.main(words(tmp_path / 'whole', shards, 'steps=3')) == 0
    script = tmp_path / 'killed.py'
    script.write_text(textwrap.dedent(KILLED))
    run = [sys.executable, str(script), place, *words(tmp_path / 'cut', shards, 'steps=3')]
    done = subprocess.run(run, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main(words(tmp_path / 'cut', shards, 'steps=3', resume=True)) == 0
    for name in ('weights', 'optimizer'):
        one, other = (
            (tmp_path / run / f'state/{name}.safetensors').read_bytes() for run in ('whole', 'cut')
        )
        assert one == other, name
    assert not list((tmp_path / 'cut').rglob('.*'))
    capfd.readouterr()


def test_an_old_directory_left_between_two_renames_is_put_back(tmp_path):
    (tmp_path / '.state.77.old').mkdir()
    (tmp_path / '.state.77.old/state.json').write_text('{}')
    (tmp_path / '.state.tmp').mkdir()
    settle_directory(tmp_path / 'state')
    assert [p.name for p in tmp_path.iterdir()] == ['state']
    (tmp_path / '.state.78.old').mkdir()
    settle_directory(tmp_path / 'state')
    assert [p.name for p in tmp_path.iterdir()] == ['state']
    assert (tmp_path / 'state/state.json').exists()


def test_a_full_disk_leaves_the_last_state_and_says_what_to_do(shards, tmp_path, capfd):
    assert cli.main(words(tmp_path / 'run', shards, 'steps=3', 'stop_after=1')) == 0
    before = (tmp_path / 'run/state/weights.safetensors').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # A real refusal by the kernel: no file may grow beyond 1 MB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        code = cli.main(words(tmp_path / 'run', shards, 'steps=3', resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    said = capfd.readouterr().err
    assert code == 2
    assert 'step 3 cannot be written' in said
    assert '--resume' in said
    assert (tmp_path / 'run/state/weights.safetensors').read_bytes() == before
    assert not [p.name for p in (tmp_path / 'run').iterdir() if p.name.startswith('.')]
    assert cli.main(words(tmp_path / 'run', shards, 'steps=3', resume=True)) == 0
    capfd.readouterr()


def test_a_shard_is_not_left_half_written_on_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SpanvlaError, match=r'scenes-0.parquet: cannot be written'):
            write_shard(tmp_path / 'scenes-0.parquet', random_rows(3, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_names_step_and_rows(shards, tmp_path, capfd, monkeypatch):
    real = sft.losses

    def broken(policy, batch, settings, generator):
        found = real(policy, batch, settings, generator)
        return {**found, 'flow': found['flow'] * float('nan')}

    monkeypatch.setattr(sft, 'losses', broken)
    assert cli.main(words(tmp_path / 'run', shards, 'steps=1')) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert 'loss flow of step 0 is nan' in said
    assert 'scenes-0000.parquet row ' in said
    assert not (tmp_path / 'run/state').exists()


def changed(folder, name, change):
    """A shard with one column changed, as if somebody else had written it."""
    folder.mkdir()
    write_shard(folder / 'scenes-0.parquet', random_rows(4, 1))
    table = pq.read_table(folder / 'scenes-0.parquet')
    at = table.column_names.index(name)
    values = table.column(name).to_pylist()
    values[2] = change(values[2])
    column = pa.array(values, type=table.schema.field(name).type)
    pq.write_table(table.set_column(at, name, column), folder / 'scenes-0.parquet')


@pytest.mark.parametrize(
    'change', [lambda _: None, lambda future: [float('nan'), *future[1:]]], ids=['none', 'nan']
)
def test_a_sample_without_future_is_named(tmp_path, change):
    changed(tmp_path / 'x', 'future', change)
    with pytest.raises(SpanvlaError, match=r'scenes-0.parquet row 2: has no future'):
        ShardSet(tmp_path / 'x')


def test_a_damaged_picture_is_named(tmp_path):
    changed(tmp_path / 'x', 'jpeg', lambda pictures: [pictures[0][:40], *pictures[1:]])
    shards = ShardSet(tmp_path / 'x')
    shards.rows([0, 1])
    with pytest.raises(SpanvlaError, match=r'scenes-0.parquet row 2: .*JPEG'):
        shards.rows([2])


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty'])
def test_a_damaged_shard_is_named(tmp_path, damage):
    write_shard(tmp_path / 'scenes-0.parquet', random_rows(2, 1))
    data = bytearray((tmp_path / 'scenes-0.parquet').read_bytes())
    if damage == 'cut':
        data = data[: len(data) // 2]
    elif damage == 'flipped':
        data[-200:-100] = bytes(100)
    else:
        data = bytearray()
    (tmp_path / 'scenes-0.parquet').write_bytes(bytes(data))
    with pytest.raises(SpanvlaError, match=r'scenes-0.parquet: '):
        ShardSet(tmp_path)


def test_negatives_are_never_imitated(tmp_path, capfd, monkeypatch):
    rows = random_rows(12, 1)
    labelled = [
        replace(r, sample=replace(r.sample, label='negative' if i % 2 else 'positive'))
        for i, r in enumerate(rows)
    ]
    write_shard(tmp_path / 'scenes-0.parquet', labelled)
    seen = set()
    real = sft.losses

    def watching(policy, batch, settings, generator):
        seen.update(row.sample.label for row in batch.rows)
        return real(policy, batch, settings, generator)

    monkeypatch.setattr(sft, 'losses', watching)
    assert cli.main(words(tmp_path / 'run', tmp_path, 'steps=3', 'action_tokens=32')) == 0
    assert seen == {'positive'}
    assert (
        cli.main(
            words(tmp_path / 'two', tmp_path, 'steps=1', 'action_tokens=32', 'labels=recovery')
        )
        == 2
    )
    assert 'holds 0 rows of recovery' in capfd.readouterr().err
    assert np.unique(ShardSet(tmp_path).labels).tolist() == ['negative', 'positive']
    assert (tmp_path / 'run/state').exists()


def test_a_users_fault_in_another_process_is_one_sentence(monkeypatch, capsys):
    def refuse(*_):
        raise SpanvlaError('rows.parquet: damaged')

    monkeypatch.setattr(parallel, '_member', refuse)
    with pytest.raises(SystemExit) as ended:
        parallel._other(refuse, parallel.Group(1, 2), 1, 'file://nowhere', ())
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'process 1: rows.parquet: damaged\n'


def test_an_override_that_is_no_yaml_is_one_sentence():
    with pytest.raises(SpanvlaError, match=r"--set steps=\[1: '\[1' is no YAML value"):
        load_settings(ROOT / 'config/train/sft.yaml', ['steps=[1'])


def test_training_on_held_out_scenes_is_refused(tmp_path, capsys):
    scenes = write_shards(tmp_path / 'all' / 'heldout', 2, 0)
    (scenes / MANIFEST).write_text('{"seed": 1000000}')
    assert cli.main(words(tmp_path / 'out', tmp_path / 'all', 'steps=1')) == 2
    assert 'heldout: is held out for evaluation; train on' in capsys.readouterr().err
    assert not list((tmp_path / 'out').iterdir())
