"""Several engines as one: the only place that dispatches, retries, loses and revives engines.

A member is `starting` until its engine is ready, `stale` until it holds the current weights, then `serving`; it is
`gone` once it is given up. The requests of a lost engine are sent to others.

An unfinished request is in one place, under the lock: it waits in `_units`, or is among a member's `items` with the
engine that has it. Who takes it out of there ends its future, so each future ends once. Futures are ended, and engines
called, outside the lock.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np

from pekoe.core.errors import RunError, UserError
from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Completion, Record, Request, SamplingParams
from pekoe.engine.base import Engine, EngineKind, EngineLost, EngineStats, NoPlace, Sampler

_LOOK_S = 1.0  # between looks of the supervisor, and between attempts to start an engine again
_POLL_S = 0.01  # while engines start for the first time
_PLACED_S = 5.0  # a start that takes longer than this has found a place
_CLOSE_LIMIT_S = 20.0
_CLOSED = "the engine pool is closed"
_NOT_CURRENT = "it does not hold the current weights yet"

State = Literal["starting", "stale", "serving", "gone"]


class Starter(Protocol):
    """Makes one engine, and makes it again after a loss. `name` is for messages, such as "SGLang server 0"."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> EngineKind: ...

    def start(self) -> Engine:
        """Block until a new engine is ready. UserError or RunError where it cannot start, NoPlace where not yet."""
        ...


@dataclass(eq=False, slots=True)
class _Item:
    """A request on its way to a completion."""

    request: Request
    order: int  # of submission
    future: Future[Completion] = field(default_factory=Future[Completion])
    engine: Engine | None = None  # that has it, or is about to get it
    inner: Future[Completion] | None = None  # that engine's, once it has the request
    aborted: bool = False


@dataclass(eq=False, slots=True)
class Member:
    """One place in the pool."""

    number: int
    starter: Starter
    name: str
    kind: EngineKind
    state: State = "starting"
    why: str = "it has not started yet"  # why it does not serve
    current: Engine | None = None
    items: set[_Item] = field(default_factory=set[_Item])  # unfinished, at its engine
    failures: int = 0  # losses and failed starts since its last completion
    offloaded: bool = False
    since: float = field(default_factory=time.monotonic)  # when the last attempt to start it began
    unplaced: bool = False  # the last attempt ended with NoPlace
    last: EngineStats = field(default_factory=EngineStats)  # of its engine, as it last answered
    before: EngineStats = field(default_factory=EngineStats)  # of its engines that were lost
    num_computed: int = -1  # tokens, when the supervisor last looked
    seen: float = 0.0  # when that had grown, or the engine was healthy

    @property
    def engine(self) -> Engine:
        """EngineLost where it has none now."""
        engine = self.current
        if engine is None:
            raise EngineLost(f"{self.name} is {self.state}: {self.why}")
        return engine


class EnginePool(Sampler):
    """See the module. For sampling it is used as an `Engine`.

    Args:
        starters: make the engines; all start at once, in threads.
        start_limit_s: how long the first starts may take, and how long requests wait where no engine serves or starts.
        silence_limit_s: an engine with unfinished requests that computes nothing for so long is lost; a server only
            where its health check fails too, since its tokens are counted at the ends of responses. None: only its
            futures tell.
        restart: whether lost engines are started again.
        max_failures: losses or failed starts of a member, without a completion between them, after which it is gone.
        on_event: called with a sentence on each engine that is lost or comes back, from any thread.
        serving_at_once: whether engines serve when they have started, without a publish before. After a loss they wait
            for one in any case.
    """

    def __init__(
        self,
        starters: Sequence[Starter],
        *,
        start_limit_s: float,
        silence_limit_s: float | None = None,
        restart: bool = True,
        max_failures: int = 5,
        on_event: Callable[[str], None] = lambda _: None,
        serving_at_once: bool = False,
    ) -> None:
        self.members = tuple(Member(i, starter, starter.name, starter.kind) for i, starter in enumerate(starters))
        self.num_lost = 0
        self._start_limit_s, self._silence_limit_s = start_limit_s, silence_limit_s
        self._restart, self._max_failures, self._on_event = restart, max_failures, on_event
        self._start_error: Exception | None = None  # of an engine that never started
        self._first_state: State = "serving" if serving_at_once else "stale"
        self._lock = threading.RLock()
        self._units: list[tuple[int, int, list[_Item]]] = []  # a heap: (-priority, order, a group or a part of one)
        self._orders = itertools.count()
        self._hopeful = time.monotonic()  # when an engine last served, or could come
        self._closed = threading.Event()
        for member in self.members:
            _in_thread(f"start {member.name}", self._start, member, None)
        self._supervisor = _in_thread("engine pool", self._supervise)

    # Members

    def wait_started(self, view: ProgressReporter | None = None, check: Callable[[], None] = lambda: None) -> None:
        """Until all have started. Raises the error of the first that cannot, or RunError after `start_limit_s`; or what
        `check` raises, which is called meanwhile."""
        end = time.monotonic() + self._start_limit_s
        for member in track(view or NoProgress(), "engines", self.members):
            while member.state == "starting" and self._start_error is None:
                if time.monotonic() > end:
                    raise RunError(f"{member.name} did not start within {self._start_limit_s:g} s: {member.why}")
                check()
                time.sleep(_POLL_S)
            if self._start_error is not None:
                raise self._start_error
            self._check_open()

    def in_state(self, *states: State) -> list[Member]:
        return [member for member in self.members if member.state in states]

    def _engines(self, *states: State) -> list[Engine]:
        return [member.current for member in self.in_state(*states) if member.current is not None]

    def stale(self, members: Iterable[Member] | None = None) -> None:
        """These (None: all that serve) get no new requests until `serve`; what is in flight goes on."""
        with self._lock:
            for member in self.members if members is None else members:
                if member.state == "serving":
                    member.state, member.why = "stale", _NOT_CURRENT

    def serve(self, member: Member, engine: Engine | None = None) -> None:
        """It holds the current weights; nothing happens where it has another engine than `engine` by now."""
        with self._lock:
            if member.state == "stale" and engine in (None, member.current):
                member.state, member.why, member.seen = "serving", "", time.monotonic()
        self._dispatch()

    def lose(self, member: Member, why: str, engine: Engine | None = None) -> None:
        """Give its requests to others, and start it again; nothing happens where it has another engine by now."""
        with self._lock:
            lost = member.current
            if lost is None or self._closed.is_set() or engine not in (None, lost):
                return
            member.current, member.offloaded = None, False
            member.before, member.last = member.before + member.last, EngineStats()
            self.num_lost += 1
            again = self._fail(member, why, self._restart)
            items = set(member.items)
            aborted = {item for item in items if item.aborted}
            self._remove(items)
            self._enqueue(items - aborted)
        _end(aborted)
        self._on_event(f"{member.name} is lost: {why}; it is {'started again' if again else 'given up'}")
        _in_thread(f"start {member.name}", self._start, member, lost)
        self._dispatch()

    def _fail(self, member: Member, why: str, may_restart: bool) -> bool:
        """Count a failure; returns whether the member is started again. With the lock held."""
        member.failures, member.unplaced = member.failures + 1, False
        again = may_restart and member.failures < self._max_failures
        member.state, member.why = ("starting" if again else "gone"), why
        return again

    def _start(self, member: Member, lost: Engine | None) -> None:
        """Close the engine that was lost, which may hold the place, and start one until that succeeds."""
        if lost is not None:
            _close([lost])
        while member.state == "starting" and not self._closed.is_set():
            member.since = time.monotonic()
            try:
                engine = member.starter.start()
            except NoPlace as error:
                member.unplaced, member.why = True, str(error)
            except Exception as error:
                if self._closed.is_set():
                    return  # what it starts in was closed, too
                if lost is None:
                    self._start_error = error
                with self._lock:
                    again = self._fail(member, str(error), lost is not None)  # the user mends what never started
                if lost is not None:
                    self._on_event(
                        f"{member.name} did not start: {error}; it is {'tried again' if again else 'given up'}"
                    )
            else:
                with self._lock:
                    closed = self._closed.is_set()
                    if not closed:
                        member.current, member.unplaced = engine, False
                        member.state, member.why = (self._first_state if lost is None else "stale"), _NOT_CURRENT
                if closed:
                    _close([engine])
                elif lost is not None:
                    self._on_event(f"{member.name} came back")
            self._closed.wait(_LOOK_S if member.state == "starting" else 0)
        self._dispatch()

    # Sampling

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. Requests of one group that are submitted together stay together.

        A future that its caller cancels ends its request, as far as its engine can: some sample it to its end.
        """
        with self._lock:
            self._check_open()
            items = [_Item(request, next(self._orders)) for request in requests]
            self._enqueue(items)
        self._dispatch()
        for item in items:
            error = item.future.exception() if item.future.done() else None
            if isinstance(error, UserError):
                with self._lock:
                    others = self._remove(items)  # nobody waits for them
                for future in others:
                    future.cancel()
                raise error
        for item in items:
            item.future.add_done_callback(partial(self._drop, item))
        return [item.future for item in items]

    def _drop(self, item: _Item, future: Future[Completion]) -> None:
        """Its caller may have cancelled it, anywhere on its way."""
        if not future.cancelled():
            return
        with self._lock:
            inner = self._remove([item])
        for one in inner:
            one.cancel()
        self._dispatch()  # its place is free

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """See `Engine.abort`; also of what waits for an engine."""
        wanted = None if uids is None else set(uids)
        with self._lock:
            hit = [item for item in self._unfinished() if wanted is None or item.request.uid in wanted]
            ended = [item for item in hit if item.inner is None]
            self._remove(ended)
            for item in hit:
                item.aborted = True
            members = [member for member in self.members if not member.items.isdisjoint(hit)]
        _end(ended)
        self._each(members, "abort", lambda engine: engine.abort(wanted))

    def _unfinished(self) -> list[_Item]:
        waiting = [item for _, _, unit in self._units for item in unit]
        return waiting + [item for member in self.members for item in member.items]

    def _remove(self, items: Iterable[_Item]) -> list[Future[Completion]]:
        """Take items from where they are; returns the engines' futures of those that engines have. Lock held."""
        gone = set(items)
        if any(item.engine is None for item in gone):
            left = ([item for item in unit if item not in gone] for _, _, unit in self._units)
            self._units = [_entry(unit) for unit in left if unit]
            heapq.heapify(self._units)
        for member in self.members:
            member.items -= gone
        futures = [item.inner for item in gone if item.inner is not None]
        for item in gone:
            item.engine = item.inner = None
        return futures

    def _enqueue(self, items: Iterable[_Item]) -> None:
        """Have items wait, those of one group together. In the order of submission: what was lost is first in line."""
        groups: dict[tuple[str, int, int], list[_Item]] = {}
        for item in sorted(items, key=lambda item: item.order):
            request = item.request
            groups.setdefault((request.uid, request.draw, request.priority), []).append(item)
        for group in groups.values():
            heapq.heappush(self._units, _entry(group))

    def _dispatch(self) -> None:
        """Give waiting requests to engines with room; end them where no engine can come."""
        with self._lock:
            given, hopeless = self._assign(), self._hopeless()
            ended = self._unfinished() if hopeless else []
            self._remove(ended)
        _end(ended, RunError(hopeless))
        for member, engine, items in given:
            try:
                futures = engine.submit([item.request for item in items])
            except Exception as error:  # nothing of the call is sampled
                failed: Future[Completion] = Future()
                failed.set_exception(error)
                futures = [failed] * len(items)
            for item, future in zip(items, futures, strict=True):
                with self._lock:
                    kept = item.engine is engine
                    item.inner = future if kept else item.inner
                if kept:
                    future.add_done_callback(partial(self._finish, member, engine, item))
                else:  # aborted or lost on its way
                    future.cancel()

    def _assign(self) -> list[tuple[Member, Engine, list[_Item]]]:
        """Choose the least loaded engine with room for each waiting unit, the highest priority first. Lock held."""
        given: dict[Member, list[_Item]] = {}
        most = {member: member.engine.max_requests or float("inf") for member in self.in_state("serving")}
        while self._units:
            unit = self._units[0][2]  # it waits for room for all of it, or for a free engine and is split
            fitting = [member for member in most if most[member] - len(member.items) >= min(len(unit), most[member])]
            if not fitting:
                break
            member = min(fitting, key=lambda member: len(member.items))
            heapq.heappop(self._units)
            size = int(min(len(unit), most[member]))
            if unit[size:]:
                heapq.heappush(self._units, _entry(unit[size:]))
            if not member.items:
                member.seen = time.monotonic()
            for item in unit[:size]:
                item.engine = member.current
            member.items.update(unit[:size])
            given.setdefault(member, []).extend(unit[:size])
        return [(member, member.engine, sorted(items, key=lambda item: item.order)) for member, items in given.items()]

    def _finish(self, member: Member, engine: Engine, item: _Item, future: Future[Completion]) -> None:
        """A request ended at `engine`. Runs in a thread of the engine's."""
        with self._lock:
            if item.engine is not engine:
                return
            error = EngineLost("it dropped a request") if future.cancelled() else future.exception()
            if not isinstance(error, EngineLost):
                self._remove([item])
            if error is None:
                member.failures, member.seen = 0, time.monotonic()
        if isinstance(error, EngineLost):
            self.lose(member, str(error), engine)
        elif error is not None:
            _settle(item, error)  # many may fail in a row: the supervisor dispatches
        else:
            _settle(item, future.result())
            self._dispatch()

    # Watching

    def _supervise(self) -> None:
        while not self._closed.wait(_LOOK_S):
            for member in self.in_state("serving"):
                self._look_at(member)
            self._dispatch()

    def _look_at(self, member: Member) -> None:
        """Lose an engine that is silent for too long."""
        limit, engine = self._silence_limit_s, member.current
        if limit is None or engine is None or not member.items:
            return
        stats, now = self._stats_of(member), time.monotonic()
        num_computed = stats.num_prefill_tokens + stats.num_decode_tokens
        silent = num_computed == member.num_computed and now - member.seen > limit
        if silent and (member.kind == "embedded" or not engine.health()):
            self.lose(member, f"silent for {limit:g} s", engine)
        elif silent or num_computed != member.num_computed:
            member.num_computed, member.seen = num_computed, now

    def _hopeless(self) -> str:
        """Why requests wait in vain; empty while an engine serves or may come. With the lock held.

        A stale engine may come however long it takes: a publish makes it serve, or ends the run.
        """
        now, limit, starting = time.monotonic(), self._start_limit_s, self.in_state("starting")
        in_time = [member for member in starting if now - member.since < limit]
        placed = [member for member in in_time if not member.unplaced or now - member.since > _PLACED_S]
        if placed or self.in_state("stale", "serving"):
            self._hopeful = now
            return ""
        if now - self._hopeful < limit and any(member.unplaced for member in starting):
            return ""
        lines = "\n".join(f"{member.name} is {member.state}: {member.why}" for member in self.members)
        return f"expected an engine that serves, got none of {len(self.members)}:\n{lines}"

    def check_alive(self) -> None:
        """RunError where no member serves, and none can come back."""
        with self._lock:
            self._check_open()
            hopeless = self._hopeless()
        if hopeless:
            raise RunError(hopeless)

    # As an engine

    @property
    def version(self) -> int:
        """The oldest version that a serving engine samples from."""
        return min((engine.version for engine in self._engines("serving")), default=0)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with response that fits every engine that has started; 0 where none has."""
        return min((engine.max_sequence_tokens for engine in self._engines("stale", "serving")), default=0)

    def check(self, params: SamplingParams) -> None:
        """UserError for sampling that an engine cannot do."""
        self._each(self.in_state("stale", "serving"), "check", lambda engine: engine.check(params))

    def flush_cache(self) -> None:
        """See `Engine.flush_cache`. Of those that serve: others get new weights, which flush it, before they do."""
        self._each(self.in_state("serving"), "flush", lambda engine: engine.flush_cache())

    def offload(self) -> None:
        """Give the devices to the trainer. An engine that does not let go is lost."""
        self.stale()
        members = [member for member in self.in_state("stale") if not member.offloaded]
        self._each(members, "offload", lambda engine: engine.offload(), True)

    def onload(self) -> None:
        """Take them back; weights must be published before anything is sampled."""
        self._each([m for m in self.members if m.offloaded], "onload", lambda engine: engine.onload(), False)

    def _each(
        self, members: list[Member], what: str, call: Callable[[Engine], None], offloaded: bool | None = None
    ) -> None:
        """Call each member's engine, all at once. One that fails is lost; the others are `offloaded` afterwards."""

        def one(member: Member) -> None:
            engine = member.current
            if engine is None:
                return
            try:
                call(engine)
            except RunError as error:
                self.lose(member, f"{what}: {error}", engine)
            with self._lock:
                if offloaded is not None and member.current is engine:
                    member.offloaded = offloaded

        with ThreadPoolExecutor(max(1, len(members)), what) as threads:
            list(threads.map(one, members))

    def health(self) -> bool:
        """Whether an engine serves, and all that serve answer."""
        engines = self._engines("serving")
        return bool(engines) and all(engine.health() for engine in engines)

    def stats(self) -> EngineStats:
        """Sums over all engines, lost ones too."""
        return sum((self._stats_of(member) for member in self.members), EngineStats())

    def _stats_of(self, member: Member) -> EngineStats:
        """Over a member's engines; of one that cannot answer as it did last: counters only grow."""
        engine, stats = member.current, None
        with contextlib.suppress(RunError):
            stats = engine.stats() if engine is not None else None
        with self._lock:
            if stats is not None and member.current is engine:
                member.last = stats
            return member.before + member.last

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RunError(_CLOSED)

    def close(self) -> None:
        """Close all engines; what is unfinished ends with RunError."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            unfinished, engines = self._unfinished(), self._engines("stale", "serving")
            self._remove(unfinished)
            for member in self.members:
                member.current, member.state, member.why = None, "gone", _CLOSED
        _end(unfinished, RunError(_CLOSED))
        _close(engines)
        if self._supervisor is not threading.current_thread():
            self._supervisor.join(_CLOSE_LIMIT_S)  # it would free the engines while the interpreter ends


def _entry(unit: list[_Item]) -> tuple[int, int, list[_Item]]:
    return -unit[0].request.priority, unit[0].order, unit


def _end(items: Iterable[_Item], error: Exception | None = None) -> None:
    """End the futures of removed items, with an error or as aborted before an engine sampled anything that counts."""
    for item in items:
        record = Record.of(item.request.tokens, np.empty(0, np.int64), np.empty(0, np.float32))
        _settle(item, error or Completion(0, "abort", (), record))


def _settle(item: _Item, outcome: Completion | BaseException) -> None:
    """End its future, unless its caller has cancelled it."""
    if item.future.cancelled() or not item.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def _in_thread(name: str, work: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _close(engines: Iterable[Engine]) -> None:
    """Close engines, all at once; one that hangs is left."""

    def close(engine: Engine) -> None:
        with contextlib.suppress(Exception):  # it is lost, or nobody needs it any more
            engine.close()

    threads = [_in_thread("close an engine", close, engine) for engine in engines]
    for thread in threads:
        thread.join(_CLOSE_LIMIT_S)
