import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spanvla_ros.safety import state as guardian_module
from spanvla_ros.safety.checks import Reason, Rejection
from spanvla_ros.safety.state import (
    DEGRADED,
    FALLBACK,
    FAULT,
    OK,
    STANDBY,
    Guardian,
    GuardianParameters,
    load_vehicle,
)
from spanvla_ros.types import Plan, Route, SpanvlaError, Trajectory, Vehicle

SECOND = 1_000_000_000
TICK_NS = 50_000_000
PLAN_FIELDS = (
    'plan_id',
    'trajectory',
    'origin',
    'image_stamps_ns',
    'kv_stamp_ns',
    'schedule',
    'steps',
    'speed_mps',
    'reasoning_stamp_ns',
    'history',
    'degraded',
    'stage_ms',
    'agreement',
    'driver',
)
AHEAD = Route(SECOND, 'odom', np.array([[-20.0, 0.0], [60.0, 0.0], [200.0, 0.0]]))


@pytest.fixture
def guardian(vehicle):
    return Guardian(vehicle)


@pytest.fixture
def driving(guardian, make_ego, make_plan):
    """At 8 m/s with route and a fresh plan, at one second."""
    guardian.on_route(AHEAD)
    assert guardian.on_ego(make_ego(), SECOND) is None
    assert guardian.on_plan_text(make_plan().to_json(), SECOND) is None
    return guardian


def roll(guardian, make_ego, seconds, after_ns=SECOND, speed=8.0):
    """Straight on at steady speed with odometry alone; the outputs on the way."""
    outputs = []
    for tick in range(1, round(seconds * 20) + 1):
        now_ns = after_ns + tick * TICK_NS
        x_m = speed * (now_ns - SECOND) * 1e-9
        guardian.on_ego(make_ego(stamp_ns=now_ns, x_m=x_m, speed=speed), now_ns)
        outputs.append(guardian.tick(now_ns))
    return outputs


def test_silent_until_the_first_odometry(guardian, make_plan):
    assert guardian.tick(SECOND) is None
    rejection = guardian.on_plan_text(make_plan().to_json(), SECOND)
    assert rejection.reason is Reason.NO_ODOMETRY
    assert guardian.tick(SECOND) is None
    assert guardian.ego is None


def test_a_fresh_plan_is_followed(driving, complain, make_ego, vehicle):
    output = driving.tick(SECOND + TICK_NS)
    assert complain(output, make_ego(), vehicle) == ''
    assert (output.state, output.reasons) == (OK, ())
    assert output.trajectory.poses[-1, 0] == pytest.approx(40.0, abs=0.5)
    assert output.plan_id == 1
    assert output.plan_age_s == pytest.approx(0.05)
    assert output.image_age_s == pytest.approx(0.05)
    assert output.kv_age_s == pytest.approx(0.05)
    assert output.driver == 'model'
    assert driving.plan.plan_id == 1
    assert driving.counts.accepted == 1


def test_ages_are_those_of_image_and_cache(driving, make_plan):
    now_ns = SECOND + 200_000_000
    plan = make_plan(stamp_ns=SECOND + 100_000_000, start=(0.8, 0, 0), kv_stamp_ns=SECOND)
    assert driving.on_plan_text(plan.to_json(), now_ns) is None
    output = driving.tick(now_ns + TICK_NS)
    assert output.plan_age_s == pytest.approx(0.05)
    assert output.image_age_s == pytest.approx(0.15)
    assert output.kv_age_s == pytest.approx(0.25)


def test_what_degrades_a_plan_degrades_the_state(driving, make_plan):
    reasons = tuple(f'camera_missing:{i}' for i in range(20))
    driving.on_plan_text(make_plan(stamp_ns=SECOND + 1, degraded=reasons).to_json(), SECOND + 1)
    output = driving.tick(SECOND + TICK_NS)
    assert output.state == DEGRADED
    assert output.reasons == reasons[:16]


def test_the_planner_falls_silent(driving, make_ego, complain, vehicle):
    outputs = roll(driving, make_ego, 1.5)
    states = [output.state for output in outputs]
    assert states == [OK] * 7 + [DEGRADED] * 13 + [FALLBACK] * 10
    assert outputs[6].reasons == ()
    assert outputs[7].reasons == ('plan_old',)
    assert outputs[19].trajectory.poses[-1, 0] - outputs[19].trajectory.poses[0, 0] > 30.0
    assert outputs[20].reasons == ('plan_too_old', 'comfortable_stop')
    assert outputs[20].plan_id is None
    assert outputs[20].accels_mps2[0] == pytest.approx(-vehicle.comfort_decel_mps2)
    stop_m = outputs[20].trajectory.poses[-1, 0] - outputs[20].trajectory.poses[0, 0]
    assert stop_m == pytest.approx(8.0**2 / 5.0, abs=0.2)
    for output in outputs:
        ego = make_ego(
            stamp_ns=output.trajectory.stamp_ns, x_m=float(output.trajectory.poses[0, 0])
        )
        assert complain(output, ego, vehicle) == ''


def test_it_goes_on_with_the_next_plan(driving, make_ego, make_plan):
    roll(driving, make_ego, 1.5)
    now_ns = SECOND + 30 * TICK_NS
    plan = make_plan(stamp_ns=now_ns, start=(12.0, 0.0, 0.0), plan_id=2)
    assert driving.on_plan_text(plan.to_json(), now_ns) is None
    assert driving.tick(now_ns).state == OK


def test_without_any_plan_it_brakes(guardian, make_ego, vehicle):
    guardian.on_ego(make_ego(), SECOND)
    output = guardian.tick(SECOND)
    assert (output.state, output.reasons) == (FALLBACK, ('no_plan', 'hard_stop'))
    assert output.accels_mps2[0] == pytest.approx(-vehicle.max_decel_mps2)


def test_a_hold_says_why(guardian, make_ego):
    guardian.on_ego(make_ego(speed=0.0), SECOND)
    assert guardian.tick(SECOND).reasons == ('no_plan', 'hard_stop', 'standing')


def test_a_plan_that_stands_is_held_in_state_ok(guardian, make_ego, make_plan):
    guardian.on_route(AHEAD)
    guardian.on_ego(make_ego(speed=0.0), SECOND)
    assert guardian.on_plan_text(make_plan(speed=0.0).to_json(), SECOND) is None
    output = guardian.tick(SECOND)
    assert (output.state, output.reasons) == (OK, ('standing',))


def test_off_its_path_it_brakes_hard(driving, make_ego):
    # What was refused before is not why it brakes.
    driving.on_plan_text('{}', SECOND + 1)
    now_ns = SECOND + 500_000_000
    driving.on_ego(make_ego(stamp_ns=now_ns, x_m=4.0, y_m=2.5), now_ns)
    output = driving.tick(now_ns)
    assert output.state == FALLBACK
    assert output.reasons == ('off_path', 'hard_stop')
    assert driving.tick(SECOND + 1_200_000_000).reasons[0] == 'odometry_stale'


def test_off_the_path_of_an_old_plan_the_plan_is_too_old(driving, make_ego):
    now_ns = SECOND + 1_200_000_000
    driving.on_ego(make_ego(stamp_ns=now_ns, x_m=4.0, y_m=2.5), now_ns)
    assert driving.tick(now_ns).reasons == ('plan_too_old', 'hard_stop')


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', Reason.SCHEMA),
        ('{}', Reason.SCHEMA),
        ('[' * 10_000, Reason.SCHEMA),
        ('x' * 65_000, Reason.SCHEMA),
        ('{"schema_version": 1, "trajectory": NaN}', Reason.SCHEMA),
        ('{"schema_version": 1, "trajectory": [1]}', Reason.SCHEMA),
        ('\ud800', Reason.SCHEMA),
    ],
)
def test_garbage_is_refused_and_the_last_plan_kept(driving, text, reason):
    assert driving.on_plan_text(text, SECOND + 1).reason is reason
    output = driving.tick(SECOND + TICK_NS)
    assert (output.state, output.reasons) == (DEGRADED, ('rejected:schema',))
    assert driving.counts.refused == (('plan:schema', 1),)


@pytest.mark.parametrize('value', [None, 1, [], 'x', {'total_ms': None}, {'odd': 1.0}])
@pytest.mark.parametrize('field', PLAN_FIELDS)
def test_a_field_of_the_wrong_kind_is_refused_or_harmless(driving, make_plan, edit, field, value):
    rejection = driving.on_plan_text(edit(make_plan(), **{field: value}), SECOND + 1)
    assert rejection is None or rejection.reason is Reason.SCHEMA


def test_half_a_surrogate_pair_never_gets_as_far_as_a_message(driving, make_plan, edit):
    text = edit(make_plan(), degraded=['\ud800'])
    assert driving.on_plan_text(text, SECOND + 1).reason is Reason.SCHEMA


def test_a_small_correction_of_the_clock_is_no_jump_and_makes_no_negative_age(driving):
    driving.tick(SECOND)
    output = driving.tick(SECOND - 10_000_000)
    assert output.state == OK
    assert output.odometry_age_s == 0.0
    assert output.image_age_s == 0.0


def test_a_good_plan_ends_the_complaint(driving, make_plan):
    driving.on_plan_text('', SECOND + 1)
    driving.on_plan_text(make_plan(stamp_ns=SECOND + 2).to_json(), SECOND + 2)
    assert driving.tick(SECOND + TICK_NS).state == OK


def test_a_refusal_names_the_fallback(guardian, make_ego):
    guardian.on_ego(make_ego(), SECOND)
    guardian.on_plan_text('', SECOND)
    assert guardian.tick(SECOND).reasons == ('rejected:schema', 'hard_stop')


def test_an_all_equal_plan_while_moving_never_becomes_a_stop_in_state_ok(driving, make_plan):
    frozen = make_plan(speed=0.0, stamp_ns=SECOND + 1)
    assert driving.on_plan_text(frozen.to_json(), SECOND + 1).reason is Reason.ALL_EQUAL
    output = driving.tick(SECOND + TICK_NS)
    assert output.state == DEGRADED
    assert output.speeds_mps[-1] == pytest.approx(8.0, abs=0.2)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'x_m': math.nan}, 'not_finite'),
        ({'speed': math.inf}, 'not_finite'),
        ({'x_m': 2e7}, 'implausible_pose'),
        ({'yaw_rad': 2e3}, 'implausible_pose'),
        ({'speed': 101.0}, 'implausible_motion'),
        ({'stamp_ns': SECOND + 150_000_001}, 'from_future'),
        ({'stamp_ns': SECOND - 1}, 'out_of_order'),
        ({'stamp_ns': 1}, 'out_of_order'),
        ({'stamp_ns': 0}, 'clock_backwards'),
    ],
)
def test_bad_odometry_is_refused_and_counted(driving, make_ego, change, reason):
    assert driving.on_ego(make_ego(**change), SECOND + TICK_NS) == reason
    assert driving.ego == make_ego()
    assert driving.counts.refused == ((f'odometry:{reason}', 1),)
    assert driving.tick(SECOND + TICK_NS).state == OK


def test_odometry_that_stays_bad_is_a_fault(driving, make_ego, vehicle, complain):
    for tick in range(1, 8):
        now_ns = SECOND + tick * TICK_NS
        driving.on_ego(make_ego(stamp_ns=now_ns, speed=math.nan), now_ns)
        output = driving.tick(now_ns)
        assert output.state == (FAULT if tick > 6 else OK)
    assert output.reasons == ('odometry_stale', 'hard_stop')
    assert output.odometry_age_s == pytest.approx(0.35)
    assert output.accels_mps2[0] == pytest.approx(-vehicle.max_decel_mps2)
    assert complain(output, make_ego(), vehicle) == ''


def test_a_leap_of_the_pose_drops_plan_and_path(driving, make_ego):
    now_ns = SECOND + TICK_NS
    assert driving.on_ego(make_ego(stamp_ns=now_ns, x_m=2.6), now_ns) is None
    assert driving.plan is not None
    now_ns += TICK_NS
    assert driving.on_ego(make_ego(stamp_ns=now_ns, x_m=5.3), now_ns) is None
    assert driving.plan is None
    assert driving.counts.refused == (('odometry:jump', 1),)
    assert driving.tick(now_ns).reasons == ('no_plan', 'hard_stop')


@pytest.mark.parametrize(('step_ns', 'kind'), [(-5 * SECOND, 'backwards'), (9 * SECOND, 'gap')])
def test_a_clock_jump_brakes_until_new_odometry(driving, make_ego, make_plan, step_ns, kind):
    driving.tick(SECOND)
    now_ns = SECOND + step_ns
    output = driving.tick(now_ns)
    assert (output.state, output.reasons) == (FAULT, (f'clock_{kind}', 'hard_stop'))
    assert output.trajectory.stamp_ns == now_ns
    assert driving.plan is None
    now_ns += TICK_NS
    assert driving.on_ego(make_ego(stamp_ns=now_ns), now_ns) is None
    assert driving.tick(now_ns).state == FALLBACK
    plan = make_plan(stamp_ns=now_ns)
    assert driving.on_plan_text(plan.to_json(), now_ns) is None
    assert driving.tick(now_ns).state == OK
    assert driving.counts.refused == ((f'clock:clock_{kind}', 1),)
    assert driving.clock_jumps == 1


def test_a_clock_jump_before_odometry_is_only_counted(guardian):
    guardian.tick(SECOND)
    assert guardian.tick(0) is None
    assert guardian.counts.refused == (('clock:clock_backwards', 1),)


def test_disabled_it_stops_gently_and_says_so(driving, vehicle):
    driving.set_enabled(False)
    output = driving.tick(SECOND + TICK_NS)
    assert (output.state, output.reasons) == (STANDBY, ('disabled', 'comfortable_stop'))
    assert output.accels_mps2[0] == pytest.approx(-vehicle.comfort_decel_mps2)
    driving.set_enabled(True)
    assert driving.tick(SECOND + TICK_NS).state == OK


def test_reset_forgets_the_plan_and_the_complaints(driving):
    driving.on_plan_text('', SECOND + 1)
    driving.reset()
    output = driving.tick(SECOND + TICK_NS)
    assert output.reasons == ('no_plan', 'hard_stop')


class TestRoute:
    def refused(self, guardian, points, frame_id='odom'):
        route = Route(SECOND, frame_id, np.array(points, dtype=np.float64).reshape(-1, 2))
        return guardian.on_route(route)

    @pytest.mark.parametrize(
        ('points', 'frame_id', 'reason'),
        [
            ([], 'odom', 'empty'),
            ([[0, 0], [1, 0]], 'map', 'frame'),
            ([[0, 0], [math.nan, 0]], 'odom', 'not_finite'),
            ([[0, 0], [1e9, 0]], 'odom', 'not_finite'),
            ([[0, 0]], 'odom', 'repeated_points'),
            ([[0, 0], [0, 0], [1, 0]], 'odom', 'repeated_points'),
        ],
    )
    def test_a_bad_route_leaves_none(self, driving, points, frame_id, reason):
        assert self.refused(driving, points, frame_id) == reason
        output = driving.tick(SECOND + TICK_NS)
        assert (output.state, output.reasons) == (DEGRADED, (f'route_{reason}',))
        assert driving.counts.refused == ((f'route:{reason}', 1),)
        assert driving.on_route(AHEAD) is None
        assert driving.tick(SECOND + TICK_NS).state == OK

    def test_an_unreadable_route_leaves_none(self, driving):
        driving.refuse('route', 'no_frame')
        assert driving.tick(SECOND + TICK_NS).reasons == ('route_no_frame',)

    def test_none_at_all(self, guardian, make_ego, make_plan):
        guardian.on_ego(make_ego(), SECOND)
        guardian.on_plan_text(make_plan().to_json(), SECOND)
        assert guardian.tick(SECOND).reasons == ('route_missing',)

    def test_behind(self, driving):
        assert self.refused(driving, [[-80, 0], [-10, 0]]) is None
        assert driving.tick(SECOND + TICK_NS).reasons == ('route_behind',)

    def test_elsewhere(self, driving):
        assert self.refused(driving, [[-80, 7], [90, 7]]) is None
        assert driving.tick(SECOND + TICK_NS).reasons == ('off_route',)
        assert self.refused(driving, [[900, 7], [990, 7]]) is None
        assert driving.tick(SECOND + TICK_NS).reasons == ('off_route',)

    def test_it_binds_plans(self, driving, make_plan):
        away = make_plan(stamp_ns=SECOND + 1, curvature=0.02)
        assert driving.on_plan_text(away.to_json(), SECOND + 1).reason is Reason.CORRIDOR

    def test_it_does_not_bind_where_the_ego_itself_is_outside(self, driving, make_plan):
        self.refused(driving, [[-80, 7], [90, 7]])
        away = make_plan(stamp_ns=SECOND + 1, curvature=-0.02)
        assert driving.on_plan_text(away.to_json(), SECOND + 1) is None


def test_should_the_last_check_ever_fail_it_brakes(
    driving, monkeypatch, complain, vehicle, make_ego
):
    def refuse(*_):
        return Rejection(Reason.JERK, 'made up')

    monkeypatch.setattr(guardian_module, 'check_motion', refuse)
    output = driving.tick(SECOND + TICK_NS)
    assert (output.state, output.reasons) == (FAULT, ('output:jerk', 'hard_stop'))
    assert output.accels_mps2[0] == pytest.approx(-vehicle.max_decel_mps2)
    assert complain(output, make_ego(), vehicle) == ''
    assert driving.counts.refused == (('output:jerk', 1),)


def test_vehicle_files(tmp_path):
    assert load_vehicle('') == Vehicle()
    path = tmp_path / 'vehicle.yaml'
    path.write_text('wheelbase_m: 2.7\n', encoding='utf-8')
    assert load_vehicle(str(path)).wheelbase_m == 2.7
    with pytest.raises(SpanvlaError, match='name a vehicle file'):
        load_vehicle(str(tmp_path / 'absent.yaml'))


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'length_m: [1,\n', 'not valid YAML'),
        (b'\xff\xfe\x00', 'not valid YAML'),
        (b'1: 2\nwheels: 4\n', r"\['1', 'wheels'\] is not a vehicle field"),
        (b'length_m: true\n', 'length_m must be a positive number'),
        (b'length_m: .inf\n', 'length_m must be a positive number'),
        (b'max_steering_rad: 34.0\n', 'give it in radians'),
    ],
)
def test_an_odd_vehicle_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / 'odd.yaml'
    path.write_bytes(content)
    with pytest.raises(SpanvlaError, match=f'odd.yaml.*{words}'):
        load_vehicle(str(path))


# Whatever comes in, what goes out is valid.

numbers = st.one_of(
    st.floats(-30, 30), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e9])
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def steps(draw):
    """One thing that happens to a guardian, as plain data."""
    kind = draw(
        st.sampled_from(
            [
                'drive',
                'drive',
                'plan',
                'plan',
                'plan',
                'noisy',
                'broken',
                'text',
                'odometry',
                'route',
                'wait',
                'jump',
                'enable',
                'reset',
            ]
        )
    )
    if kind == 'plan':
        return kind, draw(
            st.tuples(
                st.floats(0, 12), st.floats(-7, 3), st.floats(-0.2, 0.2), st.floats(-0.3, 1.2)
            )
        )
    if kind == 'noisy':
        return kind, draw(st.lists(numbers, min_size=6, max_size=6))
    if kind == 'broken':
        return kind, (draw(st.sampled_from(PLAN_FIELDS)), draw(json_values))
    if kind == 'text':
        return kind, draw(st.text(max_size=40))
    if kind == 'odometry':
        return kind, draw(st.lists(numbers, min_size=7, max_size=7))
    if kind == 'route':
        return kind, draw(st.lists(st.tuples(numbers, numbers), max_size=5))
    if kind in ('wait', 'jump'):
        return kind, draw(st.floats(0.0, 1.5) if kind == 'wait' else st.floats(-20.0, 20.0))
    return kind, draw(st.booleans())


class Ride:
    """Plays steps against a guardian and checks each output with the slow validator."""

    def __init__(self, vehicle, complain, make_plan, make_ego):
        self.guardian = Guardian(vehicle)
        self.vehicle, self.complain = vehicle, complain
        self.make_plan, self.make_ego = make_plan, make_ego
        self.now_ns = 100 * SECOND
        self.output = None

    def play(self, kind, value):
        getattr(self, kind)(value)
        self.output = self.guardian.tick(self.now_ns)
        ego = self.guardian.ego
        if ego is None:
            assert self.output is None
            return
        assert self.complain(self.output, ego, self.vehicle) == ''
        assert 'output' not in ''.join(name for name, _ in self.guardian.counts.refused)

    def place(self):
        ego = self.guardian.ego
        return (0.0, 0.0, 0.0) if ego is None else (ego.x_m, ego.y_m, ego.yaw_rad)

    def drive(self, _):
        """The ego does what it was told, for a tenth of a second."""
        self.now_ns += 100_000_000
        if self.output is None:
            self.guardian.on_ego(self.make_ego(stamp_ns=self.now_ns), self.now_ns)
            return
        x_m, y_m, yaw_rad = self.output.trajectory.poses[1].tolist()
        self.guardian.on_ego(
            self.make_ego(
                stamp_ns=self.now_ns,
                x_m=x_m,
                y_m=y_m,
                yaw_rad=yaw_rad,
                speed=float(self.output.speeds_mps[1]),
                yaw_rate_radps=float(self.output.yaw_rates_radps[1]),
            ),
            self.now_ns,
        )

    def sound(self, speed=5.0, accel=0.0, curvature=0.0, age_s=0.05):
        return self.make_plan(
            stamp_ns=self.now_ns - round(age_s * 1e9),
            start=self.place(),
            speed=speed,
            accel=accel,
            curvature=curvature,
        )

    def plan(self, value):
        self.guardian.on_plan_text(self.sound(*value).to_json(), self.now_ns)

    def noisy(self, value):
        plan = self.sound()
        poses = plan.trajectory.poses.copy()
        poses.ravel()[[3, 4, 5, 12, 13, 29]] += np.array(value)
        if np.isfinite(poses).all():
            track = replace(plan.trajectory, poses=poses)
            text = replace(plan, trajectory=track).to_json()
        else:
            text = json.dumps({'schema_version': 1, 'trajectory': {'poses': poses.tolist()}})
        self.guardian.on_plan_text(text, self.now_ns)

    def broken(self, value):
        raw = json.loads(self.sound().to_json())
        raw[value[0]] = value[1]
        self.guardian.on_plan_text(json.dumps(raw), self.now_ns)

    def text(self, value):
        self.guardian.on_plan_text(value, self.now_ns)

    def odometry(self, value):
        self.now_ns += 20_000_000
        x_m, y_m, yaw_rad, speed, accel, rate, wheel = value
        self.guardian.on_ego(
            self.make_ego(
                stamp_ns=self.now_ns,
                x_m=x_m,
                y_m=y_m,
                yaw_rad=yaw_rad,
                speed=speed,
                accel_mps2=accel,
                yaw_rate_radps=rate,
                steering_rad=wheel,
            ),
            self.now_ns,
        )

    def route(self, value):
        points = np.array(value, dtype=np.float64).reshape(-1, 2)
        self.guardian.on_route(Route(self.now_ns, 'odom', points))

    def wait(self, value):
        self.now_ns += round(value * 1e9)

    def jump(self, value):
        self.now_ns += round(value * 1e9)

    def enable(self, value):
        self.guardian.set_enabled(value)

    def reset(self, _):
        self.guardian.reset()


rides = st.lists(steps(), min_size=1, max_size=25)
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=60, deadline=None, suppress_health_check=quiet)
@given(ride=rides)
def test_the_output_is_valid_whatever_comes_in(ride, vehicle, complain, make_plan, make_ego):
    played = Ride(vehicle, complain, make_plan, make_ego)
    for kind, value in ride:
        played.play(kind, value)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=quiet)
@given(ride=rides)
def test_the_output_is_valid_whatever_comes_in_at_length(
    ride, vehicle, complain, make_plan, make_ego
):
    played = Ride(vehicle, complain, make_plan, make_ego)
    for kind, value in ride:
        played.play(kind, value)


def test_rides_do_drive(vehicle, complain, make_plan, make_ego):
    """The fuzzer's own steps reach every state, else it would prove little."""
    played, seen = Ride(vehicle, complain, make_plan, make_ego), set()
    script = [
        ('drive', True),
        ('plan', (8.0, 0.0, 0.0, 0.05)),
        ('route', [(-50, 0), (90, 0)]),
        ('drive', True),
        ('wait', 0.9),
        ('drive', True),
        ('enable', False),
        ('enable', True),
        ('plan', (8.0, 0.0, 0.01, 0.05)),
        ('jump', -3.0),
    ]
    for kind, value in script:
        played.play(kind, value)
        seen.add(played.output.state)
    assert seen == {OK, DEGRADED, FALLBACK, FAULT, STANDBY}


def test_a_plan_survives_its_text(make_plan):
    plan = make_plan(curvature=0.01, history=((-1.0, 0.0, 0.0),), reasoning='x', agreement=True)
    back = Plan.from_json(plan.to_json())
    assert back.trajectory.poses.tolist() == plan.trajectory.poses.tolist()
    blank = Trajectory(0, 'odom', np.zeros(2), np.zeros((2, 3)))
    assert replace(back, trajectory=blank) is not None
    assert replace(back, trajectory=plan.trajectory) == replace(plan, trajectory=plan.trajectory)


def test_parameters_have_the_documented_defaults():
    parameters = GuardianParameters()
    assert (parameters.plan_fresh_s, parameters.plan_max_age_s) == (0.35, 1.0)
