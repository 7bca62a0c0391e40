"""What an engine may leave behind, as Linux tells: processes, ports, shared memory, threads."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
Process = tuple[int, str]
"""A process's number, and when it started: numbers are used again."""


def processes() -> dict[Process, tuple[int, int]]:
    """Every living process with its parent and its session."""
    found: dict[Process, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()  # the name may hold spaces
                if fields[0] not in "ZX":
                    found[int(entry.name), fields[19]] = (int(fields[1]), int(fields[3]))
    return found


def descendants() -> set[Process]:
    """Every living process that this one started, itself or through others."""
    everyone, family, size = processes(), {os.getpid()}, 0
    while len(family) != size:
        size = len(family)
        family |= {pid for (pid, _), (parent, _) in everyone.items() if parent in family}
    return {process for process in everyone if process[0] in family - {os.getpid()}}


def listening(family: set[Process]) -> set[int]:
    """The ports on which these processes listen."""
    sockets: set[str] = set()
    for pid, _ in family:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    return {port for port, inode in all_listening() if inode in sockets}


def all_listening() -> set[tuple[int, str]]:
    """Every port on which anybody listens, with the socket's number."""
    found: set[tuple[int, str]] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add((int(fields[1].rpartition(":")[2], 16), fields[9]))
    return found


def shared_memory(family: set[Process]) -> set[str]:
    """The files of shared memory that these processes have mapped."""
    mapped: set[str] = set()
    for pid, _ in family:
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r" /dev/shm/([^/\n ]+)", Path(f"/proc/{pid}/maps").read_text()))
    return mapped


class Leftovers:
    """Made before an engine is; `look` while it lives; `assert_none` after it was closed."""

    def __init__(self) -> None:
        self._family, self._threads = descendants(), set(threading.enumerate())
        self._weights = set(SHARED_MEMORY.glob("pekoe*"))
        self.processes: set[Process] = set()
        self.ports: set[int] = set()
        self.memory: set[str] = set()
        self._sessions: set[int] = set()

    def look(self) -> None:
        everyone = processes()
        self.processes |= descendants() - self._family
        self.ports |= listening(self.processes)
        self.memory |= shared_memory(self.processes)
        self._sessions |= {everyone[p][1] for p in self.processes if p in everyone} - {os.getsid(0)}

    def assert_none(self, limit_s: float = 5.0) -> None:
        def left_processes() -> set[Process]:
            return {p for p, (_, session) in processes().items() if p in self.processes or session in self._sessions}

        checks: dict[str, Callable[[], object]] = {
            "processes": left_processes,
            "ports": lambda: self.ports & {port for port, _ in all_listening()},
            "shared memory": lambda: self.memory & set(os.listdir(SHARED_MEMORY)),
            "weights in it": lambda: set(SHARED_MEMORY.glob("pekoe*")) - self._weights,
            "threads": lambda: set(threading.enumerate()) - self._threads,
        }
        deadline = time.monotonic() + limit_s
        while (left := {name: check() for name, check in checks.items()}) and time.monotonic() < deadline:
            if not any(left.values()):
                return
            time.sleep(0.05)
        assert not any(left.values()), f"left behind: {left}"
