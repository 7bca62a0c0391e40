"""The report's charts as JSON for Plotly: a curve for each metric, and a timeline of the phases of each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go

from pekoe.core.journal import Event
from pekoe.report.findings import utilisation
from pekoe.report.history import History
from pekoe.report.lag import versions_served

# (metric, title, name of the y axis, its number format)
CURVES = (
    ("reward", "reward", "reward, mean", ".2f"),
    ("score", "score of own rewards", "score, mean", ".2f"),
    ("loss", "loss", "loss", ".3g"),
    ("pass_rate", "right among the sampled responses", "share of responses", ".0%"),
    ("response_tokens", "response length", "tokens, mean", ",.0f"),
    ("truncation_rate", "responses cut at max_new_tokens", "share of responses", ".0%"),
    ("entropy", "entropy of the policy", "nats a token", ".3f"),
    ("clip_fraction", "tokens whose gradient was clipped", "share of tokens", ".1%"),
    ("grad_norm", "gradient norm", "norm", ".3g"),
    ("lag_mean", "age of the weights that sampled, mean", "versions", ".2f"),
    ("lag_max", "age of the weights that sampled, oldest token", "versions", ".0f"),
    ("correction_fraction", "tokens whose importance weight was bounded", "share of tokens", ".1%"),
    ("correction_weight_max", "largest importance weight", "weight", ".3g"),
    ("logprob_diff_max", "difference of sampling and training log-probs", "largest of a step", ".0e"),
    ("approx_kl", "KL of a step's updates, approximate", "nats a token", ".1e"),
    ("rollout_tokens_per_s", "speed of sampling", "tokens a second", ",.0f"),
    ("train_tokens_per_s", "speed of training", "tokens a second", ",.0f"),
    ("idle_engines", "engines idle", "share of the step", ".0%"),
    ("idle_ranks", "training processes idle", "share of the step", ".0%"),
    ("train_peak_bytes", "peak memory of training", "bytes", ".3s"),
    ("fault_rate", "responses that could not be judged", "share of responses", ".1%"),
)
_PHASE_WORDS = {"rollout": "sampling", "train": "training"}
COLOURS = ("#2f6f9f", "#c4622d", "#4f8f4f", "#8a5fa0", "#b0913a", "#5b8f95")
PHASES = {"rollout": COLOURS[0], "verify": COLOURS[3], "recompute": COLOURS[4], "train": COLOURS[1], "sync": COLOURS[2]}
BANDS = ("#6d8a96", "#a3b8bf")  # of versions, in turn
_MOST_SHADED = 300  # bands behind the phases; more would be lines


def charts(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Plotly figures; the curves of several runs share one figure."""
    figures: list[dict[str, Any]] = []
    if any(history.of("eval") for history in histories):
        figures.append(_figure(histories, "pass@1 on held-out problems, 95 % intervals", "pass@1", ".0%", _eval_line))
    for name, title, unit, form in CURVES:
        if any(name in step for history in histories for step in history.steps):
            axis = {"type": "log"} if name == "logprob_diff_max" else {"rangemode": "tozero"} if "%" in form else {}
            line_of = partial(_metric_line, name=name, form=form)
            figures.append(_figure(histories, title, unit, form, line_of, **axis))
    for phase, word in _PHASE_WORDS.items():
        if any(utilisation(history, phase) for history in histories):
            title, line_of = f"{word}, of the speed possible here", partial(_used_line, phase=phase)
            figures.append(_figure(histories, title, "share of that speed", ".0%", line_of, rangemode="tozero"))
    return figures


def timeline(history: History) -> dict[str, Any] | None:
    """The phases of each step, over seconds since the first one began, and the version that engines sample with."""
    steps = history.steps
    if not steps:
        return None
    begin = steps[0]["time"] - history.seconds_of(steps[0])
    bars: list[tuple[str, float, float, str]] = []  # phase, start, length, text
    for step in steps:
        at = step["time"] - history.seconds_of(step) - begin
        for phase, seconds in step["seconds"].items():
            bars.append((phase, round(at, 3), seconds, f"step {step['step']}: {phase} {seconds:.3g} s"))
            at += seconds
    figure = go.Figure()
    for phase in dict.fromkeys(phase for phase, *_ in bars):
        rows, starts, lengths, texts = zip(*(bar for bar in bars if bar[0] == phase), strict=True)
        marker = {"color": PHASES.get(phase, COLOURS[5]), "line": {"width": 0}}
        text = {"hovertext": texts, "hoverinfo": "text"}
        figure.add_bar(name=phase, x=lengths, y=rows, base=starts, orientation="h", marker=marker, **text)
    _add_versions(figure, history, begin, steps[-1]["time"])
    axis = "seconds since the first step began"
    figure.update_layout(barmode="overlay", showlegend=False, title="phases of each step", xaxis_title=axis)
    return _json(figure)


def _add_versions(figure: go.Figure, history: History, begin: float, end: float) -> None:
    """A bar for each version, labelled where the label fits, and behind all rows a band for every other one."""
    served = [(v, max(first, begin), min(last, end)) for v, first, last in versions_served(history)]
    bands = [(v, round(first - begin, 3), round(last - first, 3)) for v, first, last in served if first < last]
    if not bands:
        return
    versions, starts, lengths = zip(*bands, strict=True)
    marker = {"color": [BANDS[v % 2] for v in versions], "line": {"width": 0}}
    text = {"text": [f"v{v}" for v in versions], "textposition": "inside", "insidetextanchor": "middle"}
    hover = {"hovertext": [f"version {v}: {length:.3g} s" for v, _, length in bands], "hoverinfo": "text"}
    place = {"x": lengths, "y": ["version"] * len(bands), "base": starts, "orientation": "h"}
    figure.add_bar(name="version", marker=marker, textangle=0, **place, **text, **hover)
    band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}}
    shown = [(start, start + length) for v, start, length in bands if v % 2 and len(bands) <= _MOST_SHADED]
    shapes = [band | {"x0": x0, "x1": x1, "fillcolor": "rgba(128,128,128,0.13)"} for x0, x1 in shown]
    figure.update_layout(uniformtext={"mode": "hide", "minsize": 8}, shapes=shapes)


Line = tuple[Sequence[Event], dict[str, Any]]  # the events whose steps are the x axis, and the curve's other attributes


def _metric_line(history: History, name: str, form: str) -> Line:
    steps = [step for step in history.steps if step.get(name) is not None]
    return steps, {"y": [step[name] for step in steps], "hovertemplate": f"step %{{x}}: %{{y:{form}}}"}


def _used_line(history: History, phase: str) -> Line | None:
    """For each step, the share of `phase` that its operations or bytes would take at the machine's ceilings."""
    used = utilisation(history, phase)
    shares, limits = [share for _, _, share, _ in used], [limit for _, _, _, limit in used]
    attributes = {"y": shares, "text": limits, "hovertemplate": "step %{x}: %{y:.0%} of what %{text} allows"}
    return ([step for step, _, _, _ in used], attributes) if used else None


def _eval_line(history: History) -> Line:
    evals = history.of("eval")
    above = [event["ci95"][1] - event["pass_at_1"] for event in evals]
    below = [event["pass_at_1"] - event["ci95"][0] for event in evals]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    hover = {"hovertemplate": "step %{x}: %{y:.1%}", "mode": "lines+markers"}
    return evals, {"y": [event["pass_at_1"] for event in evals], "error_y": bars} | hover


def _figure(
    histories: Sequence[History],
    title: str,
    unit: str,
    form: str,
    line_of: Callable[[History], Line | None],
    **axis: str,
) -> dict[str, Any]:
    """A figure with a curve for each run that has one. `unit`: of the y axis; `axis`: its other attributes."""
    figure = go.Figure()
    for number, history in enumerate(histories):
        if (line := line_of(history)) is not None:
            events, attributes = line
            style = {"color": COLOURS[number % len(COLOURS)], "width": 2}
            attributes = {"mode": "lines" if len(events) > 1 else "markers", "line": style} | attributes
            figure.add_scatter(name=history.name, x=[event["step"] for event in events], **attributes)
    figure.update_layout(
        title=title,
        xaxis_title="step",
        yaxis={"title": {"text": unit, "standoff": 10}, "tickformat": form, **axis},
        showlegend=len(histories) > 1,
    )
    return _json(figure)


def _json(figure: go.Figure) -> dict[str, Any]:
    """The figure without Plotly's own template: the page has a light and a dark one."""
    tree = json.loads(figure.to_json() or "{}")
    tree["layout"].pop("template", None)
    return tree
