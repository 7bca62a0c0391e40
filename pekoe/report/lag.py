"""What it gives that sampling runs ahead of training (`rollout.max_lag`), from a run's own measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from pekoe.config.base import flatten
from pekoe.core.journal import Event
from pekoe.report.history import History

_WAITS = 0.05  # share of a step from which on training waits for samples
_SAMPLING, _TRAINING = ("rollout", "verify"), ("recompute", "train")
_SCHEDULE = {"rollout.max_lag": 0, "rollout.during_update": "wait", "rollout.window": 1}
# Keys that may differ beside the schedule: those that follow from it, and those that leave a step's time as it is.
_FOLLOW, _NO_TIME = ("algo.proximal", "algo.correction"), ("num_steps", "run.dir", "run.seed", "track.", "eval.")
_MAY_DIFFER = (*_FOLLOW, *_NO_TIME, "model.template.date", "train.save_every", "train.keep_checkpoints")
Times = tuple[float, float, float]  # seconds of one step: sampling with judging, training, sync


def overlap(history: History) -> str:
    """A sentence on who waits for whom, and what another lag would give; empty where there is no choice."""
    steps = _trained(history)
    if not steps or history.config.get("cluster", {}).get("colocate"):
        return ""
    lagged = [step for step in steps if "lag_max" in step]
    return _ahead(lagged) if lagged else _in_turns(steps, history)


def gain(first: History, second: History) -> str:
    """A sentence on what the larger lag of two runs gave, beside what `step_s` predicts from the one in turns.

    Empty unless the schedule is the only difference of note between their configs and their machines. Both figures are
    without the first step and the last; what it gave is by the median step.
    """
    before, after = sorted((first, second), key=lambda history: _schedule(history)[0])
    changes = [
        f"{key} {was} → {now}"
        for key, was, now in zip(_SCHEDULE, _schedule(before), _schedule(after), strict=True)
        if was != now
    ]
    steps, later = _trained(before)[1:-1], _trained(after)[1:-1]
    if not changes or _compared(before) != _compared(after) or not steps or not later:
        return ""
    was, now = (median(map(History.seconds_of, each)) for each in (steps, later))
    took = f"{was:.3g} s a step in {before.name}, {now:.3g} s in {after.name}"
    lag, predicted = _schedule(after)[0], ""
    if lag and not _schedule(before)[0]:
        times = list(map(times_of, steps))
        shared = "" if _apart(before) else ", if sampling and training did not share cores or a GPU as they do here"
        predicted = f"; predicted from {before.name}: {step_s(times, 0) / step_s(times, lag):.2f}x{shared}"
    return f"{', '.join(changes)} gave {was / now:.2f}x steps per second ({took}{predicted})."


def times_of(step: Event) -> Times:
    seconds = step["seconds"]
    sampling, training = (sum(seconds.get(name, 0.0) for name in names) for names in (_SAMPLING, _TRAINING))
    return sampling, training, seconds.get("sync", 0.0)


def step_s(times: Sequence[Times], lag: int) -> float:
    """Mean seconds of a step at another lag, from times at lag 0.

    The batch of step t is sampled when the one before is and version t - 1 - lag serves, and trained on when it is
    sampled and step t - 1 is done; both stand still during a sync. With equal steps: the sum of all at lag 0, else
    max(sampling, training) + sync. Responses are not taken to overlap with those of other batches (the long tail):
    in flight it may be less.
    """
    if not lag:
        return mean(map(sum, times))
    sampled, done = 0.0, [0.0] * (lag + 1)
    for sampling, training, sync in [*times, *times]:  # once more, so that the beginning does not count
        sampled = max(sampled, done[-1 - lag]) + sampling + sync
        done.append(max(done[-1], sampled) + training + sync)
    return (done[-1] - done[-1 - len(times)]) / len(times)


def versions_served(history: History) -> list[tuple[int, float, float]]:
    """(version, begin, end) in Unix time, in order: when the engines sampled with which version of the weights.

    A version is served from the end of its publish to the end of the next; the last one up to the last event.
    """
    bands: list[tuple[int, float, float]] = []
    version, begin, now = None, 0.0, 0.0
    for event in history.events:
        published, at = event.get("sync_version", version), event.get("sync_time", event["time"])
        if event["event"] == "resumed":
            published, at = None, now  # nothing was sampled while the run stood still
        if published != version:
            if version is not None:
                bands.append((version, begin, at))
            version, begin = published, at
        now = event["time"]
    return bands if version is None else [*bands, (version, begin, now)]


def _trained(history: History) -> list[Event]:
    """The steps that sampled and trained: none of SFT, and none that were skipped."""
    return [step for step in history.steps if "rollout" in step["seconds"] and "train" in step["seconds"]]


def _schedule(history: History) -> list[Any]:
    config = flatten(history.config)
    return [config.get(key, default) for key, default in _SCHEDULE.items()]


def _compared(history: History) -> dict[str, Any]:
    """What must be equal in two runs whose speeds are compared."""
    machine = history.of("machine")[-1] if history.of("machine") else {}
    config = {k: v for k, v in flatten(history.config).items() if not k.startswith((*_SCHEDULE, *_MAY_DIFFER))}
    return config | {name: machine.get(name) for name in ("device", "cores")}


def _apart(history: History) -> bool:
    """Whether engines and trainer have cores or GPUs of their own."""
    return "cluster" in history.config or history.config.get("engine", {}).get("backend", "embedded") != "embedded"


def _in_turns(steps: Sequence[Event], history: History) -> str:
    times = list(map(times_of, steps))
    now, one, two = (step_s(times, lag) for lag in range(3))
    sampling, training, _ = map(mean, zip(*times, strict=True))
    return (
        f"Sampling ({sampling:.3g} s a step) and training ({training:.3g} s) take turns: the engines are idle for "
        f"{1 - sampling / now:.0%} of a step, the trainer for {sampling / now:.0%}. A step takes {now:.3g} s; with "
        f"rollout.max_lag = 1 it would take about {one:.3g} s ({now / one:.2f} times as fast), with 2 about {two:.3g} "
        f"s ({now / two:.2f}){'' if _apart(history) else ', if they did not share cores or a GPU as they do here'}."
    )


def _ahead(steps: Sequence[Event]) -> str:
    waiting, training, sync = map(mean, zip(*map(times_of, steps), strict=True))
    now = mean(map(History.seconds_of, steps))
    average, most = mean(step["lag_mean"] for step in steps), max(step["lag_max"] for step in steps)
    sentence = (
        f"Sampling runs ahead of training by {average:.2g} versions on average, {most} at most. A step takes "
        f"{now:.3g} s, of which training waits {waiting:.3g} s for samples"
    )
    if waiting < _WAITS * now:
        return f"{sentence}: training bounds it, and a smaller lag might do."
    if not all("idle_engines" in step for step in steps):  # of one process it is not measured
        return f"{sentence}: sampling bounds it."
    busy = now * (1 - mean(step["idle_engines"] for step in steps)) - sync  # engines stop for a sync alone
    turns = max(waiting, busy) + training + sync
    return (
        f"{sentence}: sampling bounds it. In turns (lag 0) the same work would take about {turns:.3g} s "
        f"({turns / now:.2f} times as long), and more where the longest responses would hold up the others."
    )
