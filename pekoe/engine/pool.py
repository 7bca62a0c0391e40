"""Several engines as one: the only place that dispatches, retries, loses and revives engines.

Engines may be in this process, behind HTTP or in Ray actors. A member is `starting` until its engine is ready, `stale`
until it holds the current weights, then `serving`; `gone` once it is given up. What a lost engine was asked for is
asked of another one. Futures are resolved, and engines called, outside the lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np

from pekoe.core.errors import RunError
from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Completion, Record, Request, SamplingParams
from pekoe.engine.base import Engine, EngineKind, EngineLost, EngineStats, NoPlace, generate

_LOOK_S = 1.0  # between looks of the supervisor
_CLOSE_LIMIT_S = 20.0

State = Literal["starting", "stale", "serving", "gone"]


class Starter(Protocol):
    """Makes one engine, and makes it again after a loss."""

    @property
    def name(self) -> str:
        """For messages, such as "SGLang server 0"."""
        ...

    @property
    def kind(self) -> EngineKind: ...

    def start(self) -> Engine:
        """Block until the engine is ready. UserError or RunError where it cannot start; NoPlace where it cannot yet."""
        ...


@dataclass(eq=False, slots=True)
class _Item:
    """A request on its way to a completion."""

    request: Request
    future: Future[Completion]
    aborted: bool = False


@dataclass(eq=False, slots=True)
class Member:
    """One place in the pool."""

    number: int
    starter: Starter
    state: State = "starting"
    why: str = "not started"  # why it does not serve
    current: Engine | None = None
    items: set[_Item] = field(default_factory=set[_Item])  # asked of it, not finished
    failures: int = 0  # losses and failed starts since its last completion
    offloaded: bool = False
    error: Exception | None = None  # of the last start
    done: EngineStats = field(default_factory=EngineStats)  # of its engines that were lost
    progress: int = -1  # response tokens when it was last seen to get on
    seen: float = 0.0  # when that was

    @property
    def name(self) -> str:
        return self.starter.name

    @property
    def kind(self) -> EngineKind:
        return self.starter.kind

    @property
    def engine(self) -> Engine:
        assert self.current is not None, f"{self.name} is {self.state}"
        return self.current

    def room(self) -> float:
        most = self.engine.max_requests
        return float("inf") if most is None else most - len(self.items)


class EnginePool:
    """See the module. For sampling it is used as an `Engine`.

    Args:
        starters: make the engines; all start at once, in threads.
        start_limit_s: how long a start may take, and how long requests wait for an engine that can serve.
        silence_limit_s: an engine with unfinished requests that samples nothing and fails its health check for so long
            is lost. None: only its futures tell.
        restart: whether lost engines are started again.
        max_failures: losses or failed starts of a member, without a completion between them, after which it is gone.
        on_event: is told of each engine that is lost or comes back; may be called from any thread.
        serving_at_once: whether engines serve when they have started, without a publish before.
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
        self.members = tuple(Member(number, starter) for number, starter in enumerate(starters))
        self.num_lost = 0
        self._start_limit_s, self._silence_limit_s = start_limit_s, silence_limit_s
        self._restart, self._max_failures, self._on_event = restart, max_failures, on_event
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._units: deque[list[_Item]] = deque()  # wait for an engine; each is a group, or a part of one
        self._idle_since: float | None = None  # since when no member serves
        self._closed = False
        self._first_state: State = "serving" if serving_at_once else "stale"
        for member in self.members:
            self._begin_start(member, self._first_state)
        self._supervisor = threading.Thread(target=self._supervise, name="engine pool", daemon=True)
        self._supervisor.start()

    # Members

    def wait_started(self, view: ProgressReporter | None = None) -> None:
        """Until all have started. Raises the error of the first that cannot, or RunError after `start_limit_s`."""
        for member in track(view or NoProgress(), "engines", self.members):
            with self._changed:
                ended = lambda m=member: m.state in ("stale", "serving", "gone") or m.error is not None  # noqa: E731
                if not self._changed.wait_for(ended, self._start_limit_s):
                    raise RunError(f"{member.name} did not start within {self._start_limit_s:g} s")
                if member.error is not None:
                    raise member.error

    def in_state(self, *states: State) -> list[Member]:
        return [member for member in self.members if member.state in states]

    def stale(self, members: Iterable[Member] | None = None) -> None:
        """These (None: all that serve) get no new requests until `serve`; what is in flight goes on."""
        with self._changed:
            for member in self.members if members is None else members:
                if member.state == "serving":
                    member.state, member.why = "stale", "does not hold the current weights yet"

    def serve(self, member: Member) -> None:
        """It holds the current weights."""
        with self._changed:
            if member.state == "stale":
                member.state, member.why = "serving", ""
            self._changed.notify_all()
        self._dispatch()

    def lose(self, member: Member, why: str) -> None:
        """It serves no longer: its requests go to others, and it is started again in the background."""
        with self._changed:
            engine = member.current
            if engine is None or member.state in ("starting", "gone"):
                return
            with contextlib.suppress(Exception):  # the last that it tells
                member.done = _sum(member.done, engine.stats())
            member.current, member.offloaded = None, False
            self.num_lost += 1
            self._fail(member, why)
            aborted = [item for item in member.items if item.aborted]
            orphans = sorted(member.items.difference(aborted), key=lambda item: item.request.sample)
            for group in _grouped(orphans):
                self._units.appendleft(group)
            member.items.clear()
            again = member.state != "gone"
            self._changed.notify_all()
        for item in aborted:
            item.future.set_result(_nothing(item.request))
        self._on_event(f"{member.name} is lost: {why}" + ("; it is started again" if again else "; it is given up"))
        threading.Thread(target=_close_quietly, args=(engine,), name="close a lost engine", daemon=True).start()
        if again:
            self._begin_start(member, "stale")
        self._dispatch()

    def _fail(self, member: Member, why: str) -> None:
        member.failures += 1
        member.why = why
        given_up = not self._restart or member.failures >= self._max_failures
        member.state = "gone" if given_up else "starting"

    def _begin_start(self, member: Member, then: State) -> None:
        work = partial(self._start, member, then)
        threading.Thread(target=work, name=f"start {member.name}", daemon=True).start()

    def _start(self, member: Member, then: State) -> None:
        first = then == self._first_state and member.why == "not started"
        while True:
            try:
                engine = member.starter.start()
                break
            except Exception as error:
                with self._changed:
                    if not isinstance(error, NoPlace):
                        member.error = error
                        self._fail(member, str(error))
                        self._changed.notify_all()
                    ends = self._closed or member.state == "gone" or (first and member.error is not None)
                if ends:
                    self._dispatch()
                    return
            time.sleep(_LOOK_S)
        with self._changed:
            late = self._closed
            if not late:
                member.current, member.state, member.error = engine, then, None
                member.why = "" if then == "serving" else "holds no current weights yet"
                member.progress, member.seen = -1, time.monotonic()
            self._changed.notify_all()
        if late:
            _close_quietly(engine)
            return
        if not first:
            self._on_event(f"{member.name} came back")
        self._dispatch()

    # Sampling

    @property
    def version(self) -> int:
        """The oldest version that a serving engine samples from."""
        return min((member.engine.version for member in self.in_state("serving")), default=0)

    @property
    def max_sequence_tokens(self) -> int:
        return min(member.engine.max_sequence_tokens for member in self.in_state("stale", "serving"))

    def check(self, params: SamplingParams) -> None:
        """UserError for sampling that an engine cannot do."""
        for member in self.in_state("stale", "serving"):
            member.engine.check(params)

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. Requests of one group that are submitted together stay together."""
        items = [_Item(request, Future()) for request in requests]
        with self._changed:
            if self._closed:
                raise RunError("the engine pool is closed")
            for group in _grouped(items):
                self._units.append(group)
        rejected = self._dispatch()
        if rejected is not None and rejected[1] <= {item.future for item in items}:
            raise rejected[0]
        return [item.future for item in items]

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Completion]]:
        """See `Engine.generate`."""
        return generate(self, prompts, params)

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """See `Engine.abort`; also of what waits for an engine."""
        wanted = None if uids is None else set(uids)
        hit = lambda item: wanted is None or item.request.uid in wanted  # noqa: E731
        with self._changed:
            dropped = [item for unit in self._units for item in unit if hit(item)]
            left = ([item for item in unit if not hit(item)] for unit in self._units)
            self._units = deque(unit for unit in left if unit)
            for member in self.members:
                for item in member.items:
                    item.aborted |= hit(item)
            engines = [member.current for member in self.members if member.current is not None and member.items]
        for item in dropped:
            item.future.set_result(_nothing(item.request))
        for engine in engines:
            with contextlib.suppress(EngineLost):  # its futures tell
                engine.abort(wanted)

    def _dispatch(self) -> tuple[Exception, set[Future[Completion]]] | None:
        """Give waiting requests to engines with room, the highest priority first, each to the least loaded engine.

        Returns the error of an engine that refused requests as wrong, with their futures.
        """
        with self._changed:
            given = self._assign()
            dead = self._obituary()
            failed = [item for unit in self._units for item in unit] if dead else []
            if dead:
                self._units.clear()
        for item in failed:
            item.future.set_exception(RunError(dead))
        rejected = None
        for member, engine, items in given:
            try:
                inner = engine.submit([item.request for item in items])
            except EngineLost as error:
                self.lose(member, str(error))
                continue
            except Exception as error:  # UserError: nothing of the call is sampled
                with self._changed:
                    member.items.difference_update(items)
                for item in items:
                    item.future.set_exception(error)
                rejected = error, {item.future for item in items}
                continue
            for item, future in zip(items, inner, strict=True):
                future.add_done_callback(partial(self._finish, member, engine, item))
        return rejected

    def _assign(self) -> list[tuple[Member, Engine, list[_Item]]]:
        """Choose a member for each waiting unit while there is room. With the lock held."""
        given: dict[int, list[_Item]] = {}
        serving = self.in_state("serving")
        if any(unit[0].request.priority for unit in self._units):
            ordered = sorted(self._units, key=lambda unit: -unit[0].request.priority)  # stable
            self._units = deque(ordered)
        while self._units and serving:
            unit = self._units[0]
            member = min(serving, key=lambda m: (len(m.items), m.number))
            room = member.room()
            if room < len(unit) and member.items:
                break  # the least loaded has no room for all of it; it goes out as others end
            size = len(unit) if room >= len(unit) else max(1, int(room))  # larger than any engine's room: in parts
            part, rest = unit[:size], unit[size:]
            self._units.popleft()
            if rest:
                self._units.appendleft(rest)
            if not member.items:
                member.seen = time.monotonic()
            member.items.update(part)
            given.setdefault(member.number, []).extend(part)
        return [(self.members[number], self.members[number].engine, items) for number, items in given.items()]

    def _finish(self, member: Member, engine: Engine, item: _Item, future: Future[Completion]) -> None:
        """A request ended at `engine`. Runs in a thread of the engine's."""
        error = future.exception()
        if isinstance(error, EngineLost):
            if member.current is engine:
                self.lose(member, str(error))
            return
        with self._changed:
            ours = item in member.items  # else the engine was lost meanwhile, and the request is asked of another
            member.items.discard(item)
            if ours and error is None:
                member.failures, member.seen = 0, time.monotonic()
        if not ours:
            return
        if error is not None:
            item.future.set_exception(error)
        else:
            item.future.set_result(future.result())
        self._dispatch()

    # Watching

    def _supervise(self) -> None:
        while not self._closed:
            time.sleep(_LOOK_S)
            for member in self.in_state("serving"):
                self._look_at(member)
            self._dispatch()

    def _look_at(self, member: Member) -> None:
        """Lose an engine that is silent for too long."""
        limit, engine = self._silence_limit_s, member.current
        if limit is None or engine is None or not member.items:
            member.seen = time.monotonic()
            return
        with contextlib.suppress(EngineLost):
            progress = engine.stats().num_decode_tokens
            if progress != member.progress or engine.health():
                member.progress, member.seen = progress, time.monotonic()
        if time.monotonic() - member.seen > limit:
            self.lose(member, f"silent for {limit:g} s")

    def _obituary(self) -> str:
        """Why what waits waits in vain; empty while an engine serves or may come. With the lock held."""
        if self.in_state("serving"):
            self._idle_since = None
            return ""
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        waited = now - self._idle_since
        if self.in_state("stale") or (self.in_state("starting") and waited < self._start_limit_s):
            return ""
        lines = "\n".join(f"{member.name} is {member.state}: {member.why}" for member in self.members)
        return f"expected an engine that serves, got none of {len(self.members)}:\n{lines}"

    def check_alive(self) -> None:
        """RunError where no member serves, and none can come back."""
        with self._changed:
            dead = self._obituary()
        if dead:
            raise RunError(dead)

    # As an engine

    def flush_cache(self) -> None:
        for member in self.in_state("stale", "serving"):
            with contextlib.suppress(EngineLost):  # a request will tell
                member.engine.flush_cache()

    def offload(self) -> None:
        """Give the devices to the trainer. An engine that does not let go is lost."""
        for member in self.in_state("stale", "serving"):
            if not member.offloaded:
                self._switch(member, True)
        self.stale()

    def onload(self) -> None:
        """Take them back; weights must be published before anything is sampled."""
        for member in self.members:
            if member.offloaded:
                self._switch(member, False)

    def _switch(self, member: Member, off: bool) -> None:
        try:
            if off:
                member.engine.offload()
            else:
                member.engine.onload()
            member.offloaded = off
        except RunError as error:
            self.lose(member, f"{'offload' if off else 'onload'}: {error}")

    def health(self) -> bool:
        """Whether an engine serves, and all that serve answer."""
        serving = self.in_state("serving")
        return bool(serving) and all(member.engine.health() for member in serving)

    def stats(self) -> EngineStats:
        """Sums over all engines, lost ones too."""
        total = EngineStats()
        for member in self.members:
            total = _sum(total, member.done)
            if member.current is not None:
                with contextlib.suppress(EngineLost):
                    total = _sum(total, member.current.stats())
        return total

    def close(self) -> None:
        """Close all engines; what is unfinished ends with RunError."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            waiting = [item for unit in self._units for item in unit]
            self._units.clear()
            engines = [member.current for member in self.members if member.current is not None]
            self._changed.notify_all()
        for item in waiting:
            item.future.set_exception(RunError("the engine pool is closed"))
        threads = [threading.Thread(target=_close_quietly, args=(engine,), daemon=True) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_CLOSE_LIMIT_S)
        with self._changed:
            left = [item for member in self.members for item in member.items]
            for member in self.members:
                member.items.clear()
        for item in left:
            item.future.set_exception(RunError("the engine pool is closed"))


def _grouped(items: Iterable[_Item]) -> list[list[_Item]]:
    """Neighbours of the same (uid, draw) and priority together."""
    groups: dict[tuple[str, int, int], list[_Item]] = {}
    for item in items:
        groups.setdefault((item.request.uid, item.request.draw, item.request.priority), []).append(item)
    return list(groups.values())


def _nothing(request: Request) -> Completion:
    """Of a request that was aborted before an engine had it."""
    return Completion(0, "abort", (), Record.of(request.tokens, np.empty(0, np.int64), np.empty(0, np.float32)))


def _sum(a: EngineStats, b: EngineStats) -> EngineStats:
    return a.plus(
        num_prefill_tokens=b.num_prefill_tokens,
        num_cached_tokens=b.num_cached_tokens,
        num_shared_tokens=b.num_shared_tokens,
        num_decode_tokens=b.num_decode_tokens,
        num_forwards=b.num_forwards,
        num_preemptions=b.num_preemptions,
        busy_s=b.busy_s,
    )


def _close_quietly(engine: Engine) -> None:
    with contextlib.suppress(Exception):  # it is lost, or we are going
        engine.close()
