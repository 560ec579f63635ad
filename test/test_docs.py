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
from spanvla_ros.model.checkpoint import GRAPHS, PRECISIONS
from spanvla_ros.runtime.backend import AUTO_LOADERS, LOADERS

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


def test_the_engines_page_has_every_backend_graph_and_precision():
    text = (ROOT / 'docs' / 'engines.md').read_text(encoding='utf-8')
    runs = dict(re.findall(r'^\| `([\w-]+)` \| (graphs|torch model) \|', text, re.M))
    assert set(runs) == {name.partition(':')[0] for name in LOADERS}
    assert {name for name, what in runs.items() if what == 'torch model'} == {
        'torch',
        'torch-cuda',
    }
    words = ('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven')
    graphs = sum(what == 'graphs' for what in runs.values())
    assert f'{words[len(runs)].capitalize()} backends run' in text
    assert f'{words[graphs]} engines run the graphs' in text
    assert f'{words[len(GRAPHS)]} static ONNX graphs' in text
    assert all(f'`{name}`' in text for name in (*GRAPHS, 'propose'))
    # ONNX Runtime has no bf16 on a CPU: that one is known, and refused with a sentence.
    rows = re.findall(r'^\| (`fp16`[^|]*) \| ([^|]*) \|', text, re.M)
    said = {
        f'{name}:{precision}'
        for precisions, names in rows
        for name in re.findall(r'`([\w-]+)`', names)
        for precision in re.findall(r'`(\w+)`', precisions)
    }
    assert said == {name for name in LOADERS if ':' in name} - {'onnxruntime:bf16'}
    assert all(f'| `{precision}` |' in text for precision in PRECISIONS[1:])
    assert f'`auto` tries {", ".join(f"`{name}`" for name in AUTO_LOADERS)} ' in text


# Words that American English spells otherwise, between what is code.
BRITISH = re.compile(
    r'\b(\w*(colour|behaviour|neighbour|favour|honour|metre|centre|licence|defence|labell|modell|'
    r'travell|cancell|signall|catalogue|grey|artefact|manoeuvre|judgement)\w*|'
    r'\w+(yse|lise|mise|nise|rise|tise)[sd]?|towards|learnt|whilst)\b',
    re.I,
)
AMERICAN = re.compile(
    r'(precise|promise|premise|compromise|advertise|expertise|exercise|rise|arise|comprise|'
    r'surprise|otherwise|supervise|enterprise)[sd]?',
    re.I,
)


def test_the_pages_are_in_american_english(page):
    text = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', ' ', page.read_text('utf-8'), flags=re.S)
    odd = [found[0] for found in BRITISH.finditer(text) if not AMERICAN.fullmatch(found[0])]
    assert not odd


def test_nobody_reads_of_a_machine(page):
    text = page.read_text(encoding='utf-8')
    assert not re.findall(r'(?<![\w.])/(?:home|root|work|Users|tmp)/', text)
