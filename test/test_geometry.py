"""Plane geometry against properties and slow, obvious computations."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.geometry import (
    arc_length,
    box_corners,
    interpolate_poses,
    local_from_world,
    project_on_polyline,
    sample_polyline,
    world_from_local,
    wrap_angle,
)

METRES = st.floats(-1e4, 1e4)
ANGLES = st.floats(-20.0, 20.0)
POSES = st.tuples(METRES, METRES, ANGLES)
LINES = st.lists(
    st.tuples(st.floats(0.5, 20.0), st.floats(-1.0, 1.0)), min_size=2, max_size=8
).map(
    lambda moves: np.cumsum(
        [[0.0, 0.0]] + [[m * math.cos(a), m * math.sin(a)] for m, a in moves], axis=0
    )
)


@given(ANGLES)
def test_a_wrapped_angle_points_the_same_way(angle):
    wrapped = float(wrap_angle(angle))
    assert -math.pi <= wrapped < math.pi
    assert math.isclose(math.cos(wrapped), math.cos(angle), abs_tol=1e-9)
    assert math.isclose(math.sin(wrapped), math.sin(angle), abs_tol=1e-9)


@given(POSES, POSES)
def test_there_and_back_again(origin, pose):
    back = local_from_world(origin, world_from_local(origin, np.array(pose)))
    assert np.allclose(back[:2], pose[:2], atol=1e-6)
    assert abs(float(wrap_angle(back[2] - pose[2]))) < 1e-9


def test_a_frame_turned_left_by_hand():
    origin = (10.0, 5.0, math.pi / 2)
    world = world_from_local(origin, np.array([[2.0, 1.0, 0.1]]))
    assert np.allclose(world, [[9.0, 7.0, math.pi / 2 + 0.1]])


def test_yaw_is_interpolated_the_short_way_round():
    poses = np.array([[0.0, 0.0, math.pi - 0.1], [2.0, 4.0, -math.pi + 0.1]])
    middle = interpolate_poses([0.0, 1.0], poses, [0.5])
    assert np.allclose(middle[0, :2], [1.0, 2.0])
    assert abs(abs(middle[0, 2]) - math.pi) < 1e-9


@given(LINES, st.floats(0.0, 1.0))
def test_a_point_on_a_line_is_found_where_it_was_put(line, share):
    along = share * arc_length(line)[-1]
    point = sample_polyline(line, np.array([along]))
    where, offset = project_on_polyline(line, point)
    # A bent line may pass the same point twice; the distance is zero either way.
    assert abs(offset[0]) < 1e-6
    assert np.allclose(sample_polyline(line, where), point, atol=1e-6)


@given(LINES, st.tuples(st.floats(-30.0, 60.0), st.floats(-40.0, 40.0)))
def test_projection_is_the_nearest_of_many_points(line, point):
    where, offset = project_on_polyline(line, [point])
    dense = sample_polyline(line, np.linspace(0.0, arc_length(line)[-1], 4001))
    nearest = np.linalg.norm(dense - point, axis=1).min()
    assert abs(abs(offset[0]) - nearest) < 0.05
    reached = sample_polyline(line, where)[0]
    assert math.isclose(np.linalg.norm(reached - point), abs(offset[0]), abs_tol=1e-6)


def test_left_of_a_line_is_positive():
    _, offset = project_on_polyline([[0.0, 0.0], [10.0, 0.0]], [[5.0, 2.0], [5.0, -3.0]])
    assert np.allclose(offset, [2.0, -3.0])


def test_beyond_its_end_a_line_goes_straight_on():
    line = [[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]
    assert np.allclose(sample_polyline(line, [-2.0, 8.0]), [[-2.0, 0.0], [3.0, 5.0]])


@given(POSES, st.floats(0.1, 20.0), st.floats(0.1, 5.0))
def test_a_box_has_its_size_around_its_centre(pose, length, width):
    corners = box_corners(np.array(pose), length, width)
    assert np.allclose(corners.mean(axis=0), pose[:2], atol=1e-6)
    assert math.isclose(np.linalg.norm(corners[0] - corners[1]), length, rel_tol=1e-6)
    assert math.isclose(np.linalg.norm(corners[1] - corners[2]), width, rel_tol=1e-6)
    local = local_from_world(pose, corners)
    assert (np.sign(local) == [[1, 1], [-1, 1], [-1, -1], [1, -1]]).all()
