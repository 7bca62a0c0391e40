"""The types of Pekoe, in the order in which they are made. Each arrow of the flow makes a new value.

Draw -> Request -> Completion -> Turn -> Trajectory -> Verdict -> reward -> advantage -> Sample ->
`algo.packing.MicroBatch`

Shapes: [P] prompt tokens, [R] response tokens, [L] = [P + R] one whole sequence. Arrays are numpy, in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
RoutingArray = NDArray[np.uint8 | np.int16]
"""[L, layers, k] the experts of each token, in layers that have some; `missing_expert` for a token that has none."""

FinishReason = Literal["stop", "length", "abort"]
Label = Literal["correct", "wrong", "unparsed", "fault"]
Stream = Literal["train", "eval"]
T_co = TypeVar("T_co", covariant=True)


def missing_expert(itemsize: int) -> int:
    """What stands in a `RoutingArray` of this many bytes a number for a token that no engine computed."""
    return 255 if itemsize == 1 else -1


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a reference answer. `gold` is what `pekoe.verify.judge` takes for this `kind`."""

    uid: str
    messages: tuple[dict[str, str], ...]  # each {"role", "content"}
    gold: Any
    kind: str = "math"
    pass_rate: float | None = None  # of some model's samples, as `pekoe curate` measured it
    row: Any = None  # of the data, as it was read: kept where rewards of the user's own may ask for it


@dataclass(frozen=True, slots=True)
class Draw:
    """A problem drawn for sampling. `number` counts earlier draws: Draw(Problem("gsm8k/17", ...), 0) is the first."""

    problem: Problem
    number: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Log-probs are always of the distribution at `temperature`, before top-p and top-k.

    `temperature = 0` is greedy; its log-probs are those at temperature 1. `top_k = 0` and `top_p = 1` truncate nothing.
    `stop_token_ids = None`: the model's own end tokens; `()`: none. `seed` and `stream` key the random numbers (I8):
    training and evaluation never share any.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] | None = None
    seed: int = 0
    stream: Stream = "train"
    routing: bool = False  # whether completions have the experts that their tokens went to

    @property
    def stops(self) -> tuple[int, ...]:
        """`stop_token_ids`, where an engine has put the model's own in place of None (`engine.base.with_stops`)."""
        return self.stop_token_ids or ()

    def __post_init__(self) -> None:
        checks = {
            "n": (self.n >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, ">= 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, ">= 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "in [0, max_new_tokens]"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"sampling {name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Request:
    """Asks an engine for one response.

    Example: Request("gsm8k/17", 0, 3, array([1, 734, 29]), params) asks for the fourth response to a problem's first
    draw. Requests of one group that are submitted together should share one `tokens` array.
    """

    uid: str
    draw: int
    sample: int  # index in the group
    tokens: IntArray  # [P] the context that the response continues
    params: SamplingParams  # `params.n` has no meaning here
    priority: int = 0  # among requests that wait, higher ones are sampled first
    turn: int = 0  # keys the random numbers of an agent's later requests; 0: those of a single answer
    # Called with tokens as they are sampled, and how many came before them, by an engine of this process that can; in
    # its thread, so not for long. Where the request begins again elsewhere, that begins at 0 again. True: the response
    # ends with these tokens.
    listener: Callable[[int, IntArray], bool | None] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """The tokens of a sequence, laid out once, where they were sampled. Shapes [L].

    Example: a prompt of 3 tokens and a response of 2: tokens [5, 6, 7, 8, 2], loss_mask [F, F, F, T, T],
    logprobs [0, 0, 0, -0.7, -0.1]. The stop token, where there is one, is the last of its response.
    """

    tokens: IntArray
    loss_mask: BoolArray  # true where an engine sampled the token
    logprobs: FloatArray  # of each sampled token, at the sampling temperature; 0 elsewhere
    routing: RoutingArray | None = None  # where the request asked for it

    @classmethod
    def of(
        cls, prompt: IntArray, response: IntArray, logprobs: FloatArray, routing: RoutingArray | None = None
    ) -> Record:
        """Lay a prompt [P] and a response [R] with its log-probs [R] end to end. `routing`: of the first tokens."""
        mask = np.arange(len(prompt) + len(response)) >= len(prompt)
        placed = np.zeros(len(mask), np.float32)
        placed[mask] = logprobs
        if routing is not None:
            rest = (len(mask) - len(routing), *routing.shape[1:])
            routing = np.concatenate([routing, np.full(rest, missing_expert(routing.itemsize), routing.dtype)])
        return cls(np.concatenate([prompt, response]), mask, placed, routing)

    def resolve(self) -> Record:
        return self


class Handle(Protocol[T_co]):
    """Refers to a value (a record, or log-probs [L]) that may be in another process. Only its user resolves it."""

    def resolve(self) -> T_co: ...


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. `versions` lists (policy version, index of the first response token sampled under it).

    Example: Completion(40, "stop", ((7, 0), (8, 24)), record): weights went from version 7 to 8 before the 25th token.
    """

    num_tokens: int
    finish: FinishReason
    versions: tuple[tuple[int, int], ...]
    handle: Handle[Record]
    num_cached_tokens: int = 0  # of the context, found in a prefix cache

    @property
    def tokens(self) -> IntArray:
        """[R]"""
        record = self.handle.resolve()
        return record.tokens[record.loss_mask]

    @property
    def logprobs(self) -> FloatArray:
        """[R] of each sampled token, at the sampling temperature."""
        record = self.handle.resolve()
        return record.logprobs[record.loss_mask]


@dataclass(frozen=True, slots=True)
class Turn:
    """The context [P] that an engine was given, and the completion that it gave."""

    context: IntArray
    completion: Completion


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence of a trajectory: turns of which each continues the one before, token for token.

    Example: Branch(num_prompt_tokens=12, num_tokens=40, ((7, 0),), record).
    """

    num_prompt_tokens: int  # that no engine sampled: the prompt, and what stands between turns
    num_tokens: int  # that were sampled
    versions: tuple[tuple[int, int], ...]  # (policy version, index of the first sampled token that it sampled)
    handle: Handle[Record]


@dataclass(frozen=True, slots=True)
class EpisodeStats:
    """What an episode did, and where its time went."""

    num_turns: int
    num_tool_calls: int = 0  # results of tools that the model was shown
    num_malformed: int = 0  # calls that the model did not write as its family does
    engine_s: float = 0.0  # in which at least one of its requests was with the engines
    tool_s: float = 0.0  # the rest


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at a problem: lengths, and handles of the tokens. A single answer is one branch of one turn.

    Example: Trajectory("gsm8k/17", 0, 3, "stop", (Branch(12, 40, ((7, 0),), record),)).
    """

    uid: str
    draw: int
    sample: int  # index in the group
    finish: FinishReason  # of its last turn
    branches: tuple[Branch, ...]  # each a sequence to train on
    episode: EpisodeStats | None = None  # None: a single answer

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all branches that no engine sampled for them."""
        return sum(branch.num_prompt_tokens for branch in self.branches)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all branches."""
        return sum(branch.num_tokens for branch in self.branches)

    @classmethod
    def of(cls, request: Request, completion: Completion) -> Trajectory:
        """A single answer."""
        branch = Branch(len(request.tokens), completion.num_tokens, completion.versions, completion.handle)
        return cls(request.uid, request.draw, request.sample, completion.finish, (branch,))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one trajectory. `why` explains all but a plain CORRECT or WRONG.

    Example: Verdict("wrong", "12", "score 0.4", 0.4), of a reward that gives a share of 1.
    """

    label: Label
    extracted: str | None = None
    why: str = ""
    score: float | None = None  # in [0, 1]; None where the label is all that is known

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"Verdict.score: expected None or a number in [0, 1], got {self.score!r}")


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """The n trajectories of one draw of a problem, ordered by sample index, each with its verdict."""

    problem: Problem
    draw: int
    trajectories: tuple[Trajectory, ...]
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(
        cls, problem: Problem, completions: Sequence[Completion], verdicts: Sequence[Verdict], draw: int = 0
    ) -> JudgedGroup:
        """From what `Engine.generate` gave for a problem's prompt."""
        trajectories = tuple(
            Trajectory(
                problem.uid,
                draw,
                i,
                c.finish,
                (Branch(len(c.handle.resolve().tokens) - c.num_tokens, c.num_tokens, c.versions, c.handle),),
            )
            for i, c in enumerate(completions)
        )
        return cls(problem, draw, trajectories, tuple(verdicts))


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. All arrays are aligned to `tokens`: entry t belongs to token t."""

    tokens: IntArray  # [L]
    loss_mask: BoolArray  # [L] true where the token is trained on (never at t = 0: nothing predicts it)
    behaviour_logprobs: FloatArray  # [L] the engine's; 0 outside the mask
    advantages: FloatArray  # [L]; 0 outside the mask (SFT: all ones on the mask)
    group: int = 0  # which group of the batch it came from; groups are never split between mini-batches
    proximal_logprobs: FloatArray | None = None  # [L] the trainer's at the step's start, where recomputed
    reference_logprobs: FloatArray | None = None  # [L] the reference model's, where the objective wants them
    lags: IntArray | None = None  # [L] versions that the weights behind each token are older than the trainer's
    routing: RoutingArray | None = None  # the experts that its tokens go to in training, where they were recorded

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.loss_mask.sum())

    def resolve(self) -> Sample:
        return self


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample as the loop has it: lengths, advantage, a handle of the tokens. Only the trainer resolves it.

    Example: SampleRef(num_tokens=52, num_targets=40, record, advantage=0.8, group=5, index=3).
    """

    num_tokens: int  # [L] of the whole sequence
    num_targets: int
    handle: Handle[Record]
    advantage: float  # of every trained token
    group: int
    index: int  # of the trajectory in its group
    proximal_logprobs: FloatArray | Handle[FloatArray] | None = None
    reference_logprobs: FloatArray | Handle[FloatArray] | None = None
    lags: tuple[tuple[int, int], ...] = ()  # (lag, index of the first sampled token that has it); empty: not wanted

    def __len__(self) -> int:
        return self.num_tokens

    def resolve(self) -> Sample:
        record = self.handle.resolve()
        advantages = np.where(record.loss_mask, np.float32(self.advantage), np.float32(0))
        proximal, reference = (
            value if value is None or isinstance(value, np.ndarray) else value.resolve()
            for value in (self.proximal_logprobs, self.reference_logprobs)
        )
        common = record.tokens, record.loss_mask, record.logprobs, advantages, self.group, proximal, reference
        if not self.lags:
            return Sample(*common, routing=record.routing)
        numbers, starts = zip(*self.lags, strict=True)
        lags = np.zeros(len(record.tokens), np.int64)
        lags[record.loss_mask] = np.repeat(numbers, np.diff([*starts, self.num_targets]))
        return Sample(*common, lags, record.routing)


AnySample = Sample | SampleRef
