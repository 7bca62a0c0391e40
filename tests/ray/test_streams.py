"""Streams of many answers by one remote call, without Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.ray.placement import ByteCount
from pekoe.ray.streams import StreamFollower, as_they_end


def test_answers_come_in_lists_as_they_end():
    futures: list[Future[str]] = [Future() for _ in range(4)]
    futures[2].set_result("c")
    futures[0].set_exception(RunError("no"))

    async def lists() -> list[list[Any]]:
        taken: list[list[Any]] = []
        async for ended in as_they_end(futures):
            taken.append(ended)
            if len(taken) == 1:
                futures[3].set_result("d")
                futures[1].set_result("b")
        return taken

    first, *rest = asyncio.run(lists())
    assert first[0] == (2, "c") or first[0][0] == 0
    outcomes = dict(first + [outcome for ended in rest for outcome in ended])
    assert isinstance(outcomes.pop(0), RunError)
    assert outcomes == {1: "b", 2: "c", 3: "d"}
    assert len(rest) <= 2


async def value(packed: bytes) -> bytes:
    return packed


async def stream(*parts: list[tuple[int, object]], error: Exception | None = None) -> AsyncIterator[Any]:
    for part in parts:
        yield value(pickle.dumps(part))
    if error is not None:
        raise error


@pytest.fixture
def follower() -> Any:
    follower = StreamFollower("test", ByteCount(), lambda error: UserError(f"lost: {error}"), "closed")
    yield follower
    follower.close()


def test_futures_end_by_what_the_stream_yields(follower: StreamFollower):
    futures: list[Future[object]] = [Future() for _ in range(4)]
    follower.follow(stream([(1, "b"), (0, RunError("no"))], [(3, "d")], error=OSError("broken off")), futures)
    assert futures[1].result(10) == "b"
    assert futures[3].result(10) == "d"
    assert str(futures[0].exception(10)) == "lost: no"
    assert str(futures[2].exception(10)) == "lost: broken off"


def test_the_actors_own_error_is_the_message_not_its_traceback(follower: StreamFollower):
    class Remote(RunError):
        """As Ray's RayTaskError(RunError)."""

        cause = RunError("the judges are gone")

    left: Future[object] = Future()
    follower.follow(stream(error=Remote("Traceback ...")), [left])
    assert str(left.exception(10)) == "lost: the judges are gone"


def test_a_future_that_was_cancelled_breaks_off_no_other(follower: StreamFollower):
    early, late, other = futures = [Future[object]() for _ in range(3)]
    early.cancel()
    follower.follow(stream([(0, "a"), (1, "b")], [(2, "c")]), futures)
    late.cancel()  # it is being sampled
    assert (late.result(10), other.result(10), early.cancelled()) == ("b", "c", True)


def test_what_a_stream_leaves_out_and_what_is_closed_ends_too(follower: StreamFollower):
    left: Future[object] = Future()
    follower.follow(stream(), [left])
    assert "unanswered" in str(left.exception(10))

    async def endless() -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield value(b"")

    open_: Future[object] = Future()
    follower.follow(endless(), [open_])
    follower.close()
    assert str(open_.exception(10)) == "closed"


def test_what_breaks_off_while_it_is_being_closed_was_closed(follower: StreamFollower):
    left: Future[object] = Future()
    follower.closing = True
    follower.follow(stream(error=OSError("killed")), [left])
    assert str(left.exception(10)) == "closed"
