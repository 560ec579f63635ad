"""Opening a recorded drive and reading it: whatever is wrong with its bytes is one sentence.

Reads what rosbags reads (MCAP and SQLite3 of ROS 2, bags of ROS 1); no ROS installation is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection, Qos
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from spanvla_ros.types import SpanvlaError

AGAIN = 'record or copy it again'
LATEST_NS = 2**63 - 1


class Bag:
    """An open bag.

    A flipped bit or a cut-off copy reaches the library at places where it expects none: it may
    raise anything, from the errors of zstd and SQLite to a `TypeError`. All of it comes out of
    here as `SpanvlaError`; what its caller raises does not pass through.
    """

    def __init__(self, path: Path, reader: AnyReader, types: Typestore) -> None:
        """Of an open reader and our own definitions of messages.

        Raises:
            ValueError: what it says of its topics cannot be.
        """
        self.path = path
        self.connections: tuple[Connection, ...] = tuple(reader.connections)
        self.begin_ns, self.end_ns = reader.start_time, reader.end_time
        self.is_ros2 = reader.is2
        self._reader = reader
        self._types = types
        for connection in self.connections:
            stored = getattr(connection.ext, 'offered_qos_profiles', ())
            numbers = [connection.msgcount, *(q.depth for q in stored if isinstance(q, Qos))]
            texts = (connection.topic, connection.msgtype)
            if not all(isinstance(x, int) for x in (*numbers, self.begin_ns, self.end_ns)):
                raise ValueError(f'{connection.topic!r:.80}: a count that is no number')
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f'{texts!r:.80}: no name and type of a topic')

    def messages(
        self, connections: Sequence[Connection], start_ns: int | None = None,
        stop_ns: int | None = None,
    ) -> Iterator[tuple[Connection, int, bytes]]:  # fmt: skip
        """`(connection, time of reception, bytes)` in the order received; none for none.

        Raises:
            SpanvlaError: the bag is damaged.
        """
        if not connections:
            return
        found = self._reader.messages(connections=connections, start=start_ns, stop=stop_ns)
        try:
            for connection, received_ns, raw in found:
                if not 0 <= received_ns <= LATEST_NS:
                    raise ValueError(f'received at {received_ns} ns')
                yield connection, received_ns, raw
        except Exception as error:
            raise self._damaged(error) from error

    def deserialize(self, raw: bytes, kind: str) -> Any:
        """The message of these bytes; its fields are ours, whatever definition the bag holds.

        Raises:
            SpanvlaError: the bytes are none; the sentence does not name the bag.
        """
        ours = self.is_ros2 and kind in self._types.fielddefs
        try:
            if ours:
                return self._types.deserialize_cdr(raw, kind)
            return self._reader.deserialize(raw, kind)
        except Exception as error:
            raise SpanvlaError(f'its bytes are no {kind} ({one_line(error)})') from error

    def read(
        self, connections: Sequence[Connection]
    ) -> Iterator[tuple[Connection, int, bytes, Any]]:
        """As `messages`, each with what its bytes mean.

        Raises:
            SpanvlaError: the bag is damaged, down to a single message.
        """
        for connection, received_ns, raw in self.messages(connections):
            try:
                message = self.deserialize(raw, connection.msgtype)
            except SpanvlaError as error:
                raise self._damaged(ValueError(f'{connection.topic}: {error}')) from error
            yield connection, received_ns, raw, message

    def _damaged(self, error: Exception) -> SpanvlaError:
        return SpanvlaError(f'{self.path}: damaged ({one_line(error)}); {AGAIN}')


@contextmanager
def open_bag(path: str | Path) -> Iterator[Bag]:
    """An open bag of a folder or file.

    Raises:
        SpanvlaError: nothing there, or not a bag.
    """
    path = Path(path)
    if not path.exists():
        raise SpanvlaError(f'{path}: no such bag; name a bag folder, an .mcap or a .db3 file')
    types = get_typestore(Stores.LATEST)
    try:
        reader = AnyReader([path], default_typestore=types)
        reader.open()
    except Exception as error:
        raise _no_bag(path, error) from error
    try:
        yield _opened(path, reader, types)
    finally:
        reader.close()


def _opened(path: Path, reader: AnyReader, types: Typestore) -> Bag:
    try:
        return Bag(path, reader, types)
    except Exception as error:
        raise _no_bag(path, error) from error


def _no_bag(path: Path, error: Exception) -> SpanvlaError:
    return SpanvlaError(f'{path}: not a readable ROS 2 bag ({one_line(error)}); {AGAIN}')


def one_line(error: Exception) -> str:
    """What an error says, on one line and not long; its class where it says nothing."""
    text = ' '.join(str(error).split())
    return f'{text:.160}' or type(error).__name__
