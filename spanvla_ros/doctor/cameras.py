"""Which camera is swapped, flipped or mis-sized, and whether the motion is left-handed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from spanvla_ros.doctor.findings import Finding, found
from spanvla_ros.doctor.odometry import Motion, fit_route, motion_of
from spanvla_ros.doctor.rig import Camera, Rig
from spanvla_ros.doctor.sight import Hypothesis, Mount, Score, Tracks, joined, score, track
from spanvla_ros.geometry import local_from_world
from spanvla_ros.messages import Intrinsics

SCALES = (0.5, 0.6, 0.7, 0.8, 1.25, 1.45, 1.7, 2.0)
FEWEST_TRACKS = 25
MARGIN = 0.12
STRONG = 0.25
STRONG_SCALE = 0.15
MORE_OBEY = 0.08
NOTHING = 0.05
MARGIN_OF_NOTHING = 0.08
ENOUGH = 0.5
SURE = 0.7
BLACK = 12.0
FLIPS = ('mirrored', 'turned')


@dataclass(frozen=True)
class Sight:
    """A camera with its tracks, its intrinsics at the size they were tracked in, its mount."""

    camera: Camera
    tracks: Tracks
    info: Intrinsics
    mount: Mount


def check_cameras(rig: Rig) -> list[Finding]:
    """Pictures against camera_info, against one another, and against the motion."""
    findings = [finding for camera in rig.cameras for finding in _pictures(camera, rig)]
    motion = motion_of(rig)
    if motion is None:
        return findings
    findings += [f for camera in rig.cameras for f in _frozen(camera, motion)]
    sights = [sight for camera in rig.cameras if (sight := look(camera, rig, motion)) is not None]
    left_handed = is_left_handed(sights)
    if len(sights) == 1 and left_handed and _route_reading(rig) == 'given':
        # One camera cannot tell a mirrored picture from a mirrored world; the route can.
        left_handed = False
    findings += _frames(rig, sights, left_handed=left_handed)
    findings += _mounts(sights, left_handed=left_handed)
    return findings


def _pictures(camera: Camera, rig: Rig) -> Iterator[Finding]:
    topic, info = camera.stream.topic.name, camera.info
    if info is None and camera.info_topic is None:
        yield found('camera_info_missing', f'{topic} has no camera_info')
    if info is not None and camera.size_px != (0, 0):
        width_px, height_px = camera.size_px
        if (info.width_px, info.height_px) != (width_px, height_px):
            yield found(
                'camera_size',
                f'{topic}: pictures are {width_px}x{height_px}, '
                f'camera_info says {info.width_px}x{info.height_px}',
            )
    if not camera.name:
        names = ', '.join(spec.name for spec in rig.specs)
        yield found('camera_unnamed', f'{topic} is none of {names} by its name', topic=topic,
                    name=rig.specs[0].name)  # fmt: skip
    if camera.pairs and camera.brightest < BLACK:
        yield found('picture_black', f'{topic}: no picture is brighter than {camera.brightest:.0f}'
                    ' of 255')  # fmt: skip


def _frozen(camera: Camera, motion: Motion) -> Iterator[Finding]:
    moving = [
        np.array_equal(first, second)
        for first_ns, first, second_ns, second in camera.pairs
        if motion.moves_at(first_ns * 1e-9) and motion.moves_at(second_ns * 1e-9)
    ]
    if len(moving) > 3 and np.mean(moving) > 0.5 and camera.brightest >= BLACK:
        yield found('picture_frozen', f'{camera.stream.topic.name}: the picture stands still '
                    'while the car moves')  # fmt: skip


def look(camera: Camera, rig: Rig, motion: Motion) -> Sight | None:
    """Track a camera's pictures; None where its mount is unknown or too little was seen."""
    mount = rig.mount_of(camera)
    if mount is None or not camera.pairs or camera.brightest < BLACK:
        return None
    parts = []
    for first_ns, first, second_ns, second in camera.pairs:
        begin_s, end_s = first_ns * 1e-9, second_ns * 1e-9
        if end_s - begin_s < 0.5 and motion.moves_at(begin_s) and motion.moves_at(end_s):
            moved = local_from_world(motion.pose_at(begin_s), motion.pose_at(end_s))
            parts.append(track(first, second, np.asarray(moved)))
    tracks = joined(parts)
    if tracks.count < FEWEST_TRACKS:
        return None
    height_px, width_px = camera.pairs[0][1].shape
    return Sight(camera, tracks, _intrinsics(camera, rig, width_px, height_px), mount)


def _intrinsics(camera: Camera, rig: Rig, width_px: int, height_px: int) -> Intrinsics:
    """Intrinsics at the size tracked in: of camera_info, else of the model's camera."""
    info = camera.info
    if info is None:
        spec = next((s for s in rig.specs if s.name == camera.name), rig.specs[0])
        focal = 0.5 * width_px / math.tan(math.radians(0.5 * spec.fov_deg))
        center = (0.5 * (width_px - 1), 0.5 * (height_px - 1))
        return Intrinsics(width_px, height_px, focal, focal, *center)
    x, y = width_px / info.width_px, height_px / info.height_px
    return Intrinsics(
        width_px,
        height_px,
        info.focal_x_px * x,
        info.focal_y_px * y,
        (info.center_x_px + 0.5) * x - 0.5,
        (info.center_y_px + 0.5) * y - 0.5,
    )


def value(result: Score) -> float:
    """One number for a score: obeying the geometry, and showing the ground where it should."""
    return 0.5 * (result.obeying + result.ground)


def _value(sight: Sight, mount: Mount, idea: Hypothesis) -> float:
    return value(score(sight.tracks, sight.info, mount, idea))


def is_left_handed(sights: list[Sight]) -> bool:
    """Whether what all cameras see fits the mirrored motion much better than the given one."""
    gains = []
    for sight in sights:
        idea = Hypothesis(sight.camera.name)
        given = _value(sight, sight.mount, idea)
        mirrored = _value(sight, sight.mount, replace(idea, left_handed=True))
        gains.append(mirrored - given)
    decided = [gain for gain in gains if abs(gain) > MARGIN]
    return bool(decided) and sum(gain > 0 for gain in decided) > 0.6 * len(decided)


def _route_reading(rig: Rig) -> str:
    fit = fit_route(rig)
    return '' if fit is None else fit.reading


def _frames(rig: Rig, sights: list[Sight], *, left_handed: bool) -> Iterator[Finding]:
    """A left-handed odometry frame, or a route that lies in another one."""
    name, reading = rig.odometry_topic, _route_reading(rig)
    fit = fit_route(rig)
    if left_handed:
        seen = f'{name}: the cameras see the car turn the other way'
        kind = 'frame_ned' if reading == 'swapped' else 'frame_left_handed'
        yield found(kind, seen)
    elif fit is not None and reading in ('mirrored', 'swapped'):
        where = f'{fit.given_m:.0f} m from the route, {reading} it is on it'
        if sights:
            yield found('route_mirrored', f'the driven path is {where}')
        else:
            kind = 'frame_ned' if reading == 'swapped' else 'frame_left_handed'
            yield found(kind, f'{name}: the driven path is {where}')
    elif fit is not None and not reading and fit.given_m > 25.0:
        yield found('route_far', f'the driven path is {fit.given_m:.0f} m from the route')


def _mounts(sights: list[Sight], *, left_handed: bool) -> Iterator[Finding]:
    """What each camera is, if not what it is said to be."""
    best: dict[str, tuple[Sight, Hypothesis]] = {}
    for index, sight in enumerate(sights):
        idea = _explain(sight, index, sights, left_handed=left_handed)
        if idea is not None:
            best[str(index)] = (sight, idea)
    told: set[tuple[str, ...]] = set()
    for number, (sight, idea) in best.items():
        partner = best.get(idea.mount)
        if idea.mount != number and partner is not None and partner[1].mount == number:
            pair = tuple(sorted((number, idea.mount)))
            if pair not in told:
                told.add(pair)
                names = [s.camera.stream.topic.name for s in (sight, partner[0])]
                yield found('cameras_swapped', f'{names[0]} and {names[1]} see what the other '
                            'should', a=names[0], b=names[1])  # fmt: skip
            continue
        place = sights[int(idea.mount)].mount
        taken = _value(sight, place, idea)
        yield _single(sight, _without_partner(sight, number, idea, taken, left_handed=left_handed))


def _without_partner(
    sight: Sight, number: str, idea: Hypothesis, taken: float, *, left_handed: bool
) -> Hypothesis:
    """A camera alone that seems to sit where another does: rather its picture is flipped.

    The place is taken, by a camera that is right there; only where that place explains the
    picture well and no flip does is it the better story.
    """
    if idea.mount == number or idea.flip != 'none':
        return idea
    flips = [Hypothesis(number, flip, left_handed=left_handed) for flip in FLIPS]
    values = [_value(sight, sight.mount, flipped) for flipped in flips]
    best = max(values)
    given = _value(sight, sight.mount, Hypothesis(number, left_handed=left_handed))
    weak = taken < ENOUGH and given < NOTHING and best > given + MARGIN_OF_NOTHING
    return flips[values.index(best)] if best > SURE or weak else idea


def _single(sight: Sight, idea: Hypothesis) -> Finding:
    topic = sight.camera.stream.topic.name
    if idea.flip == 'mirrored':
        return found('camera_mirrored', f'{topic}: the picture moves as in a mirror')
    if idea.flip == 'turned':
        return found('camera_upside_down', f'{topic}: the picture moves as if upside down')
    if idea.scale != 1.0:
        return found(
            'camera_scale',
            f'{topic}: the ground moves as seen with {idea.scale:.2f} times the focal length, '
            f'or from {1.0 / idea.scale:.2f} times the height',
        )
    return found('camera_mount', f'{topic}: the picture does not move as seen from its mount')


def _explain(
    sight: Sight, number: int, sights: list[Sight], *, left_handed: bool
) -> Hypothesis | None:
    """The hypothesis that explains a camera better than its own; None where its own will do."""
    own = Hypothesis(str(number), left_handed=left_handed)
    given = _value(sight, sight.mount, own)
    ideas = [(replace(own, flip=flip), sight.mount) for flip in FLIPS]
    # A street between parked cars shows little ground, so the share that moves like it says
    # nothing alone: a wrong focal length must break the geometry of the other tracks as well.
    obeying = score(sight.tracks, sight.info, sight.mount, own).obeying
    for scale in SCALES:
        idea = replace(own, scale=scale)
        gained = score(sight.tracks, sight.info, sight.mount, idea).obeying - obeying
        if gained > MORE_OBEY:
            ideas.append((idea, sight.mount))
    for other, neighbour in enumerate(sights):
        if other != number:
            ideas.append((replace(own, mount=str(other)), neighbour.mount))
    values = [(_value(sight, mount, idea), idea) for idea, mount in ideas]
    top, first = max(values, key=lambda pair: pair[0])
    margin = STRONG if first.scale == 1.0 else STRONG_SCALE
    # Where its own mount explains nothing at all, less of another explanation is enough.
    nothing = given < NOTHING and top > given + MARGIN_OF_NOTHING
    if not nothing and (top - given < margin or top < ENOUGH):
        return None
    # Of explanations that do equally well, another's mount first: its partner confirms or not.
    close = [idea for found_value, idea in values if found_value > top - 0.04]
    return next((idea for idea in close if idea.mount != own.mount), close[0])
