"""The guardian over real DDS: one trajectory after the other, whatever comes in."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import MarkerArray

from spanvla_ros.messages import read_trajectory, stamp_ns_of
from spanvla_ros.types import Plan, Trajectory

LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


def straight_plan(stamp_ns: int, x_m: float, speed_mps: float, plan_id: int = 1, **changes) -> str:
    times_s = 0.5 * np.arange(1, 11)
    poses = np.zeros((10, 3))
    poses[:, 0] = x_m + speed_mps * times_s
    values = {
        'plan_id': plan_id,
        'trajectory': Trajectory(stamp_ns, 'odom', times_s, poses),
        'origin': (x_m, 0.0, 0.0),
        'image_stamps_ns': (stamp_ns,),
        'kv_stamp_ns': stamp_ns,
        'schedule': 'off',
        'steps': 5,
        'speed_mps': speed_mps,
    }
    return Plan(**(values | changes)).to_json()


class Drive:
    """A car that follows what the guardian says, on the x axis."""

    def __init__(self, bus, launch):
        self.bus = bus
        # Kept as bytes: reading each of them would starve this process on a busy machine.
        self.raw = []
        bus.node.create_subscription(
            MultiDOFJointTrajectory, 'output/trajectory', self.raw.append, 1, raw=True
        )
        self.states = bus.listen('output/state', String, LATCHED)
        # Longer than a busy test machine holds up the odometry.
        self.guardian = launch('guardian', odometry_timeout_s=1.0)
        self.x_m, self.speed_mps, self.plan_id = 0.0, 8.0, 0
        self.planning = True
        self.clock_s = time.monotonic()

    def newest(self, back: int = 1) -> MultiDOFJointTrajectory:
        return deserialize_message(self.raw[-back], MultiDOFJointTrajectory)

    @property
    def state(self):
        return json.loads(self.states[-1].data) if self.states else {'state': '', 'reasons': []}

    def move(self):
        """Advance along the newest trajectory by the time that has passed."""
        now_s = time.monotonic()
        since_s, self.clock_s = min(now_s - self.clock_s, 0.3), now_s
        if self.raw:
            speeds = [p.velocities[0].linear.x for p in self.newest().points]
            told = float(np.interp(since_s, 0.1 * np.arange(51), speeds))
            self.speed_mps = told if abs(told - self.speed_mps) < 2.0 else self.speed_mps
        self.x_m += self.speed_mps * since_s

    def feed(self):
        self.move()
        self.bus.publish('input/odometry', self.bus.odometry(self.x_m, self.speed_mps), 50)
        if self.planning:
            self.plan_id += 1
            text = straight_plan(self.bus.now_ns, self.x_m, self.speed_mps, self.plan_id)
            self.bus.publish('plan', String(data=text), 1)

    def until(self, state, *reasons, feed=None, seconds=20.0):
        def met():
            now = self.state
            return now['state'] == state and set(reasons) <= set(now['reasons'])

        self.bus.wait(met, feed or self.feed, seconds)

    def restart(self):
        """A straight road ahead, a moving car and a planner again."""
        self.planning, self.speed_mps = True, 8.0
        road = [(self.x_m - 20.0 + x, 0.0) for x in np.arange(0.0, 300.0, 15.0).tolist()]
        self.bus.publish('input/route', self.bus.route(road), LATCHED)
        self.until('OK')


@pytest.fixture(scope='module')
def drive(bus, launch):
    drive = Drive(bus, launch)
    drive.restart()
    return drive


@pytest.fixture(autouse=True)
def in_good_order(drive):
    drive.restart()
    yield
    assert drive.guardian.exit_status is None


def test_a_plan_becomes_a_trajectory_in_the_frame_and_at_the_stamp_of_the_odometry(drive):
    stamps = {stamp_ns_of(drive.bus.odometry().header)}

    def feed():
        message = drive.bus.odometry(drive.x_m, drive.speed_mps)
        stamps.add(stamp_ns_of(message.header))
        drive.bus.publish('input/odometry', message, 50)
        text = straight_plan(stamp_ns_of(message.header), drive.x_m, drive.speed_mps)
        drive.bus.publish('plan', String(data=text), 1)

    drive.raw.clear()
    drive.bus.wait(lambda: drive.raw and stamp_ns_of(drive.newest().header) in stamps, feed)
    message = drive.newest()
    assert message.header.frame_id == 'odom'
    assert list(message.joint_names) == ['base_link']
    trajectory = read_trajectory(message)
    assert trajectory.times_s == pytest.approx(0.1 * np.arange(51))
    assert trajectory.poses[0] == pytest.approx([drive.x_m, 0.0, 0.0], abs=1e-6)
    gone_m = trajectory.poses[-1, 0] - trajectory.poses[0, 0]
    assert gone_m == pytest.approx(5.0 * drive.speed_mps, abs=2.0)
    last = message.points[-1]
    assert last.velocities[0].linear.x == pytest.approx(drive.speed_mps, abs=0.5)
    assert len(last.accelerations) == 1


def test_state_tells_stamps_and_ages(drive):
    drive.until('OK')
    state = drive.state
    assert state['driver'] == 'model'
    assert 0.0 <= state['plan_age_s'] < 1.0
    assert state['kv_stamp_ns'] == state['image_stamp_ns']
    assert state['stamp_ns'] - state['image_stamp_ns'] == pytest.approx(
        state['image_age_s'] * 1e9, abs=1e6
    )


def test_path_and_markers_go_along(drive):
    paths = drive.bus.listen('output/path', PathMessage)
    markers = drive.bus.listen('output/markers', MarkerArray)
    drive.bus.wait(lambda: paths and markers, drive.feed)
    assert len(paths[-1].poses) == 51
    assert paths[-1].header.frame_id == 'odom'
    assert markers[-1].markers[2].text.startswith(('OK', 'DEGRADED'))


def test_odometry_that_is_no_number(drive):
    def feed():
        drive.feed()
        drive.bus.publish('input/odometry', drive.bus.odometry(x_m=float('nan')), 50)

    drive.bus.wait(lambda: drive.bus.shows('guardian: input/odometry', 'not finite'), feed)
    drive.bus.wait(lambda: drive.state['refused'].get('odometry:unreadable', 0) > 0, feed)
    drive.until('OK')


def test_nothing_but_bad_odometry_is_a_fault_with_full_braking(drive):
    def feed():
        drive.bus.publish('input/odometry', drive.bus.odometry(x_m=float('inf')), 50)

    drive.until('FAULT', 'odometry_stale', feed=feed)
    last = drive.newest()
    assert last.points[0].accelerations[0].linear.x == pytest.approx(-7.0)
    assert math.isfinite(last.points[50].transforms[0].translation.x)


def test_odometry_in_another_frame(drive):
    def feed():
        drive.feed()
        message = drive.bus.odometry(drive.x_m)
        message.header.frame_id = 'map'
        drive.bus.publish('input/odometry', message, 50)

    drive.bus.wait(
        lambda: drive.bus.shows('guardian: input/odometry', 'is not output_frame'), feed
    )


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('not JSON', 'schema'),
        ('{"schema_version": 1}', 'schema'),
        ('x' * 70_000, 'schema'),
    ],
)
def test_a_garbage_plan(drive, text, reason):
    drive.planning = False

    def feed():
        drive.feed()
        drive.bus.publish('plan', String(data=text), 1)

    drive.until('DEGRADED', f'rejected:{reason}', feed=feed)
    drive.bus.wait(lambda: drive.bus.shows('guardian: plan', reason), feed)


def test_a_plan_that_stands_while_the_car_moves(drive):
    drive.planning = False

    def feed():
        drive.feed()
        text = straight_plan(drive.bus.now_ns, drive.x_m, 0.0, plan_id=99)
        drive.bus.publish('plan', String(data=text), 1)

    drive.until('DEGRADED', 'rejected:all_equal', feed=feed)


def test_an_empty_route(drive):
    drive.bus.publish('input/route', drive.bus.route([]), LATCHED)
    drive.until('DEGRADED', 'route_empty')
    drive.bus.wait(lambda: drive.bus.shows('guardian: input/route', 'route_empty'), drive.feed)


def test_a_route_in_another_frame(drive):
    route = drive.bus.route([(drive.x_m + x, 0.0) for x in (0.0, 60.0, 120.0)])
    route.header.frame_id = 'map'
    drive.bus.publish('input/route', route, LATCHED)
    drive.until('DEGRADED', 'route_frame')
    drive.bus.wait(lambda: drive.bus.shows('guardian: input/route', 'route_frame'), drive.feed)


def test_a_route_behind_the_car(drive):
    behind = [(drive.x_m - 300.0 + x, 0.0) for x in (0.0, 15.0, 30.0)]
    drive.bus.publish('input/route', drive.bus.route(behind), LATCHED)
    drive.until('DEGRADED', 'route_behind')
    drive.bus.wait(lambda: drive.bus.shows('guardian: state', 'route_behind'), drive.feed)


def test_a_clock_that_runs_backwards(drive):
    drive.bus.shift_ns = -10_000_000_000
    try:
        drive.bus.wait(
            lambda: drive.bus.shows('guardian: input/odometry', 'clock_backwards'), drive.feed
        )
        drive.until('FAULT', 'odometry_stale')
    finally:
        drive.bus.shift_ns = 0


def test_a_silent_planner_is_followed_by_a_stop_and_no_gap(drive):
    drive.until('OK')
    drive.planning = False
    states, outputs = len(drive.states), len(drive.raw)
    drive.until('FALLBACK', 'comfortable_stop')
    drive.bus.wait(lambda: drive.speed_mps < 0.05, drive.feed)
    drive.until('FALLBACK', 'standing')
    seen = [json.loads(message.data)['state'] for message in drive.states[states:]]
    # Where the test machine holds up the odometry itself, a FAULT is right in between.
    seen = [state for state in seen if state != 'FAULT']
    changes = [state for before, state in pairwise(['', *seen]) if state != before]
    assert changes in (['OK', 'DEGRADED', 'FALLBACK'], ['DEGRADED', 'FALLBACK'])
    # How evenly they come is measured by the drive, not on a busy test machine.
    assert len(drive.raw) - outputs > 20


def call(bus, kind, name, request):
    client = bus.node.create_client(kind, name)
    bus.wait(client.service_is_ready, lambda: None)
    future = client.call_async(request)
    bus.wait(future.done, lambda: None)
    return future.result()


def test_services(drive):
    try:
        answer = call(drive.bus, SetBool, 'guardian/set_enabled', SetBool.Request(data=False))
        assert answer.success
        drive.until('STANDBY', 'disabled')
    finally:
        answer = call(drive.bus, SetBool, 'guardian/set_enabled', SetBool.Request(data=True))
    assert answer.message == 'following plans'
    assert call(drive.bus, Trigger, 'guardian/reset', Trigger.Request()).success


def test_starting_is_silent_but_diagnosed_and_the_end_is_a_stop(launch, bus, drive):
    """A second guardian in a namespace of its own, from its start to its end."""
    log = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'spanvla_ros.ros.guardian_node',
            '--ros-args',
            '-r',
            '__ns:=/other',
        ],
        env=drive.guardian.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    heard = bus.listen('/other/output/trajectory', MultiDOFJointTrajectory, 50)
    states = bus.listen('/other/output/state', String, LATCHED)
    try:
        bus.wait(lambda: 'other/guardian: state' in bus.lines, lambda: None)
        line = bus.lines['other/guardian: state']
        assert line.message == 'STARTING: no odometry yet'
        assert not heard

        def feed():
            message: Odometry = bus.odometry(speed_mps=5.0)
            bus.publish('/other/input/odometry', message, 50)

        bus.wait(lambda: len(heard) > 5 and states, feed)
        log.send_signal(signal.SIGTERM)
        log.send_signal(signal.SIGINT)
        bus.wait(lambda: log.poll() is not None, lambda: None)
        bus.spin(0.3)
    finally:
        if log.poll() is None:
            os.killpg(log.pid, signal.SIGKILL)
    # In time or cut: that is held by test_shutdown.py, which tries again on a busy machine.
    assert log.returncode in (0, -signal.SIGALRM)
    assert json.loads(states[-1].data)['state'] in ('STANDBY', 'FAULT')
    assert heard[-1].points[-1].velocities[0].linear.x == 0.0


def test_the_process_holds_no_model_code(drive):
    code = (
        'import sys, spanvla_ros.ros.guardian_node\n'
        'print([name for name in ("torch", "transformers", "onnxruntime", "cv2", "scipy", '
        '"spanvla_ros.runtime", "spanvla_ros.model", "rosbags") if name in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(drive.guardian.environment),
    )
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize(
    ('parameters', 'words'),
    [
        ({'vehicle_file': 'absent.yaml'}, 'name a vehicle file'),
        ({'output_hz': 500.0}, 'output_hz'),
        ({'autoware': True}, 'set it to map'),
        (
            {'autoware': True, 'output_frame': 'map'},
            'which is not installed',
        ),
    ],
)
def test_a_bad_parameter_is_one_sentence_and_exit_2(launch, parameters, words):
    process = launch('guardian', **parameters)
    process.process.wait(30)
    assert process.exit_status == 2
    assert words in process.last_line()
