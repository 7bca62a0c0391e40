"""What a run tells whoever watches it. The rooms that work know this protocol; `report.terminal` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pekoe.core.journal import Event


class View(Protocol):
    """Receives phases with their progress, and journal events."""

    def begin(self, phase: str, total: int | None) -> None: ...

    def advance(self, done: int = 1) -> None: ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


class NoView:
    """Watches nothing."""

    def begin(self, phase: str, total: int | None) -> None: ...

    def advance(self, done: int = 1) -> None: ...

    def end(self) -> None: ...

    def event(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def phase(view: View, name: str, total: int | None = None) -> Iterator[None]:
    """Show `name` with a progress bar of `total` items while the body runs."""
    view.begin(name, total)
    try:
        yield
    finally:
        view.end()
