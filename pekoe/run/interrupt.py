"""The stop request (Ctrl-C, SIGTERM, SIGHUP), and the seconds of a step's phases."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pekoe.core.errors import Interrupted, StopRequested
from pekoe.core.loop import Snapshot, Trainer
from pekoe.core.progress import NoProgress, ProgressReporter, phase

_PATIENCE_S = 3.0  # that a step under way goes on after a stop request: it may be complete then
_LONG_S = 10.0  # of training in a step, from which on a copy of the state before it is worth its time


class StoppedInStep(Exception):
    """As StopRequested, at a moment when the trainer's weights are of no step that can be gone on from."""


class Stop:
    """Ctrl-C as a request: the loop drops what is unfinished, saves the last complete step, and ends.

    While it listens, the first SIGINT, SIGTERM or SIGHUP sets the request; the same one again interrupts at once. (At
    Ctrl-C torchrun sends a SIGTERM after the terminal's SIGINT.) SIGHUP stays ignored where it is (nohup). The first
    signal decides the exit status of an Interrupted that leaves `listening`. A StopRequested leaves it as one, too: if
    nobody handled it, nothing had begun.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since: float | None = None  # when `overdue` saw the request first
        self._received: list[int] = []

    def check(self) -> None:
        """Raise StopRequested if the user asked to stop. Called only where nothing is half done."""
        if self.requested:
            raise StopRequested

    def overdue(self, patience_s: float | None = None) -> bool:
        """Whether so much time has passed since the request that a step under way is to be dropped."""
        if not self.requested:
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > (_PATIENCE_S if patience_s is None else patience_s)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread can handle signals
            return

        terminals = [fd for fd in (1, 2) if os.isatty(fd)]

        def handle(number: int, frame: object) -> None:
            if number == signal.SIGHUP:  # the terminal is gone: writing to it would fail before the step is saved
                for fd in terminals:
                    os.dup2(null := os.open(os.devnull, os.O_WRONLY), fd)
                    os.close(null)
            if number in self._received:
                raise KeyboardInterrupt
            self._received.append(number)
            self.requested = True

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            try:
                yield self
            except StopRequested:
                raise Interrupted("stopped before anything was done; run the same command again") from None
        except Interrupted as error:
            if self._received:
                error.status = 128 + self._received[0]
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class LastStep:
    """The state of the last complete step, while the next one trains: a stop in its midst drops it and saves this.

    Until the first optimizer step it is the trainer's. Then it is a copy, where `copies` and the step before trained
    for long; without one the step is trained to its end. The end of what may be long is not waited for at all.
    """

    def __init__(self, trainer: Trainer, stop: Stop, copies: bool) -> None:
        self._trainer, self._stop, self._copies = trainer, stop, copies
        self._seconds = float("inf")  # that the last step trained
        self._num_updates: int | None = None  # before the step that trains
        self._copy: Snapshot | None = None

    @contextmanager
    def kept(self, several: bool) -> Iterator[None]:
        """Within, a step trains, with `several` optimizer steps."""
        start, self._num_updates = time.monotonic(), self._trainer.num_updates
        if several and self._copies and self._seconds > _LONG_S:
            self._copy = self._trainer.snapshot()
        yield
        self._seconds, self._num_updates, self._copy = time.monotonic() - start, None, None

    def drops(self) -> bool:
        """Whether the user asked to stop, and the step that trains is to be dropped for it."""
        kept = self._copy is not None or self._trainer.num_updates == self._num_updates
        return kept and self._stop.overdue(0.0 if self._seconds > _LONG_S else None)

    def snapshot(self) -> Snapshot:
        """A copy of the state."""
        changed = self._num_updates not in (None, self._trainer.num_updates)
        return self._copy if changed and self._copy is not None else self._trainer.snapshot()


class StepTimer:
    """Seconds spent in each named phase of the step in hand, shown to `view` where there is one."""

    def __init__(self, view: ProgressReporter | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._view = view or NoProgress()

    def restart(self) -> None:
        """Forget the phases of the step before."""
        self.seconds = {}

    @contextmanager
    def __call__(self, name: str, total: int | None = None, at_once: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        with phase(self._view, name, total, at_once=at_once):
            try:
                yield
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
