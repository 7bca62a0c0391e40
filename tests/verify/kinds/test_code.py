"""Code: right and wrong programs, and what the sandbox keeps out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pekoe.core.types import Verdict
from pekoe.verify import JudgePool, sandbox
from pekoe.verify.kinds import code

SUMS = {"tests": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5\n", "stdout": "10\n\n"}]}
SQUARE = {"asserts": "assert f(2) == 4\nassert f(3) == 9"}
RIGHT = "def f(x):\n    return x * x\n"

pytestmark = pytest.mark.skipif(not sandbox.supported(), reason="the sandbox is for Linux x86_64")


def judge(source: str, gold: Any) -> Verdict:
    prepared = code.prepare(f"First:\n```python\nprint(0)\n```\nno:\n```python\n{source}\n```\n", gold)
    return prepared if isinstance(prepared, Verdict) else code.decide(prepared, gold)


@pytest.mark.parametrize(
    ("source", "gold", "label"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", SUMS, "correct"),
        ("a, b = map(int, input().split())\nprint(f'{a + b}  ')\nprint()", SUMS, "correct"),
        ("print(3)", SUMS, "wrong"),
        ("print(3", SUMS, "wrong"),
        ("print(int(input()))", {"inputs": ["7"], "outputs": ["7"]}, "correct"),
        (RIGHT, SQUARE, "correct"),
        ("def f(x):\n    return x", SQUARE, "wrong"),
        (RIGHT, {"asserts": ["assert f(2) == 4", "assert f(0) == 1"]}, "wrong"),
        ("import math, collections, itertools\n" + RIGHT, SQUARE, "correct"),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + RIGHT, SQUARE, "correct"),
        (RIGHT, {"tests": []}, "fault"),
        (RIGHT, {"tests": [{"stdin": "1"}]}, "fault"),
        (RIGHT, "assert f(2) == 4", "fault"),
    ],
)
def test_verdict(source: str, gold: Any, label: str):
    assert judge(source, gold).label == label


def test_a_response_without_a_block_is_unparsed():
    for response in ("print(3)", "```python\nprint(3)", "`print(3)`"):
        verdict = code.prepare(response, SUMS)
        assert isinstance(verdict, Verdict)
        assert verdict.label == "unparsed"


@pytest.mark.parametrize(
    "text", ["```python\n" * 50_000, "```\n```" * 50_000, "`" * 500_000, "```\n" + "x\n" * 200_000]
)
def test_finding_the_block_takes_linear_time(text: str):
    start = time.monotonic()
    code.prepare(text, SUMS)
    assert time.monotonic() - start < 2


# Each is refused where it stands: the last line, which would make the answer right, is not reached.
REFUSED = {
    "write": "open('here', 'w')",
    "append": "open({victim!r}, 'a')",
    "truncate": "import os; os.truncate({victim!r}, 0)",
    "remove": "import os; os.remove({victim!r})",
    "rename": "import os; os.rename({victim!r}, {victim!r} + '2')",
    "chmod": "import os; os.chmod({victim!r}, 0)",
    "mkdir": "import os; os.mkdir('folder')",
    "link": "import os; os.symlink('/etc', 'link')",
    "socket": "import socket; socket.socket()",
    "fork": "import os; os.fork()",
    "program": "import subprocess; subprocess.run(['true'], check=True)",
    "system": "import os\nif os.system('true') != 0: raise OSError",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
    "mmap a file": "import mmap, os; fd = os.open({victim!r}, os.O_RDWR); mmap.mmap(fd, 0)",
    "raw call": "import ctypes\nif ctypes.CDLL(None).syscall(41, 2, 1, 0) < 0: raise OSError",
    "x32 call": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0) < 0: raise OSError",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_sandbox_refuses(name: str, tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    tried = REFUSED[name].replace("{victim!r}", repr(str(victim)))
    indented = tried.replace("\n", "\n    ")
    asserts = {"asserts": "assert refused"}
    verdict = judge(
        f"refused = False\ntry:\n    {indented}\nexcept (OSError, ValueError):\n    refused = True", asserts
    )
    assert verdict.label == "correct", verdict
    assert victim.read_text() == "untouched"
    assert os.stat(victim).st_mode & 0o600
    assert os.listdir(tmp_path) == ["victim"]


FORGED = """
import os
for fd in range(3, 30):
    try:
        os.write(fd, b"ready " + b"0" * 32)
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "while True:\n    pass",
        "import time\ntime.sleep(60)",
        "x = bytearray(10**10)",
        "while True:\n    print('x' * 10_000)",
        "def f(x):\n    return f(x)",
        FORGED,
        "import signal, os\nsignal.raise_signal(signal.SIGKILL)",
    ],
)
def test_tricks_and_bombs_are_wrong_and_end(source: str):
    start = time.monotonic()
    assert judge(source, SQUARE | {"time_limit_s": 1}).label == "wrong"
    assert time.monotonic() - start < 10


def test_all_tests_share_one_limit():
    start = time.monotonic()
    slow = {"tests": [{"stdin": "", "stdout": ""}] * 100, "time_limit_s": 1}
    verdict = judge("import time\ntime.sleep(0.5)", slow)
    assert (verdict.label, verdict.why.endswith("time")) == ("wrong", True)
    assert time.monotonic() - start < 10


def test_through_the_pool_and_nothing_is_left(pool: JudgePool):
    answers = ["def f(x):\n    return x * x", "import time\ntime.sleep(60)", "def f(x):\n    return 0"]
    items = [(f"```python\n{answer}\n```", SQUARE, "code") for answer in answers]
    assert [verdict.label for verdict in pool.judge_many(items)] == ["correct", "wrong", "wrong"]
    left = [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"sandbox.py" in _read(file)]
    assert left == []


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
