"""The command `pekoe plan`: reads, computes, prints; UserError where a recipe does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, RenderableType

from pekoe.core.errors import UserError
from pekoe.plan.forecast import GB, Forecast, forecast
from pekoe.plan.page import render
from pekoe.plan.recipe import Asked
from pekoe.plan.search import best_layouts, front, one_change
from pekoe.plan.show import compared, explain, show, show_changes, show_front


def run_plan(
    console: Console,
    asked: Asked,
    what_if: Sequence[str] = (),
    best: bool = False,
    explained: bool = False,
    as_json: bool = False,
    page: str | None = None,
) -> None:
    """See `pekoe plan --help`.

    Args:
        what_if: changes to compare, each one or several keys with values, separated by spaces.
        as_json: with formulas and constants, `explained` or not.
        page: an HTML file to write, too.
    """
    found = forecast(asked)
    others = {change: forecast(asked.changed(change.split()), alone=True) for change in what_if}
    changes = one_change(found) if found.fits else []
    layouts = best_layouts(found) if best else []
    if as_json:
        result = found.as_dict() | {"one_change": [asdict(option) for option in changes]}
        result["what_if"] = {change: other.as_dict() for change, other in others.items()}
        if best:
            result |= {"layouts": [asdict(one) for one in layouts], "front": [one.gpus for one in front(layouts)]}
        console.file.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
    parts: list[RenderableType] = [*show(found), *show_changes(changes), *compared(found, others)]
    parts += show_front(layouts, front(layouts)) if best else []
    if not as_json:
        _print(console, [*parts, *(explain(found) if explained else ())])
    if page is not None:
        with console.capture() as printed:
            _print(console, parts)
        _write(Path(page), render(found, layouts, front(layouts), printed.get()))
    if not found.fits and not best:
        raise UserError(misfit(found))


def _print(console: Console, parts: Sequence[RenderableType]) -> None:
    for each in parts:
        console.print(each, markup=False, highlight=False, soft_wrap=isinstance(each, str))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page: expected a file that can be written, got {path}: {error.strerror}") from None


def misfit(found: Forecast) -> str:
    """What does not fit, and what would."""
    what, memory = ("a training rank", found.trainer) if not found.trainer.fits else ("an engine", found.engine)
    nearest = f"; nearest: {found.nearest}" if found.changes else "; no change was found that would do"
    return f"memory of {what}: expected {memory.total / GB:.1f} GB or more, got {memory.room / GB:.1f} GB{nearest}"
