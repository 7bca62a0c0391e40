"""Code: right and wrong programs, and what the sandbox keeps out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pekoe.core.types import Verdict
from pekoe.verify import JudgePool, sandbox
from pekoe.verify.kinds import code

from ..conftest import alive, wait_until
from .code_programs import HAS_LANDLOCK, REFUSED, SEARCH, THREADS, TRICKS, UNREADABLE, attempt, judge, show

SUMS = {"tests": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5\n", "stdout": "10\n\n"}]}
SQUARE = {"asserts": "assert f(2) == 4\nassert f(3) == 9"}
ANNOTATED = "assert f.__annotations__ == {'x': int}"
LONG = {"tests": [{"stdin": "line\n" * 400_000, "stdout": "line\n" * 400_000}]}
RIGHT = "def f(x):\n    return x * x\n"

pytestmark = pytest.mark.skipif(not sandbox.supported(), reason="the sandbox is for Linux x86_64")


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
        (
            "import math, heapq, re, json, random, decimal, zoneinfo, hashlib, ctypes, asyncio\n" + RIGHT,
            SQUARE,
            "correct",
        ),
        (
            "import pickle\nclass A:\n    x: int\npickle.loads(pickle.dumps(A()))\nf = A",
            {"asserts": ANNOTATED},
            "correct",
        ),
        ("import sys\nsys.stdout.write(sys.stdin.read())", LONG, "correct"),  # longer than a pipe and the limit beyond
        ("print(open(0).read(), end='')", LONG, "correct"),
        ("print(open('/dev/stdin').read(), end='')", LONG, "correct"),
        ("a, b = map(int, input().split())\nprint(a + b)\nexit()", SUMS, "correct"),
        (RIGHT, SQUARE | {"time_limit_s": float("nan")}, "fault"),
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


@pytest.mark.parametrize("name", [*REFUSED, *UNREADABLE])
def test_the_sandbox_refuses(name: str, tmp_path: Path):
    if name in UNREADABLE and not HAS_LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    verdict = judge(attempt((REFUSED | UNREADABLE)[name], victim), {"asserts": "assert refused"})
    assert verdict.label == "correct", verdict
    assert victim.read_text() == "untouched"
    assert os.stat(victim).st_mode & 0o600
    assert os.listdir(tmp_path) == ["victim"]


@pytest.mark.parametrize("source", TRICKS)
def test_tricks_and_bombs_are_wrong_and_end(source: str):
    start = time.monotonic()
    assert judge(source, SQUARE | {"time_limit_s": 1}).label == "wrong"
    assert time.monotonic() - start < 10


def test_what_is_wanted_is_not_in_the_answers_memory():
    assert judge(SEARCH, {"tests": [{"stdin": "", "stdout": "secret123"}]}).label == "wrong"
    # The same search finds what asserts hold, as the docstring says.
    assert judge(SEARCH, {"asserts": "assert x == 'secret123'"}).label == "correct"


def broken_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: str, instead: str) -> None:
    source = Path(sandbox.__file__).read_text()
    assert source.count(here) == 1
    (tmp_path / "sandbox.py").write_text(source.replace(here, instead))
    monkeypatch.setattr(code, "sandbox", SimpleNamespace(__file__=str(tmp_path / "sandbox.py"), supported=lambda: True))


@pytest.mark.parametrize("call", ["libc.prctl, 22, 2,", "libc.prctl, 38, 1,", "libc.syscall, 446, rules,"])
def test_where_the_sandbox_cannot_be_put_on_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str):
    if "446" in call and not HAS_LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    broken_sandbox(monkeypatch, tmp_path, call, call.rpartition(" ")[0] + " 99,")
    ran = tmp_path / "ran"
    with pytest.raises(RuntimeError, match="the sandbox did not start: failed: OSError"):
        judge(f"open({str(ran)!r}, 'w')", SQUARE)
    assert not ran.exists()


ALL = """
allowed = []
for name, tried in {tries!r}.items():
    try:
        exec(tried, {{}})
    except (OSError, ValueError, MemoryError):
        continue
    allowed.append(name)
"""


def test_a_kernel_without_landlock_judges_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken_sandbox(monkeypatch, tmp_path, "libc.syscall, 444,", "libc.syscall, 9999,")
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    tries = {name: tried.replace("{victim!r}", repr(str(victim))) for name, tried in REFUSED.items()}
    assert judge(ALL.format(tries=tries), {"asserts": "assert not allowed"}).label == "correct"
    assert (
        judge(ALL.format(tries=tries | {"nothing": "1"}), {"asserts": "assert allowed == ['nothing']"}).label
        == "correct"
    )


HANG = """
import ctypes, sys
from pekoe.verify.kinds import code
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here
limit_s = float(sys.argv[1])
print(code.decide("import time; time.sleep(60)", {"tests": [{"stdin": "", "stdout": ""}], "time_limit_s": limit_s}).why)
import os
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none left")
"""


def test_tasks_are_bounded():
    start = time.monotonic()
    verdict = judge(THREADS, SQUARE | {"time_limit_s": 20})
    assert (verdict.label, verdict.why) == ("wrong", "asserts: exit status -9")
    assert time.monotonic() - start < 2.5


def test_an_answer_cannot_choose_a_fault_by_flags_of_its_input():
    source = "import fcntl, os\nfor fd in (0, 1):\n    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)\n"
    both = {"tests": [{"stdin": "1", "stdout": ""}, {"stdin": "2", "stdout": "2"}]}
    assert judge(source, both).label == "wrong"


def test_sets_have_one_order():
    source = "print(*{'a', 'b', 'c', 'd', 'e'})"
    seeded = subprocess.run([sys.executable, "-c", source], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    for _ in range(4):  # by chance once in 120
        assert judge(source, {"tests": [{"stdin": "", "stdout": seeded.stdout}]}).label == "correct"


def test_every_test_counts():
    tests = [{"stdin": "", "stdout": "1"}] * 200 + [{"stdin": "", "stdout": "2"}]
    assert judge("print(1)", {"tests": tests}).why == "test 201: another output"


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"memory_bytes": 256}, "memory_bytes from 67,108,864 to .* not 256"),
        ({"memory_bytes": 1 << 70}, "memory_bytes from .* to 1,099,511,627,776 .* not 1,180"),
        ({"memory_bytes": float("inf")}, "tests or asserts"),
        ({"time_limit_s": 2000}, r"time_limit_s above 0 and at most 60 \(seconds\), not 2000"),
        ({"time_limit_s": float("inf")}, "time_limit_s .* not inf"),
        ({"time_limit_s": -1}, "time_limit_s .* not -1"),
    ],
)
def test_limits_that_cannot_be_meant(limits: dict[str, Any], why: str):
    verdict = judge(RIGHT, SQUARE | limits)
    assert verdict.label == "fault"
    assert re.search(why, verdict.why), verdict.why


def test_a_rows_limit_may_be_longer_than_the_pools():
    slow = {"tests": [{"stdin": "", "stdout": "1"}] * 2, "time_limit_s": 6}
    with JudgePool(num_workers=1, time_limit_s=2.0) as pool:
        answer = "```python\nimport time\ntime.sleep(2)\nprint(1)\n```"
        assert pool.submit(answer, slow, "code").result().label == "correct"
        assert pool.stats().num_limits == 0


def test_a_hanging_answer_leaves_no_dead_process(run_script: Callable[..., subprocess.CompletedProcess[str]]):
    done = run_script(HANG, "0.2")
    assert done.stdout == "test 1: time\nnone left\n", done.stderr


def test_an_answer_ends_with_its_judge(tmp_path: Path, repository: Path):
    (tmp_path / "hang.py").write_text(HANG)
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"PYTHONPATH": str(repository), "TMPDIR": str(tmp_path / "temporary")}
    judging = subprocess.Popen([sys.executable, tmp_path / "hang.py", "30"], env=environment)
    try:
        family = [judging.pid]

        def grown() -> bool:
            for pid in family:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                family.extend(int(child) for child in children if int(child) not in family)
            return len(family) == 3

        wait_until(grown)
    finally:
        judging.send_signal(signal.SIGKILL)
        judging.wait()
    wait_until(lambda: not any(alive(pid) for pid in family))
    assert os.listdir(tmp_path / "temporary") == []


def test_all_tests_share_one_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "TOTAL_LIMIT_S", 1.2)
    start = time.monotonic()
    slow = {"tests": [{"stdin": "", "stdout": ""}] * 100, "time_limit_s": 1}
    verdict = judge("import time\ntime.sleep(0.5)", slow)
    assert (verdict.label, verdict.why.endswith("time")) == ("wrong", True)
    assert time.monotonic() - start < 10


def test_through_the_pool_and_nothing_is_left(pool: JudgePool):
    answers = ["def f(x):\n    return x * x", "import time\ntime.sleep(60)", "def f(x):\n    return 0"]
    items = [(f"```python\n{answer}\n```", SQUARE, "code") for answer in answers]
    assert [verdict.label for verdict in pool.judge_many(items)] == ["correct", "wrong", "wrong"]
    # Those of tests beside this one come and go; the answer that sleeps would stay for a minute.
    left = [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/cmdline") if b"sandbox.py" in _read(file)]
    wait_until(lambda: not any(alive(pid) for pid in left))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can be another user")
def test_another_user_gets_no_further(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert show("nobody", ["kill", "another user", "the system's file", "the judge's memory", "fork"], []) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert all(" nobody " in line and "PermissionError" in line for line in lines[2:])
