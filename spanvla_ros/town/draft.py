"""One world while it is drawn: the road, who stands and moves there, how it looks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from spanvla_ros.town import bodies
from spanvla_ros.town.chance import Chance
from spanvla_ros.town.crossing import Crossing
from spanvla_ros.town.elements import Box, GroundPolygon, Tint
from spanvla_ros.town.families import (
    BEHIND_M,
    BEYOND_M,
    CLEAR_AFTER_M,
    CLEAR_BEFORE_M,
    HAZARDS,
    MIX,
    NEW_FAMILIES,
    obstruction_box,
)
from spanvla_ros.town.ranges import Ranges
from spanvla_ros.town.road_users import FRONT_M, BrakeEvent, Car, Pedestrian, Signal
from spanvla_ros.town.roads import (
    LANE_WIDTH_M,
    SPACING_M,
    Bend,
    Corridor,
    CrossSection,
    JunctionPlan,
    OverlapError,
    StretchPlan,
    lay_out,
)
from spanvla_ros.town.sites import is_free, leaving_path
from spanvla_ros.town.speeds import speed_limits
from spanvla_ros.town.surroundings import Obstruction, Shift, Surroundings
from spanvla_ros.town.traffic import World
from spanvla_ros.types import EgoState, SpanvlaError, Vehicle


class Draft(Chance):
    """One world while it is drawn."""

    def __init__(self, rng: np.random.Generator, ranges: Ranges, family: str, seed: int) -> None:
        super().__init__(rng)
        self.ranges = ranges
        self.family = family
        self.seed = seed
        self.cars: list[Car] = []
        self.pedestrians: list[Pedestrian] = []
        self.signals: list[Signal] = []
        self.extra_ground: list[GroundPolygon] = []
        self.kind = NEW_FAMILIES.get(family)
        self.shifts: list[Shift] = []
        self.slow: list[tuple[float, float, float]] = []
        self.obstructions: list[Obstruction] = []
        self.obstruction_boxes: list[Box] = []
        self.site_m = self.site_length_m = 0.0
        self.start_offset_m: float | None = None
        # The route tells of the shifts; no one comes the other way.
        self.announced = self.quiet = False
        self.crossing: Crossing | None = None

    # -- the road --------------------------------------------------------------------------

    def world(self) -> World:
        """All of it, in the order that makes a seed what it is."""
        corridor, drive_m = self.lay_road()
        self.corridor = corridor
        self.paint = self.draw_paint()
        self.goal_m = BEHIND_M + drive_m
        if self.kind is not None:
            self.kind.prepare(self)
        limits = speed_limits(corridor, self.ranges, self.shifts, self.slow)
        self.limits = limits
        ego = self.draw_ego()
        self.populate(ego)
        ground = (*bodies.paint_ground(corridor, self.paint), *self.extra_ground)
        around = Surroundings(
            corridor=corridor,
            ground=ground,
            houses=self.draw_houses(),
            tint=self.draw_tint(),
            route_points=self.draw_route(),
            limits_mps=tuple(limits.tolist()),
            speed_limit_mps=self.ranges.speed_limit_mps,
            start_m=BEHIND_M,
            goal_m=self.goal_m,
            time_limit_s=60.0 if self.family != MIX else drive_m / 3.0 + 60.0,
            family=self.family,
            seed=self.seed,
            shifts=tuple(self.shifts),
            obstructions=tuple(self.obstructions),
            crossing=self.crossing,
        )
        if self.obstructions:
            cleared = replace(
                around,
                shifts=(),
                obstructions=(),
                limits_mps=tuple(speed_limits(corridor, self.ranges).tolist()),
            )
            houses = (*around.houses, *self.obstruction_boxes)
            around = replace(around, houses=houses, cleared=cleared)
        hazard = HAZARDS.get(self.family, '')
        return World(around, Vehicle(), self.cars, self.pedestrians, self.signals, ego, hazard)

    def lay_road(self) -> tuple[Corridor, float]:
        """A road that does not run over itself, and how long the drive is."""
        for _ in range(400):
            pieces, drive_m = self.draw_pieces()
            start = (0.0, 0.0, self.within((-math.pi, math.pi)))
            try:
                return lay_out(pieces, start), drive_m
            except OverlapError:
                continue
        raise SpanvlaError(f'town: no road found for {self.family} seed {self.seed}')

    def draw_pieces(self) -> tuple[list[StretchPlan | JunctionPlan], float]:
        """Stretches and junctions, and how long the drive is."""
        if self.family == MIX:
            return self.draw_long_road()
        if self.kind is not None:
            return self.kind.pieces(self)
        drive_m = float(round(self.within(self.ranges.drive_m)))
        total_m = BEHIND_M + drive_m + BEYOND_M
        if self.family in ('red_light', 'turns'):
            turn = 'straight'
            if self.family == 'turns':
                turn = 'left' if self.chance(0.5) else 'right'
            at_m = BEHIND_M + round(self.within(self.ranges.junction_at_m))
            first = StretchPlan(at_m, self.draw_section(turn), self.draw_bends(at_m, 30.0))
            plan = self.draw_junction(turn, signal=self.family == 'red_light' or self.chance(0.3))
            rest_m = max(total_m - at_m - 20.0, 120.0)
            after = first.section if turn == 'straight' else self.draw_section('')
            last = StretchPlan(rest_m, after, self.draw_bends(rest_m, 15.0))
            return [first, plan, last], drive_m
        section = self.draw_section('')
        bends = self.draw_bends(total_m, 20.0, always=self.family == 'lane_keeping')
        return [StretchPlan(total_m, section, bends)], drive_m

    def draw_long_road(self) -> tuple[list[StretchPlan | JunctionPlan], float]:
        """The road of `mix`."""
        pieces: list[StretchPlan | JunctionPlan] = []
        total_m, side = 0.0, 'left' if self.chance(0.5) else 'right'
        turn = 'straight'
        while total_m < 1500.0:
            length_m = float(round(self.within((90.0, 170.0))))
            turn = 'straight' if self.chance(0.5) else side
            section = self.draw_section(turn)
            pieces.append(StretchPlan(length_m, section, self.draw_bends(length_m, 30.0)))
            pieces.append(self.draw_junction(turn, signal=self.chance(0.7)))
            if turn != 'straight':
                side = 'left' if side == 'right' else 'right'
            total_m += length_m + 18.0
        pieces.append(StretchPlan(160.0, self.draw_section(''), ()))
        return pieces, total_m - BEHIND_M + 40.0

    def draw_section(self, turn: str) -> CrossSection:
        """Lanes; none beside the ego on the side of its turn."""
        extra = self.ranges.extra_lane_share
        right = int(self.chance(extra)) if turn != 'right' else 0
        left = int(self.chance(extra)) if turn != 'left' else 0
        if self.family == 'lane_keeping' and right + left == 0 and self.chance(0.6):
            left = 1
        return CrossSection(right, left, 1 + int(self.chance(extra)))

    def draw_bends(
        self, length_m: float, margin_m: float, *, always: bool = False
    ) -> tuple[Bend, ...]:
        """Bends of a stretch, clear of its ends."""
        if not always and self.chance(self.ranges.straight_share):
            return ()
        bends: list[Bend] = []
        at = margin_m + (self.within((0.0, 25.0)) if not always else self.within((15.0, 30.0)))
        side = 1.0 if self.chance(0.5) else -1.0
        while True:
            radius = self.within(self.ranges.bend_radius_m)
            span_m = min(self.within(self.ranges.bend_length_m), 1.2 * radius + 10.0)
            if at + span_m > length_m - margin_m:
                return tuple(bends)
            bends.append(Bend(at, span_m, side / radius))
            at += span_m + self.within(self.ranges.bend_gap_m)
            side = -side if self.chance(0.7) else side

    def draw_junction(self, turn: str, *, signal: bool) -> JunctionPlan:
        """A junction."""
        span = (
            self.ranges.turn_radius_left_m if turn == 'left' else self.ranges.turn_radius_right_m
        )
        return JunctionPlan(
            turn,
            signal,
            self.within(span),
            1 + int(self.chance(0.3)),
            float(round(self.within((35.0, 60.0)))),
            self.chance(0.8),
            self.chance(0.85),
        )

    # -- what stands and moves -------------------------------------------------------------

    def draw_ego(self) -> EgoState:
        """Where and how fast the drive starts."""
        speed = self.within(self.ranges.start_speed_mps)
        if self.chance(self.ranges.standing_start_share):
            speed = 0.0
        speed = min(speed, float(self.limits[int(BEHIND_M / SPACING_M)]))
        offset = float(np.clip(self.rng.normal() * 0.2, -0.5, 0.5))
        if self.start_offset_m is not None:
            offset = self.start_offset_m
        x, y, yaw = self.corridor.place(BEHIND_M, offset)
        return EgoState(0, x, y, (yaw + math.pi) % (2 * math.pi) - math.pi, speed)

    def populate(self, ego: EgoState) -> None:
        """Who stands and moves there."""
        if self.kind is not None:
            self.kind.populate(self, ego)
            self.add_scenery_traffic()
            return
        if self.family == MIX:
            self.populate_mix()
        elif self.family == 'lead_vehicle':
            self.add_lead(BEHIND_M + FRONT_M, ego.speed_mps)
        elif self.family == 'pedestrian':
            at = BEHIND_M + self.within(self.ranges.pedestrian_at_m)
            self.add_pedestrian(at, crosses=not self.chance(self.ranges.pedestrian_waits_share))
        for index, junction in enumerate(self.corridor.junctions):
            if junction.signal:
                red = self.chance(self.ranges.light_red_share if self.family != 'turns' else 0.4)
                self.signals.append(Signal(index, red, self.within(self.ranges.green_after_s)))
        if self.family == 'red_light' and self.chance(self.ranges.queue_share):
            self.add_queue()
        self.add_scenery_traffic()

    def add_lead(self, front_m: float, ego_mps: float) -> None:
        """A car ahead that stands, brakes, or is slow."""
        r = self.ranges
        size = self.size()
        kind = self.rng.random()
        limit = r.speed_limit_mps
        gap = self.within(r.lead_gap_m)
        events: tuple[BrakeEvent, ...] = ()
        decel, to, hold = (
            self.within(s) for s in (r.lead_decel_mps2, r.lead_brake_to_mps, r.lead_hold_s)
        )
        share, trigger, at = (
            self.within(r.lead_speed_share),
            self.within((8.0, 16.0)),
            self.rng.random(),
        )
        cruise = share * limit
        if kind < r.lead_stopped_share:
            gap += ego_mps**2 / 6.0
            place = front_m + gap + size[0] / 2
            event = BrakeEvent(-math.inf, trigger, 3.0, 0.0, hold)
            speed, events = 0.0, (event,)
        elif kind < r.lead_stopped_share + r.lead_braking_share:
            cruise = max(cruise, 0.75 * limit)
            speed = max(min(ego_mps, cruise), 3.0)
            gap = max(gap, 1.3 * ego_mps)
            place = front_m + gap + size[0] / 2
            event = BrakeEvent(place + 5.0 + 35.0 * at, math.inf, decel, to, hold)
            events = (event,)
        else:
            gap = max(gap, 1.3 * ego_mps)
            speed = cruise
            place = front_m + gap + size[0] / 2
        self.cars.append(
            Car(
                'car_lead',
                place,
                0.0,
                speed,
                cruise,
                size,
                self.color(),
                reacts=True,
                events=events,
            )
        )

    def add_queue(self) -> None:
        """A car that waits at the red light."""
        junction = self.corridor.junctions[0]
        size = self.size()
        place = junction.stop_m - 1.0 - size[0] / 2
        car = Car('car_queue', place, 0.0, 0.0, 0.9 * self.ranges.speed_limit_mps, size,
                  self.color(), reacts=True)  # fmt: skip
        if self.signals and self.signals[0].red:
            self.cars.append(car)

    def add_pedestrian(self, s_m: float, *, crosses: bool, name: str = '') -> None:
        """A person at the edge, who crosses or waits."""
        section = self.corridor.section_at(s_m)
        right = self.chance(0.6)
        speed = self.within(self.ranges.pedestrian_speed_mps)
        timing = self.within(self.ranges.pedestrian_timing_s)
        back = self.within((0.9, 2.2))
        zebra = self.chance(0.7)
        near, far = section.right_m, section.left_m
        away = 0.35 if crosses else back
        start, goal = (near - away, far + 1.5) if right else (far + away, near - 1.5)
        trigger = min(max(abs(start) / speed + timing, 2.4), 4.2)
        number = len(self.pedestrians)
        self.pedestrians.append(
            Pedestrian(
                name or f'pedestrian_{number}', s_m, start, goal, speed, trigger,
                self.shirt(), self.color(30, 110), self.skin(), crosses,
            )
        )  # fmt: skip
        if zebra:
            self.extra_ground += bodies.zebra(self.corridor, s_m, self.paint)

    def add_scenery_traffic(self) -> None:
        """Oncoming and parked cars, cars beside, bystanders."""
        corridor, r = self.corridor, self.ranges
        share = max(1.0, corridor.length_m / 300.0)
        oncoming = 0.0 if self.quiet else r.oncoming_mean * share
        for number in range(int(self.rng.poisson(oncoming))):
            s = self.within((BEHIND_M + 25.0, corridor.length_m - 5.0))
            lane = int(self.rng.integers(corridor.section_at(s).opposing))
            speed = self.within((6.0, 11.0))
            if any(c.opposing_lane == lane and abs(c.s_m - s) < 14.0 for c in self.cars):
                continue
            lane = min([lane, *(x.section.opposing - 1 for x in corridor.stretches)])
            self.cars.append(
                Car(f'car_oncoming_{number}', s, 0.0, speed, speed, self.size(), self.color(),
                    opposing_lane=lane)
            )  # fmt: skip
        for number in range(int(self.rng.poisson(r.parked_mean * share))):
            s = self.within((BEHIND_M + 4.0, corridor.length_m - 5.0))
            if any(j.start_m - 8.0 < s < j.end_m + 8.0 for j in corridor.junctions):
                continue
            if any(abs(c.s_m - s) < 7.0 for c in self.cars if c.parked):
                continue
            if any(abs(o.s_m - s) < 8.0 for o in self.obstructions):
                continue
            d = corridor.section_at(s).right_m - 1.25
            self.cars.append(
                Car(f'car_parked_{number}', s, d, 0.0, 0.0, self.size(), self.color(), parked=True)
            )
        if self.family in ('lane_keeping', 'lead_vehicle') and self.chance(r.neighbour_share):
            self.add_neighbour()
        for number in range(2 if self.family == MIX else 1):
            if self.chance(r.bystander_share):
                s = self.within((BEHIND_M + 15.0, self.goal_m))
                if not any(j.start_m - 8.0 < s < j.end_m + 2.0 for j in corridor.junctions):
                    self.add_pedestrian(s, crosses=False, name=f'pedestrian_by_{number}')

    def add_neighbour(self) -> None:
        """A car in a lane beside."""
        section = self.corridor.stretches[0].section
        lanes = [-1] * bool(section.lanes_right) + [1] * bool(section.lanes_left)
        s, part = self.within((BEHIND_M - 5.0, BEHIND_M + 30.0)), self.rng.random()
        speed = self.within((5.0, 10.0))
        size, color = self.size(), self.color()
        if lanes:
            d = lanes[int(part * len(lanes))] * LANE_WIDTH_M
            self.cars.append(Car('car_beside', s, d, speed, speed, size, color))

    def populate_mix(self) -> None:
        """Leads and pedestrians along the long road."""
        for index, stretch in enumerate(self.corridor.stretches[:-1]):
            what = self.rng.random()
            junction = self.corridor.junctions[index]
            start = max(stretch.start_m, BEHIND_M + 20.0)
            if what < 0.4:
                before = len(self.cars)
                self.add_lead(start + 5.0, 5.0)
                lead = self.cars[before]
                lead.name = f'car_lead_{index}'
                lead.s_m = min(lead.s_m, junction.stop_m - 15.0)
                if lead.speed_mps > 0.0 or not lead.events:
                    # It waits for the ego to come near, so that they meet.
                    lead.events = (BrakeEvent(-math.inf, 30.0, 3.0, 0.0, 0.5), *lead.events)
                    lead.speed_mps = 0.0
                path = leaving_path(self.corridor, junction)
                lead.leaves_m, lead.leaves_by = junction.start_m, path
                if not path:
                    del self.cars[before]
            elif what < 0.75:
                s = float(self.rng.uniform(start + 25.0, max(stretch.end_m - 25.0, start + 26.0)))
                waits = self.chance(self.ranges.pedestrian_waits_share)
                self.add_pedestrian(min(s, junction.stop_m - 12.0), crosses=not waits)

    # -- what closes part of the road --------------------------------------------------------

    def shift_past(
        self, start_m: float, end_m: float, ramp_m: float, by_m: float, speed_mps: float
    ) -> None:
        """Lead the line `by_m` to the left past a place, slowly."""
        over_m = start_m - CLEAR_BEFORE_M - ramp_m
        self.shifts.append(Shift(over_m, ramp_m, by_m))
        self.shifts.append(Shift(end_m + CLEAR_AFTER_M, ramp_m, -by_m))
        self.slow.append((over_m, end_m + CLEAR_AFTER_M, speed_mps))

    def add_obstruction(self, kind: str, s_m: float, d_m: float, *, width_m: float = 0.45) -> None:
        """Put a cone or a barrier on the road."""
        pose = self.corridor.place(s_m, d_m)
        name = f'{kind}_{len(self.obstructions)}'
        thing = Obstruction(name, kind, s_m, pose, min(width_m, 0.45), width_m, 1.0)
        self.obstructions.append(thing)
        self.obstruction_boxes.append(obstruction_box(thing))

    def add_parked_car(self, s_m: float, d_m: float, size: tuple[float, float, float]) -> None:
        """Park a car partly in the lane."""
        pose = self.corridor.place(s_m, d_m)
        name = f'car_parked_in_lane_{len(self.obstructions)}'
        self.obstructions.append(Obstruction(name, 'vehicle', s_m - size[0] / 2, pose, *size))
        self.obstruction_boxes.append(bodies.car(pose, size, self.color(), braking=False))

    # -- scenery ---------------------------------------------------------------------------

    def draw_route(self) -> np.ndarray:
        """The coarse route."""
        steps = [0.0]
        while steps[-1] < self.corridor.length_m - 5.0:
            steps.append(
                min(steps[-1] + self.within(self.ranges.route_step_m), self.corridor.length_m)
            )
        told = self.shifts if self.announced else ()
        line = np.array([sum(shift.at(s)[0] for shift in told) for s in steps], dtype=np.float64)
        points = self.corridor.places(np.array(steps), line)[:, :2]
        return points + self.rng.normal(size=points.shape) * self.ranges.route_noise_sd_m

    def draw_tint(self) -> Tint:
        """Light and weather."""
        sky = tuple(int(v) for v in np.array([160, 190, 220]) + self.rng.integers(-20, 20, 3))
        ground = tuple(int(v) for v in np.array([90, 125, 90]) + self.rng.integers(-15, 15, 3))
        return Tint(self.within((0.75, 1.1)), sky, ground)  # type: ignore[arg-type]

    def draw_paint(self) -> bodies.Paint:
        """Colors of the ground."""
        grey = int(self.rng.integers(70, 101))
        verge = int(self.rng.integers(130, 170))
        divider = (235, 200, 70) if self.chance(0.6) else (235, 235, 235)
        return bodies.Paint(
            (grey, grey, grey + 3),
            (verge, verge, verge),
            (235, 235, 235),
            divider,
            self.chance(0.5),
            self.within((1.8, 3.5)),
        )

    def draw_houses(self) -> tuple[Box, ...]:
        """Houses clear of the road."""
        corridor = self.corridor
        found: list[Box] = []
        drafts = []
        for side in (-1.0, 1.0):
            s = self.within((0.0, 15.0))
            while s < corridor.length_m - 10.0:
                length, width = self.within((6.0, 16.0)), self.within((6.0, 10.0))
                height, set_back = self.within((3.0, 14.0)), self.within((4.5, 11.0))
                color, keep = self.color(60, 200), self.chance(0.7)
                if keep:
                    section = corridor.section_at(s + length / 2)
                    edge = section.left_m if side > 0 else section.right_m
                    d = edge + side * (set_back + width / 2)
                    pose = corridor.place(s + length / 2, d)
                    drafts.append((pose, (length, width, height), color))
                s += length + self.within((1.0, 12.0))
        for pose, size, color in drafts:
            if is_free(corridor, pose, size):
                found.append(bodies.house(pose, size, color))
        return tuple(found)
