"""The reasoning grammar: critical components, driving decision, trace; and its checker.

Paper: SpanVLA, mReasoning (Figs. 3 and S2): critical components -> decision from a predefined
action space -> short trace. The rules that read a decision off a trajectory follow AutoVLA's
action hint (stop 0.3 m/s, constant 0.8 m/s, lane change 4 m full, 2 m begun); here a stop is
taken at 0.5 m/s, because a generated trajectory wavers more than a driven one, and lateral offset
is measured against the arc that joins start and end heading and counts only where the road runs
straight on (less than 0.1 rad of turn), so that a curve is no lane change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import interpolate_poses

LONGITUDINAL = ('accelerate', 'maintain', 'decelerate', 'stop')
LATERAL = ('keep lane', 'turn left', 'turn right', 'change left', 'change right')
KINDS = (
    'lead vehicle',
    'pedestrian',
    'red light',
    'green light',
    'left turn',
    'right turn',
    'curve',
    'stop sign',
    'construction zone',
    'parked car',
    'lane change',
    'oncoming car',
    'traffic',
    'roundabout',
)
BEHAVIOURS = (
    'stopped', 'braking', 'steady', 'crossing', 'waiting', 'ahead', 'left', 'right', 'merging',
)  # fmt: skip
CLEAR_ROAD = 'road clear'
MAX_COMPONENTS = 3
DISTANCE_STEP_M = 5

STOP_SPEED_MPS = 0.5
SPEED_DEAD_BAND_MPS = 0.8
SPEED_DIP_MPS = 2.0
TURN_RAD = 0.52
TURN_COMMANDED_RAD = 0.26
LANE_CHANGE_M = 2.0
LANE_CHANGE_MAX_TURN_RAD = 0.1
LATERAL_MIN_DISTANCE_M = 3.0
SPEED_WINDOW_S = 0.5


@dataclass(frozen=True)
class Component:
    """One critical component: what, how far ahead along the path, and what it does."""

    kind: str
    distance_m: float
    behaviour: str

    def __post_init__(self) -> None:
        """Refuse a kind or behaviour outside the grammar."""
        if self.kind not in KINDS or self.behaviour not in BEHAVIOURS:
            raise ValueError(f'{self.kind!r} {self.behaviour!r} is not in the reasoning grammar')


@dataclass(frozen=True)
class Decision:
    """A driving decision (meta action): one longitudinal and one lateral word."""

    longitudinal: str
    lateral: str

    def __post_init__(self) -> None:
        """Refuse words outside the action space."""
        if self.longitudinal not in LONGITUDINAL or self.lateral not in LATERAL:
            raise ValueError(f'{self.longitudinal!r}, {self.lateral!r} is not a decision')

    def __str__(self) -> str:
        return f'{self.longitudinal} , {self.lateral}'


def meta_action(
    times_s: Float64[np.ndarray, 't'],
    poses: Float64[np.ndarray, 't 3'],
    speed_mps: float,
    command: str = 'follow',
) -> Decision:
    """The decision a trajectory carries out.

    Args:
        times_s: rising times after now.
        poses: poses in `base_link` at those times, the present (origin) excluded.
        speed_mps: present speed.
        command: with `left` or `right` a turn that has only begun counts as one.
    """
    along, way = _with_present(times_s, poses)
    return Decision(_longitudinal(along, way, speed_mps), _lateral(way, command))


def _with_present(
    times_s: Float64[np.ndarray, 't'], poses: Float64[np.ndarray, 't 3']
) -> tuple[Float64[np.ndarray, ' n'], Float64[np.ndarray, 'n 3']]:
    return np.concatenate([[0.0], times_s]), np.concatenate([np.zeros((1, 3)), poses])


def _longitudinal(
    times_s: Float64[np.ndarray, 't'],
    poses: Float64[np.ndarray, 't 3'],
    speed_mps: float,
    stop_mps: float = STOP_SPEED_MPS,
) -> str:
    windows = max(1, round(float(times_s[-1]) / SPEED_WINDOW_S))
    grid_s = np.linspace(0.0, times_s[-1], windows + 1)
    sampled = interpolate_poses(times_s, poses, grid_s)
    step = np.diff(sampled[:, :2], axis=0)
    yaw = sampled[:-1, 2]
    speeds = (np.cos(yaw) * step[:, 0] + np.sin(yaw) * step[:, 1]) / np.diff(grid_s)
    final = float(speeds[-1])
    if final < stop_mps:
        return 'stop'
    change = final - speed_mps
    if change < -SPEED_DEAD_BAND_MPS or speed_mps - float(speeds.min()) > SPEED_DIP_MPS:
        return 'decelerate'
    if change > SPEED_DEAD_BAND_MPS:
        return 'accelerate'
    return 'maintain'


def _lateral(poses: Float64[np.ndarray, 't 3'], command: str) -> str:
    distance = float(np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1).sum())
    if distance < LATERAL_MIN_DISTANCE_M:
        return 'keep lane'
    turn = float(np.unwrap(poses[:, 2])[-1])
    if turn > TURN_RAD or (command == 'left' and turn > TURN_COMMANDED_RAD):
        return 'turn left'
    if turn < -TURN_RAD or (command == 'right' and turn < -TURN_COMMANDED_RAD):
        return 'turn right'
    if abs(turn) < LANE_CHANGE_MAX_TURN_RAD:
        offset = float(poses[-1, 1] - poses[-1, 0] * np.tan(0.5 * turn))
        if abs(offset) > LANE_CHANGE_M:
            return 'change left' if offset > 0 else 'change right'
    return 'keep lane'


def write_reasoning(components: Sequence[Component], decision: Decision) -> str:
    """The rule-written reasoning of a scene, at most 28 words.

    Args:
        components: critical components in any order; the nearest three are kept, nearest first.
        decision: what the driver does.
    """
    nearest = sorted(components, key=lambda c: c.distance_m)[:MAX_COMPONENTS]
    seen = ' , '.join(f'{c.kind} {_rounded(c.distance_m)} m {c.behaviour}' for c in nearest)
    return f'{seen or CLEAR_ROAD} ; {decision} ; because {_cause(nearest, decision)}'


def _rounded(distance_m: float) -> int:
    return max(0, min(95, DISTANCE_STEP_M * round(distance_m / DISTANCE_STEP_M)))


def _cause(nearest: Sequence[Component], decision: Decision) -> str:
    for component in nearest:
        if _explains(component, decision):
            return f'{component.kind} {component.behaviour}'
    return CLEAR_ROAD


def _explains(component: Component, decision: Decision) -> bool:
    if decision.longitudinal in ('stop', 'decelerate'):
        hazard = (component.kind, component.behaviour) != ('pedestrian', 'waiting')
        return hazard and component.kind != 'green light'
    if decision.lateral == 'turn left':
        return component.kind in ('left turn', 'roundabout') or component.behaviour == 'left'
    if decision.lateral == 'turn right':
        return component.kind in ('right turn', 'roundabout') or component.behaviour == 'right'
    if decision.lateral.startswith('change'):
        return component.kind in ('lane change', 'construction zone', 'parked car')
    if decision.longitudinal == 'accelerate':
        return component.kind == 'green light'
    return (component.kind, component.behaviour) == ('lead vehicle', 'steady')


_COMPONENT = re.compile(rf'\b({"|".join(KINDS)}) (\d+) m ({"|".join(BEHAVIOURS)})\b')
_DECISION = re.compile(
    rf'\b({"|".join(LONGITUDINAL)})\s*,\s*({"|".join(LATERAL)})\b',
)


def parse_decision(text: str) -> Decision | None:
    """The decision named in a reasoning text, or None where it holds none."""
    found = _DECISION.search(text)
    return Decision(found.group(1), found.group(2)) if found else None


def parse_components(text: str) -> tuple[Component, ...]:
    """The components a reasoning text lists, in its order."""
    listed = _COMPONENT.findall(text.partition(';')[0])
    return tuple(Component(kind, float(meters), does) for kind, meters, does in listed)


def retold(text: str, decision: Decision) -> str:
    """The reasoning of the same components with another decision, and the cause of that one."""
    return write_reasoning(parse_components(text), decision)


def agreement(
    text: str,
    times_s: Float64[np.ndarray, 't'],
    poses: Float64[np.ndarray, 't 3'],
    speed_mps: float,
    command: str = 'follow',
) -> bool | None:
    """Whether words and trajectory agree in both parts of the decision; None without a decision.

    Neighbouring words agree where the trajectory lies close to the border between them, so that
    a plan on a threshold does not flicker: the words are also compared with the decisions at a
    present speed half a dead band lower and higher, with a final speed within a factor of two of
    a stop's, and for a way that bends a third less or more.
    """
    said = parse_decision(text)
    if said is None:
        return None
    along, way = _with_present(times_s, poses)
    slack = 0.5 * SPEED_DEAD_BAND_MPS
    longitudinal = {
        _longitudinal(along, way, speed_mps + shift, STOP_SPEED_MPS * factor)
        for shift in (0.0, -slack, slack)
        for factor in (0.5, 1.0, 2.0)
    }
    lateral = {_lateral(way * [1.0, bend, bend], command) for bend in (0.75, 1.0, 1.33)}
    return said.longitudinal in longitudinal and said.lateral in lateral


def mirrored(text: str) -> str:
    """The same reasoning seen in a mirror: left and right exchanged."""
    swap = {'left': 'right', 'right': 'left'}
    return ' '.join(swap.get(word, word) for word in text.split(' '))
