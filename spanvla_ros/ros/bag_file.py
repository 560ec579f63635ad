"""One MCAP file of raw messages, written under a temporary name, readable after a kill."""

from __future__ import annotations

import shutil
import struct
from contextlib import closing
from pathlib import Path

from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapReader, McapWriter
from rosbags.typesys import Stores, get_typestore

from spanvla_ros.report.bags import one_line
from spanvla_ros.types import SpanvlaError

MAGIC = b'\x89MCAP0\r\n'
DATA_END = 0x0F
FOOTER = 0x02


class BagFile:
    """Writes serialized messages into one `.mcap`; `close` gives it its final name.

    Until then the messages stand in `<name>.part/`, and `recover` makes a file of what a killed
    process left there.
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path` for writing.

        Raises:
            SpanvlaError: it exists already, or cannot be written there.
        """
        self.path = Path(path)
        self.part = part_folder(self.path)
        if self.path.exists() or self.part.exists():
            raise SpanvlaError(f'{self.path}: exists already; remove it or choose another name')
        self._types = get_typestore(Stores.LATEST)
        self._writer = Writer(self.part, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        try:
            self._writer.open()
        except OSError as error:
            raise SpanvlaError(
                f'{self.path}: {error.strerror}; name a file in a folder that can be written'
            ) from error
        self._connections: dict[str, Connection] = {}
        self._pending = 0

    def write(self, topic: str, kind: str, stamp_ns: int, data: bytes) -> None:
        """Append one message.

        Args:
            topic: absolute topic name.
            kind: message type, such as `nav_msgs/msg/Path`.
            stamp_ns: time of reception.
            data: the serialized (CDR) message.
        """
        connection = self._connections.get(topic)
        if connection is None:
            connection = self._writer.add_connection(topic, kind, typestore=self._types)
            self._connections[topic] = connection
        self._writer.write(connection, stamp_ns, data)
        self._pending += 1

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        storage = self._writer.storage
        if not isinstance(storage, McapWriter) or not self._pending:
            return
        # The library closes a chunk only when it is full; what is in an open one dies with us.
        if storage.chunk.bio.tell():
            storage.close_chunk()
        storage.bio.flush()
        self._pending = 0

    def close(self) -> Path:
        """Write the index, move the file to its name and return that."""
        self._writer.close()
        (self.part / f'{self.part.name}.mcap').rename(self.path)
        shutil.rmtree(self.part)
        return self.path


def part_folder(path: Path) -> Path:
    """Where the messages of `path` stand until it is closed."""
    return path.with_name(f'{path.stem}.part')


def recover(path: str | Path) -> Path | None:
    """Finish the file a killed recorder left: whole records kept, an end written after them.

    Returns:
        The finished file, or None where there is nothing to recover.

    Raises:
        SpanvlaError: what is left is damaged; it stays where it is.
    """
    path = Path(path)
    folder = part_folder(path)
    source = folder / f'{folder.name}.mcap'
    if path.exists() or not source.is_file():
        return None
    data_end = _whole_records(source)
    if data_end <= len(MAGIC):
        return None
    with open(source, 'r+b') as file:
        file.truncate(data_end)
        file.seek(data_end)
        file.write(struct.pack('<BQI', DATA_END, 4, 0))
        file.write(struct.pack('<BQQQI', FOOTER, 20, 0, 0, 0))
        file.write(MAGIC)
    _with_index(source).rename(path)
    shutil.rmtree(folder)
    return path


def _with_index(source: Path) -> Path:
    """A copy with an index beside `source`; without one, messages must not be out of order."""
    copy = source.with_name('indexed.mcap')
    copy.unlink(missing_ok=True)
    shutil.rmtree(part_folder(copy), ignore_errors=True)
    file = BagFile(copy)
    reader = McapReader(source)
    try:
        reader.open()
        with closing(reader):
            for connection, stamp_ns, data in reader.messages_scan(reader.connections):
                file.write(connection.topic, connection.msgtype, stamp_ns, data)
    except Exception as error:
        # Of damaged bytes the library makes anything.
        file.close().unlink()
        raise SpanvlaError(
            f'{source}: damaged ({one_line(error)}); mend it with `mcap recover`, or remove its '
            'folder'
        ) from error
    return file.close()


def _whole_records(source: Path) -> int:
    size = source.stat().st_size
    with open(source, 'rb') as file:
        if file.read(len(MAGIC)) != MAGIC:
            return 0
        position = len(MAGIC)
        while position + 9 <= size:
            file.seek(position)
            opcode, length = struct.unpack('<BQ', file.read(9))
            if opcode == DATA_END or position + 9 + length > size:
                break
            position += 9 + length
    return position
