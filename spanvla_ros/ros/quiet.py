"""A node without QoS events.

rclpy gives each publisher and subscription two event handlers, which by default only log what does
not match. An executor visits each of them, in Python, whenever it wakes up; and it wakes up for
every message of a subscription whose events it waits for. What does not match is a line in
`/diagnostics` instead (`silence`), what got lost is counted by numbers.
"""

from __future__ import annotations

from typing import Any

from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.subscription import Subscription

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:
    # So called in Humble.
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks


class QuietNode(Node):
    """A node whose publishers and subscriptions have no event handlers but those asked for.

    Those that rclpy makes by itself, for `/parameter_events` and `/clock`, are made here too.
    """

    def create_publisher(self, *args: Any, **kwargs: Any) -> Publisher[Any]:
        """As in rclpy."""
        quiet = PublisherEventCallbacks(use_default_callbacks=False)
        return super().create_publisher(*args, **{'event_callbacks': quiet, **kwargs})

    def create_subscription(self, *args: Any, **kwargs: Any) -> Subscription[Any]:
        """As in rclpy."""
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        return super().create_subscription(*args, **{'event_callbacks': quiet, **kwargs})
