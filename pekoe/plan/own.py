"""A run's own model: that of `pekoe plan`, calibrated on what the run's last steps took.

Each stage's seconds are those of the formulas times one factor, so that the recipe as it is takes what it took. What a
change would give, and what a run takes after its fleet or a setting has changed, is simulated with these factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import log, sqrt
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.hardware import Device, recognise
from pekoe.core.journal import Event
from pekoe.plan.forecast import WAYS, Forecast, Schedule, fitting, forecast, schedule_of
from pekoe.plan.recipe import Asked, Own, read_plan
from pekoe.plan.rollout import SIGMA
from pekoe.plan.schedule import simulate
from pekoe.plan.search import one_change, quick
from pekoe.plan.show import changes_of
from pekoe.plan.step import Pace, times_beside

LAST, LEAST = 20, 3  # of a run's last steps, by which it is calibrated; with fewer it is not
AFTER = 5  # steps after a change that are measured; the one before them, the first, is not
_NO_MODEL = (
    UserError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
)  # of another version's journal, or an odd one
_ENOUGH = 1e15  # bytes of a device of which no memory is known
_WAITS = 0.05  # share of a step from which on training waits for samples
_CHANGES = ("train.token_budget", "train.activation_checkpointing", "train.compile", "verify.workers",
            "engine.server.", "cluster.")  # keys of a run that goes on whose change changes its times  # fmt: skip


def trained(events: Sequence[Event]) -> list[Event]:
    """The steps that sampled and trained: none of SFT, and none that were skipped."""
    steps = (event for event in events if event["event"] == "step")
    return [step for step in steps if "rollout" in step["seconds"] and "train" in step["seconds"]]


def calibrated(config: Mapping[str, Any], events: Sequence[Event], run_dir: Path) -> Asked:
    """The recipe of a run, to be planned with the factors of its last steps.

    Args:
        config: the recipe as a tree of TOML.
        events: of the journal, up to the steps that count.
        run_dir: whose model is read where the recipe's own is not here.

    UserError where there are too few steps, where the journal does not say what machine it was, or where the recipe
    cannot be planned.
    """
    steps = trained(events)
    steps = steps[1:][-LAST:]  # the first compiles kernels
    if len(steps) < LEAST:
        raise UserError(f"expected {LEAST + 1} steps or more, got {len(steps)}")
    if not (Path(config["model"]["path"]) / "config.json").is_file() and (run_dir / "model" / "config.json").is_file():
        config = {**config, "model": {**config["model"], "path": str(run_dir / "model")}}
    longest = config.get("rollout", {}).get("max_new_tokens", 0)
    response = min(mean(step["response_tokens"] for step in steps), 0.999 * longest)
    asked = Asked(
        config,
        mean_response=max(1.0, response),
        mean_prompt=mean(step["num_prompt_tokens"] / step["num_rollouts"] for step in steps),
        own=Own(_device(events), _sigma(steps)),
    )
    asked = _with_engines(asked, steps[-1].get("num_engines"))
    if asked.own and not fitting(read_plan(asked))[2]:  # it ran: the formulas of memory are wrong here
        asked = replace(asked, own=replace(asked.own, device=replace(asked.own.device, memory_bytes=_ENOUGH)))
    return _paced(asked, steps)


def _step(asked: Asked) -> Schedule:
    plan = read_plan(asked)
    return schedule_of(asked, plan, simulate(plan.setup))


def _with_engines(asked: Asked, number: int | None) -> Asked:
    """With so many engines as served, where it is a cluster's."""
    assert not isinstance(asked.recipe, str)
    return asked.changed([f"cluster.generation.engines={number}"]) if number and asked.recipe.get("cluster") else asked


def _device(events: Sequence[Event]) -> Device:
    machine = next((e for e in reversed(events) if e["event"] == "machine" and "flop_s" in e), None)
    if machine is None:
        raise UserError("expected a journal that says what its machine reached")
    if known := recognise(machine["device"]):
        return known
    found = re.match(r"(\d+) x ", machine["device"])
    number = int(found[1]) if found else 1  # whose rates are given together
    flop_s, byte_s = machine["flop_s"] / number, machine["byte_s"] / number
    # What a run takes fits: of its memory nothing more is known.
    return Device(machine["device"], _ENOUGH, byte_s, flop_s, 0, 0, byte_s / 4, byte_s / 4, 8, "measured by the run")


def _sigma(steps: Sequence[Event]) -> float:
    """Of a log-normal with the steps' mean length, the longest of whose responses are as long as theirs were.

    Where responses are cut, a quantile is known: ln(maximum / mean) = z sigma - sigma² / 2.
    """
    number, cut = steps[-1]["num_rollouts"], median(step.get("truncation_rate", 0.0) for step in steps)
    longest = median(step.get("response_tokens_max", 0) for step in steps)
    length = mean(step["response_tokens"] for step in steps)
    if longest <= length or length <= 0:
        return 0.05 if longest else SIGMA
    z = NormalDist().inv_cdf(1 - min(0.4, max(cut, 0.5 / number)))
    return min(2.0, max(0.05, z - sqrt(max(0.0, z * z - 2 * log(longest / length)))))


def _paced(asked: Asked, steps: Sequence[Event]) -> Asked:
    """With the factors that give each stage the seconds that it took: medians, which together are the median step."""
    step_s = median(step["step_s"] for step in steps)
    names = {name for step in steps for name in step["seconds"]}
    medians = {name: median(step["seconds"].get(name, 0.0) for step in steps) for name in names}
    scale = step_s / sum(medians.values())

    def seconds(*names: str) -> float:
        return scale * sum(medians.get(name, 0.0) for name in names)

    setup = read_plan(asked).setup
    passes, work, published, _ = times_beside(setup)
    pace = Pace(seconds("recompute", "train") / (passes + work), seconds("sync") / published)
    assert asked.own is not None
    own = replace(asked.own, pace=pace, judging=seconds("verify") / setup.judge_s)
    turns = setup.colocated or not setup.lag
    wanted = seconds("rollout") if turns else step_s  # with lag it is the trainer's wait
    busy = None
    if not turns and all("idle_engines" in step for step in steps):  # a publish alone stops engines that have work
        busy = median(step["step_s"] * (1 - step["idle_engines"]) - step["seconds"].get("sync", 0.0) for step in steps)
    for _ in range(1 if turns else 6):
        time = simulate(read_plan(replace(asked, own=own)).setup).time
        got = time.sampling_s if turns else time.step_s if busy is None else time.engines_busy * time.step_s
        ratio = (wanted if busy is None else busy) / got
        if busy is None and not turns and abs(ratio - 1) < 0.01:
            break
        own = replace(own, sampling=own.sampling * max(1e-3, ratio))
    return replace(asked, own=own)


def ratio(config: Mapping[str, Any], events: Sequence[Event], run_dir: Path, changes: Sequence[str]) -> float | None:
    """Times as many steps a second as a run's model gives with `changes` of its recipe; None where there is none."""
    try:
        asked = calibrated(config, events, run_dir)
        now, then = (_step(one).step_s for one in (asked, asked.changed(changes)))
        return now / then
    except _NO_MODEL:
        return None


def sentences(config: Mapping[str, Any], events: Sequence[Event], run_dir: Path) -> list[str]:
    """Who waits for whom in a run, and what one change would give; empty where it cannot be calibrated."""
    try:
        found = forecast(calibrated(config, events, run_dir), alone=True)
        return list(_said(found, trained(events)[1:][-LAST:])) if found.fits else []
    except _NO_MODEL:
        return []


def _said(found: Forecast, steps: Sequence[Event]) -> Iterator[str]:
    own, setup = found.schedules[0], found.plan.setup
    training, now = own.stages["log-probs"] + own.stages["training"], own.step_s
    lagged = [step for step in steps if "lag_max" in step]
    if lagged:
        average, most = mean(step["lag_mean"] for step in lagged), max(step["lag_max"] for step in lagged)
        who = f"Sampling runs ahead of training by {average:.2g} versions on average, {most} at most. "
        waits = own.wait_s >= _WAITS * now
        bound = "sampling bounds it" if waits else "training bounds it, and a smaller lag might do"
        who += f"A step takes {now:.3g} s, of which training waits {own.wait_s:.3g} s for samples: {bound}"
        slow = quick(found.asked, WAYS[0, False]) if waits and not setup.colocated else None
        turns = "" if slow is None else f". In turns (lag 0) a step would take about {slow[1].step_s:.3g} s"
    else:
        who = f"Sampling ({own.stages['sampling']:.3g} s a step) and training ({training:.3g} s) take turns"
        turns = (
            f": the engines are idle for {own.engines_idle:.0%} of a step of {now:.3g} s, the trainer for "
            f"{own.trainer_idle:.0%}"
        )
    tail = f"the last tenth of a step's responses takes {own.last_tenth_s / own.stages['sampling']:.0%} of its sampling"
    yield f"{who}{turns}; {tail}."
    options = one_change(found)
    model = f"The model of pekoe plan, calibrated on the last {len(steps)} steps"
    if not options:
        yield f"{model}, knows no one change that would give 2 % more steps a second."
        return
    doctor = any(change.startswith("train.") for option in options[:3] for change in option.changes)
    memory = "; what fits in memory, pekoe doctor says" if doctor else ""
    yield f"{model}: {changes_of(options)}{memory}."


def check_forecast(config: Mapping[str, Any], events: Sequence[Event], run_dir: Path) -> dict[str, Any] | None:
    """What the steps since the last change of a setting or of the fleet took, beside what those before it predict.

    None where there is no change, or where too few steps came before it or since, or where no model can be made.
    """
    start, changed = _last_change(events)
    before, after = trained(events[:start]), trained(events[start:])[1:]
    if not changed or len(after) < AFTER:
        return None
    old = _tree_with(config, {key: was for key, (was, _) in changed.items() if key != "engines"})
    try:
        known = calibrated(old, events[:start], run_dir)
        later = _with_engines(replace(known, recipe=_tree_with(config, {}), overrides=()), after[-1].get("num_engines"))
        found = [_step(asked) for asked in (known, later)]
    except _NO_MODEL:
        return None
    steps = {"before": before[1:][-LAST:], "measured": after[:AFTER]}
    took = {name: round(median(step["step_s"] for step in each), 4) for name, each in steps.items()}
    ratio = found[1].step_s / found[0].step_s  # what the model leaves of the steps before is left here, too
    return {"since": after[0]["step"] - 1, "changed": changed, "predicted_s": round(took["before"] * ratio, 4)} | {
        f"{name}_s": value for name, value in took.items()
    }


def _last_change(events: Sequence[Event]) -> tuple[int, dict[str, list[Any]]]:
    """Where in `events` the last change is, and what changed: (value before, and after) by key."""
    start, changed, engines = 0, dict[str, list[Any]](), None
    for i, event in enumerate(events):
        if event["event"] == "resumed":
            keys = {key: pair for key, pair in event.get("changed", {}).items() if key.startswith(_CHANGES)}
            start, changed = (i, keys) if keys else (start, changed)
            engines = None if keys else engines  # the recipe's own number, which the keys have
        elif event["event"] == "step" and "num_engines" in event:
            if engines not in (None, event["num_engines"]):
                start, changed = i, {"engines": [engines, event["num_engines"]]}
            engines = event["num_engines"]
    return start, changed


def _tree_with(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree of TOML, with the values of these keys; None: without the key."""
    tree: dict[str, Any] = {key: _tree_with(v, {}) if isinstance(v, Mapping) else v for key, v in config.items()}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return tree


def forecast_sentence(event: Event) -> str:
    """A sentence on an event "forecast"."""
    changes = ", ".join(f"{key} {was} → {now}" for key, (was, now) in event["changed"].items())
    error = event["predicted_s"] / event["measured_s"] - 1
    return (
        f"Since step {event['since']} ({changes}) a step takes {event['measured_s']:.3g} s; predicted from the steps "
        f"before, of {event['before_s']:.3g} s: {event['predicted_s']:.3g} s ({error:+.0%})."
    )
