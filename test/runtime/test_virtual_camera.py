"""Lens, direction and place of a rig's cameras, against lenses and mounts worked out otherwise."""

import math
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spanvla_ros.messages import Intrinsics, MessageError
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.runtime.virtual_camera import (
    FrameTree,
    Mount,
    VirtualCamera,
    centered,
    check_rig,
    model_mount,
    read_rig,
)
from spanvla_ros.types import SpanvlaError

FRONT, LEFT, _ = TOWN_CAMERAS
FOCAL_PX = 112 / math.tan(math.radians(30))
RNG = np.random.default_rng(0)


def lens(width_px, height_px, focal_px, model='', coefficients=(), **center):
    center_x = center.get('center_x', (width_px - 1) / 2)
    center_y = center.get('center_y', (height_px - 1) / 2)
    return Intrinsics(
        width_px, height_px, focal_px, focal_px, center_x, center_y, model, coefficients
    )


def spot(width_px, height_px, pixel):
    """A picture with one bright dot, drawn to a fraction of a pixel."""
    picture = np.zeros((height_px, width_px, 3), np.uint8)
    place = tuple(round(float(value) * 16) for value in pixel)
    cv2.circle(picture, place, 5 * 16, (255, 255, 255), -1, cv2.LINE_AA, 4)
    return picture


def found(picture):
    bright = picture[:, :, 0].astype(float)
    v, u = np.indices(bright.shape)
    return np.array([(bright * u).sum(), (bright * v).sum()]) / bright.sum()


def test_a_picture_of_the_models_own_camera_is_untouched():
    picture = RNG.integers(0, 256, (112, 224, 3), dtype=np.uint8)
    view = VirtualCamera(FRONT, lens(224, 112, FOCAL_PX), model_mount(FRONT))
    assert view.fit(picture) is picture
    assert centered(picture, FRONT) is picture
    assert (view.seen, view.fault, view.warning) == (1.0, '', '')


@pytest.mark.parametrize('focal_px', [300.0, 500.0, 707.0])
@pytest.mark.parametrize('center_x', [380.0, 420.0])
def test_directions_land_where_the_models_camera_sees_them(focal_px, center_x):
    source = lens(800, 600, focal_px, center_x=center_x, center_y=290.0)
    view = VirtualCamera(FRONT, source)
    for angle_deg in (-15.0, 0.0, 12.0):
        slope = math.tan(math.radians(angle_deg))
        seen = view.fit(spot(800, 600, (center_x + focal_px * slope, 290.0)))
        np.testing.assert_allclose(found(seen), [111.5 + FOCAL_PX * slope, 55.5], atol=0.4)


@pytest.mark.parametrize(
    ('model', 'coefficients'),
    [
        ('plumb_bob', (-0.28, 0.07, 0.001, -0.0008, 0.0)),
        ('rational_polynomial', (0.4, -0.1, 0.0, 0.0, 0.001, 0.7, -0.05, 0.002)),
        ('equidistant', (-0.02, 0.004, -0.001, 0.0)),
    ],
)
def test_a_lens_is_undone(model, coefficients):
    source = lens(1280, 720, 640.0, model, coefficients)
    view = VirtualCamera(FRONT, source)
    for x, y in ((0.0, 0.0), (0.45, 0.2), (-0.5, -0.1)):
        r2 = x * x + y * y
        if model == 'equidistant':
            r = math.sqrt(r2)
            theta = math.atan(r)
            k = coefficients
            bent = theta * (1 + sum(k[i] * theta ** (2 * i + 2) for i in range(4)))
            scale = bent / r if r else 1.0
            u, v = x * scale, y * scale
        else:
            k1, k2, p1, p2, k3, k4, k5, k6 = (*coefficients, 0.0, 0.0, 0.0)[:8]
            radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (
                1 + k4 * r2 + k5 * r2**2 + k6 * r2**3
            )
            u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
            v = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        seen = view.fit(spot(1280, 720, (639.5 + 640 * u, 359.5 + 640 * v)))
        expected = [111.5 + FOCAL_PX * x, 55.5 + FOCAL_PX * y]
        np.testing.assert_allclose(found(seen), expected, atol=0.5)


@given(st.floats(-8.0, 8.0), st.floats(-6.0, 6.0), st.floats(-6.0, 6.0))
@settings(max_examples=25, deadline=None)
def test_a_turned_camera_is_turned_back(yaw_deg, pitch_deg, roll_deg):
    # A landmark in base_link, seen by the rig's camera as scipy says, must lie where the
    # model's camera, which stands at the same place, would see it.
    wanted = model_mount(LEFT)
    turn = Rotation.from_euler('ZYX', [55.0 + yaw_deg, pitch_deg, roll_deg], degrees=True)
    body_from_optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    mount = Mount(wanted.place_m, turn.as_matrix() @ body_from_optical)
    direction = Rotation.from_euler('ZYX', [58.0, 3.0, 0.0], degrees=True).apply([1.0, 0.0, 0.0])
    ray = mount.base_from_optical.T @ direction
    source = lens(1600, 900, 700.0)
    pixel = (799.5 + 700 * ray[0] / ray[2], 449.5 + 700 * ray[1] / ray[2])
    seen = VirtualCamera(LEFT, source, mount).fit(spot(1600, 900, pixel))
    target = wanted.base_from_optical.T @ direction
    expected = [
        111.5 + FOCAL_PX * target[0] / target[2],
        55.5 + FOCAL_PX * target[1] / target[2],
    ]
    np.testing.assert_allclose(found(seen), expected, atol=0.4)


def test_the_models_mount_looks_as_its_angles_say():
    mount = model_mount(LEFT)
    ahead, right, down = mount.base_from_optical[:, (2, 0, 1)].T
    yaw = math.radians(55.0)
    np.testing.assert_allclose(ahead, [math.cos(yaw), math.sin(yaw), 0.0], atol=1e-12)
    np.testing.assert_allclose(right, [math.sin(yaw), -math.cos(yaw), 0.0], atol=1e-12)
    np.testing.assert_allclose(down, [0.0, 0.0, -1.0], atol=1e-12)
    tilted = Mount.of_angles((0.0, 0.0, 1.5), 0.0, 10.0, 0.0)
    assert tilted.base_from_optical[2, 2] == pytest.approx(-math.sin(math.radians(10.0)))


def test_a_mismatch_names_the_fix():
    source = lens(1600, 900, 1400.0)
    straight = model_mount(FRONT)
    swapped = VirtualCamera(LEFT, source, straight)
    assert 'front_left sees' in swapped.fault
    assert 'turn it to yaw 55 and pitch 0 deg' in swapped.fault
    narrow = VirtualCamera(FRONT, lens(1600, 900, 1800.0), straight)
    assert not narrow.fault
    assert '60 deg of view' in narrow.warning
    aside = Mount(straight.place_m + np.array([0.0, 0.9, 0.0]), straight.base_from_optical)
    moved = VirtualCamera(FRONT, source, aside)
    assert moved.warning == (
        'front stands 0.9 m from where the model was trained; move it to x 1.5, y 0, z 1.5 m'
    )


def test_a_lens_that_turns_back_shows_nothing_twice():
    # This polynomial peaks at r = 1 / sqrt(3 * 0.5); what lies beyond must not be mirrored in.
    source = lens(400, 200, 100.0, 'plumb_bob', (-0.5, 0.0, 0.0, 0.0))
    view = VirtualCamera(replace(FRONT, fov_deg=150.0), source)
    assert view.seen < 1.0
    ramp = np.repeat(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    row = view.fit(ramp)[56, :, 0].astype(int)
    assert (np.diff(row) >= 0).all()


def test_unknown_lenses_and_other_sizes_are_refused():
    with pytest.raises(MessageError, match='rectify the pictures'):
        VirtualCamera(FRONT, lens(800, 600, 500.0, 'double_sphere', (0.1, 0.2)))
    with pytest.raises(MessageError, match='8x6 against 9x6 in camera_info'):
        VirtualCamera(FRONT, lens(9, 6, 10.0)).fit(np.zeros((6, 8, 3), np.uint8))


def test_what_the_source_does_not_see_is_filled_from_its_edge():
    view = VirtualCamera(FRONT, lens(1226, 370, 707.0))
    assert view.seen < 1.0
    fitted = view.fit(np.full((370, 1226, 3), 90, np.uint8))
    assert fitted.shape == (112, 224, 3)
    assert (fitted == 90).all()


@given(st.integers(2, 300), st.integers(2, 300), st.floats(20.0, 2000.0))
@settings(max_examples=40, deadline=None)
def test_any_size_and_focal_length_fits(width_px, height_px, focal_px):
    picture = np.full((height_px, width_px, 3), 33, np.uint8)
    for fitted in (
        centered(picture, FRONT),
        VirtualCamera(FRONT, lens(width_px, height_px, focal_px)).fit(picture),
    ):
        assert fitted.shape == (112, 224, 3)
        assert (fitted == 33).all()


def test_shrinking_takes_the_mean_and_not_single_pixels():
    # A fine checkerboard is grey from afar.
    board = ((np.indices((896, 1792)).sum(axis=0) % 2) * 255).astype(np.uint8)
    fitted = VirtualCamera(FRONT, lens(1792, 896, 8 * FOCAL_PX)).fit(
        board[:, :, None].repeat(3, 2)
    )
    assert np.abs(fitted.astype(int) - 127).max() <= 2


def transform(parent, child, place, quaternion_xyzw):
    x, y, z, w = quaternion_xyzw
    return SimpleNamespace(
        header=SimpleNamespace(frame_id=parent),
        child_frame_id=child,
        transform=SimpleNamespace(
            translation=SimpleNamespace(x=place[0], y=place[1], z=place[2]),
            rotation=SimpleNamespace(x=x, y=y, z=z, w=w),
        ),
    )


def test_a_chain_of_static_transforms_gives_the_mount():
    # As a driver publishes it: base_link -> camera (body axes) -> optical frame.
    turn = Rotation.from_euler('ZYX', [55.0, 0.0, 0.0], degrees=True)
    optical = Rotation.from_euler('ZYX', [-90.0, 0.0, -90.0], degrees=True)
    tree = FrameTree()
    identity = (0.0, 0.0, 0.0, 1.0)
    first = [transform('base_footprint', 'base_link', (0.0, 0.0, 0.3), identity)]
    second = [
        transform('/base_link', 'left', (1.5, 0.0, 1.5), turn.as_quat()),
        transform('left', 'left_optical', (0.0, 0.0, 0.0), optical.as_quat()),
        transform('base_link', 'broken', (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    ]
    for transforms in (first, second):
        tree.add(SimpleNamespace(transforms=transforms))
    mount, wanted = tree.mount('base_link', 'left_optical'), model_mount(LEFT)
    np.testing.assert_allclose(mount.place_m, wanted.place_m, atol=1e-12)
    np.testing.assert_allclose(mount.base_from_optical, wanted.base_from_optical, atol=1e-12)
    assert tree.mount('base_link', 'right_optical') is None
    assert tree.mount('base_link', 'broken') is None
    ring = [transform('a', 'b', (1.0, 0, 0), identity), transform('b', 'a', (1.0, 0, 0), identity)]
    tree.add(SimpleNamespace(transforms=ring))
    assert tree.mount('base_link', 'a') is None


def test_a_rig_file_gives_mounts_by_name(tmp_path):
    path = tmp_path / 'rig.yaml'
    path.write_text(
        'cameras:\n'
        '  front: {x_m: 1.5, y_m: 0, z_m: 1.5}\n'
        '  front_left: {x_m: 1.5, y_m: 0.0, z_m: 1.5, yaw_deg: 55}\n'
    )
    rig = read_rig(path)
    for camera in (FRONT, LEFT):
        mount, wanted = rig[camera.name], model_mount(camera)
        np.testing.assert_allclose(mount.place_m, wanted.place_m)
        np.testing.assert_allclose(mount.base_from_optical, wanted.base_from_optical, atol=1e-12)
    with pytest.raises(SpanvlaError, match='lacks front_right'):
        check_rig(rig, TOWN_CAMERAS, 'rig.yaml')


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('cameras: [', 'no rig file'),
        ('front: 1', 'no mapping'),
        ('cameras: {front: {x_m: 1}}', 'needs x_m, y_m, z_m'),
        ('cameras: {front: {x_m: 1, y_m: 0, z_m: .nan}}', 'z_m must be a number'),
        ('cameras: {front: {x_m: 1, y_m: 0, z_m: 1, tilt: 3}}', 'may have'),
    ],
)
def test_a_rig_file_that_is_none_is_one_sentence(text, reason, tmp_path):
    path = tmp_path / 'rig.yaml'
    path.write_text(text)
    with pytest.raises(SpanvlaError, match=reason):
        read_rig(path)
    with pytest.raises(SpanvlaError, match='no rig file'):
        read_rig(tmp_path / 'nowhere.yaml')
