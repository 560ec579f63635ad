"""Engine passports: a built engine is loaded only where, and as, it was built.

Beside each engine in `engines/` lies a JSON passport: what it was built from, with which versions,
on which device, and the sha256 of the engine itself. The file name comes from all but the last.
An engine whose passport does not match is never loaded: it is built again, by one process at a
time, and appears under its name only whole. What a passport cannot know, whether the engine
computes the same thing, is settled by the model's golden inputs before an engine plans.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spanvla_ros.model.checkpoint import ENGINES_DIR, GRAPHS_DIR, ModelDirectory
from spanvla_ros.runtime.onnx_ import external_locations
from spanvla_ros.types import SpanvlaError

PASSPORT_VERSION = 1
PASSPORT_MAX_BYTES = 65_536
LOCK_TIMEOUT_S = 3600.0
LOCK_POLL_S = 0.05
BUILD_ATTEMPTS = 2
# Largest waypoint difference on the golden inputs an engine may have, by precision.
WAYPOINT_BOUNDS_M = {
    'fp32': 1e-3,
    'tf32': 0.02,
    'fp16': 0.02,
    'bf16': 0.05,
    'int8': 0.1,
    'fp8': 0.1,
}
_log = logging.getLogger(__name__)


class Refusal(Enum):
    """Why an engine was not loaded."""

    ABSENT = 'no engine was built yet'
    NO_PASSPORT = 'its passport is missing'
    BAD_PASSPORT = 'its passport cannot be read'
    OTHER_MODEL = 'it was built from another graph or other weights'
    OTHER_SETTINGS = 'it was built with another precision or profile'
    OTHER_DEVICE = 'it was built on another GPU'
    OTHER_VERSION = 'it was built with other versions of TensorRT, driver or plug-ins'
    TRUNCATED = 'the file is not as long as it was'
    CHANGED = 'the file is not what was built'
    GOLDEN = 'it disagrees with the golden inputs of the model'


@dataclass(frozen=True)
class Platform:
    """The device and the libraries an engine belongs to."""

    gpu_name: str
    compute_capability: str
    driver_version: str
    tensorrt_version: str
    onnxruntime_version: str = ''
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineKey:
    """All that must be equal for an engine to be used; its hash names the file."""

    graph: str
    onnx_sha256: str
    weights_sha256: str
    precision: str
    profile: str
    gpu_name: str
    compute_capability: str
    driver_version: str
    tensorrt_version: str
    onnxruntime_version: str
    plugins: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Name of the engine file, such as `step-fp32-0f3a....engine`."""
        content = json.dumps(asdict(self), sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        return f'{self.graph}-{self.precision}-{digest[:20]}.engine'


_REFUSAL_OF_FIELD = {
    'onnx_sha256': Refusal.OTHER_MODEL,
    'weights_sha256': Refusal.OTHER_MODEL,
    'precision': Refusal.OTHER_SETTINGS,
    'profile': Refusal.OTHER_SETTINGS,
    'gpu_name': Refusal.OTHER_DEVICE,
    'compute_capability': Refusal.OTHER_DEVICE,
}


@dataclass(frozen=True)
class Diagnosis:
    """A refusal, and the field and values that differ where there are such."""

    refusal: Refusal
    detail: str = ''

    def __str__(self) -> str:
        return f'{self.refusal.value} ({self.detail})' if self.detail else self.refusal.value


@dataclass(frozen=True)
class Engine:
    """A whole, matching engine; `rebuilt_for` says why it had to be built, None if it was there.

    `content` are the very bytes that were hashed, so that nothing can change them in between.
    """

    path: Path
    content: bytes
    rebuilt_for: Diagnosis | None


Opened = TypeVar('Opened')


def engine_key(
    directory: ModelDirectory, graph: str, precision: str, profile: str, platform: Platform
) -> EngineKey:
    """The key of one graph of a verified model directory on this platform."""
    path = directory.graph(graph)
    weights = sorted(external_locations(path.read_bytes()))
    listing = ''.join(f'{directory.files[f"{GRAPHS_DIR}/{name}"]}  {name}\n' for name in weights)
    return EngineKey(
        graph=graph,
        onnx_sha256=directory.files[f'{GRAPHS_DIR}/{graph}.onnx'],
        weights_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        precision=precision,
        profile=profile,
        **asdict(platform),
    )


class EngineStore:
    """The engines of one model directory."""

    def __init__(self, model_dir: str | Path) -> None:
        """Use `engines/` of a model directory; it is made when the first engine is."""
        self.folder = Path(model_dir) / ENGINES_DIR

    def find(self, key: EngineKey) -> Engine | Diagnosis:
        """The matching engine, or why there is none."""
        path = self.folder / key.file_name
        passport = _passport_path(path)
        if not path.is_file():
            return self._nearest(key)
        if not passport.is_file():
            return Diagnosis(Refusal.NO_PASSPORT)
        content = _read_passport(passport)
        if content is None:
            return Diagnosis(Refusal.BAD_PASSPORT)
        if difference := _difference(content['key'], key):
            return difference
        engine = path.read_bytes()
        if len(engine) != content['engine_bytes']:
            return Diagnosis(
                Refusal.TRUNCATED, f'{len(engine)} bytes, built were {content["engine_bytes"]}'
            )
        if hashlib.sha256(engine).hexdigest() != content['engine_sha256']:
            return Diagnosis(Refusal.CHANGED)
        return Engine(path, engine, None)

    def obtain(
        self,
        key: EngineKey,
        build: Callable[[], bytes],
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> Engine:
        """The matching engine; built, by one process only, where there is none.

        Args:
            key: what it must match.
            build: builds the engine and returns it serialized; may take minutes.
            lock_timeout_s: how long to wait for another process that is building it.

        Raises:
            SpanvlaError: another process has been building for too long.
        """
        found = self.find(key)
        if isinstance(found, Engine):
            return found
        with self._locked(key, lock_timeout_s):
            found = self.find(key)
            if isinstance(found, Engine):
                return found
            _log.info('engine of graph %s: %s; building it', key.graph, found)
            began = time.monotonic()
            content = bytes(build())
            self._write(key, content, time.monotonic() - began)
        return Engine(self.folder / key.file_name, content, found)

    def discard(self, key: EngineKey) -> None:
        """Remove an engine, its passport first, so that it cannot be loaded half-way."""
        path = self.folder / key.file_name
        _passport_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _write(self, key: EngineKey, content: bytes, build_s: float) -> None:
        path = self.folder / key.file_name
        for left in self.folder.glob(f'.{path.name}*.tmp'):
            # Ours is the lock: whoever left this is dead.
            left.unlink(missing_ok=True)
        passport = {
            'passport_version': PASSPORT_VERSION,
            'key': asdict(key),
            'engine_sha256': hashlib.sha256(content).hexdigest(),
            'engine_bytes': len(content),
            'build_s': round(build_s, 3),
        }
        _passport_path(path).unlink(missing_ok=True)
        write_durably(path, content)
        text = json.dumps(passport, indent=1, allow_nan=False) + '\n'
        write_durably(_passport_path(path), text.encode())

    def _nearest(self, key: EngineKey) -> Diagnosis:
        """Why none of the engines of the same graph is the right one."""
        for path in sorted(self.folder.glob(f'{key.graph}-*.engine.json')):
            content = _read_passport(path)
            if content is not None and (difference := _difference(content['key'], key)):
                return difference
        return Diagnosis(Refusal.ABSENT)

    @contextmanager
    def _locked(self, key: EngineKey, timeout_s: float) -> Iterator[None]:
        place = self.folder / f'.{key.file_name}.lock'
        try:
            self.folder.mkdir(exist_ok=True)
            place.touch()
        except OSError as error:
            raise SpanvlaError(
                f'{self.folder}: {error.strerror}; engines are kept in the model directory, '
                'let it be written'
            ) from error
        until = time.monotonic() + timeout_s
        # The file stays: removing it would let two processes hold two locks of one name.
        with place.open('a') as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise SpanvlaError(
                            f'{place}: another process has been building this engine for more '
                            f'than {timeout_s:.0f} s; wait for it or end it'
                        ) from None
                    time.sleep(LOCK_POLL_S)
            # The kernel drops the lock with the process, however it ends.
            yield


def open_activated(
    store: EngineStore,
    keys: Mapping[str, EngineKey],
    build: Callable[[str], bytes],
    open_engines: Callable[[Mapping[str, Engine]], Opened],
    difference_m: Callable[[Opened], float],
) -> Opened:
    """Open the engines of a model once they agree with its golden inputs.

    A set that disagrees is discarded and built once more; then it is refused.

    Args:
        store: where the engines are.
        keys: by graph; all of one precision.
        build: builds the engine of one graph.
        open_engines: makes something that runs out of all engines.
        difference_m: largest waypoint difference of that from the golden plans.

    Raises:
        SpanvlaError: the engines disagree even when freshly built.
    """
    precision = next(iter(keys.values())).precision
    bound_m = WAYPOINT_BOUNDS_M[precision]
    largest_m = float('nan')
    for _ in range(BUILD_ATTEMPTS):
        engines = {name: store.obtain(key, partial(build, name)) for name, key in keys.items()}
        opened = open_engines(engines)
        largest_m = difference_m(opened)
        if largest_m <= bound_m:
            return opened
        for key in keys.values():
            store.discard(key)
        _log.warning(
            'engines: %s (%.4f m, allowed %.4f m)', Refusal.GOLDEN.value, largest_m, bound_m
        )
        if all(engine.rebuilt_for is not None for engine in engines.values()):
            break
    raise SpanvlaError(
        f'{store.folder}: freshly built {precision} engines differ from the golden plans by '
        f'{largest_m:.4f} m, allowed are {bound_m:g} m; use another precision or backend'
    )


def _passport_path(engine: Path) -> Path:
    return engine.with_name(f'{engine.name}.json')


def _read_passport(path: Path) -> dict[str, Any] | None:
    """A passport's content where it has the right form, else None."""
    try:
        if path.is_symlink() or path.stat().st_size > PASSPORT_MAX_BYTES:
            return None
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get('passport_version') != PASSPORT_VERSION:
        return None
    key = content.get('key')
    if not isinstance(key, dict) or set(key) != {field.name for field in fields(EngineKey)}:
        return None
    sha256, size = content.get('engine_sha256'), content.get('engine_bytes')
    return content if isinstance(sha256, str) and isinstance(size, int) else None


def _difference(theirs: Mapping[str, Any], ours: EngineKey) -> Diagnosis | None:
    for name, wanted in asdict(ours).items():
        given = theirs[name]
        given = tuple(given) if isinstance(given, list) else given
        if given != wanted:
            refusal = _REFUSAL_OF_FIELD.get(name, Refusal.OTHER_VERSION)
            return Diagnosis(refusal, f'{name} {given!s:.60}, here {wanted!s:.60}')
    return None


def write_durably(path: Path, content: bytes) -> None:
    """Write under a temporary name, bring it to the disk, then rename."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
