"""A step of the loop from its parts: sampling, log-probs, training, publishing, and who waits for whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pekoe.plan.costs import TENSORS, Constants, Engine, Training, Transport, publish
from pekoe.plan.rollout import Lengths, sampling_seconds

MOST = 256  # sequences that an engine runs together at most, where nothing else is said


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a run measured, over those of the formulas."""

    training: float = 1.0  # log-probs, too
    publishing: float = 1.0


@dataclass(frozen=True)
class Setup:
    """A run as the planner sees it."""

    engine: Engine
    num_engines: int
    training: Training
    prompts: int  # groups a step
    samples: int  # responses a group
    prompt: float  # tokens, mean
    lengths: Lengths
    updates: int = 4  # optimizer steps a step
    budget: int = 32768  # tokens of a micro-batch at a replica
    forwards: int = 0  # log-prob passes: proximal, reference
    colocated: bool = False  # engines and trainer take turns on the same devices
    lag: int = 0  # versions that sampling may be ahead
    route: Transport = "buckets"
    judge_s: float = 0.0  # after the last response
    most: int = MOST
    seed: int = 0
    goes_on: bool = False  # with lag: whether responses in flight go on under new weights
    window: int = 1  # groups within which one that is sampled may overtake others (`plan.schedule` alone)
    pace: Pace = Pace()

    @property
    def constants(self) -> Constants:
        return self.training.constants

    @property
    def devices(self) -> int:
        """All of the run."""
        sampling = self.engine.tp * self.num_engines
        return max(sampling, self.training.devices) if self.colocated else sampling + self.training.devices

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Of a batch, prompts too: what is trained on."""
        return self.responses * (self.prompt + self.lengths.mean)

    @property
    def micro_batches(self) -> float:
        """Of a replica, in a step: each update has one at least, and bins are not quite full."""
        return max(float(self.updates), self.tokens / self.training.replicas / (0.9 * self.budget))

    @property
    def context(self) -> float:
        """What a token of the batch attends to, doubled: the lengths' second moment over their first."""
        lengths = self.drawn + self.prompt
        return float(np.mean(lengths**2) / np.mean(lengths))

    @property
    def grown(self) -> float:
        """The mean length so far of a response in flight."""
        return float(np.mean(self.drawn.astype(float) ** 2) / np.mean(self.drawn)) / 2

    @cached_property
    def drawn(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self.lengths.draw(self.responses, np.random.default_rng(self.seed))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by part. With lag, sampling goes on beside the rest, and `wait_s` is what is seen of it."""

    sampling_s: float
    judging_s: float
    logprobs_s: float
    training_s: float
    publish_s: float
    overhead_s: float
    wait_s: float  # the trainer waits for a batch
    engines_busy: float  # share of the step in which an engine samples, mean
    trainer_busy: float

    @property
    def trainer_s(self) -> float:
        return self.logprobs_s + self.training_s

    @property
    def step_s(self) -> float:
        return self.wait_s + self.judging_s + self.trainer_s + self.publish_s + self.overhead_s


def sampling_of(setup: Setup) -> tuple[float, float]:
    """Seconds until the last response of a batch that begins at once, and the mean of the engines' shares of it."""
    ends = sampling_seconds(
        setup.engine, setup.num_engines, setup.prompt, setup.drawn.tolist(), setup.samples, setup.most
    )
    last = float(ends.max())
    return last, float(ends.mean() / last) if last else 0.0


def steady_seconds(setup: Setup) -> float:
    """Seconds a batch where engines never run dry: as many sequences in flight as the lag lets begin."""
    waiting = (setup.lag + 1) * setup.responses / setup.num_engines
    batch = min(float(setup.most), waiting, setup.engine.kv_tokens() / (setup.prompt + setup.lengths.mean))
    prefill = setup.engine.prefill(setup.prompt) / setup.samples
    decode = setup.engine.decode(max(1.0, batch), setup.prompt + setup.grown) * setup.lengths.mean / max(1.0, batch)
    return setup.responses / setup.num_engines * (decode + prefill)


def times_beside(setup: Setup) -> tuple[float, float, float, float]:
    """Seconds of what is not sampling: log-prob passes, training, publishing, and the loop's own work."""
    training, k, pace = setup.training, setup.constants, setup.pace
    passes = setup.forwards * training.logprobs(setup.tokens, setup.context, setup.micro_batches)
    trained = training.step(setup.tokens, setup.context, setup.micro_batches, setup.updates)
    shape = training.shape
    tensors = shape.num_layers * TENSORS + 3.0 * shape.expert_layers * shape.num_experts
    num_bytes = shape.num_parameters * setup.engine.weight_bytes
    published = publish(num_bytes, tensors, setup.route, training.devices, training.device, k) + proof_s(setup)
    overhead = k.step_overhead + (2 * k.reload_s * num_bytes / training.devices / 1e9 if setup.colocated else 0.0)
    return passes * pace.training, trained * pace.training, published * pace.publishing, overhead


def proof_s(setup: Setup) -> float:
    """Seconds in which a publish is proven: each engine samples `canary` tokens alone, and the trainer computes a
    forward of them, which is small: its kernels' starts. With lag nobody waits for it."""
    k, engine = setup.constants, setup.engine
    if not k.canary or (setup.lag and not setup.colocated):
        return 0.0
    sampled = engine.prefill(setup.prompt) + k.canary * engine.decode(1, setup.prompt + k.canary / 2)
    return sampled + setup.training.start_forward()


def step_time(setup: Setup, sampling: tuple[float, float] | None = None) -> StepTime:
    """A step, in the steady state, by formula; `plan.schedule` simulates it.

    Lag 0: sampling, then training. With lag a whole batch is sampled while the one before is trained on. Where
    responses go on under new weights, from lag 2 on engines begin new groups as others end, and no batch's tail is
    waited for.

    Args:
        sampling: what `sampling_of` says, where it is known already.
    """
    passes, trained, published, overhead = times_beside(setup)
    beside = passes + trained + published + overhead + setup.judge_s
    sampled, share = sampling or sampling_of(setup)
    k = setup.constants
    sampled /= k.rollout_share
    if setup.lag >= 2 and setup.goes_on and not setup.colocated:
        sampled, share = (
            max(
                steady_seconds(setup) / k.rollout_share,
                float(setup.drawn.max()) * setup.engine.decode(1, 0) / setup.lag,
            ),
            1.0,
        )
    wait = max(0.0, sampled - beside) if setup.lag and not setup.colocated else sampled
    total = wait + beside
    return StepTime(
        sampled, setup.judge_s, passes, trained, published, overhead, wait,
        min(1.0, sampled * share / total), (passes + trained) / total,
    )  # fmt: skip
