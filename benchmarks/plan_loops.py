"""Published figures of whole RL loops (NeMo-RL, verl, AReaL, SkyRL) as `pekoe.plan.step.Setup`s.

What no row says is assumed here: how responses' lengths are distributed, and where only a maximum is given, their mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from plan_rows import Question, number, place

from pekoe.core.hardware import Device
from pekoe.plan.costs import Constants, Engine, Training
from pekoe.plan.rollout import Lengths
from pekoe.plan.schedule import simulate
from pekoe.plan.shapes import Shape
from pekoe.plan.step import Setup, StepTime, sampling_of, step_time

Row = dict[str, Any]
PROMPT = 128.0  # tokens of a mathematical problem with its template
# Mean lengths that no row states. The release: throughput x hours / steps / 8,192 responses gives 7,600 to 8,400 in all
# five configurations that have both. verl's Qwen2.5-Math-7B on DAPO: its synchronous log-prob and training passes imply 1,400 to 2,200.  # noqa: E501
RELEASE_MEAN, RELEASE_MAX, VERL_MEAN = 8_000.0, 27_648, 1_600.0
OTHER_SHARE = 0.7  # of the maximum, of a thinking model that is cut often


@dataclass(frozen=True)
class Loop:
    """A row's run, without constants."""

    shape: Shape
    device: Device
    gpus: int
    engine_tp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    prompts: int = 512
    samples: int = 16
    prompt: float = PROMPT
    mean: float = 1000.0
    maximum: int = 4096
    updates: int = 4
    budget: int = 32768
    forwards: int = 0
    sampling_gpus: int | None = None  # None: colocated
    training_gpus: int | None = None
    lag: int = 0
    weight_bytes: float = 2
    most: int = 256
    sharded: bool = True
    route: str = "buckets"
    parts: int = 1  # of a batch, on which the trainer begins as each is sampled

    def setup(self, k: Constants) -> Setup:
        sampling = self.sampling_gpus or self.gpus
        training = self.training_gpus or self.gpus
        return Setup(
            Engine(self.shape, self.device, self.engine_tp, self.weight_bytes, 2, k),
            max(1, sampling // self.engine_tp),
            Training(
                self.shape, self.device, training, self.tp, self.cp, self.pp, sharded=self.sharded,
                experts_split=self.ep, constants=k,
            ),
            self.prompts,
            self.samples,
            self.prompt,
            Lengths.of_mean(min(self.mean, 0.97 * self.maximum), self.maximum),
            self.updates,
            self.budget,
            self.forwards,
            self.sampling_gpus is None,
            self.lag,
            self.route,  # type: ignore[arg-type]
            most=self.most,
            goes_on=self.lag > 1,  # as all systems of these rows that sample so far ahead
        )  # fmt: skip


Run = tuple[Loop, float | None]  # and the number of its steps, where it is known


@cache
def simulated(loop: Loop, k: Constants) -> StepTime:
    return _streamed(loop, simulate(loop.setup(k)).time)


@cache
def by_formula(loop: Loop, k: Constants) -> StepTime:
    own = replace(k, step_overhead=0, reload_s=0, rollout_share=1, sync_s=0, train_flops=0)
    return _streamed(loop, step_time(loop.setup(k), sampled(loop, own)))


def _streamed(loop: Loop, time: StepTime) -> StepTime:
    """Where the trainer takes a batch in parts, it waits for the first, and then for what its work does not hide."""
    hidden = time.trainer_s * (1 - 1 / loop.parts)
    return time if loop.parts == 1 else replace(time, wait_s=max(time.wait_s - hidden, time.wait_s / loop.parts))


@cache
def sampled(loop: Loop, k: Constants) -> tuple[float, float]:
    return sampling_of(loop.setup(k))


def loop_question(row: Row, timed: Callable[[Loop, Constants], StepTime]) -> Question | str:
    """The question that a row about a loop asks, or why there is none. `timed`: `by_formula`, quick, or `simulated`."""
    source = row["source"]
    for start, read in (
        ("NeMo-RL perf", nemo),
        ("verl V1", verl_v1),
        ("verl", verl),
        ("AReaL", areal),
        ("SkyRL spec", skyrl),
    ):
        if source.startswith(start):
            found = place(row)
            if isinstance(found, str) and "H800 elsewhere" not in str(row["gpu"]):
                return found
            run = read(row)
            return run if isinstance(run, str) else answer(*run, row, timed)
    return "lengths or batch not stated"


def answer(loop: Loop, steps: float | None, row: Row, timed: Callable[[Loop, Constants], StepTime]) -> Question | str:
    """The metric of a row, of the loop that it describes. `steps`: of the whole run."""
    metric, tokens = row["metric"], None
    read: dict[str, Callable[[StepTime], float]] = {
        "step_time": lambda s: s.step_s,
        "generation_time": lambda s: s.wait_s,
        "generate_sequences_time": lambda s: s.sampling_s,
        "train_time": lambda s: s.training_s,
        "old_logprob_time": lambda s: s.logprobs_s,
        "wait_previous_generation_time": lambda s: s.wait_s,
    }
    if metric in read:
        return Question("rl", lambda k: max(1e-3, read[metric](timed(loop, k))))
    tokens = loop.prompts * loop.samples * (loop.prompt + loop.mean)
    if metric == "throughput_per_gpu":
        return Question("rl", lambda k: tokens / timed(loop, k).step_s / loop.gpus)
    if metric in {"end_to_end_throughput", "effective_training_throughput", "aggregate_throughput"}:
        return Question("rl", lambda k: tokens / timed(loop, k).step_s)
    if metric == "total_training_time" and steps:
        return Question("rl", lambda k: steps * timed(loop, k).step_s / 3600)
    return "not a time of a step, or the number of steps is not stated"


def nemo(row: Row) -> Run | str:
    found = place(row)
    assert not isinstance(found, str)
    layout = str(row["layout"])
    generation = re.search(r"generation \[TP,PP\]=\[(\d+),(\d+)\]", layout)
    training = re.search(r"training \[TP,CP,EP,PP,VPP\]=\[(\d+),(\d+),(\d+),(\d+)", layout)
    sizes = re.findall(
        r"([\d,]*\d) *(?=,|$)", re.sub(r"[a-z]+ sequence", "", str(row["response_len"])).replace(", ", " , ")
    )
    batch = [number(part) for part in str(row["batch"]).split(", ")]
    if "DAPO" in layout:
        return "dynamic sampling: how many groups were drawn is not stated"
    if not generation or not training or len(sizes) < 2 or len(batch) < 2:
        return "layout, lengths or batch not stated"
    mean, maximum = (float(size.replace(",", "")) for size in sizes[:2])
    gpus, off = int(row["num_gpus"]), "1-step Off" in layout
    tp, cp, ep, pp = (int(part) for part in training.groups())
    engine_tp = int(generation.group(1)) * int(generation.group(2))
    rollouts = int(batch[0] or 1)
    half = gpus // 2 if off else None
    loop = Loop(
        *found, gpus, engine_tp, tp, cp, pp, ep, rollouts // 16, 16, PROMPT, mean - PROMPT, int(maximum - PROMPT),
        max(1, round(rollouts / (batch[1] or rollouts))), int(maximum), 2, half, half, 1 if off else 0,
        1 if "Generation FP8" in row["note"] else 2, sharded=False,
    )  # fmt: skip
    return loop, None


def verl(row: Row) -> Run | str:
    found = place(row)
    assert not isinstance(found, str)
    layout, gpus = str(row["layout"]), int(row["num_gpus"] or 0)
    if "Math-7B" not in row["model"] or not gpus:
        return "lengths or batch not stated"
    if row["metric"] == "validation_time":
        return "the validation set is not stated"
    found_max = re.search(r"max ([\d.]+)(K?)", str(row["response_len"]))
    maximum = int(float(found_max.group(1)) * (1024 if found_max.group(2) else 1)) if found_max else 8192
    split = re.search(r"(\d+)(?: train)? ?: ?(\d+)", layout)
    sampling = training = None
    lag, parts = 0, 1
    if split:
        training, sampling = int(split.group(1)), int(split.group(2))
        staleness = re.search(r"staleness(?:_threshold=)? ?([\d.]+)", layout)
        lag = 2 if not staleness or float(staleness.group(1)) > 0 else 0
        parts = 1 if lag else 4  # verl's streams: four times 4 x 32 prompts a step, as the notes say
    elif "one-step overlap" in layout:
        training, sampling, lag = gpus * 3 // 4, gpus // 4, 1
    if lag and row["metric"] in {"generation_time", "wait_previous_generation_time"}:
        return "the trainer's wait, what is left of two times that nearly cancel"
    passes = 0 if split else 1  # asynchronous ones take the engines' log-probs
    loop = Loop(
        *found, gpus, 1, mean=VERL_MEAN, maximum=maximum, updates=16, forwards=passes, sampling_gpus=sampling,
        training_gpus=training, lag=lag, parts=parts,
    )  # fmt: skip
    return loop, None


def verl_v1(row: Row) -> Run | str:
    found = place(row)
    assert not isinstance(found, str)
    mean = number(re.sub(r".*mean", "", str(row["response_len"]))) or 12_000
    half = 16 if "separate" in str(row["layout"]) else None
    # Tokens a second x hours / 150 steps / 64 prompts / mean length gives 8 samples a prompt, in each row.
    loop = Loop(
        *found, 32, 4, 2, 2, 2, 4, 64, 8, 512.0, mean, 32768, 4, 32768, 1, half, half, 2 if "async" in str(row["layout"]) else 0, sharded=False,  # noqa: E501
    )  # fmt: skip
    return loop, 150


def areal(row: Row) -> Run | str:
    found = place(row)
    if isinstance(found, str):
        found = place({**row, "gpu": "H800"})
        assert not isinstance(found, str)
    gpus = int(row["num_gpus"] or 0)
    if not gpus:
        return "GPU count not stated"
    if "v0.1" in row["system"]:
        return "an engine of 2024 with overheads of its own: v0.1 is given beside v0.2"
    if "Fig. 4" in row["source"]:
        return "tokens counted otherwise: Table 1's hours and steps give three times as many in the same run"
    if row["metric"] == "generation_throughput":
        return "batch and lengths not stated"
    layout, text = str(row["layout"]), f"{row['response_len']} {row['batch']}"
    maximum = RELEASE_MAX
    if context := re.search(r"ctx (\d+)k", text):
        maximum = int(context.group(1)) * 1024 - 1024 if "27648" not in text else RELEASE_MAX
    median = Lengths.of_mean(RELEASE_MEAN, RELEASE_MAX).median
    mean = Lengths(median, maximum).mean
    if maximum < 8192:
        return "lengths of this set-up not stated"
    large = found[0].num_parameters > 2e10
    engine_tp = 4 if large else 1
    steps = 400 if "7B" in row["model"] and "v0.2" in row["note"] else 250
    tp, pp = (4, 1) if large else (1, 1)
    sampling, training, lag = gpus // 2, gpus // 2, 0
    if "75" in layout and "25" in layout:
        sampling, training, lag = gpus * 3 // 4, gpus // 4, 4
    elif row["system"].startswith("verl") or "colocated" in layout:
        sampling = training = None
    loop = Loop(
        *found, gpus, engine_tp, tp, 1, pp, mean=mean, maximum=maximum, forwards=0, sampling_gpus=sampling,
        training_gpus=training, lag=lag,
    )  # fmt: skip
    return loop, steps


def skyrl(row: Row) -> Run | str:
    found = place(row)
    assert not isinstance(found, str)
    if "MTP" in row["layout"]:
        return "speculation is not modelled"
    maximum = int(number(row["response_len"]) or 8192)
    loop = Loop(
        *found, int(row["num_gpus"]), 1, 4, 1, 1, 1, 32, 8, PROMPT, OTHER_SHARE * maximum, maximum, 1, 32768, 1,
        sharded=False,
    )  # fmt: skip
    return loop, None
