"""Why nothing comes in on an input, as far as the graph knows: name, type or QoS.

Asked by the timer of the diagnostics, and only while an input is silent. The answer is a sentence
for people; nothing that drives hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.subscription import Subscription

if TYPE_CHECKING:
    from rclpy.topic_endpoint_info import TopicEndpointInfo

# Names and types of all topics of the graph.
Topics = Callable[[], Sequence[tuple[str, Sequence[str]]]]
# Links between nodes of ours: another topic of such a name is no input of theirs.
LINKS = ('plan', 'output/')


@dataclass(frozen=True)
class Silence:
    """What the graph knows of a silent input.

    `mismatch` says that a publisher is there and cannot be heard; `remap` names what may be meant
    where nothing has ever come.
    """

    text: str = ''
    mismatch: bool = False
    remap: str = ''


def why_silent(node: Node, subscriptions: Iterable[Subscription[Any]], topics: Topics) -> Silence:
    """What keeps the subscriptions of one input from hearing anything.

    Args:
        node: theirs.
        subscriptions: all of the input; one of them that hears is enough.
        topics: `node.get_topic_names_and_types`, or the answer it gave a moment ago.

    Returns:
        Nothing where nothing is subscribed to, or the graph could not be asked.
    """
    try:
        return _look(node, subscriptions, topics)
    except Exception:
        # Whatever the middleware could not answer, the diagnostics go out.
        return Silence()


def _look(node: Node, subscriptions: Iterable[Subscription[Any]], topics: Topics) -> Silence:
    asked: dict[str, list[Subscription[Any]]] = {}
    for subscription in subscriptions:
        asked.setdefault(subscription.topic_name, []).append(subscription)
    matching = ''
    for topic, group in asked.items():
        # Asked by the name before remapping, as rclpy remaps it.
        for offer in node.get_publishers_info_by_topic(group[0].topic):
            mismatch = _mismatch(topic, offer, group)
            if mismatch:
                return Silence(mismatch, mismatch=True)
            matching = f'{_node_name(offer)} publishes it, type and QoS match'
    if matching or not asked:
        return Silence(matching)
    found = [name for topic, group in asked.items() for name in _alike(node, topic, group, topics)]
    return Silence(f'nobody publishes {" or ".join(asked)}', remap=' or '.join(found[:2]))


def _mismatch(topic: str, offer: TopicEndpointInfo, group: Sequence[Subscription[Any]]) -> str:
    """Why none of the subscriptions of a topic hears a publisher; empty where one does."""
    kind = type_name(group[0].msg_type)
    if offer.topic_type != kind:
        return (
            f'{_node_name(offer)} publishes {topic} as {offer.topic_type}, not {kind}: '
            'remap or convert it'
        )
    refusals: list[tuple[str, QoSProfile]] = []
    for subscription in group:
        verdict, reason = qos_check_compatible(offer.qos_profile, subscription.qos_profile)
        if verdict != QoSCompatibility.ERROR:
            return ''
        refusals.append((reason, subscription.qos_profile))
    # That of the subscription that asks for least.
    reason, profile = min(refusals, key=lambda refusal: len(refusal[0]))
    words = reason.replace('ERROR: ', '').rstrip(';').replace(';', ', ').lower()
    return f'{_node_name(offer)} offers {topic} with other QoS ({words}){_fix(profile)}'


def _fix(profile: QoSProfile) -> str:
    wanted = []
    if profile.reliability == ReliabilityPolicy.RELIABLE:
        wanted.append('reliable')
    if profile.durability == DurabilityPolicy.TRANSIENT_LOCAL:
        wanted.append('transient local')
    return f'; publish it {" and ".join(wanted)}' if wanted else ''


def _alike(
    node: Node, topic: str, group: Sequence[Subscription[Any]], topics: Topics
) -> list[str]:
    """Published topics of the type asked for that end in the same name; those most alike."""
    if group[0].topic.startswith(LINKS):
        return []
    kind, parts = type_name(group[0].msg_type), topic.split('/')
    own = {heard.topic_name for heard in node.subscriptions}
    own |= {said.topic_name for said in node.publishers}
    shared = {
        name: len({*parts} & {*name.split('/')})
        for name, kinds in topics()
        if name.rsplit('/', 1)[-1] == parts[-1]
        and kind in kinds
        and name not in own
        and node.count_publishers(name)
    }
    return [name for name in sorted(shared) if shared[name] == max(shared.values())]


def _node_name(offer: TopicEndpointInfo) -> str:
    if 'UNKNOWN' in offer.node_name:
        # The middleware knows the publisher before it knows its node.
        return 'a node'
    return f'{offer.node_namespace.rstrip("/")}/{offer.node_name}'


def type_name(kind: type) -> str:
    """What the graph calls a message class, such as `nav_msgs/msg/Odometry`."""
    return f'{kind.__module__.split(".")[0]}/msg/{kind.__name__}'
