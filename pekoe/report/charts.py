"""The report's charts, as JSON for Plotly: curves of each metric, and when each phase of each step took place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from pekoe.report.findings import utilisation
from pekoe.report.history import History

# (metric, title, how its axis is written)
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
    """Plotly figures of one run, or of several over one another."""
    figures = [_evals(histories)] if any(history.of("eval") for history in histories) else []
    for name, title, form in CURVES:
        if any(name in step for history in histories for step in history.steps):
            figures.append(_curve(histories, name, title, form))
    for phase in ("rollout", "train"):
        if figure := _utilisation(histories, phase):
            figures.append(figure)
    return [_json(figure) for figure in figures]


def timeline(history: History) -> dict[str, Any] | None:
    """The phases of each step, on the clock of the run."""
    steps = history.steps
    if not steps:
        return None
    begin = steps[0]["time"] - history.seconds_of(steps[0])
    bars: dict[str, tuple[list[float], list[float], list[str]]] = {}
    for step in steps:
        at = step["time"] - history.seconds_of(step) - begin
        for phase, seconds in step["seconds"].items():
            bases, lengths, told = bars.setdefault(phase, ([], [], []))
            bases.append(round(at, 3))
            lengths.append(seconds)
            told.append(f"step {step['step']}: {phase} {seconds:.3g} s")
            at += seconds
    figure = go.Figure()
    for phase, (bases, lengths, told) in bars.items():
        figure.add_bar(
            name=phase,
            y=[phase] * len(bases),
            x=lengths,
            base=bases,
            orientation="h",
            marker_color=PHASES.get(phase, COLOURS[5]),
            marker_line_width=0,
            hovertext=told,
            hoverinfo="text",
        )
    figure.update_layout(barmode="overlay", showlegend=False, title="phases of each step", xaxis_title="seconds")
    return _json(figure)


def _curve(histories: Sequence[History], name: str, title: str, form: str) -> go.Figure:
    figure = go.Figure()
    for number, history in enumerate(histories):
        steps = [step for step in history.steps if step.get(name) is not None]
        figure.add_scatter(
            name=history.name,
            x=[step["step"] for step in steps],
            y=[step[name] for step in steps],
            mode="lines" if len(steps) > 1 else "markers",
            line={"color": COLOURS[number % len(COLOURS)], "width": 2},
            hovertemplate=f"step %{{x}}: %{{y:{form}}}",
        )
    figure.update_layout(title=title, yaxis_tickformat=form, showlegend=len(histories) > 1)
    if name == "logprob_diff_max":
        figure.update_yaxes(type="log")
    elif "%" in form:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _utilisation(histories: Sequence[History], phase: str) -> go.Figure | None:
    """Of each step, the share of `phase` that its operations or bytes would take at the machine's ceilings."""
    figure = go.Figure()
    for number, history in enumerate(histories):
        if found := utilisation(history, phase):
            figure.add_scatter(
                name=history.name,
                x=[step["step"] for step, _, _, _ in found],
                y=[share for _, _, share, _ in found],
                text=[by for _, _, _, by in found],
                mode="lines" if len(found) > 1 else "markers",
                line={"color": COLOURS[number % len(COLOURS)], "width": 2},
                hovertemplate="step %{x}: %{y:.0%} of %{text}'s ceiling",
            )
    if not figure.data:
        return None
    figure.update_layout(title=f"utilisation in {phase}: share of the machine's ceiling", yaxis_tickformat=".0%")
    figure.update_layout(showlegend=len(histories) > 1)
    return figure.update_yaxes(rangemode="tozero")


def _evals(histories: Sequence[History]) -> go.Figure:
    figure = go.Figure()
    for number, history in enumerate(histories):
        evals = history.of("eval")
        means = [event["pass_at_1"] for event in evals]
        figure.add_scatter(
            name=history.name,
            x=[event["step"] for event in evals],
            y=means,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [e["ci95"][1] - mean for e, mean in zip(evals, means, strict=True)],
                "arrayminus": [mean - e["ci95"][0] for e, mean in zip(evals, means, strict=True)],
            },
            mode="lines+markers",
            line={"color": COLOURS[number % len(COLOURS)], "width": 2},
            hovertemplate="step %{x}: %{y:.1%}",
        )
    figure.update_layout(title="pass@1 on held-out problems, 95 % intervals", yaxis_tickformat=".0%")
    figure.update_layout(showlegend=len(histories) > 1)
    return figure


def _json(figure: go.Figure) -> dict[str, Any]:
    """Without Plotly's own look: the page has one for light and dark."""
    found = json.loads(figure.to_json() or "{}")
    found["layout"].pop("template", None)
    return found
