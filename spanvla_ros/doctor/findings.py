"""What the doctor can find: one line a finding, with what it means and the line that mends it."""

from __future__ import annotations

from dataclasses import dataclass

INFO, WARN, BLOCK = 'info', 'warn', 'block'
SEVERITIES = (BLOCK, WARN, INFO)


@dataclass(frozen=True)
class Finding:
    """One thing to know: `what` was seen and where, `fix` is the one line that mends it."""

    id: str
    severity: str
    what: str
    fix: str


@dataclass(frozen=True)
class Advice:
    """An entry of the catalog: the severity, what it means, the fix with `{names}` to fill in."""

    severity: str
    meaning: str
    fix: str


def found(finding_id: str, what: str, *, severity: str = '', **names: object) -> Finding:
    """A finding of the catalog; `names` fill in its fix, `severity` replaces its own."""
    advice = CATALOG[finding_id]
    return Finding(finding_id, severity or advice.severity, what, advice.fix.format(**names))


def sorted_findings(findings: list[Finding]) -> list[Finding]:
    """The worst first, else in the order given, none twice."""
    once = list(dict.fromkeys(findings))
    return sorted(once, key=lambda finding: SEVERITIES.index(finding.severity))


MACHINE = {
    'python_version': Advice(
        BLOCK,
        'this Python is older or newer than the package supports',
        'use Python 3.10 to 3.13; beside ROS from apt, the Python of that ROS',
    ),
    'package_missing': Advice(
        BLOCK, 'a library every command needs is not installed', 'pip install {pip}{apt}'
    ),
    'package_optional': Advice(
        INFO, 'a library of one use only is not installed', 'pip install {pip}{apt}'
    ),
    'no_backend': Advice(
        BLOCK,
        'nothing that could run a model: no ONNX Runtime, no torch, no TensorRT',
        "pip install onnxruntime (on a Jetson: NVIDIA's wheel, see docs/jetson.md)",
    ),
    'ros_missing': Advice(
        WARN,
        'no rclpy or a message package is missing: replay and training run, the nodes do not',
        "sudo apt install {apt}, or without apt: pip install 'spanvla_ros[ros]'",
    ),
    'ros_python': Advice(
        BLOCK,
        'a ROS environment is sourced, but its rclpy does not load in this Python',
        'start with the Python of that ROS ({wanted}), or open a shell that has not sourced it',
    ),
    'cv_bridge_numpy': Advice(
        WARN,
        'cv_bridge is installed and its compiled part does not load, mostly because of numpy 2',
        "pip install 'numpy<2', or leave planner.use_cv_bridge at false",
    ),
    'model_broken': Advice(
        BLOCK,
        'the model directory is missing or differs from its manifest',
        'copy the model directory again, or name another one with --model DIR',
    ),
    'model_no_graphs': Advice(
        WARN,
        'the model directory holds no ONNX graphs, so only the torch backend can run it',
        'spanvla export --model {model} --target onnxruntime',
    ),
    'no_gpu': Advice(
        INFO,
        'no NVIDIA GPU is visible: the model runs on the CPU',
        'nothing to do for the town model; for a large one see docs/engines.md',
    ),
    'gpu_unused': Advice(
        INFO,
        'a GPU is visible, but neither TensorRT nor ONNX Runtime would use it',
        "pip install 'spanvla_ros[gpu]' (on a Jetson see docs/jetson.md)",
    ),
    'threads': Advice(
        INFO,
        'numeric libraries may start a thread a core; the launch files and drive set one',
        'export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1',
    ),
    'few_cores': Advice(
        WARN,
        'one core only: planner, guardian and follower need two to keep their rates',
        'give the container or machine at least two cores (docker run --cpus=2)',
    ),
    'disk_low': Advice(
        WARN, 'a recording would soon fill the disk', 'free space, or record to another disk'
    ),
    'rmw_missing': Advice(
        BLOCK,
        'RMW_IMPLEMENTATION names a middleware that is not installed',
        'unset RMW_IMPLEMENTATION, or sudo apt install ros-$ROS_DISTRO-{rmw}',
    ),
    'rmw_other': Advice(
        INFO,
        'another middleware than Fast DDS: ours was not run on it, the Fast DDS profile is unused',
        'unset RMW_IMPLEMENTATION, or enlarge the buffers of {rmw} by its own configuration',
    ),
    'dds_profile_unset': Advice(
        INFO,
        'no Fast DDS profile (launch files set one): raw pictures above 0.4 MB would be lost',
        'export FASTDDS_DEFAULT_PROFILES_FILE={profile}',
    ),
    'dds_profile_missing': Advice(
        BLOCK,
        'the Fast DDS profile named in the environment is not there or no XML',
        'export FASTDDS_DEFAULT_PROFILES_FILE={profile}',
    ),
    'shm_small': Advice(
        WARN,
        '/dev/shm is smaller than one shared-memory segment of the Fast DDS profile',
        'docker run --shm-size=1g (or --ipc=host); on a host: mount -o remount,size=1g /dev/shm',
    ),
    'domain_invalid': Advice(
        BLOCK, 'ROS_DOMAIN_ID is no number from 0 to 232', 'export ROS_DOMAIN_ID=0'
    ),
    'domain_high': Advice(
        INFO,
        'ports of a domain above 101 may meet those the kernel hands out by itself',
        'export ROS_DOMAIN_ID=N with N from 0 to 101',
    ),
    'discovery_off': Advice(
        WARN,
        'discovery is off: no node of this machine finds another',
        'export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST (one machine) or SUBNET (several)',
    ),
    'discovery_local': Advice(
        INFO,
        'discovery is limited to this machine: nodes of other machines are not seen',
        'export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET and unset ROS_LOCALHOST_ONLY',
    ),
    'discovery_server': Advice(
        INFO,
        'a discovery server or static peers are set: nodes are found through those only',
        'unset ROS_DISCOVERY_SERVER ROS_STATIC_PEERS where they are not meant',
    ),
    'power_mode': Advice(
        WARN,
        'the Jetson is not in its fastest power mode',
        'sudo nvpmodel -p --verbose, then sudo nvpmodel -m ID with that of MAXN, '
        'then sudo jetson_clocks',
    ),
    'power_unknown': Advice(
        INFO,
        'this is a Jetson, but its power mode could not be read',
        'sudo nvpmodel -q',
    ),
    'cpu_governor': Advice(
        INFO,
        'the CPU is held at a low clock by its governor',
        'sudo cpupower frequency-set -g performance',
    ),
}  # fmt: skip

CATALOG: dict[str, Advice] = {**MACHINE}
