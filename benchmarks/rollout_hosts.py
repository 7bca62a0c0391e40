"""The processes that `bench_rollout.py` and `bench_train.py` measure: started, asked in turns, stopped in between."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pekoe.cli import WAITING

WORKER = Path(__file__).with_name("rollout_worker.py")
GUARD = Path(__file__).resolve().parent.parent / "pekoe/engine/servers/process_guard.py"
"""Ends the group should we be killed."""
CLOSE_LIMIT_S = 20.0


class Failed(Exception):
    """A system that did not start, answer in time, or answer right. The benchmark goes on without it."""


class Worker:
    """A system in a process group of its own. Between questions all its processes are stopped (SIGSTOP), so that what
    one system does when it is idle is not charged to the next."""

    def __init__(
        self,
        system: str,
        python: str,
        directory: Path,
        options: dict[str, Any],
        env: dict[str, str],
        log: Path,
        limit_s: float,
        script: Path = WORKER,
    ) -> None:
        self.system, self.options, self._log = system, options, log
        self._answers: queue.Queue[str | None] = queue.Queue()
        guard = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*guard, python, str(script), system, str(directory), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                env={**os.environ, **env},
            )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._take("start", limit_s)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _take(self, what: str, limit_s: float) -> Any:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            raise Failed(f"{self.system}: expected an answer to {what} within {limit_s:g} s, got none") from None
        answer = {"error": f"it ended; see its last words:\n{self.last_words()}"} if line is None else json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.system}: {what}: {answer['error']}")
        return answer["ok"]

    def ask(self, request: dict[str, Any], limit_s: float) -> Any:
        """The worker's answer. Raises Failed where it has none within `limit_s`; the worker is then of no use."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._take(str(request.get("name", request["do"])), limit_s)
        except OSError as error:
            raise Failed(f"{self.system}: {error}; its last words:\n{self.last_words()}") from None
        finally:
            self._signal(signal.SIGSTOP)

    def last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def peak_bytes(self) -> int:
        """PeakMemory resident memory so far, summed over its processes."""
        return sum(_peak(pid) for pid in _group(self._process.pid))

    def _signal(self, number: int) -> None:
        """To all its processes but the guard, which must go on watching us."""
        for pid in _group(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                if pid != self._process.pid:
                    os.kill(pid, number)

    def close(self) -> None:
        """Let it end by itself, so that it takes its shared memory along; kill what is left. Safe to call twice."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _group(leader: int) -> Iterator[int]:
    """The processes of a process group."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.getpgid(int(entry.name)) == leader:
                    yield int(entry.name)


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def vllm_python() -> tuple[str | None, str]:
    """The Python of an environment with vLLM, or None and why there is none."""
    here = Path(__file__).resolve().parent.parent / ".venv-vllm/bin/python"
    python = os.environ.get("PEKOE_VLLM_PYTHON") or str(here)
    if os.access(python, os.X_OK):
        return python, ""
    return None, f"no vLLM environment: neither $PEKOE_VLLM_PYTHON nor {here} (make .venv-vllm/.stamp)"


def vllm_layouts(threads: int) -> dict[str, dict[str, str]]:
    """Ways for vLLM to use a CPU. By its default one core is left to its scheduler, a process of its own, and kernels
    have the rest; or kernels have all cores beside the scheduler; or all is one process."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return {
        "default": {"VLLM_CPU_OMP_THREADS_BIND": "auto"},
        "all-cores": {"VLLM_CPU_OMP_THREADS_BIND": cores},
        "one-process": {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "KMP_BLOCKTIME": "5",  # ms, as vLLM sets it for its own workers
        },
    }


def environment(system: str, options: dict[str, Any], python: str) -> dict[str, str]:
    """What a worker's environment adds to ours. Pekoe's command line says how threads wait (decision 0002)."""
    threads = options["threads"]
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if system == "embedded":
        env |= WAITING
    if system == "vllm":
        env |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
        if options["device"] == "cpu":
            env |= vllm_layouts(threads)[options["layout"]]
            if options["mode"] == "eager":
                env["VLLM_CPU_CI_ENV"] = "1"  # leaves its own warm-up out; the benchmark has one
            library = Path(python).parent.parent / "lib/libiomp5.so"
            if library.is_file():  # "for best performance", its documentation says
                env["LD_PRELOAD"] = str(library)
    return env


@contextmanager
def closing(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()
