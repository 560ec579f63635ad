"""Subscriptions that a node takes from when it likes.

An executor wakes up for each message, which in rclpy costs ten times as much as taking it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.subscription import Subscription


class ByHand(CallbackGroup):
    """Subscriptions that the executor leaves alone; their QoS events it handles as ever."""

    def can_execute(self, entity: Any) -> bool:
        """Whether the executor may run an entity."""
        return not isinstance(entity, Subscription)

    def beginning_execution(self, entity: Any) -> bool:
        """Let it run."""
        return True

    def ending_execution(self, entity: Any) -> None:
        """Nothing is held."""


def taken(
    subscription: Subscription[Any], limit: int
) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    """What has come since the last call, as bytes and with the middleware's remarks.

    Args:
        subscription: of a group `ByHand`.
        limit: at most this many; a publisher that never rests must not hold the caller.
    """
    handle: Any = subscription.handle
    for _ in range(limit):
        # True: as bytes.
        message = handle.take_message(subscription.msg_type, True)  # noqa: FBT003
        if message is None:
            return
        yield message


def untaken(_data: bytes) -> None:
    """What rclpy asks for as the callback of a subscription that is taken from by hand."""
