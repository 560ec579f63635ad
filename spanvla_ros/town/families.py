"""Further kinds of scene, each a class and a line of `NEW_FAMILIES`.

A family says what road it needs, what moves the line to drive and closes part of the road
(before the speed limits are known), and what drives there. All chance comes from the draft.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spanvla_ros.town import bodies
from spanvla_ros.town.crossing import crossing_of, joining_of
from spanvla_ros.town.elements import Box
from spanvla_ros.town.road_users import FRONT_M, BrakeEvent, Car, Merge, Signal
from spanvla_ros.town.roads import LANE_WIDTH_M, CrossSection, JunctionPlan, StretchPlan
from spanvla_ros.town.surroundings import Obstruction, Shift
from spanvla_ros.types import EgoState

if TYPE_CHECKING:
    from spanvla_ros.town.draft import Draft

FIRST_FAMILIES = ('lane_keeping', 'lead_vehicle', 'pedestrian', 'red_light', 'turns')
MIX = 'mix'
BEHIND_M = 40.0
BEYOND_M = 90.0
EGO_HALF_M = 1.15
# The ego's body must have changed over so far before what stands there, and leaves so far behind.
CLEAR_BEFORE_M = 7.0
CLEAR_AFTER_M = 3.0

Pieces = tuple[list[StretchPlan | JunctionPlan], float]


class Family:
    """A plain road with nothing on it; `hazard` is what `World.without_hazard` can take away."""

    hazard = ''

    def pieces(self, draft: Draft) -> Pieces:
        """The road, and how long the drive is."""
        drive_m = float(round(draft.within(draft.ranges.drive_m)))
        return self.stretch(draft, self.section(draft), drive_m)

    def section(self, draft: Draft) -> CrossSection:
        """The lanes of the road."""
        return draft.draw_section('')

    def stretch(self, draft: Draft, section: CrossSection, drive_m: float) -> Pieces:
        """One stretch of road with bends."""
        total_m = BEHIND_M + drive_m + BEYOND_M
        return [StretchPlan(total_m, section, draft.draw_bends(total_m, 20.0))], drive_m

    def prepare(self, draft: Draft) -> None:
        """Where the line to drive leaves the lane, what stands on the road, where it is slow."""

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """Who else is there."""


def _beside(draft: Draft, *, both_share: float = 0.3) -> CrossSection:
    """A road with a lane beside the ego's, seldom on both sides."""
    left = draft.chance(0.5)
    both = draft.chance(both_share)
    opposing = 1 + int(draft.chance(draft.ranges.extra_lane_share))
    return CrossSection(int(both or not left), int(both or left), opposing)


def _side(draft: Draft) -> int:
    """A side with a lane in the ego's direction: 1 left, -1 right, 0 none."""
    section = draft.corridor.stretches[0].section
    sides = [-1] * bool(section.lanes_right) + [1] * bool(section.lanes_left)
    return sides[int(draft.rng.integers(len(sides)))] if sides else 0


class CutIn(Family):
    """A slow car of the lane beside pulls in before the ego."""

    hazard = 'merge'

    def section(self, draft: Draft) -> CrossSection:
        """A lane beside the ego's."""
        return _beside(draft)

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """It rolls until the ego is near, so that they meet."""
        r = draft.ranges
        side = _side(draft)
        size = draft.size()
        place = BEHIND_M + FRONT_M + draft.within(r.cut_in_at_m) + size[0] / 2
        trigger, slow = draft.within(r.cut_in_gap_m), draft.within(r.cut_in_slow_mps)
        trigger += 1.2 * max(0.0, slow - 2.0)
        cruise, hold = draft.within(r.cut_in_cruise_mps), draft.within((0.8, 2.0))
        events: tuple[BrakeEvent, ...] = (BrakeEvent(-math.inf, trigger, 3.0, slow, hold),)
        if draft.chance(r.cut_in_brakes_share):
            at = place + 12.0 + draft.within((0.0, 20.0))
            decel = draft.within(r.lead_decel_mps2)
            events += (BrakeEvent(at, math.inf, decel, 0.0, draft.within(r.lead_hold_s)),)
        merge = Merge(side * LANE_WIDTH_M, 0.0, trigger, draft.within(r.cut_in_duration_s))
        draft.cars.append(
            Car('car_cut_in', place, side * LANE_WIDTH_M, slow, cruise, size, draft.color(),
                events=events, merge=merge)
        )  # fmt: skip


class StopSign(Family):
    """A junction with a stop sign: stand before the line, then go on."""

    hazard = 'sign'

    def pieces(self, draft: Draft) -> Pieces:
        """A road to a junction and on, straight or by a turn."""
        drive_m = float(round(draft.within(draft.ranges.drive_m)))
        at_m = BEHIND_M + round(draft.within(draft.ranges.junction_at_m))
        turn = 'straight'
        if draft.chance(draft.ranges.stop_sign_turn_share):
            turn = 'left' if draft.chance(0.5) else 'right'
        first = StretchPlan(at_m, draft.draw_section(turn), draft.draw_bends(at_m, 30.0))
        plan = draft.draw_junction(turn, signal=True)
        rest_m = max(BEHIND_M + drive_m + BEYOND_M - at_m - 20.0, 120.0)
        after = first.section if turn == 'straight' else draft.draw_section('')
        return [first, plan, StretchPlan(rest_m, after, draft.draw_bends(rest_m, 15.0))], drive_m

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """The sign."""
        draft.signals.append(Signal(0, red=True, green_after_s=0.0, sign=True))


class Construction(Family):
    """Cones close the ego's lane, which goes over to the next one, or a part of it."""

    hazard = 'obstruction'

    def pieces(self, draft: Draft) -> Pieces:
        """A road long enough for the way around."""
        r = draft.ranges
        draft.site_m = BEHIND_M + draft.within(r.site_at_m)
        draft.site_length_m = draft.within(r.site_length_m)
        needed_m = draft.site_m + draft.site_length_m + 45.0 - BEHIND_M
        drive_m = float(round(max(draft.within(r.drive_m), needed_m)))
        section = _beside(draft) if draft.chance(0.7) else CrossSection(0, 0, 1)
        return self.stretch(draft, section, drive_m)

    def prepare(self, draft: Draft) -> None:
        """Cones from the lane's edge inwards, then along; the line leads past them."""
        r = draft.ranges
        side = _side(draft)
        closed = side != 0 and draft.chance(r.lane_closed_share)
        start, end = draft.site_m, draft.site_m + draft.site_length_m
        narrow = draft.within(r.narrowing_m)
        # Away from the cones, to a lane of the same direction if there is one.
        side = side or 1
        by = side * (LANE_WIDTH_M if closed else narrow)
        draft.quiet = not closed
        ramp = draft.within((24.0, 30.0)) if closed else draft.within((16.0, 22.0))
        draft.shift_past(start, end, ramp, by, draft.within(r.site_speed_mps))
        inner = LANE_WIDTH_M / 2 - 0.3 if closed else narrow - EGO_HALF_M - 0.75
        outer = -LANE_WIDTH_M / 2 + 0.1
        taper = draft.within((10.0, 14.0)) if closed else 6.0
        step = draft.within((2.5, 4.0))
        count = max(2, round(taper / step))
        places = [
            (start - taper + taper * i / count, outer + (inner - outer) * i / count)
            for i in range(count)
        ]
        along = max(1, round((end - start) / step))
        places += [(start + (end - start) * i / along, inner) for i in range(along + 1)]
        for s, d in places:
            draft.add_obstruction('traffic_cone', s, side * d)
        if closed:
            draft.add_obstruction('barrier', start + 2.0, -0.2 * side, width_m=2.4)


class LaneBias(Family):
    """Cars parked partly in the ego's lane, which keeps to the left of its middle past them."""

    hazard = ''

    def pieces(self, draft: Draft) -> Pieces:
        """A road without a lane to the right."""
        r = draft.ranges
        draft.site_m = BEHIND_M + draft.within(r.site_at_m) - 15.0
        draft.site_length_m = draft.within((6.0, 34.0))
        needed_m = draft.site_m + draft.site_length_m + 40.0 - BEHIND_M
        drive_m = float(round(max(draft.within(r.drive_m), needed_m)))
        left = int(draft.chance(r.extra_lane_share))
        return self.stretch(draft, CrossSection(0, left, 1), drive_m)

    def prepare(self, draft: Draft) -> None:
        """As many cars as there is room for; the line leads past them all."""
        r = draft.ranges
        by = draft.within(r.bias_m)
        start, end = draft.site_m, draft.site_m + draft.site_length_m
        draft.quiet = draft.corridor.stretches[0].section.lanes_left == 0
        draft.start_offset_m = -draft.within(r.bias_start_m)
        s = start
        while s <= end:
            length, width, height = draft.size()
            s += length / 2
            inner = by - EGO_HALF_M - draft.within((0.5, 0.65))
            draft.add_parked_car(s, inner - width / 2, (length, width, height))
            end_of_car = s + length / 2
            s = end_of_car + draft.within((1.5, 9.0))
        draft.shift_past(start, end_of_car, draft.within((16.0, 22.0)), by,
                         draft.within(r.bias_speed_mps))  # fmt: skip


class LaneChange(Family):
    """The route leads over into the lane beside; who drives there is met."""

    def section(self, draft: Draft) -> CrossSection:
        """A lane beside the ego's."""
        return _beside(draft)

    def prepare(self, draft: Draft) -> None:
        """The line changes over once, and the route with it."""
        start = BEHIND_M + draft.within(draft.ranges.lane_change_at_m)
        ramp = draft.within(draft.ranges.lane_change_over_m)
        draft.shifts.append(Shift(start, ramp, _side(draft) * LANE_WIDTH_M))
        draft.announced = True

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """A slow car in the lane the route leads to, or one in the lane it leaves."""
        r, shift = draft.ranges, draft.shifts[0]
        size = draft.size()
        over_m = shift.start_m + shift.ramp_m
        slow, cruise = draft.within(r.cut_in_slow_mps), draft.within(r.cut_in_cruise_mps)
        trigger, hold = draft.within((18.0, 30.0)), draft.within(r.lead_hold_s)
        ahead, target = draft.within((0.0, 30.0)), draft.chance(r.lane_change_met_share)
        place = over_m + ahead + (0.0 if target else 14.0) + size[0] / 2
        event = BrakeEvent(-math.inf, trigger, 3.0, 0.5 * slow, hold)
        draft.cars.append(
            Car('car_lead' if target else 'car_beside', place, shift.by_m if target else 0.0,
                0.5 * slow, cruise, size, draft.color(), reacts=True, events=(event,))
        )  # fmt: skip


class UnprotectedLeft(Family):
    """A left turn without a light: those who come straight on go first."""

    hazard = 'oncoming'

    def pieces(self, draft: Draft) -> Pieces:
        """A road to the turn and on."""
        drive_m = float(round(draft.within(draft.ranges.drive_m)))
        at_m = BEHIND_M + round(draft.within(draft.ranges.junction_at_m))
        section = CrossSection(int(draft.chance(draft.ranges.extra_lane_share)), 0, 1)
        first = StretchPlan(at_m, section, draft.draw_bends(at_m, 35.0))
        plan = replace(draft.draw_junction('left', signal=False), straight_arm=True, arm_m=90.0)
        rest_m = max(BEHIND_M + drive_m + BEYOND_M - at_m - 20.0, 120.0)
        last = StretchPlan(rest_m, draft.draw_section(''), draft.draw_bends(rest_m, 15.0))
        return [first, plan, last], drive_m

    def prepare(self, draft: Draft) -> None:
        """Where to give way."""
        draft.quiet = True
        draft.crossing = crossing_of(draft.corridor, 0)

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """One or several cars close behind each other that reach the junction with the ego."""
        r = draft.ranges
        crossing = draft.crossing
        assert crossing is not None
        speed = draft.within(r.oncoming_speed_mps)
        meet_m = draft.within(r.oncoming_meet_m)
        ahead = meet_m * speed / 6.0 + draft.within((-4.0, 6.0))
        place = crossing.start_m + crossing.high_m + ahead
        for number in range(1 + int(draft.rng.integers(3))):
            size = draft.size()
            place += size[0] / 2
            trigger = place - size[0] / 2 - (crossing.in_m + FRONT_M - meet_m)
            event = BrakeEvent(-math.inf, trigger, 3.0, 1.0, 0.0)
            draft.cars.append(
                Car(f'car_oncoming_{number}', place, 0.0, 1.0, speed, size, draft.color(),
                    opposing_lane=0, events=(event,), straight_m=crossing.start_m)
            )  # fmt: skip
            place += size[0] / 2 + draft.within(r.oncoming_gap_m)


class Roundabout(Family):
    """Onto the ring of a roundabout behind those who come round it, and off by an exit."""

    hazard = 'traffic'

    def pieces(self, draft: Draft) -> Pieces:
        """A road to the ring and on, right by the first exit or straight on by the second."""
        r = draft.ranges
        drive_m = float(round(draft.within(r.drive_m)))
        at_m = BEHIND_M + round(draft.within(r.junction_at_m))
        turn = 'right' if draft.chance(0.4) else 'straight'
        section = CrossSection(0, 0, 1)
        first = StretchPlan(at_m, section, draft.draw_bends(at_m, 35.0))
        plan = replace(
            draft.draw_junction(turn, signal=False),
            radius_m=draft.within(r.ring_way_on_m),
            ring_m=draft.within(r.ring_radius_m),
        )
        rest_m = max(BEHIND_M + drive_m + BEYOND_M - at_m - 40.0, 140.0)
        return [first, plan, StretchPlan(rest_m, section, draft.draw_bends(rest_m, 15.0))], drive_m

    def prepare(self, draft: Draft) -> None:
        """Where to give way."""
        draft.quiet = True
        draft.crossing = joining_of(draft.corridor, 0)

    def populate(self, draft: Draft, ego: EgoState) -> None:
        """Cars on the ring that reach the ego's way onto it with the ego, and go its way."""
        r, crossing, ring = draft.ranges, draft.crossing, draft.corridor.junctions[0].ring
        assert crossing is not None
        assert ring is not None
        point = draft.corridor.place(ring.joins_m, 0.0)
        path = ring.path_to(np.array(point[:2]))
        meet_m, place = draft.within(r.ring_meet_m), ring.joins_m
        place -= 10.0 + draft.within((0.0, 10.0))
        for number in range(1 + int(draft.rng.integers(2))):
            size = draft.size()
            place -= size[0] / 2
            if ring.joins_m - place > len(path) - 2:
                break
            event = BrakeEvent(-math.inf, math.inf, 3.0, 0.7, 0.0, crossing.in_m - meet_m)
            draft.cars.append(
                Car(f'car_on_ring_{number}', place, 0.0, 0.7, draft.within(r.ring_speed_mps), size,
                    draft.color(), events=(event,), reacts=True, joins_m=ring.joins_m,
                    joins_by=path)
            )  # fmt: skip
            place -= size[0] / 2 + draft.within((5.0, 10.0))


NEW_FAMILIES: dict[str, Family] = {
    'cut_in': CutIn(),
    'stop_sign': StopSign(),
    'construction': Construction(),
    'lane_change': LaneChange(),
    'lane_bias': LaneBias(),
    'unprotected_left': UnprotectedLeft(),
    'roundabout': Roundabout(),
}

HAZARDS = {
    'lead_vehicle': 'lead',
    'pedestrian': 'pedestrian',
    'red_light': 'light',
    **{name: family.hazard for name, family in NEW_FAMILIES.items() if family.hazard},
}


def obstruction_box(thing: Obstruction) -> Box:
    """How a cone or barrier looks."""
    if thing.kind == 'barrier':
        return bodies.barrier(thing.pose, thing.width_m)
    return bodies.cone(thing.pose)
