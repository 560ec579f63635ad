"""Training rows in parquet shards: pictures as JPEG bytes, all else as plain columns.

A shard is self-contained and is written under a temporary name, then renamed, so that a shard
that exists is whole. Pictures are RGB in memory and standard JPEG (quality 95, no chroma
subsampling: a brake lamp is three pixels wide) on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, UInt8

from spanvla_ros.town.elements import CLASSES
from spanvla_ros.town.scenarios import HELD_OUT_SEED
from spanvla_ros.types import (
    CameraFrame,
    EgoState,
    Observation,
    Sample,
    SpanvlaError,
    read_json,
)

PATTERN = 'scenes-*.parquet'
MANIFEST = 'manifest.json'
JPEG_QUALITY = 95
PRESENT_CLASSES = CLASSES[1:]
FACTS = (
    'lead',
    'lead_inverse_distance',
    'lead_braking',
    'red',
    'green',
    'light_inverse_distance',
    'pedestrian_on_road',
    'pedestrian_inverse_distance',
    'lane_offset',
    'heading',
    'road_y_10m',
    'road_y_20m',
    'road_y_30m',
    'road_y_45m',
)
_VERSION = 1
_EGO_FIELDS = tuple(field.name for field in fields(EgoState))
_TEXTS = (
    'scene_id', 'family', 'label', 'pair_id', 'thinking', 'reasoning', 'command',
    'seen_reasoning',
)  # fmt: skip


@dataclass(frozen=True)
class TrainingRow:
    """A sample with what only the drawn town knows: classes per visual token, and true facts.

    `presence[token, k]` tells whether class `k + 1` of `town.elements.CLASSES` shows in the cell
    of a visual token, tokens in the order of the prompt. `facts` are named by `FACTS`.
    `scoring` is the scoring row (`scoring_rows.unpack_scene`), empty where the set has none.
    """

    sample: Sample
    presence: Bool[np.ndarray, 'tokens 7']
    facts: Float32[np.ndarray, '14']
    scoring: bytes = b''


@dataclass(frozen=True)
class Origin:
    """What the manifest of a directory of shards says of them; all None where there is none."""

    seed: int | None = None
    ranges_sha256: str | None = None
    manifest_sha256: str | None = None


def read_origin(folder: Path) -> Origin:
    """Where the shards of a directory come from.

    Raises:
        SpanvlaError: there is a manifest and it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return Origin()
    fix = 'run the command again that drew the scenes'
    content = read_json(path, fix)
    seed, ranges = content.get('seed'), content.get('ranges_sha256')
    if not isinstance(seed, int | None) or isinstance(seed, bool):
        raise SpanvlaError(f'{path}: seed is {seed!r:.40}, no whole number; {fix}')
    if not isinstance(ranges, str | None):
        raise SpanvlaError(f'{path}: ranges_sha256 is {ranges!r:.40}, no text; {fix}')
    return Origin(seed, ranges, hashlib.sha256(path.read_bytes()).hexdigest())


def refuse_held_out(folder: Path, use: str) -> None:
    """Make sure that no scenes at or below a directory are held out for evaluation.

    Args:
        folder: of shards.
        use: what would be done with them, such as `train on`.

    Raises:
        SpanvlaError: a manifest there names a held-out seed, or is damaged.
    """
    for path in sorted(folder.rglob(MANIFEST)):
        if (read_origin(path.parent).seed or 0) >= HELD_OUT_SEED:
            raise SpanvlaError(
                f'{path.parent}: is held out for evaluation; {use} scenes of a seed below '
                f'{HELD_OUT_SEED}'
            )


def encode_picture(image: UInt8[np.ndarray, 'h w 3']) -> bytes:
    """An RGB picture as JPEG."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]  # fmt: skip
    done, data = cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f'picture of shape {image.shape} cannot be written as JPEG')
    return data.tobytes()


def decode_picture(data: bytes | pa.Buffer) -> UInt8[np.ndarray, 'h w 3']:
    """A JPEG picture as RGB."""
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError('bytes are not a JPEG picture')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_shard(path: str | Path, rows: Sequence[TrainingRow]) -> None:
    """Write rows to one parquet file; it appears whole or not at all.

    Raises:
        ValueError: no rows, or rows of different cameras, history, waypoints or tokens.
    """
    if not rows:
        raise ValueError('a shard needs at least one row')
    path = Path(path)
    cameras = _camera_names(rows)
    samples = [row.sample for row in rows]
    seen = [sample.observation for sample in samples]
    # One byte a visual token, a bit a class.
    presence = [np.packbits(row.presence, axis=-1) for row in rows]
    scored = {'scoring': pa.array([row.scoring or None for row in rows], type=pa.binary())}
    table = pa.table(
        {
            **(scored if any(row.scoring for row in rows) else {}),
            'scene_id': pa.array([s.scene_id for s in samples]),
            'family': pa.array([s.family for s in samples]),
            'label': pa.array([s.label for s in samples]),
            'pair_id': pa.array([s.pair_id for s in samples]),
            'thinking': pa.array([s.thinking for s in samples]),
            'reasoning': pa.array([s.reasoning for s in samples]),
            'command': pa.array([o.command for o in seen]),
            'seen_reasoning': pa.array([o.reasoning for o in seen]),
            'seen_reasoning_stamp_ns': pa.array(
                [o.reasoning_stamp_ns for o in seen], type=pa.int64()
            ),
            'stamp_ns': pa.array([o.stamp_ns for o in seen], type=pa.int64()),
            'ego_stamp_ns': pa.array([o.ego.stamp_ns for o in seen], type=pa.int64()),
            'ego': _fixed([astuple(o.ego)[1:] for o in seen], pa.float64(), 'ego'),
            'history': _fixed([o.history for o in seen], pa.float64(), 'history'),
            'history_valid': _fixed([o.history_valid for o in seen], pa.uint8(), 'history_valid'),
            'route': pa.array(
                [None if o.route is None else o.route.reshape(-1).tolist() for o in seen],
                type=pa.list_(pa.float64()),
            ),
            'degraded': pa.array([list(o.degraded) for o in seen], type=pa.list_(pa.string())),
            'future': _fixed([s.future for s in samples], pa.float64(), 'future'),
            'presence': _fixed(presence, pa.uint8(), 'presence'),
            'facts': _fixed([row.facts for row in rows], pa.float32(), 'facts'),
            'frame_stamp_ns': pa.array(
                [[None if f is None else f.stamp_ns for f in _flat(o)] for o in seen],
                type=pa.list_(pa.int64()),
            ),
            'jpeg': pa.array(
                [[None if f is None else encode_picture(f.image) for f in _flat(o)] for o in seen],
                type=pa.list_(pa.binary()),
            ),
        },
        metadata={
            b'spanvla': json.dumps({'version': _VERSION, 'cameras': cameras}).encode(),
        },
    )
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    # JPEG does not compress further; the few numbers beside it are not worth the time.
    try:
        pq.write_table(table, temporary, compression='none', use_dictionary=False)
        os.replace(temporary, path)
    except OSError as error:
        raise SpanvlaError(f'{path}: cannot be written ({error}); make room') from error
    finally:
        temporary.unlink(missing_ok=True)


class ShardSet:
    """All rows of the shards of a directory, in memory, reached by number in any order."""

    def __init__(self, path: str | Path) -> None:
        """Load every shard below `path`; pictures stay JPEG until a row is asked for.

        Raises:
            SpanvlaError: there is no shard, a file is none, or the shards do not fit together.
        """
        self.path = Path(path)
        files = sorted(self.path.rglob(PATTERN))
        if not files:
            raise SpanvlaError(f'{path}: holds no {PATTERN}; make some with `spanvla scenes`')
        self._shards = [_Shard(file) for file in files]
        if len({tuple(shard.cameras) for shard in self._shards}) > 1:
            raise SpanvlaError(f'{path}: its shards have different cameras; keep them apart')
        self._end = list(accumulate(len(shard) for shard in self._shards))
        self.cameras = tuple(self._shards[0].cameras)
        self.families = self._texts('family')
        self.scene_ids = self._texts('scene_id')
        self.labels = self._texts('label')
        self.pair_ids = self._texts('pair_id')
        self.thinking = self._texts('thinking')
        self.facts = self._numbers('facts')
        self.futures = self._numbers('future').reshape(len(self), -1, 3)
        self.speeds_mps = self._numbers('ego')[:, _EGO_FIELDS.index('speed_mps') - 1]
        self.scored = np.concatenate([shard.scored for shard in self._shards])

    def __len__(self) -> int:
        return self._end[-1]

    def check_cameras(self, wanted: Sequence[str]) -> None:
        """Refuse a set whose cameras are not those of a model."""
        if self.cameras != tuple(wanted):
            raise SpanvlaError(
                f'{self.path}: has cameras {", ".join(self.cameras)}, the model wants '
                f'{", ".join(wanted)}; draw scenes with --model'
            )

    def rows(
        self, indices: Sequence[int] | np.ndarray, frames: int | None = None
    ) -> list[TrainingRow]:
        """The rows of these numbers, in this order, pictures decoded.

        Args:
            indices: the numbers.
            frames: pictures a camera that the model takes: the newest of a set that has more;
                0 takes none, None takes all.

        Raises:
            SpanvlaError: the set has fewer pictures a camera, or a row cannot be read.
        """
        return [self._row(int(index), frames) for index in indices]

    def presence(self, indices: Sequence[int] | np.ndarray) -> Bool[np.ndarray, 'n tokens 7']:
        """Class bits of visual tokens alone, without decoding a picture."""
        found = []
        for index in indices:
            shard, row = self._place(int(index))
            found.append(shard.presence(row))
        return np.stack(found)

    def scoring(self, index: int) -> bytes:
        """The scoring row of a row, empty where it has none."""
        shard, row = self._place(int(index))
        return shard.scoring(row)

    def where(self, index: int) -> str:
        """File and row of a row, for error sentences."""
        shard, row = self._place(int(index))
        return f'{shard.file} row {row}'

    def _place(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f'row {index} of {len(self)}')
        at = bisect_right(self._end, index)
        return self._shards[at], index - (self._end[at - 1] if at else 0)

    def _row(self, index: int, frames: int | None) -> TrainingRow:
        shard, row = self._place(index)
        if frames and frames > shard.frames_per_camera:
            raise SpanvlaError(
                f'{self.path}: has {shard.frames_per_camera} pictures a camera, the model wants '
                f'{frames}; draw scenes with --model'
            )
        try:
            return shard.row(row, shard.frames_per_camera if frames is None else frames)
        except (ValueError, TypeError, KeyError) as error:
            raise SpanvlaError(
                f'{shard.file} row {row}: cannot be read ({error}); draw the shard again'
            ) from error

    def _texts(self, name: str) -> np.ndarray:
        return np.concatenate(
            [np.array(shard.texts[name], dtype=object) for shard in self._shards]
        )

    def _numbers(self, name: str) -> np.ndarray:
        return np.concatenate([shard.numbers[name] for shard in self._shards])


class _Shard:
    """One parquet file in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            table = pq.read_table(file, memory_map=True)
            about = json.loads((table.schema.metadata or {})[b'spanvla'])
            if about['version'] != _VERSION:
                raise SpanvlaError(f'{file}: is of version {about["version"]}; draw it again')
            self.cameras: list[str] = about['cameras']
            self._read(table)
        except (KeyError, ValueError, OSError, pa.ArrowException) as error:
            raise SpanvlaError(
                f'{file}: not a shard of this project ({str(error).splitlines()[0]:.80}); '
                'draw it again with `spanvla scenes`'
            ) from error

    def _read(self, table: pa.Table) -> None:
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        self._count = table.num_rows
        for name in ('future', 'history', 'ego', 'facts', 'presence', 'jpeg'):
            self._refuse(columns[name].is_null().to_numpy(zero_copy_only=False), name)
        self.texts = {name: columns[name].to_pylist() for name in _TEXTS}
        self.numbers = {
            name: columns[name].flatten().to_numpy(zero_copy_only=False).reshape(self._count, -1)
            for name in ('ego', 'history', 'history_valid', 'future', 'presence', 'facts')
        }
        futures = self.numbers['future']
        self._refuse(~np.isfinite(futures).all(axis=1) | (futures.shape[1] == 0), 'future')
        self._stamps = columns['stamp_ns'].to_numpy()
        self._ego_stamps = columns['ego_stamp_ns'].to_numpy()
        self._reasoning_stamps = columns['seen_reasoning_stamp_ns'].to_pylist()
        self._routes = columns['route'].to_pylist()
        self._degraded = columns['degraded'].to_pylist()
        self._frame_stamps = columns['frame_stamp_ns'].to_pylist()
        self._jpeg = columns['jpeg'].flatten()
        self._per_row = len(self._jpeg) // max(self._count, 1)
        # Shards drawn before scoring rows were, and training sets, do without.
        self._scoring = columns.get('scoring')
        self.scored = np.zeros(self._count, dtype=bool)
        if self._scoring is not None:
            self.scored = self._scoring.is_valid().to_numpy(zero_copy_only=False)

    def _refuse(self, lacking: Bool[np.ndarray, ' n'], name: str) -> None:
        if lacking.any():
            row = int(np.argmax(lacking))
            raise SpanvlaError(
                f'{self.file} row {row}: has no {name} that is finite; draw the shard again'
            )

    def __len__(self) -> int:
        return self._count

    def presence(self, row: int) -> Bool[np.ndarray, 'tokens 7']:
        tokens = self.numbers['presence'][row][:, None]
        return np.unpackbits(tokens, axis=1, count=len(PRESENT_CLASSES)).astype(bool)

    def scoring(self, row: int) -> bytes:
        if self._scoring is None:
            return b''
        data: bytes | None = self._scoring[row].as_py()
        return data or b''

    @property
    def frames_per_camera(self) -> int:
        return self._per_row // len(self.cameras)

    def row(self, row: int, frames: int) -> TrainingRow:
        seen = Observation(
            stamp_ns=int(self._stamps[row]),
            frames=self._frames(row, frames) if frames else (),
            ego=EgoState(int(self._ego_stamps[row]), *self.numbers['ego'][row].tolist()),
            history=self.numbers['history'][row].reshape(-1, 3).copy(),
            history_valid=self.numbers['history_valid'][row].astype(bool),
            route=self._route(row),
            command=self.texts['command'][row],
            reasoning=self.texts['seen_reasoning'][row],
            reasoning_stamp_ns=self._reasoning_stamps[row],
            degraded=tuple(self._degraded[row]),
        )
        text: dict[str, str] = {name: self.texts[name][row] for name in _TEXTS[:6]}
        future = self.numbers['future'][row].reshape(-1, 3).copy()
        sample = Sample(observation=seen, future=future, **text)
        shown = self.presence(row)
        if 0 < frames < self.frames_per_camera:
            cells = shown.reshape(len(self.cameras), self.frames_per_camera, -1, shown.shape[-1])
            shown = cells[:, -frames:].reshape(-1, shown.shape[-1])
        return TrainingRow(sample, shown, self.numbers['facts'][row].copy(), self.scoring(row))

    def _route(self, row: int) -> np.ndarray | None:
        route = self._routes[row]
        return None if route is None else np.array(route, dtype=np.float64).reshape(-1, 2)

    def _frames(self, row: int, frames: int) -> tuple[tuple[CameraFrame | None, ...], ...]:
        per_camera = self.frames_per_camera
        ends = range(per_camera, self._per_row + 1, per_camera)
        return tuple(
            tuple(self._frame(row, end - back) for back in range(frames, 0, -1)) for end in ends
        )

    def _frame(self, row: int, slot: int) -> CameraFrame | None:
        data = self._jpeg[row * self._per_row + slot]
        if not data.is_valid:
            return None
        camera = self.cameras[slot // self.frames_per_camera]
        stamp_ns = self._frame_stamps[row][slot]
        return CameraFrame(camera, stamp_ns, decode_picture(data.as_buffer()))


def _flat(observation: Observation) -> list[CameraFrame | None]:
    return [frame for camera in observation.frames for frame in camera]


def _camera_names(rows: Sequence[TrainingRow]) -> list[str]:
    """Names in the order of the model's config, pieced together from frames that are there."""
    shapes = {
        (len(row.sample.observation.frames), len(row.sample.observation.frames[0])) for row in rows
    }
    if len(shapes) != 1:
        raise ValueError(f'rows of one shard differ in cameras and frames: {sorted(shapes)}')
    names: list[set[str]] = [set() for _ in range(shapes.pop()[0])]
    for row in rows:
        for camera, frames in enumerate(row.sample.observation.frames):
            names[camera] |= {frame.camera for frame in frames if frame is not None}
    if any(len(found) > 1 for found in names):
        raise ValueError(f'rows of one shard differ in the order of their cameras: {names}')
    return [next(iter(found), f'camera_{index}') for index, found in enumerate(names)]


def _stacked(arrays: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    if len({array.size for array in flat}) != 1:
        raise ValueError(f'rows of one shard differ in the size of {name}')
    return np.stack(flat)


def _fixed(arrays: Sequence[Any] | np.ndarray, kind: pa.DataType, name: str) -> pa.Array:
    stacked = _stacked(arrays, name).astype(kind.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(stacked.reshape(-1)), stacked.shape[1])
