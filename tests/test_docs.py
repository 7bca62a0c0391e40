"""The docs: tests that they name exist, commands that they show run or say why not."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pekoe.core.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- not run: \S.* -->")
PROGRAM = re.compile(r"    (?:pekoe|make|sbatch|kubectl|pip|python|ray|torchrun) ")


def commands(page: Path) -> Iterator[str]:
    """Lines of `sh` blocks, and indented lines that begin as commands do, but for those marked as not run."""
    before, fenced, skipped = "", False, False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced and line == "```sh"
            skipped = MARK.fullmatch(before) is not None
        elif fenced and not skipped:
            yield line
        elif PROGRAM.match(line):
            skipped = MARK.fullmatch(before) is not None or (skipped and before.startswith("    "))
            if not skipped:
                yield line.strip()
        else:
            skipped = skipped and fenced
        before = line or before


COMMANDS = [pytest.param(line, id=f"{page.name}: {line.split('  ')[0]}") for page in PAGES for line in commands(page)]
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}


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
    """Help runs as it is. Of other `pekoe` lines, whose files are the reader's, the options are looked up in the help.

    Of `make` lines the target is tried without its work (`-n`).
    """
    program, *args = shlex.split(re.sub(r"[][]", "", line), comments=True)
    assert program in ("pekoe", "make"), f"{line}: say before it why not: <!-- not run: why -->"
    if program == "make":
        done = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True, timeout=60)
    else:
        asked = ["--help"] if args == ["--help"] else [args[0], "--help"]
        command = [sys.executable, "-m", "pekoe.cli", *asked]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if program == "pekoe":
        known = set(re.findall(r"--[\w-]+", done.stdout))
        assert {arg for arg in args if arg.startswith("--")} <= known


def test_the_glossary_has_every_metric_that_a_step_may_carry_and_no_other() -> None:
    """Names are read from the code that writes them: the keys of its dictionaries."""
    written: set[str] = set()
    for file, function in (
        ("run/metrics.py", "step_metrics"),
        ("run/build.py", "tell"),
        ("run/metrics.py", "work"),
        ("run/sync.py", "as_dict"),
        ("run/cluster/build.py", "tell"),
    ):
        tree = ast.parse((ROOT / "pekoe" / file).read_text())
        (body,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
        for node in ast.walk(body):
            if isinstance(node, ast.Dict):
                written |= {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.Assign) and isinstance(
                target := node.targets[0], ast.Subscript
            ):  # found["name"] = …
                written |= {str(target.slice.value)} if isinstance(target.slice, ast.Constant) else set()
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                written |= {str(name.value) for name in node.iter.elts if isinstance(name, ast.Constant)}
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == written


def test_toml_that_is_shown_is_a_recipe() -> None:
    recipe = {"num_steps": 1, "run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}
    shown = [text for page in PAGES for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)]
    assert shown
    for text in shown:
        load_config(recipe | tomllib.loads(text))
