"""Closed loop against the stand-in for CARLA: routes on a map, the whole contract in between.

Run with `python -m spanvla_ros.town.carla_routes MAP.xodr --routes 5 --out DIR`. Each tick, the
stand-in's messages go through the same readers as on board; planner, guardian and follower cores
drive; their command goes back as CARLA's control. The stand-in is the town, not CARLA: the
figures say that signs, units and origins fit, and how the model drives on that map's roads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from spanvla_ros.carla import MAP_FRAME, thin_route, to_rear_axle
from spanvla_ros.controls import carla_control, fill_carla_control
from spanvla_ros.messages import (
    Intrinsics,
    read_camera_info,
    read_image,
    read_odometry,
    read_route,
)
from spanvla_ros.model.checkpoint import shipped_model_dir, write_text
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.runtime.virtual_camera import VirtualCamera
from spanvla_ros.safety.follower import Follower
from spanvla_ros.safety.state import Guardian, GuardianParameters
from spanvla_ros.town.bodies import Paint
from spanvla_ros.town.carla_stand_in import Make, StandIn, Topic
from spanvla_ros.town.driver import BlindRouteFollower
from spanvla_ros.town.lockstep import PlannerLike, ThinkingPlanner
from spanvla_ros.town.opendrive import load_opendrive
from spanvla_ros.town.opendrive_ground import paint_map
from spanvla_ros.town.opendrive_routes import route_world
from spanvla_ros.types import SpanvlaError, Vehicle

DRIVE_M = 250.0
# From picture to plan, in ticks.
LATENCY_TICKS = 2
REASON_TOKENS = 4


@dataclass(frozen=True)
class RouteResult:
    """How one route went."""

    seed: int
    completion: float
    reached_goal: bool
    collided_with: str
    at_fault: bool
    offroad_m: float
    distance_m: float
    time_s: float
    states: dict[str, int]


class Driver:
    """The on-board cores behind the bridge's messages."""

    def __init__(
        self,
        planner: PlannerLike,
        config: ModelConfig,
        stand_in: StandIn,
        make_control: Callable[[], Any],
    ) -> None:
        """Start empty; `make_control` gives an empty `CarlaEgoVehicleControl`."""
        vehicle = stand_in.world.vehicle
        self.planner, self.stand_in = planner, stand_in
        self.builder = ObservationBuilder(config)
        self.guardian = Guardian(vehicle, GuardianParameters(frame_id=MAP_FRAME))
        self.follower = Follower(vehicle)
        self.states: dict[str, int] = {}
        self._make_control = make_control
        self._specs = {camera.name: camera for camera in config.cameras}
        self._infos: dict[str, Intrinsics] = {}
        self._views: dict[str, VirtualCamera] = {}
        self._on_way: list[tuple[int, str]] = []
        self._ticks = 0

    def control(self, topics: Sequence[Topic]) -> Any:
        """The control that answers a tick's messages."""
        ego, pictures_ns = None, None
        for topic in topics:
            parts = topic.name.split('/')
            if parts[-1] == 'odometry':
                message = to_rear_axle(topic.message, self.stand_in.origin_ahead_m)
                ego = read_odometry(message)
                self.builder.add_ego(ego)
                self.guardian.on_ego(ego, ego.stamp_ns)
            elif parts[-1] == 'waypoints':
                self._take_route(topic.message)
            elif parts[-1] == 'camera_info':
                self._take_info(parts[-2], read_camera_info(topic.message))
            elif parts[-1] == 'image':
                pictures_ns = self._take_picture(parts[-2], topic.message)
        if ego is None:
            raise SpanvlaError('stand-in: a tick without odometry')
        if pictures_ns is not None:
            observation = self.builder.build(pictures_ns)
            if observation is not None:
                plan = self.planner.plan(observation)
                track = replace(plan.trajectory, frame_id=MAP_FRAME)
                text = replace(plan, trajectory=track).to_json()
                self._on_way.append((self._ticks + LATENCY_TICKS, text))
                if isinstance(self.planner, ThinkingPlanner):
                    self.planner.reason_slice(math.inf, REASON_TOKENS)
        while self._on_way and self._on_way[0][0] <= self._ticks:
            self.guardian.on_plan_text(self._on_way.pop(0)[1], ego.stamp_ns)
        self._ticks += 1
        output = self.guardian.tick(ego.stamp_ns)
        if output is not None:
            self.states[output.state] = self.states.get(output.state, 0) + 1
        trajectory = None if output is None else output.trajectory
        command = self.follower.command(trajectory, ego, ego.stamp_ns)
        control = carla_control(command, ego.speed_mps, self.stand_in.car)
        return fill_carla_control(self._make_control(), control, ego.stamp_ns)

    def _take_route(self, message: Any) -> None:
        route = read_route(message)
        route = replace(route, points=route.points[thin_route(route.points)])
        self.builder.set_route(route)
        self.guardian.on_route(route)

    def _take_info(self, name: str, info: Intrinsics) -> None:
        if info != self._infos.get(name):
            self._infos[name] = info
            self._views[name] = VirtualCamera(self._specs[name], info)

    def _take_picture(self, name: str, message: Any) -> int:
        frame = read_image(message, name, self._infos[name], fit=self._views[name].fit)
        self.builder.add_frame(frame)
        return frame.stamp_ns


def drive(stand_in: StandIn, driver: Driver) -> RouteResult:
    """Tick by tick to the route's end."""
    pending = stand_in.latched()
    while not stand_in.world.finished:
        stand_in.apply_control(driver.control([*pending, *stand_in.tick()]))
        pending = []
    outcome, around = stand_in.world.outcome(), stand_in.world.around
    return RouteResult(
        around.seed,
        outcome.completion,
        outcome.reached_goal,
        outcome.collided_with,
        outcome.at_fault,
        outcome.offroad_m,
        outcome.distance_m,
        outcome.time_s,
        driver.states,
    )


def plain_message(_kind: str) -> Any:
    """An object that takes whatever attributes it is given, nested as messages are."""
    return _Open()


class _Open(SimpleNamespace):
    """Attributes come into being when they are asked for; lists where messages have lists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        value: Any = [] if name == 'poses' else 0.0 if name in tuple('xyzw') else _Open()
        setattr(self, name, value)
        return value


def main(arguments: Sequence[str] | None = None, make: Make = plain_message) -> int:
    """Drive routes and leave `summary.json`."""
    parser = argparse.ArgumentParser(description='Closed loop against the stand-in for CARLA.')
    parser.add_argument('map', help='OpenDRIVE map, such as Town01.xodr')
    parser.add_argument('--routes', type=int, default=5, help='number of routes')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first route')
    parser.add_argument('--metres', type=float, default=DRIVE_M, help='length of a route')
    parser.add_argument('--driver', choices=('model', 'blind'), default='model', help='who plans')
    parser.add_argument('--model', help='model directory; default: the shipped town model')
    parser.add_argument('--out', required=True, help='folder for summary.json')
    options = parser.parse_args(arguments)
    try:
        return _run(options, make)
    except SpanvlaError as error:
        print(f'carla_routes: {error}', file=sys.stderr)  # noqa: T201
        return 2


def _run(options: argparse.Namespace, make: Make) -> int:
    path = Path(options.map)
    found = load_opendrive(path)
    ground = paint_map(found, Paint())
    model: Planner | None = None
    config = ModelConfig()
    if options.driver == 'model':
        model = Planner.open(options.model or shipped_model_dir(), 'auto', frame_id=MAP_FRAME)
        config = model.config
    results = []
    for seed in range(options.seed, options.seed + options.routes):
        world = route_world(found, ground, seed, options.metres, Vehicle())
        stand_in = StandIn(world, config.cameras, make)
        if model is not None:
            model.reset()
        planner = BlindRouteFollower() if model is None else model
        driver = Driver(planner, config, stand_in, lambda: plain_message(''))
        results.append(drive(stand_in, driver))
        print(_line(results[-1]))  # noqa: T201
    summary = {
        'map': path.name,
        'map_sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'server': 'stand-in of spanvla_ros, not CARLA',
        'driver': options.driver,
        'route_completion': float(np.mean([result.completion for result in results])),
        'reached': sum(result.reached_goal for result in results),
        'collisions': sum(bool(result.collided_with) for result in results),
        'offroad_m': sum(result.offroad_m for result in results),
        'distance_m': sum(result.distance_m for result in results),
        'schedule': None if model is None else model.schedule,
        'model_sha256': None if model is None else model.model_sha256,
        'routes': [asdict(result) for result in results],
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'summary.json', json.dumps(summary, indent=2, allow_nan=False) + '\n')
    return 0


def _line(result: RouteResult) -> str:
    hit = result.collided_with or 'nothing'
    return (
        f'route {result.seed}: {result.completion:.0%} of the way in {result.time_s:.0f} s, '
        f'hit {hit}, {result.offroad_m:.1f} m off the road, {result.states}'
    )


if __name__ == '__main__':
    sys.exit(main())
