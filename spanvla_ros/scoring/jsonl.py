"""Reading JSON Lines of any size in bounded memory, plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from spanvla_ros.types import SpanvlaError

MAX_LINE_BYTES = 16 * 2**20
_BLOCK_BYTES = 2**20
_GZIP_MAGIC = b'\x1f\x8b'


@dataclass(frozen=True)
class Line:
    """One line of a file: its number from 1, and its bytes, or why they cannot be used."""

    number: int
    content: bytes
    error: str = ''


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank; one over 16 MiB comes as an error, not as content.

    Raises:
        SpanvlaError: the file cannot be opened, or its compression is damaged.
    """
    try:
        with open(path, 'rb') as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
        with gzip.open(path, 'rb') if zipped else open(path, 'rb') as file:
            yield from _split(file)
    except (OSError, EOFError, zlib.error) as error:
        raise SpanvlaError(f'{path}: cannot be read ({error})') from error


def _split(file: gzip.GzipFile | IO[bytes]) -> Iterator[Line]:
    # Own splitting: `readline` goes through small buffers and takes seconds for a huge line.
    number, kept, too_long = 1, bytearray(), False
    while block := file.read(_BLOCK_BYTES):
        *ended, open_end = block.split(b'\n')
        for piece in ended:
            kept += piece
            yield from _line(number, bytes(kept), too_long=too_long)
            number, kept, too_long = number + 1, bytearray(), False
        kept += open_end
        if len(kept) > MAX_LINE_BYTES:
            kept, too_long = bytearray(), True
    yield from _line(number, bytes(kept), too_long=too_long)


def _line(number: int, content: bytes, *, too_long: bool) -> Iterator[Line]:
    if too_long or len(content) > MAX_LINE_BYTES:
        yield Line(number, b'', f'is longer than {MAX_LINE_BYTES // 2**20} MiB')
    elif content.strip():
        yield Line(number, content.strip())


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        SpanvlaError: it is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = 'nested too deeply' if isinstance(error, RecursionError) else str(error)
        raise SpanvlaError(f'is not JSON ({reason:.120})') from error
    if not isinstance(raw, dict):
        raise SpanvlaError('is not a JSON object')
    return raw


class NamedObjects:
    """A JSON Lines file as a mapping from each object's `scene` to that object.

    Lines are spooled to a temporary file and parsed when asked for, so memory grows with the
    number of names only. `errors` holds one sentence for each line that has no usable name.
    """

    def __init__(self, path: Path) -> None:
        """Read the file once and note where each object lies."""
        self.path = path
        self.errors: list[tuple[str | None, str]] = []
        self.hashes: dict[str, bytes] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        for line in read_lines(path):
            self._note(line)

    def _note(self, line: Line) -> None:
        where = f'{self.path.name} line {line.number}'
        if line.error:
            self.errors.append((None, f'{where}: {line.error}'))
            return
        try:
            name = parse_object(line.content).get('scene')
        except SpanvlaError as error:
            self.errors.append((None, f'{where}: {error}'))
            return
        if not isinstance(name, str) or not name:
            self.errors.append((None, f'{where}: scene: must be the name of the scene'))
        elif name in self._places:
            self.errors.append((name, f'{where}: scene: {name!r:.80} is there twice'))
        else:
            self._places[name] = (self._spool.tell(), len(line.content))
            self.hashes[name] = hashlib.sha256(line.content).digest()
            self._spool.write(line.content)

    def __contains__(self, name: object) -> bool:
        """Whether an object of this name was read."""
        return name in self._places

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The object of this name; KeyError where there is none."""
        start, size = self._places[name]
        self._spool.seek(start)
        return parse_object(self._spool.read(size))

    def __enter__(self) -> NamedObjects:
        """Nothing to do: the file was read when the object was made."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the temporary file."""
        self.close()

    def close(self) -> None:
        """Let go of the temporary file."""
        self._spool.close()
