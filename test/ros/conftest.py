"""A private domain, nodes as processes in it, and a bus to talk to them over real DDS."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.time import Time
from sensor_msgs.msg import Image

from spanvla_ros.ros.children import NAMESPACE, NodeProcess, private_domain, private_environment
from spanvla_ros.ros.quiet import QuietNode

with warnings.catch_warnings():
    # The message generator's parser library still imports a module that Python has deprecated.
    warnings.simplefilter('ignore', DeprecationWarning)
    import rosidl_generator_py  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
# Processes that a test starts beside the nodes stand beside it, off pytest's path.
sys.path.insert(0, str(Path(__file__).parent))
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


@pytest.fixture(scope='session')
def toy_model(tmp_path_factory) -> Path:
    """The toy model of the runtime tests: real graphs, real tokenizer, no training."""
    path = ROOT / 'test' / 'runtime' / 'conftest.py'
    spec = importlib.util.spec_from_file_location('toy_model', path)
    toy = importlib.util.module_from_spec(spec)
    sys.modules['toy_model'] = toy
    spec.loader.exec_module(toy)
    return toy.build_toy(tmp_path_factory.mktemp('models') / 'toy').path


class Bus:
    """What a test publishes and hears on one domain; time stands where the test puts it."""

    def __init__(self, domain: int) -> None:
        self.domain = domain
        self.context = rclpy.Context()
        rclpy.init(
            context=self.context,
            domain_id=domain,
            args=[],
            signal_handler_options=SignalHandlerOptions.NO,
        )
        # rclpy's default answer to a QoS mismatch is itself a deprecated call.
        self.node = QuietNode('test', namespace=NAMESPACE, context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.lines: dict[str, Any] = {}
        self.heard: dict[str, list[Any]] = {}
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 50)
        self._publishers: dict[str, Any] = {}
        self.shift_ns = 0

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for line in message.status:
            self.lines[line.name] = line

    def listen(self, topic: str, kind: type, profile: Any = 10) -> list[Any]:
        heard = self.heard.setdefault(topic, [])
        self.node.create_subscription(kind, topic, heard.append, profile)
        return heard

    def publish(self, topic: str, message: Any, profile: Any = 10) -> None:
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(type(message), topic, profile)
        self._publishers[topic].publish(message)

    @property
    def now_ns(self) -> int:
        return time.time_ns() + self.shift_ns

    def stamp(self) -> Any:
        return Time(nanoseconds=self.now_ns).to_msg()

    def odometry(self, x_m: float = 0.0, speed_mps: float = 0.0) -> Odometry:
        message = Odometry()
        message.header.stamp, message.header.frame_id = self.stamp(), 'odom'
        message.child_frame_id = 'base_link'
        message.pose.pose.position.x = x_m
        message.pose.pose.orientation.w = 1.0
        message.twist.twist.linear.x = speed_mps
        return message

    def image(self, width_px: int = 224, height_px: int = 112) -> Image:
        message = Image(height=height_px, width=width_px, encoding='rgb8', step=3 * width_px)
        message.header.stamp = self.stamp()
        message.data.frombytes(np.full((height_px, width_px, 3), 90, np.uint8).tobytes())
        return message

    def route(self, points: list[tuple[float, float]]) -> PathMessage:
        message = PathMessage()
        message.header.frame_id, message.header.stamp = 'odom', self.stamp()
        for x_m, y_m in points:
            pose = PoseStamped()
            pose.pose.position.x, pose.pose.position.y = x_m, y_m
            pose.pose.orientation.w = 1.0
            message.poses.append(pose)
        return message

    def spin(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.executor.spin_once(timeout_sec=max(end_s - time.monotonic(), 0.0))

    def wait(
        self, met: Callable[[], bool], each: Callable[[], None], seconds: float = 20.0
    ) -> None:
        """Do `each` at 20 Hz until `met`; fails after `seconds`."""
        end_s = time.monotonic() + seconds
        while not met():
            if time.monotonic() > end_s:
                shown = {name: (line.message, line.level) for name, line in self.lines.items()}
                pytest.fail(f'nothing came within {seconds} s; diagnostics: {shown}')
            each()
            self.spin(0.05)

    def shows(self, line: str, words: str) -> bool:
        """Whether a diagnostic line of that name carries a warning or error with the words."""
        found = self.lines.get(f'{NAMESPACE.strip("/")}/{line}')
        if found is None or found.level in (b'\x00', 0):
            return False
        return words in found.message

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture(scope='module')
def domain() -> Iterator[int]:
    with private_domain() as number:
        yield number


@pytest.fixture(scope='module')
def bus(domain: int) -> Iterator[Bus]:
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    bus = Bus(domain)
    yield bus
    bus.close()


@pytest.fixture(scope='module')
def launch(domain: int, tmp_path_factory) -> Iterator[Callable[..., NodeProcess]]:
    """Start a node as a process: `launch('planner', model_dir=...)`."""
    log_dir = tmp_path_factory.mktemp('log')
    started: list[NodeProcess] = []

    def start(name: str, **parameters: object) -> NodeProcess:
        environment = private_environment(domain, log_dir)
        process = NodeProcess(name, parameters, environment, log_dir)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.interrupt()
    for process in started:
        process.wait(8.0)


@pytest.fixture(scope='session')
def long_road(tmp_path_factory) -> Path:
    """An OpenDRIVE map of one road of 400 m."""
    text = (ROOT / 'test' / 'data' / 'opendrive' / 'shapes.xodr').read_text()
    start = text.index('  <road name="1"')
    road = text[start : text.index('</road>', start) + 7].replace('60', '400')
    path = tmp_path_factory.mktemp('map') / 'long.xodr'
    path.write_text(f'<OpenDRIVE>{road}</OpenDRIVE>')
    return path


def straight(length_m: float = 200.0) -> list[tuple[float, float]]:
    return [(x, 0.0) for x in np.arange(0.0, length_m, 15.0).tolist()]
