"""Sentences about where a run's time went, each computed from the run's measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pekoe.core.errors import UserError
from pekoe.core.journal import Event
from pekoe.core.roofline import Ceilings
from pekoe.core.words import counted
from pekoe.plan import own
from pekoe.report.history import History, drawn, read_history
from pekoe.report.learning import learning

_WORK = {"rollout": "Sampling", "train": "Training"}  # the phases whose operations are counted
_PREFILL = ("prefill", "cached", "shared")  # the tokens of context that were computed, and those that were not


def findings(history: History) -> list[str]:
    """All of them: whether the run learned, then where its time went. Empty for a run without steps."""
    return [*learning(history), *speed(history)]


def speed(history: History) -> list[str]:
    """Where the time went, the most important first. Empty for a run without steps."""
    steps = history.steps
    if not steps:
        return []
    sentences = [
        _phases(steps),
        *own.sentences(history.config, history.events, history.path),
        *map(own.forecast_sentence, history.of("forecast")),
        *_bounds(history),
        _prefill(steps),
        _cluster(steps),
        _numerics(steps),
    ]
    return [sentence for sentence in sentences if sentence]


def findings_of(run_dir: Path) -> list[str]:
    """The findings of a run that is done, whatever state its files are in."""
    try:
        with drawn(run_dir):
            return findings(read_history(run_dir))
    except UserError as error:
        return [f"no findings: {error}"]


def phase_shares(steps: Sequence[Event]) -> dict[str, float]:
    """Share of each phase in the time of all steps, the largest first."""
    sums: Counter[str] = Counter()
    for step in steps:
        sums.update(step["seconds"])
    total = sum(sums.values()) or 1.0
    return {name: value / total for name, value in sums.most_common()}


def _phases(steps: Sequence[Event]) -> str:
    shares = phase_shares(steps)
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    first = next(iter(shares))
    seconds = median(map(History.seconds_of, steps))
    rate = f"{first}_tokens_per_s"
    speeds = [step[rate] for step in steps if rate in step]
    speed = f", at {median(speeds):,.0f} tokens a second" if speeds else ""
    most = f"A step takes {seconds:.3g} s (median of {len(steps)}): {listed}. Most of it is {first}{speed}"
    return f"{most}."


def utilisation(history: History, phase: str) -> list[tuple[Event, Ceilings, float, str]]:
    """How near each step came to its machine's ceilings in `phase`, for the steps whose work is counted.

    Gives the step, the ceilings of the machine that ran it, the share of the phase that its arithmetic or its bytes
    would take at them (whichever is larger), and which of the two that is.
    """
    used: list[tuple[Event, Ceilings, float, str]] = []
    ceilings: Ceilings | None = None
    for event in history.events:
        if event["event"] == "machine":  # a run may go on elsewhere
            ceilings = Ceilings(event["flop_s"], event["byte_s"]) if "flop_s" in event else None
        elif event["event"] == "step" and ceilings and f"{phase}_bytes" in event and event["seconds"].get(phase):
            work = event[f"{phase}_flops"], event[f"{phase}_bytes"]
            used.append((event, ceilings, *ceilings.reached(*work, event["seconds"][phase])))
    return used


def _bounds(history: History) -> list[str]:
    """The roofline bound of each phase whose operations are counted."""
    sentences: list[str] = []
    for phase in (name for name in phase_shares(history.steps) if name in _WORK):
        used = utilisation(history, phase)
        if not used:
            continue
        ceilings, share = used[-1][1], median(share for _, _, share, _ in used)
        by = Counter(by for _, _, _, by in used).most_common(1)[0][0]
        flop_s = median(step[f"{phase}_flops"] / step["seconds"][phase] for step, _, _, _ in used)
        ceiling = f"memory's {ceilings.byte_s / 1e9:,.0f} GB/s"
        if by == "arithmetic":
            ceiling = f"a matrix product's {ceilings.flop_s / 1e9:,.0f} GFLOP/s"
        sentences.append(
            f"{_WORK[phase]} computes {flop_s / 1e9:,.1f} GFLOP/s; at {ceiling}, measured here, it would take "
            f"{share:.0%} of its time: {_remedy(phase, by, share, history)}."
        )
    return sentences


def _remedy(phase: str, by: str, share: float, history: History) -> str:
    if share >= 0.5:
        cure = "a faster device" if by == "arithmetic" else "larger batches"
        return f"{by} bounds it; {cure} would help, little else"
    communication = "communication, " if "cluster" in history.config else ""
    small = f"the rest goes to {communication}Python and small operations between the products"
    if phase == "rollout":
        engine = history.config.get("engine", {})
        limits = {"engine.max_running": engine.get("max_running", 0)}
        if engine.get("backend", "embedded") != "embedded":
            limits["engine.server.max_requests"] = engine.get("server", {}).get("max_requests", 256)
        key = min(limits, key=limits.__getitem__)
        if median(step["num_rollouts"] for step in history.steps) <= limits[key]:
            key = "rollout.prompts_per_step"
        return f"{small}, which more responses at once would share ({key})"
    return f"{small}, which more tokens a micro-batch would share"


def _prefill(steps: Sequence[Event]) -> str:
    prefill, cached, shared = (sum(step.get(f"{name}_tokens", 0) for step in steps) for name in _PREFILL)
    whole = prefill + cached + shared
    if not whole:
        return ""
    return (
        f"Prefix sharing saved {(cached + shared) / whole:.0%} of prefill: {cached + shared:,} of {whole:,} tokens of "
        f"context, {shared:,} by a group's one prefill and {cached:,} found in the cache."
    )


def _cluster(steps: Sequence[Event]) -> str:
    steps = [step for step in steps if "idle_engines" in step]
    if not steps:
        return ""
    engines, ranks = (median(step[name] for step in steps) for name in ("idle_engines", "idle_ranks"))
    lost = steps[-1].get("num_lost_engines", 0)
    sentence = f"Of a step, an engine is idle for {engines:.0%} and a training process for {ranks:.0%} (medians)"
    again = f"; {counted(lost, 'engine')} {'was' if lost == 1 else 'were'} lost and started again" if lost else ""
    return f"{sentence}{again}."


def _numerics(steps: Sequence[Event]) -> str:
    name, what = "logprob_diff_max", "Sampling and training log-probs differ by at most"
    if any("lag_max" in step for step in steps):  # those of samples are of older weights
        name, what = "sync_canary_diff", "Of a test prompt, log-probs of engines and trainer differ by at most"
    values = [step[name] for step in steps if name in step]
    by_lag: dict[int, float] = {}
    for step in steps:
        for lag, value in step.get("lag_logprob_diff_max", {}).items():
            by_lag[int(lag)] = max(by_lag.get(int(lag), 0.0), value)
    listed = ", ".join(f"{by_lag[lag]:.1e} at lag {lag}" for lag in sorted(by_lag))
    more = f" Of samples, sampling and training log-probs differ by at most {listed}." if listed else ""
    return f"{what} {max(values):.1e}.{more}" if values else ""
