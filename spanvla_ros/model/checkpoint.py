"""The model directory, unit of exchange: verified whole before any part of it is parsed.

`manifest.json` holds the sha256 of every file beside it, how the model was trained and its
scores. Allowed are safetensors, JSON, YAML, ONNX and its external data, and plain text: nothing
that runs code when read. `engines/` is built on the target machine and lies outside the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spanvla_ros.model.config import CONFIG_FILE, ModelConfig, load_config
from spanvla_ros.types import MissingExtraError, SpanvlaError, read_json

MANIFEST_FILE = 'manifest.json'
MANIFEST_VERSION = 1
MANIFEST_MAX_BYTES = 4_000_000
GRAPHS_DIR = 'graphs'
ENGINES_DIR = 'engines'
SUFFIXES = ('.safetensors', '.json', '.yaml', '.onnx', '.data', '.md', '.txt')
# `fp32` lies in `graphs/` itself, each other precision in a folder of its name below.
PRECISIONS = ('fp32', 'fp16', 'bf16', 'int8', 'fp8')
GRAPHS = ('vision', 'prefill_action', 'prefill_reason', 'decode', 'step')


def graphs_dir(precision: str) -> str:
    """Folder of the graphs of a precision, relative to the model directory."""
    return GRAPHS_DIR if precision == 'fp32' else f'{GRAPHS_DIR}/{precision}'


def graphs_of(config: ModelConfig) -> tuple[str, ...]:
    """The five graphs of a model; the last depends on its head."""
    return (*GRAPHS[:-1], config.expert_graph)


@dataclass(frozen=True)
class ModelDirectory:
    """A verified model directory.

    `sha256` names the model: the hash of its list of files and their hashes, so that notes and
    scores may be rewritten without renaming the model. `graph_notes` tells of each precision below
    fp32 how its graphs were made and how far they are off.
    """

    path: Path
    config: ModelConfig
    files: Mapping[str, str]
    training: Mapping[str, Any]
    scores: Mapping[str, Any]
    sha256: str
    graph_notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_graphs(self) -> bool:
        """Whether all five ONNX graphs are there in fp32."""
        return 'fp32' in self.precisions

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which all five ONNX graphs are there."""
        names = graphs_of(self.config)
        return tuple(
            precision
            for precision in PRECISIONS
            if all(f'{graphs_dir(precision)}/{name}.onnx' in self.files for name in names)
        )

    def graph(self, name: str, precision: str = 'fp32') -> Path:
        """Path of one ONNX graph; absent graphs raise `SpanvlaError` with the fix."""
        relative = f'{graphs_dir(precision)}/{name}.onnx'
        if relative not in self.files:
            wanted = '' if precision == 'fp32' else f' --precision {precision}'
            raise SpanvlaError(
                f'{self.path}: {relative} is missing; '
                f'run: spanvla export --model {self.path}{wanted}'
            )
        return self.path / relative

    def file(self, relative: str) -> Path:
        """Path of a listed file; an unlisted one raises `SpanvlaError`."""
        if relative not in self.files:
            raise SpanvlaError(
                f'{self.path}: {relative} is not in {MANIFEST_FILE}; model incomplete'
            )
        return self.path / relative


def load_model_dir(path: str | Path) -> ModelDirectory:
    """Verify every file of a model directory, then read its configuration.

    Raises:
        SpanvlaError: no directory, no or bad manifest, a file changed, missing, unlisted, a
            symbolic link, of a forbidden kind, or outside the directory.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SpanvlaError(
            f'{folder}: no model directory there; name one that holds {CONFIG_FILE}'
        )
    manifest = verify(folder)
    files: dict[str, str] = manifest['files']
    if CONFIG_FILE not in files:
        raise SpanvlaError(f'{folder}: {MANIFEST_FILE} lists no {CONFIG_FILE}; export it again')
    return ModelDirectory(
        path=folder,
        config=load_config(folder),
        files=files,
        training=manifest.get('training', {}),
        scores=manifest.get('scores', {}),
        sha256=model_sha256(files),
        graph_notes=manifest.get('graph_notes', {}),
    )


def shipped_model_dir() -> Path:
    """The town model that comes with the package: in its source tree, else where it is installed.

    Raises:
        SpanvlaError: neither place has it.
    """
    source = Path(__file__).resolve().parents[2] / 'models' / 'town'
    installed = Path(sys.prefix) / 'share' / 'spanvla_ros' / 'models' / 'town'
    for folder in (source, installed, *_ament_models()):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    raise SpanvlaError(f'{source}: the town model is not there; name one with --model')


def _ament_models() -> list[Path]:
    prefixes = os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)
    return [Path(p) / 'share' / 'spanvla_ros' / 'models' / 'town' for p in prefixes if p]


def model_sha256(files: Mapping[str, str]) -> str:
    """The model's name: sha256 over its sorted file names and their hashes."""
    listing = ''.join(f'{files[name]}  {name}\n' for name in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()


def verify(model_dir: str | Path) -> dict[str, Any]:
    """Check all files against `manifest.json` and return its content; parses nothing else."""
    folder = Path(model_dir)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    listed: dict[str, str] = manifest['files']
    for name, expected in listed.items():
        _check_name(folder, name)
        if not isinstance(expected, str) or len(expected) != 64:
            raise SpanvlaError(f'{folder}: {MANIFEST_FILE} holds no sha256 for {name}')
    present = _present_files(folder)
    if extra := sorted(present - set(listed)):
        raise SpanvlaError(f'{folder}: {extra[0]} is not in {MANIFEST_FILE}; remove it')
    if missing := sorted(set(listed) - present):
        raise SpanvlaError(f'{folder}: {missing[0]} is missing; fetch the model again')
    for name, expected in listed.items():
        if _sha256(folder / name) != expected:
            raise SpanvlaError(
                f'{folder}: {name} differs from {MANIFEST_FILE}; fetch the model again'
            )
    return manifest


def write_manifest(
    model_dir: str | Path,
    training: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    graph_notes: Mapping[str, Any] | None = None,
) -> str:
    """List and hash all files of a model directory in `manifest.json`, in one atomic step.

    Args:
        model_dir: the directory, complete but for the manifest.
        training: how it was trained; None keeps what an earlier manifest says.
        scores: its scores; None keeps what an earlier manifest says.
        graph_notes: of each lower precision; None keeps what an earlier manifest says.

    Returns:
        The model's sha256.
    """
    folder = Path(model_dir)
    earlier: dict[str, Any] = {}
    if (folder / MANIFEST_FILE).exists():
        earlier = _read_manifest(folder / MANIFEST_FILE)
    names = sorted(_present_files(folder))
    for name in names:
        _check_name(folder, name)
    files = {name: _sha256(folder / name) for name in names}
    content = {
        'manifest_version': MANIFEST_VERSION,
        'files': files,
        'training': dict(earlier.get('training', {}) if training is None else training),
        'scores': dict(earlier.get('scores', {}) if scores is None else scores),
    }
    notes = earlier.get('graph_notes', {}) if graph_notes is None else graph_notes
    if notes:
        content['graph_notes'] = dict(notes)
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1, allow_nan=False) + '\n')
    return model_sha256(files)


def swap_directory(new: Path, place: Path) -> None:
    """Put the finished directory `new` at `place`, an earlier one there is removed."""
    old = place.with_name(f'.{place.name}.{os.getpid()}.old')
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def settle_directory(place: Path) -> None:
    """Clear away what a killed `swap_directory` or writer left beside `place`.

    A kill between its two renames leaves the earlier directory under its other name: it is put
    back. Only for directories that nobody is writing now.
    """
    for old in sorted(place.parent.glob(f'.{place.name}.*.old')):
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(place)
    for building in place.parent.glob(f'.{place.name}.*tmp'):
        shutil.rmtree(building, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_text(text, encoding='utf-8')
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as numpy arrays."""
    load_file = _safetensors().load_file
    try:
        tensors: dict[str, np.ndarray] = load_file(str(path))
    except Exception as error:
        raise SpanvlaError(f'{path}: not a readable safetensors file ({error})') from error
    return tensors


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        _safetensors().save_file(content, str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise MissingExtraError('safetensors', 'onnx') from error
    return safetensors.numpy


def _read_manifest(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise SpanvlaError(f'{path}: missing or a link; every model directory needs its manifest')
    if path.stat().st_size > MANIFEST_MAX_BYTES:
        raise SpanvlaError(f'{path}: longer than {MANIFEST_MAX_BYTES} bytes; not a manifest')
    manifest = read_json(path, 'fetch the model again')
    if not isinstance(manifest.get('files'), dict):
        raise SpanvlaError(f'{path}: lists no files; fetch the model again')
    if manifest.get('manifest_version') != MANIFEST_VERSION:
        raise SpanvlaError(f'{path}: manifest_version is not {MANIFEST_VERSION}; export it again')
    for part in ('training', 'scores', 'graph_notes'):
        if not isinstance(manifest.get(part, {}), dict):
            raise SpanvlaError(f'{path}: {part} is not a mapping; export it again')
    stages = manifest.get('training', {}).get('stages', [])
    if not isinstance(stages, list) or not all(map(_is_stage, stages)):
        raise SpanvlaError(f'{path}: stages of training are not a list of them; export it again')
    return manifest


def _is_stage(stage: object) -> bool:
    return isinstance(stage, dict) and isinstance(stage.get('settings', {}), dict)


def _check_name(folder: Path, name: str) -> None:
    pure = PurePosixPath(name)
    plain = not pure.is_absolute() and '..' not in pure.parts and '\\' not in name
    if not plain or str(pure) != name or name == MANIFEST_FILE:
        raise SpanvlaError(f'{folder}: {MANIFEST_FILE} lists {name!r}, a path outside; refused')
    if pure.suffix not in SUFFIXES:
        raise SpanvlaError(
            f'{folder}: {name} is of a kind not allowed in a model; use {", ".join(SUFFIXES)}'
        )


def _present_files(folder: Path) -> set[str]:
    names: set[str] = set()
    for parent, directories, files in os.walk(folder, followlinks=False):
        here = Path(parent)
        for entry in (*directories, *files):
            if (here / entry).is_symlink():
                raise SpanvlaError(f'{here / entry}: a symbolic link; put the file itself there')
        if here == folder and ENGINES_DIR in directories:
            directories.remove(ENGINES_DIR)
        for entry in files:
            relative = (here / entry).relative_to(folder).as_posix()
            if relative == MANIFEST_FILE:
                continue
            if not (here / entry).is_file():
                raise SpanvlaError(f'{here / entry}: not a plain file; remove it')
            names.add(relative)
    return names


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
