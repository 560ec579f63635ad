"""From a bare clone to a running project: finds a Python, makes .venv, runs one task.

Standard library only, so that any Python 3 can start it. Needs pip's usual access to an index,
no compiler and no root. `USE_SYSTEM_ROS=1` keeps the ROS environment of the calling shell.

    python3 .ci/bootstrap.py demo|test|test-slow|lint|fix [arguments for pytest]
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'spanvla_stamp.json'
OLDEST, NEWEST = (3, 10), (3, 13)
SEARCHED = ('python3.11', 'python3.12', 'python3.13', 'python3.10')

DEMO = ('ros', 'onnx', 'town')
EVERYTHING = ('ros', 'onnx', 'town', 'train', 'dev')
EXTRAS = {
    'demo': DEMO,
    'test': EVERYTHING,
    'test-slow': EVERYTHING,
    'lint': EVERYTHING,
    'fix': EVERYTHING,
}

# empy, which the ROS wheels ask for, is one pure-Python source package; all else is wheels.
WHEELS_ONLY = ('--only-binary', ':all:', '--no-binary', 'empy')

# What a sourced ROS, another venv or a ROS wheel of another Python leaves behind.
FOREIGN = (
    'AMENT_CURRENT_PREFIX',
    'AMENT_PREFIX_PATH',
    'CMAKE_PREFIX_PATH',
    'COLCON_PREFIX_PATH',
    'CYCLONEDDS_URI',
    'FASTDDS_BUILTIN_TRANSPORTS',
    'FASTDDS_DEFAULT_PROFILES_FILE',
    'FASTRTPS_DEFAULT_PROFILES_FILE',
    'LD_LIBRARY_PATH',
    'PYTHONHOME',
    'PYTHONPATH',
    'VIRTUAL_ENV',
    '_ROS_WHEELS_BOOTSTRAP_COMPLETE',
)


class UnableError(Exception):
    """Something the user has to install or mend: one sentence."""


def main(words: list) -> int:
    """Run the task named by the first word."""
    if not words or words[0] not in EXTRAS:
        print(f'usage: {sys.argv[0]} {"|".join(EXTRAS)}', file=sys.stderr)
        return 2
    task, rest = words[0], words[1:]
    try:
        environment = clean_environment()
        prepare(EXTRAS[task], environment)
        return run_task(task, rest, environment)
    except UnableError as fault:
        print(f'spanvla: {fault}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def clean_environment() -> dict:
    """The caller's environment without foreign ROS or Python parts, DDS kept on this machine."""
    environment = dict(os.environ)
    if environment.get('USE_SYSTEM_ROS') != '1':
        for name in list(environment):
            if name in FOREIGN or name.startswith(('ROS_', 'RMW_')):
                del environment[name]
        # Two checkouts on one machine must not hear each other.
        environment['ROS_DOMAIN_ID'] = str(1 + stable_number(str(ROOT)) % 100)
        environment['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
        environment['ROS_LOG_DIR'] = str(ROOT / 'out' / 'ros_log')
    environment.setdefault('OMP_NUM_THREADS', '1')
    environment['PATH'] = f'{VENV / "bin"}{os.pathsep}{environment.get("PATH", os.defpath)}'
    environment['PIP_DISABLE_PIP_VERSION_CHECK'] = '1'
    return environment


def stable_number(text: str) -> int:
    """A number that is the same for the same text in every process."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def prepare(extras: tuple, environment: dict) -> None:
    """Bring .venv to the state that `extras` need; nothing happens when it is there already."""
    if PYTHON.exists() and not works(PYTHON):
        raise UnableError(f'{VENV} holds no working Python; remove that directory and run again')
    if not PYTHON.exists():
        make_venv(find_python(), environment)
    constraints = constraints_file()
    wanted = fingerprint(constraints)
    have = read_stamp()
    if have['fingerprint'] == wanted and set(extras) <= set(have['extras']):
        return
    # What an earlier task installed stays: demo after test must not take torch away.
    install(sorted({*extras, *have['extras']}), constraints, environment)
    temporary = STAMP.with_suffix('.new')
    stamp = {'fingerprint': wanted, 'extras': sorted({*extras, *have['extras']})}
    temporary.write_text(json.dumps(stamp), encoding='utf-8')
    temporary.replace(STAMP)


def find_python() -> str:
    """A Python between 3.10 and 3.13: the one running this, else one on the PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for name in SEARCHED:
        found = shutil.which(name)
        if found and works(found):
            return found
    raise UnableError(
        'no Python 3.10 to 3.13 found; install one (Debian, Ubuntu: '
        'sudo apt install python3.11 python3.11-venv) and run again'
    )


def works(python) -> bool:
    """Whether this interpreter starts and has a version we support."""
    check = f'import sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})'
    try:
        return subprocess.run([str(python), '-c', check], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(python: str, environment: dict) -> None:
    """Make .venv with the standard library's venv, else with virtualenv."""
    print(f'making {VENV} with {python}', flush=True)
    attempts = (
        [python, '-m', 'venv', str(VENV)],
        [python, '-m', 'virtualenv', str(VENV)],
        [shutil.which('virtualenv') or '', '-p', python, str(VENV)],
    )
    for attempt in attempts:
        if not attempt[0]:
            continue
        if subprocess.run(attempt, env=environment, capture_output=True).returncode == 0:
            return
        # Debian's venv without ensurepip leaves half an environment.
        shutil.rmtree(VENV, ignore_errors=True)
    raise UnableError(
        f'{python} can make no virtual environment; install venv or virtualenv (Debian, Ubuntu: '
        'sudo apt install python3-venv) and run again'
    )


def constraints_file() -> Path:
    """The versions proved together for the Python of .venv."""
    code = 'import sys; print("%d.%d" % sys.version_info[:2])'
    answer = subprocess.run([str(PYTHON), '-c', code], capture_output=True, text=True)
    return ROOT / '.ci' / f'constraints-{answer.stdout.strip()}.txt'


def fingerprint(constraints: Path) -> str:
    """Changes when anything changes that decides what has to be installed, or where."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / 'setup.py', ROOT / 'setup.cfg', constraints):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict:
    """What was installed last, or nothing."""
    try:
        return json.loads(STAMP.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {'fingerprint': '', 'extras': []}


def install(extras: list, constraints: Path, environment: dict) -> None:
    """Install the project, editable, with these extras; wheels only."""
    pip = [str(PYTHON), '-m', 'pip', 'install', *WHEELS_ONLY, '-qq']
    limits = ['-c', str(constraints)]
    started = time.monotonic()
    print(f'installing {", ".join(extras)} into {VENV} ...', flush=True)
    requirements = []
    if 'train' in extras:
        requirements = torch_requirement(constraints, environment)
    # The path is an argument of its own, so a space in it needs no quoting.
    command = [*pip, *limits, *requirements, '-e', f'{ROOT}[{",".join(extras)}]']
    if subprocess.run(command, env=environment, cwd=str(ROOT)).returncode != 0:
        raise UnableError(
            'pip could not install the packages above; check the network or pip.conf, run again'
        )
    print(f'installed in {time.monotonic() - started:.0f} s', flush=True)


def torch_requirement(constraints: Path, environment: dict) -> list:
    """Torch's CPU build where pip is configured to offer it, else whatever the index has."""
    pins = dict(
        line.split('==') for line in constraints.read_text('utf-8').split() if '==' in line
    )
    cpu = f'torch=={pins["torch"]}+cpu'
    probe = [str(PYTHON), '-m', 'pip', 'install', '--dry-run', '--no-deps', '--quiet']
    probe += ['--only-binary', ':all:', '--ignore-installed', cpu]
    if subprocess.run(probe, env=environment, capture_output=True).returncode == 0:
        return [cpu]
    if sys.platform == 'linux' and os.uname().machine == 'x86_64':
        print(
            'pip offers no CPU build of torch, so the CUDA build (some GB) is fetched; '
            "give pip the index of torch's CPU builds as PIP_EXTRA_INDEX_URL to avoid that",
            flush=True,
        )
    return []


def run_task(task: str, rest: list, environment: dict) -> int:
    """Run the task itself inside .venv."""
    bin_directory = VENV / 'bin'
    if task == 'demo':
        return demo(environment)
    if task == 'fix':
        steps = [['ruff', 'check', '--fix'], ['ruff', 'format']]
    elif task == 'lint':
        steps = [['ruff', 'check'], ['ruff', 'format', '--check'], ['mypy'], ['lint-imports']]
    elif task == 'test-slow':
        steps = [['pytest', '-m', 'slow and not gpu', *rest]]
    else:
        steps = [['pytest', *rest]]
    worst = 0
    for name, *arguments in steps:
        print(f'== {name} {" ".join(arguments)}', flush=True)
        command = [str(bin_directory / name), *arguments]
        code = subprocess.run(command, env=environment, cwd=str(ROOT)).returncode
        worst = worst or code
    return worst


def demo(environment: dict) -> int:
    """Drive the town for 20 s and say where the page is."""
    out = ROOT / 'out' / 'demo'
    command = [str(VENV / 'bin' / 'spanvla'), 'drive', '--seconds', '20', '--scenario', 'mix']
    command += ['--seed', '1', '--out', str(out)]
    code = subprocess.run(command, env=environment, cwd=str(ROOT)).returncode
    if code == 0:
        print(f'open {out / "index.html"}')
    return code


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
