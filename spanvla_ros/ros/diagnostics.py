"""What a node says about itself on `/diagnostics`: its inputs, its stages, its faults."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription

from spanvla_ros.ros.silence import Silence, why_silent

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)
# A fault is shown this long, so that a reader at 1 Hz cannot miss one that lasted a frame.
FAULT_SHOWN_S = 5.0


class InputMeter:
    """Rate, age, drops and faults of one input."""

    def __init__(self, name: str, timeout_s: float, *, required: bool = True) -> None:
        """Name the input; older than `timeout_s` it is stale, a fault only if `required`.

        `warning` is a lasting doubt about good messages, `extra` what else its line shows.
        `dropped` are messages that came and were not needed, `lost` those that never came.
        `subscriptions` bring its messages: what the graph knows of them is told of a silent one.
        """
        self.name = name
        self.timeout_s = timeout_s
        self.required = required
        self.received = 0
        self.dropped = 0
        self.lost = 0
        self.warning = ''
        self.extra: dict[str, str] = {}
        self.subscriptions: list[Subscription[Any]] = []
        self._arrivals_ns: deque[int] = deque(maxlen=60)
        self._stamp_ns: int | None = None
        self._fault = ''
        self._fault_ns = 0
        self._faults: Counter[str] = Counter()

    def subscribe(
        self, node: Node, kind: type, callback: Callable[[Any], None], profile: QoSProfile,
        **options: Any,
    ) -> None:  # fmt: skip
        """Subscribe on `node` to the topic that the input is named after; options as in rclpy."""
        self.subscriptions.append(
            node.create_subscription(kind, self.name, callback, profile, **options)
        )

    def arrived(self, now_ns: int, stamp_ns: int | None = None) -> None:
        """Count one good message, received at `now_ns`, made at `stamp_ns`."""
        self.received += 1
        self._arrivals_ns.append(now_ns)
        self._stamp_ns = stamp_ns

    def fault(self, now_ns: int, reason: str) -> None:
        """Remember why a message was refused."""
        self._fault, self._fault_ns = reason, now_ns
        self._faults[reason.split(':')[0]] += 1

    def status(
        self,
        now_ns: int,
        why: Callable[[Sequence[Subscription[Any]]], Silence] = lambda _: Silence(),
    ) -> DiagnosticStatus:
        """The input's line: ERROR after a refusal, STALE when silent, WARN in doubt, else OK.

        Args:
            now_ns: the present.
            why: what a silent input's subscriptions are waiting for; asked only then.
        """
        # Another thread may count an arrival meanwhile; a copy is made in one go.
        known = tuple(self._arrivals_ns)
        arrivals = [ns for ns in known if now_ns - ns < 5_000_000_000]
        rate_hz = (
            (len(arrivals) - 1) / max((arrivals[-1] - arrivals[0]) / 1e9, 1e-6)
            if (len(arrivals) > 1)
            else 0.0
        )
        values = {
            'received': str(self.received),
            'dropped': str(self.dropped),
            'lost': str(self.lost),
            'rate_hz': f'{rate_hz:.1f}',
            'refused': str(sum(self._faults.values())),
            **self.extra,
        }
        if self._stamp_ns is not None and known:
            values['age_ms'] = f'{(known[-1] - self._stamp_ns) / 1e6:.1f}'
        if self._fault and now_ns - self._fault_ns < FAULT_SHOWN_S * 1e9:
            return status(self.name, ERROR, self._fault, values)
        silent_s = (now_ns - known[-1]) / 1e9 if known else math.inf
        if not known or (self.required and silent_s > self.timeout_s):
            level, text = self._silence(silent_s, why(self.subscriptions))
            return status(self.name, level, text, values)
        if self.warning:
            return status(self.name, WARN, self.warning, values)
        return status(self.name, OK, 'ok', values)

    def _silence(self, silent_s: float, cause: Silence) -> tuple[bytes, str]:
        told = f': {cause.text}' if cause.text else ''
        if silent_s < math.inf:
            return STALE, f'silent for {silent_s:.1f} s{told}'
        # Who publishes in vain wanted to be heard, on an optional input too.
        level = WARN if self.required or cause.mismatch else OK
        remap = f'; remap to {cause.remap}?' if cause.remap else ''
        return level, f'nothing received yet{told}{remap}'


class StageMeter:
    """Running p50 and p99 of named durations over the last 200 runs."""

    def __init__(self) -> None:
        """Start empty."""
        self._stages_ms: dict[str, deque[float]] = {}

    def add(self, stages_ms: Mapping[str, float]) -> None:
        """Take the durations of one run."""
        for name, duration_ms in stages_ms.items():
            self._stages_ms.setdefault(name, deque(maxlen=200)).append(duration_ms)

    def values(self) -> dict[str, str]:
        """`<stage>_p50` and `<stage>_p99`, in milliseconds as text."""
        content = {}
        # As above: a stage may be added meanwhile.
        for name, durations_ms in tuple(self._stages_ms.items()):
            p50, p99 = np.percentile(np.array(durations_ms), [50, 99])
            content[f'{name}_p50'] = f'{p50:.1f}'
            content[f'{name}_p99'] = f'{p99:.1f}'
        return content


def status(
    name: str, level: bytes, message: str, values: Mapping[str, str] | None = None
) -> DiagnosticStatus:
    """One diagnostic line."""
    return DiagnosticStatus(
        level=level,
        name=name,
        message=message,
        values=[KeyValue(key=key, value=value) for key, value in (values or {}).items()],
    )


class DiagnosticsPublisher:
    """Publishes diagnostic lines on `/diagnostics`, each named after its node."""

    def __init__(self, node: Node) -> None:
        """Publish in the name of `node`."""
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)

    def publish(
        self, lines: Iterable[DiagnosticStatus], inputs: Iterable[InputMeter] = ()
    ) -> None:
        """Send the lines, and one for each input, with the present stamp."""
        message, now = DiagnosticArray(), self._node.get_clock().now()
        message.header.stamp = now.to_msg()
        prefix = self._node.get_fully_qualified_name().lstrip('/')
        # One look at the graph for all silent inputs, and none where there is no such input.
        topics = cache(self._node.get_topic_names_and_types)
        why = partial(why_silent, self._node, topics=topics)
        for line in (*lines, *(meter.status(now.nanoseconds, why) for meter in inputs)):
            line.name = f'{prefix}: {line.name}'
            line.hardware_id = 'spanvla'
            message.status.append(line)
        self._publisher.publish(message)
