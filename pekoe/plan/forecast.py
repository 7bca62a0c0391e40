"""What a plan comes to: memory of a device, seconds of a step by stage and what bounds each, hours, price; and how
wrong such predictions were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import product
from typing import Any

from pekoe.core.errors import UserError
from pekoe.plan.memory import Memory, engine_memory, trainer_memory
from pekoe.plan.recipe import JUDGE_TOKEN_S, Asked, Layout, Plan, layout_keys, least_gpus, read_plan
from pekoe.plan.schedule import Simulated, simulate
from pekoe.plan.step import Setup

GB = 1e9
POWERS = (1, 2, 4, 8)
MAX_RANKS = 4096  # that are tried where a plan does not fit


@dataclass(frozen=True, slots=True)
class Errors:
    """|predicted / published - 1| of a family of figures that the constants were fitted to."""

    median: float
    p90: float
    rows: int


def errors() -> dict[str, Errors]:
    """By family, as `make bench-plan ARGS="--figures FILE.json --errors"` left them in fitted.json."""
    found = json.loads(files("pekoe.plan").joinpath("fitted.json").read_text())["errors"]
    return {name: Errors(**values) for name, values in found.items()}


@dataclass(frozen=True, slots=True)
class Figure:
    """Where a figure is from. `family`: of `errors`; empty where no published figure is of its kind."""

    formula: str
    constants: tuple[str, ...]
    family: str


FIGURES: Mapping[str, Figure] = {
    "sampling": Figure(
        "a simulated engine: a decoding step is max(bytes of the weights / (bandwidth x weight_share), 2 x parameters "
        "x sequences / (rate x decode_flops)) + bytes of KV / (bandwidth x kv_share) + 2 x layers all-reduces + layers "
        "x layer_s + sequences x sequence_s; a prompt's prefill is its FLOPs / (rate x prefill_flops)",
        ("weight_share", "decode_flops", "kv_share", "link_share", "message_s", "layer_s", "sequence_s",
         "prefill_flops", "prefill_s", "rollout_share"),
        "throughput",
    ),
    "judging": Figure(
        f"what is left of it after the last response: {JUDGE_TOKEN_S * 1000:.2g} s of a judge process for 1,000 tokens "
        f"(the benchmark bench_verify.py)", (), ""
    ),
    "log-probs": Figure(
        "a forward over all tokens: as training, one pass", ("train_flops", "train_attention", "train_passes"), "train"
    ),
    "training": Figure(
        "(3 + what is computed again) x (2 x parameters x tokens / (rate x train_flops x train_eager) + attention / "
        "(rate x train_attention) + train_passes passes over activations / bandwidth) + gathers and reductions that "
        "are not hidden + AdamW's 28 bytes a parameter",
        ("train_flops", "train_eager", "train_attention", "train_passes", "train_layer_s", "train_link", "overlap",
         "batch_s"),
        "train",
    ),
    "publishing": Figure(
        "bytes of the weights / (network x sync_share) + sync_s; by a directory at disk_byte_s",
        ("sync_share", "sync_s", "disk_byte_s"), "sync",
    ),
    "overhead": Figure(
        "data, rewards and what else a loop does: one value for all published loops; where devices are shared, weights "
        "are moved in and out", ("step_overhead", "reload_s"), "rl",
    ),
    "step": Figure("the stages in the schedule of run/rl.py, event by event (pekoe.plan.schedule)", (), "step"),
    "memory": Figure("as pekoe doctor counts, by formula (pekoe.plan.memory)", (), ""),
}  # fmt: skip


RECOVERY_S = 600.0  # assumed, where something fails: it is noticed, starts again, loads weights


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step under one schedule."""

    lag: int
    goes_on: bool
    changes: tuple[str, ...]  # of the recipe
    stages: dict[str, float]  # seconds; sampling: of a batch, from its first request to its last response
    wait_s: float  # in which the trainer waits for sampling
    step_s: float
    last_tenth_s: float
    engines_idle: float  # shares
    trainer_idle: float
    running: float  # sequences together at an engine
    tokens_s: float
    tokens_s_gpu: float
    lost: float  # share of the time that failures take
    hours: float
    gpu_hours: float
    price: float | None

    @property
    def title(self) -> str:
        return f"lag {self.lag}" + (", go on" if self.goes_on else "")

    def intervals(self) -> dict[str, tuple[float, float]]:
        """What each figure stands for where its family's error is the median one: half of the errors were smaller."""
        known = errors()
        found = {
            name: interval(seconds, known[FIGURES[name].family].median)
            for name, seconds in self.stages.items()
            if FIGURES[name].family
        }
        low, high = interval(1.0, known["step"].median)
        for name in ("step_s", "hours", "gpu_hours", "price"):
            if (value := getattr(self, name)) is not None:
                found[name] = low * value, high * value
        for name in ("tokens_s", "tokens_s_gpu"):
            value = getattr(self, name)
            found[name] = value / high, value / low
        seen = self.wait_s / self.step_s  # of the step, what sampling's error changes
        for name in ("engines_idle", "trainer_idle"):
            busy, factors = 1 - getattr(self, name), interval(1.0, known["throughput"].median)
            steps = [1 + seen * (factor - 1) for factor in factors]
            works = factors if name == "engines_idle" else (1.0, 1.0)
            shares = sorted(max(0.0, 1 - busy * work / step) for work, step in zip(works, steps, strict=True))
            found[name] = shares[0], shares[1]
        return found


def interval(value: float, error: float) -> tuple[float, float]:
    """What a prediction may stand for, where |predicted / true - 1| is `error`."""
    return value / (1 + error), value / (1 - error) if error < 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Forecast:
    asked: Asked
    plan: Plan
    engine: Memory
    trainer: Memory
    fits: bool
    changes: list[str]  # of the recipe, with which it would fit; empty where it does, or where nothing was found
    schedules: list[Schedule]  # the recipe's own first; empty where it does not fit
    bounds: dict[str, str]

    @property
    def nearest(self) -> str:
        """`changes` as a user may type them: keys of a cluster are the whole layout, which --gpus would change."""
        moved = self.asked.gpus is not None and any(change.startswith("cluster.") for change in self.changes)
        return " ".join(self.changes) + " without --gpus" * moved

    @property
    def marks(self) -> dict[str, str]:
        """Where figures are from: measured here, published, projected, given, or assumed."""
        rates = "measured here" if self.plan.measured else "published" if self.plan.published else "given"
        lengths = "measured" if self.asked.lengths else "given" if self.asked.mean_response else "assumed"
        return {"device": rates, "lengths": lengths, "memory": "projected", "steps": "projected", "errors": "published"}

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON: bytes, seconds, shares."""
        plan = self.plan
        memory = {
            name: {"parts": part.parts, "total": part.total, "room": part.room, "fits": part.fits}
            for name, part in (("engine", self.engine), ("trainer", self.trainer))
        }
        return {
            "model": asdict(plan.setup.engine.shape) | {"parameters": plan.setup.engine.shape.num_parameters},
            "device": asdict(plan.setup.engine.device),
            "layout": asdict(plan.layout) | {"gpus": plan.layout.gpus, "changes": plan.changes},
            "assumed": plan.assumed,
            "marks": self.marks,
            "memory": memory,
            "fits": self.fits,
            "changes_that_fit": self.changes,
            "steps": [asdict(schedule) | {"intervals": schedule.intervals()} for schedule in self.schedules],
            "bounds": self.bounds,
            "figures": {name: asdict(figure) for name, figure in FIGURES.items()},
            "constants": asdict(plan.setup.constants),
            "errors": {name: asdict(error) for name, error in errors().items()},
        }


# Beside the recipe's own: (lag, whether responses go on), and the keys that say so.
WAYS: Mapping[tuple[int, bool], tuple[str, ...]] = {
    (0, False): ("rollout.max_lag=0", "rollout.during_update=wait", "rollout.window=1"),
    (1, False): ("rollout.max_lag=1", "rollout.during_update=wait", "rollout.window=1"),
    (1, True): ("rollout.max_lag=1", "rollout.during_update=go_on"),
    (2, True): ("rollout.max_lag=2", "rollout.during_update=go_on"),
}


def forecast(asked: Asked, alone: bool = False) -> Forecast:
    """Args: alone: the recipe's own schedule, no others."""
    plan = read_plan(asked)
    engine, trainer, fits = fitting(plan)
    found = Forecast(asked, plan, engine, trainer, fits, [], [], {})
    if not fits:
        return replace(found, changes=what_fits(asked, plan))
    simulated = simulate(plan.setup)
    schedules = [schedule_of(asked, plan, simulated)]
    own = plan.setup.lag, plan.setup.goes_on
    for way in [] if alone or plan.layout.shares else [(0, False), (1, False), (1, True)]:
        if way == own:
            continue
        try:
            other = read_plan(asked.changed(WAYS[way]))
        except UserError:  # such as servers that cannot go on
            continue
        schedules.append(schedule_of(asked, other, simulate(other.setup), WAYS[way]))
    return replace(found, schedules=schedules, bounds=bounds(plan.setup, simulated))


def schedule_of(asked: Asked, plan: Plan, simulated: Simulated, changes: tuple[str, ...] = ()) -> Schedule:
    time, gpus, setup = simulated.time, plan.layout.gpus, plan.setup
    stages = {
        "sampling": time.sampling_s, "judging": time.judging_s, "log-probs": time.logprobs_s,
        "training": time.training_s, "publishing": time.publish_s, "overhead": time.overhead_s,
    }  # fmt: skip
    lost = lost_to_failures(plan, simulated, asked.failures)
    tokens_s, hours = setup.tokens / time.step_s, plan.config.num_steps * time.step_s / 3600 / (1 - lost)
    return Schedule(
        setup.lag, setup.goes_on, changes, stages, time.wait_s, time.step_s, simulated.last_tenth_s,
        1 - time.engines_busy, 1 - time.trainer_busy, simulated.running, tokens_s, tokens_s / gpus, lost, hours,
        hours * gpus, None if asked.price is None else hours * gpus * asked.price,
    )  # fmt: skip


def lost_to_failures(plan: Plan, simulated: Simulated, failures: float) -> float:
    """Share of the time that is lost where a device fails `failures` times in 1,000 hours; at most 0.99.

    A rank's failure costs the recovery, and half of the steps between two checkpoints, which are done again. That of an
    engine costs its share of the sampling in the recovery, and half of what it was sampling.
    """
    time, layout = simulated.time, plan.layout
    again = plan.config.train.save_every / 2 * time.step_s
    sampled = min(1.0, time.wait_s / time.step_s) * (RECOVERY_S + time.sampling_s / 2) / layout.engines
    ranks, engines = layout.ranks, 0 if layout.shares else layout.engines * layout.engine_gpus
    spent = failures / 1000 / 3600 * (ranks * (RECOVERY_S + again) + engines * sampled)
    return min(0.99, spent / (1 + spent))


def bounds(setup: Setup, simulated: Simulated) -> dict[str, str]:
    """What most of each stage's time goes to."""
    training, tokens, context = setup.training, setup.tokens, setup.context
    decoding = setup.engine.decode_parts(max(1.0, simulated.running), setup.prompt + setup.grown)
    trained = training.step_parts(tokens, context, setup.micro_batches, setup.updates)
    fixed = 0.0 if setup.route == "device" else setup.constants.sync_s
    tail = simulated.last_tenth_s / simulated.time.sampling_s
    found = {
        "sampling": f"{_largest(decoding)}; its last tenth of responses takes {tail:.0%} of it",
        "judging": "the last group's, or judges (verify.workers)",
        "training": _largest(trained),
        "publishing": "moving bytes" if simulated.time.publish_s > 2 * fixed else "fixed costs",
        "overhead": "what published loops take beside" if setup.constants.step_overhead else "moving weights",
    }
    if setup.forwards:
        found["log-probs"] = _largest(trained | {"the optimizer": 0.0})
    return found


def _largest(parts: Mapping[str, float]) -> str:
    name = max(parts, key=lambda name: parts[name])
    return f"{name} ({parts[name] / sum(parts.values()):.0%})"


def rank_memory(
    plan: Plan, layout: Layout | None = None, checkpointing: bool | None = None, budget: int | None = None
) -> Memory:
    """Memory of a training rank; in another layout, with or without activation checkpointing, another token budget."""
    config, setup, layout = plan.config, plan.setup, layout or plan.layout
    half, engine, beside = config.model.dtype == "bfloat16", setup.engine, dict[str, float]()
    if layout.one_process:  # as `pekoe doctor` counts
        kv = engine.kv_tokens() * engine.shape.kv_per_token * engine.kv_bytes
        beside["the engine beside it"] = engine.weights + kv
    if not layout.cluster and config.rollout.max_lag:  # float32: what is sent, and with what an embedded engine samples
        beside["copies of the weights"] = 4.0 * engine.shape.num_parameters * (2 if layout.one_process else 1)
    training = replace(setup.training, tp=layout.tp)
    if checkpointing is not None:
        training = replace(training, recompute=float(checkpointing))
    shards = max(1, layout.shards)
    return trainer_memory(training, budget or config.train.token_budget, shards, half, config.algo.kl > 0, beside)


def fitting(plan: Plan) -> tuple[Memory, Memory, bool]:
    """Memory of an engine's device and of a training rank, and whether both are enough."""
    engine, trainer = engine_memory(plan.setup.engine, plan.longest), rank_memory(plan)
    return engine, trainer, trainer.fits and (plan.layout.one_process or engine.fits)


def what_fits(asked: Asked, plan: Plan) -> list[str]:
    """The least that makes a plan fit, as keys of the recipe that `read_plan` takes; empty where nothing was found.

    With keys of a section cluster these are the whole layout, in place of `asked.gpus`. First a smaller budget or
    checkpointing, then layers or sequences that are split over the same ranks, then more ranks.
    """
    own = plan.config.train.activation_checkpointing
    for layout in _near_layouts(plan):
        moved = layout != plan.layout
        bare, keys = (replace(asked, gpus=None), layout_keys(plan.config, layout)) if moved else (asked, list[str]())
        for again in dict.fromkeys((own, True)):
            budget = _largest_budget(plan, layout, again)
            if budget is None:
                continue
            changes = keys + ["train.activation_checkpointing=true"] * (again != own)
            if budget < plan.config.train.token_budget:
                changes.append(f"train.token_budget={budget}")
            try:
                if fitting(read_plan(bare.changed(changes)))[2]:
                    return changes
            except UserError:  # a layout that no recipe may have
                continue
    return []


def _largest_budget(plan: Plan, layout: Layout, again: bool) -> int | None:
    """The recipe's token budget, or one that nearly is the largest below it with which a rank fits; None: none does."""
    low, high = -(-plan.longest // layout.cp), plan.config.train.token_budget
    if rank_memory(plan, layout, again, high).fits:
        return high
    if not rank_memory(plan, layout, again, low).fits:
        return None
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if rank_memory(plan, layout, again, middle).fits else (low, middle)
    return low


def _near_layouts(plan: Plan) -> Iterator[Layout]:
    """The plan's own layout and others whose engines hold the model, by how much they change it."""
    own, engine, heads = plan.layout, plan.setup.engine, plan.setup.training.shape.num_kv_heads
    if plan.config.engine.backend != "embedded":  # which has one device
        each = least_gpus(replace(engine, kv_limit=None), plan.longest)
        own = replace(own, engine_gpus=max(own.engine_gpus, each))
    if not own.cluster:
        yield own
        own = replace(own, cluster=True, shares=False, one_process=False)
    for more in (2**i for i in range(13)):
        ranks = own.ranks * more
        engines = max(1, ranks // own.engine_gpus) if own.shares else own.engines
        if ranks > MAX_RANKS:
            return
        for replicas, cp, tp in product(dict.fromkeys((own.replicas, 1)), POWERS, POWERS):
            split = own.tp * tp, own.cp * cp
            if cp * tp <= 8 and heads % split[0] == 0 and ranks % (split[0] * split[1] * replicas) == 0:
                yield replace(own, ranks=ranks, engines=engines, tp=split[0], cp=split[1], replicas=replicas)
