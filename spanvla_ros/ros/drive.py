"""`spanvla drive`: a real-time closed loop in the town over DDS, all nodes as processes.

The drive starts when the planner's first plan moves the car; until then the town holds still.
What is reported is computed afterwards, from the recording alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from tqdm import tqdm

from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir, write_text
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.report.drive_page import write_page
from spanvla_ros.report.drive_summary import summarise
from spanvla_ros.report.pictures import CameraView
from spanvla_ros.ros.bag_file import part_folder, recover
from spanvla_ros.ros.children import (
    NAMESPACE,
    MachineTimes,
    NodeProcess,
    private_domain,
    private_environment,
    process_cpu_s,
)
from spanvla_ros.ros.parameters import (
    FollowerSettings,
    GuardianSettings,
    PlannerSettings,
    RecorderSettings,
    TownSettings,
)
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.safety.state import load_vehicle
from spanvla_ros.town.scenarios import FAMILIES, MIX
from spanvla_ros.types import SCHEDULES, SpanvlaError

NODES = ('recorder', 'guardian', 'follower', 'planner', 'town')
# A dead one of these is started again; without the other two there is no drive to go on with.
SCENARIOS = (*FAMILIES, MIX)
RESPAWNED = ('guardian', 'follower', 'planner', 'shadow')
SHADOW_REMAPS = {
    '__node': 'shadow',
    'plan': 'shadow/plan',
    'output/reasoning': 'shadow/reasoning',
    'output/overlay/compressed': 'shadow/overlay/compressed',
}
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 8.0
STOPPING = (signal.SIGINT, signal.SIGTERM)
END_TRUTH_S = 0.4
SETTINGS: Mapping[str, Any] = {
    'recorder': RecorderSettings,
    'guardian': GuardianSettings,
    'follower': FollowerSettings,
    'planner': PlannerSettings,
    'town': TownSettings,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla drive`."""
    parser.add_argument('--seconds', type=float, default=30.0, help='length of the drive')
    parser.add_argument('--scenario', default=MIX, help=f'one of {", ".join(SCENARIOS)}')
    parser.add_argument('--seed', type=int, default=0, help='seed of the world')
    parser.add_argument('--camera-hz', type=float, default=15.0, help='pictures a second')
    parser.add_argument('--schedule', choices=SCHEDULES, help='default: that of the model')
    parser.add_argument('--model', help='model directory; default: the shipped town model')
    parser.add_argument('--backend', default='auto', help='auto, onnxruntime, torch or tensorrt')
    parser.add_argument('--vehicle', default='', help='vehicle file; default: the built-in one')
    parser.add_argument('--out', default='out/drive', help='folder for what the drive leaves')
    parser.add_argument(
        '--shadow', metavar='DIR', help='model directory of a second planner that nobody follows'
    )
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='NODE.PARAMETER=VALUE',
        dest='overrides',
        help='a parameter of one node; repeatable',
    )


def run(options: argparse.Namespace) -> int:
    """Drive, then report; 0 if the drive came to its end, 1 if it broke off."""
    _check(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ('summary.json', 'index.html', 'drive.mcap'):
        (out / name).unlink(missing_ok=True)
    _remove_part(out / 'drive.mcap')
    with private_domain() as domain:
        drive = Drive(options, out, domain)
        failure = drive.run()
    recording = out / 'drive.mcap'
    recover(recording)
    if not recording.exists():
        why = failure or f'see {drive.log_dir}'
        raise SpanvlaError(f'drive: nothing was recorded; {why}')
    try:
        return report(recording, drive, failure)
    except SpanvlaError as error:
        if not failure:
            raise
        # Where nothing was driven, why it broke off says more than what the recording lacks.
        raise SpanvlaError(f'drive: {failure}') from error


def _check(options: argparse.Namespace) -> None:
    if not 1.0 <= options.seconds <= 3600.0:
        raise SpanvlaError(f'--seconds {options.seconds}: must lie between 1 and 3600')
    if not 1.0 <= options.camera_hz <= 60.0:
        raise SpanvlaError(f'--camera-hz {options.camera_hz}: must lie between 1 and 60')
    if options.scenario not in SCENARIOS:
        raise SpanvlaError(
            f'--scenario {options.scenario}: unknown; choose from {", ".join(SCENARIOS)}'
        )
    if not 0 <= options.seed < 2**31:
        raise SpanvlaError(f'--seed {options.seed}: must lie between 0 and 2147483647')
    _overrides(options.overrides)
    load_vehicle(options.vehicle)
    load_model_dir(options.model or shipped_model_dir())
    if options.shadow:
        load_model_dir(options.shadow)


def _remove_part(recording: Path) -> None:
    folder = part_folder(recording)
    for file in (folder / f'{folder.name}.mcap', folder / 'metadata.yaml'):
        file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        folder.rmdir()


def _overrides(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """`node.parameter=value` pairs by node; what no node knows is refused."""
    import yaml

    found: dict[str, dict[str, Any]] = {name: {} for name in NODES}
    for pair in pairs:
        name, equals, text = pair.partition('=')
        node, _, parameter = name.partition('.')
        if not equals or node not in NODES:
            raise SpanvlaError(
                f'--set {pair}: write NODE.PARAMETER=VALUE with NODE one of {", ".join(NODES)}'
            )
        known = {entry.name: entry for entry in fields(SETTINGS[node])}
        if parameter not in known:
            raise SpanvlaError(f'--set {pair}: {node} has {", ".join(sorted(known))}')
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpanvlaError(f'--set {pair}: {text!r} is not a YAML value; mend it') from error
        if isinstance(known[parameter].default, float) and isinstance(value, int):
            value = float(value)
        found[node][parameter] = value
    return found


@dataclass(frozen=True)
class Cost:
    """What the drive took of the machine, while it drove."""

    cpu_share: float | None
    steal_share: float | None
    node_cpu_share: Mapping[str, float]


class Drive:
    """The processes of one drive, from start to stop."""

    def __init__(self, options: argparse.Namespace, out: Path, domain: int) -> None:
        """Prepare the processes; nothing is started yet."""
        self.options = options
        self.log_dir = out / 'log'
        self.log_dir.mkdir(exist_ok=True)
        for old in self.log_dir.glob('*.txt'):
            old.unlink()
        environment = private_environment(domain, self.log_dir.resolve())
        self.domain = domain
        self.nodes = {
            name: NodeProcess(name, parameters, environment, self.log_dir)
            for name, parameters in self._parameters(out).items()
        }
        if options.shadow:
            # Its pictures, odometry and route are those of the planner, its words are not.
            parameters = {**self.nodes['planner'].parameters, 'model_dir': str(options.shadow)}
            self.nodes['shadow'] = NodeProcess(
                'shadow',
                parameters,
                environment,
                self.log_dir,
                module='planner',
                remaps=SHADOW_REMAPS,
            )
        self.cost = Cost(None, None, {})
        self.status: dict[str, Any] = {}
        self.driven_s = 0.0

    def _parameters(self, out: Path) -> dict[str, dict[str, Any]]:
        options = self.options
        given: dict[str, dict[str, Any]] = {
            'recorder': {
                'out': str(out / 'drive.mcap'),
                'incident_dir': str(out / 'incidents'),
            },
            'guardian': {},
            'follower': {},
            'planner': {
                'model_dir': str(options.model or ''),
                'backend': options.backend,
                'schedule': options.schedule or 'model',
            },
            'town': {
                'scenario': options.scenario,
                'seed': options.seed,
                'camera_hz': float(options.camera_hz),
            },
        }
        if options.vehicle:
            for name in ('guardian', 'follower', 'town'):
                given[name]['vehicle_file'] = options.vehicle
        overrides = _overrides(options.overrides)
        if not options.model:
            given['planner']['model_dir'] = str(shipped_model_dir())
        return {name: {**given[name], **overrides[name]} for name in given}

    def run(self) -> str:
        """Start, drive for the time asked, stop; returns why it broke off, else an empty text."""
        os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
        context = rclpy.Context()
        rclpy.init(
            context=context,
            domain_id=self.domain,
            args=[],
            signal_handler_options=SignalHandlerOptions.NO,
        )
        node = QuietNode('drive', namespace=NAMESPACE, context=context)
        latched = QoSProfile(
            depth=1,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        node.create_subscription(String, 'town/status', self._on_status, latched)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        # A shell's background job starts with SIGINT ignored; it too may be told to stop.
        before = [signal.signal(number, signal.default_int_handler) for number in STOPPING]
        try:
            for process in self.nodes.values():
                process.start()
            return self._wait_and_drive(lambda: executor.spin_once(timeout_sec=0.1))
        except KeyboardInterrupt:
            return 'interrupted'
        finally:
            # Who asks twice gets no second answer: the nodes are on their way out.
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
            self._stop()
            for number, hand in zip(STOPPING, before, strict=True):
                signal.signal(number, hand)
            executor.shutdown()
            node.destroy_node()
            context.try_shutdown()

    def _on_status(self, message: String) -> None:
        self.status = json.loads(message.data)

    def _wait_and_drive(self, spin: Callable[[], None]) -> str:
        begin_s = time.monotonic()
        bar_format = '{desc}{n:.0f}/{total:.0f} s |{bar}|{postfix}'
        seconds = self.options.seconds
        with tqdm(total=seconds, desc='starting ', bar_format=bar_format, leave=False) as bar:
            while not self.status.get('moving'):
                spin()
                failure = self._tend()
                if failure:
                    return failure
                if time.monotonic() - begin_s > START_TIMEOUT_S:
                    return f'no plan moved the car within {START_TIMEOUT_S:.0f} s; {self._why()}'
            bar.set_description_str('driving ')
            meter = CostMeter(self.nodes)
            begin_s = time.monotonic()
            failure = ''
            while not failure and self.driven_s < seconds and not self.status.get('finished'):
                spin()
                failure = self._tend()
                self.driven_s = time.monotonic() - begin_s
                bar.n = min(self.driven_s, seconds)
                speed_mps, way_m = self.status['speed_mps'], self.status['distance_m']
                bar.set_postfix_str(f'{speed_mps:.1f} m/s, {way_m:.0f} m')
            # How a drive ended is in the scenes that follow its end.
            settle_s = time.monotonic() + END_TRUTH_S
            while time.monotonic() < settle_s:
                spin()
            self.cost = meter.read()
            return failure

    def _tend(self) -> str:
        """Start dead nodes again; a dead recorder or town ends the drive."""
        for name, process in self.nodes.items():
            status = process.exit_status
            if status is None:
                continue
            if name not in RESPAWNED or status == 2:
                return f'the {name} node ended with status {status}: {process.last_line()}'
            if process.restarts >= 20:
                return f'the {name} node died {process.restarts} times: {process.last_line()}'
            process.restarts += 1
            process.start()
        return ''

    def _why(self) -> str:
        return f'planner: {self.nodes["planner"].last_line() or "said nothing"}'

    def _stop(self) -> None:
        # The recorder goes last, so that it sees the others stop the car.
        for group in (('town',), ('planner', 'shadow', 'follower', 'guardian'), ('recorder',)):
            chosen = [self.nodes[name] for name in group if name in self.nodes]
            for process in chosen:
                process.interrupt()
            for process in chosen:
                process.wait(STOP_TIMEOUT_S)


class CostMeter:
    """Measures what the node processes take between its making and `read`."""

    def __init__(self, nodes: Mapping[str, NodeProcess]) -> None:
        """Start measuring."""
        self._nodes = nodes
        self._machine = MachineTimes.now()
        self._begin = {
            name: (node.process.pid, process_cpu_s(node.process.pid))
            for name, node in nodes.items()
            if node.process is not None
        }

    def read(self) -> Cost:
        """Shares of all cores since the start; a node that was replaced is left out."""
        machine, begin = MachineTimes.now(), self._machine
        if machine is None or begin is None or machine.total == begin.total:
            return Cost(None, None, {})
        elapsed_s = (machine.monotonic_s - begin.monotonic_s) * (os.cpu_count() or 1)
        shares = {}
        for name, (pid, begin_s) in self._begin.items():
            end_s = process_cpu_s(pid)
            if begin_s is not None and end_s is not None:
                shares[name] = round((end_s - begin_s) / elapsed_s, 4)
        steal = (machine.steal - begin.steal) / (machine.total - begin.total)
        return Cost(round(sum(shares.values()), 4), round(steal, 4), shares)


def report(recording: Path, drive: Drive, failure: str) -> int:
    """Write summary and page beside a recording and print one line; the exit status of `run`."""
    vehicle = load_vehicle(drive.options.vehicle)
    content = summarise(recording, vehicle)
    content['cpu_share'] = drive.cost.cpu_share
    content['steal_share'] = drive.cost.steal_share
    content['node_cpu_share'] = dict(drive.cost.node_cpu_share)
    content['restarts'] = {name: node.restarts for name, node in drive.nodes.items()}
    content['exit_status'] = {name: node.exit_status for name, node in drive.nodes.items()}
    content['broke_off'] = failure
    content['machine'] = f'{platform.machine()}, {os.cpu_count()} cores'
    out = recording.parent
    write_text(out / 'summary.json', json.dumps(content, indent=2, allow_nan=False) + '\n')
    views = [CameraView(**asdict(camera)) for camera in TOWN_CAMERAS]
    write_page(recording, content, out / 'index.html', views, vehicle=vehicle)
    print(_line(content, out))  # noqa: T201
    if failure:
        print(f'drive: broke off: {failure}', file=sys.stderr)  # noqa: T201
    return 1 if failure else 0


def _line(content: Mapping[str, Any], out: Path) -> str:
    gap, age = content['output_gap_ms'], content['kv_age_ms']
    return (
        f'drive: {content["seconds"]:.0f} s, {content["plan_hz"]:.1f} plans/s, '
        f'{content["output_hz"]:.1f} outputs/s (gap p99 {gap["p99"] or 0.0:.0f} ms), '
        f'K/V age p99 {age["p99"] or 0.0:.0f} ms, {content["distance_m"]:.0f} m, '
        f'collisions {content["collisions"]}, see {out / "index.html"}'
    )
