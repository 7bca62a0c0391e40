"""Renders the report: one HTML file that needs no network. Text of models is in the page as data, never as markup."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from pekoe import __version__
from pekoe.config.base import flatten
from pekoe.core.journal import Event
from pekoe.report.charts import charts, timeline
from pekoe.report.findings import phase_shares, speed
from pekoe.report.history import History, drawn
from pekoe.report.lag import gain
from pekoe.report.learning import learning

ASSETS = Path(__file__).with_name("assets")


def render(histories: Sequence[History], live: bool = False) -> str:
    """The page of one run; with several, their curves share charts, and the responses are those of the first.

    Args:
        live: the page asks its server whether the run has grown.

    UserError where a journal lacks what is drawn.
    """
    with drawn(*(history.path for history in histories)):
        return _render(histories, live)


def _render(histories: Sequence[History], live: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    first = histories[0]
    if len({history.name for history in histories}) < len(histories):
        for history in histories:
            history.label = str(history.path)
    data = {"charts": charts(histories), "timeline": timeline(first)}
    data |= {"responses": first.responses, "pieces": first.pieces}
    return environment.get_template("page.html.j2").render(
        title=" and ".join(history.name for history in histories),
        runs=[_run(history, gain(first, history)) for history in histories],
        differences=_differences(histories),
        left_out=first.left_out,
        has_responses=bool(first.responses),
        faults=[line for line in first.responses if line["label"] == "fault"][:50],
        data=_as_script(data),
        plotly=get_plotlyjs(),
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        live=live,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _run(history: History, compared: str) -> dict[str, Any]:
    """The data of a run that the page shows beside the charts. `compared`: with the first run; may be empty."""
    return {
        "name": history.name,
        "path": str(history.path),
        "figures": _figures(history),
        "learning": learning(history),
        "speed": [*filter(None, [compared]), *speed(history)],
        "phases": [(name, f"{share:.0%}", share) for name, share in phase_shares(history.steps).items()],
        "ledger": history.ledger,
        "resumed": [event["step"] for event in history.of("resumed")],
        "config": [(key, _written(value)) for key, value in flatten(history.config).items()],
        "machine": flatten(history.of("machine")[-1]).items() if history.of("machine") else [],
    }


def _differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Every key of which two recipes differ, with each run's value."""
    configs = [flatten(history.config) for history in histories]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [(key, [_written(config[key]) if key in config else "" for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _written(value: Any) -> str:
    """As in a recipe, but for the quotes around text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _figures(history: History) -> list[tuple[str, str]]:
    """(label, value) pairs at the top of the page."""
    steps, config, evals = history.steps, history.config, history.of("eval")
    data = config.get("data", {})
    sources = data.get("train") or ", ".join(source.get("path", "") for source in data.get("sources", []))
    planned = f" of {config['num_steps']}" if "num_steps" in config else ""
    figures = [("model", str(config.get("model", {}).get("path", "not known")))]
    figures += [("data", str(sources or "not known")), ("steps", f"{len(steps)}{planned}")]
    if evals:
        figures.append(("pass@1 before", _pass(evals[0])))
    if len(evals) > 1:
        figures.append(("pass@1 after", _pass(evals[-1])))
    if steps and "pass_rate" in steps[0]:
        figures.append(("right among sampled responses", f"{steps[0]['pass_rate']:.1%} → {steps[-1]['pass_rate']:.1%}"))
        figures.append(("responses", f"{sum(step['num_rollouts'] for step in steps):,}"))
    if steps:
        figures.append(("time in steps", _duration(sum(map(history.seconds_of, steps)))))
    return figures


def _pass(event: Event) -> str:
    low, high = event["ci95"]
    return f"{event['pass_at_1']:.1%} [{low:.1%}, {high:.1%}] at step {event['step']}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _as_script(data: dict[str, Any]) -> str:
    """JSON that cannot close the script element around it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
