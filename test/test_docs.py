"""README and docs against the code: names, links, commands, the tree, parameters."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from spanvla_ros.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / 'README.md'
PAGES = [README, ROOT / 'models' / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
NAMED = re.compile(r'`((?:spanvla_ros|test|\.ci)/[\w/.]+?\.py):([\w.]+)`')
LINK = re.compile(r'\]\(([^)\s]+)\)')
COMMAND = re.compile(
    r'`(?:\.venv/bin/)?spanvla ([a-z]\w*)|^(?:\.venv/bin/)?spanvla ([a-z]\w*)', re.M
)
# What tools leave behind and git ignores.
LEFT_BEHIND = {'out', 'build', 'install', 'log', 'incidents', 'htmlcov', '__pycache__'}


@lru_cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes, methods as `Class.method`, and constants that a module defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f'{node.name}.{n.name}' for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
    return request.param


def test_the_code_named_is_there(page):
    missing = [
        f'{file}:{name}'
        for file, name in NAMED.findall(page.read_text(encoding='utf-8'))
        if not (ROOT / file).is_file() or name not in definitions(ROOT / file)
    ]
    assert not missing


def test_the_tables_of_the_readme_name_code():
    assert len(NAMED.findall(README.read_text(encoding='utf-8'))) > 40


def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text(encoding='utf-8')):
        target = link.partition('#')[0]
        if '://' not in link and target and not (page.parent / target).exists():
            broken.append(link)
    assert not broken


def test_commands_exist(page):
    words = {a or b for a, b in COMMAND.findall(page.read_text(encoding='utf-8'))}
    assert words <= set(COMMANDS)


def test_every_command_is_in_the_readme():
    words = {a or b for a, b in COMMAND.findall(README.read_text(encoding='utf-8'))}
    assert words == set(COMMANDS)


def folders(parent: Path) -> set[str]:
    return {
        path.name
        for path in parent.iterdir()
        if path.is_dir()
        and path.name not in LEFT_BEHIND
        and not path.name.endswith('.egg-info')
        and (path.name == '.ci' or not path.name.startswith('.'))
    }


def test_the_tree_is_the_tree():
    text = README.read_text(encoding='utf-8')
    tree = text.partition('## The tree')[2].partition('```\n')[2].partition('```')[0]
    lines = re.findall(r'^( *)(\S+?)(/?)  +\S', tree, re.M)
    assert {name for indent, name, slash in lines if slash and not indent} == folders(ROOT)
    inside = {name for indent, name, slash in lines if slash and indent}
    assert inside == folders(ROOT / 'spanvla_ros')
    files = [name for _, name, slash in lines if not slash]
    assert files
    assert all((ROOT / 'spanvla_ros' / name).is_file() for name in files)


def parameters() -> dict[str, object]:
    text = (ROOT / 'config' / 'spanvla.param.yaml').read_text(encoding='utf-8')
    return {
        f'{node.removeprefix("/**/")}.{name}': value
        for node, content in yaml.safe_load(text).items()
        for name, value in content['ros__parameters'].items()
    }


def test_parameters_and_defaults_are_those_of_the_file(page):
    known = parameters()
    rows = re.findall(
        r'^\| `((?:planner|guardian|follower|recorder|town|carla|bridge|replay)\.\w+)` '
        r'\| ([^|]*) \|',
        page.read_text(encoding='utf-8'),
        re.M,
    )
    assert {name for name, _ in rows} <= set(known)
    for name, cell in rows:
        shown = yaml.safe_load(cell.strip().strip('`')) if cell.strip() != 'empty' else ''
        assert shown == known[name], name


def test_launch_arguments_exist(page):
    launched = re.findall(
        r'ros2 launch spanvla_ros (\S+\.launch\.xml)((?:[ \\\n]+\w+:=\S+)*)',
        page.read_text(encoding='utf-8'),
    )
    for file, words in launched:
        tree = ElementTree.parse(ROOT / 'launch' / file)
        known = {entry.get('name') for entry in tree.getroot().iter('arg')}
        assert set(re.findall(r'(\w+):=', words)) <= known


def test_training_files_named_are_there(page):
    text = page.read_text(encoding='utf-8')
    named = re.findall(r'\bconfig/[\w./-]+\.(?:yaml|xml)', text)
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_nobody_reads_of_a_machine(page):
    text = page.read_text(encoding='utf-8')
    assert not re.findall(r'(?<![\w.])/(?:home|root|work|Users|tmp)/', text)
