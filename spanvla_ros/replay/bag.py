"""A recorded drive: which of its topics a planner reads, and its messages in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from rosbags.interfaces import Connection

from spanvla_ros.messages import MessageError
from spanvla_ros.report.bags import Bag
from spanvla_ros.types import SpanvlaError

IMAGE = 'sensor_msgs/msg/Image'
COMPRESSED = 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
ODOMETRY = 'nav_msgs/msg/Odometry'
PATH = 'nav_msgs/msg/Path'
TRANSFORMS = 'tf2_msgs/msg/TFMessage'


@dataclass(frozen=True)
class Topics:
    """What is read from a bag: image topic by camera name, infos, odometry, route."""

    images: Mapping[str, str]
    infos: Mapping[str, str]
    odometry: str
    route: str | None


@dataclass(frozen=True)
class Wish:
    """What the user named; the rest is guessed."""

    cameras: Mapping[str, str]
    odometry: str = ''
    route: str = ''


def find_topics(
    connections: Sequence[Connection],
    wish: Wish,
    cameras: Sequence[str],
    bag: str,
    *,
    drawn: bool = False,
) -> Topics:
    """Match a bag's topics with what a model needs.

    Args:
        connections: of the bag.
        wish: what the user named.
        cameras: the model's camera names, the anchor first.
        bag: the bag's name, for the sentences.
        drawn: the pictures are drawn; the bag then must have none.

    Raises:
        SpanvlaError: a camera or the odometry is missing, or there is more than one choice.
    """
    kinds = {connection.topic: connection.msgtype for connection in connections}
    # What a drive of ours published is no input of the next.
    inputs = {topic: kind for topic, kind in kinds.items() if '/output/' not in topic}
    if drawn:
        images = _no_images(inputs, wish, cameras, bag)
    else:
        images = _images(kinds, inputs, wish, cameras, bag)
    infos = {name: info for name, topic in images.items() if (info := info_of(topic, inputs))}
    odometry = _one(kinds, inputs, wish.odometry, ODOMETRY, '--odometry', bag)
    if odometry is None:
        raise SpanvlaError(f'{bag}: no odometry topic ({ODOMETRY}); record one with the camera')
    return Topics(images, infos, odometry, _one(kinds, inputs, wish.route, PATH, '--route', bag))


def _images(
    kinds: Mapping[str, str],
    inputs: Mapping[str, str],
    wish: Wish,
    cameras: Sequence[str],
    bag: str,
) -> dict[str, str]:
    for name, topic in wish.cameras.items():
        if name not in cameras:
            raise SpanvlaError(
                f'--camera {name}={topic}: the model has {", ".join(cameras)}, not {name}'
            )
        if kinds.get(topic) not in (IMAGE, COMPRESSED):
            raise SpanvlaError(f'--camera {name}={topic}: {bag} has no image topic of that name')
    if wish.cameras:
        if cameras[0] not in wish.cameras:
            raise SpanvlaError(f'--camera: name the topic of {cameras[0]}, which times the plans')
        return dict(wish.cameras)
    found = sorted(topic for topic, kind in inputs.items() if kind in (IMAGE, COMPRESSED))
    if not found:
        raise SpanvlaError(
            f'{bag}: no camera topic ({IMAGE} or {COMPRESSED}); '
            'a planner needs pictures: record a camera, or draw them with --draw-cameras MAP.xodr'
        )
    named = {
        name: topic for name in cameras for topic in found if name in topic.strip('/').split('/')
    }
    if cameras[0] in named:
        return named
    if len(found) == 1:
        return {cameras[0]: found[0]}
    raise SpanvlaError(
        f'{bag}: {len(found)} image topics ({", ".join(found)}); '
        f'choose with --camera {cameras[0]}=TOPIC'
    )


def _no_images(
    inputs: Mapping[str, str], wish: Wish, cameras: Sequence[str], bag: str
) -> dict[str, str]:
    found = sorted(topic for topic, kind in inputs.items() if kind in (IMAGE, COMPRESSED))
    if found or wish.cameras:
        raise SpanvlaError(
            f'{bag}: --draw-cameras is for a bag without cameras; this one has '
            f'{", ".join(found) or "some named"}, leave the option out'
        )
    return {name: f'(drawn)/{name}' for name in cameras}


def info_of(image_topic: str, inputs: Mapping[str, str]) -> str | None:
    """The camera_info whose name shares the longest path with the image's."""
    parts = image_topic.strip('/').split('/')
    best, best_shared = None, 0
    for topic, kind in inputs.items():
        if kind != CAMERA_INFO:
            continue
        shared = 0
        for mine, other in zip(parts[:-1], topic.strip('/').split('/')[:-1], strict=False):
            if mine != other:
                break
            shared += 1
        # All of the info's folder must be shared, else it belongs to a neighbor.
        if shared == len(topic.strip('/').split('/')) - 1 and shared > best_shared:
            best, best_shared = topic, shared
    return best


def _one(
    kinds: Mapping[str, str],
    inputs: Mapping[str, str],
    named: str,
    kind: str,
    option: str,
    bag: str,
) -> str | None:
    if named:
        if kinds.get(named) != kind:
            raise SpanvlaError(f'{option} {named}: {bag} has no {kind} topic of that name')
        return named
    found = sorted(topic for topic, its_kind in inputs.items() if its_kind == kind)
    if len(found) > 1:
        raise SpanvlaError(
            f'{bag}: {len(found)} topics of {kind} ({", ".join(found)}); choose with {option}'
        )
    return found[0] if found else None


def messages_in_order(bag: Bag, topics: Topics) -> Iterator[tuple[str, Any]]:
    """`(topic, message)` by time of reception; a `MessageError` stands for unreadable bytes.

    Messages received at the same instant come with route and camera_info first, then odometry,
    then pictures: a planner on the road has the ego pose of an instant before it has decoded its
    picture.
    """
    first = {topic: 0 for topic in (topics.route, *topics.infos.values()) if topic}
    rank = {topics.odometry: 1, **dict.fromkeys(topics.images.values(), 2), **first}
    wanted = [connection for connection in bag.connections if connection.topic in rank]
    held: list[tuple[int, Connection, bytes]] = []
    held_ns = None
    for connection, received_ns, raw in bag.messages(wanted):
        if received_ns != held_ns:
            yield from _deserialized(bag, held)
            held, held_ns = [], received_ns
        held.append((rank[connection.topic], connection, raw))
    yield from _deserialized(bag, held)


def _deserialized(
    bag: Bag, held: list[tuple[int, Connection, bytes]]
) -> Iterator[tuple[str, Any]]:
    for _, connection, raw in sorted(held, key=lambda item: item[0]):
        try:
            message = bag.deserialize(raw, connection.msgtype)
        except SpanvlaError as error:
            message = MessageError(str(error))
        yield connection.topic, message


def static_transforms(bag: Bag) -> dict[tuple[str, str], Float64[np.ndarray, '3']]:
    """Plane poses of child frames in parent frames out of `/tf_static`."""
    found = {}
    wanted = [
        connection
        for connection in bag.connections
        if connection.msgtype == TRANSFORMS and connection.topic.endswith('tf_static')
    ]
    for _, _, _, message in bag.read(wanted):
        for item in message.transforms:
            t, q = item.transform.translation, item.transform.rotation
            yaw = math.atan2(2.0 * (q.w * q.z + q.x * q.y), 1.0 - 2.0 * (q.y**2 + q.z**2))
            found[(item.header.frame_id, item.child_frame_id)] = np.array([t.x, t.y, yaw])
    return found
