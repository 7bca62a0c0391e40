"""A forecast as tables and sentences, for `pekoe plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from rich.console import RenderableType
from rich.table import Column, Table

from pekoe.plan.forecast import FIGURES, GB, RECOVERY_S, Forecast, errors
from pekoe.plan.search import Option


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
    own, ranges = found.schedules[0], found.schedules[0].intervals()
    right = [Column(f"{schedule.title}", justify="right") for schedule in found.schedules]
    right += [Column("half of errors within", justify="right")]
    table = Table("seconds (projected)", *right)

    def row(name: str, cells: list[str], key: str, share: bool = False) -> None:
        form = _percent if share else short
        within = " to ".join(form(value) for value in ranges[key]) if key in ranges else ""
        table.add_row(name, *cells, within)

    for stage in own.stages:
        row(stage, [short(each.stages[stage]) for each in found.schedules], stage)
    table.add_section()
    each = found.schedules
    row("trainer waits for sampling", [short(s.wait_s) for s in each], "")
    row("a step", [short(s.step_s) for s in each], "step_s")
    row("engines idle", [_percent(s.engines_idle) for s in each], "engines_idle", share=True)
    row("trainer idle", [_percent(s.trainer_idle) for s in each], "trainer_idle", share=True)
    row("sequences at an engine", [f"{s.running:,.0f}" for s in each], "")
    row("tokens/s", [f"{s.tokens_s:,.0f}" for s in each], "tokens_s")
    row("tokens/s/GPU", [f"{s.tokens_s_gpu:,.0f}" for s in each], "tokens_s_gpu")
    if own.lost:
        row("lost to failures", [_percent(s.lost) for s in each], "")
    row(f"hours, {found.plan.config.num_steps} steps", [short(s.hours) for s in each], "hours")
    row("GPU-hours", [short(s.gpu_hours) for s in each], "gpu_hours")
    if own.price is not None:
        row("price", [f"{s.price:,.2f}" for s in each], "price")
    return table


def short(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def _times(gain: float | None) -> str:
    return "" if gain is None else f"{gain:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _sentences(found: Forecast) -> Iterator[str]:
    known, own, marks = errors(), found.schedules[0], found.marks
    low, high = own.intervals()["step_s"]
    yield (
        f"half of such predictions of published steps were within {known['step'].median:.0%}, nine in ten within "
        f"{known['step'].p90:.0%}: the step of {short(own.step_s)} s stands for {short(low)} to {short(high)} s "
        f"(the benchmark bench_plan.py, {known['step'].rows} rows, to which constants were fitted)"
    )
    parts = [f"{name} {error.median:.0%} and {error.p90:.0%}" for name, error in known.items() if name != "step"]
    yield (
        f"of other figures (rl: steps with their parts): {', '.join(parts)}; of memory no published figure is Pekoe's. "
        "--explain says what each figure is computed from"
    )
    for stage, bound in found.bounds.items():
        if own.stages[stage]:
            yield f"{stage} ({short(own.stages[stage])} s): bound by {bound}"
    if own.lost:
        rate = f"{found.asked.failures:g} of a GPU in 1,000 hours (given)"
        yield f"failures: {rate}, {RECOVERY_S:g} s to recover (assumed): {own.lost:.2%} of the time is lost"
    device = found.plan.setup.engine.device.name
    yield f"rates of {device}: {marks['device']}; lengths: {marks['lengths']}; memory, times and hours: projected"


def show_changes(options: Sequence[Option]) -> Iterator[str]:
    """Which one change gives most, and the next ones."""
    if options:
        yield changes_of(options)


def changes_of(options: Sequence[Option]) -> str:
    first, *others = (f"{' '.join(option.changes)} ({_times(option.gain)})" for option in options[:3])
    return f"the one change that gives most steps a second: {first}" + (f"; then {', '.join(others)}" if others else "")


def compared(found: Forecast, others: Mapping[str, Forecast]) -> Iterator[RenderableType]:
    """What the changes of --what-if give, beside the recipe as it is."""
    if not others:
        return
    columns = ("step (s)", "hours", "GPU-hours", "price", "steps/s")
    table = Table(Column("what if (projected)", overflow="fold"), *(Column(name, justify="right") for name in columns))
    base = found.schedules[0].step_s if found.schedules else None
    for name, other in {"as it is": found, **others}.items():
        if not other.schedules:
            table.add_row(name, "does not fit" + (f": {other.nearest}" if other.changes else ""))
            continue
        one = other.schedules[0]
        price = "" if one.price is None else f"{one.price:,.2f}"
        gain = _times(base and base / one.step_s)
        table.add_row(name, short(one.step_s), short(one.hours), short(one.gpu_hours), price, gain)
    yield table


def show_front(options: Sequence[Option], front: Sequence[Option]) -> Iterator[RenderableType]:
    """The quickest layout of each number of devices; those than which none is both quicker and cheaper are marked."""
    columns = ("GPUs", "step (s)", "hours", "GPU-hours", "price", "tokens/s/GPU", "steps/s")
    table = Table("front", *(Column(name, justify="right") for name in columns))
    for option in options:
        one = option.schedule
        price = "" if one.price is None else f"{one.price:,.2f}"
        figures = short(one.step_s), short(one.hours), short(one.gpu_hours), price, f"{one.tokens_s_gpu:,.0f}"
        table.add_row("*" * (option in front), str(option.gpus), *figures, _times(option.gain))
    yield table
    for option in options:
        yield f"{option.gpus} GPUs: {' '.join(option.changes)}"


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
