"""The moving world: ego vehicle, traffic, pedestrians and lights on a corridor, step by step.

All chance lies in the scenario; from there a world is a function of the commands it gets. A
mirrored world is the same world seen in a mirror (left-hand traffic): the simulation inside is
untouched, everything that goes in or out is flipped in y.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np

from spanvla_ros.geometry import box_corners
from spanvla_ros.town import bodies
from spanvla_ros.town.elements import Box, GroundPolygon, Tint
from spanvla_ros.town.lane_map import ego_lane, route_ids
from spanvla_ros.town.mirror import flip_box, flip_ego, flip_scene
from spanvla_ros.town.motion import boxes_overlap, drive_bicycle, inside
from spanvla_ros.town.outcome import Outcome, Tally
from spanvla_ros.town.road_users import (
    Car,
    Pedestrian,
    Signal,
    Street,
    along_path,
    has_left,
    move_car,
    opposing_offset,
    stay_in_lane,
    switch,
    walk,
)
from spanvla_ros.town.roads import LANE_WIDTH_M, Corridor
from spanvla_ros.town.surroundings import Surroundings
from spanvla_ros.types import (
    DriveCommand,
    EgoState,
    Route,
    Scene,
    SceneAgent,
    SceneEgo,
    SceneLight,
    Vehicle,
)

OFFROAD_SUCCESS_M = 3.0
GOAL_OFFSET_M = 2.0


@dataclass
class World:
    """One drive through a corridor."""

    around: Surroundings
    vehicle: Vehicle
    cars: list[Car]
    pedestrians: list[Pedestrian]
    signals: list[Signal]
    state: EgoState
    hazard: str = ''
    mirror: bool = False
    time_s: float = 0.0
    ego_s_m: float = 0.0
    ego_d_m: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        """Find the ego on the corridor."""
        self._relocate(self.around.start_m)
        self.tally.best_s_m = self.ego_s_m

    # -- what others see -------------------------------------------------------------------

    @property
    def corridor(self) -> Corridor:
        """The road, unmirrored."""
        return self.around.corridor

    @property
    def tint(self) -> Tint:
        """Light and weather of the picture."""
        return self.around.tint

    @property
    def ego(self) -> EgoState:
        """The ego in the world frame."""
        return flip_ego(self.state) if self.mirror else self.state

    @property
    def finished(self) -> bool:
        """Whether the goal is reached, something was hit, or time is up."""
        return (
            self.ego_s_m >= self.around.goal_m
            or bool(self.tally.collided_with)
            or self.time_s >= self.around.time_limit_s
        )

    @property
    def beside_line_m(self) -> float:
        """How far left of the line to drive the ego is."""
        return self.ego_d_m - self.around.line_at(self.ego_s_m)[0]

    def must_yield(self) -> bool:
        """Whether the ego has to let someone pass who comes straight on."""
        crossing = self.around.crossing
        return crossing is not None and crossing.must_yield(
            self.cars, self.ego_s_m, self.state.speed_mps
        )

    def line_heading_rad(self) -> float:
        """World heading of the line to drive beside the ego, unmirrored."""
        slope = self.around.line_at(self.ego_s_m)[1]
        return self.corridor.place(self.ego_s_m, 0.0)[2] + math.atan(slope)

    def route(self) -> Route:
        """The announced coarse path, the same for the whole drive."""
        points = self.around.route_points
        if self.mirror:
            points = points * [1.0, -1.0]
        return Route(round(self.state.stamp_ns), 'odom', points, self.command())

    def command(self) -> str:
        """The navigation command: the next turn within 40 m, else `follow`."""
        for junction in self.corridor.junctions:
            if junction.start_m - 40.0 < self.ego_s_m < junction.end_m:
                if self.mirror and junction.turn in ('left', 'right'):
                    return 'left' if junction.turn == 'right' else 'right'
                return junction.turn
        return 'follow'

    def ground(self) -> tuple[GroundPolygon, ...]:
        """The painted ground, static; later polygons cover earlier ones."""
        return self.around.mirrored_ground if self.mirror else self.around.ground

    def boxes(self) -> tuple[Box, ...]:
        """Everything that stands upright, now."""
        found = list(self.around.houses)
        for other in self.cars:
            pose = self.car_pose(other)
            found.append(
                bodies.car(
                    pose, other.size, other.color, braking=other.braking, blinks=other.blinks
                )
            )
        for walker in self.pedestrians:
            found.extend(
                bodies.person(
                    self.pedestrian_pose(walker), walker.shirt, walker.trousers, walker.skin
                )
            )
        for light in self.signals:
            junction = self.corridor.junctions[light.junction]
            section = self.corridor.section_at(junction.start_m - 1.0)
            near = self.corridor.place(junction.start_m - 2.0, section.right_m - 0.7)
            if light.sign:
                found.extend(bodies.stop_sign(near))
            else:
                found.extend(bodies.signal(near, red=light.red))
        return tuple(flip_box(box) for box in found) if self.mirror else tuple(found)

    def outcome(self) -> Outcome:
        """The drive so far, judged."""
        tally, around = self.tally, self.around
        done = (tally.best_s_m - around.start_m) / (around.goal_m - around.start_m)
        reached = tally.best_s_m >= around.goal_m and abs(self.beside_line_m) < GOAL_OFFSET_M
        return Outcome(
            collided=bool(tally.collided_with),
            at_fault=tally.at_fault,
            collided_with=tally.collided_with,
            offroad_m=tally.offroad_m,
            red_lights_run=tally.red_lights_run,
            completion=min(max(done, 0.0), 1.0),
            distance_m=tally.distance_m,
            time_s=self.time_s,
            reached_goal=reached,
            success=reached
            and not tally.collided_with
            and tally.red_lights_run == 0
            and tally.offroad_m <= OFFROAD_SUCCESS_M,
        )

    # -- variants --------------------------------------------------------------------------

    def clone(self) -> World:
        """An independent copy; what never changes is shared."""
        twin = copy.copy(self)
        twin.cars = [copy.copy(c) for c in self.cars]
        twin.pedestrians = [copy.copy(p) for p in self.pedestrians]
        twin.signals = [copy.copy(s) for s in self.signals]
        twin.tally = copy.copy(self.tally)
        return twin

    def mirrored(self) -> World:
        """The same world in a mirror; its ego, route, map and pictures are flipped in y."""
        twin = self.clone()
        twin.mirror = not self.mirror
        return twin

    def without_hazard(self, kind: str = '') -> World:
        """The same world without its hazard.

        `lead`, `pedestrian`, `sign`, `oncoming`, `traffic` and `obstruction` vanish, `light` is
        green, `merge` keeps to its own lane.
        """
        twin = self.clone()
        kind = kind or self.hazard
        if kind == 'lead':
            twin.cars = [c for c in twin.cars if not c.reacts]
        elif kind == 'pedestrian':
            twin.pedestrians = [p for p in twin.pedestrians if not p.crosses]
        elif kind == 'light':
            for light in twin.signals:
                light.red = False
        elif kind == 'sign':
            twin.signals = [light for light in twin.signals if not light.sign]
        elif kind in ('oncoming', 'traffic'):
            twin.cars = [c for c in twin.cars if not c.goes_first]
        elif kind == 'merge':
            for car in twin.cars:
                stay_in_lane(car)
        elif kind == 'obstruction' and twin.around.cleared is not None:
            twin.around = twin.around.cleared
        return twin

    def place_ego(self, ego: EgoState) -> None:
        """Put the ego somewhere (unmirrored world frame), without driving there."""
        self.state = ego
        self._relocate(self.ego_s_m)

    # -- motion ----------------------------------------------------------------------------

    def step(self, command: DriveCommand, dt_s: float) -> None:
        """Advance by `dt_s`: the ego answers the command within its limits, traffic reacts."""
        before = self.state
        steering = float(-command.steering_rad if self.mirror else command.steering_rad)
        self.state = drive_bicycle(before, float(command.speed_mps), steering, self.vehicle, dt_s)
        self.advance(dt_s)
        moved = math.hypot(self.state.x_m - before.x_m, self.state.y_m - before.y_m)
        front = self.vehicle.rear_axle_to_center_m + self.vehicle.length_m / 2
        was = self.ego_s_m
        self._relocate(was)
        self.tally.distance_m += moved
        self.tally.best_s_m = max(self.tally.best_s_m, self.ego_s_m)
        if self._offroad():
            self.tally.offroad_m += moved
        for light in self.signals:
            line = self.corridor.junctions[light.junction].stop_m + 0.5
            if light.red and was + front < line <= self.ego_s_m + front:
                self.tally.red_lights_run += 1
        if not self.tally.collided_with:
            self._notice_collision()

    def advance(self, dt_s: float) -> None:
        """Move everything but the ego."""
        self.time_s += dt_s
        street = Street(
            self.corridor,
            self.around.limits_mps,
            tuple(self.cars),
            tuple(self.pedestrians),
            tuple(self.signals),
            self.ego_s_m,
            self.state.speed_mps,
            self.time_s,
        )
        for light in self.signals:
            switch(light, street)
        for walker in self.pedestrians:
            walk(walker, street, dt_s)
        for car in self.cars:
            if not car.parked:
                move_car(car, street, dt_s)
        end_m = self.corridor.length_m + 30.0
        self.cars = [c for c in self.cars if -30.0 < c.s_m < end_m and not has_left(c)]

    def car_pose(self, car: Car) -> tuple[float, float, float]:
        """A car's center pose, unmirrored."""
        if car.s_m < car.joins_m:
            return along_path(car.joins_by, len(car.joins_by) - 1 - (car.joins_m - car.s_m))
        past = car.s_m - car.leaves_m
        if past > 0 and car.leaves_by:
            return along_path(car.leaves_by, past)
        if car.s_m > car.straight_m:
            x, y, yaw = self.corridor.place(car.straight_m, self.car_offset(car))
            beyond = car.s_m - car.straight_m
            return x + beyond * math.cos(yaw), y + beyond * math.sin(yaw), yaw + math.pi
        x, y, yaw = self.corridor.place(car.s_m, self.car_offset(car))
        return x, y, yaw + car.drift_rad if car.ahead else yaw + math.pi

    def car_offset(self, car: Car) -> float:
        """A car's offset now; oncoming cars keep to their side where the road changes width."""
        if car.opposing_lane is None:
            return car.d_m
        return opposing_offset(self.corridor, min(car.s_m, car.straight_m), car.opposing_lane)

    def pedestrian_pose(self, walker: Pedestrian) -> tuple[float, float, float]:
        """A pedestrian's pose facing its goal, unmirrored."""
        x, y, yaw = self.corridor.place(walker.s_m, walker.d_m)
        return x, y, yaw + (math.pi / 2 if walker.left_going else -math.pi / 2)

    def _relocate(self, near_m: float) -> None:
        s, d = self.corridor.locate(self.state.x_m, self.state.y_m, near_m)
        self.ego_s_m, self.ego_d_m = s, d

    def _ego_box(self) -> np.ndarray:
        shift = self.vehicle.rear_axle_to_center_m
        e = self.state
        centre = np.array(
            [e.x_m + shift * math.cos(e.yaw_rad), e.y_m + shift * math.sin(e.yaw_rad), e.yaw_rad]
        )
        return box_corners(centre, self.vehicle.length_m, self.vehicle.width_m)

    def _offroad(self) -> bool:
        """Whether a corner is off the drivable ground or, on a stretch, beyond the divider."""
        corridor = self.corridor
        for x, y in self._ego_box().tolist():
            s, d = corridor.locate(x, y, self.ego_s_m)
            section = corridor.section_at(s)
            near_junction = any(j.start_m - 3.0 <= s <= j.end_m + 3.0 for j in corridor.junctions)
            high = section.left_m if near_junction else section.divider_m + LANE_WIDTH_M / 2
            if section.right_m <= d <= high and not any(
                j.start_m < s < j.end_m for j in corridor.junctions
            ):
                continue
            if not any(inside(area, x, y) for area in corridor.areas):
                return True
        return False

    def _notice_collision(self) -> None:
        e = self.state
        near = 12.0
        mine: np.ndarray | None = None
        for name, pose, length, width, _ in self.bodies():
            if abs(pose[0] - e.x_m) > near or abs(pose[1] - e.y_m) > near:
                continue
            mine = self._ego_box() if mine is None else mine
            if boxes_overlap(mine, box_corners(np.array(pose), length, width)):
                self.tally.collided_with = name
                ahead = (pose[0] - e.x_m) * math.cos(e.yaw_rad) + (pose[1] - e.y_m) * math.sin(
                    e.yaw_rad
                )
                self.tally.at_fault = e.speed_mps > 0.1 and ahead > 0.0
                return

    def bodies(self) -> list[tuple[str, tuple[float, float, float], float, float, float]]:
        """Name, center pose, length, width and speed of every road user, unmirrored."""
        found = [(c.name, self.car_pose(c), c.size[0], c.size[1], c.speed_mps) for c in self.cars]
        found += [
            (p.name, self.pedestrian_pose(p), 0.6, 0.6, p.speed_mps if p.walking else 0.0)
            for p in self.pedestrians
        ]
        found += [(o.name, o.pose, o.length_m, o.width_m, 0.0) for o in self.around.obstructions]
        return found

    # -- for scoring and recording ---------------------------------------------------------

    def scene(self) -> Scene:
        """The world now as a `types.Scene`: one state per road user."""
        agents = []
        standing = {o.name: o for o in self.around.obstructions}
        for name, pose, length, width, speed in self.bodies():
            pedestrian = name.startswith('pedestrian')
            kind, height = ('pedestrian', 1.8) if pedestrian else ('vehicle', 1.6)
            if name in standing:
                kind, height = standing[name].kind, standing[name].height_m
            row = [*pose, speed * math.cos(pose[2]), speed * math.sin(pose[2])]
            agents.append(
                SceneAgent(
                    name,
                    kind,
                    length,
                    width,
                    height,
                    np.zeros(1),
                    np.array([row]),
                )
            )
        lanes = self.around.corridor
        red = tuple(
            SceneLight(f'j{s.junction}_{ego_lane(lanes.stretches[s.junction].section)}')
            for s in self.signals
            if s.red
        )
        e = self.state
        scene = Scene(
            name=f'{self.around.family}_{self.around.seed}_{self.time_s:.2f}',
            ego=SceneEgo(
                e.x_m,
                e.y_m,
                e.yaw_rad,
                e.speed_mps,
                ax_mps2=e.accel_mps2,
                steering_rad=e.steering_rad,
                yaw_rate_radps=e.yaw_rate_radps,
            ),
            map=self.around.scene_map,
            route=route_ids(lanes),
            agents=tuple(agents),
            red_lights=red,
            kind=self.around.family,
        )
        return flip_scene(scene) if self.mirror else scene
