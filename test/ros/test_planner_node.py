"""The planner over real DDS: good inputs become plans, bad ones a line in /diagnostics."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from spanvla_ros.types import Plan


@pytest.fixture(scope='module')
def drive(bus, launch, toy_model):
    """A planner that plans, and the function that feeds it one more moment."""
    planner = launch('planner', model_dir=str(toy_model), backend='onnxruntime')
    plans = bus.listen('plan', String)

    def feed():
        bus.publish('input/odometry', bus.odometry(speed_mps=0.0), 50)
        bus.publish('input/front/image', bus.image(), 5)
        bus.publish('input/route', bus.route([(float(x), 0.0) for x in range(0, 200, 15)]), 1)

    bus.wait(lambda: len(plans) > 3, feed, seconds=60.0)
    return planner, plans, feed


def goes_on(bus, drive):
    """The planner is the same process and still plans."""
    planner, plans, feed = drive
    before = len(plans)
    bus.wait(lambda: len(plans) > before + 2, feed)
    assert planner.exit_status is None


def test_a_plan_is_what_the_guardian_reads(bus, drive):
    _, plans, _ = drive
    plan = Plan.from_json(plans[-1].data)
    assert plan.driver == 'model'
    assert plan.trajectory.frame_id == 'odom'
    assert 'camera_missing:front_left' in plan.degraded
    assert plan.image_stamps_ns[0] == plan.trajectory.stamp_ns


def test_a_missing_camera_is_named(bus, drive):
    bus.wait(lambda: bus.shows('planner: plan', 'camera_missing:front_left'), drive[2])


def test_an_input_that_nobody_publishes_is_told(bus, drive):
    said = {name.rpartition(' ')[2]: line for name, line in bus.lines.items() if 'planner' in name}
    assert said['input/command'].level == DiagnosticStatus.OK
    nobody = 'nothing received yet: nobody publishes /spanvla/input'
    assert said['input/command'].message == f'{nobody}/command'
    # The other pictures of the right type are another camera's, and it has them already.
    left = f'{nobody}/front_left/image or /spanvla/input/front_left/image/compressed'
    assert said['input/front_left/image'].message == left
    assert said['input/front_left/image'].level == DiagnosticStatus.WARN
    assert said['input/front_left/camera_info'].level == DiagnosticStatus.OK
    assert said['input/front/image'].message == 'ok'


def with_change(message: Image, **change: object) -> Image:
    for name, value in change.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'encoding': 'paint7'}, 'unknown encoding'),
        ({'height': 200}, 'the message holds'),
        ({'step': 9}, 'step is 9'),
    ],
)
def test_a_contradictory_image_is_reported(bus, drive, change, reason):
    def feed():
        bus.publish('input/odometry', bus.odometry(), 50)
        bus.publish('input/front/image', with_change(bus.image(), **change), 5)

    bus.wait(lambda: bus.shows('planner: input/front/image', reason), feed)
    goes_on(bus, drive)


def test_a_truncated_jpeg_is_reported(bus, drive):
    _, data = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 255, (112, 224, 3)))

    def feed():
        message = CompressedImage(format='jpeg')
        message.header.stamp = bus.stamp()
        message.data.frombytes(data.tobytes()[:2000])
        bus.publish('input/front/image/compressed', message, 5)

    bus.wait(lambda: bus.shows('planner: input/front/image', 'truncated JPEG'), feed)
    goes_on(bus, drive)


def test_a_size_against_camera_info_is_reported(bus, drive):
    def info(width_px: int) -> CameraInfo:
        message = CameraInfo(width=width_px, height=112)
        message.k = [194.0, 0.0, 111.5, 0.0, 194.0, 55.5, 0.0, 0.0, 1.0]
        return message

    def feed():
        bus.publish('input/front/camera_info', info(300), 5)
        bus.publish('input/front/image', bus.image(), 5)

    bus.wait(lambda: bus.shows('planner: input/front/image', 'in camera_info'), feed)
    for _ in range(5):
        bus.publish('input/front/camera_info', info(224), 5)
        bus.spin(0.05)
    goes_on(bus, drive)


def test_odometry_that_is_no_number_is_reported(bus, drive):
    def feed():
        bus.publish('input/odometry', bus.odometry(x_m=float('nan')), 50)

    bus.wait(lambda: bus.shows('planner: input/odometry', 'not finite'), feed)
    goes_on(bus, drive)


def test_odometry_of_another_point_than_the_rear_axle_is_doubted(bus, drive):
    def feed():
        message = bus.odometry()
        message.child_frame_id = 'imu_link'
        bus.publish('input/odometry', message, 50)

    # A test before this one may have left a refusal, which is shown for five seconds.
    bus.wait(lambda: bus.shows('planner: input/odometry', "of 'imu_link', not of"), feed)
    drive[2]()
    bus.wait(lambda: not bus.shows('planner: input/odometry', 'imu_link'), drive[2])
    goes_on(bus, drive)


def test_the_model_its_engines_and_its_words_are_in_the_diagnostics(bus, drive):
    goes_on(bus, drive)
    line = 'spanvla/planner: plan'
    bus.wait(lambda: line in bus.lines, drive[2])
    values = {entry.key: entry.value for entry in bus.lines[line].values}
    assert len(values['model_sha256']) == 64
    assert values['backend'] == 'onnxruntime'
    # Graphs run as they are: there is nothing built that could differ from them.
    assert values['engines'] == ''
    assert values['agreement'] == 'none yet' or 0.0 <= float(values['agreement']) <= 1.0


@pytest.mark.parametrize(
    ('points', 'reason'),
    [([], 'empty'), ([(-100.0, 0.0), (-60.0, 0.0), (-30.0, 0.0)], 'route_behind')],
)
def test_a_useless_route_is_reported(bus, drive, points, reason):
    def feed():
        bus.publish('input/route', bus.route(points), 1)
        bus.publish('input/odometry', bus.odometry(), 50)
        bus.publish('input/front/image', bus.image(), 5)

    def reported() -> bool:
        lines = ('planner: input/route', 'planner: plan')
        return any(bus.shows(line, reason) for line in lines)

    bus.wait(reported, feed)
    goes_on(bus, drive)


def test_a_clock_that_runs_backwards_is_reported(bus, drive):
    bus.shift_ns = -5_000_000_000
    bus.wait(lambda: bus.shows('planner: input/odometry', 'clock_backwards'), drive[2])
    goes_on(bus, drive)
    bus.shift_ns = 0
    goes_on(bus, drive)


def test_the_model_is_loaded_again_while_driving(bus, drive):
    client = bus.node.create_client(Trigger, 'planner/reload_model')
    bus.wait(client.service_is_ready, drive[2])
    future = client.call_async(Trigger.Request())
    bus.wait(future.done, drive[2])
    assert future.result().success, future.result().message
    goes_on(bus, drive)


def test_reasoning_reaches_its_topic(bus, drive):
    heard = bus.listen('output/reasoning', String)
    bus.wait(lambda: any(json.loads(m.data)['text'] for m in heard), drive[2])
    assert json.loads(heard[-1].data)['age_s'] is not None


def test_the_node_loads_neither_torch_nor_transformers():
    code = (
        'import sys; import spanvla_ros.ros.planner_node, spanvla_ros.runtime.onnx_; '
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
