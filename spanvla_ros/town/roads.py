"""Road corridors: a lane to drive on and all that lies beside it.

A corridor is a sequence of stretches and junctions along the ego lane's center line. Places are
given in corridor coordinates: `s` meters along that line, `d` meters to its left. Traffic keeps
right. Curvature changes in linear ramps, so the line can be driven by a steered vehicle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from spanvla_ros.geometry import world_from_local
from spanvla_ros.town.roundabouts import IN_M, OUT_M, Ring, ring_curvature

SPACING_M = 0.5
LANE_WIDTH_M = 3.5
SHOULDER_M = 0.4
STOP_LINE_BEFORE_M = 4.5
CROSSWALK_BEFORE_M = (3.8, 1.0)
CLEARANCE_M = 26.0
ARM_CLEARANCE_M = 13.0


@dataclass(frozen=True)
class CrossSection:
    """Lanes beside the ego lane: same direction to its right and left, then opposing ones."""

    lanes_right: int = 0
    lanes_left: int = 0
    opposing: int = 1

    @property
    def right_m(self) -> float:
        """Offset of the road's right edge."""
        return -(self.lanes_right + 0.5) * LANE_WIDTH_M - SHOULDER_M

    @property
    def divider_m(self) -> float:
        """Offset of the line between the two directions."""
        return (self.lanes_left + 0.5) * LANE_WIDTH_M

    @property
    def left_m(self) -> float:
        """Offset of the road's left edge."""
        return self.divider_m + self.opposing * LANE_WIDTH_M + SHOULDER_M

    @property
    def forward(self) -> int:
        """Number of lanes in the ego's direction."""
        return self.lanes_right + 1 + self.lanes_left


@dataclass(frozen=True)
class Bend:
    """Curvature `per_m` (left positive) from `start_m` of a stretch, with ramps at both ends."""

    start_m: float
    length_m: float
    per_m: float
    ramp_m: float = 10.0


@dataclass(frozen=True)
class StretchPlan:
    """A piece of road between junctions, still to be laid out."""

    length_m: float
    section: CrossSection
    bends: tuple[Bend, ...] = ()


@dataclass(frozen=True)
class JunctionPlan:
    """A junction still to be laid out; `cross_lanes` per direction where the ego goes straight.

    The arms: where the ego turns, one straight on and one opposite its exit; where it goes
    straight, one to the left (`straight_arm`) and one to the right (`side_arm`). With `ring_m`
    it is a roundabout of that radius, one lane wide, `radius_m` the way onto it.
    """

    turn: str = 'straight'
    signal: bool = False
    radius_m: float = 10.0
    cross_lanes: int = 1
    arm_m: float = 50.0
    straight_arm: bool = True
    side_arm: bool = True
    ring_m: float = 0.0


@dataclass(frozen=True)
class Stretch:
    """A laid-out stretch between two places of the corridor."""

    start_m: float
    end_m: float
    section: CrossSection


@dataclass(frozen=True)
class Arm:
    """A road leaving a junction that the ego does not take; `pose` stands on its divider."""

    pose: tuple[float, float, float]
    lanes_out: int
    lanes_in: int
    length_m: float

    def strip(
        self, right_m: float, left_m: float, start_m: float = 0.0
    ) -> Float64[np.ndarray, '4 2']:
        """The corners of a strip along the whole arm between two offsets."""
        return world_from_local(
            self.pose,
            [
                [start_m, right_m],
                [self.length_m, right_m],
                [self.length_m, left_m],
                [start_m, left_m],
            ],
        )

    @property
    def edges_m(self) -> tuple[float, float]:
        """Offsets of the right and left edge."""
        return (
            -self.lanes_out * LANE_WIDTH_M - SHOULDER_M,
            self.lanes_in * LANE_WIDTH_M + SHOULDER_M,
        )

    def area(self) -> Float64[np.ndarray, '4 2']:
        """The drivable rectangle."""
        return self.strip(*self.edges_m)


@dataclass(frozen=True)
class Junction:
    """A laid-out junction from `start_m` to `end_m`, its area and the arms not taken."""

    start_m: float
    end_m: float
    turn: str
    signal: bool
    area: Float64[np.ndarray, '4 2']
    arms: tuple[Arm, ...]
    ring: Ring | None = None
    parts: tuple[Float64[np.ndarray, '4 2'], ...] = ()

    @property
    def areas(self) -> tuple[Float64[np.ndarray, '4 2'], ...]:
        """What may be driven on, in convex pieces; a roundabout's island is none of it."""
        return self.parts or (self.area,)

    @property
    def stop_m(self) -> float:
        """Where a vehicle's front must stop at red."""
        return self.start_m - STOP_LINE_BEFORE_M


@dataclass(frozen=True)
class Corridor:
    """A laid-out road: the ego lane's center line each `SPACING_M`, stretches and junctions."""

    x_m: Float64[np.ndarray, 'n']
    y_m: Float64[np.ndarray, 'n']
    yaw_rad: Float64[np.ndarray, 'n']
    curvature_per_m: Float64[np.ndarray, 'n']
    stretches: tuple[Stretch, ...]
    junctions: tuple[Junction, ...]

    @property
    def length_m(self) -> float:
        """Length of the center line."""
        return (len(self.x_m) - 1) * SPACING_M

    @cached_property
    def s_m(self) -> Float64[np.ndarray, 'n']:
        """Distance along the line at each of its points."""
        return np.arange(len(self.x_m)) * SPACING_M

    def section_at(self, s_m: float) -> CrossSection:
        """The lanes at a place; inside a junction those of the road before it."""
        found = self.stretches[0].section
        for stretch in self.stretches:
            if stretch.start_m > s_m:
                break
            found = stretch.section
        return found

    def place(self, s_m: float, d_m: float) -> tuple[float, float, float]:
        """World pose at corridor coordinates, facing along the road; ends go straight on."""
        at = s_m / SPACING_M
        index = min(max(int(at), 0), len(self.x_m) - 2)
        part = at - index
        x = self._lists[0][index]
        y = self._lists[1][index]
        yaw = self._lists[2][index]
        step_x, step_y = self._lists[0][index + 1] - x, self._lists[1][index + 1] - y
        yaw += min(max(part, 0.0), 1.0) * (self._lists[2][index + 1] - yaw)
        return (
            x + part * step_x - math.sin(yaw) * d_m,
            y + part * step_y + math.cos(yaw) * d_m,
            yaw,
        )

    def places(self, s_m: np.ndarray, d_m: np.ndarray | float) -> Float64[np.ndarray, 'q 3']:
        """World poses for many corridor coordinates within the corridor."""
        yaw = np.interp(s_m, self.s_m, self.yaw_rad)
        return np.stack(
            [
                np.interp(s_m, self.s_m, self.x_m) - np.sin(yaw) * d_m,
                np.interp(s_m, self.s_m, self.y_m) + np.cos(yaw) * d_m,
                yaw,
            ],
            axis=1,
        )

    def curvature_at(self, s_m: float) -> float:
        """Curvature of the ego lane at a place."""
        return self._lists[3][min(max(int(s_m / SPACING_M), 0), len(self.x_m) - 1)]

    def locate(self, x_m: float, y_m: float, near_m: float | None = None) -> tuple[float, float]:
        """Corridor coordinates of a point; `near_m` limits the search to 25 m around it."""
        low, high = 0, len(self.x_m)
        if near_m is not None:
            centre = int(near_m / SPACING_M)
            low = min(max(centre - 50, 0), high - 2)
            high = max(min(centre + 51, high), low + 2)
        gap_x = x_m - self.x_m[low:high]
        gap_y = y_m - self.y_m[low:high]
        index = low + int(np.argmin(gap_x * gap_x + gap_y * gap_y))
        x, y, yaw = (self._lists[i][index] for i in range(3))
        cos, sin = math.cos(yaw), math.sin(yaw)
        along = (x_m - x) * cos + (y_m - y) * sin
        left = (y_m - y) * cos - (x_m - x) * sin
        bend = 1.0 - left * self._lists[3][index]
        return index * SPACING_M + along / max(bend, 0.3), left

    @cached_property
    def _lists(self) -> tuple[list[float], list[float], list[float], list[float]]:
        # Plain floats: single look-ups are several times faster than on arrays.
        return (
            self.x_m.tolist(),
            self.y_m.tolist(),
            self.yaw_rad.tolist(),
            self.curvature_per_m.tolist(),
        )

    @cached_property
    def areas(self) -> tuple[Float64[np.ndarray, '4 2'], ...]:
        """Convex drivable areas besides the stretches: junctions and arms."""
        found: list[np.ndarray] = []
        for junction in self.junctions:
            found.extend(junction.areas)
            found.extend(arm.area() for arm in junction.arms)
        return tuple(found)

    def band(
        self, start_m: float, end_m: float, right_m: float, left_m: float, step_m: float = 2.0
    ) -> Float64[np.ndarray, 'n 2']:
        """The outline of a strip along the corridor between two offsets."""
        count = max(2, math.ceil((end_m - start_m) / step_m) + 1)
        s = np.linspace(start_m, end_m, count)
        return np.concatenate([self.places(s, right_m)[:, :2], self.places(s, left_m)[::-1, :2]])


class OverlapError(ValueError):
    """The road would run over itself; the caller draws another."""


def lay_out(
    pieces: Sequence[StretchPlan | JunctionPlan], start: tuple[float, float, float]
) -> Corridor:
    """Lay pieces one after another from the pose `start` (stretch first and last, alternating).

    Raises:
        OverlapError: the corridor comes too near to itself.
    """
    curvature: list[np.ndarray] = []
    stretches: list[Stretch] = []
    drafts: list[tuple[float, float, JunctionPlan, CrossSection, CrossSection, float]] = []
    at_m = 0.0
    for index, piece in enumerate(pieces):
        if isinstance(piece, StretchPlan):
            part = _stretch_curvature(piece)
            stretches.append(Stretch(at_m, at_m + len(part) * SPACING_M, piece.section))
        else:
            before, after = pieces[index - 1], pieces[index + 1]
            assert isinstance(before, StretchPlan)
            assert isinstance(after, StretchPlan)
            part, reach_m = _junction_curvature(piece, before.section, after.section)
            end_m = at_m + len(part) * SPACING_M
            drafts.append((at_m, end_m, piece, before.section, after.section, reach_m))
        curvature.append(part)
        at_m += len(part) * SPACING_M
    line = _integrate(np.concatenate(curvature), start)
    _refuse_overlap(line)
    bare = Corridor(*line, tuple(stretches), ())
    junctions = tuple(_junction(bare, *draft) for draft in drafts)
    return Corridor(*line, tuple(stretches), junctions)


def _stretch_curvature(piece: StretchPlan) -> np.ndarray:
    middle = (np.arange(round(piece.length_m / SPACING_M)) + 0.5) * SPACING_M
    total = np.zeros_like(middle)
    for bend in piece.bends:
        rise = np.clip((middle - bend.start_m) / bend.ramp_m, 0, 1)
        fall = np.clip((bend.start_m + bend.length_m - middle) / bend.ramp_m, 0, 1)
        total += bend.per_m * np.minimum(rise, fall)
    return total


def _junction_curvature(
    plan: JunctionPlan, before: CrossSection, after: CrossSection
) -> tuple[np.ndarray, float]:
    """Curvature through a junction and how far ahead of its entry the exit line lies."""
    if plan.ring_m:
        middle_m = before.divider_m
        return ring_curvature(plan.turn, plan.ring_m, plan.radius_m, middle_m, SPACING_M)[0], 0.0
    if plan.turn == 'straight':
        width_m = 2 * (plan.cross_lanes * LANE_WIDTH_M + SHOULDER_M) + 2.0
        return np.zeros(math.ceil(width_m / SPACING_M)), 0.0
    sign = 1.0 if plan.turn == 'left' else -1.0
    ramp_m = 3.0
    count = math.ceil((math.pi / 2 * plan.radius_m + ramp_m) / SPACING_M)
    middle = (np.arange(count) + 0.5) * SPACING_M
    shape = np.minimum(np.clip(middle / ramp_m, 0, 1), np.clip(middle[::-1] / ramp_m, 0, 1))
    arc = shape * (math.pi / 2 / (shape.sum() * SPACING_M))
    x, y, _, _ = _integrate(arc, (0.0, 0.0, 0.0))
    side = (before.left_m, after.left_m) if sign > 0 else (-before.right_m, -after.right_m)
    lead_m = max(0.0, side[1] + 1.0 - x[-1])
    tail_m = max(0.0, side[0] + 1.0 - y[-1])
    lead = math.ceil(lead_m / SPACING_M)
    tail = math.ceil(tail_m / SPACING_M)
    full = np.concatenate([np.zeros(lead), sign * arc, np.zeros(tail)])
    return full, float(x[-1]) + lead * SPACING_M


def _integrate(
    curvature: np.ndarray, start: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y, yaw0 = start
    yaw = yaw0 + np.concatenate([[0.0], np.cumsum(curvature) * SPACING_M])
    middle = 0.5 * (yaw[1:] + yaw[:-1])
    return (
        x + np.concatenate([[0.0], np.cumsum(np.cos(middle)) * SPACING_M]),
        y + np.concatenate([[0.0], np.cumsum(np.sin(middle)) * SPACING_M]),
        yaw,
        np.append(curvature, curvature[-1]),
    )


def _refuse_overlap(line: tuple[np.ndarray, ...]) -> None:
    x, y = line[0][::10], line[1][::10]
    apart = np.hypot(x[:, None] - x, y[:, None] - y)
    index = np.arange(len(x))
    far_m = np.abs(index[:, None] - index) * 10 * SPACING_M
    if (apart[far_m > 2.0 * CLEARANCE_M + 30.0] < 2.0 * CLEARANCE_M).any():
        raise OverlapError


def _junction(
    corridor: Corridor,
    start_m: float,
    end_m: float,
    plan: JunctionPlan,
    before: CrossSection,
    after: CrossSection,
    reach_m: float,
) -> Junction:
    if plan.ring_m:
        return _roundabout(corridor, start_m, end_m, plan, before)
    entry = corridor.place(start_m, 0.0)
    arms: list[tuple[float, float, float, int, int]] = []
    if plan.turn == 'straight':
        low, high = min(before.right_m, after.right_m), max(before.left_m, after.left_m)
        box = (0.0, end_m - start_m, low, high)
        centre, lanes = 0.5 * (end_m - start_m), plan.cross_lanes
        if plan.straight_arm:
            arms.append((centre, high, math.pi / 2, lanes, lanes))
        if plan.side_arm:
            arms.append((centre, low, -math.pi / 2, lanes, lanes))
    else:
        depth_m = _depth_m(corridor, start_m, end_m)
        if plan.turn == 'left':
            box = (0.0, reach_m - after.right_m, before.right_m, depth_m)
            side = (reach_m - after.divider_m, before.right_m, -math.pi / 2)
        else:
            box = (0.0, reach_m + after.left_m, -depth_m, before.left_m)
            side = (reach_m + after.divider_m, before.left_m, math.pi / 2)
        if plan.side_arm:
            arms.append((*side, after.opposing, after.forward))
        if plan.straight_arm:
            arms.append((box[1], before.divider_m, 0.0, before.forward, before.opposing))
    x0, x1, y0, y1 = box
    area = world_from_local(entry, [[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    built = []
    for x, y, yaw, lanes_out, lanes_in in arms:
        pose = world_from_local(entry, [x, y, yaw])
        arm = Arm((pose[0], pose[1], entry[2] + yaw), lanes_out, lanes_in, plan.arm_m)
        built.append(_shorten(corridor, arm, start_m, end_m))
    return Junction(start_m, end_m, plan.turn, plan.signal, area, tuple(built))


def _roundabout(
    corridor: Corridor, start_m: float, end_m: float, plan: JunctionPlan, section: CrossSection
) -> Junction:
    _, joins_m, middle_m = ring_curvature(
        plan.turn, plan.ring_m, plan.radius_m, section.divider_m, SPACING_M
    )
    x, y, yaw = corridor.place(start_m + middle_m, 0.0)
    left = (x - plan.ring_m * math.sin(yaw), y + plan.ring_m * math.cos(yaw))
    ring = Ring(*left, plan.ring_m, start_m + joins_m + 2.0)
    entry, leave = corridor.place(start_m, 0.0), corridor.place(end_m, 0.0)
    parts = ring.sectors(plan.ring_m - IN_M, plan.ring_m + OUT_M)
    edges = (section.right_m, section.left_m)
    for pose, ahead in ((entry, 1.0), (leave, -1.0)):
        reach = ahead * (float(np.hypot(pose[0] - left[0], pose[1] - left[1])) - plan.ring_m)
        corners = [[-0.2 * ahead, edges[0]], [reach, edges[0]], [reach, edges[1]],
                   [-0.2 * ahead, edges[1]]]  # fmt: skip
        parts.append(world_from_local(pose, corners))
    for s in np.arange(start_m, end_m, 2.0).tolist():
        parts.append(corridor.band(s, min(s + 2.2, end_m), -IN_M - 0.4, IN_M, 3.0))
    arms = []
    towards = entry[2]
    for turn, wanted in ((math.pi / 2, plan.straight_arm), (0.0, True), (-math.pi / 2, True)):
        taken = (plan.turn, turn) in (('straight', 0.0), ('right', -math.pi / 2))
        if wanted and not taken:
            reach = plan.ring_m + OUT_M - 0.5
            out = [reach * math.cos(turn), reach * math.sin(turn), turn]
            x, y, _ = world_from_local((*left, towards), out).tolist()
            arm = Arm((x, y, towards + turn), 1, 1, plan.arm_m)
            arms.append(_shorten(corridor, arm, start_m, end_m))
    half = plan.ring_m + OUT_M
    square = [[-half, -half], [half, -half], [half, half], [-half, half]]
    area = world_from_local((*left, towards), square)
    return Junction(
        start_m, end_m, plan.turn, signal=False, area=area, arms=tuple(arms), ring=ring,
        parts=tuple(parts),
    )  # fmt: skip


def _depth_m(corridor: Corridor, start_m: float, end_m: float) -> float:
    """How far to the side of its entry direction a turn leads."""
    entry, leave = corridor.place(start_m, 0.0), corridor.place(end_m, 0.0)
    return abs(
        (leave[1] - entry[1]) * math.cos(entry[2]) - (leave[0] - entry[0]) * math.sin(entry[2])
    )


def _shorten(corridor: Corridor, arm: Arm, start_m: float, end_m: float) -> Arm:
    """The arm, cut before it meets another part of the corridor."""
    other = (corridor.s_m < start_m - 5.0) | (corridor.s_m > end_m + 5.0)
    x, y = corridor.x_m[other][::4], corridor.y_m[other][::4]
    length_m = arm.length_m
    for reach_m in np.arange(15.0, arm.length_m + 1.0, 5.0):
        px = arm.pose[0] + reach_m * math.cos(arm.pose[2])
        py = arm.pose[1] + reach_m * math.sin(arm.pose[2])
        if np.hypot(x - px, y - py).min() < ARM_CLEARANCE_M:
            length_m = reach_m - 5.0
            break
    return Arm(arm.pose, arm.lanes_out, arm.lanes_in, float(length_m))
