"""A plan as one HTML page that needs no network: the timeline of its steps, and the front of time against price."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pekoe.plan.forecast import Forecast
from pekoe.plan.schedule import simulate
from pekoe.plan.search import Option

WIDTH, ROW, LEFT = 900, 26, 90
COLOURS = {"sampling": "#2f6f9f", "judging, log-probs, training": "#c4622d", "publishing": "#4f8f4f"}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px sans-serif;max-width:1000px;margin:2em auto}}pre{{white-space:pre-wrap}}
text{{font:12px sans-serif}}</style>
<h1>{title}</h1><p>Every figure is projected, but for those marked in the text below.</p>{plots}<pre>{text}</pre></html>
"""


def render(found: Forecast, options: Sequence[Option], front: Sequence[Option], text: str) -> str:
    """The page. `text`: what the command prints."""
    plan = found.plan
    title = f"{plan.setup.engine.shape.name} on {plan.layout.gpus} x {plan.setup.engine.device.name}: {plan.layout}"
    plots = timeline(found) if found.fits else ""
    return PAGE.format(
        title=escape(title), plots=plots + (front_plot(options, front) if options else ""), text=escape(text)
    )


def timeline(found: Forecast) -> str:
    """A row for each simulated step: when its batch is sampled, trained on, and its weights are published."""
    rows = simulate(found.plan.setup, 4).timeline
    end = max(published for *_, published in rows)
    scale, marks = (WIDTH - LEFT) / end, list[str]()
    for i, (put, sampled, trained, published) in enumerate(rows):
        marks.append(_text(0, i * ROW + 17, f"step {i + 1}"))
        spans = zip(COLOURS.items(), (put, sampled, trained), (sampled, trained, published), strict=True)
        for (name, colour), start, stop in spans:
            marks.append(
                f'<rect x="{LEFT + start * scale:.1f}" y="{i * ROW}" width="{max(1.0, (stop - start) * scale):.1f}" '
                f'height="{ROW - 6}" fill="{colour}"><title>{name}: {stop - start:.4g} s</title></rect>'
            )
    legend = "".join(
        _text(LEFT + 220 * n, len(rows) * ROW + 18, name, c) for n, (name, c) in enumerate(COLOURS.items())
    )
    return f"<h2>Timeline of {end:,.0f} s</h2>" + _svg("".join(marks) + legend, len(rows) * ROW + 30)


def front_plot(options: Sequence[Option], front: Sequence[Option]) -> str:
    """Hours of a run against GPU-hours; filled: those than which no other is both quicker and cheaper."""
    most, longest = (max(getattr(o.schedule, name) for o in options) for name in ("gpu_hours", "hours"))
    marks = list[str]()
    for option in options:
        x, y = LEFT + option.schedule.gpu_hours / most * (WIDTH - 2 * LEFT), 260 - option.schedule.hours / longest * 230
        fill = "#2f6f9f" if option in front else "white"
        hover = f"{option.schedule.hours:,.1f} hours: {' '.join(option.changes)}"
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" stroke="#2f6f9f" fill="{fill}">'
            f"<title>{escape(hover)}</title></circle>"
        )
        marks.append(_text(x + 9, y + 4, f"{option.gpus} GPUs, {option.schedule.hours:,.0f} h"))
    axis = _text(0, 15, f"hours, up to {longest:,.0f}") + _text(LEFT, 290, f"GPU-hours, up to {most:,.0f}")
    return "<h2>Time against price</h2>" + _svg("".join(marks) + axis, 300)


def _svg(inner: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="100%">{inner}</svg>'


def _text(x: float, y: float, words: str, colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(words)}</text>'
