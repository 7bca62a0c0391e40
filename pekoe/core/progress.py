"""What a run tells whoever watches it. The rooms that work know this protocol; `report.terminal` draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from pekoe.core.journal import Event

T = TypeVar("T")
_TOLD = 200  # how often `track` tells, at the most


class ProgressReporter(Protocol):
    """Receives phases with their progress, and journal events. Phases nest; `done` of the total were done before."""

    def begin(self, phase: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, done: int = 1) -> None: ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


class NoProgress:
    """Watches nothing."""

    def begin(self, phase: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, done: int = 1) -> None: ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def phase(view: ProgressReporter, name: str, total: int | None = None, done: int = 0) -> Iterator[None]:
    """Show `name` with a progress bar of `total` items, of which `done` were done before, while the body runs."""
    view.begin(name, total, done)
    try:
        yield
    finally:
        view.end()


def track(view: ProgressReporter, name: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with a progress bar while they are gone through."""
    some = max(1, len(items) // _TOLD)
    with phase(view, name, len(items)):
        for number, item in enumerate(items, 1):
            yield item
            if number % some == 0:
                view.advance(some)
