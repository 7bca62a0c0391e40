"""What a wheel installs works alone: in an empty environment, somewhere else, without the repository."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

SHIPPED = ("laptop", "server", "boba-7b", "grpo", "dr-grpo", "rloo", "dapo", "ppo")


def run(*words: str | Path, cwd: Path, status: int = 0) -> str:
    """Its output; the environment has no path of the repository's."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolated = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]  # else it is fetched
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolated, "--wheel-dir", folder, repository, cwd=folder)
    (file,) = folder.glob("pekoe-*.whl")
    return file


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pekoe` of an environment that has the wheel; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A directory in a .pth file is searched last, and .pth files in it (an editable installation's) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    where = run(python, "-c", "import pekoe; print(pekoe.__file__)", cwd=folder)
    assert where.strip() == str(site / "pekoe/__init__.py")
    return folder / "bin/pekoe"


@pytest.mark.slow
def test_recipes_and_public_names_come_with_the_wheel(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"pekoe/recipes/{name}.toml" for name in SHIPPED} <= set(names)
    assert {"pekoe/__init__.pyi", "pekoe/report/assets/page.js", "pekoe/plan/fitted.json"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]


@pytest.mark.slow
def test_demo_doctor_recipes_and_report_work_elsewhere(program: Path, tmp_path: Path, repository: Path):
    said = [run(program, "doctor", cwd=tmp_path), run(program, "recipe", cwd=tmp_path)]
    assert all(f"\n{name} " in f"\n{said[1]}" for name in SHIPPED)
    said.append(run(program, "demo", "--quick", cwd=tmp_path))
    (again,) = [line for line in said[-1].splitlines() if "rl laptop" in line]
    small = ["num_steps=1", "rollout.prompts_per_step=4", "rollout.max_new_tokens=8", "eval.samples=1"]
    words = again.split(" rl ")[1].split()  # what the demo says to try
    said.append(run(program, "rl", *words, *small, cwd=tmp_path))
    said.append(run(program, "rl", "laptop", "grpo", "run.dir=runs/grpo", *small, cwd=tmp_path))
    said.append(run(program, "doctor", "laptop", *small, cwd=tmp_path))
    said.append(run(program, "report", "runs/mine", cwd=tmp_path))
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 100_000
    said.append(run(program, "recipe", "laptop", cwd=tmp_path))
    assert "lr = 0.5" in run(program, "rl", "laptop.toml", "optim.lr=0.5", "--dry-run", cwd=tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "runs/grpo/journal.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "step" for event in steps) == 1
    for text in said:
        assert str(repository) not in text.replace(sys.executable, "")
