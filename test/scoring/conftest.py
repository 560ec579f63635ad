"""Golden data: what the official scorer says about scenes whose input we score ourselves."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spanvla_ros.scoring.rows import reference_from_json, row_from_json
from spanvla_ros.scoring.scene import scene_from_json

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / 'test' / 'data' / 'golden'
SHARED = ROOT.parent / 'shared' / 'golden'


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, 'rb') as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class Golden:
    """One set of scenes, references and rows, raw and as our own types."""

    folder: Path
    prefix: str

    def path(self, kind: str) -> Path:
        return self.folder / f'{self.prefix}_{kind}.jsonl.gz'

    @cached_property
    def raw_scenes(self) -> dict[str, dict[str, Any]]:
        return {raw['scene']: raw for raw in read(self.path('scenes'))}

    @cached_property
    def scenes(self) -> dict[str, Any]:
        return {name: scene_from_json(raw) for name, raw in self.raw_scenes.items()}

    @cached_property
    def raw_references(self) -> dict[str, dict[str, Any]]:
        return {raw['scene']: raw for raw in read(self.path('references'))}

    @cached_property
    def raw_rows(self) -> list[dict[str, Any]]:
        return read(self.path('rows'))

    def reference(self, name: str, version: str) -> Any:
        return reference_from_json(self.raw_references[name], version)

    def row(self, raw: dict[str, Any]) -> Any:
        return row_from_json(raw, self.scenes[raw['scene']].ego)

    def rows_of(self, name: str) -> Iterator[dict[str, Any]]:
        return (raw for raw in self.raw_rows if raw['scene'] == name)

    def plans(self, name: str) -> np.ndarray:
        """All plans of a scene as 2 Hz world poses."""
        rows = [self.row(raw) for raw in self.rows_of(name)]
        return np.stack([row.poses[4::5] if row.hz == 10 else row.poses for row in rows])


@pytest.fixture(scope='session')
def golden() -> Golden:
    return Golden(SMALL, 'syn')
