"""The follower: the newest trajectory into a command for the vehicle, or the brake.

Commands go out on a schedule of their own from the first moment on: before the first trajectory,
after the last one and at the end of the process they brake. A synchronous simulator that waits
for one command a tick is answered on each odometry instead; the schedule then only fills in.
"""

from __future__ import annotations

import gc
import sys
import threading
import time

from nav_msgs.msg import Odometry
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from trajectory_msgs.msg import MultiDOFJointTrajectory

from spanvla_ros.controls import FOLLOWS, CarlaCar
from spanvla_ros.messages import MessageError, read_odometry
from spanvla_ros.ros.controls import CONTROLS
from spanvla_ros.ros.diagnostics import (
    ERROR,
    OK,
    DiagnosticsPublisher,
    InputMeter,
    StageMeter,
    status,
)
from spanvla_ros.ros.parameters import FollowerSettings, declare
from spanvla_ros.ros.process import run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.ros.trajectory_bytes import trajectory_of_bytes
from spanvla_ros.safety.follower import Follower, FollowerParameters
from spanvla_ros.safety.state import load_vehicle
from spanvla_ros.types import DriveCommand, EgoState, Trajectory

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
LAST_WORD = Duration(nanoseconds=300_000_000)
# A simulator that waits for a command gives up after a second; silence ends before.
FILL_IN_S = 0.4


class FollowerNode(QuietNode):
    """Pure pursuit and speed control on the bus, node name `follower`."""

    def __init__(self) -> None:
        """Read parameters and vehicle, open the topics, start commanding."""
        super().__init__('follower')
        self.settings = settings = declare(self, FollowerSettings)
        self._lock = threading.Lock()
        self._follower = Follower(
            load_vehicle(settings.vehicle_file),
            FollowerParameters(
                trajectory_timeout_s=settings.trajectory_timeout_s,
                odometry_timeout_s=settings.odometry_timeout_s,
                latency_s=settings.latency_s,
                preview_s=settings.preview_s,
            ),
        )
        self._trajectory: Trajectory | None = None
        self._ego: EgoState | None = None
        self._reason = ''
        self._meters = {
            'trajectory': InputMeter('output/trajectory', settings.trajectory_timeout_s),
            'odometry': InputMeter('input/odometry', settings.odometry_timeout_s),
        }
        self._stages = StageMeter()
        car = CarlaCar(
            full_lock_rad=settings.full_lock_rad,
            full_throttle_mps2=settings.full_throttle_mps2,
            full_brake_mps2=settings.full_brake_mps2,
        )
        self._control = CONTROLS[settings.control](self, car)
        self._command_lock = threading.Lock()
        self._sent_s = -FILL_IN_S
        self._subscribe()
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)
        gc.collect()
        gc.freeze()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name='command', daemon=True)
        self._thread.start()

    def _subscribe(self) -> None:
        trajectory, odometry = self._meters['trajectory'], self._meters['odometry']
        trajectory.subscribe(
            self, MultiDOFJointTrajectory, self._on_trajectory, RELIABLE, raw=True
        )
        odometry.subscribe(self, Odometry, self._on_odometry, BEST_EFFORT)

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_trajectory(self, data: bytes) -> None:
        now_ns, meter = self._now_ns(), self._meters['trajectory']
        try:
            trajectory = trajectory_of_bytes(data)
            self._check_frame(trajectory.frame_id)
        except MessageError as error:
            meter.fault(now_ns, str(error))
            return
        meter.arrived(now_ns, trajectory.stamp_ns)
        with self._lock:
            self._trajectory = trajectory

    def _on_odometry(self, message: Odometry) -> None:
        now_ns, meter = self._now_ns(), self._meters['odometry']
        try:
            ego = read_odometry(message)
            self._check_frame(str(message.header.frame_id))
        except MessageError as error:
            meter.fault(now_ns, str(error))
            return
        meter.arrived(now_ns, ego.stamp_ns)
        with self._lock:
            self._ego = ego
        if self.settings.trigger == 'odometry':
            self._command_or_report()

    def _check_frame(self, frame_id: str) -> None:
        if frame_id != self.settings.output_frame:
            raise MessageError(
                f'frame {frame_id!r:.40} is not output_frame {self.settings.output_frame!r}'
            )

    def _run(self) -> None:
        period_s = 1.0 / self.settings.command_hz
        due_s = time.monotonic()
        quiet_s = FILL_IN_S if self.settings.trigger == 'odometry' else 0.0
        while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
            if time.monotonic() - self._sent_s >= quiet_s:
                self._command_or_report()
            due_s = max(due_s + period_s, time.monotonic())

    def _command_or_report(self) -> None:
        try:
            # Two threads command; one at a time, or their steering would run apart.
            with self._command_lock:
                self._command()
        except Exception as error:
            # The next tick is a new chance; meanwhile the vehicle's own watchdog brakes.
            self.get_logger().error(f'{type(error).__name__}: {error}')

    def _command(self) -> None:
        begin_s = time.perf_counter()
        with self._lock:
            trajectory, ego = self._trajectory, self._ego
        command = self._follower.command(trajectory, ego, self._now_ns())
        self._reason = command.reason
        self._send(command)
        self._stages.add({'command_ms': (time.perf_counter() - begin_s) * 1e3})

    def _send(self, command: DriveCommand) -> None:
        speed_mps = 0.0 if self._ego is None else self._ego.speed_mps
        self._control.send(command, speed_mps, self._now_ns())
        self._sent_s = time.monotonic()

    def _publish_diagnostics(self) -> None:
        reason = self._reason
        level, text = (OK, reason) if reason in FOLLOWS else (ERROR, f'braking: {reason}')
        line = status('command', level, text, self._stages.values())
        self._diagnostics.publish([line], self._meters.values())

    def close(self) -> None:
        """Stop commanding, the brake being the last word."""
        self._stop.set()
        self._thread.join(timeout=1.0)
        self._send(self._follower.brake(self._ego, 'shutdown'))
        # A publisher that goes takes its unsent messages along.
        self._control.flush(LAST_WORD)


def main() -> int:
    """Run the follower until a signal."""
    return run_node(FollowerNode)


if __name__ == '__main__':
    sys.exit(main())
