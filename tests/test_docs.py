"""The docs: tests that they name exist, commands that they show run or say why not."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(?P<mark><!-- not run: \S[^>]* -->\n)?^```sh\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line}")
    for page in PAGES
    for block in FENCE.finditer(page.read_text())
    if not block["mark"]
    for line in block["body"].splitlines()
]


def test_every_test_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/invariants.md").read_text())
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_invariant_has_a_test() -> None:
    rows = re.findall(r"^\| (I\d) \|.*::", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE)
    assert rows == [f"I{n}" for n in range(1, 10)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str) -> None:
    program, *args = shlex.split(line)
    assert program == "pekoe", f"{line}: mark the block with <!-- not run: why -->, or teach this test to run it"
    done = subprocess.run([sys.executable, "-m", "pekoe.cli", *args], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
