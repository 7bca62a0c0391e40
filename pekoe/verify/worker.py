"""The judge's worker: one process, one line of JSON in, one line out. Started by `pekoe.verify.process`.

It owns nothing that may not be lost: the pool kills it without warning when an item overruns.

    python -P -m pekoe.verify.worker [KIND] PARENT_PID MEMORY_LIMIT_BYTES

KIND names one of the kinds of a room (see `Kind`); without it the room is that of mathematics.

in:  {"id", "kind", "answer", "gold", "check": "answer" | "reference"}
out: {"ready"} once, or {"failed": why}; then, one for each item, {"id", "label", "why"}, {"id", "limit": which} or
     {"id", "error": what}; each with "tired": true where the worker asks to be replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

from pekoe.verify.kinds import KINDS, find_kind
from pekoe.verify.seal import seal, seal_scorers

_PR_SET_PDEATHSIG = 1


def _set_limits(memory_limit_bytes: int) -> None:
    wanted = {resource.RLIMIT_AS: memory_limit_bytes, resource.RLIMIT_CORE: 0}
    for which, limit in wanted.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def _die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent goes; where it cannot, the end of stdin will do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it went before we asked
        os._exit(1)


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    try:
        kind = find_kind(request["kind"])
        if request["check"] == "reference":
            verdict = kind.check_reference(request["gold"])
        else:
            verdict = kind.decide(request["answer"], request["gold"])
        return {"label": verdict.label, "why": verdict.why}
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"limit": "recursion"}
    except Exception as error:  # a bug of ours: FAULT, and never a wrong answer
        return {"error": f"{type(error).__name__}: {error}"}


def _size_bytes() -> int:
    # Not getrusage's ru_maxrss: that remembers the parent's size from before the exec, gigabytes in a trainer.
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def main() -> int:
    """Judge until stdin ends."""
    protocol = os.dup(1)  # ours alone: what libraries print goes elsewhere
    os.dup2(2, 1)
    parent_pid, memory_limit_bytes = int(sys.argv[-2]), int(sys.argv[-1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on

    def say(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(protocol, data) :]

    try:
        _die_with(parent_pid)
        _set_limits(memory_limit_bytes)
        first = find_kind(sys.argv[1] if len(sys.argv) > 3 else "math")
        for kind in (first, *KINDS.values()):
            if kind.room == first.room:
                kind.warm_up()
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        return 1
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    {"all": seal, "formulas": seal_scorers, "none": lambda: None}[first.seal]()
    say({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        verdict = _judge(request)
        # sympy's caches grow. A worker half full is replaced, before it blames an answer for memory that others took.
        say({"id": request["id"], "tired": _size_bytes() > memory_limit_bytes / 2} | verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
