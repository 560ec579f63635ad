"""Pictures and odometry read on their bytes against rclpy's own reading of them."""

import numpy as np
import pytest
from nav_msgs.msg import Odometry
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from spanvla_ros.messages import MessageError, read_image, read_odometry
from spanvla_ros.ros.cdr import stamp_ns_of_bytes
from spanvla_ros.ros.message_bytes import (
    compressed_image_of_bytes,
    image_of_bytes,
    odometry_of_bytes,
)


def image(frame_id: str, encoding: str) -> Image:
    message = Image(height=3, width=2, encoding=encoding, step=7, is_bigendian=1)
    message.header.frame_id = frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_000, 123_456_789
    message.data.frombytes(np.arange(21, dtype=np.uint8).tobytes())
    return message


# Each length of a string moves what follows to another offset.
@pytest.mark.parametrize('frame_id', ['', 'a', 'cam', 'front', 'front_optical_frame', 'vorn_ä'])
@pytest.mark.parametrize('encoding', ['', 'rgb8', 'mono8', 'bayer_rggb8'])
def test_an_image_is_what_rclpy_reads(frame_id, encoding):
    message = image(frame_id, encoding)
    data = serialize_message(message)
    got = image_of_bytes(data)
    for name in ('height', 'width', 'encoding', 'is_bigendian', 'step'):
        assert getattr(got, name) == getattr(message, name), name
    assert got.header.frame_id == frame_id
    assert (got.header.stamp.sec, got.header.stamp.nanosec) == (1_700_000_000, 123_456_789)
    assert bytes(got.data) == bytes(message.data)
    assert stamp_ns_of_bytes(data) == 1_700_000_000_123_456_789


@pytest.mark.parametrize('frame_id', ['', 'front'])
@pytest.mark.parametrize('form', ['', 'jpeg', 'rgb8; jpeg compressed bgr8'])
def test_a_compressed_image_is_what_rclpy_reads(frame_id, form):
    message = CompressedImage(format=form)
    message.header.frame_id = frame_id
    message.header.stamp.nanosec = 5
    message.data.frombytes(b'\xff\xd8 picture')
    got = compressed_image_of_bytes(serialize_message(message))
    assert (got.header.frame_id, got.header.stamp.nanosec, got.format) == (frame_id, 5, form)
    assert bytes(got.data) == b'\xff\xd8 picture'


def test_the_pixels_are_not_copied():
    data = serialize_message(image('front', 'rgb8'))
    assert np.shares_memory(
        np.frombuffer(image_of_bytes(data).data, np.uint8), np.frombuffer(data, np.uint8)
    )


def test_big_endian_bytes_go_through_rclpy():
    message = Image(height=1, width=1, encoding='mono8', step=1)
    message.header.stamp.sec = 2
    message.data.frombytes(b'\x09')
    words = (b'\0\0\0\0', b'\0\0\0\2', b'\0\0\0\0', b'\0\0\0\1', b'\0\0\0\0')
    size = b'\0\0\0\1\0\0\0\1' + b'\0\0\0\6mono8\0'
    data = b''.join(words) + size + b'\0\0\0\0\0\1\0\0\0\1\x09'
    assert stamp_ns_of_bytes(data) == 2_000_000_000
    assert read_image(image_of_bytes(data), 'front').image.tolist() == [[[9, 9, 9]]]


def test_a_broken_message_is_one_sentence():
    data = serialize_message(image('front', 'rgb8'))
    for length in range(4, len(data) - 21):
        with pytest.raises(MessageError, match='its bytes are not those of an Image'):
            image_of_bytes(data[:length])
    small = serialize_message(CompressedImage(format='jpeg'))
    for length in range(4, len(small) - 4):
        with pytest.raises(MessageError, match='its bytes are not those of a CompressedImage'):
            compressed_image_of_bytes(small[:length])


def odometry(frame_id: str, child_frame_id: str) -> Odometry:
    message = Odometry(child_frame_id=child_frame_id)
    message.header.frame_id = frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = 7, 8
    place, turn = message.pose.pose.position, message.pose.pose.orientation
    place.x, place.y, place.z = 1.5, -2.5, 3.5
    turn.x, turn.y, turn.z, turn.w = 0.02, -0.01, 0.6, 0.8
    twist = message.twist.twist
    twist.linear.x, twist.linear.y, twist.angular.z = 4.5, 0.25, -0.75
    message.pose.covariance = [9.0] * 36
    message.twist.covariance = [8.0] * 36
    return message


@pytest.mark.parametrize('frame_id', ['', 'a', 'odom', 'map_01', 'a_longer'])
@pytest.mark.parametrize('child_frame_id', ['', 'base', 'base_link'])
def test_odometry_is_what_rclpy_reads(frame_id, child_frame_id):
    message = odometry(frame_id, child_frame_id)
    got = odometry_of_bytes(serialize_message(message))
    assert read_odometry(got) == read_odometry(message)
    assert (got.header.frame_id, got.child_frame_id) == (frame_id, child_frame_id)
    assert got.pose.pose.position.z == 3.5
    assert (got.twist.twist.linear.y, got.twist.twist.angular.z) == (0.25, -0.75)


def test_broken_odometry_is_one_sentence():
    data = serialize_message(odometry('odom', 'base_link'))
    for length in range(4, len(data) - 36 * 8, 7):
        with pytest.raises(MessageError, match='its bytes are not those of an Odometry'):
            odometry_of_bytes(data[:length])
