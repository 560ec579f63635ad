"""The command line: what it knows, how it refuses, and what it does not import."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from spanvla_ros import __version__, cli
from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.types import SpanvlaError


def fake_command(monkeypatch, run):
    module = ModuleType('fake_command')
    module.configure = lambda parser: parser.add_argument('--count', type=int, default=1)
    module.run = run
    monkeypatch.setitem(sys.modules, 'fake_command', module)
    command = cli.Command('fake_command', 'count things', ('spanvla fake --count 3',))
    monkeypatch.setitem(cli.COMMANDS, 'fake', command)


@pytest.mark.parametrize('name', sorted(cli.COMMANDS))
def test_every_listed_command_exists_and_explains_itself(name, capsys):
    command = cli.COMMANDS[name]
    assert importlib.util.find_spec(command.module) is not None
    assert all(example.startswith(f'spanvla {name} ') for example in command.examples)
    with pytest.raises(SystemExit) as ended:
        cli.main([name, '--help'])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert 'examples:' in shown
    assert command.examples[0] in shown


@pytest.mark.parametrize('name', sorted(cli.COMMANDS))
def test_the_examples_are_accepted_by_their_parser(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    for example in cli.COMMANDS[name].examples:
        cli.command_parser(name, module).parse_args(example.split()[2:])


def test_help_lists_every_command_and_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(['--help'])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert 'examples:' in shown
    assert all(f'  {name} ' in shown for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(['--version'])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f'spanvla_ros {__version__}'


@pytest.mark.parametrize('words', [['no_such_command'], [], ['--no-such-option']])
def test_a_wrong_word_is_one_sentence_and_exit_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert 'see spanvla --help' in said


def test_a_wrong_option_is_one_sentence_and_exit_2(monkeypatch, capsys):
    fake_command(monkeypatch, lambda options: 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(['fake', '--count', 'many'])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert 'many' in said
    assert 'spanvla fake --help' in said


def test_options_and_exit_code_pass_through(monkeypatch):
    fake_command(monkeypatch, lambda options: options.count)
    assert cli.main(['fake', '--count', '5']) == 5


def test_a_users_fault_is_its_sentence_and_exit_2(monkeypatch, capsys):
    def run(options: argparse.Namespace) -> int:
        raise SpanvlaError('model.yaml: waypoints is 0; use 10')

    fake_command(monkeypatch, run)
    assert cli.main(['fake']) == 2
    assert capsys.readouterr().err == 'spanvla fake: model.yaml: waypoints is 0; use 10\n'


def test_a_missing_file_is_a_users_fault(monkeypatch, capsys, tmp_path):
    missing = tmp_path / 'no.txt'
    fake_command(monkeypatch, lambda options: missing.read_text() and 0)
    assert cli.main(['fake']) == 2
    assert capsys.readouterr().err == f'spanvla fake: {missing}: No such file or directory\n'


def test_a_file_that_cannot_be_put_in_place_is_named_as_typed(monkeypatch, capsys, tmp_path):
    fake_command(monkeypatch, lambda options: write_text(tmp_path, 'x') or 0)
    assert cli.main(['fake']) == 2
    assert capsys.readouterr().err == f'spanvla fake: {tmp_path}: Is a directory\n'


@pytest.mark.parametrize(
    ('package', 'extra'), [('torch', 'train'), ('rclpy.node', 'ros'), ('onnxruntime', 'onnx')]
)
def test_a_missing_library_names_its_extra(package, extra, monkeypatch, capsys):
    def run(options: argparse.Namespace) -> int:
        raise ModuleNotFoundError(f'No module named {package!r}', name=package)

    fake_command(monkeypatch, run)
    assert cli.main(['fake']) == 2
    said = capsys.readouterr().err
    assert f"pip install 'spanvla_ros[{extra}]'" in said
    assert said.count('\n') == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(options: argparse.Namespace) -> int:
        raise ModuleNotFoundError('No module named ours', name='spanvla_ros.ours')

    fake_command(monkeypatch, run)
    with pytest.raises(ModuleNotFoundError, match='ours'):
        cli.main(['fake'])


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        'import sys; from spanvla_ros import cli\n'
        'try: cli.main(["--help"])\n'
        'except SystemExit: pass\n'
        'heavy = {"torch", "transformers", "rclpy", "cv2", "onnxruntime"} & set(sys.modules)\n'
        'sys.exit(", ".join(sorted(heavy)) or 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
