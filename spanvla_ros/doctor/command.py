"""`spanvla doctor`: what is missing or mis-set here, each finding with the line that mends it."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from spanvla_ros.doctor.cameras import check_cameras
from spanvla_ros.doctor.findings import BLOCK, SEVERITIES, Finding, found, sorted_findings
from spanvla_ros.doctor.graph import check_graph
from spanvla_ros.doctor.machine import check_machine
from spanvla_ros.doctor.odometry import check_odometry
from spanvla_ros.doctor.rig import LOOKED_AT, Rig, empty_rig, gather
from spanvla_ros.doctor.streams import check_streams
from spanvla_ros.model.checkpoint import shipped_model_dir
from spanvla_ros.model.config import TOWN_CAMERAS, CameraSpec, load_config
from spanvla_ros.replay.observed import messages_of, topics_of
from spanvla_ros.report.bags import open_bag
from spanvla_ros.types import SpanvlaError

NO_ROS = ('ros_missing', 'ros_python', 'domain_invalid', 'rmw_missing')


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla doctor`."""
    parser.add_argument('--bag', default='', help='a recorded drive: folder, .mcap, .db3, .bag')
    parser.add_argument(
        '--seconds',
        type=float,
        default=5.0,
        help='without --bag: how long to listen to running nodes; 0 leaves them alone',
    )
    parser.add_argument('--model', default='', help='model directory; default: the shipped one')
    parser.add_argument('--json', action='store_true', help='print {"findings": [...]} instead')


def run(options: argparse.Namespace) -> int:
    """Look at everything that is there; 1 if a finding blocks, else 0."""
    findings = check_machine(options.model)
    try:
        specs = cameras_of(options.model)
    except SpanvlaError:
        # That is a finding already (`model_broken`); the rig is looked at for the town's cameras.
        specs = TOWN_CAMERAS
    if options.bag:
        findings += check_rig(rig_of_bag(options.bag, specs))
    elif options.seconds > 0 and not any(f.id in NO_ROS for f in findings):
        findings += listen(options.seconds, specs)
    findings = sorted_findings(findings)
    say(findings, as_json=options.json)
    return 1 if any(finding.severity == BLOCK for finding in findings) else 0


def cameras_of(model: str) -> tuple[CameraSpec, ...]:
    """The cameras a model wants, in its order."""
    return load_config(model or shipped_model_dir()).cameras


def rig_of_bag(path: str, specs: tuple[CameraSpec, ...]) -> Rig:
    """Everything the checks look at, out of a bag.

    Raises:
        SpanvlaError: no such bag, or a damaged one.
    """
    with open_bag(path) as bag:
        rig = empty_rig(topics_of(bag), specs)
        wanted = frozenset(name for name in rig.streams)
        return gather(rig, messages_of(bag, wanted), (bag.end_ns - bag.begin_ns) * 1e-9)


def rig_heard(seconds: float, specs: tuple[CameraSpec, ...]) -> Rig:
    """Everything the checks look at, out of a running graph; needs rclpy."""
    from spanvla_ros.ros.graph import hear

    heard = hear(seconds, LOOKED_AT)
    return gather(empty_rig(heard.topics, specs, live=True), heard.messages, seconds)


def listen(seconds: float, specs: tuple[CameraSpec, ...]) -> list[Finding]:
    """What a running graph shows; needs rclpy."""
    from spanvla_ros.ros.graph import hear

    heard = hear(seconds, LOOKED_AT)
    rig = empty_rig(heard.topics, specs, live=True)
    if not heard.nodes or not rig.streams:
        return [found('graph_empty', f'{len(heard.nodes)} other nodes, no topic to look at')]
    gather(rig, heard.messages, seconds)
    graph = check_graph(heard.nodes, heard.topics, heard.sim_time, heard.several_types)
    return [*graph, *check_rig(rig)]


def check_rig(rig: Rig) -> list[Finding]:
    """All that topics, odometry and pictures tell."""
    return [
        *check_streams(rig, os.environ),
        *check_odometry(rig),
        *check_cameras(rig),
    ]


def say(findings: list[Finding], *, as_json: bool) -> None:
    """Print the findings, for a reader or for a program."""
    if as_json:
        content = {'findings': [asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=2))  # noqa: T201
        return
    for finding in findings:
        print(f'{finding.severity:<5} {finding.id}: {finding.what}')  # noqa: T201
        print(f'      fix: {finding.fix}')  # noqa: T201
    counts = [f'{sum(f.severity == s for f in findings)} {s}' for s in SEVERITIES]
    print(f'doctor: {", ".join(counts)}')  # noqa: T201
