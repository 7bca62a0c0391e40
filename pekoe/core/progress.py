"""The protocol by which a run reports its progress; `report.terminal` draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from pekoe.core.journal import Event

T = TypeVar("T")
_MAX_UPDATES = 200  # of one `track`


class ProgressReporter(Protocol):
    """Receives phases with their progress, and journal events. Phases nest."""

    def begin(self, phase: str, total: int | None, done: int = 0, at_once: int = 1) -> None:
        """`done` of the total were done before; at most `at_once` are being worked on at a time."""
        ...

    def advance(self, done: int = 1, share: float = 0.0) -> None:
        """More items are done. `share`: how long that item was, of the longest that one can be; 0: not known."""
        ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


class NoProgress:
    """Shows nothing."""

    def begin(self, phase: str, total: int | None, done: int = 0, at_once: int = 1) -> None: ...

    def advance(self, done: int = 1, share: float = 0.0) -> None: ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def phase(
    view: ProgressReporter, name: str, total: int | None = None, done: int = 0, at_once: int = 1
) -> Iterator[None]:
    """Show `name` with a progress bar of `total` items while the body runs; see `ProgressReporter.begin`."""
    view.begin(name, total, done, at_once)
    try:
        yield
    finally:
        view.end()


def track(view: ProgressReporter, name: str, items: Sequence[T]) -> Iterator[T]:
    """Iterate over the items with a progress bar."""
    stride = max(1, len(items) // _MAX_UPDATES)
    with phase(view, name, len(items)):
        for number, item in enumerate(items, 1):
            yield item
            if number % stride == 0:
                view.advance(stride)
