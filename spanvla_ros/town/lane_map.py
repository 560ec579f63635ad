"""A corridor as a lane map, in the words of `types.SceneMap`."""

from __future__ import annotations

import numpy as np

from spanvla_ros.geometry import world_from_local
from spanvla_ros.town.roads import (
    LANE_WIDTH_M,
    SHOULDER_M,
    Arm,
    Corridor,
    CrossSection,
    Junction,
)
from spanvla_ros.types import SceneLane, SceneMap, SceneRoadblock

HALF_M = LANE_WIDTH_M / 2


def build_map(corridor: Corridor, speed_limit_mps: float) -> SceneMap:
    """The corridor as a lane map: stretches, connectors through junctions, junction areas, arms.

    Roadblocks `f0, j0, f1, ..` lead along the corridor, `r..` and `k..` the other way; lane
    `<roadblock>_0` is the rightmost in driving direction; arms are `a<junction>_<arm>_out|in`.
    """
    blocks: list[SceneRoadblock] = []
    last = len(corridor.stretches) - 1
    for index, stretch in enumerate(corridor.stretches):
        forward = _forward_offsets(stretch.section)
        opposing = _opposing_offsets(stretch.section)
        turns = index < last and corridor.junctions[index].turn != 'straight'
        blocks.append(
            _block(corridor, f'f{index}', stretch.start_m, stretch.end_m, forward,
                   f'j{index}' if index < last else None, speed_limit_mps,
                   only=ego_lane(stretch.section) if turns else None)
        )  # fmt: skip
        blocks.append(
            _block(corridor, f'r{index}', stretch.start_m, stretch.end_m, opposing,
                   f'k{index - 1}' if index else None, speed_limit_mps, reverse=True)
        )  # fmt: skip
    for index, junction in enumerate(corridor.junctions):
        blocks.extend(_connectors(corridor, index, junction, speed_limit_mps))
        for number, arm in enumerate(junction.arms):
            blocks.extend(_arm_blocks(f'a{index}_{number}', arm, speed_limit_mps))
    return SceneMap(tuple(blocks), tuple(a for j in corridor.junctions for a in j.areas))


def route_ids(corridor: Corridor) -> tuple[str, ...]:
    """The roadblocks of the route, in order."""
    ids = ['f0']
    for index in range(len(corridor.junctions)):
        ids += [f'j{index}', f'f{index + 1}']
    return tuple(ids)


def ego_lane(section: CrossSection) -> int:
    """The ego lane's number in its roadblock, counted from the right."""
    return section.lanes_right


def _forward_offsets(section: CrossSection) -> list[float]:
    return [(lane - section.lanes_right) * LANE_WIDTH_M for lane in range(section.forward)]


def _opposing_offsets(section: CrossSection) -> list[float]:
    left = section.lanes_left + section.opposing
    return [(left - lane) * LANE_WIDTH_M for lane in range(section.opposing)]


def _block(
    corridor: Corridor,
    name: str,
    start_m: float,
    end_m: float,
    offsets: list[float],
    follower: str | None,
    limit_mps: float,
    *,
    reverse: bool = False,
    only: int | None = None,
) -> SceneRoadblock:
    s = np.linspace(start_m, end_m, max(2, round(end_m - start_m) + 1))
    lanes = []
    for number, offset in enumerate(offsets):
        onward = follower and (only is None or number == only)
        line = corridor.places(s, offset)[:, :2]
        lanes.append(
            SceneLane(
                f'{name}_{number}',
                line[::-1] if reverse else line,
                corridor.band(start_m, end_m, offset - HALF_M, offset + HALF_M),
                limit_mps,
                (f'{follower}_{number}',) if onward else (),
            )
        )
    low, high = min(offsets) - HALF_M, max(offsets) + HALF_M
    if reverse:
        high += SHOULDER_M
    else:
        low -= SHOULDER_M
    area = corridor.band(start_m, end_m, low, high)
    return SceneRoadblock(name, is_connector=False, polygon=area, lanes=tuple(lanes))


def _connectors(
    corridor: Corridor, index: int, junction: Junction, limit_mps: float
) -> list[SceneRoadblock]:
    """The ways through a junction along the corridor; where it turns, one lane's only."""
    before, after = corridor.stretches[index].section, corridor.stretches[index + 1].section
    starts, goals = _forward_offsets(before), _forward_offsets(after)
    shift = after.lanes_right - before.lanes_right
    lanes = []
    for number, start in enumerate(starts):
        if junction.turn == 'straight' or number == ego_lane(before):
            goal = min(max(number + shift, 0), len(goals) - 1)
            way = (start, goals[goal], f'f{index + 1}_{goal}')
            lanes.append(_connector(corridor, junction, f'j{index}_{number}', way, limit_mps))
    forward = _side_by_side(f'j{index}', lanes)
    starts, goals = _opposing_offsets(after), _opposing_offsets(before)
    lanes = []
    for number, start in enumerate(starts):
        goal = min(number, len(goals) - 1)
        way = (goals[goal], start, f'r{index}_{goal}')
        lanes.append(
            _connector(corridor, junction, f'k{index}_{number}', way, limit_mps, reverse=True)
        )
    return [forward, _side_by_side(f'k{index}', lanes)]


def _connector(
    corridor: Corridor,
    junction: Junction,
    name: str,
    way: tuple[float, float, str],
    limit_mps: float,
    *,
    reverse: bool = False,
) -> SceneLane:
    """A lane between two offsets, before and after the junction along the corridor."""
    offset_before, offset_after, follower = way
    s = np.linspace(junction.start_m, junction.end_m, round(junction.end_m - junction.start_m) + 2)
    d = offset_before + (offset_after - offset_before) * np.linspace(0.0, 1.0, len(s))
    line = corridor.places(s, d)[:, :2]
    right, left = (corridor.places(s, d + side)[:, :2] for side in (-HALF_M, HALF_M))
    polygon = np.concatenate([right, left[::-1]])
    return SceneLane(name, line[::-1] if reverse else line, polygon, limit_mps, (follower,))


def _side_by_side(name: str, lanes: list[SceneLane]) -> SceneRoadblock:
    """A connector around its lanes: the right side of one outermost, the left of the other."""
    points = len(lanes[0].polygon) // 2
    first, last = lanes[0], lanes[-1]
    if name.startswith('k'):
        first, last = last, first
    outline = np.concatenate([first.polygon[:points], last.polygon[points:]])
    return SceneRoadblock(name, is_connector=True, polygon=outline, lanes=tuple(lanes))


def _arm_blocks(name: str, arm: Arm, limit_mps: float) -> list[SceneRoadblock]:
    made = []
    for kind, count in (('out', arm.lanes_out), ('in', arm.lanes_in)):
        lanes = []
        sign = -1.0 if kind == 'out' else 1.0
        for number in range(count):
            outer = count - number
            d = sign * (outer - 0.5) * LANE_WIDTH_M
            line = world_from_local(arm.pose, [[0.0, d], [arm.length_m, d]])
            lanes.append(
                SceneLane(
                    f'{name}_{kind}_{number}',
                    line if kind == 'out' else line[::-1],
                    arm.strip(d - HALF_M, d + HALF_M),
                    limit_mps,
                    (),
                )
            )
        edge = arm.edges_m[0] if kind == 'out' else arm.edges_m[1]
        strip = arm.strip(min(edge, 0.0), max(edge, 0.0))
        made.append(
            SceneRoadblock(f'{name}_{kind}', is_connector=False, polygon=strip, lanes=tuple(lanes))
        )
    return made
