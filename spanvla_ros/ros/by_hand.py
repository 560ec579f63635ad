"""Subscriptions that a node takes from when it likes.

An executor wakes up for each message, which in rclpy costs ten times as much as taking it.
It also wakes up for each message where it only waits for a subscription's QoS events: nodes that
take by hand are quiet ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription

from spanvla_ros.ros.quiet import QuietNode


def subscribe_by_hand(
    node: QuietNode, kind: type, topic: str, profile: QoSProfile
) -> Subscription[Any]:
    """A subscription of `node` that `taken` takes from, and the executor never looks at."""
    return node.create_subscription(
        kind,
        topic,
        _untaken,
        profile,
        callback_group=_ByHand(),
        raw=True,
    )


def _untaken(_data: bytes) -> None:
    """What rclpy asks for as a callback."""


class _ByHand(CallbackGroup):
    """Entities that the executor leaves alone."""

    def can_execute(self, entity: Any) -> bool:
        """Whether the executor may run an entity: never."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Do not let it run."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Nothing is held."""


def taken(
    subscription: Subscription[Any], limit: int
) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    """What has come since the last call, as bytes and with the middleware's remarks.

    Args:
        subscription: one of `subscribe_by_hand`.
        limit: at most this many; a publisher that never rests must not hold the caller.
    """
    handle: Any = subscription.handle
    for _ in range(limit):
        # True: as bytes.
        message = handle.take_message(subscription.msg_type, True)  # noqa: FBT003
        if message is None:
            return
        yield message
