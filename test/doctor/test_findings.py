"""The catalog of findings, the code that finds them and the page that lists them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from spanvla_ros.doctor.findings import CATALOG, SEVERITIES
from spanvla_ros.doctor.page import PAGE_FILE, finding_page

ROOT = Path(__file__).resolve().parents[2]


def strings(path: Path) -> set[str]:
    """Every string that the code of a module holds."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str)}


def test_the_page_is_current_and_holds_every_finding():
    page = (ROOT / PAGE_FILE).read_text(encoding='utf-8')
    assert page == finding_page(), 'run: python -m spanvla_ros.doctor.page'
    rows = re.findall(r'^\| `(\w+)` \| (\w+) \| ([^|]+) \| (.+) \|$', page, re.M)
    assert [name for name, *_ in rows] == list(CATALOG)
    assert {severity for _, severity, *_ in rows} <= set(SEVERITIES)
    assert all(meaning.strip() and fix.strip() for *_, meaning, fix in rows)


def test_nothing_is_found_that_the_catalog_lacks_and_nothing_listed_is_never_found():
    folder = ROOT / 'spanvla_ros' / 'doctor'
    modules = [path for path in folder.glob('*.py') if path.name not in ('findings.py', 'page.py')]
    said = set().union(*map(strings, modules))
    assert set(CATALOG) <= said
    called = set()
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'found':
                first = node.args[0]
                called |= {first.value} if isinstance(first, ast.Constant) else set()
    assert called
    assert called <= set(CATALOG)
