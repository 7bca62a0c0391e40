"""Worker processes of judges, and one thread that hands tasks to them, enforces deadlines, and holds invariant I9.

I9: FAULT means that our machinery or the reference failed. If judging a response hits a limit (time, memory, recursion,
the worker's death), the task is retried on a fresh worker. If that hits a limit too, a third judges the reference by
itself. If that passes, the response was at fault: UNPARSED, with `why` beginning with "limit"; if not, FAULT.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast, get_args

from pekoe.core.errors import RunError
from pekoe.core.types import Label, Verdict

MAX_SHOWN_CHARS = 10_000  # of an answer in its verdict
MAX_FAILED_STARTS = 3  # in a row, before the pool gives up
# Not multiprocessing, which would import the user's main script (perhaps without a guard) again, and unpickle.
WORKER_COMMAND = (sys.executable, "-P", "-m", "pekoe.verify.worker")


@dataclass(eq=False, slots=True)
class Task:
    """One answer to judge, and the futures that wait for its verdict."""

    key: bytes
    kind: str
    answer: str
    gold: Any
    futures: list[Future[Verdict]]
    limits_hit: list[str] = field(default_factory=list[str])  # after two, the reference is judged against itself

    @property
    def check(self) -> str:
        return "reference" if len(self.limits_hit) >= 2 else "answer"


@dataclass(frozen=True, slots=True)
class Limits:
    num_workers: int
    time_limit_s: float
    memory_limit_bytes: int
    start_limit_s: float


class Worker:
    """A worker process: starting, idle or busy with `task`, until `deadline` at the latest. Only `kill` waits."""

    def __init__(self, command: Sequence[str], memory_limit_bytes: int, start_limit_s: float) -> None:
        # Its output before it is ready goes to a file, because a full pipe would block it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(memory_limit_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                env=_environment(),
                start_new_session=True,  # the terminal's Ctrl-C does not reach it, and `kill` kills its children too
            )
        except OSError:
            self._log.close()
            raise
        self.stdin, self.stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._received = self._unsent = b""
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

    def send(self, message: dict[str, Any]) -> bool:
        """Queue one message, and return what `flush` returns."""
        self._unsent += json.dumps(message).encode() + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Write what the pipe takes, and return whether all is written. A dead worker shows when its stdout is read."""
        try:
            self._unsent = self._unsent[os.write(self.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""
        return not self._unsent

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages received, or None if the worker died or broke the protocol."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if data and all(isinstance(message, dict) for message in messages) else None

    def stderr_tail(self) -> str:
        """Return the end of its stderr from before it was ready, on one line."""
        self._log.seek(0)
        return " | ".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])

    def kill(self) -> None:
        """Kill it and its children, and wait until it is dead."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self.stdin, self.stdout, self._log):
            file.close()


def _environment() -> dict[str, str]:
    # The worker imports from the same directories as the parent.
    directories = [os.path.abspath(path) for path in sys.path] + [str(Path(__file__).parents[2])]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # sympy sometimes orders by hash; with a fixed seed, a verdict does not depend on the worker that gave it.
    return os.environ | one_thread | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(dict.fromkeys(directories))}


class WorkerPool:
    """Runs from construction to `close()`. `deliver(task, verdict)` and `fail(error)` are called in its thread."""

    def __init__(
        self,
        limits: Limits,
        command: Sequence[str],
        deliver: Callable[[Task, Verdict], None],
        fail: Callable[[RunError], None],
    ) -> None:
        self._limits, self._command, self._deliver, self._fail = limits, command, deliver, fail
        self._queue: deque[Task] = deque()
        self._retries: deque[Task] = deque()  # for fresh workers only
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._closing = False
        self._failed_starts = 0
        self.num_limits = self.num_restarts = 0
        self._thread = threading.Thread(target=self._run, name="pekoe-judge", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Queue `task`; from any thread, while the pool runs."""
        self._queue.append(task)
        self._wake_up()

    def close(self) -> None:
        """Kill the workers and end the thread."""
        self._closing = True
        self._wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe wakes it anyway; a closed one means that it has ended
            os.write(self._wake, b".")

    def _run(self) -> None:
        error = RunError("the judge pool was closed")
        try:
            while not self._closing:
                self._poll()
        except RunError as failure:
            error = failure
        except BaseException as failure:  # or its callers would wait for a dead thread for ever
            error = RunError(f"the judge pool's thread failed: {type(failure).__name__}: {failure}")
        for worker in self._workers:
            worker.kill()
        self._fail(error)
        self._selector.close()
        os.close(self._woken)
        os.close(self._wake)

    def _poll(self) -> None:
        """Start workers that are missing, hand out tasks, and wait for the next message or deadline."""
        while len(self._workers) < self._limits.num_workers:
            worker = Worker(self._command, self._limits.memory_limit_bytes, self._limits.start_limit_s)
            self._workers.append(worker)
            self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._assign()
        # Taken before the wait: a worker is late only if its deadline has passed and it has sent nothing even so.
        now = time.monotonic()
        deadline = min(worker.deadline for worker in self._workers)
        for key, mask in self._selector.select(None if deadline == float("inf") else max(0.0, deadline - now)):
            if key.data is None:
                os.read(self._woken, 1 << 16)
            elif key.data not in self._workers:  # retired earlier in this loop
                continue
            elif mask & selectors.EVENT_WRITE:
                self._watch_stdin(key.data, key.data.flush())
            else:
                self._on_message(key.data)
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            late_after_s = self._limits.time_limit_s if worker.ready else self._limits.start_limit_s
            self._retire(worker, f"time ({late_after_s:g} s)")

    def _assign(self) -> None:
        for worker in self._workers:
            # Each limit hit starts one fresh worker, and retries go first, so no retry waits for ever.
            queue = self._retries if self._retries and worker.num_judged == 0 else self._queue
            if not worker.idle or not queue:
                continue
            task = queue.popleft()
            worker.task = task
            worker.message_id += 1
            worker.deadline = time.monotonic() + self._limits.time_limit_s
            request = {"id": worker.message_id, "kind": task.kind, "gold": task.gold, "check": task.check}
            self._watch_stdin(worker, worker.send(request | {"answer": task.answer}))

    def _watch_stdin(self, worker: Worker, complete: bool) -> None:
        registered = worker.stdin in self._selector.get_map()
        if complete and registered:
            self._selector.unregister(worker.stdin)
        elif not complete and not registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)

    def _on_message(self, worker: Worker) -> None:
        messages = worker.receive()
        if messages is None:
            return self._retire(worker, "the worker died")
        for message in messages:
            if "failed" in message and not worker.ready:
                raise RunError(f"the judge of kind {self._command[-1]} cannot start: {message['failed']}")
            if "ready" in message and not worker.ready:
                worker.ready, worker.deadline = True, float("inf")
            elif worker.task is None or message.get("id") != worker.message_id:
                return self._retire(worker, "the worker broke the protocol")
            elif "limit" in message:
                return self._retire(worker, str(message["limit"]))
            else:
                self._finish(worker, message)
                if message.get("oversized"):
                    return self._retire(worker, "")
        return None

    def _finish(self, worker: Worker, message: dict[str, Any]) -> None:
        task, worker.task, worker.deadline = worker.task, None, float("inf")
        assert task is not None
        worker.num_judged += 1
        self._failed_starts = 0
        label: Any = message.get("label")
        shown = task.answer if len(task.answer) <= MAX_SHOWN_CHARS else task.answer[:200] + "…"
        why = str(message.get("why", ""))[:300]
        if label not in get_args(Label):
            verdict = Verdict("fault", shown, f"the judge failed: {str(message.get('error'))[:300]}")
        elif task.check == "answer":
            verdict = Verdict(label, shown, why)
        elif label == "correct":
            why = f"limit: {task.limits_hit[-1]}, twice; the reference can be judged against itself"
            verdict = Verdict("unparsed", shown, why)
        else:
            verdict = Verdict("fault", shown, f"limit: {task.limits_hit[-1]}; and {why}")
        self._deliver(task, verdict)

    def _retire(self, worker: Worker, why: str) -> None:
        """Kill `worker` (the next poll starts another) and decide what becomes of its task."""
        self._workers.remove(worker)
        self._selector.unregister(worker.stdout)
        self._watch_stdin(worker, True)
        stderr_tail = "" if worker.ready else worker.stderr_tail()
        worker.kill()
        task = worker.task
        if task is not None:
            self.num_limits += 1
            task.limits_hit.append(why)
            if len(task.limits_hit) < 3:
                self._retries.append(task)
            else:
                self._deliver(task, Verdict("fault", task.answer, f"limit on the reference against itself: {why}"))
        elif worker.num_judged == 0:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                waiting = "waiting for one to import its libraries and report that it is ready"
                start = f"the judge's workers do not start ({self._failed_starts} in a row, {waiting})"
                raise RunError(f"{start}: {why}. {stderr_tail}".rstrip())
        self.num_restarts += 1
