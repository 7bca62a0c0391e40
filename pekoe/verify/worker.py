"""A judge's worker process: reads a line of JSON, writes a line of JSON. Started by `pekoe.verify.pool`.

The pool kills it without warning when an item exceeds its time limit, so it holds no state that must survive.

    python -P -m pekoe.verify.worker [KIND] PARENT_PID MEMORY_LIMIT_BYTES

KIND names a verifier of the worker group (see `Verifier`); without it the group is that of mathematics.

in:  {"id", "kind", "answer", "gold", "check": "answer" | "reference" | "itself", "context"}
out: {"ready"} once, or {"failed": why}; then for each item one of {"id", "label", "why"}, {"id", "limit": which} or
     {"id", "error": what}; each with "oversized": true if the worker has grown so much that the pool should replace it.
     A verdict of the user's own function has "extracted" and "score", too.

The environment's PEKOE_REWARD is how such a function is called: the fields of `kinds.function.Options` as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.audit_hook import refuse_all_but_formulas, refuse_code_and_acts
from pekoe.verify.kinds import VERIFIERS, find_verifier
from pekoe.verify.kinds.base import Verifier
from pekoe.verify.kinds.function import OPTIONS, Options, describe
from pekoe.verify.sandbox import die_with, set_limits


@functools.cache
def _verifier(kind: str) -> Verifier:
    options = Options(**json.loads(os.environ.get(OPTIONS, "{}")))
    return find_verifier(kind, {kind.removeprefix("function:"): options})  # the pool has checked that it is allowed


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    try:
        verifier = _verifier(request["kind"])
        check, answer, gold = request["check"], request["answer"], request["gold"]
        verdict = Verdict("correct")
        if check != "answer" and verifier.check_reference is not None:
            verdict = verifier.check_reference(gold)
        if check == "answer" or (check == "itself" and answer and verdict.label == "correct"):
            assert verifier.decide is not None
            verdict = verifier.decide(answer, gold, *([request.get("context")] if verifier.is_users else []))
        its_own = {"extracted": verdict.extracted, "score": verdict.score} if verifier.is_users else {}
        return {"label": verdict.label, "why": verdict.why} | (its_own if check == "answer" else {})
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"limit": "recursion"}
    except Exception as error:  # a bug in Pekoe is a FAULT, never a wrong answer
        return {"error": f"{type(error).__name__}: {error}"}


def _size_bytes() -> int:
    # Not getrusage's ru_maxrss: that remembers the parent's size from before the exec, gigabytes in a trainer.
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def main() -> int:
    """Judge until stdin ends."""
    protocol = os.dup(1)  # reserved for messages: libraries may print to stdout
    os.dup2(2, 1)
    parent_pid, memory_limit_bytes = int(sys.argv[-2]), int(sys.argv[-1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(protocol, data) :]

    try:
        die_with(parent_pid)  # where the system has no such thing, the end of stdin ends it
        set_limits({resource.RLIMIT_AS: memory_limit_bytes, resource.RLIMIT_CORE: 0})
        verifier = _verifier(sys.argv[1] if len(sys.argv) > 3 else "math")
        for other in (verifier, *VERIFIERS.values()):
            if other.worker_group == verifier.worker_group:
                other.warm_up()
    except BaseException as error:  # a script may exit where it is imported
        send({"failed": describe(error)})
        return 1
    if verifier.is_users:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    else:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    {"all": refuse_code_and_acts, "formulas": refuse_all_but_formulas, "none": lambda: None}[verifier.audit_hook]()
    send({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        verdict = _judge(request)
        # sympy's caches grow. Replace a worker that is half full, before it blames one answer for the memory of others.
        send({"id": request["id"], "oversized": _size_bytes() > memory_limit_bytes / 2} | verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
