"""A running graph, heard for a few seconds: topics, offers, messages, and each node's clock."""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import rclpy
from rcl_interfaces.srv import GetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from rclpy.topic_endpoint_info import TopicEndpointInfo

from spanvla_ros.replay.observed import Offer, SeenMessage, SeenTopic

DISCOVERY_S = 2.0
# A busy machine tells of its nodes first and of their topics much later.
LONGEST_DISCOVERY_S = 10.0
DEPTH = 50


@dataclass(frozen=True)
class Heard:
    """What a graph showed: nodes, topics, messages in order, clocks.

    `sim_time` holds, by node, whether it takes the time of /clock; only nodes that answered.
    `several_types` names topics that are announced with more than one type.
    """

    nodes: tuple[str, ...]
    topics: tuple[SeenTopic, ...]
    messages: tuple[SeenMessage, ...]
    seconds: float
    sim_time: dict[str, bool]
    several_types: dict[str, tuple[str, ...]]


def hear(seconds: float, kinds: Collection[str]) -> Heard:
    """Listen to all topics of some types.

    Args:
        seconds: how long, after discovery.
        kinds: message types such as `nav_msgs/msg/Odometry`; others are only listed.
    """
    context = rclpy.Context()
    rclpy.init(context=context, args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node('spanvla_doctor', context=context, enable_rosout=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        names, announced = _discover(node, executor, kinds)
        topics = tuple(_topic(node, name, kind) for name, types in announced for kind in types[:1])
        messages: list[SeenMessage] = []
        for topic in topics:
            if topic.kind in kinds:
                _listen(node, topic, messages)
        _spin(executor, seconds)
        clocks = _clocks(node, executor, names)
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
    several = {name: tuple(types) for name, types in announced if len(types) > 1}
    return Heard(tuple(names), topics, tuple(messages), seconds, clocks, several)


def _discover(
    node: Node, executor: SingleThreadedExecutor, kinds: Collection[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the other nodes, and the topics with a publisher and their types."""
    end_s = time.monotonic() + LONGEST_DISCOVERY_S
    _spin(executor, DISCOVERY_S)
    while True:
        names = [name for name in _nodes(node) if name != '/spanvla_doctor']
        announced = [(n, k) for n, k in node.get_topic_names_and_types() if _published(node, n)]
        looked_at = any(kind in kinds for _, types in announced for kind in types)
        if looked_at or not names or time.monotonic() > end_s:
            return names, announced
        _spin(executor, 0.5)


def _spin(executor: SingleThreadedExecutor, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        executor.spin_once(timeout_sec=left_s)


def _nodes(node: Node) -> list[str]:
    pairs = node.get_node_names_and_namespaces()
    return sorted({f'{space.rstrip("/")}/{name}' for name, space in pairs})


def _published(node: Node, topic: str) -> bool:
    return bool(node.count_publishers(topic))


def _topic(node: Node, name: str, kind: str) -> SeenTopic:
    offers = tuple(_offer(info) for info in node.get_publishers_info_by_topic(name))
    readers = tuple(_offer(info) for info in node.get_subscriptions_info_by_topic(name))
    return SeenTopic(name, kind, tuple(dict.fromkeys(offers)), tuple(dict.fromkeys(readers)))


def _offer(info: TopicEndpointInfo) -> Offer:
    profile = info.qos_profile
    return Offer(
        reliable=profile.reliability == ReliabilityPolicy.RELIABLE,
        latched=profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
    )


def _listen(node: Node, topic: SeenTopic, messages: list[SeenMessage]) -> None:
    """Subscribe as a publisher offers it, so that nothing is missed for its QoS."""
    package, _, name = topic.kind.split('/')
    kind = getattr(importlib.import_module(f'{package}.msg'), name)
    reliable = all(offer.reliable for offer in topic.offers)
    latched = all(offer.latched for offer in topic.offers)
    profile = QoSProfile(
        depth=DEPTH,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )

    def keep(raw: bytes) -> None:
        message: Any = deserialize_message(raw, kind)
        messages.append(SeenMessage(topic.name, time.time_ns(), len(raw), message))

    node.create_subscription(kind, topic.name, keep, profile, raw=True)


def _clocks(node: Node, executor: SingleThreadedExecutor, names: list[str]) -> dict[str, bool]:
    """`use_sim_time` of every node that answers within two seconds."""
    clients: dict[str, Any] = {
        name: node.create_client(GetParameters, f'{name}/get_parameters') for name in names
    }
    end_s = time.monotonic() + 2.0
    asked: dict[str, Any] = {}
    found: dict[str, bool] = {}
    while time.monotonic() < end_s and len(found) < len(names):
        for name, client in clients.items():
            if name not in asked and client.service_is_ready():
                asked[name] = client.call_async(GetParameters.Request(names=['use_sim_time']))
        executor.spin_once(timeout_sec=0.05)
        for name, future in asked.items():
            if future.done() and name not in found:
                values = future.result().values
                found[name] = bool(values and values[0].bool_value)
    return found
