"""What was seen of a rig: its topics with their offers, and messages as they came.

A bag and a running graph look the same from here (`spanvla_ros/ros/graph.py` is the other source).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rosbags.interfaces import Connection, Qos, QosDurability, QosReliability

from spanvla_ros.report.bags import Bag


@dataclass(frozen=True)
class Offer:
    """The QoS one endpoint offers or asks for."""

    reliable: bool
    latched: bool


@dataclass(frozen=True)
class SeenTopic:
    """A topic, its type, what its publishers offer; empty where that is not known.

    `readers` are the requests of its subscriptions, on a running graph.
    """

    name: str
    kind: str
    offers: tuple[Offer, ...] = ()
    readers: tuple[Offer, ...] = ()


@dataclass(frozen=True)
class SeenMessage:
    """A message as it was received, with its size on the wire."""

    topic: str
    received_ns: int
    size_bytes: int
    message: Any


def topics_of(bag: Bag) -> tuple[SeenTopic, ...]:
    """The topics of an open bag, with the offers it stores."""
    offers: dict[tuple[str, str], list[Offer]] = {}
    for connection in bag.connections:
        found = offers.setdefault((connection.topic, connection.msgtype), [])
        found.extend(_offer(qos) for qos in _stored(connection))
    return tuple(
        SeenTopic(name, kind, tuple(dict.fromkeys(its))) for (name, kind), its in offers.items()
    )


def _stored(connection: Connection) -> list[Qos]:
    stored = getattr(connection.ext, 'offered_qos_profiles', ())
    return [qos for qos in stored if isinstance(qos, Qos)]


def _offer(qos: Qos) -> Offer:
    return Offer(
        reliable=qos.reliability != QosReliability.BEST_EFFORT,
        latched=qos.durability == QosDurability.TRANSIENT_LOCAL,
    )


def messages_of(bag: Bag, topics: frozenset[str]) -> Iterator[SeenMessage]:
    """The messages of some topics of an open bag, by time of reception."""
    wanted = [connection for connection in bag.connections if connection.topic in topics]
    for connection, received_ns, raw, message in bag.read(wanted):
        yield SeenMessage(connection.topic, received_ns, len(raw), message)
