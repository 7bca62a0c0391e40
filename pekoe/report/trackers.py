"""Sends the journal's metrics, by the same names, to the trackers that the recipe's `track` section names.

The journal is the record. A failing tracker is reported once and disabled; the run continues.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pekoe.config.recipes import Logging
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import UserError
from pekoe.core.journal import Event
from pekoe.core.progress import ProgressReporter

Metrics = dict[str, float]


class Tracker(Protocol):
    """Receives the metrics of an event. Any exception disables the tracker, not the run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def resume(self, step: int) -> None:
        """The run continues after `step`: metrics of later steps are void."""

    def close(self) -> None: ...


class TensorBoard(Tracker):
    """Event files in `run.dir`/tensorboard."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        self._make: Callable[..., Any] = _package("tensorboardX", "pip install tensorboardX").SummaryWriter
        self._folder, self._purge = folder, None

    def log(self, step: int, metrics: Metrics) -> None:
        if self._writer is None:
            # The suffix keeps the file names apart of a run that resumes within the second in which it began.
            suffix = f".{self._purge or 0}"
            self._writer = self._make(str(self._folder), purge_step=self._purge, flush_secs=10, filename_suffix=suffix)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def resume(self, step: int) -> None:
        self.close()
        self._purge = step + 1  # TensorBoard forgets what it has from there on

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class Hosted(Tracker):
    """Weights & Biases, or Trackio, whose Python API is the same. A resumed run is the same run there. Neither can take
    a step back (`resume` does nothing): steps that are repeated after a kill keep their first values."""

    def __init__(self, package: str, project: str, run: Path, config: Mapping[str, Any], **more: Any) -> None:
        self._package = _package(package, f"pip install 'pekoe[{package}]'")
        self._package.init(project=project, name=run.name, config=without_secrets(config), resume="allow", **more)

    def log(self, step: int, metrics: Metrics) -> None:
        self._package.log(metrics, step=step)

    def close(self) -> None:
        self._package.finish()


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"track: expected the package {name}, which is not installed: {install}") from None


def metrics_of(event: Event) -> Metrics:
    """The event's metrics by their journal names; those of events other than steps begin with the event's name."""
    prefix = "" if event["event"] == "step" else f"{event['event']}/"
    metrics: Metrics = {}
    for name, value in event.items():
        if name in ("event", "time", "step"):
            continue
        if name == "ci95":
            value = dict(zip(("low", "high"), value, strict=True))
        parts = {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        for key, x in parts.items():
            if isinstance(x, int | float) and not isinstance(x, bool):
                metrics[prefix + key] = float(x)
    return metrics


class TrackedProgress:
    """A progress reporter whose events also go to trackers."""

    def __init__(self, view: ProgressReporter, trackers: list[Tracker]) -> None:
        self._view, self._trackers = view, trackers
        self.begin, self.advance, self.end, self.say = view.begin, view.advance, view.end, view.say

    def event(self, event: Event) -> None:
        self._view.event(event)
        if event["event"] == "resumed":
            self.each(lambda tracker: tracker.resume(event["step"]))
        elif event["event"] in ("step", "eval", "eval_loss"):
            metrics = metrics_of(event)
            self.each(lambda tracker: tracker.log(event["step"], metrics))

    def each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # of any type: a copy of the journal must not end a run
                self._trackers.remove(tracker)
                cause = f"{type(error).__name__}: {error}"
                self.say(
                    f"warning: {type(tracker).__name__} is left out from now on ({cause}); the journal has everything"
                )


@contextmanager
def tracking(
    section: Logging, run: Path, config: Mapping[str, Any], view: ProgressReporter
) -> Iterator[ProgressReporter]:
    """`view` with the trackers that the recipe names. Raises UserError where a tracker's package is missing."""
    trackers: list[Tracker] = []
    if section.tensorboard:
        trackers.append(TensorBoard(run / "tensorboard"))
    if section.wandb is not None:
        run_id = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]  # the same after a resume
        run.mkdir(parents=True, exist_ok=True)
        trackers.append(Hosted("wandb", section.wandb, run, config, id=run_id, dir=str(run)))
    if section.trackio is not None:
        trackers.append(Hosted("trackio", section.trackio, run, config))
    if not trackers:
        yield view
        return
    tracked = TrackedProgress(view, trackers)
    try:
        yield tracked
    finally:
        tracked.each(lambda tracker: tracker.close())
