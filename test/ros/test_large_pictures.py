"""Four raw cameras of 1600x900 at 10 Hz over real DDS, with the shipped profile and without.

`pytest -m slow -s test/ros/test_large_pictures.py` prints what arrived, what was planned and how
busy the machine was; what is asserted holds on a busy machine too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from camera_load import NAMESPACE, four_camera_model

from spanvla_ros.ros.children import NodeProcess, private_domain, private_environment

ROOT = Path(__file__).resolve().parents[2]
PROFILES = 'FASTDDS_DEFAULT_PROFILES_FILE'
SECONDS = 20.0


@dataclass(frozen=True)
class Measured:
    """One run: pictures sent to and counted by the planner, plans, findings of the doctor."""

    sent: dict[str, int]
    counted: dict[str, dict[str, str]]
    stages: dict[str, str]
    plan_hz: float
    busy: dict[str, float]
    findings: list[dict[str, str]]

    def arrived(self, camera: str) -> int:
        """Pictures of a camera that reached the planner, used or not."""
        line = self.counted[camera]
        return sum(int(line[name]) for name in ('received', 'dropped', 'refused'))

    @property
    def share(self) -> float:
        """Of all pictures that were sent, how many arrived."""
        return sum(map(self.arrived, self.sent)) / sum(self.sent.values())


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    pytest.importorskip('torch')
    pytest.importorskip('onnxscript')
    return four_camera_model(tmp_path_factory.mktemp('four'))


def waited_s(pid: int) -> tuple[float, float]:
    """Seconds the threads of a process ran, and seconds they waited for a core."""
    rows = [
        entry.read_text(encoding='ascii').split()
        for entry in Path(f'/proc/{pid}/task').glob('*/schedstat')
    ]
    ran, waited = (sum(int(row[k]) for row in rows) * 1e-9 for k in (0, 1))
    return ran, waited


def measure(model: Path, out: Path, profile: Path | None, *, doctor: bool) -> Measured:
    """Planner and guardian beside a driver of four cameras, each a process."""
    code = 'import sys; from spanvla_ros.cli import main; sys.exit(main())'
    with private_domain() as domain:
        environment = private_environment(domain, out)
        if profile is not None:
            environment[PROFILES] = str(profile)
        given = {'model_dir': str(model), 'overlay_hz': 0.0}
        nodes = [
            NodeProcess(name, parameters, environment, out)
            for name, parameters in (('planner', given), ('guardian', {}))
        ]
        script = str(Path(__file__).with_name('camera_load.py'))
        listener = subprocess.Popen(
            [sys.executable, script, 'listen'],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for node in nodes:
            node.start()
        try:
            driver = subprocess.Popen(
                [sys.executable, script, str(model), str(SECONDS)],
                env=environment, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            # The driver says so when both sides know of each other.
            assert driver.stdout.readline() == 'begin\n'
            before = waited_s(nodes[0].process.pid)
            findings: list[dict[str, str]] = []
            if doctor:
                done = subprocess.run(
                    [sys.executable, '-c', code, 'doctor', '--json', '--seconds', '8'],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                findings = json.loads(done.stdout)['findings']
            sent = json.loads(driver.communicate()[0])
            after = waited_s(nodes[0].process.pid)
            lines = json.loads(listener.communicate('\n')[0])
        finally:
            for process in (listener, driver):
                process.kill()
                process.wait()
            for node in nodes:
                node.interrupt()
            for node in nodes:
                node.wait(8.0)
    prefix = f'{NAMESPACE.strip("/")}/planner: '
    return Measured(
        sent,
        {name: lines[f'{prefix}input/{name}/image'] for name in sent},
        {k: v for k, v in lines[f'{prefix}plan'].items() if k.endswith(('_p50', '_p99'))},
        lines['plans'] / SECONDS,
        {
            'planner ran': (after[0] - before[0]) / SECONDS,
            'planner waited for a core': (after[1] - before[1]) / SECONDS,
            'load': os.getloadavg()[0],
        },
        findings,
    )


@pytest.fixture(scope='module')
def runs(model, tmp_path_factory) -> dict[str, Measured]:
    out = tmp_path_factory.mktemp('large')
    return {
        'shm': measure(model, out, ROOT / 'config' / 'fastdds_shm.xml', doctor=False),
        'default': measure(model, out, None, doctor=True),
    }


@pytest.mark.slow
def test_large_pictures_need_the_shipped_profile(runs):
    for name, run in runs.items():
        busy = ', '.join(f'{what} {value:.2f}' for what, value in run.busy.items())
        print(f'\n{name}: {run.share:.4f} arrived, {run.plan_hz:.1f} plans/s; {busy}')  # noqa: T201
        print(f'  {run.sent}, {run.counted}, {run.stages}')  # noqa: T201
    shm, default = runs['shm'], runs['default']
    assert set(shm.sent) == {'front', 'front_left', 'front_right', 'rear'}
    assert shm.share > 3.0 * default.share
    assert default.share < 0.5


@pytest.mark.slow
@pytest.mark.parametrize('name', ['shm', 'default'])
def test_what_is_lost_is_counted(runs, name):
    run = runs[name]
    for camera, sent in run.sent.items():
        known = run.arrived(camera) + int(run.counted[camera]['lost'])
        # Losses after the last picture that arrived cannot be known, nor a few still waiting.
        if run.arrived(camera) > 0.5 * sent:
            assert 0.95 * sent <= known <= sent
        assert known <= sent


@pytest.mark.slow
def test_the_doctor_names_the_default_profile_as_the_cause(runs):
    found = {finding['id']: finding for finding in runs['default'].findings}
    assert 'picture_size_shm' in found
    assert 'fastdds_shm.xml' in found['picture_size_shm']['fix']
