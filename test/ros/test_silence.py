"""What is said of a silent input, over real DDS: nobody, another name, another type, other QoS.

Whether the middleware joins two ends is the truth that the sentences are held to.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rclpy
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from spanvla_ros.ros.children import NAMESPACE
from spanvla_ros.ros.diagnostics import ERROR, OK, STALE, WARN, InputMeter
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.ros.silence import Silence, why_silent

LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class Ear:
    """The listening end, a participant of its own beside that of the bus."""

    def __init__(self, bus) -> None:
        self.bus = bus
        self.context = rclpy.Context()
        rclpy.init(
            context=self.context,
            domain_id=bus.domain,
            args=[],
            signal_handler_options=SignalHandlerOptions.NO,
        )
        self.node = QuietNode('ear', namespace=NAMESPACE, context=self.context)
        self.offers = []

    def asks(self, kind: type, topic: str, *profiles: QoSProfile) -> list:
        return [
            self.node.create_subscription(kind, topic, print, profile)
            for profile in profiles or (BEST_EFFORT,)
        ]

    def offer(self, kind: type, topic: str, profile: QoSProfile = RELIABLE) -> None:
        self.offers.append(self.bus.node.create_publisher(kind, topic, profile))

    def why(self, subscriptions: list) -> Silence:
        return why_silent(self.node, subscriptions, self.node.get_topic_names_and_types)

    def until(self, subscriptions: list, words: str) -> Silence:
        self.bus.wait(lambda: words in str(self.why(subscriptions)), lambda: None)
        return self.why(subscriptions)

    def rest(self) -> None:
        for publisher in self.offers:
            self.bus.node.destroy_publisher(publisher)
        self.offers = []
        for subscription in [*self.node.subscriptions]:
            self.node.destroy_subscription(subscription)


@pytest.fixture(scope='module')
def ears(bus) -> Iterator[Ear]:
    ear = Ear(bus)
    yield ear
    ear.node.destroy_node()
    ear.context.try_shutdown()


@pytest.fixture
def ear(ears) -> Iterator[Ear]:
    yield ears
    ears.rest()


def test_nobody(ear):
    route = ear.asks(PathMessage, 'input/nobody', LATCHED, RELIABLE)
    assert ear.why(route) == Silence('nobody publishes /spanvla/input/nobody')
    pictures = ear.asks(String, 'input/raw') + ear.asks(String, 'input/raw/compressed')
    nobody = 'nobody publishes /spanvla/input/raw or /spanvla/input/raw/compressed'
    assert ear.why(pictures) == Silence(nobody)


def test_another_type(ear):
    odometry = ear.asks(Odometry, 'input/typed')
    ear.offer(String, 'input/typed')
    found = ear.until(odometry, 'spanvla/test')
    assert found.mismatch
    assert found.text == (
        '/spanvla/test publishes /spanvla/input/typed as std_msgs/msg/String, '
        'not nav_msgs/msg/Odometry: remap or convert it'
    )
    assert odometry[0].get_publisher_count() == 0


@pytest.mark.parametrize(
    ('offered', 'asked', 'words', 'fix'),
    [
        (BEST_EFFORT, [RELIABLE], 'best effort publisher and reliable subscription', 'reliable'),
        (
            RELIABLE,
            [LATCHED],
            'volatile publisher and transient local subscription',
            'reliable and transient local',
        ),
        (
            BEST_EFFORT,
            [LATCHED, RELIABLE],
            'best effort publisher and reliable subscription',
            'reliable',
        ),
        (RELIABLE, [LATCHED, RELIABLE], '', ''),
        (LATCHED, [LATCHED], '', ''),
        (RELIABLE, [BEST_EFFORT], '', ''),
    ],
)
def test_quality_of_service(ear, offered, asked, words, fix):
    # A name for each case: the graph forgets an offer later than DDS does.
    topic = f'input/route_{len(fix)}_{len(asked)}_{offered.durability.name.lower()}'
    route = ear.asks(PathMessage, topic, *asked)
    ear.offer(PathMessage, topic, offered)
    found = ear.until(route, '/spanvla/test')
    if words:
        shown = f'/spanvla/{topic} with other QoS ({words}); publish it {fix}'
        assert found == Silence(f'/spanvla/test offers {shown}', mismatch=True)
        assert not any(subscription.get_publisher_count() for subscription in route)
    else:
        assert found == Silence('/spanvla/test publishes it, type and QoS match')
        ear.bus.wait(lambda: any(s.get_publisher_count() for s in route), lambda: None)


def test_where_it_may_be_instead(ear):
    odometry = ear.asks(Odometry, 'input/rear/place')
    link = ear.asks(Odometry, 'output/place')
    # Those this node hears or says itself, and those nobody publishes, are no answer.
    ear.asks(Odometry, '/own/rear/place')
    ear.node.create_publisher(Odometry, '/said/rear/place', RELIABLE)
    ear.bus.listen('/asked/rear/place', Odometry)
    for topic, kind in (
        ('/own/rear/place', Odometry),
        ('/other/rear/place', String),
        ('/rig/front/place', Odometry),
        ('/rig/rear/placed', Odometry),
    ):
        ear.offer(kind, topic)
    nobody = 'nobody publishes /spanvla/input/rear/place'
    found = ear.until(odometry, '/rig/front/place')
    assert found == Silence(nobody, remap='/rig/front/place')
    # One that shares more of the name is the likelier one.
    ear.offer(Odometry, '/rig/rear/place')
    found = ear.until(odometry, '/rig/rear/place')
    assert found == Silence(nobody, remap='/rig/rear/place')
    # Between our own nodes no other will do.
    assert ear.why(link) == Silence('nobody publishes /spanvla/output/place')


def test_a_graph_that_does_not_answer_costs_nothing_but_the_sentence(ear):
    def broken() -> list:
        raise RuntimeError('no graph')

    gone = ear.asks(Odometry, 'input/gone')
    assert why_silent(ear.node, gone, broken) == Silence()
    ear.node.destroy_subscription(gone[0])
    assert ear.why(gone) == Silence()
    meter = InputMeter('input/gone', 1.0)
    meter.subscriptions = gone
    line = meter.status(0, ear.why)
    assert (line.level, line.message) == (WARN, 'nothing received yet')


def test_the_graph_is_asked_only_while_an_input_is_silent():
    asked = []

    def why(_subscriptions) -> Silence:
        asked.append(1)
        return Silence('wrong', mismatch=True, remap='/there')

    needed, optional = InputMeter('a', 1.0), InputMeter('b', 1.0, required=False)
    for meter, level in ((needed, WARN), (optional, WARN)):
        line = meter.status(0, why)
        assert (line.level, line.message) == (
            level, 'nothing received yet: wrong; remap to /there?',
        )  # fmt: skip
        meter.arrived(0)
    asked.clear()
    assert needed.status(500_000_000, why).message == 'ok'
    # An optional input may rest after its first message, as a latched route does.
    assert optional.status(9_000_000_000, why).message == 'ok'
    needed.fault(8_000_000_000, 'refused')
    assert needed.status(9_000_000_000, why).level == ERROR
    assert not asked
    line = needed.status(20_000_000_000, why)
    # What once came has the right name.
    assert (line.level, line.message) == (STALE, 'silent for 20.0 s: wrong')


def test_the_guardian_says_why_nothing_comes_and_is_content_once_it_does(bus, launch):
    guardian = launch('guardian', odometry_timeout_s=0.5)

    def says(source: str, level: bytes, *words: str) -> bool:
        line = bus.lines.get(f'spanvla/guardian: {source}')
        return (
            line is not None
            and line.level == level
            and all(word in line.message for word in words)
        )

    nobody = 'nothing received yet: nobody publishes /spanvla/'
    bus.wait(lambda: says('input/odometry', WARN, f'{nobody}input/odometry'), lambda: None)
    assert says('input/route', OK, f'{nobody}input/route')
    assert says('plan', WARN, f'{nobody}plan')
    assert bus.lines['spanvla/guardian: clock'].message == 'nothing received yet'

    elsewhere = bus.node.create_publisher(Odometry, '/rig/odometry', 50)
    lossy = bus.node.create_publisher(PathMessage, 'input/route', BEST_EFFORT)
    bus.wait(lambda: says('input/odometry', WARN, '; remap to /rig/odometry?'), lambda: None)
    words = '/spanvla/test offers /spanvla/input/route', 'publish it reliable'
    bus.wait(lambda: says('input/route', WARN, *words), lambda: None)

    def feed() -> None:
        odometry.publish(bus.odometry())
        bus.publish('input/route', bus.route([(0.0, 0.0), (50.0, 0.0)]), RELIABLE)

    odometry = bus.node.create_publisher(Odometry, 'input/odometry', 50)
    bus.node.destroy_publisher(lossy)
    bus.wait(lambda: says('input/odometry', OK, 'ok') and says('input/route', OK, 'ok'), feed)
    words = 'silent for', '/spanvla/test publishes it, type and QoS match'
    bus.wait(lambda: says('input/odometry', STALE, *words), lambda: None)
    bus.node.destroy_publisher(odometry)
    words = 'silent for', ': nobody publishes /spanvla/input/odometry'
    bus.wait(lambda: says('input/odometry', STALE, *words), lambda: None)
    assert 'remap' not in bus.lines['spanvla/guardian: input/odometry'].message
    bus.node.destroy_publisher(elsewhere)
    assert guardian.exit_status is None
