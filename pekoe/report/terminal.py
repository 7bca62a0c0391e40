"""Progress on a terminal: a table of the last steps above progress bars; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from pekoe.core.journal import Event
from pekoe.core.progress import NoProgress
from pekoe.core.words import counted

_KEPT_ROWS = 12
_PHASE_INTERVAL_S = 30.0  # between plain lines on a phase
_SECONDS, _LEAST_SECONDS = "seconds", 12


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _seconds(phases: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.1f}" for name, value in phases.items() if value >= 0.05)


# (header, journal key, format). A column shows where the step has the key.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("step", "step", str),
    ("reward", "reward", "{:+.2f}".format),
    ("pass", "pass_rate", "{:.1%}".format),
    ("length", "response_tokens", "{:.0f}".format),
    ("cut", "truncation_rate", "{:.1%}".format),
    ("loss", "loss", "{:.4f}".format),
    ("entropy", "entropy", "{:.3f}".format),
    ("clip", "clip_fraction", "{:.1%}".format),
    ("Δ logp", "logprob_diff_max", "{:.0e}".format),
    ("rollout tok/s", "rollout_tokens_per_s", _count),
    ("train tok/s", "train_tokens_per_s", _count),
    ("peak GiB", "train_peak_bytes", lambda value: f"{value / 2**30:.2f}"),
    (_SECONDS, "seconds", _seconds),
)
# A line for events other than steps; further kinds are not shown.
LINES = {
    "eval": "step {step}: pass@1 {pass_at_1:.1%} [{ci95[0]:.1%}, {ci95[1]:.1%}] on {problems} x {samples}",
    "eval_loss": "step {step}: held-out loss {loss:.4f} on {num_targets:,} tokens",
    "collapse": "warning: step {step}: {why}",
    "resumed": "resumed after step {step}",
    "checkpoint": "saved step {step}: {mib:.0f} MiB in {seconds:.1f} s, of which training waited {stall_s:.1f} s",
}


def cells(event: Event) -> dict[str, str]:
    """The table's row for a `step` event: column header -> text. Columns without a value are absent."""
    return {header: form(event[key]) for header, key, form in COLUMNS if event.get(key) is not None}


def line_of(event: Event) -> str | None:
    """One line for an event other than a step; None for an event that is not shown."""
    form = LINES.get(event["event"])
    problems, samples = event.get("num_problems", 0), event.get("samples_per_problem", 0)
    words = {"problems": counted(problems, "held-out problem"), "samples": counted(samples, "sample")}
    return form.format(**event, **words, mib=event.get("bytes", 0) / 2**20) if form else None


@dataclass(slots=True)
class _Phase:
    name: str
    total: int | None
    before: int  # items of the total that were done when it began
    at_once: int = 1  # items in work at a time, at most
    start: float = field(default_factory=lambda: time.monotonic())
    last_line: float = field(default_factory=lambda: time.monotonic())  # when a line about it was printed
    done: int = 0  # items since it began
    seen: float = field(default_factory=lambda: time.monotonic())  # when items were last done
    exposure: float = 0.0  # seconds of work on items until then, summed over those in work
    begun: float = field(default_factory=lambda: time.monotonic())  # when an item was last begun
    longest: float = inf  # seconds that the longest possible item takes

    @property
    def num_left(self) -> int:
        return (self.total or 0) - self.before - self.done

    def advance(self, done: int, share: float) -> None:
        now = time.monotonic()
        self.exposure += min(self.at_once, self.num_left) * (now - self.seen)
        if self.num_left > self.at_once:  # one that waited has the place of the one that is done
            self.begun = now
        self.done, self.seen = self.done + done, now
        if share > 0:  # exact for an item that was begun with the phase; one begun later took less than it seems to
            self.longest = min(self.longest, (now - self.start) / share)

    def rate(self) -> str:
        """Items a second, such as `34/s`; seconds an item, where one takes longer than a second."""
        pace = self.done / max(1e-9, time.monotonic() - self.start)
        return f"{pace:,.0f}/s" if pace >= 10 else f"{pace:.1f}/s" if pace >= 1 else f"{1 / pace:.1f} s each"

    def left(self) -> timedelta | None:
        """The time left, None where nothing tells it.

        An item takes the seconds that were spent on items for each that is done (the maximum-likelihood mean of
        lifetimes of which those in work are not over yet). What waits is begun as places become free; the n that are
        then in work end after 1 + 1/2 + ... + 1/n of it, as lifetimes without memory do, and at most after the time
        that the longest possible item takes: engines sample many responses together and wait for the longest. With
        one item at a time, that is the time so far for each item done.
        """
        if self.total is None or not self.done:
            return None
        in_work = min(self.at_once, self.num_left)
        waiting = self.num_left - in_work
        harmonic, since = sum(1 / i for i in range(1, in_work + 1)), time.monotonic() - self.seen
        each = min(self.longest, self.exposure / self.done)
        end = self.longest if waiting else self.longest - (self.seen - self.begun)
        left = waiting * each / self.at_once + min(end, each * harmonic) - since
        if left <= 0 and in_work:  # slower than it was: the longest possible item takes longer than it seemed
            left = (self.exposure + in_work * since) / self.done * (waiting / self.at_once + harmonic)
        return timedelta(seconds=max(0, round(left)))

    def line(self) -> str:
        """Items done, the rate, and the time left."""
        if self.total is None:
            return f"{self.name}: {self.done:,}, {self.rate()}"
        return f"{self.name}: {self.before + self.done:,} of {self.total:,}, {self.rate()}, about {self.left()} left"


class PlainProgress(NoProgress):
    """One line an event, for logs and pipes; of a phase's progress, at most one line an interval."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phases: list[_Phase] = []

    def begin(self, phase: str, total: int | None, done: int = 0, at_once: int = 1) -> None:
        self._phases.append(_Phase(phase, total, done, at_once))

    def advance(self, done: int = 1, share: float = 0.0) -> None:
        if self._phases:
            phase, now = self._phases[-1], time.monotonic()
            phase.advance(done, share)
            if now - phase.last_line >= _PHASE_INTERVAL_S:
                phase.last_line = now
                self.say(phase.line())

    def end(self) -> None:
        if self._phases:
            self._phases.pop()

    def event(self, event: Event) -> None:
        if event["event"] == "step":
            line = "  ".join(f"{header} {text}" for header, text in cells(event).items())
            self.say(line + (f"  skipped: {event['skipped']}" if "skipped" in event else ""))
        elif line := line_of(event):
            self.say(line)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TimeColumn(ProgressColumn):
    """The time left; the time elapsed for a phase without a total."""

    def render(self, task: Task) -> Text:
        phase: _Phase = task.fields["phase"]
        shown = phase.left() if task.total is not None else timedelta(seconds=round(task.elapsed or 0))
        return Text("-:--:--" if shown is None else str(shown), style="progress.remaining")


class LiveProgress:
    """A table of the last steps above the progress bars of the open phases. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._rows: deque[dict[str, str]] = deque(maxlen=_KEPT_ROWS)
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            _TimeColumn(),
            console=console,
        )
        self._tasks: list[tuple[TaskID, _Phase]] = []  # phases may nest
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._rows:
            self._live.console.print(self._table())

    def begin(self, phase: str, total: int | None, done: int = 0, at_once: int = 1) -> None:
        state = _Phase(phase, total, done, at_once)
        task = self._progress.add_task(phase, total=total, completed=done, rate="", phase=state)
        self._tasks.append((task, state))

    def advance(self, done: int = 1, share: float = 0.0) -> None:
        if self._tasks:
            task, phase = self._tasks[-1]
            phase.advance(done, share)
            self._progress.update(task, advance=done, rate=phase.rate())

    def end(self) -> None:
        if self._tasks:
            self._progress.remove_task(self._tasks.pop()[0])

    def event(self, event: Event) -> None:
        if event["event"] == "step":
            self._rows.append(cells(event))
        elif line := line_of(event):
            self.say(line)

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def _draw(self) -> Group:
        return Group(self._table(), self._progress) if self._rows else Group(self._progress)

    def _table(self) -> Table:
        """The last rows, in as many columns as fit. Only the last column, the seconds, may be cut."""
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        room = self._live.console.width
        shown: list[str] = []
        for header, _, _ in COLUMNS:
            texts = [row[header] for row in self._rows if header in row]
            if not texts:
                continue
            width = max(map(len, [header, *texts]))
            width = min(width, max(room - 2, _LEAST_SECONDS)) if header == _SECONDS else width
            if width + 2 > room:
                break
            room -= width + 2
            shown.append(header)
            table.add_column(header, justify="left" if header == _SECONDS else "right", width=width, no_wrap=True)
        for row in self._rows:
            table.add_row(*(row.get(header, "") for header in shown))
        return table


def make_progress(console: Console | None = None) -> LiveProgress | PlainProgress:
    """The live display on a terminal; plain lines elsewhere, and on a terminal that cannot be redrawn (TERM=dumb)."""
    console = console or Console()
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else PlainProgress(console)
