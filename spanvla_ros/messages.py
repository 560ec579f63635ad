"""From ROS messages to the data vocabulary and back, reading objects by attribute.

No ROS package is imported: rclpy messages and the message objects of rosbags look the same from
here, so the nodes and the replay share one reader. Whatever contradicts itself is refused with a
`MessageError`, whose sentence ends up in `/diagnostics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from transforms3d.euler import quat2euler

from spanvla_ros.types import CameraFrame, EgoState, Route, SpanvlaError, Trajectory

Picture = UInt8[np.ndarray, 'h w 3']
# Cuts and scales a picture, whatever its channels mean.
Fit = Callable[[UInt8[np.ndarray, 'h w *c']], UInt8[np.ndarray, 'rows columns *c']]
CHANNELS = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1, '8UC1': 1, '8UC3': 3}
YUV = ('yuv422', 'uyvy', 'yuv422_yuy2', 'yuyv')
BAYER = ('bayer_rggb8', 'bayer_bggr8', 'bayer_gbrg8', 'bayer_grbg8')
MAX_SIDE_PX = 16_384


class MessageError(SpanvlaError):
    """A message that contradicts itself or cannot be read; the sentence says how."""


def stamp_ns_of(header: Any) -> int:
    """The stamp of a `std_msgs/Header` as integer nanoseconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


@dataclass(frozen=True)
class Intrinsics:
    """A camera: size and focal lengths in pixels, principal point from the top left, lens.

    `distortion` holds the coefficients of `distortion_model` as CameraInfo names them; none is a
    pinhole camera.
    """

    width_px: int
    height_px: int
    focal_x_px: float
    focal_y_px: float
    center_x_px: float
    center_y_px: float
    distortion_model: str = ''
    distortion: tuple[float, ...] = ()


def read_camera_info(msg: Any, *, rectified: bool = True) -> Intrinsics:
    """Lens and size of a `sensor_msgs/CameraInfo`.

    The message describes two pictures: the raw one by K and D, the rectified one by P. A driver
    without a calibration of the lens may fill either, so without D the one that is filled counts,
    P first.

    Args:
        msg: the message.
        rectified: whether the picture it goes with is the rectified one.
    """
    lens = tuple(float(value) for value in getattr(msg, 'd', ()))
    if not rectified and any(lens):
        return _raw_camera_info(msg, lens)
    p = [float(value) for value in msg.p]
    k = [float(value) for value in msg.k]
    matrix = (p[0], p[5], p[2], p[6]) if p and p[0] > 0 else (k[0], k[4], k[2], k[5])
    width_px, height_px = int(msg.width), int(msg.height)
    if not all(math.isfinite(value) for value in matrix) or min(matrix[:2]) <= 0:
        raise MessageError('camera_info: the focal length is not a positive number')
    if not (0 < width_px <= MAX_SIDE_PX and 0 < height_px <= MAX_SIDE_PX):
        raise MessageError(f'camera_info: {width_px}x{height_px} is not a picture size')
    return Intrinsics(width_px, height_px, *matrix)


def _raw_camera_info(msg: Any, lens: tuple[float, ...]) -> Intrinsics:
    k = [float(value) for value in msg.k]
    pinhole = read_camera_info(SimpleNamespace(width=msg.width, height=msg.height, k=k, p=()))
    if not all(math.isfinite(value) for value in lens):
        raise MessageError('camera_info: a lens coefficient is not a finite number')
    return replace(pinhole, distortion_model=str(msg.distortion_model), distortion=lens)


def _whole(picture: UInt8[np.ndarray, 'h w *c']) -> UInt8[np.ndarray, 'h w *c']:
    return picture


def read_image(
    msg: Any,
    camera: str,
    info: Intrinsics | None = None,
    *,
    use_cv_bridge: bool = False,
    fit: Fit = _whole,
) -> CameraFrame:
    """A `sensor_msgs/Image` as an RGB picture.

    Args:
        msg: the message; rgb8, bgr8, rgba8, bgra8, mono8, YUV 4:2:2 or 8-bit Bayer.
        camera: the camera's name.
        info: the camera's intrinsics, whose size the picture must have.
        use_cv_bridge: convert with cv_bridge where it is installed; without it, an encoding that
            is not read here is left to cv_bridge.
        fit: what the picture is cut and scaled by. Done before the channels are put in order,
            which costs by the pixel.

    Raises:
        MessageError: unknown encoding, size against data, or size against `info`.
    """
    if str(msg.encoding) not in (*CHANNELS, *YUV, *BAYER):
        picture = _through_cv_bridge(msg)
        if picture is not None:
            _check_against_info(picture.shape[1], picture.shape[0], info)
            return CameraFrame(camera, stamp_ns_of(msg.header), fit(picture))
    height_px, width_px = _checked_size(msg, info)
    if use_cv_bridge:
        picture = _through_cv_bridge(msg)
        if picture is not None:
            return CameraFrame(camera, stamp_ns_of(msg.header), fit(picture))
    return CameraFrame(camera, stamp_ns_of(msg.header), _rgb(msg, height_px, width_px, fit))


def _checked_size(msg: Any, info: Intrinsics | None) -> tuple[int, int]:
    height_px, width_px, step = int(msg.height), int(msg.width), int(msg.step)
    if not (0 < width_px <= MAX_SIDE_PX and 0 < height_px <= MAX_SIDE_PX):
        raise MessageError(f'image: {width_px}x{height_px} is not a picture size')
    encoding = str(msg.encoding)
    if encoding in CHANNELS:
        row_bytes = width_px * CHANNELS[encoding]
    elif encoding in YUV:
        row_bytes = width_px * 2
    elif encoding in BAYER:
        row_bytes = width_px
    else:
        known = ', '.join((*CHANNELS, *YUV, *BAYER))
        raise MessageError(f'image: unknown encoding {encoding!r:.40}; known are {known}')
    if step < row_bytes:
        raise MessageError(
            f'image: a row of {width_px} {encoding} pixels needs {row_bytes} bytes, step is {step}'
        )
    if len(msg.data) < step * height_px:
        raise MessageError(
            f'image: {height_px} rows of {step} bytes need {step * height_px} bytes, '
            f'the message holds {len(msg.data)}'
        )
    _check_against_info(width_px, height_px, info)
    return height_px, width_px


def _check_against_info(width_px: int, height_px: int, info: Intrinsics | None) -> None:
    if info is not None and (width_px, height_px) != (info.width_px, info.height_px):
        raise MessageError(
            f'image: {width_px}x{height_px} against {info.width_px}x{info.height_px} '
            'in camera_info'
        )


def _rgb(msg: Any, height_px: int, width_px: int, fit: Fit) -> Picture:
    encoding, step = str(msg.encoding), int(msg.step)
    rows = np.frombuffer(msg.data, np.uint8, count=step * height_px).reshape(height_px, step)
    if encoding in YUV or encoding in BAYER:
        return fit(_converted(rows, encoding, width_px))
    channels = CHANNELS[encoding]
    if channels == 1:
        return np.repeat(fit(rows[:, :width_px])[:, :, None], 3, axis=2)
    pixels = fit(rows[:, : width_px * channels].reshape(height_px, width_px, channels))
    if encoding.startswith('bgr') or encoding == '8UC3':
        pixels = pixels[:, :, 2::-1]
    return np.ascontiguousarray(pixels[:, :, :3])


def _converted(rows: UInt8[np.ndarray, 'h step'], encoding: str, width_px: int) -> Picture:
    import cv2

    if encoding in YUV:
        if width_px % 2:
            raise MessageError(f'image: {encoding} needs an even width, not {width_px}')
        pairs = np.ascontiguousarray(rows[:, : width_px * 2]).reshape(rows.shape[0], width_px, 2)
        uyvy = encoding in ('yuv422', 'uyvy')
        code = cv2.COLOR_YUV2RGB_UYVY if uyvy else cv2.COLOR_YUV2RGB_YUY2
        return cv2.cvtColor(pairs, code)
    # OpenCV names a Bayer pattern by its second row and column, ROS by its first.
    code = {
        'bayer_rggb8': cv2.COLOR_BayerBG2RGB,
        'bayer_bggr8': cv2.COLOR_BayerRG2RGB,
        'bayer_gbrg8': cv2.COLOR_BayerGR2RGB,
        'bayer_grbg8': cv2.COLOR_BayerGB2RGB,
    }[encoding]
    if min(rows.shape[0], width_px) < 2:
        raise MessageError(f'image: {encoding} needs at least 2x2 pixels')
    return cv2.cvtColor(np.ascontiguousarray(rows[:, :width_px]), code)


def _through_cv_bridge(msg: Any) -> Picture | None:
    try:
        from cv_bridge import CvBridge, CvBridgeError
    except ImportError:
        return None
    try:
        picture = CvBridge().imgmsg_to_cv2(msg, desired_encoding='rgb8')
    except (CvBridgeError, RuntimeError, TypeError) as error:
        raise MessageError(f'image: cv_bridge refuses it: {error}') from error
    return np.ascontiguousarray(picture, dtype=np.uint8)


def read_compressed_image(
    msg: Any, camera: str, info: Intrinsics | None = None, *, fit: Fit = _whole
) -> CameraFrame:
    """A `sensor_msgs/CompressedImage` (JPEG or PNG, colour or grey) as an RGB picture.

    Args:
        msg: the message.
        camera: the camera's name.
        info: the camera's intrinsics, whose size the picture must have.
        fit: what the picture is cut and scaled by.

    Raises:
        MessageError: not a picture, a truncated one, or a size against `info`.
    """
    import cv2

    data = np.frombuffer(msg.data, np.uint8)
    jpeg = data[:2].tobytes() == b'\xff\xd8'
    png = data[:8].tobytes() == b'\x89PNG\r\n\x1a\n'
    if not (jpeg or png):
        raise MessageError(f'compressed image: neither JPEG nor PNG ({len(data)} bytes)')
    # The decoder fills what is missing with grey and says nothing, so the end mark is asked for.
    tail = data[-64:].tobytes()
    if (jpeg and b'\xff\xd9' not in tail) or (png and b'IEND' not in tail):
        kind = 'JPEG' if jpeg else 'PNG'
        raise MessageError(f'compressed image: truncated {kind} ({len(data)} bytes)')
    try:
        # IMREAD_COLOR_RGB is not in the OpenCV of Ubuntu's apt.
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise MessageError('compressed image: the decoder refuses it') from error
    if picture is None:
        raise MessageError('compressed image: damaged, the decoder returns nothing')
    _check_against_info(picture.shape[1], picture.shape[0], info)
    picture = cv2.cvtColor(fit(picture), cv2.COLOR_BGR2RGB)
    return CameraFrame(camera, stamp_ns_of(msg.header), picture)


def read_odometry(msg: Any) -> EgoState:
    """A `nav_msgs/Odometry` as an ego state; its twist is in the body frame, as REP-105 says.

    Raises:
        MessageError: a number that is not finite, or an orientation that is not a rotation.
    """
    pose, twist = msg.pose.pose, msg.twist.twist
    q = pose.orientation
    numbers = {
        'position': (pose.position.x, pose.position.y),
        'orientation': (q.w, q.x, q.y, q.z),
        'twist': (twist.linear.x, twist.angular.z),
    }
    for name, values in numbers.items():
        if not all(math.isfinite(value) for value in values):
            raise MessageError(f'odometry: {name} holds a number that is not finite')
    # A square of 1e200 would raise; the length of such numbers is infinite.
    norm = math.hypot(q.w, q.x, q.y, q.z)
    if abs(norm - 1.0) > 0.05:
        raise MessageError(f'odometry: the orientation has length {norm:.3g}, a rotation has 1')
    yaw_rad, _, _ = quat2euler((q.w, q.x, q.y, q.z), axes='rzyx')
    return EgoState(
        stamp_ns=stamp_ns_of(msg.header),
        x_m=float(pose.position.x),
        y_m=float(pose.position.y),
        yaw_rad=float(yaw_rad),
        speed_mps=float(twist.linear.x),
        yaw_rate_radps=float(twist.angular.z),
    )


def read_route(msg: Any) -> Route:
    """A `nav_msgs/Path` as a route; whether it can be driven is judged by who uses it."""
    points = [(float(p.pose.position.x), float(p.pose.position.y)) for p in msg.poses]
    return Route(
        stamp_ns=stamp_ns_of(msg.header),
        frame_id=str(msg.header.frame_id),
        points=np.array(points, dtype=np.float64).reshape(-1, 2),
    )


def read_acceleration(msg: Any) -> float:
    """The forward acceleration in m/s^2 of a `geometry_msgs/AccelWithCovarianceStamped`.

    Raises:
        MessageError: a number that is not finite.
    """
    value = float(msg.accel.accel.linear.x)
    if not math.isfinite(value):
        raise MessageError('acceleration: holds a number that is not finite')
    return value


def read_trajectory(msg: Any) -> Trajectory:
    """A `trajectory_msgs/MultiDOFJointTrajectory` of one joint, as the guardian publishes it.

    Raises:
        MessageError: fewer than two points, a point without a pose, times that do not rise, a
            number that is not finite, or an orientation that is not a rotation.
    """
    rows = []
    for point in msg.points:
        if len(point.transforms) != 1:
            raise MessageError(f'trajectory: a point with {len(point.transforms)} transforms')
        place, q = point.transforms[0].translation, point.transforms[0].rotation
        since = point.time_from_start
        time_s = since.sec + since.nanosec * 1e-9
        rows.append((time_s, place.x, place.y, q.w, q.x, q.y, q.z))
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return trajectory_of_table(table, stamp_ns_of(msg.header), str(msg.header.frame_id))


def trajectory_of_table(
    table: Float64[np.ndarray, 'n 7'], stamp_ns: int, frame_id: str
) -> Trajectory:
    """A trajectory of rows of time, x, y and the rotation's w, x, y, z.

    Raises:
        MessageError: as `read_trajectory`.
    """
    if len(table) < 2:
        raise MessageError(f'trajectory: {len(table)} points, at least two are needed')
    if not np.isfinite(table).all():
        raise MessageError('trajectory: holds a number that is not finite')
    if not (np.diff(table[:, 0]) > 0).all():
        raise MessageError('trajectory: its times do not rise')
    # All rotations at once; transforms3d turns one at a time.
    w, x, y, z = table[:, 3:].T
    if (np.abs(np.sqrt(w * w + x * x + y * y + z * z) - 1.0) > 0.05).any():
        raise MessageError('trajectory: an orientation is not a rotation')
    yaw_rad = np.arctan2(2.0 * (w * z + x * y), w * w + x * x - y * y - z * z)
    return Trajectory(
        stamp_ns=stamp_ns,
        frame_id=frame_id,
        times_s=table[:, 0],
        poses=np.stack([table[:, 1], table[:, 2], yaw_rad], axis=1),
    )
