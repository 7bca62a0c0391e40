"""What it gave that sampling runs ahead of training (`rollout.max_lag`), and which version served when."""

from __future__ import annotations

from statistics import median
from typing import Any

from pekoe.config.base import flatten
from pekoe.plan import own
from pekoe.report.history import History

_SCHEDULE = {"rollout.max_lag": 0, "rollout.during_update": "wait", "rollout.window": 1}
# Keys that may differ beside the schedule: those that follow from it, and those that leave a step's time as it is.
_FOLLOW, _NO_TIME = ("algo.proximal", "algo.correction"), ("num_steps", "run.dir", "run.seed", "track.", "eval.")
_MAY_DIFFER = (*_FOLLOW, *_NO_TIME, "model.template.date", "train.save_every", "train.keep_checkpoints")


def gain(first: History, second: History) -> str:
    """A sentence on what the larger lag of two runs gave, beside what the model of the one in turns predicts.

    Empty unless the schedule is the only difference of note between their configs and their machines. Both figures are
    without the first step and the last; what it gave is by the median step.
    """
    before, after = sorted((first, second), key=lambda history: _schedule(history)[0])
    changes = [
        f"{key} {was} → {now}"
        for key, was, now in zip(_SCHEDULE, _schedule(before), _schedule(after), strict=True)
        if was != now
    ]
    steps, later = own.trained(before.events)[1:-1], own.trained(after.events)[1:-1]
    if not changes or _compared(before) != _compared(after) or not steps or not later:
        return ""
    was, now = (median(map(History.seconds_of, each)) for each in (steps, later))
    took = f"{was:.3g} s a step in {before.name}, {now:.3g} s in {after.name}"
    predicted = own.ratio(before.config, before.events, before.path, _keys(after)) if not _schedule(before)[0] else None
    beside = "" if predicted is None else f"; predicted from {before.name}: {predicted:.2f}x"
    return f"{', '.join(changes)} gave {was / now:.2f}x steps per second ({took}{beside})."


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


def _schedule(history: History) -> list[Any]:
    config = flatten(history.config)
    return [config.get(key, default) for key, default in _SCHEDULE.items()]


def _compared(history: History) -> dict[str, Any]:
    """What must be equal in two runs whose speeds are compared."""
    machine = history.of("machine")[-1] if history.of("machine") else {}
    config = {k: v for k, v in flatten(history.config).items() if not k.startswith((*_SCHEDULE, *_MAY_DIFFER))}
    return config | {name: machine.get(name) for name in ("device", "cores")}


def _keys(history: History) -> list[str]:
    return [f"{key}={value}" for key, value in zip(_SCHEDULE, _schedule(history), strict=True)]
