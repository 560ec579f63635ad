"""NAVSIM's logs: frames at 2 Hz, as the data set OpenScene holds them.

A log is a pickled list of mappings, one a frame. Keys that are read: `token`, `timestamp`,
`log_name`, `map_location`, `roadblock_ids`, `traffic_lights` (lane connector, red or not),
`ego2global_translation`, `ego2global_rotation` (w x y z), `ego_dynamic_state` (vx vy ax ay),
`driving_command` (left, straight, right, unknown), `anns` (`gt_boxes` x y z length width height
yaw, `gt_names`, `gt_velocity_3d`, `track_tokens`), `cams` (`data_path`, `cam_intrinsic`,
`distortion`, `sensor2lidar_rotation`, `sensor2lidar_translation`). As in NAVSIM the frame of boxes
and cameras is taken for that of the rear axle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from transforms3d.quaternions import quat2mat

from spanvla_ros.geometry import world_from_local
from spanvla_ros.scoring.scene import AGENT_KINDS, STATIC_KINDS
from spanvla_ros.training.navsim.pickles import read_pickle
from spanvla_ros.types import (
    SceneAgent,
    SceneEgo,
    SceneLight,
    SpanvlaError,
)

FRAME_S = 0.5
HISTORY_FRAMES, FUTURE_FRAMES = 4, 10
# `unknown` and `straight` both: NAVSIM's straight is also that of an open road.
_COMMANDS = ('left', 'follow', 'right', 'follow')
_HEIGHT_M = 1.7


@dataclass(frozen=True)
class LogCamera:
    """One picture of a frame: its file below the sensor folder, lens and mount."""

    file: str
    intrinsic: Float64[np.ndarray, '3 3']
    distortion: tuple[float, ...]
    place_m: Float64[np.ndarray, '3']
    base_from_optical: Float64[np.ndarray, '3 3']


@dataclass(frozen=True)
class LogBox:
    """One annotated object: `state` x, y, yaw, vx, vy in the world."""

    track: str
    kind: str
    length_m: float
    width_m: float
    height_m: float
    state: Float64[np.ndarray, '5']


@dataclass(frozen=True)
class LogFrame:
    """One frame of a log."""

    token: str
    stamp_us: int
    log_name: str
    map_name: str
    ego: SceneEgo
    command: str
    roadblocks: tuple[str, ...]
    red: tuple[str, ...]
    boxes: tuple[LogBox, ...]
    cameras: dict[str, LogCamera]


def read_log(path: Path) -> list[LogFrame]:
    """All frames of one log.

    Raises:
        SpanvlaError: the file is no log, naming the frame and the key.
    """
    raw = read_pickle(path)
    if not isinstance(raw, list) or not raw:
        raise SpanvlaError(f'{path}: is no list of frames; name a log of NAVSIM')
    return [_frame_or_fault(entry, f'{path}: frame {number}') for number, entry in enumerate(raw)]


def _frame_or_fault(raw: object, where: str) -> LogFrame:
    try:
        return _frame(raw)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        words = f'{type(error).__name__} {error}'
        raise SpanvlaError(f'{where} is not as NAVSIM lays it out ({words:.120})') from error


def windows(frames: Sequence[LogFrame]) -> Iterator[Sequence[LogFrame]]:
    """Each run of frames with a past, a future and a route; the present is number 3."""
    size = HISTORY_FRAMES + FUTURE_FRAMES
    for first in range(len(frames) - size + 1):
        run = frames[first : first + size]
        steps = np.diff([frame.stamp_us for frame in run]) * 1e-6
        whole = bool(np.abs(steps - FRAME_S).max() < 0.1)
        if run[HISTORY_FRAMES - 1].roadblocks and whole and run[0].log_name == run[-1].log_name:
            yield run


def agents_of(run: Sequence[LogFrame]) -> tuple[SceneAgent, ...]:
    """Everything annotated at the present and after it, by track."""
    seen: dict[str, list[tuple[float, LogBox]]] = {}
    for number, frame in enumerate(run[HISTORY_FRAMES - 1 :]):
        for box in frame.boxes:
            seen.setdefault(box.track, []).append((FRAME_S * number, box))
    return tuple(
        SceneAgent(
            track,
            found[0][1].kind,
            found[0][1].length_m,
            found[0][1].width_m,
            found[0][1].height_m,
            np.array([time_s for time_s, _ in found]),
            np.stack([box.state for _, box in found]),
        )
        for track, found in seen.items()
    )


def red_lights_of(run: Sequence[LogFrame]) -> tuple[SceneLight, ...]:
    """Red phases by lane connector; a color holds until the next frame."""
    phases = []
    ahead = run[HISTORY_FRAMES - 1 :]
    for lane in sorted({lane for frame in ahead for lane in frame.red}):
        since: float | None = None
        for number, frame in enumerate(ahead):
            red = lane in frame.red
            if red and since is None:
                since = FRAME_S * number
            if since is not None and not red:
                phases.append(SceneLight(lane, since, FRAME_S * number - 1e-3))
                since = None
        if since is not None:
            phases.append(SceneLight(lane, since, FRAME_S * len(ahead)))
    return tuple(phases)


def _frame(raw: Any) -> LogFrame:
    turn = quat2mat([float(value) for value in raw['ego2global_rotation']])
    place = [float(value) for value in raw['ego2global_translation']]
    motion = [float(value) for value in raw['ego_dynamic_state']]
    pose = np.array([place[0], place[1], math.atan2(turn[1, 0], turn[0, 0])])
    if not np.isfinite([*pose, *motion]).all():
        raise ValueError('ego is not finite')
    ego = SceneEgo(float(pose[0]), float(pose[1]), float(pose[2]), *motion[:4])
    command = int(np.argmax(np.asarray(raw['driving_command'], dtype=np.float64)))
    lights = raw.get('traffic_lights') or []
    return LogFrame(
        token=str(raw['token']),
        stamp_us=int(raw['timestamp']),
        log_name=str(raw['log_name']),
        map_name=str(raw['map_location']),
        ego=ego,
        command=_COMMANDS[command],
        roadblocks=tuple(str(name) for name in raw['roadblock_ids']),
        red=tuple(sorted({str(lane) for lane, red in lights if red})),
        boxes=tuple(_boxes(raw['anns'], pose)),
        cameras={str(name).lower(): _camera(one) for name, one in raw.get('cams', {}).items()},
    )


def _boxes(raw: Any, ego: Float64[np.ndarray, '3']) -> Iterator[LogBox]:
    boxes = np.asarray(raw['gt_boxes'], dtype=np.float64).reshape(-1, 7)
    speeds = np.asarray(raw['gt_velocity_3d'], dtype=np.float64).reshape(len(boxes), 3)
    names, tracks = list(raw['gt_names']), list(raw['track_tokens'])
    if not len(boxes) == len(names) == len(tracks):
        raise ValueError(f'{len(boxes)} boxes, {len(names)} names, {len(tracks)} tracks')
    cos, sin = math.cos(ego[2]), math.sin(ego[2])
    for box, speed, name, track in zip(boxes, speeds, names, tracks, strict=True):
        if str(name) not in AGENT_KINDS + STATIC_KINDS:
            raise ValueError(f'an object of kind {name!r}')
        pose = world_from_local(ego, box[[0, 1, 6]])
        moves = str(name) in AGENT_KINDS and np.isfinite(speed[:2]).all()
        vx, vy = (speed[0], speed[1]) if moves else (0.0, 0.0)
        state = np.array([*pose, cos * vx - sin * vy, sin * vx + cos * vy])
        height = float(box[5]) or _HEIGHT_M
        yield LogBox(str(track), str(name), float(box[3]), float(box[4]), height, state)


def _camera(raw: Any) -> LogCamera:
    return LogCamera(
        str(raw['data_path']),
        np.asarray(raw['cam_intrinsic'], dtype=np.float64).reshape(3, 3),
        tuple(float(value) for value in np.asarray(raw['distortion']).ravel()),
        np.asarray(raw['sensor2lidar_translation'], dtype=np.float64).reshape(3),
        np.asarray(raw['sensor2lidar_rotation'], dtype=np.float64).reshape(3, 3),
    )
