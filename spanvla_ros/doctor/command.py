"""`spanvla doctor`: what is missing or mis-set here, each finding with the line that mends it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from spanvla_ros.doctor.findings import BLOCK, SEVERITIES, Finding, sorted_findings
from spanvla_ros.doctor.machine import check_machine


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla doctor`."""
    parser.add_argument('--model', default='', help='model directory; default: the shipped one')
    parser.add_argument('--json', action='store_true', help='print {"findings": [...]} instead')


def run(options: argparse.Namespace) -> int:
    """Look at everything that is there; 1 if a finding blocks, else 0."""
    findings = sorted_findings(check_machine(options.model))
    say(findings, as_json=options.json)
    return 1 if any(finding.severity == BLOCK for finding in findings) else 0


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
