"""Runs a server as its child, and takes it down when whoever asked for it dies, by SIGKILL too.

A file to be run, not imported: `python -I -S keeper.py PARENT_PID COMMAND...`, as the leader of a new session. It needs
the standard library alone, so it is there at once. PR_SET_PDEATHSIG in the server itself would not do: it fires when
the *thread* that started the server ends, it tells only the first process of a server that has many, and to set it
between fork and exec is not safe in a process with threads. This process has one.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_S, GRACE_S = 0.2, 5.0
PR_SET_PDEATHSIG = 1


def die_with_keeper() -> None:
    """In the server, before exec: should even the keeper be killed, the server's first process goes too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore(number: int, frame: object) -> None:
    """A handler, unlike SIG_IGN, is not inherited by the server."""


def main(parent: int, command: list[str]) -> int:
    # The group's SIGTERM is for the server; this process ends after it.
    signal.signal(signal.SIGTERM, ignore)
    child = subprocess.Popen(command, preexec_fn=die_with_keeper)
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            os.killpg(0, signal.SIGKILL)  # all that is left of the group, this process with it
        time.sleep(POLL_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
