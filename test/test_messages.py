import contextlib
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transforms3d.euler import euler2quat

from spanvla_ros.messages import (
    Intrinsics,
    MessageError,
    read_acceleration,
    read_camera_info,
    read_compressed_image,
    read_image,
    read_odometry,
    read_route,
    read_trajectory,
)
from spanvla_ros.model.config import CameraSpec
from spanvla_ros.runtime.virtual_camera import VirtualCamera, centered

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def header(stamp_ns: int = 1_500_000_001) -> SimpleNamespace:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    return SimpleNamespace(
        stamp=SimpleNamespace(sec=seconds, nanosec=nanoseconds), frame_id='front'
    )


def image(rows: np.ndarray, encoding: str, width_px: int, padding: int = 0) -> SimpleNamespace:
    rows = np.pad(rows.reshape(rows.shape[0], -1), ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(
        header=header(),
        height=rows.shape[0],
        width=width_px,
        encoding=encoding,
        step=rows.shape[1],
        data=rows.tobytes(),
    )


def info(width_px: int, height_px: int, focal_px: float, **other: float) -> Intrinsics:
    center_x = other.get('center_x', (width_px - 1) / 2)
    center_y = other.get('center_y', (height_px - 1) / 2)
    return Intrinsics(width_px, height_px, focal_px, focal_px, center_x, center_y)


@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(
    ('encoding', 'pixels'),
    [
        ('rgb8', PICTURE),
        ('bgr8', PICTURE[:, :, ::-1]),
        ('rgba8', np.dstack([PICTURE, np.full((6, 8), 9, np.uint8)])),
        ('bgra8', np.dstack([PICTURE[:, :, ::-1], np.full((6, 8), 9, np.uint8)])),
    ],
)
def test_colour_encodings_become_the_same_rgb(encoding, pixels, padding):
    frame = read_image(image(pixels, encoding, 8, padding), 'front')
    np.testing.assert_array_equal(frame.image, PICTURE)
    assert (frame.camera, frame.stamp_ns) == ('front', 1_500_000_001)


def test_grey_becomes_three_equal_channels():
    frame = read_image(image(PICTURE[:, :, 0], 'mono8', 8, 3), 'front')
    assert (frame.image == PICTURE[:, :, :1]).all()


@pytest.mark.parametrize(('encoding', 'order'), [('yuv422', 'uyvy'), ('yuv422_yuy2', 'yuyv')])
def test_yuv_of_a_plain_colour(encoding, order):
    # BT.601, studio range: what these bytes mean, written out.
    r, g, b = 200.0, 60.0, 30.0
    y = 16 + (65.738 * r + 129.057 * g + 25.064 * b) / 256
    u = 128 + (-37.945 * r - 74.494 * g + 112.439 * b) / 256
    v = 128 + (112.439 * r - 94.154 * g - 18.285 * b) / 256
    values = {'y': round(y), 'u': round(u), 'v': round(v)}
    row = [values[letter] for letter in order] * 4
    frame = read_image(image(np.array([row] * 6, np.uint8), encoding, 8), 'front')
    assert frame.image.shape == (6, 8, 3)
    assert np.abs(frame.image.astype(int) - [200, 60, 30]).max() <= 4


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_bayer_pattern_names_its_first_two_rows(pattern):
    color = {'r': 210, 'g': 120, 'b': 40}
    cell = np.array(
        [[color[pattern[0]], color[pattern[1]]], [color[pattern[2]], color[pattern[3]]]]
    )
    mosaic = np.tile(cell, (4, 4)).astype(np.uint8)
    frame = read_image(image(mosaic, f'bayer_{pattern}8', 8), 'front')
    assert np.abs(frame.image[2:-2, 2:-2].astype(int) - [210, 120, 40]).max() <= 1


@pytest.mark.parametrize('padding', [0, 3])
@pytest.mark.parametrize(
    ('encoding', 'channels'),
    [('rgb8', 3), ('bgr8', 3), ('8UC3', 3), ('bgra8', 4), ('mono8', 1), ('yuv422', 2)],
)
def test_a_picture_fitted_while_it_is_read_is_the_picture_fitted_afterwards(
    encoding, channels, padding
):
    pixels = np.random.default_rng(3).integers(0, 256, (90, 160, channels), np.uint8)
    message = image(pixels, encoding, 160, padding)
    camera = CameraSpec('front', 28, 28, 40.0, 1.5, 0.0, 1.5, 0.0)
    for fit in (VirtualCamera(camera, info(160, 90, 80.0)).fit, partial(centered, camera=camera)):
        afterwards = fit(read_image(message, 'front').image)
        fitted = read_image(message, 'front', fit=fit).image
        assert fitted.shape == (28, 28, 3)
        np.testing.assert_array_equal(fitted, afterwards)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'encoding': '32FC7'}, 'unknown encoding'),
        ({'step': 20}, 'step is 20'),
        ({'height': 7}, 'the message holds 144'),
        ({'data': b''}, 'the message holds 0'),
        ({'width': 0}, 'not a picture size'),
        ({'height': 1_000_000}, 'not a picture size'),
    ],
)
def test_contradictions_are_refused_with_a_reason(change, reason):
    message = image(PICTURE, 'rgb8', 8)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(MessageError, match=reason):
        read_image(message, 'front')


def test_size_against_camera_info_is_refused():
    with pytest.raises(MessageError, match='8x6 against 9x6 in camera_info'):
        read_image(image(PICTURE, 'rgb8', 8), 'front', info(9, 6, 10.0))


@given(st.binary(max_size=200), st.sampled_from(['rgb8', 'mono8', 'yuv422', 'bayer_rggb8', 'x']))
@settings(max_examples=60, deadline=None)
def test_no_bytes_crash_the_reader(data, encoding):
    message = image(PICTURE, encoding, 8)
    message.data, message.height, message.width, message.step = data, 5, 7, 21
    with contextlib.suppress(MessageError):
        assert read_image(message, 'front').image.shape == (5, 7, 3)
    with contextlib.suppress(MessageError):
        read_compressed_image(SimpleNamespace(header=header(), format='', data=data), 'front')


def compressed(kind: str, picture: np.ndarray) -> SimpleNamespace:
    _, data = cv2.imencode(f'.{kind}', picture[:, :, ::-1])
    return SimpleNamespace(header=header(), format=kind, data=data.tobytes())


def test_png_is_exact_and_jpeg_close():
    smooth = cv2.resize(PICTURE, (64, 48), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(
        read_compressed_image(compressed('png', smooth), 'front').image, smooth
    )
    frame = read_compressed_image(compressed('jpg', smooth), 'front')
    assert np.abs(frame.image.astype(int) - smooth).mean() < 12


def test_compressed_pictures_are_read_with_the_opencv_of_apt(monkeypatch):
    # 4.5 and 4.6, of Ubuntu 22.04 and 24.04, read BGR alone.
    monkeypatch.delattr(cv2, 'IMREAD_COLOR_RGB', raising=False)
    frame = read_compressed_image(compressed('png', PICTURE), 'front')
    np.testing.assert_array_equal(frame.image, PICTURE)


def test_grey_jpeg_becomes_rgb():
    grey = np.tile(np.arange(64, dtype=np.uint8) * 3, (32, 1))
    _, data = cv2.imencode('.jpg', grey)
    frame = read_compressed_image(
        SimpleNamespace(header=header(), format='jpeg', data=data.tobytes()), 'front'
    )
    assert frame.image.shape == (32, 64, 3)
    assert np.abs(frame.image.astype(int) - grey[:, :, None]).max() <= 6


@pytest.mark.parametrize('kind', ['jpg', 'png'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.97])
def test_truncated_pictures_are_refused(kind, share):
    message = compressed(kind, RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    message.data = message.data[: int(len(message.data) * share)]
    with pytest.raises(MessageError, match=r'truncated|neither JPEG nor PNG'):
        read_compressed_image(message, 'front')


def camera_info(**change: object) -> SimpleNamespace:
    content = {
        'width': 1226,
        'height': 370,
        'k': [700.0, 0.0, 600.0, 0.0, 701.0, 180.0, 0.0, 0.0, 1.0],
        'p': [707.0, 0.0, 601.8, 0.0, 0.0, 708.0, 183.1, 0.0, 0.0, 0.0, 1.0, 0.0],
    }
    return SimpleNamespace(**{**content, **change})


def test_camera_info_takes_the_rectified_matrix_else_k():
    assert read_camera_info(camera_info()) == Intrinsics(1226, 370, 707.0, 708.0, 601.8, 183.1)
    raw = read_camera_info(camera_info(p=[0.0] * 12))
    assert raw == Intrinsics(1226, 370, 700.0, 701.0, 600.0, 180.0)


@pytest.mark.parametrize(
    'change',
    [{'width': 0}, {'p': [0.0] * 12, 'k': [0.0] * 9}, {'p': [float('nan')] * 12, 'k': [0.0] * 9}],
)
def test_senseless_camera_info_is_refused(change):
    with pytest.raises(MessageError, match='camera_info'):
        read_camera_info(camera_info(**change))


def test_a_raw_picture_goes_by_k_and_its_lens():
    lens = [-0.3, 0.1, 0.0, 0.0, 0.0]
    message = camera_info(d=lens, distortion_model='plumb_bob')
    assert read_camera_info(message).distortion == ()
    raw = read_camera_info(message, rectified=False)
    expected = Intrinsics(1226, 370, 700.0, 701.0, 600.0, 180.0, 'plumb_bob', tuple(lens))
    assert raw == expected
    # Without a lens there is one picture, and P is the better filled matrix.
    flat = read_camera_info(camera_info(d=[0.0] * 5), rectified=False)
    assert flat == Intrinsics(1226, 370, 707.0, 708.0, 601.8, 183.1)
    with pytest.raises(MessageError, match='lens coefficient'):
        read_camera_info(camera_info(d=[float('nan')] * 5), rectified=False)


def odometry(**change: float) -> SimpleNamespace:
    values = {'x': 1.0, 'y': -2.0, 'qw': 1.0, 'qx': 0.0, 'qy': 0.0, 'qz': 0.0, 'v': 3.0, 'r': 0.1}
    values.update(change)
    place = SimpleNamespace(x=values['x'], y=values['y'], z=5.0)
    turn = SimpleNamespace(**{axis: values[f'q{axis}'] for axis in 'wxyz'})
    twist = SimpleNamespace(
        linear=SimpleNamespace(x=values['v'], y=0.0, z=0.0),
        angular=SimpleNamespace(x=0.0, y=0.0, z=values['r']),
    )
    return SimpleNamespace(
        header=header(),
        pose=SimpleNamespace(pose=SimpleNamespace(position=place, orientation=turn)),
        twist=SimpleNamespace(twist=twist),
    )


@given(st.floats(-3.1, 3.1), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4))
def test_yaw_is_that_of_the_rotation_whatever_roll_and_pitch(yaw, pitch, roll):
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_euler('ZYX', [yaw, pitch, roll]).as_quat()
    ego = read_odometry(odometry(qw=w, qx=x, qy=y, qz=z))
    assert ego.yaw_rad == pytest.approx(yaw, abs=1e-9)
    assert (ego.x_m, ego.y_m, ego.speed_mps, ego.yaw_rate_radps) == (1.0, -2.0, 3.0, 0.1)
    assert ego.stamp_ns == 1_500_000_001


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'x': float('nan')}, 'position'),
        ({'qz': float('inf')}, 'orientation'),
        ({'v': float('nan')}, 'twist'),
        ({'qw': 0.0}, 'length 0,'),
        ({'qw': 2.0}, 'length 2,'),
        ({'qw': 1e200}, r'length 1e\+200,'),
        ({'qx': 1e308, 'qw': -1e308}, 'length'),
    ],
)
def test_odometry_that_is_none_is_refused(change, reason):
    with pytest.raises(MessageError, match=reason):
        read_odometry(odometry(**change))


@pytest.mark.parametrize('count', [0, 1, 4])
def test_route_points_in_order(count):
    poses = [
        SimpleNamespace(
            pose=SimpleNamespace(position=SimpleNamespace(x=float(i), y=-float(i), z=9.0))
        )
        for i in range(count)
    ]
    route = read_route(SimpleNamespace(header=header(), poses=poses))
    assert route.points.shape == (count, 2)
    assert route.points.tolist() == [[i, -i] for i in range(count)]
    assert route.frame_id == 'front'


def accelerated(x_mps2):
    linear = SimpleNamespace(x=x_mps2, y=0.0, z=0.0)
    return SimpleNamespace(accel=SimpleNamespace(accel=SimpleNamespace(linear=linear)))


def test_acceleration_is_the_forward_one():
    assert read_acceleration(accelerated(-1.5)) == -1.5
    with pytest.raises(MessageError, match='not finite'):
        read_acceleration(accelerated(float('nan')))


def trajectory_point(time_s, x_m, quaternion=(1.0, 0.0, 0.0, 0.0)):
    w, x, y, z = quaternion
    transform = SimpleNamespace(
        translation=SimpleNamespace(x=x_m, y=-x_m, z=0.0),
        rotation=SimpleNamespace(w=w, x=x, y=y, z=z),
    )
    nanoseconds = round(time_s * 1e9)
    since = SimpleNamespace(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    return SimpleNamespace(transforms=[transform], time_from_start=since)


def trajectory_message(points):
    stamp = SimpleNamespace(sec=7, nanosec=8)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp, frame_id='odom'), points=points)


@given(st.floats(-3.1, 3.1), st.floats(-1.4, 1.4), st.floats(-1.4, 1.4))
def test_trajectory_yaw_is_that_of_the_rotation(yaw, pitch, roll):
    turned = euler2quat(yaw, pitch, roll, axes='rzyx')
    points = [trajectory_point(0.0, 0.0), trajectory_point(1.5, 2.0, turned)]
    trajectory = read_trajectory(trajectory_message(points))
    assert trajectory.stamp_ns == 7_000_000_008
    assert trajectory.times_s.tolist() == [0.0, 1.5]
    assert trajectory.poses[1] == pytest.approx([2.0, -2.0, yaw], abs=1e-9)


@pytest.mark.parametrize(
    ('points', 'reason'),
    [
        ([], 'at least two'),
        ([trajectory_point(0.0, 0.0)], 'at least two'),
        ([trajectory_point(0.0, 0.0), SimpleNamespace(transforms=[])], '0 transforms'),
        ([trajectory_point(0.0, 0.0), trajectory_point(0.0, 1.0)], 'do not rise'),
        ([trajectory_point(0.0, 0.0), trajectory_point(1.0, float('inf'))], 'not finite'),
        (
            [trajectory_point(0.0, 0.0), trajectory_point(1.0, 1.0, (0.0, 0.0, 0.0, 0.0))],
            'not a rotation',
        ),
    ],
)
def test_a_trajectory_that_is_none_is_refused(points, reason):
    with pytest.raises(MessageError, match=reason):
        read_trajectory(trajectory_message(points))
