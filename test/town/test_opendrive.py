"""The OpenDRIVE reader against CARLA's own, by hand-worked shapes, and as drawn ground.

`shapes.json` holds what `carla.Map('shapes', text).get_waypoint_xodr(road, lane, s)` of the carla
wheel 0.9.16 says of `shapes.xodr` (ours): road, lane, s, x, y (turned to the right-handed side)
and lane width.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.bodies import Paint
from spanvla_ros.town.camera import Renderer, project
from spanvla_ros.town.elements import MARKING, OTHER, ROAD
from spanvla_ros.town.opendrive import Shape, _shape_poses, load_opendrive
from spanvla_ros.town.opendrive_ground import paint_map
from spanvla_ros.types import SpanvlaError

DATA = Path(__file__).resolve().parents[1] / 'data' / 'opendrive'
SHAPES = DATA / 'shapes.xodr'
TOWN01 = Path(__file__).resolve().parents[3] / 'shared' / 'real' / 'Town01.xodr'


@pytest.fixture(scope='module')
def shapes():
    return load_opendrive(SHAPES)


def test_lane_centres_are_those_of_carla(shapes):
    kinds = set()
    for road_id, lane, s_m, x_m, y_m, width_m in json.loads((DATA / 'shapes.json').read_text()):
        road = shapes.roads[str(road_id)]
        s = np.array([s_m])
        (place,) = road.center(road.sections[0], lane, s)
        assert math.hypot(*(place - [x_m, y_m])) < 0.01, (road_id, lane, s_m)
        inner, outer = road.edges(road.sections[0], lane, s)
        assert abs(outer[0] - inner[0]) == pytest.approx(width_m, abs=1e-4)
        kinds.add(road.shapes[0].kind)
    assert kinds == {'line', 'arc', 'spiral', 'poly3', 'paramPoly3'}


def test_town01_is_the_town01_of_carla():
    if not TOWN01.is_file():
        pytest.skip('../shared is not here')
    carla = pytest.importorskip('carla', reason='the carla wheel is not installed')
    found, truth = load_opendrive(TOWN01), carla.Map('Town01', TOWN01.read_text())
    worst_m, count = 0.0, 0
    for road in found.roads.values():
        for section in road.sections:
            s = np.linspace(section.start_m + 1e-3, section.end_m - 1e-3, 15)
            for lane in section.lanes:
                if lane.kind != 'driving':
                    continue
                for at, (x, y) in zip(s, road.center(section, lane.number, s), strict=True):
                    place = truth.get_waypoint_xodr(int(road.road_id), lane.number, float(at))
                    there = place.transform.location
                    worst_m = max(worst_m, math.hypot(there.x - x, -there.y - y))
                    count += 1
    assert count > 2000
    assert worst_m < 0.03


def test_an_arc_is_a_circle():
    shape = Shape('arc', 0.0, 50.0, 10.0, 20.0, 0.5, (0.02,))
    s = np.linspace(0.0, 50.0, 7)
    poses = _shape_poses(shape, s)
    middle = np.array([10.0 - math.sin(0.5) * 50.0, 20.0 + math.cos(0.5) * 50.0])
    assert np.hypot(*(poses[:, :2] - middle).T) == pytest.approx(np.full(7, 50.0))
    assert poses[:, 2] == pytest.approx(0.5 + 0.02 * s)


def test_a_spiral_turns_by_the_integral_of_its_curvature():
    shape = Shape('spiral', 0.0, 80.0, 0.0, 0.0, 0.0, (-0.01, 0.05))
    fine = np.linspace(0.0, 80.0, 200_001)
    yaw = -0.01 * fine + 0.5 * (0.06 / 80.0) * fine**2
    middle = 0.5 * (yaw[1:] + yaw[:-1])
    step = 80.0 / 200_000
    ((x, y, turned),) = _shape_poses(shape, np.array([80.0]))
    assert x == pytest.approx(np.cos(middle).sum() * step, abs=1e-5)
    assert y == pytest.approx(np.sin(middle).sum() * step, abs=1e-5)
    assert turned == pytest.approx(yaw[-1])


def test_speed_limits_come_in_metres_per_second(shapes):
    assert shapes.roads['1'].speed_mps == pytest.approx(50.0 / 3.6)


def test_traffic_keeps_right_unless_the_map_says_else(tmp_path):
    text = SHAPES.read_text()
    assert load_opendrive(SHAPES).roads['1'].drives_forward(-1)
    path = tmp_path / 'left.xodr'
    path.write_text(text.replace('<road name="1"', '<road rule="LHT" name="1"'))
    road = load_opendrive(path).roads['1']
    assert road.drives_forward(1)
    assert not road.drives_forward(-1)


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        ('<line/>', '<hypocycloid/>', 'road 1: <hypocycloid> is not read; known are line'),
        ('<line/>', '<line/><line/>', 'a geometry of 2 shapes'),
        ('curvature="0.03"', 'curvature="nan"', 'not a number'),
        ('curvature="0.03"', '', '<arc> without curvature'),
        ('<width ', '<border sOffset="0"/><width ', '<border> is not read'),
        ('unit="km/h"', 'unit="knots"', "a speed in 'knots'"),
        (
            '</planView>',
            '</planView><lateralProfile><superelevation s="0" a="0.1" b="0" c="0" d="0"/>'
            '</lateralProfile>',
            '<superelevation> is not read',
        ),
        ('<OpenDRIVE>', '<!DOCTYPE x><OpenDRIVE>', 'holds a DOCTYPE'),
        ('OpenDRIVE>', 'OpenSCENARIO>', 'not of OpenDRIVE'),
        ('</OpenDRIVE>', '', 'not XML'),
    ],
)
def test_what_is_not_known_is_refused_with_a_sentence(tmp_path, old, new, words):
    path = tmp_path / 'odd.xodr'
    path.write_text(SHAPES.read_text().replace(old, new))
    with pytest.raises(SpanvlaError, match=r'odd\.xodr: ') as refused:
        load_opendrive(path)
    assert words in str(refused.value)
    assert '\n' not in str(refused.value)


def test_a_map_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(SpanvlaError, match=r'absent\.xodr: .*name an \.xodr file'):
        load_opendrive(tmp_path / 'absent.xodr')
    (tmp_path / 'binary.xodr').write_bytes(b'\xff\xfe')
    with pytest.raises(SpanvlaError, match=r'binary\.xodr: not a text'):
        load_opendrive(tmp_path / 'binary.xodr')


def test_an_empty_map_is_refused(tmp_path):
    path = tmp_path / 'empty.xodr'
    path.write_text('<OpenDRIVE/>')
    with pytest.raises(SpanvlaError, match='no road'):
        load_opendrive(path)


def test_a_map_that_climbs_is_not_drawn(tmp_path):
    path = tmp_path / 'hill.xodr'
    hill = '</planView><elevationProfile><elevation s="0" a="0" b="0.05" c="0" d="0"/>'
    text = SHAPES.read_text().replace('</planView>', f'{hill}</elevationProfile>', 1)
    path.write_text(text)
    with pytest.raises(SpanvlaError, match='its roads climb'):
        paint_map(load_opendrive(path), Paint())


def test_the_drawn_ground_is_the_maps(shapes):
    """Classes of pixels whose place on road 1 is worked out by hand: a straight road at 0.3 rad,
    a lane of 3.25 m and 1 m of shoulder to the right, 3.5 m to the left, a broken line between.
    """
    camera = CameraSpec('front', 448, 224, 90.0, 0.0, 0.0, 1.5, 0.0, 10.0)
    here = (10.0 * math.cos(0.3), 10.0 * math.sin(0.3), 0.3)
    classes = Renderer([camera]).draw_classes(paint_map(shapes, Paint()), (), here)[0]

    def class_at(ahead_m, left_m):
        pixels, seen = project([[ahead_m, left_m]], camera)
        assert seen[0]
        u, v = np.rint(pixels[0]).astype(int)
        return classes[v, u]

    for ahead_m in (6.0, 10.0, 20.0):
        assert class_at(ahead_m, -1.6) == ROAD
        assert class_at(ahead_m, 1.7) == ROAD
        assert class_at(ahead_m, -3.9) == ROAD
        assert class_at(ahead_m, -3.25) == MARKING
        assert class_at(ahead_m, 3.5) == MARKING
        assert class_at(ahead_m, -5.5) == OTHER
        assert class_at(ahead_m, 4.5) == OTHER
    # Dashes of 3 m each 8 m, the first from 1 m on: 17 to 20 m along, and none from 20 to 25 m.
    assert class_at(18.5 - 10.0, 0.0) == MARKING
    assert class_at(22.5 - 10.0, 0.0) == ROAD
