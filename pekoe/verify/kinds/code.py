r"""kind = "code": the answer's program must pass tests, in a process of its own (`pekoe.verify.sandbox` says what that
keeps out and what not). The answer is the last fenced block of the response (```python ... ```).

gold: {"tests": [{"stdin", "stdout"}, ...]}, or {"inputs": [...], "outputs": [...]} as APPS has it, or {"asserts":
text}; perhaps "time_limit_s" (of one test, 2) and "memory_bytes" (512 MiB). Output is compared line by line, spaces at
the ends of lines and empty lines at the end aside. All of it must be done within 4 s. Asserts run in the answer's own
process, after it; an answer that looks for them there can find them: tests of input and output are the safer ones.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from pekoe.core.types import Verdict
from pekoe.verify import sandbox
from pekoe.verify.kinds.base import Kind, no_warm_up

MAX_CODE_CHARS, MAX_TESTS = 50_000, 200
TOTAL_LIMIT_S = 4.0  # below the pool's own limit: a slow answer is WRONG, and no limit of the worker's
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
    return _Tests(pairs[:MAX_TESTS], asserts, *limits) if pairs or asserts.strip() else None


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
    deadline = time.monotonic() + TOTAL_LIMIT_S
    for number, (given, wanted) in enumerate(tests.pairs, 1):
        ended, output, _ = _run(answer, "", given, tests, deadline)
        if ended or _lines(output) != _lines(wanted):
            return Verdict("wrong", None, f"test {number}: {ended or 'another output'}")
    if tests.asserts:
        ended, _, passed = _run(answer, tests.asserts, "", tests, deadline)
        if ended or not passed:
            return Verdict("wrong", None, f"asserts: {ended or 'ended early'}")
    return Verdict("correct")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run(code: str, asserts: str, given: str, tests: _Tests, deadline: float) -> tuple[str, str, bool]:
    """How it failed (empty: it did not), what it printed, and whether the asserts held."""
    nonce = secrets.token_hex(16)
    task = {"code": code, "asserts": asserts, "nonce": nonce, "memory_bytes": tests.memory_bytes}
    limit_s = min(tests.time_limit_s, deadline - time.monotonic())
    if limit_s <= 0:
        return "time", "", False
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="pekoe-code-"))
        stdin, stdout, said = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        program = stack.enter_context(tempfile.TemporaryFile())
        program.write(json.dumps(task | {"cpu_s": max(1, round(limit_s + 0.5))}).encode())
        program.seek(0)
        stdin.write(given.encode())
        stdin.seek(0)
        channels = program.fileno(), said.fileno()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox.__file__, *map(str, channels)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=place,
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            pass_fds=channels,
        )
        ended = ""
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            ended = "time"
        finally:
            process.kill()  # it cannot have children
            process.wait()
        for file in (stdout, said):
            file.seek(0)
        words = said.read(200).decode(errors="replace").split()
        if not words and not ended:
            raise RuntimeError("the sandbox did not start")  # ours: FAULT
        if not ended and process.returncode:
            ended = f"exit status {process.returncode}"
        return ended, stdout.read(sandbox.MAX_FILE_BYTES).decode(errors="replace"), nonce in words


def check_reference(gold: Any) -> Verdict:
    return Verdict("correct")  # `prepare` has seen it


KIND = Kind("code", prepare, decide, check_reference, no_warm_up, room="code", seal="none")
