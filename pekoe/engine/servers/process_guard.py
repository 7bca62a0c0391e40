"""Runs a server as its child, and ends it when the process that asked for it dies, by SIGKILL too.

A file to be run, not imported: `python -I -S process_guard.py PARENT_PID COMMAND...`, as the leader of a new session.
It needs the standard library alone, so it starts at once. PR_SET_PDEATHSIG in the server itself would not do: it fires
when the *thread* that started the server ends, it signals only the first process of a server that has many, and to set
it between fork and exec is not safe in a process with threads. This process has one.

A second guard, forked here, ends what is left of the server when the first guard is gone: Ray kills the children of a
process that it ends, and not their children; and a server's first process may die alone.
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


def die_with_guard() -> None:
    """Runs in the server before exec: its first process dies with the guard at once."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore(number: int, frame: object) -> None:
    """A handler, unlike SIG_IGN, is not inherited by the server."""


def main(parent_pid: int, command: list[str]) -> int:
    signal.signal(signal.SIGTERM, ignore)  # the group's SIGTERM is for the server; this process ends after it
    guard_pid = os.getpid()
    if not os.fork():
        while os.getppid() == guard_pid:
            time.sleep(POLL_S)
        if server_pids(guard_pid):
            end_group(lambda: not server_pids(guard_pid))
        os._exit(0)
    server = subprocess.Popen(command, preexec_fn=die_with_guard)
    while server.poll() is None:
        if os.getppid() != parent_pid:
            end_group(lambda: server.poll() is not None)
        time.sleep(POLL_S)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def server_pids(guard_pid: int) -> list[int]:
    """Processes of this group beside the two guards."""
    pids: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (guard_pid, os.getpid()):
            with contextlib.suppress(OSError):
                if os.getpgid(int(name)) == os.getpgrp():
                    pids.append(int(name))
    return pids


def end_group(ended: Callable[[], bool]) -> None:
    """SIGTERM, after a time SIGKILL, to all that is left of the group, this process included."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while not ended() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
