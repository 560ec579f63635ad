import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.safety.follower import Follower, FollowerParameters
from spanvla_ros.safety.state import Guardian
from spanvla_ros.types import EgoState, Trajectory, Vehicle

SECOND = 1_000_000_000
TICK_NS = 50_000_000


class Bicycle:
    """A car of the test's own: commands act two ticks late, speed answers within 0.25 s."""

    def __init__(self, speed=0.0):
        self.vehicle = Vehicle()
        self.x = self.y = self.yaw = self.steering = 0.0
        self.speed = speed
        self.pending = []

    def ego(self, now_ns):
        rate = self.speed * math.tan(self.steering) / self.vehicle.wheelbase_m
        return EgoState(now_ns, self.x, self.y, self.yaw, self.speed, 0.0, rate)

    def step(self, command):
        self.pending.append(command)
        command = self.pending.pop(0) if len(self.pending) > 2 else self.pending[0]
        for _ in range(5):
            limit = self.vehicle
            accel = (command.speed_mps - self.speed) / 0.25
            accel = min(max(accel, -limit.max_decel_mps2), limit.max_accel_mps2)
            turn = command.steering_rad - self.steering
            self.steering += min(max(turn, -0.008), 0.008)
            self.speed = max(self.speed + accel * 0.01, 0.0)
            self.x += self.speed * math.cos(self.yaw) * 0.01
            self.y += self.speed * math.sin(self.yaw) * 0.01
            self.yaw += self.speed * math.tan(self.steering) / limit.wheelbase_m * 0.01


class Track:
    """Twenty metres straight, then a circle to the left."""

    def __init__(self, radius_m):
        self.radius_m = radius_m

    def pose(self, along_m):
        if along_m < 20.0:
            return np.array([along_m, 0.0, 0.0])
        angle = (along_m - 20.0) / self.radius_m
        return np.array(
            [
                20.0 + self.radius_m * math.sin(angle),
                self.radius_m * (1 - math.cos(angle)),
                angle,
            ]
        )

    def offset(self, car):
        if car.x < 20.0 and car.y < self.radius_m / 2:
            return car.y
        return self.radius_m - math.hypot(car.x - 20.0, car.y - self.radius_m)

    def trajectory(self, along_m, speed, now_ns, count=51):
        times_s = 0.1 * np.arange(count)
        poses = np.stack([self.pose(along_m + speed * t) for t in times_s])
        return Trajectory(now_ns, 'odom', times_s, poses)


CURVES = [(12.0, 5.0), (12.0, 7.0), (20.0, 8.0), (50.0, 11.0), (100.0, 14.0), (200.0, 15.0)]


@pytest.mark.parametrize(('radius_m', 'speed'), CURVES)
def test_tracks_curves_at_a_tenth_of_a_second_of_latency(radius_m, speed):
    track, car, follower = Track(radius_m), Bicycle(speed), Follower(Vehicle())
    offsets, wheels, speeds, along_m = [], [], [], 0.0
    for tick in range(int(min((20.0 + 3.0 * radius_m) / speed, 12.0) / 0.05)):
        now_ns = SECOND + tick * TICK_NS
        command = follower.command(
            track.trajectory(along_m, speed, now_ns), car.ego(now_ns), now_ns
        )
        car.step(command)
        along_m += car.speed * 0.05
        offsets.append(track.offset(car))
        wheels.append(car.steering)
        speeds.append(car.speed)
    assert np.abs(offsets).mean() < 0.1
    assert np.abs(offsets).max() < 0.4
    assert np.abs(np.array(speeds) - speed).max() < 0.3
    # Once in the curve the wheel stands still.
    assert np.abs(np.diff(wheels[-40:])).max() < 2e-3
    assert wheels[-1] == pytest.approx(math.atan(3.089 / radius_m), rel=0.05)


@pytest.mark.parametrize(('radius_m', 'speed'), CURVES)
def test_guardian_and_follower_in_closed_loop(make_plan, radius_m, speed):
    """Plans at 10 Hz, 0.1 s old, noisy; the wheel must stay calm and the car on the line."""
    rng = np.random.default_rng(1)
    track, car = Track(radius_m), Bicycle(speed)
    guardian, follower = Guardian(car.vehicle), Follower(car.vehicle)
    offsets, wheels, due, along_m = [], [], [], 0.0
    for tick in range(int(min((20.0 + 3.0 * radius_m) / speed, 12.0) / 0.05)):
        now_ns = SECOND + tick * TICK_NS
        ego = car.ego(now_ns)
        assert guardian.on_ego(ego, now_ns) is None
        if tick % 2 == 0:
            times_s = 0.5 * np.arange(1, 11)
            poses = np.stack([track.pose(along_m + speed * t) for t in times_s])
            poses[:, :2] += rng.normal(0.0, 0.03, (10, 2))
            plan = make_plan(
                stamp_ns=now_ns,
                trajectory=Trajectory(now_ns, 'odom', times_s, poses),
                origin=(car.x, car.y, car.yaw),
                speed=car.speed,
            )
            due.append((tick + 2, plan.to_json()))
        while due and due[0][0] <= tick:
            assert guardian.on_plan_text(due.pop(0)[1], now_ns) is None
        output = guardian.tick(now_ns)
        car.step(follower.command(output.trajectory, ego, now_ns))
        along_m += car.speed * 0.05
        if tick > 4:
            offsets.append(track.offset(car))
            wheels.append(car.steering)
    assert np.abs(offsets).mean() < 0.12
    assert np.abs(offsets).max() < 0.45
    assert np.abs(np.diff(wheels[-40:])).max() < 0.03


@pytest.mark.parametrize('decel', [1.0, 2.5, 6.0])
def test_stops_where_the_plan_stops_and_stays(make_plan, decel):
    car = Bicycle(10.0)
    guardian, follower = Guardian(car.vehicle), Follower(car.vehicle)
    goal_m = 40.0
    for tick in range(300):
        now_ns = SECOND + tick * TICK_NS
        ego = car.ego(now_ns)
        guardian.on_ego(ego, now_ns)
        if tick % 2 == 0:
            # Full speed until the curve of constant deceleration into the goal.
            times_s, place, speed, rows = 0.5 * np.arange(1, 11), car.x, car.speed, []
            for _ in range(500):
                allowed = math.sqrt(max(2 * decel * (goal_m - place), 0.0))
                speed = min(speed, allowed)
                place += speed * 0.01
                rows.append((place, 0.0, 0.0))
            plan = make_plan(
                stamp_ns=now_ns,
                trajectory=Trajectory(now_ns, 'odom', times_s, np.array(rows[49::50])),
                origin=(car.x, car.y, car.yaw),
                speed=car.speed,
            )
            rejection = guardian.on_plan_text(plan.to_json(), now_ns)
            assert rejection is None, rejection
        output = guardian.tick(now_ns)
        command = follower.command(output.trajectory, ego, now_ns)
        car.step(command)
        if tick == 250:
            rested = (car.x, car.y)
    assert car.speed < 1e-9
    assert command.speed_mps == 0.0
    assert command.braking
    assert (car.x, car.y) == pytest.approx(rested, abs=1e-6)
    assert car.x == pytest.approx(goal_m, abs=0.8)


def test_starts_from_a_standstill(make_plan):
    car = Bicycle(0.0)
    guardian, follower = Guardian(car.vehicle), Follower(car.vehicle)
    for tick in range(200):
        now_ns = SECOND + tick * TICK_NS
        ego = car.ego(now_ns)
        guardian.on_ego(ego, now_ns)
        if tick % 2 == 0:
            plan = make_plan(
                stamp_ns=now_ns, start=(car.x, car.y, car.yaw), speed=car.speed, accel=0.25
            )
            assert guardian.on_plan_text(plan.to_json(), now_ns) is None
        car.step(follower.command(guardian.tick(now_ns).trajectory, ego, now_ns))
    assert car.speed > 1.2
    assert abs(car.y) < 1e-6


def test_holds_still_on_a_standing_trajectory(vehicle, make_ego):
    follower = Follower(vehicle)
    poses = np.zeros((51, 3))
    standing = Trajectory(SECOND, 'odom', 0.1 * np.arange(51), poses)
    command = follower.command(standing, make_ego(speed=0.0), SECOND)
    assert (command.speed_mps, command.yaw_rate_radps) == (0.0, 0.0)
    assert command.braking
    assert command.reason == 'standing'


class TestBrake:
    """Everything short of a fresh trajectory is full braking with its reason."""

    @pytest.fixture
    def straight(self):
        return Track(1e6).trajectory(0.0, 8.0, SECOND)

    def full(self, command, vehicle):
        assert command.braking
        assert command.speed_mps == 0.0
        assert command.accel_mps2 == -vehicle.max_decel_mps2
        return command.reason

    def test_at_the_start(self, vehicle, straight, make_ego):
        follower = Follower(vehicle)
        assert self.full(follower.command(None, make_ego(), SECOND), vehicle) == 'no_trajectory'
        assert self.full(follower.command(straight, None, SECOND), vehicle) == 'no_odometry'

    def test_without_a_trajectory_for_longer_than_its_timeout(self, vehicle, straight, make_ego):
        follower = Follower(vehicle)
        for late_ns, braking in ((0, False), (300_000_000, False), (300_000_001, True)):
            now_ns = SECOND + late_ns
            command = follower.command(straight, make_ego(stamp_ns=now_ns), now_ns)
            assert command.braking == braking
        assert self.full(command, vehicle) == 'trajectory_timeout'

    def test_without_odometry(self, vehicle, make_ego):
        fresh = Track(1e6).trajectory(0.0, 8.0, 2 * SECOND)
        command = Follower(vehicle).command(fresh, make_ego(), 2 * SECOND)
        assert self.full(command, vehicle) == 'odometry_timeout'

    def test_stamps_from_the_future(self, vehicle, make_ego):
        ahead = Track(1e6).trajectory(0.0, 8.0, SECOND + 100_000_001)
        command = Follower(vehicle).command(ahead, make_ego(), SECOND)
        assert self.full(command, vehicle) == 'trajectory_from_future'

    def test_numbers_that_are_not(self, vehicle, straight, make_ego):
        command = Follower(vehicle).command(straight, make_ego(speed=math.nan), SECOND)
        assert self.full(command, vehicle) == 'not_finite'
        assert math.isfinite(command.yaw_rate_radps)
        straight.poses[3, 0] = math.inf
        command = Follower(vehicle).command(straight, make_ego(), SECOND)
        assert self.full(command, vehicle) == 'not_finite'

    @pytest.mark.parametrize('step_ns', [-20_000_001, 2_000_000_001])
    def test_clock_jumps_hold_until_a_newer_trajectory(self, vehicle, make_ego, step_ns):
        follower = Follower(vehicle)
        track = Track(1e6)
        before = track.trajectory(0.0, 8.0, SECOND)
        assert not follower.command(before, make_ego(), SECOND).braking
        now_ns = SECOND + step_ns
        ego = make_ego(stamp_ns=now_ns)
        stale = replace(before, stamp_ns=now_ns - 1)
        assert self.full(follower.command(stale, ego, now_ns), vehicle) == 'clock_jump'
        fresh = replace(before, stamp_ns=now_ns)
        assert not follower.command(fresh, ego, now_ns).braking

    def test_braking_in_a_curve_keeps_the_wheel(self, vehicle):
        follower, track, car = Follower(vehicle), Track(20.0), Bicycle(6.0)
        for tick in range(100):
            now_ns = SECOND + tick * TICK_NS
            along_m = 20.0 + 6.0 * tick * 0.05
            car.x, car.y, car.yaw = track.pose(along_m)
            car.steering = math.atan(car.vehicle.wheelbase_m / 20.0)
            trajectory = track.trajectory(along_m, 6.0, now_ns)
            command = follower.command(trajectory, car.ego(now_ns), now_ns)
        held = follower.brake(car.ego(now_ns), 'shutdown')
        assert self.full(held, vehicle) == 'shutdown'
        assert held.steering_rad == command.steering_rad
        assert held.yaw_rate_radps == pytest.approx(6.0 / 20.0, rel=0.1)


def test_an_odometry_that_reads_too_high_is_not_driven_after(vehicle, make_ego):
    straight = Track(1e6).trajectory(0.0, 8.0, SECOND)
    command = Follower(vehicle).command(straight, make_ego(speed=60.0), SECOND)
    assert command.reason == 'following'
    assert command.speed_mps == vehicle.max_speed_mps == 20.0
    assert command.accel_mps2 == -vehicle.max_decel_mps2


@given(
    x=st.floats(-50, 50),
    y=st.floats(-50, 50),
    yaw=st.floats(-10, 10),
    speed=st.floats(-30, 60),
    rate=st.floats(-10, 10),
    late_ns=st.integers(0, 300_000_000),
    speed_wanted=st.floats(0, 20),
    radius=st.floats(6, 1000),
    count=st.integers(2, 51),
)
def test_commands_are_finite_and_within_the_vehicle(
    vehicle, x, y, yaw, speed, rate, late_ns, speed_wanted, radius, count
):
    follower = Follower(vehicle, FollowerParameters())
    trajectory = Track(radius).trajectory(0.0, speed_wanted, SECOND, count)
    ego = EgoState(SECOND, x, y, yaw, speed, 0.0, rate)
    command = follower.command(trajectory, ego, SECOND + late_ns)
    numbers = (command.speed_mps, command.yaw_rate_radps, command.accel_mps2, command.steering_rad)
    assert all(math.isfinite(number) for number in numbers)
    assert 0.0 <= command.speed_mps <= vehicle.max_speed_mps
    assert -vehicle.max_decel_mps2 <= command.accel_mps2 <= vehicle.max_accel_mps2
    assert abs(command.steering_rad) <= vehicle.max_steering_rad
