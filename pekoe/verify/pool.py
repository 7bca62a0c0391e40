"""`JudgePool`: judges many responses at once in killable processes, and equal answers once."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pekoe.core.errors import RunError, UserError
from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Label, Verdict
from pekoe.verify.kinds import check_functions, find_verifier
from pekoe.verify.kinds.base import Verifier
from pekoe.verify.worker_pool import WORKER_COMMAND, Limits, Task, WorkerPool


@dataclass(frozen=True, slots=True)
class JudgeStats:
    """Counts of one pool. `num_limits`: limits that items hit; `num_restarts`: workers replaced, for any reason."""

    num_judged: int
    num_memo_hits: int
    num_faults: int
    num_limits: int
    num_restarts: int


class JudgePool:
    """Judges responses in worker processes, with limits on each item. Use it as a context manager, from any thread.

    `time_limit_s` is wall-clock time, counted from when a ready worker takes the item; `start_limit_s` bounds the time
    in which a worker imports; `memory_limit_bytes` is the address space of each worker. `memo_size` verdicts are
    remembered (0: none). Kinds `function:MODULE:NAME` may only name one of `functions` ("MODULE:NAME" each), because
    the kind comes with the data. If workers cannot start, every pending future raises RunError.
    """

    def __init__(
        self,
        num_workers: int = 2,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 1 << 30,
        *,
        functions: Collection[str] = (),
        start_limit_s: float = 60.0,
        memo_size: int = 16_384,
        _command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        if num_workers < 1 or time_limit_s <= 0 or memory_limit_bytes <= 0 or start_limit_s <= 0 or memo_size < 0:
            raise UserError("judge pool: num_workers must be at least 1, limits above 0, memo_size at least 0")
        check_functions(functions)
        self._functions = frozenset(functions)
        self._lock = threading.Lock()
        self._memo: OrderedDict[bytes, tuple[Label, str]] = OrderedDict()
        self._memo_size = memo_size
        self._in_flight: dict[bytes, Task] = {}
        self._num_judged = self._num_memo_hits = self._num_faults = 0
        self._error: str | None = None
        self._owner_pid = os.getpid()
        self._limits = Limits(num_workers, time_limit_s, memory_limit_bytes, start_limit_s)
        self._command = _command
        self._groups = {"math": WorkerPool(self._limits, _command, self._deliver, self._fail)}
        atexit.register(self.close)

    @property
    def usable(self) -> bool:
        """Whether it accepts items: it is open, its workers start, and this process made it."""
        return self._error is None and self._owner_pid == os.getpid()

    def submit(self, response: str, gold: Any, kind: str = "math") -> Future[Verdict]:
        """Begin to judge one response and return at once. The future cannot be cancelled.

        Raises UserError for an unknown kind or a function that is not allowed, and RunError if the pool is closed or
        its workers do not start.
        """
        self._check_usable()
        verifier = find_verifier(kind, self._functions)
        prepared = verifier.prepare(response, gold)
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()
        key = b"" if isinstance(prepared, Verdict) else _key(kind, prepared, gold)
        with self._lock:
            self._check_usable()
            if isinstance(prepared, Verdict):
                verdict = prepared
                self._count([future], verdict)
            elif key in self._memo:
                self._memo.move_to_end(key)
                verdict = Verdict(self._memo[key][0], prepared, self._memo[key][1])
                self._num_memo_hits += 1
                self._count([future], verdict)
            else:
                if task := self._in_flight.get(key):
                    self._num_memo_hits += 1
                    task.futures.append(future)
                else:
                    self._in_flight[key] = task = Task(key, kind, prepared, gold, [future])
                    self._group(verifier).submit(task)
                return future
        future.set_result(verdict)
        return future

    def _group(self, verifier: Verifier) -> WorkerPool:
        """Return the workers of the verifier's group, `num_workers` of them, and start them at first use."""
        if verifier.worker_group not in self._groups:
            command = (*self._command, verifier.name)
            self._groups[verifier.worker_group] = WorkerPool(self._limits, command, self._deliver, self._fail)
        return self._groups[verifier.worker_group]

    def judge_many(self, items: Iterable[tuple[str, Any, str]], view: ProgressReporter | None = None) -> list[Verdict]:
        """Judge (response, gold, kind) triples; the verdicts come back in the items' order. Raises as `submit` does."""
        futures = [self.submit(response, gold, kind) for response, gold, kind in items]
        return [future.result() for future in track(view or NoProgress(), "verify", futures)]

    def stats(self) -> JudgeStats:
        """Return the counts so far."""
        with self._lock:
            counts = (self._num_judged, self._num_memo_hits, self._num_faults)
            groups = self._groups.values()
            return JudgeStats(*counts, sum(g.num_limits for g in groups), sum(g.num_restarts for g in groups))

    def close(self) -> None:
        """Kill the workers. Pending futures raise RunError. Closing twice is allowed."""
        atexit.unregister(self.close)
        if self._owner_pid == os.getpid():  # a forked child must not kill its parent's workers
            for group in list(self._groups.values()):
                group.close()

    def __enter__(self) -> JudgePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._owner_pid != os.getpid():  # checked first: a fork may have copied a held lock
            raise RunError("the judge pool belongs to the process that this one was forked from")
        if self._error is not None:
            raise RunError(self._error)

    def _count(self, futures: list[Future[Verdict]], verdict: Verdict) -> None:
        self._num_judged += len(futures)
        self._num_faults += len(futures) * (verdict.label == "fault")

    def _deliver(self, task: Task, verdict: Verdict) -> None:
        with self._lock:
            if self._in_flight.pop(task.key, None) is None:
                return  # another worker group failed, and the futures have raised
            # A verdict on an answer is always the same, unless it comes from a limit or a fault.
            if verdict.label != "fault" and not task.limits_hit and self._memo_size:
                self._memo[task.key] = (verdict.label, verdict.why)
                if len(self._memo) > self._memo_size:
                    self._memo.popitem(last=False)
            self._count(task.futures, verdict)
        for future in task.futures:
            future.set_result(verdict)

    def _fail(self, error: RunError) -> None:
        with self._lock:
            self._error = str(error)
            tasks = list(self._in_flight.values())
            self._in_flight.clear()
        for future in [future for task in tasks for future in task.futures]:
            future.set_exception(RunError(str(error)))


def _key(kind: str, answer: str, gold: Any) -> bytes:
    # A digest, because some answers are long, and the memo keeps thousands.
    return hashlib.blake2b(json.dumps([kind, answer, gold]).encode(), digest_size=32).digest()
