"""What the planner takes of its cameras by hand, over real DDS in one process."""

from __future__ import annotations

import time

import pytest
from rclpy.time import Time
from sensor_msgs.msg import CameraInfo, Image

from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.ros.camera_inputs import WAITING, CameraInputs
from spanvla_ros.ros.children import NAMESPACE
from spanvla_ros.ros.extrinsics import Extrinsics
from spanvla_ros.ros.parameters import PlannerSettings
from spanvla_ros.ros.quiet import QuietNode

T_NS = 1_700_000_000_000_000_000
MS = 1_000_000
BEST_EFFORT_DEPTH = 20


class Rig:
    """A publisher for each topic of a camera, and the planner's end of them."""

    def __init__(self, bus) -> None:
        self.node = QuietNode('inputs', namespace=NAMESPACE, context=bus.context)
        self.bus = bus
        settings = PlannerSettings()
        self.inputs = CameraInputs(
            self.node, TOWN_CAMERAS, settings, Extrinsics(self.node, settings, TOWN_CAMERAS)
        )
        bus.executor.add_node(self.node)
        self.out = {}
        for camera in TOWN_CAMERAS:
            for kind, tail in ((Image, 'image'), (CameraInfo, 'camera_info')):
                topic = f'input/{camera.name}/{tail}'
                self.out[topic] = bus.node.create_publisher(kind, topic, BEST_EFFORT_DEPTH)
        end_s = time.monotonic() + 60.0
        while not all(out.get_subscription_count() for out in self.out.values()):
            assert time.monotonic() < end_s
            bus.spin(0.05)
        bus.spin(0.3)

    def picture(self, camera: str, offset_ms: float) -> None:
        message = self.bus.image()
        message.header.stamp = Time(nanoseconds=T_NS + round(offset_ms * MS)).to_msg()
        self.out[f'input/{camera}/image'].publish(message)

    def info(self, camera: str, offset_ms: float, focal_px: float) -> None:
        message = CameraInfo(width=224, height=112)
        message.header.stamp = Time(nanoseconds=T_NS + round(offset_ms * MS)).to_msg()
        message.k = [focal_px, 0.0, 111.5, 0.0, focal_px, 55.5, 0.0, 0.0, 1.0]
        self.out[f'input/{camera}/camera_info'].publish(message)

    def take(self, wait_s: float = 0.5) -> dict[str, float]:
        """Milliseconds from `T_NS` of the pictures of the next plan, by camera."""
        end_s = time.monotonic() + 30.0
        while not self.inputs.wait_for_anchor(0.0):
            assert time.monotonic() < end_s
            self.bus.spin(0.02)
        _, frames = self.inputs.take(wait_s)
        return {frame.camera: (frame.stamp_ns - T_NS) / MS for frame in frames}


@pytest.fixture
def rig(bus):
    rig = Rig(bus)
    yield rig
    rig.inputs.close()
    bus.executor.remove_node(rig.node)
    rig.node.destroy_node()
    for out in rig.out.values():
        bus.node.destroy_publisher(out)


def test_of_each_camera_the_nearest_picture_is_taken_and_newer_ones_wait(rig):
    for offset_ms in (-80.0, 5.0, 70.0):
        rig.picture('front_left', offset_ms)
    time.sleep(0.3)
    rig.picture('front', 0.0)
    assert rig.take() == {'front': 0.0, 'front_left': 5.0}
    left = rig.inputs.intakes['front_left']
    assert (left.meter.dropped, left.meter.lost) == (1, 0)
    rig.picture('front', 66.0)
    assert rig.take(wait_s=0.0) == {'front': 66.0, 'front_left': 70.0}


def test_a_picture_that_comes_a_little_late_is_waited_for(rig):
    rig.picture('front_left', 0.0)
    time.sleep(0.3)
    rig.picture('front', 0.0)
    assert rig.take() == {'front': 0.0, 'front_left': 0.0}
    rig.picture('front', 100.0)
    rig.bus.wait(lambda: rig.inputs.wait_for_anchor(0.0), lambda: None)
    # Sent now, while nobody spins: what is taken by hand needs no executor.
    rig.picture('front_left', 101.0)
    assert rig.take(wait_s=10.0) == {'front': 100.0, 'front_left': 101.0}


def test_pictures_that_a_full_history_overwrote_were_dropped_not_lost(rig):
    rig.picture('front_left', -100.0)
    time.sleep(0.3)
    rig.picture('front', -100.0)
    assert rig.take() == {'front': -100.0, 'front_left': -100.0}
    sent = WAITING + 4
    for number in range(sent):
        rig.picture('front_left', number - sent + 1.0)
        time.sleep(0.02)
    time.sleep(0.3)
    rig.picture('front', 0.0)
    assert rig.take() == {'front': 0.0, 'front_left': 0.0}
    meter = rig.inputs.intakes['front_left'].meter
    assert (meter.received, meter.dropped, meter.lost) == (2, sent - 1, 0)


def test_a_lens_is_read_again_when_it_changes_and_only_then(rig):
    front = rig.inputs.intakes['front']

    def hear(offset_ms: float, focal_px: float) -> None:
        before, faults = front.info_meter.received, sum(front.info_meter._faults.values())
        rig.info('front', offset_ms, focal_px)
        end_s = time.monotonic() + 30.0
        while (front.info_meter.received, sum(front.info_meter._faults.values())) == (
            before,
            faults,
        ):
            assert time.monotonic() < end_s
            time.sleep(0.01)
            rig.inputs.listen()

    hear(0.0, 194.0)
    view, read = front.view, front.info
    assert view is not None
    hear(66.0, 194.0)
    assert front.view is view
    assert front.info is read
    hear(133.0, 180.0)
    assert front.view is not view
    assert front.info[0].focal_x_px == 180.0
    hear(200.0, -1.0)
    line = front.info_meter.status(time.time_ns())
    assert 'focal length' in line.message
