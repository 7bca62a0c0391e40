"""What a plan comes to: memory of a device, seconds of a step by stage and what bounds each, hours, price; and how
wrong such predictions were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from pekoe.core.errors import UserError
from pekoe.plan.memory import Memory, engine_memory, trainer_memory
from pekoe.plan.recipe import JUDGE_TOKEN_S, Asked, Plan, least_gpus, read_plan
from pekoe.plan.schedule import Simulated, simulate
from pekoe.plan.step import Setup

GB = 1e9
MAX_RANKS = 4096  # that are tried where a plan does not fit


@dataclass(frozen=True, slots=True)
class Errors:
    """|predicted / published - 1| of a family of figures that the constants were fitted to."""

    median: float
    p90: float
    rows: int


def errors() -> dict[str, Errors]:
    """By family, as `make bench-plan ARGS="--figures FILE.json --fit"` left them in fitted.json."""
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
    "step": Figure("the stages in the schedule of run/rl.py, event by event (pekoe.plan.schedule)", (), "rl"),
    "memory": Figure(
        "as pekoe doctor counts, by formula (pekoe.plan.memory); the errors are of another formula, on other systems",
        (), "memory",
    ),
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
        low, high = interval(1.0, known["rl"].median)
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
    changes: list[str]  # of the recipe, with which it would fit; empty where it does, or where nothing was found
    schedules: list[Schedule]  # the recipe's own first; empty where it does not fit
    bounds: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.trainer.fits and (self.plan.layout.one_process or self.engine.fits)

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
    engine, trainer = engine_memory(plan.setup.engine, plan.longest), rank_memory(plan)
    found = Forecast(asked, plan, engine, trainer, [], [], {})
    if not found.fits:
        return replace(found, changes=what_fits(plan, engine, trainer))
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
    decoding = setup.engine.decode_parts(max(1.0, simulated.running), setup.prompt + setup.context / 2)
    trained = training.step_parts(tokens, context, setup.micro_batches, setup.updates)
    moving = simulated.time.publish_s - setup.constants.sync_s
    tail = simulated.last_tenth_s / simulated.time.sampling_s
    found = {
        "sampling": f"{_largest(decoding)}; its last tenth of responses takes {tail:.0%} of it",
        "judging": "the last group's, or judges (verify.workers)",
        "training": _largest(trained),
        "publishing": "moving bytes" if moving > setup.constants.sync_s else "fixed costs",
        "overhead": "what published loops take beside",
    }
    if setup.forwards:
        found["log-probs"] = _largest(trained | {"the optimizer": 0.0})
    return found


def _largest(parts: Mapping[str, float]) -> str:
    name = max(parts, key=lambda name: parts[name])
    return f"{name} ({parts[name] / sum(parts.values()):.0%})"


def rank_memory(
    plan: Plan, ranks: int = 1, tp: int = 1, checkpointing: bool | None = None, budget: int | None = None
) -> Memory:
    """Memory of a training rank; with `ranks` times as many, `tp` times the tensor parallelism, with or without
    activation checkpointing, another token budget."""
    config, layout, setup = plan.config, plan.layout, plan.setup
    half, engine = config.model.dtype == "bfloat16", setup.engine
    beside = 0.0
    if layout.one_process:  # as `pekoe doctor` counts
        beside = engine.weights + engine.kv_tokens() * engine.shape.kv_per_token * engine.kv_bytes
        beside += 8 * engine.shape.num_parameters * (config.rollout.max_lag > 0)
    training = replace(setup.training, tp=layout.tp * tp)
    if checkpointing is not None:
        training = replace(training, recompute=float(checkpointing))
    shards = max(1, layout.shards * ranks // tp)
    return trainer_memory(training, budget or config.train.token_budget, shards, half, config.algo.kl > 0, beside)


def what_fits(plan: Plan, engine: Memory, trainer: Memory) -> list[str]:
    """The least that makes a plan fit, as keys of the recipe; empty where nothing was found."""
    changes = list[str]()
    if not engine.fits and not plan.layout.one_process:
        least = least_gpus(plan.setup.engine, plan.longest)
        if least > plan.setup.engine.tp:
            changes.append(f"cluster.generation.gpus_per_engine={least}")
    if not trainer.fits:
        changes += next(_trainer_changes(plan), [])
    return changes


def _trainer_changes(plan: Plan) -> Iterator[list[str]]:
    """What makes the trainer fit: first a smaller budget or checkpointing, then more ranks, then sequences or layers
    that are split."""
    train, layout, heads = plan.config.train, plan.layout, plan.setup.training.shape.num_kv_heads
    for ranks, cp, tp in _splits(layout.ranks, heads // layout.tp):
        smallest = -(-plan.longest // (layout.cp * cp))
        sizes = (("ranks", layout.ranks, ranks), ("cp", layout.cp, cp), ("tp", layout.tp, tp))
        split = [f"cluster.training.{name}={now * times}" for name, now, times in sizes if times > 1]
        for again in [False] if train.activation_checkpointing else [False, True]:
            keys = split + ["train.activation_checkpointing=true"] * again

            def fits(budget: int, ranks: int = ranks, tp: int = tp, again: bool = again) -> bool:
                return rank_memory(plan, ranks, tp, again or None, budget).fits

            low, high = smallest, train.token_budget
            if not fits(low):
                continue
            if fits(high):
                yield keys
                continue
            while high - low > 64:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            yield [*keys, f"train.token_budget={low}"]


def _splits(ranks: int, most_tp: int) -> Iterator[tuple[int, int, int]]:
    """(times as many ranks, cp, tp), by how much they change; what is split must divide the ranks."""
    powers = [2**i for i in range(13)]
    for more in powers:
        if ranks * more > MAX_RANKS:
            return
        for cp in (1, 2, 4, 8):
            for tp in (1, 2, 4, 8):
                if ranks * more % (cp * tp) == 0 and tp <= most_tp and cp * tp <= 8:
                    yield more, cp, tp
