"""The engine pool, on engines that do what the test says: every future ends once, whatever happens."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, FinishReason, Record, Request, SamplingParams
from pekoe.engine import pool as pool_module
from pekoe.engine.base import Engine, EngineKind, EngineLost, EngineStats, NoPlace, requests_of
from pekoe.engine.pool import EnginePool, Member


def until(holds: Callable[[], object], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class FakeEngine:
    """Holds requests until the test ends them."""

    max_sequence_tokens, num_workers = 100, 1

    def __init__(self, max_requests: int | None, kind: EngineKind) -> None:
        self.kind: EngineKind = kind
        self.max_requests, self.version = max_requests, 0
        self.calls: list[list[Request]] = []
        self.held: dict[Future[Completion], Request] = {}
        self.done: list[str] = []  # what else it was asked for
        self.closed, self.healthy, self.num_tokens = False, True, 0
        self.errors: dict[str, Exception] = {}  # by method, raised once
        self.gate = threading.Event()
        self.gate.set()
        self.in_submit = threading.Event()

    def _call(self, name: str) -> None:
        if name != "submit":
            self.done.append(name)
        if name in self.errors:
            raise self.errors.pop(name)
        if self.closed:
            raise RunError("the engine is closed")

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        self.in_submit.set()
        assert self.gate.wait(10)
        if any(not len(request.tokens) for request in requests):
            raise UserError("expected at least one token, got none")
        self._call("submit")
        self.calls.append(list(requests))
        new: dict[Future[Completion], Request] = {Future(): request for request in requests}
        self.held |= new
        return list(new)

    def end(self, number: int | None = None, finish: FinishReason = "stop") -> None:
        """End the oldest requests."""
        for future, request in list(self.held.items())[:number]:
            if self.held.pop(future, None) is not None and future.set_running_or_notify_cancel():
                self.num_tokens += 1
                record = Record.of(request.tokens, np.array([request.sample]), np.zeros(1, np.float32))
                future.set_result(Completion(1, finish, ((self.version, 0),), record))

    def die(self) -> None:
        """All futures say so, but for what was ended by the first of them."""
        self.errors["submit"] = EngineLost("it died")
        for future in list(self.held):
            if self.held.pop(future, None) is not None and future.set_running_or_notify_cancel():
                future.set_exception(EngineLost("it died"))

    def abort(self, uids: Iterable[str] | None = None) -> None:
        self._call("abort")
        wanted = None if uids is None else set(uids)
        for future, request in list(self.held.items()):
            hit = (wanted is None or request.uid in wanted) and self.held.pop(future, None) is not None
            if hit and future.set_running_or_notify_cancel():
                empty = Record.of(request.tokens, np.empty(0, np.int64), np.empty(0, np.float32))
                future.set_result(Completion(0, "abort", (), empty))

    def check(self, params: SamplingParams) -> None:
        self._call("check")

    def flush_cache(self) -> None:
        self._call("flush_cache")

    def offload(self) -> None:
        self._call("offload")

    def onload(self) -> None:
        self._call("onload")

    def health(self) -> bool:
        return self.healthy

    def stats(self) -> EngineStats:
        return EngineStats(num_decode_tokens=self.num_tokens)

    def close(self) -> None:
        self.closed = True
        for future in list(self.held):
            if self.held.pop(future, None) is not None and future.set_running_or_notify_cancel():
                future.set_exception(RunError("the engine was closed while requests were unfinished"))


class FakeStarter:
    def __init__(self, number: int, max_requests: int | None, kind: EngineKind = "sglang") -> None:
        self.name, self.kind, self.max_requests = f"engine {number}", kind, max_requests
        self.engines: list[FakeEngine] = []
        self.errors: list[Exception] = []  # of the next starts
        self.may_start = threading.Event()
        self.may_start.set()

    def start(self) -> Engine:
        assert self.may_start.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        self.engines.append(FakeEngine(self.max_requests, self.kind))
        return cast(Engine, self.engines[-1])

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]


class Pool(EnginePool):
    """An EnginePool on fake engines, with what it said."""

    def __init__(self, *sizes: int | None, **options: Any) -> None:
        self.starters = [FakeStarter(i, size) for i, size in enumerate(sizes)]
        self.prepare(self.starters)
        self.said: list[str] = []
        options = {"start_limit_s": 10.0, "serving_at_once": True, "on_event": self.said.append} | options
        super().__init__(self.starters, **options)

    def prepare(self, starters: list[FakeStarter]) -> None: ...

    @property
    def engines(self) -> list[FakeEngine]:
        return [starter.engine for starter in self.starters]

    def revive(self) -> None:
        """Wait until lost engines are back, and have them serve."""
        until(lambda: not self.in_state("starting"))
        for member in self.in_state("stale"):
            self.serve(member)

    def end_all(self) -> None:
        while any(engine.held for engine in self.engines):
            for engine in self.engines:
                engine.end()


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Looks are quick, and no callback of a future raises: a second end of one would."""
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.01)
    with caplog.at_level(logging.ERROR):
        yield
        assert caplog.records == []


@pytest.fixture
def make() -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def open_pool(*sizes: int | None, **options: Any) -> Pool:
        pools.append(Pool(*sizes, **options))
        pools[-1].wait_started()
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()
        assert not any(member.items for member in pool.members)


Make = Callable[..., Pool]


def group(uid: str, n: int = 1, priority: int = 0) -> list[Request]:
    return requests_of(uid, 0, [1, 2], SamplingParams(n=n), priority)


def names(requests: Iterable[Request]) -> list[str]:
    return [f"{request.uid}{request.sample}" for request in requests]


def results(futures: Sequence[Future[Completion]]) -> list[int]:
    return [int(future.result(10).tokens[0]) for future in futures]


# Dispatch


def test_one_engine_gets_a_submit_as_it_is(make: Make):
    pool = make(None)
    a, b = group("a", 2), group("b", 2)
    mixed = [a[1], b[0], a[0], b[1]]
    futures = pool.submit(mixed)
    assert pool.engines[0].calls == [mixed]
    pool.end_all()
    assert results(futures) == [1, 0, 0, 1]
    assert pool.submit([]) == []


def test_groups_stay_together_at_the_least_loaded(make: Make):
    pool = make(None, None, None)
    futures = pool.submit([*group("a", 4), *group("b", 2), *group("c", 3), *group("d", 2), *group("e", 1)])
    assert [names(engine.calls[0]) for engine in pool.engines] == [
        ["a0", "a1", "a2", "a3"],
        ["b0", "b1", "d0", "d1"],
        ["c0", "c1", "c2", "e0"],
    ]
    pool.end_all()
    assert len(results(futures)) == 12


def test_a_slow_engine_does_not_hold_the_tail(make: Make):
    pool = make(2, 2)
    futures = pool.submit([request for i in range(6) for request in group(f"{i}", 2)])
    slow, quick = pool.engines
    while quick.held:
        quick.end()
    assert len(slow.held) == 2
    assert sum(future.done() for future in futures) == 10
    pool.end_all()
    assert all(future.done() for future in futures)
    assert max(len(call) for engine in pool.engines for call in engine.calls) == 2


def test_a_group_above_the_room_is_split(make: Make):
    pool = make(3)
    futures = pool.submit([*group("a", 7), *group("b", 1)])
    pool.end_all()
    assert [names(call) for call in pool.engines[0].calls] == [["a0", "a1", "a2"], ["a3", "a4", "a5"], ["a6"], ["b0"]]
    assert results(futures) == [*range(7), 0]


def test_higher_priority_goes_first_then_order(make: Make):
    pool = make(1)
    futures = pool.submit([*group("a"), *group("b"), *group("c", priority=1), *group("d", priority=2), *group("e")])
    pool.end_all()
    assert [call[0].uid for call in pool.engines[0].calls] == ["d", "c", "a", "b", "e"]
    results(futures)


def test_wrong_requests_raise_at_the_call(make: Make):
    pool = make(None, None)
    with pytest.raises(UserError, match="at least one token"):
        pool.submit([*group("good"), Request("bad", 0, 0, np.empty(0, np.int64), SamplingParams())])
    assert not any(member.items for member in pool.members)
    future = pool.submit(group("later"))
    pool.end_all()
    results(future)


def test_stale_members_get_nothing_new_and_finish_what_they_have(make: Make):
    pool = make(None, None)
    futures = pool.submit([*group("a"), *group("b")])
    pool.stale([pool.members[0]])
    futures += pool.submit([*group("c"), *group("d")])
    assert [len(engine.held) for engine in pool.engines] == [1, 3]
    pool.stale()
    futures += pool.submit(group("e"))
    pool.end_all()
    assert [future.done() for future in futures] == [True] * 4 + [False]
    pool.serve(pool.members[0])
    pool.end_all()
    results(futures)


# Loss and revival


def test_what_a_lost_engine_had_goes_to_others_first_in_line(make: Make):
    pool = make(4, 4)
    futures = pool.submit([request for i in range(6) for request in group(f"{i}", 2)])
    first, second = pool.engines
    first.end(1)
    first.die()
    assert "it is started again" in pool.said[0]
    assert pool.said[0].startswith("engine 0 is lost: it died")
    second.end()
    sent = [names(call) for call in second.calls[1:]]
    assert sent == [["01"], ["20", "21"]]  # neither what came back already nor a part of a group
    while second.held:
        second.end()
    assert sorted(results(futures)) == [0] * 6 + [1] * 6
    assert pool.num_lost == 1
    until(lambda: pool.members[0].state == "stale")
    assert pool.said[1:] == ["engine 0 came back"]
    assert first.closed
    assert pool.stats().num_decode_tokens >= second.num_tokens


def test_all_lost_then_revived(make: Make):
    pool = make(None, None)
    futures = pool.submit([*group("a", 3), *group("b", 3)])
    for engine in pool.engines:
        engine.die()
    assert not any(future.done() for future in futures)
    pool.revive()
    until(lambda: sum(len(engine.held) for engine in pool.engines) == 6)
    pool.end_all()
    assert results(futures) == [0, 1, 2] * 2


def test_without_restart_all_lost_ends_what_waits(make: Make):
    pool = make(None, None, restart=False)
    futures = pool.submit([*group("a"), *group("b"), *group("c")])
    for engine in pool.engines:
        engine.die()
    for future in futures:
        with pytest.raises(RunError, match=r"got none of 2:\nengine 0 is gone: it died\nengine 1 is gone: it died"):
            future.result(10)
    with pytest.raises(RunError, match="got none of 2"):
        pool.submit(group("d"))[0].result(10)
    with pytest.raises(RunError, match="got none of 2"):
        pool.check_alive()


def test_failures_in_a_row_are_counted_between_completions(make: Make):
    pool = make(None, max_failures=2)
    for _ in range(3):
        future = pool.submit(group("a"))
        pool.engines[0].end()
        results(future)
        pool.engines[0].die()
        pool.lose(pool.members[0], "asked for")
        pool.revive()
    pool.lose(pool.members[0], "again")
    assert pool.members[0].state == "gone"
    assert pool.said[-1] == "engine 0 is lost: again; it is given up"


def test_errors_that_are_not_losses_end_the_request(make: Make):
    pool = make(None)
    futures = pool.submit(group("a", 2))
    inner = next(iter(pool.engines[0].held))
    del pool.engines[0].held[inner]
    inner.set_exception(RunError("not finite"))
    with pytest.raises(RunError, match="not finite"):
        futures[0].result(10)
    assert pool.num_lost == 0
    pool.end_all()
    results(futures[1:])


@pytest.mark.parametrize("error", [EngineLost("it is gone"), None], ids=["lost in the call", "closed meanwhile"])
def test_an_engine_lost_while_it_is_asked(make: Make, error: Exception | None):
    pool = make(None)
    old = pool.engines[0]
    old.gate.clear()
    futures: list[Future[Completion]] = []
    caller = threading.Thread(target=lambda: futures.extend(pool.submit(group("a", 2))))
    caller.start()
    assert old.in_submit.wait(10)
    if error is not None:
        old.errors["submit"] = error
    else:
        pool.lose(pool.members[0], "asked for")
        until(lambda: old.closed)
    old.gate.set()
    caller.join(10)
    pool.revive()
    until(lambda: len(pool.engines[0].held) == 2)
    old.end()
    assert not any(future.done() for future in futures)
    pool.end_all()
    assert results(futures) == [0, 1]


@pytest.mark.parametrize("kind", ["sglang", "embedded"])
def test_silent_engines_are_lost(kind: EngineKind):
    class Kinds(Pool):
        def prepare(self, starters: list[FakeStarter]) -> None:
            for starter in starters:
                starter.kind = kind

    pool = Kinds(None, silence_limit_s=0.05)
    pool.wait_started()
    futures = pool.submit(group("a"))
    engine = pool.engines[0]
    for _ in range(30):  # it gets on
        engine.num_tokens += 1
        time.sleep(0.005)
    if kind == "sglang":  # whose tokens are counted at the ends of responses
        time.sleep(0.1)
        assert pool.num_lost == 0
        engine.healthy = False
    until(lambda: pool.num_lost == 1)
    assert "silent for 0.05 s" in pool.said[0]
    pool.revive()
    pool.end_all()
    results(futures)
    time.sleep(0.1)  # nothing to do is not silence
    assert pool.num_lost == 1
    pool.close()


# Starts


class FailingPool(Pool):
    error: Exception = UserError("engine.server.python: expected a file")

    def prepare(self, starters: list[FakeStarter]) -> None:
        starters[0].may_start.clear()
        starters[1].errors = [self.error] * 10_000


def test_the_first_that_cannot_start_raises_its_error_as_it_came():
    pool = FailingPool(None, None)
    with pytest.raises(UserError, match="expected a file"):
        pool.wait_started()  # though another still starts
    pool.starters[0].may_start.set()
    pool.close()
    until(lambda: all(starter.engine.closed for starter in pool.starters[:1] if starter.engines))


def test_an_engine_that_cannot_start_because_all_was_closed_is_no_event():
    pool = Pool(None, None)
    pool.wait_started()
    starter = pool.starters[0]
    starter.may_start.clear()
    starter.errors = [RunError("Ray has not been started yet")]
    futures, before = pool.submit(group("0")), pool.members[0].since
    starter.engine.die()
    until(lambda: pool.members[0].since > before)
    (thread,) = [each for each in threading.enumerate() if each.name == "start engine 0"]
    pool.close()
    assert isinstance(futures[0].exception(), RunError)
    starter.may_start.set()
    thread.join(10)
    assert not starter.errors
    assert [text for text in pool.said if "did not start" in text] == []
    assert pool.members[0].state == "gone"


def test_an_engine_without_a_place_is_tried_until_the_limit():
    class Unplaced(FailingPool):
        error = NoPlace("its node is lost")

    pool = Unplaced(None, None, start_limit_s=0.3)
    pool.starters[0].may_start.set()
    with pytest.raises(RunError, match=r"engine 1 did not start within 0.3 s: its node is lost"):
        pool.wait_started()
    pool.starters[1].errors.clear()
    until(lambda: len(pool.in_state("serving")) == 2)
    for starter in pool.starters:
        starter.errors = [NoPlace("its node is lost")] * 10_000
    futures = pool.submit(group("a"))
    for engine in pool.engines:
        engine.die()
        pool.lose(pool.members[1], "too")
    with pytest.raises(RunError, match="engine 0 is starting: its node is lost"):
        futures[0].result(10)
    assert all(member.failures == 1 for member in pool.members)
    pool.close()


def test_a_start_that_fails_after_a_loss_is_tried_again(make: Make):
    pool = make(None, max_failures=4)
    pool.starters[0].errors = [RunError("port taken"), RunError("port taken")]
    pool.lose(pool.members[0], "asked for")
    until(lambda: pool.members[0].state == "stale")
    assert pool.said[1:] == ["engine 0 did not start: port taken; it is tried again"] * 2 + ["engine 0 came back"]
    pool.starters[0].errors = [RunError("port taken")] * 3
    pool.lose(pool.members[0], "asked for")
    assert pool.members[0].state == "gone"
    with pytest.raises(RunError, match="engine 0 is gone: asked for"):
        pool.submit(group("a"))[0].result(10)


def test_serve_and_lose_of_an_engine_that_was_replaced_do_nothing(make: Make):
    pool = make(None)
    member, old = pool.members[0], pool.members[0].engine
    pool.lose(member, "asked for", old)
    until(lambda: member.state == "stale")
    pool.lose(member, "late", old)
    pool.serve(member, old)
    assert member.state == "stale"
    pool.starters[0].may_start.clear()
    pool.lose(member, "asked for")
    with pytest.raises(EngineLost, match="engine 0 is starting: asked for"):
        _ = member.engine
    pool.starters[0].may_start.set()


# Abort, offload, close


def test_abort_ends_what_waits_and_what_runs(make: Make):
    pool = make(2)
    futures = pool.submit([*group("a", 2), *group("b", 2), *group("c", 2)])
    pool.abort(["b", "unknown"])
    assert [future.done() for future in futures] == [False, False, True, True, False, False]
    assert [future.result().finish for future in futures[2:4]] == ["abort"] * 2
    assert futures[2].result().handle.resolve().tokens.tolist() == [1, 2]
    pool.abort(["a"])
    until(lambda: len(pool.engines[0].held) == 2)
    assert names(pool.engines[0].calls[-1]) == ["c0", "c1"]
    pool.abort()
    assert {future.result(10).finish for future in futures} == {"abort"}


def test_a_future_that_is_cancelled_ends_its_request_wherever_it_is(make: Make):
    pool = make(2)
    engine = pool.engines[0]
    at_engine, waiting = pool.submit(group("a", 2)), pool.submit(group("b", 2))
    assert [waiting[0].cancel(), at_engine[0].cancel()] == [True, True]
    assert [future.cancelled() for future in engine.held] == [True, False, False]
    assert names(engine.calls[-1]) == ["b1"]  # it has the place
    engine.end()  # what was cancelled is nobody's
    assert [future.result(10).finish for future in (at_engine[1], waiting[1])] == ["stop", "stop"]
    assert not pool._unfinished()
    gone = pool.submit(group("c"))[0]
    gone.cancel()
    engine.die()
    pool.close()
    assert gone.cancelled()


def test_abort_holds_for_what_is_on_its_way_and_sent_again(make: Make):
    pool = make(None)
    engine = pool.engines[0]
    engine.gate.clear()
    futures: list[Future[Completion]] = []
    caller = threading.Thread(target=lambda: futures.extend(pool.submit(group("a", 2))))
    caller.start()
    assert engine.in_submit.wait(10)
    pool.abort()
    engine.gate.set()
    caller.join(10)
    assert [future.result(10).finish for future in futures] == ["abort", "abort"]
    assert all(future.cancelled() for future in engine.held)
    engine.end()
    again = pool.submit(group("a", 2))
    engine.errors["abort"] = EngineLost("it died")
    pool.abort(["a"])
    assert [future.result(10).finish for future in again] == ["abort", "abort"]
    assert pool.num_lost == 1


def test_offload_and_onload(make: Make):
    pool = make(None, None, max_failures=2)
    pool.engines[1].errors["offload"] = RunError("does not let go")
    pool.offload()
    assert pool.members[0].offloaded
    assert pool.said[0] == "engine 1 is lost: offload: does not let go; it is started again"
    futures = pool.submit(group("a"))
    assert not pool.in_state("serving")
    until(lambda: pool.members[1].state == "stale")
    pool.onload()
    assert not pool.members[0].offloaded
    assert [engine.done for engine in pool.engines] == [["offload", "onload"], []]
    pool.revive()
    pool.end_all()
    results(futures)
    pool.flush_cache()
    pool.check(SamplingParams())
    assert pool.engines[1].done == ["flush_cache", "check"]
    assert pool.health()
    assert pool.max_sequence_tokens == 100


def test_close_ends_everything(make: Make):
    pool = make(1, 1)
    futures = pool.submit([request for i in range(4) for request in group(f"{i}")])
    pool.close()
    pool.close()
    for future in futures:
        with pytest.raises(RunError, match="the engine pool is closed"):
            future.result(10)
    assert all(engine.closed for engine in pool.engines)
    with pytest.raises(RunError, match="the engine pool is closed"):
        pool.submit(group("a"))
    until(lambda: not any("engine pool" in thread.name for thread in threading.enumerate()))


class Machine(RuleBasedStateMachine):
    """Anything at any moment: speeds, deaths, stalls, aborts, revivals."""

    @initialize(sizes=st.lists(st.sampled_from([None, 1, 3, 4]), min_size=1, max_size=3))
    def open(self, sizes: list[int | None]) -> None:
        self.pool = Pool(*sizes, max_failures=10**6)
        self.pool.wait_started()
        self.uids = itertools.count()
        self.asked: list[tuple[Request, Future[Completion]]] = []
        self.ended: list[Future[Completion]] = []

    engine = st.integers(0, 2)

    def at(self, number: int) -> FakeEngine:
        return self.pool.engines[number % len(self.pool.engines)]

    @rule(sizes=st.lists(st.integers(1, 6), max_size=4), priority=st.integers(0, 1))
    def submit(self, sizes: list[int], priority: int) -> None:
        requests = [request for n in sizes for request in group(f"{next(self.uids)}", n, priority)]
        futures = self.pool.submit(requests)
        self.asked += zip(requests, futures, strict=True)
        for future in futures:
            future.add_done_callback(self.ended.append)

    @rule(number=engine, most=st.integers(1, 4))
    def end(self, number: int, most: int) -> None:
        self.at(number).end(most)

    @rule(number=engine)
    def die(self, number: int) -> None:
        self.at(number).die()

    @rule(number=engine)
    def lose(self, number: int) -> None:
        self.pool.lose(self.member(number), "asked for")

    @rule(number=engine, kind=st.sampled_from([RunError, NoPlace]))
    def fail_to_start(self, number: int, kind: type[RunError]) -> None:
        self.pool.starters[self.member(number).number].errors.append(kind("asked for"))

    @rule(number=engine)
    def stale(self, number: int) -> None:
        self.pool.stale([self.member(number)])

    @rule()
    def revive(self) -> None:
        self.pool.revive()

    @rule(back=st.integers(0, 5))
    def abort(self, back: int) -> None:
        uids = None if not back else [request.uid for request, _ in self.asked[-back:]]
        self.pool.abort(uids)
        for request, future in self.asked:
            assert future.done() or (uids is not None and request.uid not in uids)

    def member(self, number: int) -> Member:
        return self.pool.members[number % len(self.pool.members)]

    @invariant()
    def no_engine_has_too_much(self) -> None:
        if hasattr(self, "pool"):
            for starter in self.pool.starters:
                for engine in starter.engines:
                    most = starter.max_requests or 10**6
                    until(lambda e=engine, m=most: e.closed or sum(not f.cancelled() for f in list(e.held)) <= m)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        while not all(future.done() for _, future in self.asked):
            self.pool.revive()
            self.pool.end_all()
        for request, future in self.asked:
            completion = future.result()
            if completion.finish == "stop":
                assert completion.tokens.tolist() == [request.sample]
        assert len(self.ended) == len(set(self.ended)) == len(self.asked)
        assert not any(member.items for member in self.pool.members)
        # What was aborted on its way to an engine is cancelled there a moment later.
        until(lambda: all(future.cancelled() for engine in self.pool.engines for future in list(engine.held)))
        self.pool.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
