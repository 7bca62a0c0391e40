"""A worker process as the pool's dispatcher sees it: start, send, receive, kill. Nothing here waits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pekoe.verify.dispatch import Task

# Not multiprocessing: it would import the user's main script again (which need not be guarded), and unpickle.
WORKER_COMMAND = (sys.executable, "-P", "-m", "pekoe.verify.worker")


class Worker:
    """One worker process. It is `starting`, then idle, then busy with `task`; `deadline` bounds whichever it is."""

    def __init__(self, command: Sequence[str], memory_limit_bytes: int, start_limit_s: float) -> None:
        # What it says before it is ready: a file, unlike a pipe, cannot fill up and block it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(memory_limit_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is not for it; and `kill` takes its children along
            )
        except OSError:
            self._log.close()
            raise
        self._received = b""
        self._unsent = b""
        self.pid = self._process.pid
        self.ready = False
        self.task: Task | None = None
        self.message_id = 0
        self.num_judged = 0
        self.deadline = time.monotonic() + start_limit_s
        os.set_blocking(self.stdin.fileno(), False)

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, message: dict[str, Any]) -> bool:
        """Queue one message and write what the pipe takes. True when all is written, as for `flush`."""
        self._unsent += json.dumps(message).encode() + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Write what is left. A dead worker takes everything: that it is dead shows when it is read."""
        try:
            self._unsent = self._unsent[os.write(self.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""
        return not self._unsent

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come in; None when there will be no more. Call when stdout is readable."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # it talks nonsense: as good as dead
        return messages if data and all(isinstance(message, dict) for message in messages) else None

    def last_words(self) -> str:
        """Return the end of what it wrote on stderr while starting, on one line."""
        self._log.seek(0)
        return " | ".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])

    def kill(self) -> None:
        """Kill it, and whatever it may have started, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self.stdin, self.stdout, self._log):
            file.close()


def _environment() -> dict[str, str]:
    # The worker imports what the parent would, from the same places and no others.
    places = [os.path.abspath(place) for place in sys.path] + [str(Path(__file__).parents[2])]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # sympy orders by hash here and there; with a fixed seed a verdict does not depend on the process that gave it.
    return os.environ | one_thread | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}
