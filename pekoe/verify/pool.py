"""`JudgePool`: judges many responses at once in killable processes, and equal answers once. It holds invariant I9.

I9: FAULT means that our machinery or the reference failed. If judging a response hits a limit (time, memory, recursion,
the worker's death), the task is retried on a fresh worker. If that hits a limit too, a third judges the reference by
itself. If that passes, the response was at fault: UNPARSED, with `why` beginning with "limit"; if not, FAULT.
A worker killed by a signal from outside hit no limit: its task is tried again, MAX_KILLS times, and then FAULT.

Heavy answers have a budget, so that a thousand of them do not hold up the rest. The first LIMITS_A_BATCH limits that a
batch (what is submitted until no task waits) hits cost the whole time each. After these a try has SHORT of it; every
JUDGED_A_LIMIT answers judged make room for a limit more. Functions of the user's, and kinds with limits of their own
(code), always have the whole time.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast, get_args

from pekoe.core.errors import RunError, UserError
from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Label, Verdict
from pekoe.verify.kinds import check_functions, find_verifier
from pekoe.verify.kinds.base import Verifier
from pekoe.verify.kinds.function import OPTIONS, Options

Context = Mapping[str, Any]
Item = tuple[str, Any, str] | tuple[str, Any, str, Context | None]

MAX_SHOWN_CHARS = 10_000  # of an answer in its verdict
MAX_FAILED_STARTS = 3  # in a row, before the pool gives up
LIMITS_A_BATCH, JUDGED_A_LIMIT, SHORT = 20, 100, 0.2
MAX_KILLS = 20  # of the workers of one item, from outside
# Signals that others send; not those of a process that goes wrong by itself, as SIGSEGV. An answer cannot send any.
_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGQUIT}
# Not multiprocessing, which would import the user's main script (perhaps without a guard) again, and unpickle.
WORKER_COMMAND = (sys.executable, "-P", "-m", "pekoe.verify.worker")


@dataclass(frozen=True, slots=True)
class JudgeStats:
    """Counts of one pool. `num_limits`: limits that items hit; `num_restarts`: workers replaced, for any reason."""

    num_judged: int
    num_memo_hits: int
    num_faults: int
    num_limits: int
    num_restarts: int


@dataclass(eq=False, slots=True)
class _Task:
    """One answer to judge, and the futures that wait for its verdict."""

    key: bytes
    kind: str
    answer: str
    gold: Any
    context: Any
    time_limit_s: float
    futures: list[Future[Verdict]]
    itself: bool = False  # the answer is the reference, to be checked
    is_users: bool = False  # judged by a function of the user's
    has_own_limit: bool = False  # which is never cut short
    num_kills: int = 0
    limits_hit: list[str] = field(default_factory=list[str])  # after two, the reference is judged against itself

    @property
    def check(self) -> str:
        return "itself" if self.itself else "reference" if len(self.limits_hit) >= 2 else "answer"


class _Worker:
    """A worker process: starting, idle or busy with `task`, until `deadline` at the latest. Only `kill` waits."""

    def __init__(self, group: _Group, command: Sequence[str], memory_limit_bytes: int, start_limit_s: float) -> None:
        # Its output before it is ready goes to a file, because a full pipe would block it; a user's stays there.
        self._log = group.log.open("ab+") if group.log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        self._log_start = self._log.seek(0, os.SEEK_END)
        inherits = group.options is not None and group.log is None  # the user's function prints for the user
        try:
            self._process = subprocess.Popen(
                [*command, group.kind, str(os.getpid()), str(memory_limit_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if inherits else self._log,
                bufsize=0,
                env=_environment() | ({} if group.options is None else {OPTIONS: json.dumps(asdict(group.options))}),
                start_new_session=True,  # the terminal's Ctrl-C does not reach it, and `kill` kills its children too
            )
        except OSError:
            self._log.close()
            raise
        self.stdin, self.stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._received = self._unsent = b""
        self.pid = self._process.pid
        self.group = group
        self.ready = False
        self.task: _Task | None = None
        self.limit_s = start_limit_s  # of what it does now
        self.is_short = False  # the task has a part of its time
        self.message_id = 0
        self.num_judged = 0
        self.deadline = time.monotonic() + start_limit_s
        os.set_blocking(self.stdin.fileno(), False)

    def send(self, message: dict[str, Any]) -> bool:
        """Queue one message, and return what `flush` returns."""
        self._unsent += json.dumps(message, default=str).encode() + b"\n"
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
        self._log.seek(self._log_start)
        return " | ".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])

    def was_killed(self) -> bool:
        """Whether a worker whose stdout has ended was killed by a signal from outside."""
        try:
            return self._process.wait(1.0) in _FROM_OUTSIDE
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        """Kill it and its children, and wait until it is dead."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self.stdin, self.stdout, self._log):
            file.close()


@dataclass(eq=False, slots=True)
class _Group:
    """The workers of one `Verifier.worker_group`, and the tasks that wait for them."""

    kind: str  # the first that was asked for: names the group to its workers
    options: Options | None = None  # of a user's function
    log: Path | None = None  # what a user's function prints; None: this process's stderr
    tasks: deque[_Task] = field(default_factory=deque[_Task])
    retries: deque[_Task] = field(default_factory=deque[_Task])  # for fresh workers only
    workers: list[_Worker] = field(default_factory=list[_Worker])
    num_failed_starts: int = 0  # in a row
    limits_left: float = field(default_factory=lambda: LIMITS_A_BATCH)  # that may cost the whole time


def _environment() -> dict[str, str]:
    # The worker imports from the same directories as the parent, but for the current one: a file there with the name of
    # a library, such as gmpy2.py, must not run. `kinds.function` adds it where the recipe names a function.
    own, here = str(Path(__file__).parents[2]), os.path.realpath(".")
    directories = [p for p in map(os.path.abspath, sys.path) if p == own or os.path.realpath(p) != here] + [own]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # sympy sometimes orders by hash; with a fixed seed, a verdict does not depend on the worker that gave it.
    return os.environ | one_thread | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(dict.fromkeys(directories))}


class JudgePool:
    """Judges responses in worker processes, with limits on each item. Use it as a context manager, from any thread.

    `time_limit_s` is wall-clock time, counted from when a ready worker takes the item; `start_limit_s` bounds the time
    in which a worker imports; `memory_limit_bytes` is the address space of each worker. `memo_size` verdicts are
    remembered (0: none). Kinds `function:MODULE:NAME` may only name one of `functions` ("MODULE:NAME" each; a mapping
    says how each is called), because the kind comes with the data. What these print goes to a file a function in
    `log_dir`, without it to stderr. If workers cannot start, every pending future raises RunError.
    """

    def __init__(
        self,
        num_workers: int = 2,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 1 << 30,
        *,
        functions: Collection[str] | Mapping[str, Options] = (),
        log_dir: Path | None = None,
        start_limit_s: float = 60.0,
        memo_size: int = 16_384,
        _command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        if num_workers < 1 or time_limit_s <= 0 or memory_limit_bytes <= 0 or start_limit_s <= 0 or memo_size < 0:
            raise UserError("judge pool: num_workers must be at least 1, limits above 0, memo_size at least 0")
        check_functions(functions)
        self._functions = functions if isinstance(functions, Mapping) else {name: Options() for name in functions}
        self._log_dir = log_dir
        self._num_workers, self._memory_limit_bytes, self._command = num_workers, memory_limit_bytes, _command
        self._time_limit_s, self._start_limit_s = time_limit_s, start_limit_s
        self._lock = threading.Lock()
        self._memo: OrderedDict[bytes, Verdict] = OrderedDict()  # without the answers, which the items have
        self._memo_size = memo_size
        self._in_flight: dict[bytes, _Task] = {}
        self._num_judged = self._num_memo_hits = self._num_faults = self._num_limits = self._num_restarts = 0
        self._error: str | None = None
        self._closing = False
        self._owner_pid = os.getpid()
        self._groups = {"math": _Group("math")}
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="pekoe-judge", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def usable(self) -> bool:
        """Whether it accepts items: it is open, its workers start, and this process made it."""
        return self._error is None and self._owner_pid == os.getpid()

    def submit(self, response: str, gold: Any, kind: str = "math", context: Context | None = None) -> Future[Verdict]:
        """Begin to judge one response and return at once. The future cannot be cancelled.

        `context` is what a function of the user's may ask for, too: {"messages": the conversation, "row": of the data}.
        Raises UserError for an unknown kind or a function that is not allowed, and RunError if the pool is closed or
        its workers do not start.
        """
        return self._submit(find_verifier(kind, self._functions).prepare(response, gold), gold, kind, context)

    def submit_reference(self, answer: str, gold: Any, kind: str = "math") -> Future[Verdict]:
        """Begin to check a reference in a worker: CORRECT where `check_reference` passes and `answer`, the reference as
        `prepare` gives it (or empty), is CORRECT. After two limits it is FAULT. Raises as `submit` does."""
        return self._submit(answer, gold, kind, itself=True)

    def _submit(
        self, prepared: Verdict | str, gold: Any, kind: str, context: Context | None = None, itself: bool = False
    ) -> Future[Verdict]:
        self._check_usable()
        verifier = find_verifier(kind, self._functions)
        context = context if verifier.is_users else None
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()
        key = b"" if isinstance(prepared, Verdict) else _key(kind + " itself" * itself, prepared, gold, context)
        limit_s = self._time_limit_s + (0.0 if isinstance(prepared, Verdict) else verifier.time_limit_s(gold))
        with self._lock:
            self._check_usable()
            if isinstance(prepared, Verdict):
                verdict = prepared
            elif key in self._memo:
                self._memo.move_to_end(key)
                verdict = self._memo[key] if verifier.is_users else replace(self._memo[key], extracted=prepared)
                self._num_memo_hits += 1
            elif key in self._in_flight:
                self._in_flight[key].futures.append(future)
                self._num_memo_hits += 1
                return future
            else:
                self._in_flight[key] = task = _Task(key, kind, prepared, gold, context, limit_s, [future], itself)
                task.is_users = verifier.is_users
                task.has_own_limit = verifier.is_users or limit_s > self._time_limit_s
                self._group_of(verifier).tasks.append(task)
                self._wake_up()
                return future
            self._count(1, verdict)
        future.set_result(verdict)
        return future

    def start(self, kinds: Iterable[str]) -> None:
        """Start the workers that these kinds need, and wait until one of each sort is ready.

        Raises UserError as `find_verifier`, and RunError where they do not start: a module that cannot be imported,
        too little memory.
        """
        verifiers = [find_verifier(kind, self._functions) for kind in dict.fromkeys(kinds)]
        with self._lock:
            groups = [self._group_of(verifier) for verifier in verifiers if verifier.decide is not None]
        self._wake_up()
        while not all(any(worker.ready for worker in list(group.workers)) for group in groups):
            self._check_usable()
            time.sleep(0.01)

    def _group_of(self, verifier: Verifier) -> _Group:
        """The workers of a verifier, which the pool's thread starts."""
        if verifier.worker_group not in self._groups:
            group = _Group(verifier.name)
            if verifier.is_users:
                group.options = self._functions[verifier.name.removeprefix("function:")]
                if self._log_dir is not None:
                    self._log_dir.mkdir(parents=True, exist_ok=True)
                    group.log = self._log_dir / f"{verifier.name.replace(':', '-')}.log"
            self._groups[verifier.worker_group] = group
        return self._groups[verifier.worker_group]

    def judge_many(self, items: Iterable[Item], view: ProgressReporter | None = None) -> list[Verdict]:
        """Judge items, which are arguments of `submit`; the verdicts come back in their order. Raises as it does."""
        futures = [self.submit(response, gold, kind, *context) for response, gold, kind, *context in items]
        return [future.result() for future in track(view or NoProgress(), "verify", futures)]

    def stats(self) -> JudgeStats:
        """Return the counts so far."""
        with self._lock:
            counts = self._num_judged, self._num_memo_hits, self._num_faults, self._num_limits, self._num_restarts
        return JudgeStats(*counts)

    def close(self) -> None:
        """Kill the workers. Pending futures raise RunError. Closing twice is allowed."""
        atexit.unregister(self.close)
        if self._owner_pid != os.getpid():  # a forked child must not kill its parent's workers
            return
        self._closing = True
        self._wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> JudgePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._owner_pid != os.getpid():  # checked first: a fork may have copied a held lock
            raise RunError("the judge pool belongs to the process that this one was forked from")
        if self._error is not None:
            raise RunError(self._error)

    def _count(self, num_judged: int, verdict: Verdict) -> None:
        self._num_judged += num_judged
        self._num_faults += num_judged * (verdict.label == "fault")

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # a full socket wakes the thread anyway; a closed one says that it has ended
            self._wake.send(b".")

    # The methods below run in the pool's thread.

    def _run(self) -> None:
        error = "the judge pool was closed"
        try:
            while not self._closing:
                self._poll()
        except RunError as failure:
            error = str(failure)
        except BaseException as failure:  # or its callers would wait for a dead thread for ever
            error = f"the judge pool's thread failed: {type(failure).__name__}: {failure}"
        for worker in self._workers():
            worker.kill()
        with self._lock:
            self._error = error
            futures = [future for task in self._in_flight.values() for future in task.futures]
            self._in_flight.clear()
        for future in futures:
            future.set_exception(RunError(error))
        for resource in (self._selector, self._woken, self._wake):
            resource.close()

    def _workers(self) -> list[_Worker]:
        return [worker for group in list(self._groups.values()) for worker in group.workers]

    def _poll(self) -> None:
        """Start workers that are missing, hand out tasks, and wait for the next message or deadline."""
        for group in list(self._groups.values()):
            while len(group.workers) < self._num_workers:
                worker = _Worker(group, self._command, self._memory_limit_bytes, self._start_limit_s)
                group.workers.append(worker)
                self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
            self._assign(group)
        # Taken before the wait: a worker is late only if its deadline has passed and it has sent nothing even so.
        now = time.monotonic()
        deadline = min(worker.deadline for worker in self._workers())
        for key, mask in self._selector.select(None if deadline == float("inf") else max(0.0, deadline - now)):
            if key.data is None:
                self._woken.recv(1 << 16)
            elif key.data not in key.data.group.workers:  # retired earlier in this loop
                continue
            elif mask & selectors.EVENT_WRITE:
                self._watch_stdin(key.data, key.data.flush())
            else:
                self._on_message(key.data)
        for worker in [worker for worker in self._workers() if worker.deadline <= now]:
            after = f", after {LIMITS_A_BATCH} limits of this batch" if worker.task and worker.is_short else ""
            self._retire(worker, f"time ({worker.limit_s:g} s{after})")

    def _assign(self, group: _Group) -> None:
        if not (group.tasks or group.retries or any(worker.task for worker in group.workers)):
            group.limits_left = LIMITS_A_BATCH
        for worker in group.workers:
            # Each limit hit starts one fresh worker, and retries go first, so no retry waits for ever.
            tasks = group.retries if group.retries and worker.num_judged == 0 else group.tasks
            if not worker.ready or worker.task or not tasks:
                continue
            worker.task = task = tasks.popleft()
            worker.message_id += 1
            worker.is_short = group.limits_left < 1 and task.check == "answer" and not task.has_own_limit
            worker.limit_s = task.time_limit_s * (SHORT if worker.is_short else 1)
            worker.deadline = time.monotonic() + worker.limit_s
            request = {"id": worker.message_id, "kind": task.kind, "gold": task.gold, "check": task.check}
            self._watch_stdin(worker, worker.send(request | {"answer": task.answer, "context": task.context}))

    def _watch_stdin(self, worker: _Worker, complete: bool) -> None:
        registered = worker.stdin in self._selector.get_map()
        if complete and registered:
            self._selector.unregister(worker.stdin)
        elif not complete and not registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)

    def _on_message(self, worker: _Worker) -> None:
        messages = worker.receive()
        if messages is None:
            return self._retire(worker, "the worker died", worker.was_killed())
        for message in messages:
            if "failed" in message and not worker.ready:
                raise RunError(f"the judge of kind {worker.group.kind} cannot start: {message['failed']}")
            if "ready" in message and not worker.ready:
                worker.ready, worker.deadline = True, float("inf")
            elif worker.task is None or message.get("id") != worker.message_id:
                return self._retire(worker, "the worker broke the protocol")
            elif "limit" in message:
                return self._retire(worker, str(message["limit"]))
            else:
                self._finish(worker, worker.task, message)
                if message.get("oversized"):
                    return self._retire(worker, "")
        return None

    def _finish(self, worker: _Worker, task: _Task, message: dict[str, Any]) -> None:
        worker.task, worker.deadline = None, float("inf")
        worker.num_judged += 1
        worker.group.num_failed_starts = 0
        worker.group.limits_left = min(LIMITS_A_BATCH, worker.group.limits_left + 1 / JUDGED_A_LIMIT)
        label: Any = message.get("label")
        shown = task.answer if len(task.answer) <= MAX_SHOWN_CHARS else task.answer[:200] + "…"
        why = str(message.get("why", ""))[:300]
        if label not in get_args(Label):
            verdict = Verdict("fault", shown, f"the judge failed: {str(message.get('error'))[:300]}")
        elif "score" in message:  # a user's function, which says itself what it read
            shown = message["extracted"]
            verdict = Verdict(label, None if shown is None else shown[:MAX_SHOWN_CHARS], why, message["score"])
        elif task.check != "reference":
            verdict = Verdict(label, shown, why)
        elif label == "correct":
            why = f"limit: {task.limits_hit[-1]}, twice"
            why += "" if task.is_users else "; the reference can be judged against itself"
            verdict = Verdict("unparsed", shown, why)
        else:
            verdict = Verdict("fault", shown, f"limit: {task.limits_hit[-1]}; and {why}")
        self._deliver(task, verdict)

    def _retire(self, worker: _Worker, why: str, killed: bool = False) -> None:
        """Kill `worker` (the next poll starts another) and decide what becomes of its task. `killed`: from outside."""
        group, task = worker.group, worker.task
        group.workers.remove(worker)
        self._selector.unregister(worker.stdout)
        self._watch_stdin(worker, True)
        stderr_tail = "" if worker.ready else worker.stderr_tail()
        worker.kill()
        if task is not None and killed:
            task.num_kills += 1
            if task.num_kills <= MAX_KILLS:
                group.retries.append(task)
            else:
                self._deliver(task, Verdict("fault", task.answer, f"{task.num_kills} workers were killed from outside"))
        elif task is not None:
            self._num_limits += 1
            if not worker.is_short:  # a short one is what the budget has bought
                group.limits_left = max(0.0, group.limits_left - 1)
            task.limits_hit.append(why)
            if len(task.limits_hit) < (2 if task.itself else 3):
                group.retries.append(task)
            else:
                self._deliver(task, Verdict("fault", task.answer, f"limit on the reference against itself: {why}"))
        elif worker.num_judged == 0:
            group.num_failed_starts += 1
            if group.num_failed_starts >= (MAX_KILLS if killed else MAX_FAILED_STARTS):
                waiting = "waiting for one to import its libraries and report that it is ready"
                start = f"the judge's workers do not start ({group.num_failed_starts} in a row, {waiting})"
                raise RunError(f"{start}: {why}. {stderr_tail}".rstrip())
        self._num_restarts += 1

    def _deliver(self, task: _Task, verdict: Verdict) -> None:
        with self._lock:
            del self._in_flight[task.key]
            # A verdict on an answer is always the same, unless it comes from a limit or a fault.
            if verdict.label != "fault" and not task.limits_hit and self._memo_size:
                self._memo[task.key] = verdict if task.is_users else replace(verdict, extracted=None)
                if len(self._memo) > self._memo_size:
                    self._memo.popitem(last=False)
            self._count(len(task.futures), verdict)
        for future in task.futures:
            future.set_result(verdict)


def _key(kind: str, answer: str, gold: Any, context: Context | None) -> bytes:
    # A digest, because some answers are long, and the memo keeps thousands.
    return hashlib.blake2b(json.dumps([kind, answer, gold, context], default=str).encode(), digest_size=32).digest()
