"""Rates, stamps, clocks, QoS and sizes of the topics of a rig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from spanvla_ros.doctor.findings import BLOCK, INFO, Finding, found
from spanvla_ros.doctor.middleware import largest_picture_bytes, profile_path
from spanvla_ros.doctor.rig import CLOCK, Rig, Stream
from spanvla_ros.replay.bag import COMPRESSED, IMAGE, ODOMETRY, PATH

ODOMETRY_GOOD_HZ = 20.0
ODOMETRY_LOW_HZ = 8.0
# The guardian stops hard after 0.3 s without odometry.
ODOMETRY_BLOCK_HZ = 1.0 / 0.3
CAMERA_GOOD_HZ = 9.0
CAMERA_LOW_HZ = 5.0
LOST_SHARE = 0.08
SKEW_S = 0.2
AHEAD_S = 0.1


def check_streams(rig: Rig, environment: Mapping[str, str]) -> list[Finding]:
    """What stamps, sizes and offers say, without looking into pictures and poses."""
    findings = list(_presence(rig))
    for stream in rig.streams_of(ODOMETRY, IMAGE, COMPRESSED):
        findings += _stamps(stream)
        findings += _rate(stream)
    for stream in rig.streams.values():
        for sentence, count in stream.refused.most_common(3):
            findings.append(found('message_refused', f'{stream.topic.name}: {sentence} '
                                  f'({count} of {stream.count})'))  # fmt: skip
    findings += _clocks(rig)
    findings += _route_offers(rig)
    findings += _readers(rig)
    findings += _sizes(rig, environment)
    findings += _frames(rig)
    return findings


def _presence(rig: Rig) -> Iterator[Finding]:
    if not rig.cameras:
        yield found('camera_missing', 'no topic of sensor_msgs/Image or CompressedImage')
    odometry = rig.streams_of(ODOMETRY)
    if not odometry:
        yield found('odometry_missing', 'no topic of nav_msgs/Odometry')
    elif len(odometry) > 1:
        names = ', '.join(stream.topic.name for stream in odometry)
        yield found('odometry_several', f'several odometries ({names}); looked at '
                    f'{rig.odometry_topic}', topic=rig.odometry_topic)  # fmt: skip
    if not rig.streams_of(PATH):
        yield found('route_missing', 'no topic of nav_msgs/Path: the path check is off')
    for stream in rig.streams_of(ODOMETRY, IMAGE, COMPRESSED):
        if not stream.count:
            yield found('topic_silent', f'{stream.topic.name}: nothing came')


def _stamps(stream: Stream) -> Iterator[Finding]:
    stamps = np.array(stream.stamps_ns, dtype=np.int64)
    if not len(stamps):
        return
    name = stream.topic.name
    zeros = int((stamps == 0).sum())
    if zeros:
        yield found('stamps_zero', f'{name}: {zeros} of {len(stamps)} stamps are zero')
        return
    back = int((np.diff(stamps) < 0).sum())
    if back:
        yield found('stamps_order', f'{name}: {back} of {len(stamps)} stamps run backwards')
    same = int((np.diff(stamps) == 0).sum())
    if same > 0.05 * len(stamps):
        yield found('stamps_repeat', f'{name}: {same} of {len(stamps)} stamps repeat')


def rate_hz(stream: Stream) -> float | None:
    """Messages a second by reception, None for fewer than five."""
    if stream.count < 5:
        return None
    span_s = (max(stream.received_ns) - min(stream.received_ns)) * 1e-9
    return (stream.count - 1) / span_s if span_s > 0 else None


def _rate(stream: Stream) -> Iterator[Finding]:
    rate, name = rate_hz(stream), stream.topic.name
    if rate is None:
        return
    odometry = stream.topic.kind == ODOMETRY
    good, low = (
        (ODOMETRY_GOOD_HZ, ODOMETRY_LOW_HZ) if odometry else (CAMERA_GOOD_HZ, CAMERA_LOW_HZ)
    )
    if rate < good:
        severity = INFO if rate >= low else ''
        severity = BLOCK if odometry and rate < ODOMETRY_BLOCK_HZ else severity
        yield found('rate_low', f'{name}: {rate:.1f} Hz', severity=severity, hz=f'{good:.0f}')
    steps = np.diff(np.sort(stream.stamps_s))
    usual = float(np.median(steps))
    if usual > 0:
        lost = float(np.maximum(np.round(steps / usual) - 1.0, 0.0).sum())
        share = lost / (lost + stream.count)
        if share > LOST_SHARE:
            yield found('messages_lost', f'{name}: about {100 * share:.0f} % are missing between '
                        'the others')  # fmt: skip


def _clocks(rig: Rig) -> Iterator[Finding]:
    """Delays from stamp to reception: those of the cameras against that of the odometry."""
    odometry = rig.streams.get(rig.odometry_topic)
    if odometry is None or not odometry.count:
        return
    base_s = float(np.median(odometry.delay_s))
    for camera in rig.cameras:
        stream = camera.stream
        if stream.count < 5 or 0 in stream.stamps_ns:
            continue
        # A camera needs time to expose and send, but its stamp is never later than its arrival.
        skew_s = float(np.median(stream.delay_s)) - base_s
        if skew_s > SKEW_S or skew_s < -AHEAD_S:
            yield found('clock_skew', f'{stream.topic.name}: stamps lie {abs(skew_s):.2f} s '
                        f'{"behind" if skew_s > 0 else "ahead of"} those of '
                        f'{odometry.topic.name}')  # fmt: skip
    if rig.live and abs(base_s) > SKEW_S:
        yield found('clock_far', f'{odometry.topic.name}: stamps lie {base_s:.2f} s '
                    'behind the clock')  # fmt: skip
    clocks = rig.streams_of(CLOCK)
    if clocks and not rig.live:
        yield found('sim_time', 'the bag holds /clock: it was recorded from a simulator')


def _route_offers(rig: Rig) -> Iterator[Finding]:
    for stream in rig.streams_of(PATH):
        offers, name = stream.topic.offers, stream.topic.name
        if offers and not any(offer.reliable for offer in offers):
            yield found('qos_route', f'{name} is offered best effort, the nodes ask for reliable')
        elif offers and not any(offer.latched for offer in offers) and stream.count <= 2:
            yield found('route_not_latched', f'{name} came {stream.count} times and is volatile')


def _readers(rig: Rig) -> Iterator[Finding]:
    """On a running graph: requests that no publisher meets."""
    for stream in rig.streams.values():
        offers, readers = stream.topic.offers, stream.topic.readers
        for reader in readers:
            unmet = [
                word
                for word, asked, offered in (
                    ('reliable', reader.reliable, any(o.reliable for o in offers)),
                    ('transient local', reader.latched, any(o.latched for o in offers)),
                )
                if asked and offers and not offered
            ]
            if unmet and not (stream.topic.kind == PATH and unmet == ['transient local']):
                yield found('qos_mismatch', f'{stream.topic.name}: a subscription asks for '
                            f'{" and ".join(unmet)}, no publisher offers it')  # fmt: skip


def _sizes(rig: Rig, environment: Mapping[str, str]) -> Iterator[Finding]:
    largest = largest_picture_bytes(environment)
    if largest is None:
        return
    for stream in rig.streams_of(IMAGE, COMPRESSED):
        if stream.largest_bytes > largest:
            yield found(
                'picture_size_shm',
                f'{stream.topic.name}: {stream.largest_bytes / 1e6:.1f} MB a picture, '
                f'shared memory as set here carries {largest / 1e6:.1f} MB',
                profile=profile_path(),
            )


def _frames(rig: Rig) -> Iterator[Finding]:
    odometry, route = rig.streams.get(rig.odometry_topic), rig.streams.get(rig.route_topic)
    if odometry is None or not odometry.count:
        return
    if odometry.frame != 'odom':
        yield found('output_frame', f'{odometry.topic.name} is in {odometry.frame!r}',
                    frame=odometry.frame or 'odom')  # fmt: skip
    if odometry.child_frame not in ('base_link', ''):
        yield found('child_frame', f'{odometry.topic.name} is of {odometry.child_frame!r}')
    if route is None or route.frame == odometry.frame:
        return
    joined = {(parent, child) for child, (parent, _) in rig.transforms.items()}
    known = {(route.frame, odometry.frame), (odometry.frame, route.frame)} & joined
    yield found('route_frame', f'{route.topic.name} is in {route.frame!r}, odometry in '
                f'{odometry.frame!r}', severity=INFO if known else '',
                frame=odometry.frame)  # fmt: skip
