"""Node processes of one drive: a private domain, start, respawn, stop, and what they cost."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from spanvla_ros.ros.process import PARENT_VARIABLE
from spanvla_ros.types import SpanvlaError

NAMESPACE = '/spanvla'
# Above 101 the ports of a domain may meet those the kernel hands out by itself.
DOMAINS = range(1, 102)
THREAD_VARIABLES = (
    'OMP_NUM_THREADS',
    'OPENBLAS_NUM_THREADS',
    'MKL_NUM_THREADS',
    'OPENCV_FOR_THREADS_NUM',
)
FOREIGN_VARIABLES = (
    'ROS_DISCOVERY_SERVER',
    'ROS_STATIC_PEERS',
    'ROS_LOCALHOST_ONLY',
    'ROS_NAMESPACE',
    'FASTDDS_DEFAULT_PROFILES_FILE',
    'FASTRTPS_DEFAULT_PROFILES_FILE',
    'CYCLONEDDS_URI',
)


@contextmanager
def private_domain() -> Iterator[int]:
    """A ROS domain id that no other drive of this user on this machine holds."""
    import fcntl

    folder = Path(tempfile.gettempdir()) / f'spanvla-domains-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    for domain in random.SystemRandom().sample(DOMAINS, len(DOMAINS)):
        with open(folder / str(domain), 'w', encoding='ascii') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    continue
                raise
            yield domain
            return
    raise SpanvlaError('drive: every ROS domain of this machine is in use; end another drive')


def private_environment(domain: int, log_dir: Path) -> dict[str, str]:
    """The environment of a node: own domain, loopback only, one thread a library."""
    environment = {
        name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES
    }
    environment |= dict.fromkeys(THREAD_VARIABLES, '1')
    environment |= {
        'ROS_DOMAIN_ID': str(domain),
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
        'ROS_LOG_DIR': str(log_dir),
        'PYTHONUNBUFFERED': '1',
        PARENT_VARIABLE: str(os.getpid()),
    }
    if environment.get('ROS_DISTRO') == 'humble':
        environment['ROS_LOCALHOST_ONLY'] = '1'
    return environment


@dataclass
class NodeProcess:
    """One node as a process; its output goes to `<log_dir>/<name>.txt`.

    `module` is whose code it runs, where that is not its name; `python` is the interpreter.
    """

    name: str
    parameters: Mapping[str, object]
    environment: Mapping[str, str]
    log_dir: Path
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None
    module: str = ''
    python: str = sys.executable
    remaps: Mapping[str, str] = field(default_factory=dict)
    _log: IO[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process; after a death, start it again."""
        command = [
            self.python,
            '-m',
            f'spanvla_ros.ros.{self.module or self.name}_node',
            '--ros-args',
            '-r',
            f'__ns:={NAMESPACE}',
        ]
        for name, target in self.remaps.items():
            command += ['-r', f'{name}:={target}']
        for key, value in self.parameters.items():
            # A JSON value is a YAML value too, whatever spaces or colons a path holds.
            command += ['-p', f'{key}:={json.dumps(value)}']
        if self._log is None:
            self._log = open(self.log_file, 'ab')  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log_file(self) -> Path:
        """Where the node's output goes."""
        return self.log_dir / f'{self.name}.txt'

    @property
    def exit_status(self) -> int | None:
        """The exit status of a process that has ended, else None."""
        return None if self.process is None else self.process.poll()

    def last_line(self) -> str:
        """The last line the node wrote, for a sentence on why it died."""
        try:
            lines = self.log_file.read_text(encoding='utf-8', errors='replace').splitlines()
        except OSError:
            return ''
        return next((line.strip() for line in reversed(lines) if line.strip()), '')

    def interrupt(self) -> None:
        """Ask the process to end."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; a process that does not come to one is killed."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None


def process_cpu_s(pid: int) -> float | None:
    """CPU time a live process has used, or None where `/proc` does not say."""
    try:
        text = Path(f'/proc/{pid}/stat').read_text(encoding='ascii', errors='replace')
        ticks = text.rpartition(')')[2].split()[11:13]
        return (int(ticks[0]) + int(ticks[1])) / os.sysconf('SC_CLK_TCK')
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class MachineTimes:
    """Ticks of all cores since boot, and what part was stolen by other guests."""

    total: int
    steal: int
    monotonic_s: float

    @staticmethod
    def now() -> MachineTimes | None:
        """The present counters, or None where `/proc/stat` is absent."""
        try:
            with open('/proc/stat', encoding='ascii') as file:
                ticks = [int(value) for value in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        steal = ticks[7] if len(ticks) > 7 else 0
        return MachineTimes(sum(ticks), steal, time.monotonic())
