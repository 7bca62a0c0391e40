"""The report's charts as JSON for Plotly: a curve for each metric, and a timeline of the phases of each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from pekoe.core.journal import Event
from pekoe.report.findings import utilisation
from pekoe.report.history import History

# (metric, title, number format of its axis)
CURVES = (
    ("reward", "reward", ".2f"),
    ("loss", "loss", ".3g"),
    ("pass_rate", "pass rate of the rollouts", ".0%"),
    ("response_tokens", "response length (tokens)", ",.0f"),
    ("truncation_rate", "responses cut at max_new_tokens", ".0%"),
    ("entropy", "entropy (nats a token)", ".3f"),
    ("clip_fraction", "tokens clipped", ".1%"),
    ("grad_norm", "gradient norm", ".3g"),
    ("logprob_diff_max", "largest difference of sampling and training log-probs", ".0e"),
    ("approx_kl", "approximate KL of a step", ".1e"),
    ("rollout_tokens_per_s", "sampled tokens a second", ",.0f"),
    ("train_tokens_per_s", "trained tokens a second", ",.0f"),
    ("idle_engines", "of a step, an engine idle", ".0%"),
    ("idle_ranks", "of a step, a training rank idle", ".0%"),
    ("train_peak_bytes", "memory at the peak of an optimizer step (bytes)", ".3s"),
    ("fault_rate", "FAULT verdicts", ".1%"),
)
COLOURS = ("#2f6f9f", "#c4622d", "#4f8f4f", "#8a5fa0", "#b0913a", "#5b8f95")
PHASES = {"rollout": COLOURS[0], "verify": COLOURS[3], "recompute": COLOURS[4], "train": COLOURS[1], "sync": COLOURS[2]}


def charts(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Plotly figures; the curves of several runs share one figure."""
    figures = [_evals(histories)] if any(history.of("eval") for history in histories) else []
    for name, title, form in CURVES:
        if any(name in step for history in histories for step in history.steps):
            figures.append(_curve(histories, name, title, form))
    for phase in ("rollout", "train"):
        if figure := _utilisation(histories, phase):
            figures.append(figure)
    return [_json(figure) for figure in figures]


def timeline(history: History) -> dict[str, Any] | None:
    """The phases of each step, over seconds since the first one began."""
    steps = history.steps
    if not steps:
        return None
    begin = steps[0]["time"] - history.seconds_of(steps[0])
    bars: dict[str, tuple[list[float], list[float], list[str]]] = {}
    for step in steps:
        at = step["time"] - history.seconds_of(step) - begin
        for phase, seconds in step["seconds"].items():
            starts, lengths, texts = bars.setdefault(phase, ([], [], []))
            starts.append(round(at, 3))
            lengths.append(seconds)
            texts.append(f"step {step['step']}: {phase} {seconds:.3g} s")
            at += seconds
    figure = go.Figure()
    for phase, (starts, lengths, texts) in bars.items():
        figure.add_bar(
            name=phase,
            y=[phase] * len(starts),
            x=lengths,
            base=starts,
            orientation="h",
            marker_color=PHASES.get(phase, COLOURS[5]),
            marker_line_width=0,
            hovertext=texts,
            hoverinfo="text",
        )
    figure.update_layout(barmode="overlay", showlegend=False, title="phases of each step", xaxis_title="seconds")
    return _json(figure)


def _curve(histories: Sequence[History], name: str, title: str, form: str) -> go.Figure:
    figure = go.Figure()
    for number, history in enumerate(histories):
        steps = [step for step in history.steps if step.get(name) is not None]
        values = [step[name] for step in steps]
        _add_line(figure, history, number, steps, values, hovertemplate=f"step %{{x}}: %{{y:{form}}}")
    _title(figure, histories, title, form)
    if name == "logprob_diff_max":
        figure.update_yaxes(type="log")
    elif "%" in form:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _utilisation(histories: Sequence[History], phase: str) -> go.Figure | None:
    """For each step, the share of `phase` that its operations or bytes would take at the machine's ceilings."""
    figure = go.Figure()
    for number, history in enumerate(histories):
        if used := utilisation(history, phase):
            steps, shares = [step for step, _, _, _ in used], [share for _, _, share, _ in used]
            hover = "step %{x}: %{y:.0%} of %{text}'s ceiling"
            _add_line(figure, history, number, steps, shares, text=[by for _, _, _, by in used], hovertemplate=hover)
    if not figure.data:
        return None
    _title(figure, histories, f"utilisation in {phase}: share of the machine's ceiling", ".0%")
    return figure.update_yaxes(rangemode="tozero")


def _evals(histories: Sequence[History]) -> go.Figure:
    figure = go.Figure()
    for number, history in enumerate(histories):
        evals = history.of("eval")
        means = [event["pass_at_1"] for event in evals]
        above = [event["ci95"][1] - mean for event, mean in zip(evals, means, strict=True)]
        below = [mean - event["ci95"][0] for event, mean in zip(evals, means, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        hover = "step %{x}: %{y:.1%}"
        _add_line(figure, history, number, evals, means, mode="lines+markers", error_y=bars, hovertemplate=hover)
    _title(figure, histories, "pass@1 on held-out problems, 95 % intervals", ".0%")
    return figure


def _add_line(
    figure: go.Figure, history: History, number: int, events: Sequence[Event], values: Sequence[float], **more: Any
) -> None:
    """Add the curve of one run, the `number`th of the figure: `values` over the steps of `events`."""
    mode = {"mode": "lines" if len(events) > 1 else "markers"}
    line = {"color": COLOURS[number % len(COLOURS)], "width": 2}
    steps = [event["step"] for event in events]
    figure.add_scatter(name=history.name, x=steps, y=values, line=line, **(mode | more))


def _title(figure: go.Figure, histories: Sequence[History], title: str, form: str) -> None:
    figure.update_layout(title=title, yaxis_tickformat=form, showlegend=len(histories) > 1)


def _json(figure: go.Figure) -> dict[str, Any]:
    """The figure without Plotly's own template: the page has a light and a dark one."""
    tree = json.loads(figure.to_json() or "{}")
    tree["layout"].pop("template", None)
    return tree
