"""Pools for the judge's tests. A pool costs about a second to start, so most tests share one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pekoe.verify import JudgePool


@pytest.fixture(scope="session")
def pool() -> Iterator[JudgePool]:
    """A shared pool without a memo; its time limit is for honest answers on a busy machine."""
    with JudgePool(num_workers=1, time_limit_s=20.0, memo_size=0) as shared:
        yield shared


@pytest.fixture
def run_script(tmp_path: Path, repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a process of its own, in an empty folder, and return what it printed."""

    def run(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(source)
        command = [sys.executable, str(script), *arguments]
        environment = os.environ | {"PYTHONPATH": str(repository)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)

    return run


BadWorker = Callable[[str], tuple[str, ...]]
READY = "say({'ready': True})\n"


@pytest.fixture
def bad_worker(tmp_path: Path) -> BadWorker:
    """The command of a worker whose program is `source`; it has `say(message)`, and `ask()` for the next request."""
    head = (
        "import json, os, pathlib, sys, time\n"
        "def say(message): print(json.dumps(message), flush=True)\n"
        "def ask(): return json.loads(sys.stdin.readline())\n"
    )

    def command(source: str) -> tuple[str, ...]:
        script = tmp_path / "worker.py"
        script.write_text(head + source)
        return (sys.executable, str(script))

    return command


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def worker_pids(pool: JudgePool) -> list[int]:
    """The worker processes of `pool` that are ready."""
    return [worker.pid for worker in list(pool._groups["math"].workers) if worker.ready]
