"""A bag on a live graph: recorded bytes on their topics, with their QoS, in time with /clock.

Messages are published as they were recorded and never deserialized. What the lockstep
`spanvla replay` shows reproducibly, this shows with the nodes running as they do on a vehicle.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rosbags.interfaces import Connection, ConnectionExtRosbag2, QosDurability, QosReliability
from rosgraph_msgs.msg import Clock
from std_srvs.srv import SetBool

from spanvla_ros.report.bags import Bag, open_bag
from spanvla_ros.ros.diagnostics import OK, WARN, DiagnosticsPublisher, StageMeter, status
from spanvla_ros.ros.parameters import ReplaySettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.types import SpanvlaError

CLOCK = '/clock'
MOST_DEPTH = 100


class Pace:
    """When a moment of the bag is due on the clock of the wall; pauses move what follows."""

    def __init__(self, begin_ns: int, rate: float, now_s: float) -> None:
        """The moment `begin_ns` is due at `now_s`."""
        self._begin_ns, self._rate, self._begin_s = begin_ns, rate, now_s

    def due_s(self, at_ns: int) -> float:
        """When a moment is due."""
        return self._begin_s + (at_ns - self._begin_ns) / 1e9 / self._rate

    def moment_ns(self, now_s: float) -> int:
        """The moment that is due at a time."""
        return self._begin_ns + round((now_s - self._begin_s) * 1e9 * self._rate)

    def postpone(self, by_s: float) -> None:
        """Move all that follows."""
        self._begin_s += by_s


def offered_qos(connection: Connection, latched: frozenset[str]) -> QoSProfile:
    """The QoS a topic was recorded with; where the bag does not say, a careful guess.

    Without a record, `/tf_static`, a topic with a single message and those of `latched` are
    latched: a node that comes later would otherwise never see them.
    """
    recorded = connection.ext.offered_qos_profiles if isinstance(
        connection.ext, ConnectionExtRosbag2
    ) else ()  # fmt: skip
    if recorded:
        stays = any(qos.durability == QosDurability.TRANSIENT_LOCAL for qos in recorded)
        loses = all(qos.reliability == QosReliability.BEST_EFFORT for qos in recorded)
        depth = max((qos.depth for qos in recorded), default=1)
    else:
        stays = connection.topic.endswith('/tf_static') or connection.msgcount == 1
        loses, depth = False, 10
    if connection.topic in latched:
        stays, loses = True, False
    return QoSProfile(
        # The last message of each broadcaster matters, and a bag has them all in one topic.
        depth=MOST_DEPTH if stays else min(max(depth, 1), MOST_DEPTH),
        reliability=ReliabilityPolicy.BEST_EFFORT if loses else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if stays else DurabilityPolicy.VOLATILE,
    )


@dataclass(frozen=True)
class Track:
    """One recorded topic and where it goes."""

    connection: Connection
    publisher: Any
    latched: bool


class ReplayNode(QuietNode):
    """Plays a bag, node name `replay`."""

    def __init__(self) -> None:
        """Open the bag and the topics, start playing.

        Raises:
            SpanvlaError: no bag, not one of ROS 2, a remap that is none, or nothing to play.
        """
        super().__init__('replay')
        self.settings = settings = declare(self, ReplaySettings)
        if not settings.bag:
            raise SpanvlaError('replay: no bag; give the parameter bag')
        self._opened = open_bag(settings.bag)
        self._bag: Bag = self._opened.__enter__()
        if not self._bag.is_ros2:
            raise SpanvlaError(f'{settings.bag}: a bag of ROS 1; convert it with rosbags-convert')
        self._begin_ns = self._bag.begin_ns + round(settings.start_s * 1e9)
        self._sent = 0
        self._loops = 0
        self._state = 'waiting'
        self._moment_ns = self._begin_ns
        self._paused = threading.Event()
        self._stop = threading.Event()
        self._meter = StageMeter()
        self._unknown: list[str] = []
        self._own_clock: Any = None
        self._tracks = self._make_topics()
        if not self._tracks:
            raise SpanvlaError(f'{settings.bag}: nothing to replay; look at topics')
        self.create_service(SetBool, '~/set_paused', self._on_set_paused)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)
        self._thread = threading.Thread(target=self._run, name='play', daemon=True)
        self._thread.start()

    def _make_topics(self) -> dict[int, Track]:
        settings = self.settings
        wanted = {topic for topic in settings.topics if topic}
        renamed = _pairs(settings.remaps)
        latched = frozenset(settings.latched)
        known = {connection.topic for connection in self._bag.connections}
        for name in sorted((wanted | set(renamed)) - known):
            raise SpanvlaError(
                f'{settings.bag}: no topic {name}; it has {", ".join(sorted(known))}'
            )
        publishers: dict[str, Any] = {}
        tracks = {}
        for connection in self._bag.connections:
            if wanted and connection.topic not in wanted:
                continue
            if connection.topic == CLOCK and not settings.clock:
                continue
            kind = _message_class(connection.msgtype)
            if kind is None:
                self._unknown.append(f'{connection.topic} ({connection.msgtype})')
                continue
            profile = offered_qos(connection, latched)
            name = renamed.get(connection.topic, connection.topic)
            if name not in publishers:
                publishers[name] = self.create_publisher(kind, name, profile)
            stays = profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
            tracks[connection.id] = Track(connection, publishers[name], stays)
        if settings.clock and CLOCK not in known:
            self._own_clock = self.create_publisher(Clock, CLOCK, 10)
        for name in self._unknown:
            self.get_logger().warning(f'{name} is left out: its message package is not installed')
        return tracks

    def _on_set_paused(
        self, request: SetBool.Request, response: SetBool.Response
    ) -> SetBool.Response:
        if request.data:
            self._paused.set()
        else:
            self._paused.clear()
        response.success, response.message = True, 'paused' if request.data else 'playing'
        return response

    # The thread that plays.

    def _run(self) -> None:
        try:
            self._stop.wait(self.settings.wait_s)
            while not self._stop.is_set():
                self._play_once()
                if not self.settings.loop:
                    break
                self._loops += 1
            self._state = 'finished'
        except Exception as error:
            self._state = f'failed: {type(error).__name__}: {error}'
            self.get_logger().error(self._state)
        if self.settings.at_end == 'exit' and not self._stop.is_set():
            for track in self._tracks.values():
                track.publisher.wait_for_all_acked(Duration(seconds=1))
            self.context.try_shutdown()

    def _play_once(self) -> None:
        pace = Pace(self._begin_ns, self.settings.rate, time.monotonic())
        self._state = 'playing'
        for connection, at_ns, data in self._messages():
            self._wait(pace, at_ns)
            if self._stop.is_set():
                return
            self._meter.add({'late_ms': (time.monotonic() - pace.due_s(at_ns)) * 1e3})
            self._moment_ns = at_ns
            self._send_clock(at_ns)
            self._tracks[connection.id].publisher.publish(bytes(data))
            self._sent += 1

    def _messages(self) -> Iterator[tuple[Connection, int, bytes]]:
        """Recorded messages in order; latched ones from before the start come at the start."""
        chosen = [track.connection for track in self._tracks.values()]
        if self.settings.start_s > 0.0:
            stays = [track.connection for track in self._tracks.values() if track.latched]
            for connection, _, data in self._bag.messages(stays, stop_ns=self._begin_ns):
                yield connection, self._begin_ns, data
        yield from self._bag.messages(chosen, self._begin_ns)

    def _wait(self, pace: Pace, at_ns: int) -> None:
        """Wait until a moment is due; meanwhile the clock ticks."""
        tick_s = 1.0 / self.settings.clock_hz
        while not self._stop.is_set():
            begin_s = time.monotonic()
            if self._paused.is_set():
                self._state = 'paused'
                self._stop.wait(tick_s)
                pace.postpone(time.monotonic() - begin_s)
                continue
            self._state = 'playing'
            left_s = pace.due_s(at_ns) - begin_s
            if left_s <= 0.0:
                return
            self._stop.wait(min(left_s, tick_s))
            if left_s > tick_s:
                self._send_clock(min(pace.moment_ns(time.monotonic()), at_ns))

    def _send_clock(self, moment_ns: int) -> None:
        if self._own_clock is not None:
            self._own_clock.publish(Clock(clock=Time(nanoseconds=moment_ns).to_msg()))

    def _publish_diagnostics(self) -> None:
        length_s = (self._bag.end_ns - self._bag.begin_ns) / 1e9
        values = {
            'sent': str(self._sent),
            'loops': str(self._loops),
            'at_s': f'{(self._moment_ns - self._bag.begin_ns) / 1e9:.1f}',
            'length_s': f'{length_s:.1f}',
            'left_out': ', '.join(self._unknown),
            **self._meter.values(),
        }
        bad = self._unknown or self._state.startswith('failed')
        self._diagnostics.publish([status('bag', WARN if bad else OK, self._state, values)])

    def close(self) -> None:
        """Stop playing and close the bag."""
        self._stop.set()
        if hasattr(self, '_thread'):
            self._thread.join(timeout=2.0)
        self._opened.__exit__(None, None, None)


def _pairs(words: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for word in words:
        old, mark, new = word.partition(':=')
        if word and not (old and mark and new):
            raise SpanvlaError(f'replay: remap {word!r} is not recorded:=published')
        if word:
            found[old] = new
    return found


def _message_class(kind: str) -> Any:
    package, _, name = kind.partition('/msg/')
    if not (package.isidentifier() and name.isidentifier()):
        return None
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name, None)
    except ImportError:
        return None


def main() -> int:
    """Replay a bag until its end or a signal."""
    return run_node(ReplayNode)


if __name__ == '__main__':
    sys.exit(main())
