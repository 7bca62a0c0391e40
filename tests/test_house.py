"""The house's own rules: small files, small functions, a word at every door, and no torch where none belongs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pekoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Lines that a room may have, with docstrings and blank ones. A feature that needs more says what it costs and why.
BUDGETS = {
    # JudgedGroup.of, stop tokens, 30; hardware.py 105; statistics.py, 75; Verdict.score, 10; names of the hub, 11;
    # functions.py, 40; what is timed of a machine, 26; checksums, and messages on
    # files that are damaged, 95
    # the shape of a family that transformers computes, 75; experts in records, 35
    # a user's modules, also those of libraries, 9
    # the request to stop, 4
    "core": 1553,
    # keys.py, which lists every key, 205; names.py, what TRL and verl call them, 85; secrets.py, 40; the bounds of
    # settings, 70; rewards of the user's own, scores and lengths, 50; columns, 26; unread settings, 40; recipes that
    # are listed, copied and refused as data, 35; depth of values, 15; names by their last parts, 14;
    # model.template.variables, 14; settings of theirs without a key here, 25; an algorithm alone, recipes' commands, 12
    # rollout.py, a file of its own; replay of routing, 30
    "config": 1650,
    "kernels": 770,  # scales, windows, soft caps and sinks, 30
    # heads that are no product, 12; experts of packed tokens, 12
    "algo": 612,  # own advantages, 20; by sequence, 25; log-prob differences by lag, 33; rewards by a formula, 19
    # protocol.py, families.py, family_files.py: what transformers computes, on packed rows, 700; other scores, 75
    # names in files a layer at a time, 27
    # routing of experts, recorded and replayed, and its loss, 230; as servers give it, 21
    "model": 2461,  # lora.py, 165; peft.py, their files, and what a model directory of theirs is, 235
    # template_process.py and its caller: limits of chat templates, 145; tokenizers that fail or multiply, 60;
    # references that are refused, 55; sources.py: CSV, arrays, compression and its bounds, 180; columns by name, 90;
    # layouts of demonstrations, 60; values of Parquet, directories of `datasets`, 70; bad rows in a message, 40;
    # columns that JSON has not, 22; ARC, 9; Ctrl-C in a template, 6
    # chat with tools and template variables, 48; the decoder of a run, 18 (of cli.py); rows of sft among problems, 2
    "data": 2250,  # tokens of single bytes, 4
    # normalize.py and units.py: what users' answers look like, 230; references.py, 90; function.py and sources.py: how
    # a user's reward is called, and its source, 205; what it prints, 35; a budget for heavy answers, 20;
    # powers beyond all values, 30; a reward's module that is not found, 19
    "verify": 3724,
    # memory that is there, 17; stop tokens, 35; base, pool and sampling 970; embedded 1,710; servers 1,915: limits,
    # checks, keys; requests that their callers cancel, 30
    # layers of unequal shapes, windows, soft caps, sinks, 45
    # experts at vLLM: packed again, checksums, 50
    # routing.py, experts beside KV, 80; blocks out of every window, 35
    # listeners that end a response, 5; experts that servers return, 60
    # scales, windows, soft caps and sinks in both devices' kernels, 55
    "engine": 5155,
    # families of transformers, 20; adamw.py: moments in fewer bytes, 85; precision of sharded weights, 40;
    # memory by phases of a step, 45; plans of families, 35
    # the loss for even experts, 45
    # a stop between the layers of a step, 29
    "train": 1354,  # checkpoint.py: checksums of shards, and metadata that runs no code, 120; groups apart, 10
    # heads that are no product, servers' checksums of families, 35
    "weights": 1050,  # a publish that is not waited for after a stop request, 30; copies that ranks send, 35
    # references.py, 80; signals, 15; inputs.py: what a run that goes on must have the same, 125; users' rewards, 95;
    # look.py, 120; judges that are started first, the step that is kept at an error, rows by their places, 60;
    # own metrics, 25
    # sample.py, 175; tables of eval, 50; responses.jsonl, 45; profile.py, 95; run directories that are
    # damaged, --from, a model beside its place, 240; verify.py, 73 (of cli.py); serve.py, 105
    # first_hour/: fifteen parts of doctor --gpu, and what runs them one by one, 1,130; doctor --device, what would fit,
    # and turns on one device, 180
    # the check of packed documents, active parameters, 10; directories that hold results, 2
    # settings of moments, 15; the source of an environment of verifiers, 8
    # profile_processes.py: what one of several processes reaches, with FSDP over gloo, 115; profile.py, 50
    # a stop in the middle of training, and the state before it, 46
    "run": 6458,
    # lag.py: who waits for whom, what a lag gave, 150; learning.py, 115; the time left, 20; page.js; what is damaged or
    # not finite, 50
    "report": 1490,
    # ranks that train on while they send, 30; streams.py: many answers by one call, 100; who may connect, 20;
    # engines in bfloat16, 6
    "ray": 1545,
    # wire.py, endpoint.py and three files of APIs: an HTTP endpoint as programs expect it, 1,080; tools.py, 200;
    # conformance.py, 265; environments.py, 125; answers as they are sampled, in four APIs, 500
    # verifiers_env.py: environments of another library, and their tasks as problems, 190
    # answers that end at a stop text, where an engine samples no further, 27
    "agents": 3249,
    "demo": 716,  # on a GPU, 10; what the quick form is, 1
    # keys, recipe, keys in --help, 52; plan, 45; data, 26; verify --references, 20; sample, 35; sys.path of -m, 4;
    # doctor --gpu, and --device, 13; serve, 17; verify's kind of one function, 1
    "cli.py": 600,
    # formulas 840; memory, the simulated schedule, reading a recipe, tables, 1,180; other layouts and what-if, 230;
    # calibrate.py: constants of this machine, 115; page.py, 80;
    # own.py: a run's own model, 270; kernels.py: AIConfigurator, 105; experts, 15; memory by phases, 6;
    # configs.py: names of families, 55; what is measured of FSDP, of a publish's proof and of checkpointing, 60
    "plan": 3030,
}
ROOMS = sorted(room for room in BUDGETS if not room.endswith(".py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function and method with its lines, from `def` to its end (decorators left out)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_are_small():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lines) > 20
    assert {name: number for name, number in lines.items() if number > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("room", BUDGETS)
def test_rooms_keep_their_budgets(room: str):
    place = PACKAGE / room
    files = [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.js")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= BUDGETS[room], f"{room}: expected at most {BUDGETS[room]} lines, got {lines}"


def test_functions_are_small():
    found = [(name_of(path), *each) for path in SOURCES for each in functions(path.read_text(encoding="utf-8"))]
    assert len(found) > 100
    assert [each for each in found if each[-1] > MAX_FUNCTION_LINES] == []


def test_a_long_function_would_be_found():
    body = "        x = 1\n" * MAX_FUNCTION_LINES
    source = f"class A:\n    @decorated\n    async def long(self):\n        def short(): ...\n{body}"
    assert ("long", MAX_FUNCTION_LINES + 2) in list(functions(source))


def test_every_public_module_says_what_it_is():
    public = [path for path in SOURCES if not path.stem.startswith("_") or path.stem.endswith("__")]
    silent = [path for path in public if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert [name_of(path) for path in silent] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_door(room: str):
    assert (PACKAGE / room / "__init__.py").is_file()


def test_no_room_is_missing_from_the_plan():
    found = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert found == set(ROOMS)


@pytest.mark.parametrize(
    "module",
    ["pekoe.core", "pekoe.config", "pekoe.data", "pekoe.verify", "pekoe.report", "pekoe.plan.step", "pekoe.cli"],
)
def test_imports_without_torch(module: str):
    code = f"import sys, {module}; sys.exit(3 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode != 3, f"{module} brought torch along"
    assert done.returncode == 0, done.stderr


class TestMakefile:
    """The set-up's way out of trouble, without installing anything: `make -n` prints what it would do."""

    @pytest.fixture
    def clone(self, tmp_path: Path, repository: Path) -> Path:
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(repository / name, tmp_path)
        return tmp_path

    def make(self, clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-C", str(clone), *arguments], capture_output=True, text=True)

    def script(self, path: Path, body: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def sound(self, clone: Path) -> None:
        """An environment as a finished installation leaves it."""
        self.script(clone / ".venv/bin/python", f'exec {sys.executable} "$@"')
        (clone / ".venv/.stamp-venv").write_text(str(clone))
        (clone / ".venv/.stamp-test").touch()

    def test_help_lists_the_targets(self, clone: Path):
        out = self.make(clone, "help").stdout
        assert all(f"make {target}" in out for target in ("demo", "test", "test-slow", "check", "format", "clean"))

    def test_old_python_is_told_so(self, clone: Path):
        old = self.script(clone / "old", '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0; exit 1')
        done = self.make(clone, "test", f"PYTHON={old}")
        assert done.returncode != 0
        assert "Pekoe needs Python 3.11 to 3.13" in done.stderr
        assert "Python 3.9.2" in done.stderr
        assert not (clone / ".venv").exists()

    def test_second_call_installs_nothing(self, clone: Path):
        self.sound(clone)
        assert "pip" not in self.make(clone, "-n", "test").stdout

    def test_changed_pyproject_installs_again(self, clone: Path):
        self.sound(clone)
        newer = (clone / ".venv/.stamp-test").stat().st_mtime + 5
        os.utime(clone / "pyproject.toml", (newer, newer))
        out = self.make(clone, "-n", "test").stdout
        assert '-e ".[test]"' in out
        assert "-m venv" not in out

    def test_demo_installs_only_what_it_needs(self, clone: Path):
        self.sound(clone)
        out = self.make(clone, "-n", "demo", "ARGS=--seed 1").stdout
        assert '-e ".[demo]"' in out
        assert "pekoe demo --seed 1" in out

    @pytest.mark.parametrize("trouble", ["dead python", "moved", "no stamp"])
    def test_unsound_environment_is_looked_at_again(self, clone: Path, trouble: str):
        self.sound(clone)
        if trouble == "dead python":
            self.script(clone / ".venv/bin/python", "exit 127")
        elif trouble == "moved":
            (clone / ".venv/.stamp-venv").write_text("/somewhere/else")
        else:
            (clone / ".venv/.stamp-venv").unlink()
        out = self.make(clone, "-n", "test").stdout
        assert "-m venv" in out
        assert '-e ".[test]"' in out
