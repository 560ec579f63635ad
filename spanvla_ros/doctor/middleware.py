"""What the environment says about DDS: middleware, shared memory, domain, discovery.

Fast DDS's defaults are those of 2.14 and 3.2, the versions of Jazzy and Kilted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from spanvla_ros.doctor.findings import Finding, found
from spanvla_ros.model.checkpoint import shipped_model_dir
from spanvla_ros.types import SpanvlaError

FAST_DDS = ('', 'rmw_fastrtps_cpp', 'rmw_fastrtps_dynamic_cpp')
PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
DEFAULT_SEGMENT_BYTES = 512 * 1024
# A best-effort picture above this is mostly lost in the default segment (measured at 20 Hz).
DEFAULT_PICTURE_BYTES = 400_000
# LARGE_DATA sends pictures over TCP; its own limit is far above any picture.
LARGE_DATA_BYTES = 1 << 30
HIGHEST_DOMAIN = 232
HIGHEST_QUIET_DOMAIN = 101


def profile_path() -> Path:
    """The shipped Fast DDS profile with a large shared-memory segment."""
    try:
        return shipped_model_dir().parents[1] / 'config' / 'fastdds_shm.xml'
    except SpanvlaError:
        return Path('config') / 'fastdds_shm.xml'


def uses_fast_dds(environment: Mapping[str, str]) -> bool:
    """Whether the middleware is Fast DDS, the default of every supported ROS."""
    return environment.get('RMW_IMPLEMENTATION', '') in FAST_DDS


def _profile(environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in PROFILE_VARIABLES if environment.get(name)), '')


def segment_bytes(environment: Mapping[str, str]) -> int | None:
    """Size of the shared-memory segment the environment asks Fast DDS for.

    Returns:
        None where pictures do not go through a Fast DDS segment of known size.
    """
    if not uses_fast_dds(environment):
        return None
    profile = _profile(environment)
    if not profile:
        transports = environment.get('FASTDDS_BUILTIN_TRANSPORTS', '').upper()
        if transports.startswith('LARGE_DATA'):
            return LARGE_DATA_BYTES
        return DEFAULT_SEGMENT_BYTES
    try:
        root = ElementTree.parse(profile).getroot()
    except (OSError, ElementTree.ParseError):
        return DEFAULT_SEGMENT_BYTES
    sizes = [entry for entry in root.iter() if entry.tag.rpartition('}')[2] == 'segment_size']
    texts = [(entry.text or '').strip() for entry in sizes]
    values = [int(text) for text in texts if text.isdigit()]
    return max(values, default=DEFAULT_SEGMENT_BYTES)


def largest_picture_bytes(environment: Mapping[str, str]) -> int | None:
    """The largest message that best effort carries without loss, None where that is unknown."""
    segment = segment_bytes(environment)
    if segment is None:
        return None
    # Four pictures in flight: a reader that is a little late must not lose one.
    return DEFAULT_PICTURE_BYTES if segment <= DEFAULT_SEGMENT_BYTES else segment // 4


def check_middleware(
    environment: Mapping[str, str], shm: Path = Path('/dev/shm')
) -> Iterator[Finding]:
    """Middleware, Fast DDS profile, and the room behind it."""
    name = environment.get('RMW_IMPLEMENTATION', '')
    prefixes = [p for p in environment.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    index = 'share/ament_index/resource_index/packages'
    if name and prefixes and not any((Path(p) / index / name).exists() for p in prefixes):
        yield found(
            'rmw_missing',
            f'RMW_IMPLEMENTATION={name} is not installed',
            rmw=name.replace('_', '-'),
        )
    if not uses_fast_dds(environment):
        yield found('rmw_other', f'the middleware is {name}', rmw=name)
        return
    profile = _profile(environment)
    if not profile:
        if not environment.get('FASTDDS_BUILTIN_TRANSPORTS'):
            yield found('dds_profile_unset', 'no Fast DDS profile is set', profile=profile_path())
        return
    try:
        ElementTree.parse(profile)
    except (OSError, ElementTree.ParseError) as error:
        yield found('dds_profile_missing', f'{profile}: {error}', profile=profile_path())
        return
    asked = segment_bytes(environment) or 0
    if shm.is_dir():
        info = os.statvfs(shm)
        room = info.f_blocks * info.f_frsize
        if room < asked:
            yield found(
                'shm_small', f'{shm} holds {room >> 20} MB, a segment takes {asked >> 20} MB'
            )


def check_discovery(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether nodes will find one another."""
    domain = environment.get('ROS_DOMAIN_ID', '')
    if domain and not (re.fullmatch(r'\d{1,3}', domain) and int(domain) <= HIGHEST_DOMAIN):
        yield found('domain_invalid', f'ROS_DOMAIN_ID is {domain!r}')
    elif domain and int(domain) > HIGHEST_QUIET_DOMAIN:
        yield found('domain_high', f'ROS_DOMAIN_ID is {domain}')
    reach = environment.get('ROS_AUTOMATIC_DISCOVERY_RANGE', '').upper()
    if reach == 'OFF':
        yield found('discovery_off', 'ROS_AUTOMATIC_DISCOVERY_RANGE is OFF')
    elif reach == 'LOCALHOST' or environment.get('ROS_LOCALHOST_ONLY') == '1':
        yield found('discovery_local', 'only nodes of this machine are seen')
    servers = [
        name for name in ('ROS_DISCOVERY_SERVER', 'ROS_STATIC_PEERS') if environment.get(name)
    ]
    if servers:
        yield found('discovery_server', f'{" and ".join(servers)} set')
