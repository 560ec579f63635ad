"""Nodes without QoS events: one of each kind, made as its process makes it."""

import importlib
from pathlib import Path

import pytest
import rclpy
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.serialization import serialize_message
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from spanvla_ros import ros
from spanvla_ros.ros.bag_file import BagFile
from spanvla_ros.ros.quiet import QuietNode

KINDS = sorted(path.stem for path in Path(ros.__file__).parent.glob('*_node.py'))


@pytest.fixture(scope='module', autouse=True)
def started(domain, long_road, tmp_path_factory):
    """What `run_node` does before it makes a node, with what each of them needs to start."""
    folder = tmp_path_factory.mktemp('nodes')
    bag = BagFile(folder / 'bag.mcap')
    bag.write('/words', 'std_msgs/msg/String', 1, serialize_message(String(data='one')))
    given = {
        'guardian:use_sim_time': 'true',
        'recorder:out': folder / 'drive.mcap',
        'recorder:cameras': '[front]',
        'bridge:map': long_road,
        'bridge:route_m': 150.0,
        'replay:bag': bag.close(),
        'replay:wait_s': 50.0,
    }
    arguments = [word for name, value in given.items() for word in ('-p', f'{name}:={value}')]
    rclpy.init(
        domain_id=domain,
        args=['--ros-args', *arguments],
        signal_handler_options=SignalHandlerOptions.NO,
    )
    yield
    rclpy.try_shutdown()


def node_class(kind: str) -> type[Node]:
    module = importlib.import_module(f'spanvla_ros.ros.{kind}')
    (found,) = (
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Node) and one.__module__ == module.__name__
    )
    return found


@pytest.mark.parametrize('kind', KINDS)
def test_a_node_has_no_event_handlers(kind, monkeypatch):
    make = node_class(kind)
    assert issubclass(make, QuietNode)
    if kind == 'autoware_node':
        # Its messages have no wheel.
        return
    if kind == 'planner_node':
        # It would hold for the process of the tests, and for good.
        monkeypatch.setattr('spanvla_ros.ros.planner_node.keep_freed_memory', lambda: None)
    node = make()
    try:
        ends = [*node.publishers, *node.subscriptions]
        assert not [end.topic_name for end in ends if end.event_handlers]
        assert not list(node.waitables)
        topics = {end.topic_name for end in ends}
        assert {'/parameter_events', '/diagnostics'} <= topics
        assert '/clock' in topics or kind != 'guardian_node'
        # Made below rclpy, and kept: the log goes out.
        logs = node.get_publishers_info_by_topic('/rosout')
        assert node.get_name() in {offer.node_name for offer in logs}
    finally:
        getattr(node, 'close', lambda: None)()
        node.destroy_node()


def test_rclpy_alone_has_two_for_each():
    node = rclpy.create_node('loud')
    node.create_publisher(String, 'words', 1)
    node.create_subscription(String, 'words', print, 1)
    # The third is of /parameter_events.
    assert len(list(node.waitables)) == 6
    node.destroy_node()


def test_events_that_are_asked_for_are_there():
    node = QuietNode('quiet')
    matched = SubscriptionEventCallbacks(matched=print, use_default_callbacks=False)
    subscription = node.create_subscription(String, 'words', print, 1, event_callbacks=matched)
    matched = PublisherEventCallbacks(matched=print, use_default_callbacks=False)
    publisher = node.create_publisher(String, 'words', 1, event_callbacks=matched)
    assert [*node.waitables] == [*subscription.event_handlers, *publisher.event_handlers]
    assert len([*node.waitables]) == 2
    node.destroy_node()
