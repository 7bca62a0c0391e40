"""The docs: tests that they name exist, and their commands are run in order, or it is said before each why not.

A page is a script: blocks with a title are files, `sh` blocks what is done with them, in a folder that has the recipes
and what `make demo` leaves (by its quick form).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config.recipes import load_config
from pekoe.plan.recipe import OwnDevice

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- not run: \S.* -->")
PROGRAM = re.compile(r"    (?:pekoe|make|sbatch|kubectl|pip|python|ray|torchrun) ")
TITLED = re.compile(r'```\w+ title="([\w.-]+)"')


@dataclass
class Page:
    """What a page asks its reader to write and to run."""

    path: Path
    files: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    commands: list[str] = field(default_factory=list[str])

    @classmethod
    def read(cls, path: Path) -> Page:
        """Commands are the lines of `sh` blocks, and indented ones that begin as commands do, but for those marked."""
        page, before, block, skipped = cls(path), "", "", False
        for line in path.read_text().splitlines():
            if line.startswith("```"):
                block = "" if block else line
                skipped = MARK.fullmatch(before) is not None
                if titled := TITLED.fullmatch(block):
                    page.files[titled[1]] = []
            elif titled := TITLED.fullmatch(block):
                page.files[titled[1]].append(line)
            elif block == "```sh" and not skipped:
                page.commands.append(line)
            elif not block and PROGRAM.match(line):
                skipped = MARK.fullmatch(before) is not None or (skipped and before.startswith("    "))
                if not skipped:
                    page.commands.append(line.strip())
            before = line or before
        return page


READ = [Page.read(path) for path in PAGES]
COMMANDS = [
    pytest.param(line, id=f"{page.path.name}: {line.split('  ')[0]}") for page in READ for line in page.commands
]
# Those that take longest: 70 to 135 s each.
LONG = {f"docs/{name}.md" for name in ("index", "training", "algorithm", "data")} | {
    f"docs/how-to/{name}.md" for name in ("evaluate", "own-model", "lora", "asynchronous")
}
SCRIPTS = [
    pytest.param(page, id=name, marks=pytest.mark.long if name in LONG else ())
    for page in READ
    if page.commands and (name := str(page.path.relative_to(ROOT)))
]
ENVIRONMENT = {
    **os.environ,
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "200",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@pytest.mark.parametrize("name", ["recipe", "reference"])
def test_a_page_made_from_the_code_is_not_stale(name: str) -> None:
    """`make pages` writes them anew."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = getattr(pages, f"{name}_page")()
    assert (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") == text, "make pages, and commit what it writes"


def test_every_test_named_exists() -> None:
    pages = (ROOT / "docs/invariants.md").read_text(), (ROOT / "docs/attacks.md").read_text()
    named = [each for page in pages for each in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)]
    assert all(page.count("::") > 20 for page in pages)
    assert len(named) == sum(page.count("::") for page in pages)
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_invariant_has_a_test() -> None:
    rows = re.findall(r"^\| (I\d+) \|.*::", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE)
    assert rows == [f"I{n}" for n in range(1, 12)]


@cache
def options_of(command: str) -> set[str]:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0, done.output
    return set(re.findall(r"--[\w-]+", done.output))


@pytest.fixture(scope="module")
def unknown_targets() -> set[str]:
    """What `make` says of all targets that pages name, without their work (`-n`)."""
    lines = [shlex.split(line, comments=True) for page in READ for line in page.commands]
    targets = sorted({word for program, *words in lines if program == "make" for word in words if "=" not in word})
    done = subprocess.run(["make", "-n", "-k", *targets], cwd=ROOT, capture_output=True, text=True, timeout=60)
    unknown = set(re.findall(r"No rule to make target '([^']+)'", done.stderr))
    assert unknown or done.returncode == 0, done.stderr
    return unknown


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known(line: str, unknown_targets: set[str]) -> None:
    """The options of `pekoe` lines are looked up in the help, and the targets of `make` lines in the Makefile."""
    program, *args = shlex.split(line, comments=True)
    if program == "make":
        assert unknown_targets.isdisjoint(args)
    elif program == "pekoe":
        assert {arg for arg in args if arg.startswith("--")} <= options_of(args[0])
    else:
        assert program in ("torchrun", "python"), f"{line}: say before it why it is not run: <!-- not run: why -->"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    run("pekoe demo --quick", folder)
    return folder


def run(line: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", SCRIPTS)
def test_a_page_does_what_it_says(page: Page, demo: Path, tmp_path: Path) -> None:
    """From first to last, but for `make` lines: what they make takes minutes, and has tests of its own."""
    folder = shutil.copytree(demo, tmp_path / "reader")
    for name, lines in page.files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    for line in page.commands:
        if not line.startswith("make "):
            run(line, folder)


def test_the_glossary_has_every_metric_that_a_step_may_carry_and_no_other() -> None:
    """Names are read from the code that writes them: the keys of its dictionaries."""
    written: set[str] = set()
    for file, function in (
        ("run/metrics.py", "step_metrics"),
        ("run/metrics.py", "lag_metrics"),
        ("algo/loss.py", "logprob_diffs_by_lag"),
        ("run/metrics.py", "step_work"),
        ("core/loop.py", "as_dict"),
        ("run/rollouts.py", "counters"),
        ("weights/channel.py", "counters"),
        ("ray/trainer.py", "counters"),
        ("ray/placement.py", "counters"),
    ):
        tree = ast.parse((ROOT / "pekoe" / file).read_text())
        (body,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
        for node in ast.walk(body):
            if isinstance(node, ast.Dict):
                written |= {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.Assign) and isinstance(
                target := node.targets[0], ast.Subscript
            ):  # metrics["name"] = …
                written |= {str(target.slice.value)} if isinstance(target.slice, ast.Constant) else set()
            if isinstance(node, ast.Tuple):  # of names that a comprehension goes through
                written |= {str(name.value) for name in node.elts if isinstance(name, ast.Constant)}
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    # Of these the idle shares are made (`run.metrics.StepCounters`).
    written = written - {"engines_busy_s", "ranks_busy_s", "num_ranks"} | {"idle_engines", "idle_ranks"}
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == written


def test_toml_that_is_shown_is_a_recipe() -> None:
    recipe = {"num_steps": 1, "run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}
    shown = [text for page in PAGES for text in re.findall(r"```toml[^\n]*\n(.*?)```", page.read_text(), re.DOTALL)]
    assert shown
    for text in shown:
        tree = tomllib.loads(text)
        if "memory_gb_s" in tree:  # a device, not a recipe
            OwnDevice.model_validate(tree)
        else:
            load_config(recipe | tree)
