"""A server subprocess: its own process group, a log file, and cleanup of everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import psutil

from pekoe.core.errors import RunError, UserError

_GUARD = Path(__file__).with_name("process_guard.py")
_TAIL_BYTES, _TAIL_LINES = 16_384, 15
_given_ports: set[int] = set()  # servers that start together must not share one
_OTHER_FILES = 256  # open at the same time as connections to servers


class ServerProcess:
    """A command running in its own session, killed with us (see `process_guard`), writing to a log file.

    Args:
        name: for messages.
        argv: the command.
        env: its whole environment.
        log: the file that stdout and stderr are appended to.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._started = time.time() - 1  # file times come from a coarser clock
        self._exit_code: int | None = None
        self._shared_memory: set[Path] = set()  # files that it made
        self._stopping = threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        # Servers log their arguments, the key among them: for its owner alone.
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            os.fchmod(file.fileno(), 0o600)
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,  # Ctrl-C in the terminal is not for it; one signal reaches all it starts
            )
        self.pid = self._popen.pid  # also its process group

    @property
    def exit_code(self) -> int | None:
        """Its exit status (128 + n: by signal n); None while it runs."""
        if self._exit_code is None:
            # Not reaped: until `stop` has killed the group, no other process may get its number.
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # another thread's `stop` has just reaped it
                self._exit_code = 128 + signal.SIGKILL
                return self._exit_code
            if ended is not None:
                self._exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
        return self._exit_code

    def describe(self) -> str:
        """Its state, with the end of its log."""
        code = self.exit_code
        state = "runs" if code is None else f"exited with status {code}"
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
        end = "\n".join(lines[-_TAIL_LINES:]) or "(nothing)"
        return f"{self.name} {state}; the end of its log, {self.log}:\n{end}"

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, after `grace_s` SIGKILL, to the whole group; returns when it has ended. Thread-safe, idempotent."""
        with self._stopping:
            if self._popen.returncode is not None:
                return
            self.note_shared_memory()
            self._signal(signal.SIGTERM)
            _wait(lambda: self.exit_code is not None, grace_s)
            self._signal(signal.SIGKILL)  # also to its descendants that are left
            _wait(lambda: len(self._members()) <= 1, 2)
            code = self.exit_code  # before it is reaped
            self._popen.wait()
            self._exit_code = code if code is not None else 128 + signal.SIGKILL
            for path in self._shared_memory:
                path.unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _members(self) -> list[int]:
        """Processes of the group, including dead ones that are not reaped yet."""
        members: list[int] = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.getpgid(pid) == self.pid:
                    members.append(pid)
        return members

    def note_shared_memory(self) -> None:
        """Record the group's shared memory, so that `stop` removes it after SIGKILL too: files directly in /dev/shm
        that are mapped by the group and younger than it. (A model in a directory there is kept.)"""
        inodes: set[int] = set()  # not names: a semaphore is mapped under a name that no longer exists
        for member in self._members():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{member}/maps").read_bytes()
                inodes |= {int(inode) for inode in re.findall(rb" (\d+) +/dev/shm/", maps)}
        with contextlib.suppress(OSError):
            for entry in os.scandir("/dev/shm"):
                status = entry.stat(follow_symlinks=False)
                if status.st_ino in inodes and status.st_ctime >= self._started and entry.is_file():
                    self._shared_memory.add(Path(entry.path))


def _wait(ended: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.02)


def check_python(server: str, python: str | None) -> None:
    """UserError if there is no such program."""
    if python is None or shutil.which(python) is None:
        raise UserError(
            f"engine.server.python: expected the Python of an environment with {server} in it, got {python!r}; "
            "`pekoe recipe server` writes a recipe that says how to make one"
        )


def allow_open_files(num_servers: int, max_requests: int) -> None:
    """Raise this process's limit of open files: each request at a server is a connection. UserError if the system does
    not allow that many."""
    wanted = num_servers * max_requests + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    if wanted > most:
        raise UserError(
            f"engine.server.max_requests: expected at most {max(0, hard - _OTHER_FILES) // num_servers} for each of "
            f"{num_servers} servers, as {hard} files may be open (ulimit -n), got {max_requests}"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def wait_ready(
    name: str, process: ServerProcess | None, check: Callable[[], Awaitable[bool]], limit_s: float
) -> None:
    """Wait until `check` returns True. RunError if the process ends first, or after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        if process is not None and process.exit_code is not None:
            raise RunError(f"{name} ended while starting: {process.describe()}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                if await check():
                    if process is not None:
                        process.note_shared_memory()
                    return
        if time.monotonic() >= deadline:
            more = f": {process.describe()}" if process is not None else ""
            raise RunError(f"{name}: expected its health check to pass within {limit_s:g} s, it has not{more}")
        await asyncio.sleep(0.2)


def free_port() -> int:
    """A loopback port without a listener now; a new one at each call."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port
