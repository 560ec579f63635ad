"""The town over real DDS: what it shows, what it tells, and that it brakes when nobody drives."""

import json

import numpy as np
import pytest
from geometry_msgs.msg import Twist
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String

CAMERAS = ('front', 'front_left', 'front_right')
CAMERA_HZ = 8.0
STEP_NS = 1e9 / 56.0
TIMEOUT_S = 0.4
# A slower brake than the built-in vehicle's 7 m/s^2.
MAX_DECEL_MPS2 = 3.0
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


def stamp_ns(message) -> int:
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


class Visit:
    """A running town on the clock of the test, and everything heard from it so far."""

    def __init__(self, bus, launch, vehicle_file):
        self.bus = bus
        self.images = {name: bus.listen(f'input/{name}/image', Image) for name in CAMERAS}
        self.infos = {
            name: bus.listen(f'input/{name}/camera_info', CameraInfo) for name in CAMERAS
        }
        self.odometry = bus.listen('input/odometry', Odometry, 50)
        self.scenes = bus.listen('town/scene', String)
        self.node = launch(
            'town',
            scenario='lead_vehicle',
            seed=3,
            camera_hz=CAMERA_HZ,
            command_timeout_s=TIMEOUT_S,
            vehicle_file=str(vehicle_file),
            use_sim_time=True,
        )
        # What was exposed before the first /clock carries the time zero.
        bus.wait(
            lambda: all(
                heard and self.near(heard[-1]) for heard in (self.odometry, *self.images.values())
            ),
            self.tick,
            seconds=60.0,
        )
        for heard in bus.heard.values():
            heard.clear()

    def near(self, message) -> bool:
        return abs(stamp_ns(message) - self.bus.now_ns) < 1_000_000_000

    def tick(self):
        self.bus.publish('/clock', Clock(clock=self.bus.stamp()), 1)

    def drive(self, speed_mps):
        self.tick()
        twist = Twist()
        twist.linear.x = speed_mps
        self.bus.publish('output/twist', twist, 1)

    @property
    def speed_mps(self) -> float:
        return self.odometry[-1].twist.twist.linear.x


@pytest.fixture(scope='module')
def town(bus, launch, tmp_path_factory):
    vehicle = tmp_path_factory.mktemp('vehicle') / 'vehicle.yaml'
    vehicle.write_text(f'max_decel_mps2: {MAX_DECEL_MPS2}\n')
    return Visit(bus, launch, vehicle)


def test_pictures_of_the_right_size_at_camera_hz(town):
    town.bus.wait(lambda: all(len(town.images[name]) > 12 for name in CAMERAS), town.tick)
    exposures = {name: {stamp_ns(m) for m in town.images[name]} for name in CAMERAS}
    for name in CAMERAS:
        for image in town.images[name]:
            assert (image.width, image.height, image.step) == (224, 112, 672)
            assert (image.encoding, len(image.data)) == ('rgb8', 112 * 672)
            assert image.header.frame_id == f'{name}_optical_frame'
        stamps = np.array(sorted(exposures[name]))
        periods = np.diff(stamps) * 1e-9 * CAMERA_HZ
        # A busy machine loses a picture, it does not shift one.
        assert np.abs(periods - np.round(periods)).max() < 1e-6
        assert round(periods.min()) == 1
        assert np.array(town.images[name][-1].data).reshape(112, 224, 3).std() > 10.0
    assert len(exposures['front'] & exposures['front_left'] & exposures['front_right']) > 8


def test_camera_info_belongs_to_the_pictures(town):
    town.bus.wait(lambda: all(town.infos[name] for name in CAMERAS), town.tick)
    for name in CAMERAS:
        info = town.infos[name][-1]
        assert (info.width, info.height) == (224, 112)
        # 60 degrees across 224 columns.
        assert info.k[0] == pytest.approx(112.0 / np.tan(np.radians(30.0)))
        assert info.header.frame_id == f'{name}_optical_frame'


def test_odometry_at_every_step(town):
    town.bus.wait(lambda: len(town.odometry) > 30, town.tick)
    steps = np.diff([stamp_ns(message) for message in town.odometry]) / STEP_NS
    assert np.abs(steps - np.round(steps)).max() < 1e-3
    assert steps.min() == pytest.approx(1.0, abs=1e-3)
    newest = town.odometry[-1]
    assert (newest.header.frame_id, newest.child_frame_id) == ('odom', 'base_link')
    # Until somebody drives, the world holds still.
    assert newest.pose.pose == town.odometry[0].pose.pose


def test_who_comes_late_gets_the_route(town):
    routes = town.bus.listen('input/route', PathMessage, LATCHED)
    town.bus.wait(lambda: bool(routes), town.tick)
    (route,) = routes
    assert route.header.frame_id == 'odom'
    points = np.array([(p.pose.position.x, p.pose.position.y) for p in route.poses])
    place = town.odometry[-1].pose.pose.position
    assert len(points) > 5
    assert np.hypot(*(points - [place.x, place.y]).T).min() < 20.0


def test_scenes_ten_times_a_second_with_the_map_once(town):
    town.scenes.clear()
    town.bus.wait(lambda: len(town.scenes) > 26, town.tick)
    scenes = [json.loads(message.data) for message in town.scenes]
    stamps = np.array([scene['town']['stamp_ns'] for scene in scenes])
    tenths = np.diff(stamps) / (6 * STEP_NS)
    assert np.abs(tenths - np.round(tenths)).max() < 1e-3
    mapped = [scene for scene in scenes if scene['map'] is not None]
    assert 2 <= len(mapped) < len(scenes) / 5
    maps = np.diff([scene['town']['stamp_ns'] for scene in mapped]) / (60 * STEP_NS)
    assert np.abs(maps - np.round(maps)).max() < 1e-3
    assert mapped[0]['map'] == mapped[-1]['map']
    assert scenes[0]['town']['scenario'] == 'lead_vehicle'
    assert scenes[0]['agents']


def test_it_brakes_by_itself_within_the_limits_of_its_vehicle(town):
    town.bus.wait(lambda: town.speed_mps > 3.5, lambda: town.drive(4.0))
    town.odometry.clear()
    told_ns = town.bus.now_ns
    town.bus.wait(lambda: bool(town.odometry) and town.speed_mps < 0.05, town.tick)
    times_s = np.array([stamp_ns(message) - told_ns for message in town.odometry]) * 1e-9
    speeds = np.array([message.twist.twist.linear.x for message in town.odometry])
    assert speeds[times_s < TIMEOUT_S - 0.1].min() > 3.4
    decel = -np.diff(speeds) / np.diff(times_s)
    assert decel.max() == pytest.approx(MAX_DECEL_MPS2, abs=0.02)


def test_stamps_follow_a_clock_that_jumps(town):
    town.bus.shift_ns = -5_000_000_000
    try:
        town.bus.wait(lambda: town.near(town.odometry[-1]), town.tick)
        town.bus.wait(lambda: town.bus.shows('town: clock', 'clock_backwards'), town.tick)
        town.images['front'].clear()
        town.bus.wait(lambda: bool(town.images['front']), town.tick)
        assert town.near(town.images['front'][-1])
    finally:
        town.bus.shift_ns = 0
    assert town.node.exit_status is None
