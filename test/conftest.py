"""What holds for every test: checked array shapes, one hypothesis profile, no silent skips."""

from __future__ import annotations

import os
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Numpy modules only: torch traces its own through the exporter, which would record the checks.
CHECKED = (
    'spanvla_ros.types',
    'spanvla_ros.geometry',
    'spanvla_ros.messages',
    'spanvla_ros.controls',
    'spanvla_ros.carla',
    'spanvla_ros.autoware',
    'spanvla_ros.rig',
    'spanvla_ros.report',
    # Not safety.rollout: its inner loop is scalar, and checking each call slows it thirtyfold.
    'spanvla_ros.safety.checks',
    'spanvla_ros.safety.fallback',
    'spanvla_ros.safety.follower',
    'spanvla_ros.safety.state',
    'spanvla_ros.scoring',
    'spanvla_ros.town',
    'spanvla_ros.model.action_tokens',
    'spanvla_ros.model.config',
    'spanvla_ros.model.flow',
    'spanvla_ros.model.inputs',
    'spanvla_ros.model.prompt',
    'spanvla_ros.model.reasoning',
    'spanvla_ros.runtime.observations',
    'spanvla_ros.runtime.onnx_',
    'spanvla_ros.runtime.planner',
    'spanvla_ros.runtime.reasoner',
)
ALLOWED_SKIPS = Path(__file__).with_name('allowed_skips.txt')

# The hook names its checker by module; pytest does not put this folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
install_import_hook(CHECKED, 'type_check.checked')

settings.register_profile(
    'spanvla',
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile('spanvla')

# The ROS tests talk to themselves only; .ci/bootstrap.py sets the same for a whole run.
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(101 + os.getpid() % 100))
os.environ.setdefault('ROS_LOG_DIR', tempfile.mkdtemp(prefix='spanvla_ros_log_'))

_skips: dict[str, list[str]] = {}


def unexpected_skips(reasons: list[str], allowed: str) -> list[str]:
    """The reasons that match no line of the allowed list (`*` stands for anything)."""
    lines = [line.strip() for line in allowed.splitlines()]
    patterns = [line for line in lines if line and not line.startswith('#')]
    return [r for r in reasons if not any(fnmatchcase(r, pattern) for pattern in patterns)]


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, 'wasxfail'):
        detail = report.longrepr
        reason = str(detail[2]) if isinstance(detail, tuple) else str(detail)
        _skips.setdefault(reason.removeprefix('Skipped: '), []).append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected_skips(list(_skips), ALLOWED_SKIPS.read_text()) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unexpected = unexpected_skips(list(_skips), ALLOWED_SKIPS.read_text())
    terminalreporter.section('skips')
    if not _skips:
        terminalreporter.line('none')
    for reason, tests in sorted(_skips.items()):
        mark = f' <- not in {ALLOWED_SKIPS.name}, the run fails' if reason in unexpected else ''
        terminalreporter.line(f'{len(tests)} x {reason}{mark}')
