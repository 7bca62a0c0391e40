"""The command `pekoe plan`: reads, computes, prints; UserError where a recipe does not fit."""

from __future__ import annotations

import json

from rich.console import Console

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import UserError
from pekoe.plan.forecast import GB, Forecast, forecast
from pekoe.plan.recipe import read_plan
from pekoe.plan.show import explain, show


def run_plan(
    console: Console,
    config: RLConfig,
    hardware: str,
    gpus: int | None,
    price: float | None,
    mean_response: float | None,
    mean_prompt: float | None,
    explained: bool,
    as_json: bool,
) -> None:
    """See `pekoe plan --help`."""
    found = forecast(read_plan(config, hardware, gpus, mean_response, mean_prompt), price)
    if as_json:
        console.file.write(json.dumps(found.as_dict(), indent=2) + "\n")
    else:
        for each in [*show(found), *(explain(found) if explained else ())]:
            console.print(each, markup=False, highlight=False, soft_wrap=isinstance(each, str))
    if not found.fits:
        raise UserError(misfit(found))


def misfit(found: Forecast) -> str:
    """What does not fit, and what would."""
    what, memory = ("a training rank", found.trainer) if not found.trainer.fits else ("an engine", found.engine)
    nearest = f"; nearest: {' '.join(found.changes)}" if found.changes else "; no change was found that would do"
    return f"memory of {what}: expected {memory.total / GB:.1f} GB or more, got {memory.room / GB:.1f} GB{nearest}"
