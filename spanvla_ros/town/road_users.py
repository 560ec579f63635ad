"""Road users besides the ego: what they are and how they move.

Cars follow the intelligent driver model (Treiber, Hennecke, Helbing 2000) and scripts of braking;
pedestrians cross when the ego comes near, so that every driver meets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spanvla_ros.town.elements import Color
from spanvla_ros.town.roads import LANE_WIDTH_M, Corridor

IDM_ACCEL_MPS2 = 1.5
IDM_DECEL_MPS2 = 2.5
IDM_GAP_M = 2.5
IDM_HEADWAY_S = 1.2
LEAVING_MPS = 6.0
CLEAR_AFTER_LEAVING_M = 9.0
# From the ego's base_link to its front bumper.
FRONT_M = 4.05
EGO_REAR_M = 1.2
LANE_HALF_M = 1.6
# A stop sign is obeyed by standing (or nearly) so near before its line.
STOOD_MPS = 0.5
STOOD_WITHIN_M = 4.0


@dataclass(frozen=True)
class BrakeEvent:
    """A script of a car: beyond `at_m`, the ego within `trigger_m` behind: slow, wait, go on.

    With `at_m` minus infinity the car keeps to `to_mps` until the ego is near, or has come to
    `ego_at_m` where that is given.
    """

    at_m: float
    trigger_m: float
    decel_mps2: float
    to_mps: float
    hold_s: float
    ego_at_m: float | None = None


@dataclass(frozen=True)
class Merge:
    """A car's way into the ego's lane: from `from_m`, once the ego is `trigger_m` behind it."""

    from_m: float
    to_m: float
    trigger_m: float
    duration_s: float


@dataclass
class Car:
    """A vehicle on the corridor at box center `s_m`, offset `d_m`.

    An oncoming one keeps to `opposing_lane` instead, counted from the divider. Beyond
    `straight_m` its way lies straight on where the corridor turns. Until `joins_m` it comes by
    the path `joins_by`, into the ego's lane; it keeps its distance to the ego there.

    Cars of the ego's lane and direction with `reacts` follow the intelligent driver model and
    obey lights and pedestrians. `leaves_m`: from there it leaves by the arm of `leaves_by`.
    """

    name: str
    s_m: float
    d_m: float
    speed_mps: float
    desired_mps: float
    size: tuple[float, float, float]
    color: Color
    opposing_lane: int | None = None
    reacts: bool = False
    parked: bool = False
    events: tuple[BrakeEvent, ...] = ()
    leaves_m: float = math.inf
    leaves_by: tuple[tuple[float, float, float], ...] = ()
    accel_mps2: float = 0.0
    event_since_s: float | None = None
    merge: Merge | None = None
    merged: float = 0.0
    drift_rad: float = 0.0
    straight_m: float = math.inf
    joins_m: float = -math.inf
    joins_by: tuple[tuple[float, float, float], ...] = ()

    @property
    def blinks(self) -> int:
        """Which way it indicates: 1 left, -1 right, 0 not."""
        if self.merge is None or not 0.0 < self.merged < 1.0:
            return 0
        return 1 if self.merge.to_m > self.merge.from_m else -1

    @property
    def off_lane(self) -> bool:
        """Whether it has left the ego's lane at a junction, or is not there yet."""
        comes = self.s_m + self.size[0] / 2 < self.joins_m
        return comes or self.s_m > self.leaves_m + CLEAR_AFTER_LEAVING_M

    @property
    def goes_first(self) -> bool:
        """Whether the ego has to let it pass."""
        return self.straight_m < math.inf or self.joins_m > -math.inf

    @property
    def ahead(self) -> bool:
        """Whether it goes the ego's way."""
        return self.opposing_lane is None

    @property
    def braking(self) -> bool:
        """Whether the brake lamps are lit."""
        return not self.parked and (self.accel_mps2 < -0.4 or self.speed_mps < 0.1)


@dataclass
class Pedestrian:
    """A person at `s_m`, `d_m`; crosses to `to_m` once the ego is `trigger_s` or 10 m away."""

    name: str
    s_m: float
    d_m: float
    to_m: float
    speed_mps: float
    trigger_s: float
    shirt: Color
    trousers: Color
    skin: Color
    crosses: bool = True
    walking: bool = False
    gone: bool = False

    @property
    def left_going(self) -> bool:
        """Whether it walks towards larger offsets."""
        return self.to_m > self.d_m


@dataclass
class Signal:
    """The light of one junction: red until `green_after_s` after the ego came within reach.

    With `sign` it is a stop sign: red until the ego has stood before the line.
    """

    junction: int
    red: bool
    green_after_s: float
    trigger_m: float = 45.0
    seen_s: float | None = None
    switched_s: float | None = None
    sign: bool = False


@dataclass(frozen=True)
class Street:
    """What road users take into account: the road, each other, the lights, the ego."""

    corridor: Corridor
    limits_mps: tuple[float, ...]
    cars: tuple[Car, ...]
    pedestrians: tuple[Pedestrian, ...]
    signals: tuple[Signal, ...]
    ego_s_m: float
    ego_mps: float
    time_s: float


def idm(speed: float, desired: float, gap: float, closing: float) -> float:
    """Acceleration of the intelligent driver model (Treiber 2000) behind something at `gap`."""
    wish = IDM_GAP_M + max(
        0.0,
        speed * IDM_HEADWAY_S + speed * closing / (2 * math.sqrt(IDM_ACCEL_MPS2 * IDM_DECEL_MPS2)),
    )
    free = 1.0 - (speed / max(desired, 0.1)) ** 4
    return IDM_ACCEL_MPS2 * (max(free, -2.0) - (wish / max(gap, 0.2)) ** 2)


def switch(light: Signal, street: Street) -> None:
    """Turn a light green once the ego has been near for long enough."""
    gap = street.corridor.junctions[light.junction].stop_m - street.ego_s_m
    if light.seen_s is None and gap < light.trigger_m:
        light.seen_s = street.time_s
    if light.sign:
        stood = street.ego_mps < STOOD_MPS and gap - FRONT_M < STOOD_WITHIN_M
        light.red = light.red and not stood
        return
    waited = street.time_s - light.seen_s if light.seen_s is not None else 0.0
    if light.red and waited >= light.green_after_s:
        light.red = False
        light.switched_s = street.time_s


def walk(walker: Pedestrian, street: Street, dt_s: float) -> None:
    """Move a pedestrian: wait for the ego, cross, stand on the other side."""
    if not walker.crosses or walker.gone:
        return
    if not walker.walking:
        ahead_m = walker.s_m - street.ego_s_m
        walker.walking = 0.0 < ahead_m < max(10.0, street.ego_mps * walker.trigger_s)
        return
    move = walker.speed_mps * dt_s
    left = walker.to_m - walker.d_m
    if abs(left) <= move:
        # It stays short of `to_m`, and so turned the way it walked.
        walker.walking, walker.gone = False, True
        return
    walker.d_m += math.copysign(move, left)


def move_car(car: Car, street: Street, dt_s: float) -> None:
    """Move a car along its lane by its wishes, its script and what stands in its way."""
    desired = car.desired_mps
    forced = math.inf
    if car.events:
        desired, forced = _script(car, street)
    if car.ahead:
        place = min(max(int(car.s_m * 2), 0), len(street.limits_mps) - 1)
        desired = min(desired, street.limits_mps[place] + 1.0)
        if car.leaves_by and car.s_m > car.leaves_m - 15.0:
            desired = min(desired, LEAVING_MPS)
    accel = min(max((desired - car.speed_mps) / 0.6, -2.5), 1.5)
    if car.reacts and car.s_m < car.leaves_m + CLEAR_AFTER_LEAVING_M:
        for gap, speed in _obstacles(car, street):
            accel = min(accel, idm(car.speed_mps, max(desired, 1.0), gap, car.speed_mps - speed))
    if car.joins_by:
        for gap, speed in _on_the_ring(car, street):
            accel = min(accel, idm(car.speed_mps, max(desired, 1.0), gap, car.speed_mps - speed))
    if not car.ahead:
        gap, speed = _oncoming_obstacle(car, street)
        accel = min(accel, idm(car.speed_mps, max(desired, 1.0), gap, car.speed_mps - speed))
    accel = max(min(accel, forced), -6.0)
    speed = max(0.0, car.speed_mps + accel * dt_s)
    car.accel_mps2 = (speed - car.speed_mps) / dt_s
    move = 0.5 * (speed + car.speed_mps) * dt_s
    car.s_m += move if car.ahead else -move
    car.speed_mps = speed
    if car.merge is not None:
        _change_lane(car, car.merge, street, dt_s)


def _change_lane(car: Car, merge: Merge, street: Street, dt_s: float) -> None:
    gap = car.s_m - car.size[0] / 2 - street.ego_s_m - FRONT_M
    if car.merged == 0.0 and gap > merge.trigger_m:
        return
    before = car.d_m
    # It only turns as far as it rolls.
    car.merged = min(car.merged + dt_s / merge.duration_s * min(1.0, car.speed_mps / 2.0), 1.0)
    part = car.merged * car.merged * (3.0 - 2.0 * car.merged)
    car.d_m = merge.from_m + part * (merge.to_m - merge.from_m)
    car.drift_rad = math.atan2(car.d_m - before, max(car.speed_mps * dt_s, 0.1))
    car.reacts = True


def stay_in_lane(car: Car) -> None:
    """Take back a lane change that has begun, and the wish for one."""
    if car.merge is not None:
        car.d_m, car.drift_rad, car.reacts = car.merge.from_m, 0.0, False
        car.merge = None


def takes_lane(car: Car, line_m: float = 0.0, clear_m: float = LANE_HALF_M) -> bool:
    """Whether a car is in the way of one who drives at offset `line_m`, or is getting there."""
    if not car.ahead or car.off_lane:
        return False
    return abs(car.d_m - line_m) < clear_m or (car.merge is not None and car.merged > 0.0)


def _script(car: Car, street: Street) -> tuple[float, float]:
    """Desired speed and upper bound of acceleration from the car's next brake event."""
    event = car.events[0]
    gap = car.s_m - car.size[0] / 2 - street.ego_s_m - FRONT_M
    if car.event_since_s is None:
        waits = gap > event.trigger_m
        if event.ego_at_m is not None:
            waits = street.ego_s_m < event.ego_at_m
        if waits and event.at_m == -math.inf:
            return event.to_mps, math.inf
        if waits or car.s_m < event.at_m:
            return car.desired_mps, math.inf
        car.event_since_s = street.time_s
    if car.speed_mps > event.to_mps + 0.05:
        car.event_since_s = street.time_s
        return event.to_mps, -event.decel_mps2
    if street.time_s - car.event_since_s > event.hold_s:
        car.events = car.events[1:]
        car.event_since_s = None
        return car.desired_mps, math.inf
    return event.to_mps, 0.0


def _obstacles(car: Car, street: Street) -> list[tuple[float, float]]:
    front = car.s_m + car.size[0] / 2
    found = [
        (other.s_m - other.size[0] / 2 - front, other.speed_mps)
        for other in street.cars
        if other.ahead and other.reacts and other.s_m > car.s_m and not other.off_lane
    ]
    for light in street.signals:
        gap = street.corridor.junctions[light.junction].stop_m - front
        if light.red and gap > 0 and car.speed_mps**2 / (2 * max(gap, 0.1)) < 5.0:
            found.append((gap + 1.5, 0.0))
    for walker in street.pedestrians:
        gap = walker.s_m - 1.0 - front
        if on_road(walker, street) and gap > 0:
            found.append((gap, 0.0))
    return found


def _on_the_ring(car: Car, street: Street) -> list[tuple[float, float]]:
    """Others that come by the ring or left it, and the ego once it is there."""
    front = car.s_m + car.size[0] / 2
    found = [
        (other.s_m - other.size[0] / 2 - front, other.speed_mps)
        for other in street.cars
        if other.joins_by and other.s_m > car.s_m
    ]
    # The ego's bumper is on the ring before its base_link is.
    if street.ego_s_m > max(car.joins_m - FRONT_M, car.s_m):
        found.append((street.ego_s_m - EGO_REAR_M - front, street.ego_mps))
    return found


def _oncoming_obstacle(car: Car, street: Street) -> tuple[float, float]:
    """Oncoming cars wait for people in front of them and keep apart."""
    best = (1e3, 0.0)
    front = car.s_m - car.size[0] / 2
    for walker in street.pedestrians:
        gap = front - walker.s_m - 1.0
        if 0 < gap < best[0] and on_road(walker, street):
            best = (gap, 0.0)
    for other in street.cars:
        if other is not car and other.opposing_lane == car.opposing_lane:
            gap = front - other.s_m - other.size[0] / 2
            if 0 < gap < best[0]:
                best = (gap, other.speed_mps)
    return best


def on_road(walker: Pedestrian, street: Street) -> bool:
    """Whether a person stands or walks on the road's surface."""
    section = street.corridor.section_at(walker.s_m)
    return section.right_m < walker.d_m < section.left_m


def opposing_offset(corridor: Corridor, s_m: float, lane: int) -> float:
    """Offset of opposing lane number `lane` (0 next to the divider), blended at junctions."""
    found = None
    for index, stretch in enumerate(corridor.stretches):
        offset = stretch.section.divider_m + (lane + 0.5) * LANE_WIDTH_M
        if s_m < stretch.start_m and found is not None:
            gap_start = corridor.stretches[index - 1].end_m
            part = (s_m - gap_start) / (stretch.start_m - gap_start)
            return found + (offset - found) * min(max(part, 0.0), 1.0)
        found = offset
        if s_m <= stretch.end_m:
            break
    return found if found is not None else LANE_WIDTH_M


def along_path(
    path: tuple[tuple[float, float, float], ...], distance_m: float
) -> tuple[float, float, float]:
    """Pose on a path of 1 m spacing; beyond its end straight on."""
    index = min(int(distance_m), len(path) - 1)
    x, y, yaw = path[index]
    past = distance_m - index
    if index + 1 < len(path):
        nx, ny, nyaw = path[index + 1]
        return x + past * (nx - x), y + past * (ny - y), yaw + past * (nyaw - yaw)
    return x + past * math.cos(yaw), y + past * math.sin(yaw), yaw


def has_left(car: Car) -> bool:
    """Whether a car has come to the end of the arm it left by."""
    return car.s_m - car.leaves_m > len(car.leaves_by) + 5.0
