"""The guardian: a valid trajectory at 20 Hz and after every plan, whatever the others do.

Callbacks only feed the safety kernel. A thread of its own publishes on a drift-free schedule, so
that neither a burst of messages nor the wait set of the executor delays an output. This process
imports no model code.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from contextlib import suppress

from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import MarkerArray

from spanvla_ros.messages import MessageError, read_odometry, read_route
from spanvla_ros.ros.autoware import AutowareTrajectory
from spanvla_ros.ros.diagnostics import (
    ERROR,
    OK,
    WARN,
    DiagnosticsPublisher,
    InputMeter,
    StageMeter,
    status,
)
from spanvla_ros.ros.parameters import GuardianSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.publish import TrajectoryMessage, marker_message, path_message, state_json
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.safety.state import Guardian, GuardianOutput, GuardianParameters, load_vehicle

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
PRIORITY = -10
LAST_WORD = Duration(nanoseconds=300_000_000)
LEVELS = {'STANDBY': OK, 'OK': OK, 'DEGRADED': WARN, 'FALLBACK': ERROR, 'FAULT': ERROR}


class GuardianNode(QuietNode):
    """The safety kernel on the bus, node name `guardian`."""

    def __init__(self) -> None:
        """Read parameters and vehicle, open the topics, start publishing."""
        super().__init__('guardian')
        self.settings = settings = declare(self, GuardianSettings, self._on_settings)
        self.vehicle = load_vehicle(settings.vehicle_file)
        self._lock = threading.Lock()
        self._guardian = Guardian(
            self.vehicle,
            GuardianParameters(
                frame_id=settings.output_frame,
                plan_fresh_s=settings.plan_fresh_s,
                plan_max_age_s=settings.plan_max_age_s,
                odometry_timeout_s=settings.odometry_timeout_s,
            ),
        )
        self._guardian.set_enabled(settings.enabled)
        self._last: GuardianOutput | None = None
        self._jumps = 0
        self._published_s: float | None = None
        self._displayed_s = float('-inf')
        self._meters = {
            'odometry': InputMeter('input/odometry', settings.odometry_timeout_s),
            'plan': InputMeter('plan', settings.plan_max_age_s),
            'route': InputMeter('input/route', settings.odometry_timeout_s, required=False),
            'clock': InputMeter('clock', settings.odometry_timeout_s, required=False),
        }
        self._stages = StageMeter()
        self._message = TrajectoryMessage()
        self._make_topics()
        # What stands now stays; the collector then has next to nothing to walk through.
        gc.collect()
        gc.freeze()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name='output', daemon=True)
        self._thread.start()

    def _make_topics(self) -> None:
        publish = self.create_publisher
        self._trajectory_out = publish(MultiDOFJointTrajectory, 'output/trajectory', RELIABLE)
        self._path_out = publish(PathMessage, 'output/path', RELIABLE)
        self._markers_out = publish(MarkerArray, 'output/markers', RELIABLE)
        self._state_out = publish(String, 'output/state', LATCHED)
        self._autoware = AutowareTrajectory(self, RELIABLE) if self.settings.autoware else None
        meters = self._meters
        meters['odometry'].subscribe(self, Odometry, self._on_odometry, BEST_EFFORT)
        # A bag offers its latched route as volatile, which a latched subscription never sees.
        for profile in (LATCHED, RELIABLE):
            meters['route'].subscribe(self, PathMessage, self._on_route, profile)
        meters['plan'].subscribe(self, String, self._on_plan, RELIABLE)
        self.create_service(Trigger, '~/reset', self._on_reset)
        self.create_service(SetBool, '~/set_enabled', self._on_set_enabled)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)

    def _on_settings(self, settings: GuardianSettings) -> None:
        self.settings = settings

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    # Inputs.

    # The time is read under the lock: one read before waiting for it would lie behind that of
    # the other thread, and the kernel would see a clock running backwards.

    def _on_odometry(self, message: Odometry) -> None:
        try:
            ego = read_odometry(message)
            if message.header.frame_id != self.settings.output_frame:
                raise MessageError(
                    f'odometry: frame {message.header.frame_id!r:.40} is not output_frame '
                    f'{self.settings.output_frame!r}'
                )
        except MessageError as error:
            self._refuse('odometry', str(error))
            return
        with self._lock:
            now_ns = self._now_ns()
            reason = self._guardian.on_ego(ego, now_ns)
        if reason is None:
            self._meters['odometry'].arrived(now_ns, ego.stamp_ns)
        else:
            self._meters['odometry'].fault(now_ns, reason)

    def _refuse(self, source: str, sentence: str) -> None:
        with self._lock:
            self._guardian.refuse(source, 'unreadable')
        self._meters[source].fault(self._now_ns(), sentence)

    def _on_route(self, message: PathMessage) -> None:
        try:
            route = read_route(message)
        except MessageError as error:
            self._refuse('route', str(error))
            return
        with self._lock:
            reason = self._guardian.on_route(route)
        if reason is None:
            self._meters['route'].arrived(self._now_ns(), route.stamp_ns)
        else:
            self._meters['route'].fault(self._now_ns(), f'route_{reason}')

    def _on_plan(self, message: String) -> None:
        begin_s = time.perf_counter()
        try:
            with self._lock:
                now_ns = self._now_ns()
                rejection = self._guardian.on_plan_text(message.data, now_ns)
                plan = self._guardian.plan
        except Exception as error:
            # No text whatever may end this process.
            self._refuse('plan', f'{type(error).__name__}: {error}')
            return
        self._stages.add({'judge_ms': (time.perf_counter() - begin_s) * 1e3})
        if rejection is not None:
            self._meters['plan'].fault(now_ns, f'{rejection.reason.value}: {rejection.detail}')
            return
        self._meters['plan'].arrived(now_ns, None if plan is None else plan.trajectory.stamp_ns)
        self._publish_or_report()

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._lock:
            self._guardian.reset()
        response.success, response.message = True, 'plan, path and complaints forgotten'
        return response

    def _on_set_enabled(
        self, request: SetBool.Request, response: SetBool.Response
    ) -> SetBool.Response:
        with self._lock:
            self._guardian.set_enabled(request.data)
        response.success = True
        response.message = 'following plans' if request.data else 'standing by'
        return response

    # Output.

    def _run(self) -> None:
        period_s = 1.0 / self.settings.output_hz
        due_s = time.monotonic()
        while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
            self._publish_or_report()
            due_s = max(due_s + period_s, time.monotonic())

    def _publish_or_report(self) -> None:
        try:
            self._publish()
        except Exception as error:
            # The next tick is a new chance, and silence is the one thing not allowed.
            self.get_logger().error(f'{type(error).__name__}: {error}')

    def _publish(self) -> None:
        begin_s = time.perf_counter()
        with self._lock:
            # Two threads publish; under the lock their stamps cannot cross.
            now_ns = self._now_ns()
            output = self._guardian.tick(now_ns)
            if output is None:
                return
            plan, counts = self._guardian.plan, self._guardian.counts
            self._trajectory_out.publish(self._message.serialized(output))
            self._state_out.publish(String(data=state_json(output, plan, counts, now_ns)))
            if self._autoware is not None:
                self._autoware.publish(output)
            self._note_publication(begin_s)
            self._last = output
            if self._guardian.clock_jumps != self._jumps:
                self._jumps = self._guardian.clock_jumps
                self._meters['clock'].fault(now_ns, ', '.join(output.reasons))
        if (begin_s - self._displayed_s) * self.settings.display_hz >= 1.0:
            self._displayed_s = begin_s
            self._path_out.publish(path_message(output))
            self._markers_out.publish(marker_message(output, self.vehicle))

    def _note_publication(self, begin_s: float) -> None:
        end_s = time.perf_counter()
        stages_ms = {'publish_ms': (end_s - begin_s) * 1e3}
        if self._published_s is not None:
            stages_ms['gap_ms'] = (end_s - self._published_s) * 1e3
        self._published_s = end_s
        self._stages.add(stages_ms)

    def _publish_diagnostics(self) -> None:
        with self._lock:
            counts, output = self._guardian.counts, self._last
            values = {'plans_accepted': str(counts.accepted)}
            values |= {name: str(count) for name, count in counts.refused}
            values |= self._stages.values()
        if output is None:
            lines = [status('state', WARN, 'STARTING: no odometry yet', values)]
        else:
            text = ': '.join((output.state, ', '.join(output.reasons))).rstrip(': ')
            lines = [status('state', LEVELS[output.state], text, values)]
        self._diagnostics.publish(lines, self._meters.values())

    def close(self) -> None:
        """Stop publishing, after one last trajectory that stops the vehicle."""
        self._stop.set()
        self._thread.join(timeout=1.0)
        with self._lock:
            self._guardian.set_enabled(False)
        self._publish()
        for publisher in (self._trajectory_out, self._state_out):
            # A publisher that goes takes its unsent messages along.
            publisher.wait_for_all_acked(LAST_WORD)


def main() -> int:
    """Run the guardian until a signal, ahead of the other processes where that is allowed."""
    with suppress(OSError):
        # Before any thread starts, since each inherits it; only a privileged user may.
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    # The thread that publishes waits at most this long for one that reads a message.
    sys.setswitchinterval(0.001)
    return run_node(GuardianNode)


if __name__ == '__main__':
    sys.exit(main())
