"""The nouns of Pekoe, in the order in which they are made. Each arrow of the flow makes a new one.

Problem -> Prompt -> Rollout -> Group -> Verdict -> reward -> advantage -> Sample (-> MicroBatch, in `algo.packing`)

Shapes: [P] prompt tokens, [R] response tokens, [L] = [P + R] one whole sequence.
Arrays are numpy (host memory), so that nothing on this floor needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort"]
Label = Literal["correct", "wrong", "unparsed", "fault"]
Stream = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a reference answer. `gold` is what `pekoe.verify.judge` takes for this `kind`."""

    uid: str
    messages: tuple[dict[str, str], ...]  # each {"role", "content"}
    gold: Any
    kind: str = "math"
    pass_rate: float | None = None  # of some model's samples, as `pekoe curate` measured it


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one problem, ready to be sampled from. `draw` counts how often the problem was drawn before."""

    uid: str
    draw: int
    tokens: IntArray  # [P]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Log-probs are always of the distribution at `temperature`, before top-p and top-k.

    `temperature = 0` is greedy; its log-probs are those at temperature 1.
    `top_k = 0` and `top_p = 1` switch truncation off.
    `seed` and `stream` key the random numbers (I8): training and evaluation never share any.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    stream: Stream = "train"

    def __post_init__(self) -> None:
        checks = [
            (self.n >= 1, "n", ">= 1", self.n),
            (self.temperature >= 0, "temperature", ">= 0", self.temperature),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p),
            (self.top_k >= 0, "top_k", ">= 0", self.top_k),
            (self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                "in [0, max_new_tokens]",
                self.min_new_tokens,
            ),
        ]
        for ok, name, expected, got in checks:
            if not ok:
                raise ValueError(f"sampling {name}: expected {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Payload:
    """The heavy part of a rollout. The stop token, where there is one, is the last of `tokens`."""

    prompt_tokens: IntArray  # [P]
    tokens: IntArray  # [R]
    logprobs: FloatArray  # [R] of each sampled token, at the sampling temperature

    def resolve(self) -> Payload:
        return self


class PayloadRef(Protocol):
    """Where a payload lies. `resolve` brings it here; only a room that needs tokens calls it."""

    def resolve(self) -> Payload: ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. `versions` lists (policy version, index of the first response token sampled under it)."""

    uid: str
    draw: int
    sample_index: int
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    payload: PayloadRef


@dataclass(frozen=True, slots=True)
class Group:
    """The n rollouts of one draw of one problem, ordered by sample index."""

    problem: Problem
    draw: int
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one response. `why` explains everything but a plain CORRECT or WRONG."""

    label: Label
    extracted: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What training sees of one sequence. Everything is aligned to `tokens`: entry t speaks of token t."""

    tokens: IntArray  # [L]
    loss_mask: BoolArray  # [L] true where the token is trained on (never at t = 0: nothing predicts it)
    behaviour_logprobs: FloatArray  # [L] the engine's; 0 outside the mask
    advantages: FloatArray  # [L]; 0 outside the mask (SFT: all ones on the mask)
    group: int = 0  # which group of the batch it came from; groups are never split between mini-batches
    proximal_logprobs: FloatArray | None = None  # [L] the trainer's at the step's start, where recomputed
    reference_logprobs: FloatArray | None = None  # [L] the reference model's, where the objective wants them

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.loss_mask.sum())

    def resolve(self) -> Sample:
        return self


class LogprobsRef(Protocol):
    """Where log-probs [L] lie."""

    def resolve(self) -> FloatArray: ...


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample as the loop knows it: lengths, advantage, where the tokens lie. Only who trains on it resolves it."""

    num_prompt_tokens: int
    num_targets: int
    payload: PayloadRef
    advantage: float
    group: int
    index: int  # of the rollout in its group
    proximal_logprobs: FloatArray | LogprobsRef | None = None
    reference_logprobs: FloatArray | LogprobsRef | None = None

    def __len__(self) -> int:
        return self.num_prompt_tokens + self.num_targets

    def resolve(self) -> Sample:
        """Lay prompt and response end to end; only response tokens are trained on."""
        payload = self.payload.resolve()
        mask = np.arange(len(self)) >= self.num_prompt_tokens
        behaviour, weights = np.zeros(len(self), np.float32), np.zeros(len(self), np.float32)
        behaviour[mask], weights[mask] = payload.logprobs, self.advantage
        tokens = np.concatenate([payload.prompt_tokens, payload.tokens])
        proximal, reference = (
            at if at is None or isinstance(at, np.ndarray) else at.resolve()
            for at in (self.proximal_logprobs, self.reference_logprobs)
        )
        return Sample(tokens, mask, behaviour, weights, self.group, proximal, reference)


AnySample = Sample | SampleRef
