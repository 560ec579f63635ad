"""Engine passports: what is loaded, rebuilt, refused; real processes build, wait, are killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from spanvla_ros.model.checkpoint import (
    GRAPHS,
    load_model_dir,
    shipped_model_dir,
    write_manifest,
)
from spanvla_ros.runtime.engines import (
    Diagnosis,
    Engine,
    EngineKey,
    EngineStore,
    Platform,
    Refusal,
    engine_key,
    open_activated,
)
from spanvla_ros.runtime.golden import waypoint_difference_m
from spanvla_ros.runtime.onnx_ import OnnxBackend
from spanvla_ros.types import SpanvlaError

KEY = EngineKey(
    graph='step',
    onnx_sha256='a' * 64,
    weights_sha256='b' * 64,
    precision='fp32',
    profile='static',
    gpu_name='NVIDIA Orin',
    compute_capability='8.7',
    driver_version='540.4.0',
    tensorrt_version='10.3.0',
    onnxruntime_version='',
    plugins=(),
)
CONTENT = bytes(range(256)) * 40

# Builds in a process of its own; each start and end of a build is a line in a log.
BUILDER = """
import json, sys, time
from pathlib import Path
from spanvla_ros.runtime.engines import EngineKey, EngineStore
folder, raw, log, seconds = sys.argv[1:]
raw = json.loads(raw)
raw['plugins'] = tuple(raw['plugins'])
def build():
    with open(log, 'a') as file:
        file.write('begin\\n')
    time.sleep(float(seconds))
    with open(log, 'a') as file:
        file.write('end\\n')
    return bytes(range(256)) * 40
engine = EngineStore(folder).obtain(EngineKey(**raw), build)
print(len(engine.content), engine.rebuilt_for)
"""


@pytest.fixture
def store(tmp_path):
    return EngineStore(tmp_path)


def build():
    return CONTENT


def never():
    raise AssertionError('must not build')


def start_builder(store, log, seconds):
    arguments = [str(store.folder.parent), json.dumps(dataclasses.asdict(KEY)), str(log), seconds]
    return subprocess.Popen(
        [sys.executable, '-c', BUILDER, *arguments], stdout=subprocess.PIPE, text=True
    )


def wait_for(log, line):
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        if log.exists() and line in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f'no {line} in {log}')


def refusal(store, key=KEY):
    found = store.find(key)
    assert isinstance(found, Diagnosis)
    return found.refusal


def test_the_first_is_built_and_the_second_is_found(store):
    assert refusal(store) is Refusal.ABSENT
    built = store.obtain(KEY, build)
    assert built.content == CONTENT
    assert built.rebuilt_for == Diagnosis(Refusal.ABSENT)
    found = store.obtain(KEY, never)
    assert (found.content, found.rebuilt_for) == (CONTENT, None)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {KEY.file_name, f'{KEY.file_name}.json', f'.{KEY.file_name}.lock'}


def test_the_passport_says_all(store):
    store.obtain(KEY, build)
    passport = json.loads((store.folder / f'{KEY.file_name}.json').read_text())
    assert passport['key'] == {**dataclasses.asdict(KEY), 'plugins': []}
    assert passport['engine_bytes'] == len(CONTENT)
    assert len(passport['engine_sha256']) == 64


@pytest.mark.parametrize('at', [0, 5000, len(CONTENT) - 1])
def test_a_flipped_byte_is_rebuilt(store, at):
    path = store.obtain(KEY, build).path
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert refusal(store) is Refusal.CHANGED
    again = store.obtain(KEY, build)
    assert again.content == CONTENT
    assert again.rebuilt_for == Diagnosis(Refusal.CHANGED)
    assert isinstance(store.find(KEY), Engine)


def test_a_truncated_engine_is_rebuilt(store):
    path = store.obtain(KEY, build).path
    path.write_bytes(CONTENT[:-7])
    assert refusal(store) is Refusal.TRUNCATED
    assert store.obtain(KEY, build).rebuilt_for.refusal is Refusal.TRUNCATED


@pytest.mark.parametrize(
    ('field', 'value', 'expected'),
    [
        ('gpu_name', 'NVIDIA Thor', Refusal.OTHER_DEVICE),
        ('compute_capability', '11.0', Refusal.OTHER_DEVICE),
        ('tensorrt_version', '10.7.0', Refusal.OTHER_VERSION),
        ('driver_version', '580.1', Refusal.OTHER_VERSION),
        ('onnxruntime_version', '1.20.0', Refusal.OTHER_VERSION),
        ('plugins', ('mine 1',), Refusal.OTHER_VERSION),
        ('onnx_sha256', 'c' * 64, Refusal.OTHER_MODEL),
        ('weights_sha256', 'c' * 64, Refusal.OTHER_MODEL),
        ('precision', 'fp16', Refusal.OTHER_SETTINGS),
        ('profile', 'weights streamed', Refusal.OTHER_SETTINGS),
    ],
)
def test_an_engine_of_elsewhere_is_not_used(store, field, value, expected):
    store.obtain(KEY, build)
    other = dataclasses.replace(KEY, **{field: value})
    found = store.find(other)
    assert found.refusal is expected
    assert field in found.detail
    # Nor when somebody gives it the right name.
    (store.folder / KEY.file_name).rename(store.folder / other.file_name)
    (store.folder / f'{KEY.file_name}.json').rename(store.folder / f'{other.file_name}.json')
    assert refusal(store, other) is expected
    assert store.obtain(other, lambda: b'new').content == b'new'


@pytest.mark.parametrize(
    'text',
    ['', '[]', '{}', '{"passport_version": 1}', '{"passport_version": 1, "key": {}}', '[' * 9000],
)
def test_a_passport_that_is_none_is_not_believed(store, text):
    path = store.obtain(KEY, build).path
    path.with_name(f'{path.name}.json').write_text(text)
    assert refusal(store) is Refusal.BAD_PASSPORT
    assert store.obtain(KEY, build).rebuilt_for.refusal is Refusal.BAD_PASSPORT


def test_a_passport_that_lacks_is_rebuilt(store):
    path = store.obtain(KEY, build).path
    path.with_name(f'{path.name}.json').unlink()
    assert refusal(store) is Refusal.NO_PASSPORT
    assert store.obtain(KEY, build).rebuilt_for.refusal is Refusal.NO_PASSPORT


def test_a_build_that_fails_leaves_nothing_and_no_lock(store):
    with pytest.raises(ZeroDivisionError):
        store.obtain(KEY, lambda: bytes(1 // 0))
    assert refusal(store) is Refusal.ABSENT
    assert store.obtain(KEY, build, lock_timeout_s=0.0).content == CONTENT


def test_of_two_processes_exactly_one_builds(store, tmp_path):
    log = tmp_path / 'log'
    first, second = (start_builder(store, log, '1.0') for _ in range(2))
    said = sorted(process.communicate(timeout=120)[0].strip() for process in (first, second))
    assert log.read_text() == 'begin\nend\n'
    assert said == [f'{len(CONTENT)} None', f'{len(CONTENT)} {Refusal.ABSENT.value}']


def test_a_killed_build_is_never_loaded_and_frees_the_lock(store, tmp_path):
    log = tmp_path / 'log'
    process = start_builder(store, log, '600')
    wait_for(log, 'begin')
    with pytest.raises(SpanvlaError, match='another process'):
        store.obtain(KEY, never, lock_timeout_s=0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert refusal(store) is Refusal.ABSENT
    assert store.obtain(KEY, build, lock_timeout_s=1.0).content == CONTENT


def _die_at(step):
    """A copy of `os.replace` that ends the process, as SIGKILL does, instead of call `step`."""
    return f"""
import os, pathlib, signal, sys
calls = 0
original = pathlib.Path.replace
def replace(self, target):
    global calls
    calls += 1
    if calls == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
pathlib.Path.replace = replace
"""


@pytest.mark.parametrize('step', [1, 2])
@pytest.mark.parametrize('earlier', [False, True])
def test_kill_between_the_two_files_leaves_nothing_that_loads(store, tmp_path, step, earlier):
    if earlier:
        path = store.obtain(KEY, lambda: b'old engine').path
        path.write_bytes(b'old rngine')
    arguments = [str(tmp_path), json.dumps(dataclasses.asdict(KEY)), str(tmp_path / 'log'), '0']
    done = subprocess.run([sys.executable, '-c', _die_at(step) + BUILDER, *arguments])
    assert done.returncode == -signal.SIGKILL
    assert isinstance(store.find(KEY), Diagnosis)
    assert list(store.folder.glob('*.tmp')) or list(store.folder.glob('.*.tmp'))
    assert store.obtain(KEY, build).content == CONTENT
    assert isinstance(store.find(KEY), Engine)
    assert not list(store.folder.glob('.*.tmp'))


def test_keys_follow_graph_weights_and_platform(toy, tmp_path):
    directory = load_model_dir(toy.path)
    platform = Platform('gpu', '9.0', '580', '10.3.0', plugins=('p 1',))
    keys = {name: engine_key(directory, name, 'fp32', 'static', platform) for name in GRAPHS}
    assert keys['step'].onnx_sha256 == directory.files['graphs/step.onnx']
    assert len({key.file_name for key in keys.values()}) == 5
    assert len({key.weights_sha256 for key in keys.values()}) == 1
    assert keys['step'].file_name.startswith('step-fp32-')
    elsewhere = dataclasses.replace(platform, gpu_name='other')
    assert engine_key(directory, 'step', 'fp32', 'static', elsewhere) != keys['step']


def test_engines_are_not_part_of_the_manifest(toy, tmp_path):
    path = tmp_path / 'model'
    shutil.copytree(toy.path, path)
    before = load_model_dir(path).sha256
    EngineStore(path).obtain(KEY, build)
    assert load_model_dir(path).sha256 == before
    assert write_manifest(path) == before


def keys_of(*names):
    return {name: dataclasses.replace(KEY, graph=name) for name in names}


def test_engines_that_agree_are_activated(store):
    keys = keys_of('vision', 'step')
    opened = open_activated(store, keys, str.encode, dict, lambda _: 9e-4)
    assert {name: engine.content for name, engine in opened.items()} == {
        'vision': b'vision',
        'step': b'step',
    }
    again = open_activated(store, keys, lambda _: never(), dict, lambda _: 9e-4)
    assert all(engine.rebuilt_for is None for engine in again.values())


def test_engines_that_disagree_are_built_again_once(store):
    keys = keys_of('vision', 'step')
    open_activated(store, keys, lambda name: b'bad', dict, lambda _: 0.0)
    opened = open_activated(
        store, keys, str.encode, dict, lambda o: 0.0 if o['step'].content == b'step' else 1.0
    )
    assert opened['vision'].content == b'vision'


@pytest.mark.parametrize('apart_m', [0.0011, float('inf'), float('nan')])
def test_fresh_engines_that_disagree_are_refused_and_removed(store, apart_m):
    keys = keys_of('vision', 'step')
    with pytest.raises(SpanvlaError, match=r'freshly built fp32 engines.*another precision'):
        open_activated(store, keys, str.encode, dict, lambda _: apart_m)
    assert refusal(store, keys['step']) is Refusal.ABSENT


def test_the_bound_follows_the_precision(store):
    keys = {'step': dataclasses.replace(KEY, precision='fp16')}
    assert open_activated(store, keys, str.encode, dict, lambda _: 0.019)
    with pytest.raises(SpanvlaError, match=r'allowed are 0\.02 m'):
        open_activated(store, keys, str.encode, dict, lambda _: 0.021)


@pytest.mark.slow
def test_golden_plans_hold_for_onnx_runtime_and_catch_a_wrong_engine():
    # A fresh expert's velocity is zero, and five per cent of nothing is no fault: the shipped one.
    directory = load_model_dir(shipped_model_dir())
    backend = OnnxBackend(directory)
    assert waypoint_difference_m(backend, directory) <= 1e-3
    step = backend.step
    backend.step = lambda x, *rest: 1.05 * step(x, *rest)
    assert waypoint_difference_m(backend, directory) > 1e-3
    backend.step = lambda x, *rest: float('nan') * step(x, *rest)
    assert waypoint_difference_m(backend, directory) == float('inf')
