"""What of this machine would keep the nodes from running, or slow them down."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spanvla_ros.doctor.findings import Finding, found
from spanvla_ros.doctor.middleware import check_discovery, check_middleware
from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir
from spanvla_ros.types import SpanvlaError

PYTHONS = ((3, 10), (3, 13))
DISK_LOW_BYTES = 2_000_000_000
THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


@dataclass(frozen=True)
class Package:
    """A library by the name it is imported under: its pip name, its apt package, who needs it."""

    module: str
    pip: str
    needed_for: str
    apt: str = ''


# package.xml names the same apt packages by their rosdep keys; the rest has no key.
NEEDED = (
    Package('numpy', 'numpy', 'every command', 'python3-numpy'),
    Package('yaml', 'PyYAML', 'every command', 'python3-yaml'),
    Package('transforms3d', 'transforms3d', 'every command', 'python3-transforms3d'),
    Package('cv2', 'opencv-python-headless', 'pictures', 'python3-opencv'),
    Package('jaxtyping', 'jaxtyping', 'every command'),
    Package('rosbags', 'rosbags', 'bags'),
    Package('safetensors', 'safetensors', 'models'),
    Package('tokenizers', 'tokenizers', 'models'),
    Package('tqdm', 'tqdm', 'replay'),
)
OPTIONAL = (
    Package(
        'shapely', "'spanvla_ros[town]'", 'the town, so drive and training', 'python3-shapely'
    ),
    Package('torch', "'spanvla_ros[train]'", 'training, export and the torch backend'),
)
BACKENDS = ('onnxruntime', 'tensorrt', 'torch')
MESSAGES = (
    'diagnostic_msgs',
    'geometry_msgs',
    'lifecycle_msgs',
    'nav_msgs',
    'rcl_interfaces',
    'sensor_msgs',
    'std_msgs',
    'std_srvs',
    'trajectory_msgs',
    'visualization_msgs',
)


def check_machine(model: str = '') -> list[Finding]:
    """Everything that can be said without a bag and without a graph.

    Args:
        model: model directory; empty is the shipped one.
    """
    environment = os.environ
    jetson = is_jetson()
    return [
        *check_python(),
        *check_packages(),
        *check_ros(environment),
        *check_model(model),
        *check_gpu(jetson=jetson),
        *check_cpu(environment, len(os.sched_getaffinity(0))),
        *check_disk(Path.cwd()),
        *check_middleware(environment),
        *check_discovery(environment),
        *(check_jetson() if jetson else ()),
    ]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    """The version of this Python."""
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        yield found('python_version', f'this is Python {version[0]}.{version[1]}')


def installed(module: str) -> bool:
    """Whether a top-level module can be found; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def check_packages() -> Iterator[Finding]:
    """Libraries from pip or apt, each missing one with its line."""
    for package in NEEDED:
        if not installed(package.module):
            yield found('package_missing', *_missing(package), **_lines(package))
    for package in OPTIONAL:
        if not installed(package.module):
            yield found('package_optional', *_missing(package), **_lines(package))
    if not any(installed(name) for name in BACKENDS):
        yield found('no_backend', f'none of {", ".join(BACKENDS)} is installed')


def _missing(package: Package) -> tuple[str]:
    return (f'{package.module} is not installed; needed for {package.needed_for}',)


def _lines(package: Package) -> dict[str, str]:
    apt = f' (with ROS from apt: sudo apt install {package.apt})' if package.apt else ''
    return {'pip': package.pip, 'apt': apt}


def check_ros(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether rclpy and the message packages are there, and of this Python."""
    distro = environment.get('ROS_DISTRO', '')
    missing = [name for name in ('rclpy', *MESSAGES) if not installed(name)]
    if 'rclpy' in missing and distro:
        yield found(
            'ros_python',
            f'ROS {distro} is sourced, but Python {sys.version_info[0]}.{sys.version_info[1]} '
            'finds no rclpy',
            wanted=_python_of(environment),
        )
    elif missing:
        prefix = f'ros-{distro or "$ROS_DISTRO"}-'
        yield found(
            'ros_missing',
            f'not installed: {", ".join(missing)}; the nodes need them',
            apt=' '.join(prefix + name.replace('_', '-') for name in missing),
        )
    if installed('cv_bridge'):
        done = subprocess.run(
            [sys.executable, '-c', 'import cv_bridge.boost.cv_bridge_boost'],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            yield found('cv_bridge_numpy', f'cv_bridge does not load: {reason}')


def _python_of(environment: Mapping[str, str]) -> str:
    """The Python whose folder holds rclpy in the sourced prefixes, else a word for it."""
    for prefix in environment.get('AMENT_PREFIX_PATH', '').split(os.pathsep):
        for folder in sorted(Path(prefix or '.').glob('lib/python3.*/site-packages/rclpy')):
            return folder.parents[1].name
        for folder in sorted(Path(prefix or '.').glob('local/lib/python3.*/*/rclpy')):
            return folder.parents[1].name
    return 'python3 of the system'


def check_model(model: str) -> Iterator[Finding]:
    """The model directory against its manifest, file by file."""
    try:
        directory = load_model_dir(model) if model else load_model_dir(shipped_model_dir())
    except (SpanvlaError, OSError) as error:
        yield found('model_broken', str(error))
        return
    if not directory.has_graphs:
        yield found('model_no_graphs', f'{directory.path} has no graphs/', model=directory.path)


def check_gpu(*, jetson: bool, root: Path = Path('/')) -> Iterator[Finding]:
    """Whether a GPU is visible, and whether something would use it; never a reason to block."""
    visible = jetson or (root / 'dev/nvidia0').exists() or (root / 'dev/dxg').exists()
    if not visible:
        yield found('no_gpu', 'no NVIDIA GPU is visible here')
    elif not (installed('tensorrt') or _onnxruntime_has_cuda()):
        yield found('gpu_unused', 'a GPU is visible, neither TensorRT nor ONNX Runtime uses it')


def _onnxruntime_has_cuda() -> bool:
    if not installed('onnxruntime'):
        return False
    runtime = importlib.import_module('onnxruntime')
    return 'CUDAExecutionProvider' in runtime.get_available_providers()


def check_cpu(
    environment: Mapping[str, str], cores: int, root: Path = Path('/')
) -> Iterator[Finding]:
    """Threads of numeric libraries, cores, and the clock they run at."""
    loose = [name for name in THREADS if environment.get(name) != '1']
    if loose and cores > 1:
        yield found('threads', f'not 1 in this shell: {", ".join(loose)}')
    if cores < 2:
        yield found('few_cores', f'{cores} core is available')
    governor = root / 'sys/devices/system/cpu/cpu0/cpufreq/scaling_governor'
    if governor.is_file() and governor.read_text(encoding='ascii').strip() == 'powersave':
        # intel_pstate and amd_pstate call their normal mode powersave as well.
        driver = governor.with_name('scaling_driver')
        kind = driver.read_text(encoding='ascii').strip() if driver.is_file() else ''
        if 'pstate' not in kind:
            yield found('cpu_governor', 'the CPU governor is powersave')


def check_disk(folder: Path) -> Iterator[Finding]:
    """Room for a recording."""
    free = shutil.disk_usage(folder).free
    if free < DISK_LOW_BYTES:
        yield found('disk_low', f'{free / 1e9:.1f} GB are free in {folder}')


def is_jetson(root: Path = Path('/')) -> bool:
    """Whether this is a Jetson, by what L4T leaves on every one."""
    if (root / 'etc/nv_tegra_release').exists():
        return True
    model = root / 'proc/device-tree/model'
    return model.is_file() and b'Jetson' in model.read_bytes()


def check_jetson() -> Iterator[Finding]:
    """The power mode of a Jetson."""
    try:
        done = subprocess.run(
            ['nvpmodel', '-q'], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield found('power_unknown', f'nvpmodel does not answer: {error}')
        return
    yield from judge_power_mode(done.stdout)


def judge_power_mode(text: str) -> Iterator[Finding]:
    """What `nvpmodel -q` printed: `NV Power Mode: NAME`, then the number of the mode."""
    match = re.search(r'NV Power Mode:\s*(\S+)', text)
    if match is None:
        yield found('power_unknown', f'nvpmodel -q printed {text.strip()!r:.60}')
    elif not match.group(1).upper().startswith('MAXN'):
        yield found('power_mode', f'the power mode is {match.group(1)}')
