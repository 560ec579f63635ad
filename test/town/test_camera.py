"""The drawn pictures against a ray caster, hand-worked projections and mirrored worlds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from spanvla_ros.model.config import TOWN_CAMERAS, CameraSpec
from spanvla_ros.town.camera import Renderer, camera_matrix, project
from spanvla_ros.town.elements import (
    BRAKE,
    MARKING,
    OTHER,
    PEDESTRIAN,
    RED,
    ROAD,
    VEHICLE,
    Box,
    GroundPolygon,
    Patch,
    Tint,
)
from spanvla_ros.town.polygons import clip, pack_ground

FRONT = TOWN_CAMERAS[0]
SQUARE = CameraSpec('square', 100, 100, 90.0, 0.0, 0.0, 1.0, 0.0)


def rays(camera: CameraSpec, pose):
    """Origin and direction, in the world, of the ray through the middle of each pixel."""
    focal = camera.width_px / 2 / math.tan(math.radians(camera.fov_deg / 2))
    v, u = np.mgrid[: camera.height_px, : camera.width_px]
    right = (u - (camera.width_px - 1) / 2) / focal
    down = (v - (camera.height_px - 1) / 2) / focal
    local = np.stack([np.ones_like(right), -right, -down], axis=-1)

    def turned(vectors, yaw):
        c, s = math.cos(yaw), math.sin(yaw)
        return vectors @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]).T

    p = math.radians(camera.pitch_deg)
    tilt = np.array([[math.cos(p), 0, math.sin(p)], [0, 1, 0], [-math.sin(p), 0, math.cos(p)]])
    directions = turned(local @ tilt.T, math.radians(camera.yaw_deg) + pose[2])
    mount = turned(np.array([camera.x_m, camera.y_m, 0.0]), pose[2])
    return np.array([pose[0], pose[1], camera.z_m]) + mount, directions


def inside(polygon, x, y):
    """Even-odd rule."""
    odd = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay != by:
            odd ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return odd


def cast(camera, ground, boxes, pose):
    """Class id of what each ray meets first."""
    eye, direction = rays(camera, pose)
    classes = np.full(direction.shape[:2], OTHER)
    nearest = np.full(direction.shape[:2], np.inf)
    with np.errstate(divide='ignore', invalid='ignore'):
        reach = np.where(direction[..., 2] < 0, -eye[2] / direction[..., 2], np.inf)
        x, y = eye[0] + reach * direction[..., 0], eye[1] + reach * direction[..., 1]
        for area in ground:
            hit = np.isfinite(reach) & inside(area.points, x, y)
            classes[hit], nearest[hit] = area.class_id, reach[hit]
        for box in boxes:
            c, s = math.cos(box.yaw_rad), math.sin(box.yaw_rad)
            turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
            middle = np.array([box.x_m, box.y_m, box.base_m + box.height_m / 2])
            o, d = turn @ (eye - middle), direction @ turn.T
            half = np.array([box.length_m, box.width_m, box.height_m]) / 2
            t = np.stack([(-half - o) / d, (half - o) / d])
            enter, leave = t.min(axis=0), t.max(axis=0).min(axis=-1)
            at, axis = enter.max(axis=-1), enter.argmax(axis=-1)
            hit = (at < leave) & (at > 0) & (at < nearest)
            classes[hit], nearest[hit] = box.class_id, at[hit]
            local = o + at[..., None] * d
            for patch in box.patches:
                face_axis, sign = {
                    'rear': (0, -1),
                    'front': (0, 1),
                    'left': (1, 1),
                    'right': (1, -1),
                }[patch.face]
                along = local[..., 1 - face_axis]
                height = local[..., 2] + middle[2]
                on = hit & (axis == face_axis) & (np.sign(local[..., face_axis]) == sign)
                on &= (along > patch.left_m) & (along < patch.right_m)
                on &= (height > patch.bottom_m) & (height < patch.top_m)
                classes[on] = patch.class_id
    return classes


def settled(classes):
    """Pixels whose neighbours, two each way, are all of one class: no edge runs near them."""
    windows = sliding_window_view(np.pad(classes, 2, constant_values=-1), (5, 5))
    return (windows == classes[..., None, None]).all(axis=(2, 3))


def rectangle(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)


def a_town(rng):
    """A winding road band with a square on it, boxes that do not run into each other."""
    x = np.arange(-20.0, 80.0, 4.0)
    bend = rng.uniform(-6, 6) * np.sin(x / rng.uniform(12, 30))
    upper, lower = np.column_stack([x, bend + 4]), np.column_stack([x, bend - 3])
    ground = (
        GroundPolygon(np.concatenate([upper, lower[::-1]]), (80, 80, 80), ROAD),
        GroundPolygon(rectangle(8, -2, 14, 1), (240, 240, 240), MARKING),
    )
    boxes = []
    for x_m in np.arange(-12.0, 60.0, 9.0):
        for y_m in (-9.0, 0.0, 9.0):
            if (abs(x_m) < 5 and y_m == 0) or rng.random() < 0.4:
                continue
            height, base = rng.uniform(0.5, 3.0), rng.choice([0.0, 0.0, 2.0])
            patch = Patch(
                str(rng.choice(['rear', 'front', 'left', 'right'])),
                -rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.0), base + 0.1, base + 0.8 * height,
                (250, 0, 0), BRAKE, True,
            )  # fmt: skip
            boxes.append(
                Box(
                    x_m + rng.uniform(-1, 1), y_m, rng.uniform(-3, 3),
                    rng.uniform(2.2, 5.0), rng.uniform(2.2, 4.0), height, (60, 60, 200),
                    int(rng.choice([VEHICLE, PEDESTRIAN])), base, (patch,),
                )
            )  # fmt: skip
    return ground, tuple(boxes)


@pytest.mark.parametrize('seed', range(8))
def test_each_pixel_shows_what_its_ray_meets_first(seed):
    rng = np.random.default_rng(seed)
    ground, boxes = a_town(rng)
    cameras = [
        replace(FRONT, pitch_deg=p, yaw_deg=y)
        for p, y in ((0.0, 0.0), (6.0, 55.0), (-4.0, -100.0))
    ]
    pose = (rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-0.3, 0.3))
    drawn = Renderer(cameras).draw_classes(ground, boxes, pose)
    for picture, camera in zip(drawn, cameras, strict=True):
        truth = cast(camera, ground, boxes, pose)
        sure = settled(truth)
        assert sure.mean() > 0.5
        assert (picture == truth)[sure].mean() > 0.9995


def test_a_picture_and_its_classes_come_from_the_same_geometry():
    ground, boxes = a_town(np.random.default_rng(3))
    renderer = Renderer(TOWN_CAMERAS)
    images, classes = renderer.draw_both(ground, boxes, Tint(), (0, 0, 0))
    np.testing.assert_array_equal(images, renderer.draw(ground, boxes, Tint(), (0, 0, 0)))
    np.testing.assert_array_equal(classes, renderer.draw_classes(ground, boxes, (0, 0, 0)))


def test_a_square_wall_covers_the_pixels_worked_out_by_hand():
    # 90 degrees over 100 pixels: focal length 50. The wall's near face is 10 m ahead, 4 m wide
    # and reaches from the ground, 1 m below the eye, to 1 m above it.
    wall = Box(11.0, 0.0, 0.0, 2.0, 4.0, 2.0, (10, 20, 200), VEHICLE)
    picture = Renderer([SQUARE]).draw_classes((), (wall,), (0, 0, 0))[0]
    rows, columns = np.nonzero(picture == VEHICLE)
    # Columns 49.5 -+ 10, rows 49.5 -+ 5; OpenCV fills every pixel an edge touches.
    assert columns.min() == pytest.approx(39.5, abs=0.5)
    assert columns.max() == pytest.approx(59.5, abs=0.5)
    assert rows.min() == pytest.approx(44.5, abs=0.5)
    assert rows.max() == pytest.approx(54.5, abs=0.5)


def test_points_project_to_pixels_worked_out_by_hand():
    uv, in_front = project([[10.0, 2.0, 0.0], [10.0, 0.0, 1.0], [-5.0, 0.0, 0.0]], SQUARE)
    np.testing.assert_allclose(uv[:2], [[39.5, 54.5], [49.5, 49.5]])
    assert in_front.tolist() == [True, True, False]
    left = replace(SQUARE, yaw_deg=90.0, x_m=1.0)
    uv, in_front = project([[1.0, 10.0]], left)
    np.testing.assert_allclose(uv, [[49.5, 54.5]])
    down = replace(SQUARE, pitch_deg=45.0)
    uv, _ = project([[1.0, 0.0]], down)
    np.testing.assert_allclose(uv, [[49.5, 49.5]], atol=1e-12)


@given(
    st.floats(1, 60), st.floats(-20, 20), st.floats(0, 5), st.floats(-30, 30), st.floats(-20, 20)
)
def test_projection_equals_the_intrinsic_matrix_times_the_ray(x, y, z, yaw_deg, pitch_deg):
    camera = replace(FRONT, yaw_deg=yaw_deg, pitch_deg=pitch_deg)
    yaw, pitch = math.radians(yaw_deg), math.radians(pitch_deg)
    about_z = np.array(
        [[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]]
    )
    about_y = np.array(
        [[math.cos(pitch), 0, math.sin(pitch)], [0, 1, 0], [-math.sin(pitch), 0, math.cos(pitch)]]
    )
    forward, left, up = (about_z @ about_y).T @ (
        np.array([x, y, z]) - [camera.x_m, camera.y_m, camera.z_m]
    )
    uv, in_front = project([[x, y, z]], camera)
    if in_front[0]:
        homogeneous = camera_matrix(camera) @ [-left, -up, forward]
        np.testing.assert_allclose(uv[0], homogeneous[:2] / homogeneous[2], atol=1e-6)
    assert in_front[0] == (forward >= 0.3) or math.isclose(forward, 0.3, abs_tol=1e-9)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000))
def test_a_mirrored_world_gives_the_mirrored_picture(seed):
    rng = np.random.default_rng(seed)
    ground, boxes = a_town(rng)
    swap = {'left': 'right', 'right': 'left', 'rear': 'rear', 'front': 'front'}

    def mirrored_patch(p):
        if p.face in ('left', 'right'):
            return replace(p, face=swap[p.face])
        return replace(p, left_m=-p.right_m, right_m=-p.left_m)

    other_ground = tuple(replace(g, points=g.points * [1, -1]) for g in ground)
    other_boxes = tuple(
        replace(b, y_m=-b.y_m, yaw_rad=-b.yaw_rad, patches=tuple(map(mirrored_patch, b.patches)))
        for b in boxes
    )
    renderer = Renderer(TOWN_CAMERAS)
    pictures = renderer.draw(ground, boxes, Tint(), (0.5, 0.3, 0.1)).astype(int)
    mirror = renderer.draw(other_ground, other_boxes, Tint(), (0.5, -0.3, -0.1)).astype(int)
    flipped = mirror[[0, 2, 1], :, ::-1]
    # OpenCV rounds edges to the pixel grid one way, so a rim may differ, areas may not.
    assert (np.abs(pictures - flipped).max(axis=-1) > 8).mean() < 0.02


def test_ground_under_and_behind_the_camera_is_cut_at_the_near_plane():
    everywhere = GroundPolygon(rectangle(-500, -500, 500, 500), (80, 80, 80), ROAD)
    classes = Renderer(TOWN_CAMERAS).draw_classes((everywhere,), (), (3.0, -2.0, 1.0))
    assert (classes[:, 60:] == ROAD).all()
    assert (classes[:, :55] == OTHER).all()


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12))
def test_clipping_keeps_the_right_area_of_convex_polygons(corners):
    shapely = pytest.importorskip('shapely')
    hull = shapely.MultiPoint(corners).convex_hull
    if hull.geom_type != 'Polygon' or hull.area < 1e-3:
        return
    points = np.array(hull.exterior.coords[:-1])
    kept = clip(pack_ground([GroundPolygon(points, (0, 0, 0), ROAD)]), (1.0, 0.5, 0.0), -0.7)
    half_plane = shapely.Polygon([(-99.3, 200), (100.7, -200), (400, -200), (400, 200)])
    truth = hull.intersection(half_plane).area
    area = shapely.Polygon(kept.points[:, :2]).area if len(kept.points) >= 3 else 0.0
    assert area == pytest.approx(truth, abs=1e-6)


def test_a_concave_area_stays_concave():
    # A U open to the camera: its inside must show the bare ground.
    u_shape = np.array(
        [[5, -6], [30, -6], [30, 6], [5, 6], [5, 4], [25, 4], [25, -4], [5, -4]], dtype=float
    )
    ground = (GroundPolygon(u_shape, (80, 80, 80), ROAD),)
    classes = Renderer([FRONT]).draw_classes(ground, (), (0, 0, 0))[0]
    (inner, _) = project([[12.0, 0.0]], FRONT)
    (arm, _) = project([[27.0, 0.0]], FRONT)
    assert classes[round(inner[0, 1]), round(inner[0, 0])] == OTHER
    assert classes[round(arm[0, 1]), round(arm[0, 0])] == ROAD


def test_lit_lamps_keep_their_colour_in_the_dark():
    lamp = Patch('rear', -1.0, 1.0, 0.2, 1.8, (255, 20, 10), RED, lit=True)
    wall = Box(11.0, 0.0, 0.0, 2.0, 4.0, 2.0, (100, 100, 100), OTHER, patches=(lamp,))
    picture = Renderer([SQUARE]).draw((), (wall,), Tint(gain=0.5), (0, 0, 0))[0]
    assert picture[49, 49].tolist() == [255, 20, 10]
    assert picture[49, 40].tolist() == [50, 50, 50]
    assert picture[0, 0].tolist() == [80, 95, 110]
    assert picture[99, 0].tolist() == [45, 62, 45]


def test_a_long_wall_beside_the_road_does_not_cover_the_car_before_it():
    # By the distance of their centres the car would be painted first and vanish.
    wall = Box(20.0, 6.0, 0.0, 40.0, 2.0, 5.0, (90, 90, 90), OTHER)
    car = Box(30.0, 3.5, 0.0, 4.4, 1.8, 1.5, (200, 30, 30), VEHICLE)
    for boxes in ((wall, car), (car, wall)):
        classes = Renderer([FRONT]).draw_classes((), boxes, (0, 0, 0))[0]
        assert (classes == VEHICLE).sum() > 40


def test_a_changed_list_of_ground_is_seen():
    renderer = Renderer([FRONT])
    ground = [GroundPolygon(rectangle(5, -5, 30, 5), (80, 80, 80), ROAD)]
    first = renderer.draw_classes(ground, (), (0, 0, 0))
    ground[0] = replace(ground[0], class_id=MARKING)
    second = renderer.draw_classes(ground, (), (0, 0, 0))
    assert (first == ROAD).sum() == (second == MARKING).sum() > 0


def test_cameras_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match='one size'):
        Renderer([FRONT, SQUARE])
