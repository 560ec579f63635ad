"""The recorder: raw messages into one MCAP file, written off everybody's hot path.

Messages are never deserialized here. They carry the time at which the middleware received them,
not the time at which Python got round to them, so that gaps measured from the file are the
publisher's. That is also why they may wait in the middleware: they are taken a few at a time, as
waking up for each of some two hundred a second costs ten times as much as taking it.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import AccelWithCovarianceStamped, Twist
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import MarkerArray

from spanvla_ros.ros.bag_file import BagFile
from spanvla_ros.ros.by_hand import subscribe_by_hand, taken
from spanvla_ros.ros.diagnostics import ERROR, OK, DiagnosticsPublisher, InputMeter, status
from spanvla_ros.ros.parameters import RecorderSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.ros.silence import type_name
from spanvla_ros.safety.clock import CLOCK_BACKWARDS, ClockWatch

DEPTH = 100
# The fastest topic leaves a few messages in this time, of the DEPTH that there is room for.
TAKE_PERIOD_S = 0.05
BEST_EFFORT = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
TOPICS: tuple[tuple[str, type, tuple[QoSProfile, ...]], ...] = (
    ('input/odometry', Odometry, (BEST_EFFORT,)),
    ('input/acceleration', AccelWithCovarianceStamped, (BEST_EFFORT,)),
    ('input/route', PathMessage, (LATCHED, RELIABLE)),
    ('input/command', String, (RELIABLE,)),
    ('input/engaged', Bool, (RELIABLE,)),
    ('plan', String, (RELIABLE,)),
    ('shadow/plan', String, (RELIABLE,)),
    ('output/trajectory', MultiDOFJointTrajectory, (RELIABLE,)),
    ('output/path', PathMessage, (RELIABLE,)),
    ('output/markers', MarkerArray, (RELIABLE,)),
    ('output/overlay/compressed', CompressedImage, (RELIABLE,)),
    ('output/state', String, (LATCHED,)),
    ('output/reasoning', String, (RELIABLE,)),
    ('output/twist', Twist, (RELIABLE,)),
    ('town/scene', String, (RELIABLE,)),
    ('/diagnostics', DiagnosticArray, (RELIABLE,)),
)

# Topic, type, time of reception in nanoseconds, data.
Item = tuple[str, str, int, bytes]


@dataclass
class Source:
    """One subscription and how its messages are called in the file.

    `latest` is shared by the two subscriptions of a latched topic: a latched publisher answers
    both. None where there is but one.
    """

    topic: str
    kind: str
    subscription: Subscription[Any]
    latest: list[bytes] | None

    def take(self) -> Iterator[Item]:
        """What has come since the last call."""
        for data, info in taken(self.subscription, DEPTH):
            if self.latest is not None:
                if self.latest[0] == data:
                    continue
                self.latest[0] = data
            stamp_ns = int(info.get('received_timestamp') or 0) or time.time_ns()
            yield self.topic, self.kind, stamp_ns, data


class Recent:
    """The messages of the last seconds, for `save_incident`."""

    def __init__(self, span_s: float, limit_bytes: int, clock: ClockWatch) -> None:
        """Keep what is at most `span_s` old and together at most `limit_bytes`."""
        self.items: deque[Item] = deque()
        self._span_ns = round(span_s * 1e9)
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._clock = clock

    def watch(self, now_ns: int) -> str | None:
        """Forget everything where the clock has run back; the jump, if there is one."""
        jump = self._clock.observe(now_ns)
        if jump == CLOCK_BACKWARDS:
            # What lies in the future would never grow old.
            self.items.clear()
            self._bytes = 0
        return jump

    def add(self, item: Item) -> None:
        """Take the newest message."""
        self.items.append(item)
        self._bytes += len(item[3])
        oldest_ns = item[2] - self._span_ns
        while self.items[0][2] < oldest_ns or self._bytes > self._limit_bytes:
            self._bytes -= len(self.items.popleft()[3])


class RecorderNode(QuietNode):
    """Records the driving topics, node name `recorder`."""

    def __init__(self) -> None:
        """Open the file, subscribe, start the writing thread."""
        super().__init__('recorder')
        self.settings = declare(self, RecorderSettings)
        self._file = BagFile(self.settings.out)
        self._queue: queue.Queue[list[Item] | Path | None] = queue.Queue()
        self._recent = Recent(
            self.settings.incident_s,
            self.settings.incident_mb * 2**20,
            # The clock is looked at once a flush at least.
            ClockWatch(2.0 + self.settings.flush_s),
        )
        self._clock_meter = InputMeter('clock', self.settings.flush_s, required=False)
        self._written = 0
        self._flushed_s = 0.0
        self._fault = ''
        self._sources: list[Source] = []
        for topic, kind, profiles in TOPICS:
            self._record(topic, kind, profiles)
        for camera in self.settings.cameras:
            self._record(f'input/{camera}/camera_info', CameraInfo, (BEST_EFFORT,))
            if self.settings.record_images:
                self._record(f'input/{camera}/image', Image, (BEST_EFFORT,))
                self._record(f'input/{camera}/image/compressed', CompressedImage, (BEST_EFFORT,))
        self.create_service(Trigger, '~/save_incident', self._on_save_incident)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)
        self.create_timer(TAKE_PERIOD_S, self._take)
        self._thread = threading.Thread(target=self._run_writer, name='writer', daemon=True)
        self._thread.start()

    def _record(self, topic: str, kind: type, profiles: tuple[QoSProfile, ...]) -> None:
        name = self.resolve_topic_name(topic)
        latest = [b''] if len(profiles) > 1 else None
        for profile in profiles:
            subscription = subscribe_by_hand(self, kind, topic, profile)
            self._sources.append(Source(name, type_name(kind), subscription, latest))

    def _take(self) -> None:
        """Hand what has come to the writer, in the order of reception."""
        batch = [item for source in self._sources for item in source.take()]
        if batch:
            batch.sort(key=itemgetter(2))
            self._queue.put(batch)

    def _run_writer(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """Write one queued item, or flush when there is none; False at the end."""
        try:
            item = self._queue.get(timeout=self.settings.flush_s)
        except queue.Empty:
            item = []
        now_ns = time.time_ns()
        jump = self._recent.watch(now_ns)
        if jump is not None:
            self._clock_meter.fault(now_ns, f'{jump}: the file spans two times')
        if item is None:
            return False
        try:
            if isinstance(item, Path):
                self._write_incident(item)
            else:
                self._write(item)
            if not item or time.monotonic() - self._flushed_s >= self.settings.flush_s:
                self._file.flush()
                self._flushed_s = time.monotonic()
        except Exception as error:
            # A full disk must not end the process, nor the thread: the diagnostics say it.
            self._fault = f'writing failed: {error}'
        return True

    def _write(self, batch: list[Item]) -> None:
        for item in batch:
            self._file.write(*item)
            self._written += 1
            self._recent.add(item)

    def _write_incident(self, path: Path) -> None:
        incident = BagFile(path)
        for item in self._recent.items:
            incident.write(*item)
        incident.close()
        self.get_logger().info(f'incident saved: {path}')

    def _on_save_incident(
        self, _request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        folder = Path(self.settings.incident_dir)
        path = folder / f'incident_{time.time_ns()}.mcap'
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            response.success, response.message = False, f'{folder}: {error}'
            return response
        self._take()
        self._queue.put(path)
        response.success, response.message = True, str(path)
        return response

    def _waiting(self) -> int:
        return sum(len(batch) for batch in tuple(self._queue.queue) if isinstance(batch, list))

    def _publish_diagnostics(self) -> None:
        values = {'messages': str(self._written), 'waiting': str(self._waiting())}
        level, text = (ERROR, self._fault) if self._fault else (OK, 'ok')
        clock = self._clock_meter.status(time.time_ns())
        self._diagnostics.publish([status('file', level, text, values), clock])

    def close(self) -> None:
        """Write what has come, then the index."""
        self._take()
        self._queue.put(None)
        self._thread.join(timeout=2.0)
        self._file.close()


def main() -> int:
    """Record until a signal."""
    return run_node(RecorderNode)


if __name__ == '__main__':
    sys.exit(main())
