"""Launched processes: ready, exiting, hanging, killed, and killed with us."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pekoe.core.errors import RunError
from pekoe.engine.servers.process import ServerProcess, free_port, wait_ready
from tests.forked import Child


def launch(code: str, tmp_path: Path) -> ServerProcess:
    return ServerProcess("test server", [sys.executable, "-c", code], os.environ, tmp_path / "logs" / "server.log")


def gone(pid: int, limit_s: float = 5.0) -> bool:
    """Whether a process ends (or is a zombie that nobody reaps) within the limit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path, limit_s: float = 10.0) -> str:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if path.is_file() and (text := path.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


async def never() -> bool:
    return False


def test_an_early_exit_is_told_at_once_with_the_logs_end(tmp_path: Path):
    process = launch("print('one'); print('the reason'); raise SystemExit(3)", tmp_path)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)ended while starting.*exited with status 3.*the reason"):
        asyncio.run(wait_ready("test server", process, never, limit_s=60))
    assert time.monotonic() - start < 10
    process.stop()


def test_the_start_has_a_limit(tmp_path: Path):
    process = launch("print('busy', flush=True); import time; time.sleep(60)", tmp_path)
    with pytest.raises(RunError, match=r"(?s)health check to pass within 1 s.*runs"):
        asyncio.run(wait_ready("test server", process, never, limit_s=1))
    process.stop()


def test_a_health_check_that_hangs_does_not_pass_the_limit(tmp_path: Path):
    async def hang() -> bool:
        await asyncio.sleep(60)
        return True

    start = time.monotonic()
    with pytest.raises(RunError, match=r"within 0\.5 s"):
        asyncio.run(wait_ready("test server", None, hang, limit_s=0.5))
    assert time.monotonic() - start < 5


def test_ready_when_the_check_says_so(tmp_path: Path):
    flag = tmp_path / "flag"
    process = launch(f"open({str(flag)!r}, 'w').close(); import time; time.sleep(60)", tmp_path)

    async def check() -> bool:
        return flag.exists()

    asyncio.run(wait_ready("test server", process, check, limit_s=20))
    assert process.exit_code is None
    process.stop()
    process.stop()
    assert process.exit_code == 128 + signal.SIGTERM
    assert gone(process.pid)


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
time.sleep(0.5)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(60)
"""


WILLING = STUBBORN.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "").replace(
    "signal.signal(15, signal.SIG_IGN);", ""
)


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path: Path):
    told = tmp_path / "pids"
    process = ServerProcess("s", [sys.executable, "-c", STUBBORN, str(told)], os.environ, tmp_path / "log")
    pids = [int(pid) for pid in wait_for(told).split()]
    start = time.monotonic()
    process.stop(grace_s=0.5)
    assert time.monotonic() - start < 5
    assert all(gone(pid, 1) for pid in [process.pid, *pids])


def start_from_a_thread_that_ends(told: Path, log: Path) -> None:
    argv = [sys.executable, "-c", STUBBORN, str(told)]
    thread = threading.Thread(target=lambda: ServerProcess("s", argv, os.environ, log))
    thread.start()
    thread.join()
    time.sleep(60)


def test_killed_with_us_even_by_sigkill(tmp_path: Path):
    """A parent starts a server from a thread that ends (that must not kill it), and is then killed itself."""
    told = tmp_path / "pids"
    parent = Child(tmp_path, start_from_a_thread_that_ends, told, tmp_path / "log")
    try:
        pids = [int(pid) for pid in wait_for(told, 60).split()]
        time.sleep(0.5)
        assert not any(gone(pid, 0.1) for pid in pids)
    finally:
        parent.kill()
    assert all(gone(pid, 15) for pid in pids)


def test_nothing_of_a_server_outlives_its_guard(tmp_path: Path):
    """Ray kills the children of a process that it ends, the guard among them, and not theirs."""
    told = tmp_path / "pids"
    process = ServerProcess("s", [sys.executable, "-c", WILLING, str(told)], os.environ, tmp_path / "log")
    pids = [int(pid) for pid in wait_for(told).split()]
    os.kill(process.pid, signal.SIGKILL)
    assert all(gone(pid, 15) for pid in pids)
    process.stop()


def test_nothing_of_a_server_outlives_its_first_process(tmp_path: Path):
    """Also where whoever started it is killed before it can look."""
    told = tmp_path / "pids"
    process = ServerProcess("s", [sys.executable, "-c", WILLING, str(told)], os.environ, tmp_path / "log")
    first, second = (int(pid) for pid in wait_for(told).split())
    os.kill(first, signal.SIGKILL)
    assert gone(second, 15)
    assert process.exit_code == 128 + signal.SIGKILL
    process.stop()


def test_shared_memory_that_a_killed_server_made_is_removed(tmp_path: Path):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    name, told = f"pekoe-test-{os.getpid()}", tmp_path / "made"
    older = Path(f"/dev/shm/{name}-older")
    older.write_bytes(b"x" * 4096)
    code = f"""
import mmap, time
open("/dev/shm/{name}", "wb").write(b"x" * 4096)
files = [open(path, "rb") for path in ("/dev/shm/{name}", "/dev/shm/{name}-older")]
maps = [mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ) for file in files]
open({str(told)!r}, "w").write("done\\n")
time.sleep(60)
"""
    try:
        time.sleep(1.2)  # older by more than the clock's grain
        process = launch(code, tmp_path)
        wait_for(told)
        process.stop(grace_s=1)
        assert not Path(f"/dev/shm/{name}").exists()
        assert older.exists()
    finally:
        older.unlink()


def test_ports_are_given_once():
    assert len({free_port() for _ in range(200)}) == 200
