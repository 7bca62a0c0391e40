r"""kind = "code": the answer's program must pass tests, in a process of its own (`pekoe.verify.sandbox` says what that
refuses and what not). The answer is the last fenced block of Python of the response (```python, or ``` alone); it has
the standard library.

gold: {"tests": [{"stdin", "stdout"}, ...]}, or {"inputs": [...], "outputs": [...]} as APPS has it, or {"asserts":
text}; perhaps "time_limit_s" (of one test, 2; at most 60) and "memory_bytes" (512 MiB; 64 MiB at least, the pool's own
limit at most); limits that cannot be meant give FAULT. Output is compared line by line, spaces at the ends of lines and
empty lines at the end aside; it may be 1 MiB longer than the expected one. All tests are run, until one fails; together
they have the sum of their limits, but 60 s at most, whatever the pool's own limit is. Asserts run in the answer's own
process, after it; an answer that looks for them there can find them, say that they held, or return what equals
everything: tests of input and output are safer (the expected output never enters the sandbox). A sandbox that cannot be
set up gives FAULT, and says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from pekoe.core.types import Verdict
from pekoe.verify import sandbox
from pekoe.verify.extract import after_thinking
from pekoe.verify.kinds.base import Verifier, bad_reference

MAX_CODE_CHARS, MAX_OUTPUT_BYTES = 50_000, 1 << 20  # of output beyond the expected one
TOTAL_LIMIT_S = 60.0  # of all tests
MIN_MEMORY_BYTES, MAX_MEMORY_BYTES = 64 << 20, 1 << 40  # less holds no interpreter; more was meant in another unit
START_LIMIT_S = 60.0  # of our own process; the pool's limit comes first
_PYTHON = ("", "python", "python3", "py")


class _Tests(NamedTuple):
    pairs: list[tuple[str, str]]  # stdin, stdout
    asserts: str
    time_limit_s: float
    memory_bytes: int


def _tests(gold: Any) -> _Tests | str:
    """Return the reference, or what was expected of one that cannot be meant."""
    try:
        if "inputs" in gold:
            pairs = [(str(a), str(b)) for a, b in zip(gold["inputs"], gold["outputs"], strict=True)]
        else:
            pairs = [(str(test["stdin"]), str(test["stdout"])) for test in gold.get("tests", ())]
        asserts = gold.get("asserts", "")
        asserts = asserts if isinstance(asserts, str) else "\n".join(asserts)
        limits = float(gold.get("time_limit_s", 2.0)), int(gold.get("memory_bytes", 512 << 20))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return "must have tests or asserts"
    if not (pairs or asserts.strip()):
        return "must have tests or asserts"
    if not 0 < limits[0] <= TOTAL_LIMIT_S:
        return f"must have a time_limit_s above 0 and at most {TOTAL_LIMIT_S:g} (seconds), not {limits[0]:g}"
    if not MIN_MEMORY_BYTES <= limits[1] <= MAX_MEMORY_BYTES:
        least, most = f"{MIN_MEMORY_BYTES:,}", f"{MAX_MEMORY_BYTES:,}"
        return f"must have memory_bytes from {least} to {most} (bytes), not {limits[1]:,}"
    return _Tests(pairs, asserts, *limits)


def time_limit_s(gold: Any) -> float:
    """Return how long all tests of a reference may take."""
    tests = _tests(gold)
    if isinstance(tests, str):
        return 0.0
    return min(TOTAL_LIMIT_S, tests.time_limit_s * (len(tests.pairs) + bool(tests.asserts)))


def _last_block(response: str) -> str | None:
    """Return the last complete fenced block of Python. Linear: a line opens a block, or closes the open one."""
    last, block, language, indent = None, None, "", ""
    for line in response.split("\n"):
        mark = line.strip()
        if block is not None and mark == "```":
            last, block = ("\n".join(block) if language in _PYTHON else last), None
        elif mark.startswith("```") and "`" not in mark[3:]:  # one that follows an unclosed one begins anew
            language, indent = (mark[3:].split() or [""])[0].lower(), line[: line.index("`")]
            block = list[str]()
        elif block is not None:
            block.append(line.removeprefix(indent))
    return last


def prepare(response: str, gold: Any) -> Verdict | str:
    """Return the last fenced block. Linear in the length of `response`."""
    if not sandbox.supported():
        return Verdict("fault", None, "code is judged on Linux x86_64 alone, where its sandbox knows the system calls")
    if isinstance(tests := _tests(gold), str):
        return bad_reference(tests, gold)
    block = _last_block(after_thinking(response))
    if block is None:
        return Verdict("unparsed", None, "no complete ``` block")
    if len(block) > MAX_CODE_CHARS:
        return Verdict("unparsed", None, f"the block holds {len(block):,} characters")
    return block


def decide(answer: str, gold: Any) -> Verdict:
    """Run the answer on each test until one fails."""
    tests = _tests(gold)
    assert not isinstance(tests, str)
    with contextlib.ExitStack() as stack:
        box = _Sandbox(answer, tests, stack)
        deadline = time.monotonic() + time_limit_s(gold)
        for number, (stdin, expected) in enumerate(tests.pairs, 1):
            failure, _ = box.run(stdin, False, deadline)
            if failure or _lines(box.output()) != _lines(expected):
                return Verdict("wrong", None, f"test {number}: {failure or 'another output'}")
        if tests.asserts:
            failure, passed = box.run("", True, deadline)
            if failure or not passed:
                return Verdict("wrong", None, f"asserts: {failure or 'ended early'}")
    return Verdict("correct")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


class _Sandbox:
    """A process that forks a child for each test; it ends with `stack`. Its exceptions are FAULTs."""

    def __init__(self, code: str, tests: _Tests, stack: contextlib.ExitStack) -> None:
        self._limit_s = tests.time_limit_s
        self._max_bytes = MAX_OUTPUT_BYTES + max((len(expected.encode()) for _, expected in tests.pairs), default=0)
        task = {"code": code, "asserts": tests.asserts, "cpu_s": max(1, round(self._limit_s + 0.5))}
        task |= {"memory_bytes": tests.memory_bytes, "file_bytes": self._max_bytes}
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]  # noqa: SIM115
        program, stdin, stdout = (file.fileno() for file in files)
        _put(program, json.dumps(task))
        (commands, self._commands), (self._reports, reports) = os.pipe(), os.pipe()
        for fd in (self._commands, self._reports):
            stack.callback(os.close, fd)
        child_fds = program, commands, reports
        place = tempfile.mkdtemp(prefix="pekoe-code-")
        try:
            process = subprocess.Popen(
                # Not -I, which would ignore the seed of hashes.
                [sys.executable, "-P", "-s", "-S", "-B", sandbox.__file__, str(os.getpid()), *map(str, child_fds)],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=place,
                env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
                pass_fds=child_fds,
            )
        finally:
            os.rmdir(place)  # the process is in it already; whatever kills us now, no directory stays behind
            os.close(commands)
            os.close(reports)
        stack.callback(_end, process)
        self._stdin, self._stdout, self._received = stdin, stdout, b""
        self._expect("up")

    def run(self, stdin: str, asserts: bool, deadline: float) -> tuple[str, bool]:
        """Return how the answer failed (empty: it did not), and whether the asserts held."""
        for fd in (self._stdin, self._stdout):  # the child's own: it shares their offsets
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        _put(self._stdin, stdin)
        os.write(self._commands, b"a" if asserts else b"t")
        self._expect("ready")
        line = self._line(min(self._limit_s, deadline - time.monotonic()))
        if line is None:
            return "time", False
        status, passed = line.split()
        return "" if status == "0" else f"exit status {status}", passed == "1"

    def output(self) -> str:
        return os.pread(self._stdout, self._max_bytes, 0).decode(errors="replace")

    def _expect(self, expected: str) -> None:
        if (line := self._line(START_LIMIT_S)) != expected:
            raise RuntimeError(f"the sandbox did not start: {line}")

    def _line(self, limit_s: float) -> str | None:
        """Return the next line of the sandbox's reports; None where it takes longer than `limit_s`."""
        end = time.monotonic() + limit_s
        while b"\n" not in self._received:
            if not select.select([self._reports], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            if not (data := os.read(self._reports, 100)):
                raise RuntimeError("the sandbox died")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()


def _put(fd: int, text: str) -> None:
    data = text.encode()
    if os.pwrite(fd, data, 0) < len(data):
        raise OSError("no room for a test's input")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # the sandbox kills its child first
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
    process.kill()  # then the kernel kills what it forked
    process.wait()


VERIFIER = Verifier("code", prepare, decide, time_limit_s=time_limit_s, worker_group="code", audit_hook="none")
