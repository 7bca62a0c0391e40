"""Runs asyncio in a daemon thread, for callers that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from pekoe.core.errors import RunError

_STOP_LIMIT_S = 5.0

T = TypeVar("T")


class AsyncThread:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock, self._stopping = threading.Lock(), False
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there, wait for it here; not from its own thread. Whatever interrupts the wait (Ctrl-C) cancels it.

        RunError once it is stopped, and where it stops meanwhile.
        """
        assert threading.current_thread() is not self._thread, "it would wait for itself"
        with self._lock:
            if self._stopping:
                work.close()
                raise RunError("the engine is closed")
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except CancelledError:
            raise RunError("the engine is closed") from None
        except BaseException:
            future.cancel()
            raise

    def soon(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call it there, and do not wait; in the order of calls. RunError once it is stopped."""
        with self._lock:
            if self._stopping:
                raise RunError("the engine is closed")
            self.loop.call_soon_threadsafe(call, *arguments)

    def stop(self) -> None:
        """Cancel what still runs, and end the thread."""

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_STOP_LIMIT_S) if tasks else None
            self.loop.stop()

        with self._lock:  # work that comes later would never run
            self._stopping = True
            asyncio.run_coroutine_threadsafe(cancel_all(), self.loop)
        self._thread.join(timeout=2 * _STOP_LIMIT_S)
        if not self._thread.is_alive():
            self.loop.close()
