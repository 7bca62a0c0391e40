"""No message names what only the repository has: who installed a wheel has neither its files nor its `make`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "pekoe"
MAKEFILES = [PACKAGE.parent / "Makefile", PACKAGE.parent / "benchmarks/bench.mk"]
TARGETS = [name for file in MAKEFILES for name in re.findall(r"^([a-z-]+):", file.read_text(), re.MULTILINE)]
FOLDERS = ("recipes", "docs", "tests", "benchmarks", "examples")
OURS = re.compile(
    rf"\bmake (?:{'|'.join(TARGETS)}|\.venv)|(?<![\w/])(?:{'|'.join(FOLDERS)})/\w|\w+\.mk\b|README|CONTRIBUTING"
)


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text of a module but those that stand alone, which document."""
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def named(source: str, help_too: bool = False) -> list[str]:
    tree = ast.parse(source)
    found = list(texts(tree))
    if help_too:
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [match[0] for text in found for match in OURS.finditer(text)]


def test_no_message_names_a_file_or_target_of_the_repository():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if (names := named(path.read_text(encoding="utf-8"), path.name == "cli.py"))
    }
    # What documents a key is printed by `pekoe keys`: all texts of the schema count.
    for path in (PACKAGE / "config").glob("*.py"):
        names = [m[0] for m in OURS.finditer(path.read_text(encoding="utf-8"))]
        found |= {str(path.relative_to(PACKAGE)): names} if names else {}
    assert found == {}


def test_such_a_message_would_be_found():
    assert named('x = f"{y}: see recipes/server.toml, or make demo"') == ["recipes/s", "make demo"]
    assert named('"""See docs/x.md."""\nx = "makes it"') == []
