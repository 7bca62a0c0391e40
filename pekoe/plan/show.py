"""A forecast as tables and sentences, for `pekoe plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import RenderableType
from rich.table import Column, Table

from pekoe.plan.forecast import FIGURES, GB, Forecast, Schedule, errors


def show(found: Forecast) -> Iterator[RenderableType]:
    """What stdout gets."""
    plan = found.plan
    device, shape = plan.setup.engine.device, plan.setup.engine.shape
    gpus = f"{plan.layout.gpus} x {device.name}" if plan.layout.gpus > 1 else device.name
    yield f"{shape.name}, {shape.num_parameters / 1e9:.2f}B parameters, on {gpus}: {plan.layout}"
    if plan.changes:
        yield f"the recipe has another layout; run it with {' '.join(plan.changes)}"
    yield from plan.assumed
    yield _memory(found)
    if not found.fits:
        return
    yield _steps(found)
    yield from _sentences(found)


def _memory(found: Forecast) -> Table:
    table = Table("GB of one device", Column("engine", justify="right"), Column("training rank", justify="right"))
    names = list(dict.fromkeys([*found.engine.parts, *found.trainer.parts]))
    shared = found.plan.layout.one_process
    sides = [found.trainer.parts] if shared else [found.engine.parts, found.trainer.parts]
    for name in names:
        cells = [f"{side[name] / GB:.2f}" if name in side else "" for side in sides]
        if any(cells):
            table.add_row(name, *([""] if shared else []), *cells)
    totals = [f"{each.total / GB:.2f} of {each.room / GB:.1f}" for each in (found.engine, found.trainer)]
    table.add_section()
    table.add_row("together, of what there is", *(["", totals[1]] if shared else totals))
    return table


def _steps(found: Forecast) -> Table:
    right = [Column(schedule.title, justify="right") for schedule in found.schedules]
    table = Table("seconds", *right, "bound by")
    for stage in found.schedules[0].stages:
        cells = [short(schedule.stages[stage]) for schedule in found.schedules]
        table.add_row(stage, *cells, found.bounds.get(stage, ""))
    table.add_section()

    def row(name: str, cells: list[str], note: str = "") -> None:
        table.add_row(name, *cells, note)

    each = found.schedules
    row("trainer waits for sampling", [short(s.wait_s) for s in each])
    row("a step", [short(s.step_s) for s in each])
    row("engines idle", [f"{s.engines_idle:.0%}" for s in each])
    row("trainer idle", [f"{s.trainer_idle:.0%}" for s in each])
    row("sequences at an engine", [f"{s.running:,.0f}" for s in each], "mean while it samples")
    row("tokens/s", [f"{s.tokens_s:,.0f}" for s in each], "trained on, prompts too")
    row("tokens/s/GPU", [f"{s.tokens_s_gpu:,.0f}" for s in each])
    row("hours", [short(s.hours) for s in each], f"{found.plan.config.num_steps} steps")
    row("GPU-hours", [short(s.gpu_hours) for s in each])
    if each[0].price is not None:
        row("price", [f"{s.price:,.2f}" for s in each], "in --price's currency")
    return table


def short(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def interval(seconds: float, error: float) -> tuple[float, float]:
    """What a prediction may stand for, where |predicted / true - 1| is `error`."""
    return seconds / (1 + error), seconds / (1 - error) if error < 1 else float("inf")


def _sentences(found: Forecast) -> Iterator[str]:
    setup = found.plan.setup
    way = (0, False) if found.plan.layout.shares else (setup.lag, setup.goes_on)
    own = next(schedule for schedule in found.schedules if (schedule.lag, schedule.goes_on) == way)
    known = errors()
    low, high = interval(own.step_s, known["rl"].median)
    yield (
        f"half of such predictions of published steps were within {known['rl'].median:.0%}, nine in ten within "
        f"{known['rl'].p90:.0%}: the step of {short(own.step_s)} s stands for {short(low)} to {short(high)} s "
        f"(the benchmark bench_plan.py, {known['rl'].rows} rows, to which constants were fitted)"
    )
    parts = [f"{name} {error.median:.0%} and {error.p90:.0%}" for name, error in known.items() if name != "rl"]
    yield f"of the parts: {', '.join(parts)}. --explain says what each figure is computed from"
    if not found.plan.layout.shares and (better := _best(found.schedules, own)):
        yield better


def _best(schedules: list[Schedule], own: Schedule) -> str:
    best = min(schedules, key=lambda s: s.step_s)
    if best.step_s > 0.97 * own.step_s:
        return ""
    go_on = " rollout.during_update=go_on" * best.goes_on
    return f"rollout.max_lag={best.lag}{go_on} would make a step {1 - best.step_s / own.step_s:.0%} shorter"


def explain(found: Forecast) -> Iterator[RenderableType]:
    """Each figure's formula, its constants with their values, and how wrong such figures were."""
    known, constants = errors(), asdict(found.plan.setup.constants)
    table = Table("figure", "formula", "constants", "errors: median, 90 % below", show_lines=True)
    for name, figure in FIGURES.items():
        values = "\n".join(f"{key} {constants[key]:.4g}" for key in figure.constants)
        error = known.get(figure.family)
        wrong = f"{figure.family}: {error.median:.0%}, {error.p90:.0%}" if error else "no published figure"
        table.add_row(name, figure.formula, values, wrong)
    yield table
    device = found.plan.setup.engine.device
    yield (
        f"{device.name} (source: {device.source}): {device.memory_bytes / GB:g} GB at {device.byte_s / 1e12:g} TB/s, "
        f"{device.flop_s / 1e12:g} TFLOP/s, link {device.link_byte_s / GB:g} GB/s, network "
        f"{device.network_byte_s / GB:g} GB/s"
    )
    yield (
        "constants: Pekoe's fitted.json, which its benchmark bench_plan.py fits; those of an own device's file stand "
        "in their place. Memory: a test holds it to pekoe doctor's"
    )
