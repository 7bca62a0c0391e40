"""Many answers by one remote call: they come in lists, as they end. An item of its own for each costs the controller,
and the actor, more than a verdict or a small model's forward."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from pekoe.core.errors import RunError, UserError
from pekoe.engine.async_thread import AsyncThread
from pekoe.ray.placement import ByteCount

T = TypeVar("T")


async def as_they_end(futures: Sequence[Future[T]]) -> AsyncIterator[list[tuple[int, T | Exception]]]:
    """(index, result or error) of those that ended since the last list, until all have. For the actor."""
    ended = asyncio.Queue[int]()
    loop = asyncio.get_running_loop()
    for index, future in enumerate(futures):
        future.add_done_callback(lambda _, index=index: loop.call_soon_threadsafe(ended.put_nowait, index))
    left = len(futures)
    while left:
        indices = [await ended.get()]
        while not ended.empty():
            indices.append(ended.get_nowait())
        left -= len(indices)
        yield [(index, _outcome(futures[index])) for index in indices]


def _outcome(future: Future[T]) -> T | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


class StreamFollower:
    """Ends futures as remote streams yield `pickle.dumps([(index, result or Exception), ...])`. For the controller, in
    a thread of its own: Ray calls back in one that must not block.

    Args:
        failure: the error of a future, from the exception that was its outcome, or that broke the stream off.
        closed: the message of RunError where it is closed first.

    `closing` may be set before `close`: what breaks off from then on was closed.
    """

    def __init__(self, name: str, passed: ByteCount, failure: Callable[[Exception], Exception], closed: str) -> None:
        self._passed, self._failure, self._closed = passed, failure, closed
        self.closing = self._is_closed = False
        self._following: set[asyncio.Task[None]] = set()
        self._thread = AsyncThread(name)

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Call it in the thread; in the order of calls."""
        self._thread.soon(call, *arguments)

    def follow(self, stream: Any, futures: Sequence[Future[Any]]) -> None:
        """A future that was cancelled before is left alone; from now on, `cancel` of one does nothing."""
        for future in futures:
            future.set_running_or_notify_cancel()
        self._thread.soon(partial(self._start, stream, futures))

    def _start(self, stream: Any, futures: Sequence[Future[Any]]) -> None:
        task = self._thread.loop.create_task(self._follow(stream, futures))
        self._following.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._following.discard)

    async def _follow(self, stream: Any, futures: Sequence[Future[Any]]) -> None:
        error: Exception = RunError("it left requests unanswered")
        try:
            async for ref in stream:
                for index, outcome in self._passed.unpack(await ref):
                    if futures[index].done():
                        continue
                    if isinstance(outcome, Exception):
                        futures[index].set_exception(self._failure(outcome))
                    else:
                        futures[index].set_result(outcome)
        except Exception as broken:
            # Ray raises what is an instance of the actor's error, too, with the actor's traceback for a message.
            cause = getattr(broken, "cause", None)
            error = cause if isinstance(cause, (UserError, RunError)) else broken
        finally:
            error = RunError(self._closed) if self.closing else self._failure(error)
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def close(self) -> None:
        closed, self.closing, self._is_closed = self._is_closed, True, True
        if not closed:
            self._thread.stop()
