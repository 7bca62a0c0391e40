"""The dispatcher: one thread that hands tasks to workers, keeps their deadlines, and holds invariant I9.

I9: FAULT means that our machinery or the reference failed. A limit hit while judging a response (time, memory,
recursion, the worker's death) is tried again on a fresh worker. If that hits one too, a third judges the reference by
itself. If that passes, the response was at fault: UNPARSED, and `why` begins with "limit"; if not, FAULT.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, get_args

from pekoe.core.errors import RunError
from pekoe.core.types import Label, Verdict
from pekoe.verify.process import Worker

MAX_SHOWN_CHARS = 10_000  # of an answer in its verdict
MAX_FAILED_STARTS = 3  # in a row, before the pool gives up; else a machine without memory starts workers for ever


@dataclass(eq=False, slots=True)
class Task:
    """One answer to judge, and everybody who waits for its verdict."""

    key: bytes
    kind: str
    answer: str
    gold: Any
    futures: list[Future[Verdict]]
    limits_hit: list[str] = field(default_factory=list[str])  # two: now the reference is judged alone

    @property
    def check(self) -> str:
        return "reference" if len(self.limits_hit) >= 2 else "answer"


@dataclass(frozen=True, slots=True)
class Limits:
    num_workers: int
    time_limit_s: float
    memory_limit_bytes: int
    start_limit_s: float


class Dispatcher:
    """Runs from construction to `close()`. `deliver(task, verdict)` and `fail(error)` are called in its thread."""

    def __init__(
        self,
        limits: Limits,
        command: Sequence[str],
        deliver: Callable[[Task, Verdict], None],
        fail: Callable[[RunError], None],
    ) -> None:
        self._limits, self._command, self._deliver, self._fail = limits, command, deliver, fail
        self._new: deque[Task] = deque()
        self._again: deque[Task] = deque()  # for fresh workers only
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

    def post(self, task: Task) -> None:
        """Queue `task`; from any thread, while the dispatcher runs."""
        self._new.append(task)
        self._rouse()

    def close(self) -> None:
        """Kill the workers and end the thread."""
        self._closing = True
        self._rouse()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _rouse(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake anyway; closed: it has ended
            os.write(self._wake, b".")

    def _run(self) -> None:
        error = RunError("the judge pool was closed")
        try:
            while not self._closing:
                self._turn()
        except RunError as failure:
            error = failure
        except BaseException as failure:  # nobody may wait for ever for a thread that has died
            error = RunError(f"the judge pool's dispatcher failed: {type(failure).__name__}: {failure}")
        for worker in self._workers:
            worker.kill()
        self._fail(error)
        self._selector.close()
        os.close(self._woken)
        os.close(self._wake)

    def _turn(self) -> None:
        while len(self._workers) < self._limits.num_workers:
            worker = Worker(self._command, self._limits.memory_limit_bytes, self._limits.start_limit_s)
            self._workers.append(worker)
            self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._assign()
        # Taken before the wait: a worker is late only if its deadline had passed and nothing had come from it even so.
        now = time.monotonic()
        deadline = min(worker.deadline for worker in self._workers)
        for key, mask in self._selector.select(None if deadline == float("inf") else max(0.0, deadline - now)):
            if key.data is None:
                os.read(self._woken, 1 << 16)
            elif key.data not in self._workers:  # lost a moment ago, in this very loop
                continue
            elif mask & selectors.EVENT_WRITE:
                self._sent(key.data, key.data.flush())
            else:
                self._hear(key.data)
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            late_after_s = self._limits.time_limit_s if worker.ready else self._limits.start_limit_s
            self._lose(worker, f"time ({late_after_s:g} s)")

    def _assign(self) -> None:
        for worker in self._workers:
            # Every limit hit makes one fresh worker, and those waiting to be tried again go first: none waits for ever.
            queue = self._again if self._again and worker.num_judged == 0 else self._new
            if not worker.idle or not queue:
                continue
            task = queue.popleft()
            worker.task = task
            worker.message_id += 1
            worker.deadline = time.monotonic() + self._limits.time_limit_s
            request = {"id": worker.message_id, "kind": task.kind, "gold": task.gold, "check": task.check}
            self._sent(worker, worker.send(request | {"answer": task.answer}))

    def _sent(self, worker: Worker, all_of_it: bool) -> None:
        registered = worker.stdin in self._selector.get_map()
        if all_of_it and registered:
            self._selector.unregister(worker.stdin)
        elif not all_of_it and not registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)

    def _hear(self, worker: Worker) -> None:
        messages = worker.receive()
        if messages is None:
            return self._lose(worker, "the worker died")
        for message in messages:
            if "failed" in message and not worker.ready:
                raise RunError(f"the judge of kind {self._command[-1]} cannot start: {message['failed']}")
            if "ready" in message and not worker.ready:
                worker.ready, worker.deadline = True, float("inf")
            elif worker.task is None or message.get("id") != worker.message_id:
                return self._lose(worker, "the worker broke the protocol")
            elif "limit" in message:
                return self._lose(worker, str(message["limit"]))
            else:
                self._finish(worker, message)
                if message.get("tired"):
                    return self._lose(worker, "")
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
            why = f"limit: {task.limits_hit[-1]}, twice; the reference by itself is judged"
            verdict = Verdict("unparsed", shown, why)
        else:
            verdict = Verdict("fault", shown, f"limit: {task.limits_hit[-1]}; and {why}")
        self._deliver(task, verdict)

    def _lose(self, worker: Worker, why: str) -> None:
        """Kill `worker` (the next turn starts another) and settle what it was doing."""
        self._workers.remove(worker)
        self._selector.unregister(worker.stdout)
        self._sent(worker, True)
        last_words = "" if worker.ready else worker.last_words()
        worker.kill()
        task = worker.task
        if task is not None:
            self.num_limits += 1
            task.limits_hit.append(why)
            if len(task.limits_hit) < 3:
                self._again.append(task)
            else:
                self._deliver(task, Verdict("fault", task.answer, f"limit on the reference by itself: {why}"))
        elif worker.num_judged == 0:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                waiting = "waiting for one to import what the kinds need and say that it is ready"
                start = f"the judge's workers do not start ({self._failed_starts} in a row, {waiting})"
                raise RunError(f"{start}: {why}. {last_words}".rstrip())
        self.num_restarts += 1
