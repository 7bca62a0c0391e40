"""The journal's metrics, by the same names, to TensorBoard, Weights & Biases and Trackio, as the recipe's `track` asks.

The journal is the record; a tracker is a copy for looking at. One that fails is told of and left, and the run goes on.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pekoe.config.recipes import Logging
from pekoe.core.errors import UserError
from pekoe.core.journal import Event
from pekoe.core.progress import ProgressReporter

Numbers = dict[str, float]


class Tracker(Protocol):
    """Takes the numbers of an event; any exception is its end, not the run's."""

    def take(self, step: int, numbers: Numbers) -> None: ...

    def resume(self, step: int) -> None:
        """What was taken of later steps is void."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run.dir`/tensorboard."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        self._make: Callable[..., Any] = _package("tensorboardX", "pip install tensorboardX").SummaryWriter
        self._folder, self._purge = folder, None

    def take(self, step: int, numbers: Numbers) -> None:
        if self._writer is None:
            # A name of its own also where a run goes on within the second in which it began.
            suffix = f".{self._purge or 0}"
            self._writer = self._make(str(self._folder), purge_step=self._purge, flush_secs=10, filename_suffix=suffix)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def resume(self, step: int) -> None:
        self.close()
        self._purge = step + 1  # TensorBoard forgets what it has from there on

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class Hosted:
    """Weights & Biases, or Trackio, whose Python is the same. A run that goes on is the same run there; neither takes
    a step back, so that steps done again after a kill keep the values that came first."""

    def __init__(self, package: str, project: str, run: Path, config: Mapping[str, Any], **more: Any) -> None:
        self._package = _package(package, f"pip install 'pekoe[{package}]'")
        self._run = self._package.init(project=project, name=run.name, config=dict(config), resume="allow", **more)

    def take(self, step: int, numbers: Numbers) -> None:
        self._package.log(numbers, step=step)

    def resume(self, step: int) -> None: ...

    def close(self) -> None:
        self._package.finish()


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"track: expected the package {name}, which is not installed: {install}") from None


def numbers_of(event: Event) -> Numbers:
    """The event's metrics by their journal names; those of other events than steps begin with the event's name."""
    prefix = "" if event["event"] == "step" else f"{event['event']}/"
    found: Numbers = {}
    for name, value in event.items():
        if name in ("event", "time", "step"):
            continue
        parts: Iterable[tuple[str, Any]] = [(name, value)]
        if isinstance(value, dict):
            parts = [(f"{name}/{inner}", number) for inner, number in value.items()]
        elif name == "ci95":
            parts = [("ci95/low", value[0]), ("ci95/high", value[1])]
        found |= {prefix + key: float(x) for key, x in parts if isinstance(x, (int, float)) and not isinstance(x, bool)}
    return found


class TrackedView:
    """A view whose events go to trackers, too."""

    def __init__(self, view: ProgressReporter, trackers: list[Tracker]) -> None:
        self._view, self._trackers = view, trackers
        self.begin, self.advance, self.end, self.say = view.begin, view.advance, view.end, view.say

    def event(self, event: Event) -> None:
        self._view.event(event)
        if event["event"] == "resumed":
            self._each(lambda tracker: tracker.resume(event["step"]))
        elif event["event"] in ("step", "eval", "eval_loss"):
            numbers = numbers_of(event)
            self._each(lambda tracker: tracker.take(event["step"], numbers))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # of whatever kind: a copy is not worth a run
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self._view.say(
                    f"warning: {name} is left out from now on ({type(error).__name__}: {error}); "
                    f"the journal has everything"
                )


@contextmanager
def tracking(
    section: Logging, run: Path, config: Mapping[str, Any], view: ProgressReporter
) -> Iterator[ProgressReporter]:
    """`view`, with the trackers that the recipe asks for; UserError where one cannot be had."""
    trackers: list[Tracker] = []
    if section.tensorboard:
        trackers.append(TensorBoard(run / "tensorboard"))
    if section.wandb is not None:
        same = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]  # wherever it goes on from
        run.mkdir(parents=True, exist_ok=True)
        trackers.append(Hosted("wandb", section.wandb, run, config, id=same, dir=str(run)))
    if section.trackio is not None:
        trackers.append(Hosted("trackio", section.trackio, run, config))
    if not trackers:
        yield view
        return
    tracked = TrackedView(view, trackers)
    try:
        yield tracked
    finally:
        tracked.close()
