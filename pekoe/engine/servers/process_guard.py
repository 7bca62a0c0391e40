"""Runs a server as its child, and takes it down when whoever asked for it dies, by SIGKILL too.

A file to be run, not imported: `python -I -S keeper.py PARENT_PID COMMAND...`, as the leader of a new session. It needs
the standard library alone, so it is there at once. PR_SET_PDEATHSIG in the server itself would not do: it fires when
the *thread* that started the server ends, it tells only the first process of a server that has many, and to set it
between fork and exec is not safe in a process with threads. This process has one.

It has a second of its own kind, which takes down what is left of the server when the first is gone: Ray kills the
children of a process that it ends, and knows nothing of theirs; and a server's first process may die alone.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

POLL_S, GRACE_S = 0.2, 5.0
PR_SET_PDEATHSIG = 1


def die_with_keeper() -> None:
    """In the server, before exec: its first process goes with the keeper at once, the others when the second sees."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore(number: int, frame: object) -> None:
    """A handler, unlike SIG_IGN, is not inherited by the server."""


def main(parent: int, command: list[str]) -> int:
    # The group's SIGTERM is for the server; this process ends after it.
    signal.signal(signal.SIGTERM, ignore)
    keeper = os.getpid()
    if not os.fork():
        while os.getppid() == keeper:
            time.sleep(POLL_S)
        if others(keeper):
            end_group(lambda: not others(keeper))
        os._exit(0)
    child = subprocess.Popen(command, preexec_fn=die_with_keeper)
    while child.poll() is None:
        if os.getppid() != parent:
            end_group(lambda: child.poll() is not None)
        time.sleep(POLL_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def others(keeper: int) -> list[int]:
    """Processes of this group beside the two keepers."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (keeper, os.getpid()):
            with contextlib.suppress(OSError):
                if os.getpgid(int(name)) == os.getpgrp():
                    found.append(int(name))
    return found


def end_group(ended: Callable[[], bool]) -> None:
    """SIGTERM, after a time SIGKILL, to all that is left of the group; this process goes with it."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while not ended() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
