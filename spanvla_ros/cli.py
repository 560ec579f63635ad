"""The `spanvla` command: maps a name to a module, imports only that, and speaks plainly on faults.

A command module has `configure(parser)` and `run(options) -> int`. A user's fault is one sentence
on stderr and exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

from spanvla_ros import __version__
from spanvla_ros.types import MissingExtraError, SpanvlaError


@dataclass(frozen=True)
class Command:
    """Where a command lives, what it does in one line, and how it is typed."""

    module: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    'init': Command(
        'spanvla_ros.doctor.init',
        'write a parameter file for the rig of a bag or of a running graph',
        (
            'spanvla init --bag my_bag --out rig',
            'spanvla init --seconds 10 --out rig',
        ),
    ),
    'drive': Command(
        'spanvla_ros.ros.drive',
        'drive the town in closed loop over DDS, every node a process of its own',
        (
            'spanvla drive --seconds 20 --out out/drive',
            'spanvla drive --scenario red_light --seed 3 --camera-hz 20 --out out/red',
        ),
    ),
    'replay': Command(
        'spanvla_ros.replay',
        'run a recorded bag through the planner in lockstep, reproducibly',
        (
            'spanvla replay my_bag --out out/replay',
            'spanvla replay my_bag --camera front=/cam0/image --odometry /odom --out out/replay',
        ),
    ),
    'rig': Command(
        'spanvla_ros.rig',
        'write the cameras of a model as a rig for CARLA, or check one',
        (
            'spanvla rig --out out/objects.json',
            'spanvla rig --check objects.json --role-name hero',
        ),
    ),
    'score': Command(
        'spanvla_ros.scoring.command',
        'score planned trajectories with PDMS and EPDMS',
        (
            'spanvla score --scenes scenes.jsonl.gz --rows rows.jsonl.gz --out scores.jsonl',
            'spanvla score --rows rows.jsonl.gz --version v2 --out scores.jsonl',
        ),
    ),
    'bench': Command(
        'spanvla_ros.bench',
        'measure how long the parts take on this machine',
        (
            'spanvla bench --only model --budget 100ms --out out/bench',
            'spanvla bench --only decoders --out out/decoders',
            'spanvla bench --only scoring --out out/scoring',
        ),
    ),
    'scenes': Command(
        'spanvla_ros.training.data.scenes',
        'draw labeled scenes of the town',
        (
            'spanvla scenes --count 1000 --seed 0 --out out/scenes',
            'spanvla scenes --count 200 --seed 1000000 --out out/held_out',
        ),
    ),
    'navsim': Command(
        'spanvla_ros.training.navsim.command',
        'turn logs and metric caches of NAVSIM into scenes and training rows',
        (
            'spanvla navsim --logs navsim_logs/test --cache metric_cache --out out/navsim',
            'spanvla navsim --logs navsim_logs/trainval --cache metric_cache '
            '--sensors sensor_blobs/trainval --out out/navsim',
        ),
    ),
    'train': Command(
        'spanvla_ros.training.command',
        'run one training stage; it can be resumed',
        (
            'spanvla train sft --config config/train/sft.yaml --out out/sft',
            'spanvla train sft --config config/train/sft.yaml --out out/sft --resume',
            'spanvla train knowledge --config config/train/knowledge.yaml --set steps=200 '
            '--out out/knowledge',
        ),
    ),
    'evaluate': Command(
        'spanvla_ros.training.evaluate',
        'measure a model on held-out scenes, in open and in closed loop',
        (
            'spanvla evaluate --model models/town --scenes out/held_out --out out/eval',
            'spanvla evaluate --model models/town --scenes out/held_out --closed-loop '
            '--out out/eval',
        ),
    ),
    'table': Command(
        'spanvla_ros.training.table',
        'measure several models on the same held-out rows, each paired with the first',
        (
            'spanvla table shipped=models/town steps2=models/town:2 --scenes out/held_out '
            '--out out/table',
        ),
    ),
    'export': Command(
        'spanvla_ros.export',
        'write the graphs of a model and prove that they match it',
        (
            'spanvla export --model out/train/model --out models/mine',
            'spanvla export --model models/mine --precision int8 --calibrate out/scenes/train',
        ),
    ),
    'doctor': Command(
        'spanvla_ros.doctor.command',
        'name what is missing or mis-set, each with the line that mends it',
        ('spanvla doctor --json', 'spanvla doctor --bag my_bag'),
    ),
}

# The extra that brings each optional library, by the name it is imported under.
EXTRA_OF_PACKAGE = {
    'cuda': 'gpu',
    'cv2': 'town',
    'onnx': 'train',
    'onnxruntime': 'onnx',
    'onnxscript': 'train',
    'pyarrow': 'train',
    'rclpy': 'ros',
    'shapely': 'town',
    'tensorboard': 'train',
    'tensorrt': 'gpu',
    'torch': 'train',
    'transformers': 'train',
    **dict.fromkeys(
        (
            'builtin_interfaces',
            'diagnostic_msgs',
            'geometry_msgs',
            'lifecycle_msgs',
            'nav_msgs',
            'rcl_interfaces',
            'rosgraph_msgs',
            'sensor_msgs',
            'std_msgs',
            'std_srvs',
            'trajectory_msgs',
            'visualization_msgs',
        ),
        'ros',
    ),
}

USER_FAULT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one sentence and not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_FAULT, f'{self.prog}: {message}; see {self.prog} --help\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = _command_name(words)
    try:
        module = _load(COMMANDS[name])
        parser = command_parser(name, module)
        return int(module.run(parser.parse_args(words[1:])))
    except ImportError as error:
        missing = _missing_extra(error)
        if missing is None:
            raise
        return _fault(name, missing)
    except SpanvlaError as error:
        return _fault(name, error)
    except OSError as error:
        # A file the user named; an OSError without one is ours.
        if error.filename is None:
            raise
        # Of a rename the name that was asked for, not the temporary one.
        place = error.filename2 or error.filename
        return _fault(name, SpanvlaError(f'{place}: {error.strerror}'))
    except KeyboardInterrupt:
        return INTERRUPTED


def command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The argument parser of one command, its examples below the options."""
    command = COMMANDS[name]
    parser = _Parser(
        prog=f'spanvla {name}',
        description=f'{command.summary[0].upper()}{command.summary[1:]}.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.configure(parser)
    parser.epilog = _examples(command.examples)
    return parser


def _command_name(words: Sequence[str]) -> str:
    parser = _Parser(
        prog='spanvla',
        usage='spanvla COMMAND [options]',
        description='Train a driving vision-language-action model, export it, drive it.',
        epilog='\n'.join(
            [
                'commands:',
                *(f'  {name:<10}{command.summary}' for name, command in COMMANDS.items()),
                '',
                _examples(tuple(command.examples[0] for command in COMMANDS.values())),
                '',
                'spanvla COMMAND --help tells the options of one command.',
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'spanvla_ros {__version__}')
    parser.add_argument('command', metavar='COMMAND', help=argparse.SUPPRESS)
    name = str(parser.parse_args(words[:1]).command)
    if name not in COMMANDS:
        parser.error(f'there is no command {name!r}; known are {", ".join(COMMANDS)}')
    return name


def _examples(lines: Sequence[str]) -> str:
    return '\n'.join(['examples:', *(f'  {line}' for line in lines)])


def _load(command: Command) -> ModuleType:
    return importlib.import_module(command.module)


def _missing_extra(error: ImportError) -> MissingExtraError | None:
    package = (error.name or '').partition('.')[0]
    extra = EXTRA_OF_PACKAGE.get(package)
    return None if extra is None else MissingExtraError(package, extra)


def _fault(name: str, error: SpanvlaError) -> int:
    print(f'spanvla {name}: {error}', file=sys.stderr)
    return USER_FAULT


if __name__ == '__main__':
    sys.exit(main())
