"""Other layouts and settings of a recipe: which one change gives most, and the front of time against price.

Layouts are compared by simulations of a few of their engines (`schedule.simulate(most_engines=...)`); the best one of
each number of devices is then simulated with all. Each is a list of the recipe's keys, so that what is found can be run
as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf

from pekoe.core.errors import UserError
from pekoe.plan.forecast import POWERS, WAYS, Forecast, Schedule, engine_memory, fitting, rank_memory, schedule_of
from pekoe.plan.recipe import Asked, Plan, read_plan
from pekoe.plan.schedule import simulate

FEW, STEPS = 4, 4  # engines that stand for all, and steps with lag
GPUS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times as many as asked for, on the front
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of the devices, those that sample


@dataclass(frozen=True, slots=True)
class Option:
    """A layout or a setting, and what comes of it. `gain`: times as fast as without it; None: that does not fit."""

    changes: tuple[str, ...]
    gpus: int
    schedule: Schedule
    gain: float | None


def quick(asked: Asked, changes: Sequence[str]) -> tuple[Plan, Schedule] | None:
    """A step of the recipe with `changes`; None where it is not possible, or does not fit."""
    try:
        plan = read_plan(asked.changed(changes))
    except UserError:
        return None
    if not fitting(plan)[2]:
        return None
    return plan, schedule_of(asked, plan, simulate(plan.setup, STEPS if plan.setup.lag else 1, FEW), tuple(changes))


def one_change(found: Forecast) -> list[Option]:
    """What single changes give, the largest gain first; those that give less than 2 % are left out."""
    asked, plan = replace(found.asked, failures=0.0), found.plan
    known = quick(asked, ())
    if known is None:
        return []
    options = list[Option]()
    for changes in _single_changes(plan):
        if (other := quick(asked, changes)) is not None and other[0].layout.gpus <= plan.layout.gpus:
            gain = known[1].step_s / other[1].step_s
            if gain > 1.02:
                options.append(Option(tuple(changes), other[0].layout.gpus, other[1], gain))
    return sorted(options, key=lambda option: option.schedule.step_s)


def _single_changes(plan: Plan) -> Iterator[Sequence[str]]:
    config, layout, setup = plan.config, plan.layout, plan.setup
    if not layout.shares:
        yield from (keys for way, keys in WAYS.items() if way != (setup.lag, setup.goes_on))
    yield [f"train.token_budget={2 * config.train.token_budget}"]
    if config.train.activation_checkpointing:
        yield ["train.activation_checkpointing=false"]
    if not config.train.compile:
        yield ["train.compile=true"]
    if config.cluster is None or layout.shares:
        return
    unit, each = layout.tp * layout.cp, layout.engine_gpus
    on_cpus = plan.measured and not config.cluster.generation.gpus_per_engine
    for moved in {unit * max(1, round(share * layout.gpus / unit)) for share in (0.0625, 0.125, 0.25)}:
        for sign in (1, -1):
            ranks = layout.ranks - sign * moved
            engines = (layout.gpus - ranks) // each
            if ranks > 0 and engines > 0:
                keys = _layout_keys(engines, each, ranks)
                yield [key for key in keys if "gpus" not in key] if on_cpus else keys
    for times in () if on_cpus else (2, 4):
        if layout.engines % times == 0:
            yield _layout_keys(layout.engines // times, each * times, layout.ranks)


def _layout_keys(engines: int, engine_gpus: int, ranks: int, shares: bool = False) -> list[str]:
    return [
        f"cluster.generation.engines={engines}",
        f"cluster.generation.gpus_per_engine={engine_gpus}",
        f"cluster.training.ranks={ranks}",
        "cluster.training.gpus_per_rank=1",
        f"cluster.colocate={str(shares).lower()}",
    ]


def best_layouts(found: Forecast, times: Sequence[float] = GPUS) -> list[Option]:
    """The quickest layout of each number of devices, by how long a step takes; `gain` is over the recipe's own.

    UserError where the recipe runs in one process, which has no layout.
    """
    if found.plan.layout.one_process:
        raise UserError("--best: expected a recipe with a section cluster, or --gpus, got one of a single process")
    asked, most = found.asked, found.plan.layout.gpus
    own, options = found.schedules[0].step_s if found.fits else None, list[Option]()
    for gpus in sorted({max(2, round(factor * most)) for factor in times}):
        tried = (quick(replace(asked, gpus=None), changes) for changes in _layouts(found.plan, gpus))
        best = min((one for one in tried if one is not None), key=lambda one: one[1].step_s, default=None)
        if best is not None:
            plan, changes = best[0], best[1].changes
            full = schedule_of(asked, plan, simulate(plan.setup), changes)
            options.append(Option(changes, gpus, full, own and own / full.step_s))
    return options


def front(options: Sequence[Option]) -> list[Option]:
    """Those than which no other is both quicker and cheaper."""
    return [
        one
        for one in options
        if not any(
            other.schedule.hours < one.schedule.hours and other.schedule.gpu_hours < one.schedule.gpu_hours
            for other in options
        )
    ]


def _layouts(plan: Plan, gpus: int) -> Iterator[list[str]]:
    """Layouts of `gpus` devices, each with what trains quickest on its ranks."""
    server = plan.config.engine.server
    alone = ["engine.server.count=1", "engine.server.gpus=[]"] if server.count > 1 or server.gpus else []
    seen = set[tuple[int, int, int]]()
    for each, share in product(POWERS, SHARES):
        if not engine_memory(replace(plan.setup.engine, tp=each), plan.longest).fits:
            continue
        engines = max(1, round(share * gpus / each))
        ranks = gpus - engines * each
        if ranks < 1 or (engines, each, ranks) in seen:
            continue
        seen.add((engines, each, ranks))
        training = _training_keys(plan, ranks)
        if training is not None:
            for way in ((0, False), (1, True), (2, True)):
                yield [*alone, *_layout_keys(engines, each, ranks), *training, *WAYS[way]]
    for each in POWERS:
        fits = engine_memory(replace(plan.setup.engine, tp=each), plan.longest).fits
        if fits and gpus % each == 0 and (training := _training_keys(plan, gpus)) is not None:
            yield [*alone, *_layout_keys(gpus // each, each, gpus, shares=True), *training, *WAYS[0, False]]


def _training_keys(plan: Plan, ranks: int) -> list[str] | None:
    """Tensor and context parallelism, checkpointing and token budget that train quickest on `ranks`; None: none fit."""
    setup, config, best, keys = plan.setup, plan.config, inf, None
    for tp, cp, again in product(POWERS, POWERS, (False, True)):
        if ranks % (tp * cp) or tp * cp > 8 or setup.training.shape.num_kv_heads % tp:
            continue
        layout = replace(plan.layout, ranks=ranks, tp=tp, cp=cp, replicas=1)
        training = replace(
            setup.training, devices=ranks, tp=tp, cp=cp, recompute=float(again), sharded=layout.shards > 1
        )
        other = replace(plan, layout=layout, setup=replace(setup, training=training))
        for times in (4, 2, 1, 0.5, 0.25):
            budget = max(int(config.train.token_budget * times), -(-plan.longest // cp))
            if not rank_memory(other, checkpointing=again, budget=budget).fits:
                continue
            timed = replace(other.setup, budget=budget * cp)
            seconds = training.step(timed.tokens, timed.context, timed.micro_batches, timed.updates)
            if seconds < best:
                best = seconds
                keys = [
                    f"cluster.training.tp={tp}", f"cluster.training.cp={cp}", "cluster.training.replicas=1",
                    f"train.activation_checkpointing={str(again).lower()}", f"train.token_budget={budget}",
                ]  # fmt: skip
            break  # a smaller one is not quicker
    return keys
