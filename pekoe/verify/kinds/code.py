r"""kind = "code": the answer's program must pass tests, in a process of its own (`pekoe.verify.sandbox` says what that
keeps out and what not). The answer is the last fenced block of Python of the response (```python, or ``` alone); it has
the standard library.

gold: {"tests": [{"stdin", "stdout"}, ...]}, or {"inputs": [...], "outputs": [...]} as APPS has it, or {"asserts":
text}; perhaps "time_limit_s" (of one test, 2) and "memory_bytes" (512 MiB; the pool's own limit at most). Output is
compared line by line, spaces at the ends of lines and empty lines at the end aside; it may be 1 MiB longer than the one
that is wanted. All of it must be done within 4 s. Asserts run in the answer's own process, after it; an answer that
looks for them there can find them, say that they held, or return what equals everything: tests of input and output are
the safer ones (what is wanted never enters the sandbox). A sandbox that cannot be put on gives FAULT, and says why.
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
from pekoe.verify.kinds.base import Verifier

MAX_CODE_CHARS, MAX_TESTS, MAX_OUTPUT_BYTES = 50_000, 200, 1 << 20  # of output beyond the one that is wanted
TOTAL_LIMIT_S = 4.0  # below the pool's own limit: a slow answer is WRONG, and no limit of the worker's
START_LIMIT_S = 60.0  # of our own process; the pool's limit comes first
_PYTHON = ("", "python", "python3", "py")


class _Tests(NamedTuple):
    pairs: list[tuple[str, str]]  # stdin, stdout
    asserts: str
    time_limit_s: float
    memory_bytes: int


def _tests(gold: Any) -> _Tests | None:
    """The reference, or None where it has another shape."""
    try:
        if "inputs" in gold:
            pairs = [(str(a), str(b)) for a, b in zip(gold["inputs"], gold["outputs"], strict=True)]
        else:
            pairs = [(str(test["stdin"]), str(test["stdout"])) for test in gold.get("tests", ())]
        asserts = gold.get("asserts", "")
        asserts = asserts if isinstance(asserts, str) else "\n".join(asserts)
        limits = float(gold.get("time_limit_s", 2.0)), int(gold.get("memory_bytes", 512 << 20))
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    if not (pairs or asserts.strip()) or not min(limits) > 0:
        return None
    return _Tests(pairs[:MAX_TESTS], asserts, *limits)


def _last_block(response: str) -> str | None:
    """The last complete fenced block of Python. Linear: a line opens a block, or closes the open one."""
    found, block, language, indent = None, None, "", ""
    for line in response.split("\n"):
        mark = line.strip()
        if block is not None and mark == "```":
            found, block = ("\n".join(block) if language in _PYTHON else found), None
        elif mark.startswith("```") and "`" not in mark[3:]:  # one that follows an unclosed one begins anew
            language, indent = (mark[3:].split() or [""])[0].lower(), line[: line.index("`")]
            block = list[str]()
        elif block is not None:
            block.append(line.removeprefix(indent))
    return found


def prepare(response: str, gold: Any) -> Verdict | str:
    """Return the last fenced block. Linear in the length of `response`."""
    if not sandbox.supported():
        return Verdict("fault", None, "code is judged on Linux x86_64 alone, where its sandbox knows the system calls")
    if _tests(gold) is None:
        return Verdict("fault", None, f"the reference must have tests or asserts: found {str(gold)[:80]!r}")
    block = _last_block(response)
    if block is None:
        return Verdict("unparsed", None, "no complete ``` block")
    if len(block) > MAX_CODE_CHARS:
        return Verdict("unparsed", None, f"the block holds {len(block):,} characters")
    return block


def decide(answer: str, gold: Any) -> Verdict:
    """Run the answer on each test until one fails."""
    tests = _tests(gold)
    assert tests is not None
    with _Sandbox(answer, tests) as box:
        deadline = time.monotonic() + TOTAL_LIMIT_S
        for number, (given, wanted) in enumerate(tests.pairs, 1):
            ended, _ = box.run(given, False, deadline)
            if ended or _lines(box.output()) != _lines(wanted):
                return Verdict("wrong", None, f"test {number}: {ended or 'another output'}")
        if tests.asserts:
            ended, passed = box.run("", True, deadline)
            if ended or not passed:
                return Verdict("wrong", None, f"asserts: {ended or 'ended early'}")
    return Verdict("correct")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


class _Sandbox:
    """The process that forks one for each test. What fails here and is not the answer's doing raises: FAULT."""

    def __init__(self, code: str, tests: _Tests) -> None:
        self._limit_s = tests.time_limit_s
        self._max_bytes = MAX_OUTPUT_BYTES + max((len(wanted.encode()) for _, wanted in tests.pairs), default=0)
        task = {"code": code, "asserts": tests.asserts, "cpu_s": max(1, round(self._limit_s + 0.5))}
        task |= {"memory_bytes": tests.memory_bytes, "file_bytes": self._max_bytes}
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="pekoe-code-"))
            program, stdin, stdout = (stack.enter_context(tempfile.TemporaryFile()).fileno() for _ in range(3))
            _put(program, json.dumps(task))
            (commands, self._commands), (self._reports, reports) = os.pipe(), os.pipe()
            for fd in (self._commands, self._reports):
                stack.callback(os.close, fd)
            given = program, commands, reports
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", sandbox.__file__, str(os.getpid()), *map(str, given)],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=subprocess.DEVNULL,
                    cwd=place,
                    env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
                    pass_fds=given,
                )
            finally:
                os.close(commands)
                os.close(reports)
            stack.callback(_end, process)
            self._stdin, self._stdout, self._heard = stdin, stdout, b""
            self._expect("up")
            self._stack = stack.pop_all()

    def __enter__(self) -> _Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, given: str, asserts: bool, deadline: float) -> tuple[str, bool]:
        """How the answer failed (empty: it did not), and whether the asserts held."""
        for fd in (self._stdin, self._stdout):  # the child's own: it shares their offsets
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        _put(self._stdin, given)
        os.write(self._commands, b"a" if asserts else b"t")
        self._expect("ready")
        line = self._line(min(self._limit_s, deadline - time.monotonic()))
        if line is None:
            return "time", False
        status, passed = line.split()
        return "" if status == "0" else f"exit status {status}", passed == "1"

    def output(self) -> str:
        return os.pread(self._stdout, self._max_bytes, 0).decode(errors="replace")

    def _expect(self, wanted: str) -> None:
        if (line := self._line(START_LIMIT_S)) != wanted:
            raise RuntimeError(f"the sandbox did not start: {line}")

    def _line(self, limit_s: float) -> str | None:
        """The next line of its reports; None where it takes longer than `limit_s`."""
        end = time.monotonic() + limit_s
        while b"\n" not in self._heard:
            if not select.select([self._reports], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            if not (data := os.read(self._reports, 100)):
                raise RuntimeError("the sandbox died")
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()


def _put(fd: int, text: str) -> None:
    data = text.encode()
    if os.pwrite(fd, data, 0) < len(data):
        raise OSError("no room for a test's input")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # it takes its child along
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
    process.kill()  # then the kernel kills what it forked
    process.wait()


VERIFIER = Verifier("code", prepare, decide, worker_group="code", audit_hook="none")
