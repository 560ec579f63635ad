"""What the planner hears: odometry, acceleration, route, command, checked and kept aligned.

A message is checked and handed to the `ObservationBuilder`; a bad one is a line in `/diagnostics`
under the name of its input. The planner's worker asks for the observation at the stamp of a
picture. Odometry and acceleration come so often that waking up for each would cost more than
reading it: the worker takes them when it is about to plan. The rest comes by callbacks; both
sides meet under one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from geometry_msgs.msg import AccelWithCovarianceStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from std_msgs.msg import String

from spanvla_ros.messages import (
    MessageError,
    read_acceleration,
    read_odometry,
    read_route,
    stamp_ns_of,
)
from spanvla_ros.ros.by_hand import subscribe_by_hand, taken
from spanvla_ros.ros.cdr import message_of_bytes
from spanvla_ros.ros.diagnostics import InputMeter
from spanvla_ros.ros.message_bytes import odometry_of_bytes
from spanvla_ros.ros.parameters import PlannerSettings
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.safety.clock import ClockWatch
from spanvla_ros.types import COMMANDS, CameraFrame, EgoState, Observation, Route

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
# What a fast odometry sends while a large model plans.
DEPTH = 200
ODOMETRY = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)


class PlannerInputs:
    """Subscriptions of a planner apart from its cameras; silent until `use` names a builder."""

    def __init__(self, node: QuietNode, settings: PlannerSettings) -> None:
        """Subscribe on `node`."""
        self._node = node
        self._frame, self._base_frame = settings.output_frame, settings.base_frame
        self._lock = threading.Lock()
        self._builder: ObservationBuilder | None = None
        self._clock_watch = ClockWatch()
        self._accel_mps2, self._accel_ns = 0.0, -1
        self._accel_keep_ns = round(settings.input_timeout_s * 1e9)
        self._last_route: Route | None = None
        self._last_command: str | None = None
        timeout_s = settings.input_timeout_s
        self._odometry = InputMeter('input/odometry', timeout_s)
        self._acceleration = InputMeter('input/acceleration', timeout_s, required=False)
        self._route = InputMeter('input/route', timeout_s, required=False)
        self._command = InputMeter('input/command', timeout_s, required=False)
        self._clock = InputMeter('clock', timeout_s, required=False)
        self._by_hand: list[tuple[Subscription[Any], Callable[[bytes, int], None]]] = []
        for meter, kind, take_one in (
            (self._acceleration, AccelWithCovarianceStamped, self._take_acceleration),
            (self._odometry, Odometry, self._take_odometry),
        ):
            subscription = subscribe_by_hand(node, kind, meter.name, ODOMETRY)
            meter.subscriptions.append(subscription)
            self._by_hand.append((subscription, take_one))
        # A bag offers its latched route as volatile, which a latched subscription never sees.
        for profile in (LATCHED, RELIABLE):
            self._route.subscribe(node, PathMessage, self._on_route, profile)
        self._command.subscribe(node, String, self._on_command, RELIABLE)

    @property
    def meters(self) -> tuple[InputMeter, ...]:
        """One meter for each input, and the clock's."""
        return self._odometry, self._acceleration, self._route, self._command, self._clock

    @property
    def resets(self) -> int:
        """How often the buffers were emptied, by whatever jumped."""
        return 0 if self._builder is None else self._builder.resets

    def use(self, builder: ObservationBuilder | None) -> None:
        """Fill this builder from now on; None drops what comes in."""
        with self._lock:
            self._builder = builder
            if builder is None:
                return
            # A latched route comes once, maybe long before the model is loaded.
            if self._last_route is not None:
                builder.set_route(self._last_route)
            builder.set_command(self._last_command)

    def watch_clock(self) -> None:
        """Empty the buffers after a jump of the node's own clock."""
        with self._lock:
            self._watch_clock()

    def listen(self) -> None:
        """Take the odometry and acceleration that have come, in the order of reception."""
        batch = [
            (int(info.get('received_timestamp') or 0), take_one, data)
            for subscription, take_one in self._by_hand
            for data, info in taken(subscription, DEPTH)
        ]
        batch.sort(key=itemgetter(0))
        now_ns, system_ns = self._now_ns(), time.time_ns()
        for received_ns, take_one, data in batch:
            waited_ns = max(system_ns - received_ns, 0) if received_ns else 0
            take_one(data, now_ns - waited_ns)

    def take(self, frames: Sequence[CameraFrame], meters: Mapping[str, InputMeter]) -> None:
        """Take new pictures; a refusal goes to the meter of their camera."""
        with self._lock:
            self._watch_clock()
            builder = self._builder
            if builder is None:
                return
            for frame in frames:
                resets = builder.resets
                reason = builder.add_frame(frame)
                if builder.resets != resets:
                    reason = 'clock_backwards: image stamps ran back, buffers emptied'
                if reason:
                    meters[frame.camera].fault(self._now_ns(), reason)

    def observe(self, stamp_ns: int) -> Observation | str:
        """The observation at the stamp of an anchor picture, or why there is none."""
        with self._lock:
            if self._builder is None:
                return 'not_configured'
            return self._builder.build(stamp_ns) or self._builder.refusal

    def _now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)

    def _watch_clock(self) -> None:
        now_ns = self._now_ns()
        jump = self._clock_watch.observe(now_ns)
        if jump is None:
            return
        self._clock.fault(now_ns, f'{jump}: buffers emptied')
        if self._builder is not None:
            self._builder.clock_jumped()

    def _take_odometry(self, data: bytes, arrived_ns: int) -> None:
        try:
            message = odometry_of_bytes(data)
            self._check_frame('odometry', message)
            ego = read_odometry(message)
            self._odometry.warning = self._doubt_of_child(str(message.child_frame_id))
        except MessageError as error:
            self._odometry.fault(self._now_ns(), str(error))
            return
        # One that fell silent says nothing about the present.
        if self._accel_ns >= 0 and arrived_ns - self._accel_ns <= self._accel_keep_ns:
            ego = replace(ego, accel_mps2=self._accel_mps2)
        reason = self._take_ego(ego)
        if reason:
            self._odometry.fault(self._now_ns(), reason)
        else:
            self._odometry.arrived(arrived_ns, ego.stamp_ns)

    def _take_ego(self, ego: EgoState) -> str:
        with self._lock:
            self._watch_clock()
            builder = self._builder
            if builder is None:
                return ''
            resets = builder.resets
            reason = builder.add_ego(ego)
            if builder.resets != resets:
                return 'clock_backwards: odometry stamps ran back, buffers emptied'
            return reason

    def _check_frame(self, source: str, message: Any) -> None:
        frame_id = str(message.header.frame_id)
        if frame_id != self._frame:
            raise MessageError(
                f'{source}: frame {frame_id!r:.40} is not output_frame {self._frame!r}'
            )

    def _doubt_of_child(self, child: str) -> str:
        """Pose and twist of another point than the rear axle look right and are not."""
        if child in ('', self._base_frame):
            return ''
        return (
            f'odometry: it is of {child!r:.40}, not of base_frame {self._base_frame!r}: see that '
            'its origin is the rear axle and its twist in the axes of the body'
        )

    def _take_acceleration(self, data: bytes, arrived_ns: int) -> None:
        try:
            message = message_of_bytes(data, AccelWithCovarianceStamped)
            self._accel_mps2, self._accel_ns = read_acceleration(message), arrived_ns
        except MessageError as error:
            self._accel_ns = -1
            self._acceleration.fault(self._now_ns(), str(error))
            return
        self._acceleration.arrived(arrived_ns, stamp_ns_of(message.header))

    def _on_route(self, message: PathMessage) -> None:
        try:
            self._check_frame('route', message)
            route = read_route(message)
        except MessageError as error:
            self._route.fault(self._now_ns(), str(error))
            return
        with self._lock:
            reason = '' if self._builder is None else self._builder.set_route(route)
            self._last_route = None if reason else route
        if reason:
            self._route.fault(self._now_ns(), reason)
        else:
            self._route.arrived(self._now_ns(), route.stamp_ns)

    def _on_command(self, message: String) -> None:
        if message.data not in COMMANDS:
            self._command.fault(
                self._now_ns(), f'{message.data!r:.40} is none of {", ".join(COMMANDS)}'
            )
            return
        self._command.arrived(self._now_ns())
        with self._lock:
            self._last_command = message.data
            if self._builder is not None:
                self._builder.set_command(message.data)
