"""The stand-in for CARLA: its messages against the bridge's contract, and a drive through them.

Messages are rosbags' classes, the control is carla_msgs' own definition, both through their wire
format, so that what is shown here holds for real messages.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from foreign_messages import empty, round_trip

from spanvla_ros.messages import read_image, read_odometry
from spanvla_ros.model.config import TOWN_CAMERAS, ModelConfig
from spanvla_ros.town.bodies import Paint
from spanvla_ros.town.carla_routes import Driver, drive, main
from spanvla_ros.town.carla_stand_in import StandIn
from spanvla_ros.town.driver import BlindRouteFollower
from spanvla_ros.town.opendrive import load_opendrive
from spanvla_ros.town.opendrive_ground import paint_map
from spanvla_ros.town.opendrive_routes import (
    LaneRef,
    draw_route,
    driving_lanes,
    route_world,
    successors,
)
from spanvla_ros.types import SpanvlaError, Vehicle

TOWN01 = Path(__file__).resolve().parents[3] / 'shared' / 'real' / 'Town01.xodr'
LANE = """<lane id="{0}" type="driving"><link><predecessor id="{0}"/><successor id="{0}"/></link>
<width sOffset="0" a="3.6" b="0" c="0" d="0"/></lane>"""
ROAD = """<road name="{0}" length="{1}" id="{0}" junction="-1"><link>{2}{3}</link>
<planView><geometry s="0" x="{4}" y="{5}" hdg="{6}" length="{1}">{7}</geometry></planView>
<lanes><laneSection s="0"><left>{8}</left><center><lane id="0" type="none">
<roadMark sOffset="0" type="broken" color="yellow"/></lane></center><right>{9}</right>
</laneSection></lanes></road>"""


def link(tag, road, contact):
    return f'<{tag} elementType="road" elementId="{road}" contactPoint="{contact}"/>'


@pytest.fixture(scope='module')
def three_roads(tmp_path_factory):
    """60 m straight on, a left bend of 40 m radius through a quarter circle, 120 m straight."""
    lanes = (LANE.format(1), LANE.format(-1))
    quarter = 40.0 * math.pi / 2
    roads = (
        ROAD.format(1, 60.0, '', link('successor', 2, 'start'), 0, 0, 0, '<line/>', *lanes),
        ROAD.format(2, quarter, link('predecessor', 1, 'end'), link('successor', 3, 'start'),
                    60, 0, 0, '<arc curvature="0.025"/>', *lanes),
        ROAD.format(3, 120.0, link('predecessor', 2, 'end'), '', 100, 40, math.pi / 2, '<line/>',
                    *lanes),
    )  # fmt: skip
    path = tmp_path_factory.mktemp('map') / 'bend.xodr'
    path.write_text(f'<OpenDRIVE>{"".join(roads)}</OpenDRIVE>')
    return path


@pytest.fixture(scope='module')
def found(three_roads):
    return load_opendrive(three_roads)


def test_lanes_lead_on_in_driving_direction(found):
    assert len(driving_lanes(found)) == 6
    assert successors(found, LaneRef('1', 0, -1, True)) == [LaneRef('2', 0, -1, True)]
    assert successors(found, LaneRef('3', 0, 1, False)) == [LaneRef('2', 0, 1, False)]
    assert successors(found, LaneRef('3', 0, -1, True)) == []


def test_a_route_keeps_to_the_right_of_its_road(found):
    points, limit_mps = draw_route(found, 1, 200.0)
    assert limit_mps == 11.0
    step = np.hypot(*np.diff(points, axis=0).T)
    assert step.max() < 1.2
    # The only ways of 200 m are the whole road, one way or the other.
    starts = {(0.0, -1.8), (98.2, 160.0)}
    assert any(np.allclose(points[0], start, atol=1e-6) for start in starts)
    with pytest.raises(SpanvlaError, match='no lane leads 5000 m'):
        draw_route(found, 1, 5000.0)


@pytest.fixture
def stand_in(found):
    world = route_world(found, paint_map(found, Paint()), 3, 60.0, Vehicle())
    world.cars.clear()
    return StandIn(world, TOWN_CAMERAS, empty)


def by_name(topics):
    return {topic.name: round_trip(topic.message) for topic in topics}


def prepared(topics):
    for topic in topics:
        if hasattr(topic.message, 'pose') and hasattr(topic.message.pose, 'covariance'):
            topic.message.pose.covariance = topic.message.twist.covariance = np.zeros(36)
    return topics


def test_messages_are_those_of_the_bridge(stand_in):
    (waypoints,) = by_name(stand_in.latched()).values()
    assert waypoints.header.frame_id == 'map'
    messages = by_name(prepared(stand_in.tick()))
    odometry = messages['/carla/hero/odometry']
    assert (odometry.header.frame_id, odometry.child_frame_id) == ('map', 'hero')
    # The vehicle's origin is its middle, the world's ego is the rear axle.
    ego, origin = stand_in.world.ego, read_odometry(odometry)
    apart = math.hypot(origin.x_m - ego.x_m, origin.y_m - ego.y_m)
    assert apart == pytest.approx(Vehicle().rear_axle_to_center_m)
    clock = messages['/clock'].clock
    assert (clock.sec, clock.nanosec) == (10, 50_000_000)
    image = messages['/carla/hero/front/image']
    assert image.encoding == 'bgra8'
    assert len(image.data) == image.height * image.step == 112 * 224 * 4
    # Sky above, blue being the strongest of its colours.
    assert read_image(image, 'front').image[2, 100].argmax() == 2
    info = messages['/carla/hero/front/camera_info']
    assert info.k[0] == pytest.approx(224 / (2 * math.tan(math.radians(30.0))))
    assert (info.k[2], info.k[5]) == (112.0, 56.0)
    # Pictures come with every other tick.
    assert '/carla/hero/front/image' not in by_name(prepared(stand_in.tick()))


@pytest.mark.parametrize(('steer', 'side'), [(0.1, -1.0), (-0.1, 1.0)])
def test_a_positive_steer_turns_right(stand_in, steer, side):
    control = empty('carla_msgs/msg/CarlaEgoVehicleControl')
    control.throttle, control.steer = 1.0, steer
    yaw = stand_in.world.ego.yaw_rad
    for _ in range(60):
        stand_in.apply_control(control)
        stand_in.tick()
    assert math.remainder(stand_in.world.ego.yaw_rad - yaw, math.tau) * side > 0.05


def test_a_route_is_driven_through_the_bridges_messages(stand_in):
    def make_control():
        return empty('carla_msgs/msg/CarlaEgoVehicleControl')

    driver = Driver(BlindRouteFollower(), ModelConfig(), stand_in, make_control)
    result = drive(stand_in, driver)
    assert result.reached_goal
    assert result.completion == 1.0
    assert result.offroad_m == 0.0
    assert result.states['OK'] > 100


def test_a_wheel_connected_the_wrong_way_leaves_the_lane(stand_in):
    """What the drive above shows can fail: the same ticks, the sign of the steering turned."""
    driver = Driver(
        BlindRouteFollower(),
        ModelConfig(),
        stand_in,
        lambda: empty('carla_msgs/msg/CarlaEgoVehicleControl'),
    )
    topics = prepared(stand_in.latched())
    for _ in range(240):
        control = driver.control([*topics, *prepared(stand_in.tick())])
        control.steer = -control.steer
        stand_in.apply_control(control)
        topics = []
        if abs(stand_in.world.ego_d_m) > 1.5:
            return
    pytest.fail('still in its lane')


@pytest.mark.slow
def test_a_driver_without_eyes_hits_the_car_that_stops(three_roads, tmp_path, capsys):
    words = [str(three_roads), '--driver', 'blind', '--routes', '1', '--metres', '100']
    assert main([*words, '--out', str(tmp_path)]) == 0
    assert 'hit car_lead' in capsys.readouterr().out
    assert 'not CARLA' in (tmp_path / 'summary.json').read_text()
    assert main([str(tmp_path / 'summary.json'), '--out', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_every_lane_of_town01_leads_on():
    if not TOWN01.is_file():
        pytest.skip('../shared is not here')
    found = load_opendrive(TOWN01)
    lanes = driving_lanes(found)
    assert len(lanes) > 50
    for lane in lanes:
        ways = successors(found, lane)
        assert ways, lane
        for way in ways:
            here = found.roads[lane.road_id]
            there = found.roads[way.road_id]
            s = [here.length_m if lane.forward else 0.0]
            end = here.center(here.sections[lane.section], lane.number, np.array(s))
            s = [0.0 if way.forward else there.length_m]
            start = there.center(there.sections[way.section], way.number, np.array(s))
            assert np.hypot(*(end - start)[0]) < 0.5, (lane, way)
