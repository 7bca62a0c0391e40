"""The worker at the other end of its pipes: the protocol, its limits, and its death with its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pekoe.verify.pool import WORKER_COMMAND, _environment

from .conftest import alive, wait_until

Process = subprocess.Popen[bytes]
MEMORY = 1 << 30


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(memory: int = MEMORY, parent: int | None = None, command: tuple[str, ...] = WORKER_COMMAND) -> Process:
        arguments = [*command, str(parent or os.getpid()), str(memory)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment()))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def ask(process: Process, **request: Any) -> dict[str, Any]:
    assert process.stdin is not None
    request = {"id": 1, "kind": "math", "check": "answer"} | request
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return hear(process)


def hear(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_protocol(start: Callable[..., Process]):
    worker = start()
    assert hear(worker) == {"ready": True}
    answer = ask(worker, id=5, answer=r"\frac12", gold="0.5")
    assert answer == {"id": 5, "label": "correct", "why": "", "oversized": False}
    assert ask(worker, answer="", gold="0.5", check="reference")["label"] == "correct"
    assert ask(worker, answer="", gold="x + }{", check="reference")["label"] == "fault"
    assert ask(worker, kind="function:operator:mul", answer="x", gold=1 << 31)["limit"] == "memory"
    assert ask(worker, answer="1+" * 4000 + "1", gold="7")["limit"] == "recursion"
    assert "UserError" in ask(worker, kind="none", answer="1", gold="7")["error"]
    os.kill(worker.pid, signal.SIGINT)  # Ctrl-C goes to every process of the terminal: it is not the worker's to act on
    assert ask(worker, answer="0.50", gold="1/2")["label"] == "correct"
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    found = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert found["Max address space"] == [str(MEMORY)] * 2
    assert found["Max core file size"] == ["0", "0"]
    worker.stdin.close()
    assert worker.wait(20) == 0


def test_what_libraries_print_does_not_reach_the_protocol(start: Callable[..., Process]):
    chatty = (
        "import os, sys\n"
        "from pekoe.verify import worker\n"
        "def decide(answer, gold):\n"
        "    print('hello'); os.write(1, b'from below'); sys.stderr.write('oh'); raise ValueError('a bug')\n"
        "kind = worker.VERIFIERS['math']\n"
        "print('early')\n"
        "def warm_up(): print('hm')\n"
        "worker.refuse_code_and_acts = lambda: None\n"
        "worker.VERIFIERS['math'] = type(kind)('math', kind.prepare, decide, kind.check_reference, warm_up)\n"
        "worker.main()"
    )
    worker = start(command=(sys.executable, "-c", chatty))
    assert worker.stdout.readline() == b"early\n"  # before main(): nobody's fault, and the pool would say so
    assert hear(worker) == {"ready": True}
    assert ask(worker, answer="1", gold="2") == {"id": 1, "oversized": False, "error": "ValueError: a bug"}


def test_too_little_memory_to_start(start: Callable[..., Process]):
    worker = start(memory=60 << 20)
    assert "failed" in hear(worker) or worker.wait(20) != 0


def test_an_oversized_worker_says_so(start: Callable[..., Process]):
    growing = (
        "from pekoe.verify import worker\n"
        "kind, kept = worker.VERIFIERS['math'], []\n"
        "def decide(answer, gold):\n"
        "    kept.append(bytearray(int(answer)))\n"  # as sympy's caches do
        "    return kind.decide('1', '2')\n"
        "worker.VERIFIERS['math'] = type(kind)('math', kind.prepare, decide, kind.check_reference, kind.warm_up)\n"
        "worker.main()"
    )
    worker = start(memory=500 << 20, command=(sys.executable, "-c", growing))
    assert hear(worker) == {"ready": True}
    assert ask(worker, answer="1", gold="2")["oversized"] is False
    assert ask(worker, answer=str(200 << 20), gold="2")["oversized"] is True


def test_started_by_a_parent_that_is_gone(start: Callable[..., Process]):
    assert start(parent=1 << 22).wait(20) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_dies_with_its_parent_even_while_busy(tmp_path: Path, repository: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from pekoe.verify import JudgePool\n"
        "pool = JudgePool(num_workers=1, time_limit_s=60)\n"
        "pool.submit(r'\\boxed{9^{9^{9^9}}}', '7')\n"
        "workers = pool._groups['math'].workers\n"
        "while not workers or not workers[0].task: time.sleep(0.01)\n"
        "print(workers[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(repository)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(pid))
