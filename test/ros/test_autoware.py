"""Autoware's adapters with classes made by rosbags, on a stand-in node that keeps messages."""

import pytest
from foreign_messages import Desk, empty, install, round_trip
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Bool

from spanvla_ros.ros.autoware import AutowareTrajectory
from spanvla_ros.ros.autoware_node import AutowareInputs
from spanvla_ros.safety.fallback import hard_stop
from spanvla_ros.safety.state import GuardianOutput
from spanvla_ros.types import EgoState, SpanvlaError, Vehicle

STAMP_NS = 1_700_000_000_123_456_789
ALL = ('autoware_planning_msgs', 'autoware_internal_planning_msgs', 'autoware_adapi_v1_msgs')
PROFILE = QoSProfile(depth=1)


@pytest.fixture
def output():
    motion = hard_stop(EgoState(STAMP_NS, 3.0, -4.0, 3.0, 9.0, 0.0, 0.4), 'map', Vehicle())
    return GuardianOutput(
        motion.trajectory,
        motion.speeds_mps,
        motion.accels_mps2,
        motion.yaw_rates_radps,
        'FALLBACK',
        ('no_plan', 'hard_stop'),
        0.0,
    )


def test_the_guardians_stop_in_autowares_words(monkeypatch, output):
    install(monkeypatch, *ALL)
    desk = Desk(output_frame='map', autoware_generator='')
    AutowareTrajectory(desk, PROFILE).publish(output)
    assert list(desk.topics) == ['output/autoware_trajectory']
    back = round_trip(desk.sent[0])
    assert back.header.frame_id == 'map'
    assert back.header.stamp.sec == 1_700_000_000
    speeds = [point.longitudinal_velocity_mps for point in back.points]
    assert speeds == pytest.approx(output.speeds_mps.tolist(), rel=1e-6)
    assert back.points[0].acceleration_mps2 == pytest.approx(-7.0)
    assert speeds[-1] == 0.0


def test_candidates_come_beside_it_when_named(monkeypatch, output):
    install(monkeypatch, *ALL)
    numbers = []
    for name in ('spanvla', 'spanvla', 'other'):
        desk = Desk(output_frame='map', autoware_generator=name)
        AutowareTrajectory(desk, PROFILE).publish(output)
        trajectory, candidates = (round_trip(message) for message in desk.sent)
        (candidate,) = candidates.candidate_trajectories
        assert candidate.points == trajectory.points
        assert candidates.generator_info[0].generator_name.data == name
        numbers.append(candidate.generator_id.uuid.tobytes())
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.parametrize(
    ('frame', 'generator', 'installed', 'words'),
    [
        ('odom', '', ALL, 'autoware plans in map, output_frame is odom'),
        ('map', '', (), 'guardian: autoware needs autoware_planning_msgs'),
        ('map', 'spanvla', ALL[:1], 'autoware_generator needs autoware_internal_planning_msgs'),
    ],
)
def test_what_is_missing_is_one_sentence(monkeypatch, frame, generator, installed, words):
    install(monkeypatch, *installed)
    with pytest.raises(SpanvlaError, match=words):
        AutowareTrajectory(Desk(output_frame=frame, autoware_generator=generator), PROFILE)


@pytest.fixture
def desk(monkeypatch):
    install(monkeypatch, *ALL)
    desk = Desk()
    desk.inputs = AutowareInputs(desk)
    return desk


def path(xs, frame_id='map'):
    message = empty('autoware_planning_msgs/msg/Path')
    message.header.frame_id, message.header.stamp.sec = frame_id, 77
    for x in xs:
        point = empty('autoware_planning_msgs/msg/PathPoint')
        point.pose.position.x = float(x)
        message.points.append(point)
    return message


def test_path_and_goal_become_the_route(desk):
    route = empty('autoware_planning_msgs/msg/LaneletRoute')
    route.header.frame_id, route.goal_pose.position.x = 'map', 7.0
    desk.callbacks['input/lanelet_route'](route)
    assert desk.sent == []
    desk.callbacks['input/autoware_path'](path(range(0, 20, 2)))
    (message,) = desk.sent
    assert isinstance(message, PathMessage)
    assert [pose.pose.position.x for pose in message.poses] == [0.0, 2.0, 4.0, 6.0, 7.0]
    assert (message.header.frame_id, message.header.stamp.sec) == ('map', 77)
    for name in ('input/route', 'input/lanelet_route'):
        assert desk.topics[name][1].durability == DurabilityPolicy.TRANSIENT_LOCAL


def test_a_path_in_another_frame_is_refused(desk):
    desk.callbacks['input/autoware_path'](path([0, 2], 'odom'))
    assert desk.sent == []
    assert 'is not' in desk.inputs.meters['autoware_path'].status(1_000_000_000).message


def test_operation_mode_becomes_engaged(desk):
    mode = empty('autoware_adapi_v1_msgs/msg/OperationModeState')
    for number, control in ((1, False), (2, True), (4, True)):
        mode.mode, mode.is_autoware_control_enabled = number, control
        desk.callbacks['input/operation_mode'](mode)
    assert desk.sent == [Bool(data=False), Bool(data=True), Bool(data=False)]


def test_a_maneuver_puts_the_guardian_in_standby_until_it_is_over(desk):
    state = empty('autoware_adapi_v1_msgs/msg/MrmState')
    # The first `normal` enables nothing: a guardian may have been started in standby.
    for number in (1, 1, 2, 2, 3, 1, 1):
        state.state = number
        desk.callbacks['input/mrm_state'](state)
    assert [name for name, _ in desk.calls] == ['guardian/set_enabled'] * 2
    assert [request.data for _, request in desk.calls] == [False, True]
    state.state = 77
    desk.callbacks['input/mrm_state'](state)
    assert len(desk.calls) == 2
    assert '77' in desk.inputs.meters['mrm_state'].status(1_000_000_000).message


def test_standby_is_asked_for_again_while_the_maneuver_runs(desk, monkeypatch):
    state = empty('autoware_adapi_v1_msgs/msg/MrmState')
    for number, at_s in ((2, 10.0), (2, 10.9), (3, 11.0), (1, 11.1), (1, 20.0)):
        state.state, now_ns = number, round(at_s * 1e9)
        monkeypatch.setattr(desk.inputs, '_now_ns', lambda now_ns=now_ns: now_ns)
        desk.callbacks['input/mrm_state'](state)
    assert [request.data for _, request in desk.calls] == [False, False, True]


def test_the_node_without_autoware_ends_with_a_sentence(launch):
    process = launch('autoware')
    process.wait(60.0)
    assert process.exit_status == 2
    assert 'autoware needs autoware_planning_msgs' in process.last_line()
