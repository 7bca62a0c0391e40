"""One rollout batch: draw problems, sample groups, judge them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pekoe.algo.scoring import Scored, all_alike, reward_of
from pekoe.core.errors import RunError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import (
    FloatArray,
    Group,
    Payload,
    PayloadRef,
    Problem,
    Prompt,
    Rollout,
    SamplingParams,
    Verdict,
)
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine import Generator
from pekoe.run.interrupt import StepTimer, Stop
from pekoe.run.judging import Judge, await_verdicts


@dataclass(slots=True)
class Batch:
    """Groups with their verdicts, in order of drawing, and the groups that dynamic sampling dropped."""

    groups: list[Group] = field(default_factory=list)
    verdicts: list[list[Verdict]] = field(default_factory=list)
    dropped: list[tuple[Group, list[Verdict], str]] = field(default_factory=list)
    num_rounds: int = 0

    def everything(self) -> Iterator[tuple[Group, list[Verdict]]]:
        yield from zip(self.groups, self.verdicts, strict=True)
        yield from ((group, verdicts) for group, verdicts, _ in self.dropped)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Problems in, groups with verdicts out. `evaluate` and `curate` walk the same path as `rl`."""

    engine: Generator
    tokenizer: Tokenizer
    judge: Judge
    view: ProgressReporter
    stop: Stop

    def __call__(
        self,
        drawn: list[tuple[Problem, int]],
        params: SamplingParams,
        clock: StepTimer,
        keep: Callable[[Group, list[Verdict]], None] | None = None,
    ) -> list[tuple[Group, list[Verdict]]]:
        """Sample `params.n` responses to each (problem, draw), and judge each as it finishes.

        `keep` hears of each group as soon as all of it is judged.
        """
        by_uid = {(problem.uid, draw): i for i, (problem, draw) in enumerate(drawn)}
        prompts = [Prompt(p.uid, draw, self.tokenizer.encode_prompt(p.messages)) for p, draw in drawn]
        rollouts: list[dict[int, Rollout]] = [{} for _ in drawn]
        futures: list[dict[int, Future[Verdict]]] = [{} for _ in drawn]
        groups: dict[int, tuple[Group, list[Verdict]]] = {}

        def finish(row: int) -> None:
            problem, draw = drawn[row]
            assert len(rollouts[row]) == params.n, f"{problem.uid}: the engine lost {params.n - len(rollouts[row])}"
            complete = tuple(rollouts[row][i] for i in range(params.n))
            verdicts = await_verdicts([futures[row][i] for i in range(params.n)], self.judge)
            groups[row] = Group(problem, draw, complete), verdicts
            if keep is not None:
                keep(*groups[row])

        sampled: deque[int] = deque()  # rows whose verdicts may still be awaited
        with clock("rollout", len(drawn) * params.n):
            stream = self.engine.generate(prompts, params)
            for rollout in stream:
                row = by_uid[rollout.uid, rollout.draw]
                rollouts[row][rollout.sample_index] = rollout
                futures[row][rollout.sample_index] = self.judge.submit(drawn[row][0], rollout)
                if len(futures[row]) == params.n:
                    sampled.append(row)
                while keep is not None and sampled and all(f.done() for f in futures[sampled[0]].values()):
                    finish(sampled.popleft())
                self.view.advance()
                self.stop.check()
        with clock("verify", len(drawn)):
            for row in range(len(drawn)):
                if row not in groups:
                    finish(row)
                self.view.advance()
                self.stop.check()
        return [groups[row] for row in range(len(drawn))]


def check_faults(verdicts: Iterable[Verdict], max_rate: float) -> float:
    """Return the share of FAULT verdicts; RunError where it is above `max_rate` (I9)."""
    verdicts = list(verdicts)
    faults = [v for v in verdicts if v.label == "fault"]
    rate = len(faults) / max(1, len(verdicts))
    if rate > max_rate:
        raise RunError(
            f"verifier: {len(faults)} of {len(verdicts)} verdicts are FAULT ({rate:.1%}), more than "
            f"verify.max_fault_rate = {max_rate:.1%} allows. The first: {faults[0].why}"
        )
    return rate


def is_useless(verdicts: list[Verdict]) -> str | None:
    """Why dynamic sampling drops a group, or None."""
    if not all_alike(verdicts) or all(v.label == "fault" for v in verdicts):
        return None
    right = any(v.label == "correct" for v in verdicts)
    return "dynamic sampling: all right" if right else "dynamic sampling: none right"


def exact(values: FloatArray) -> list[float]:
    """float32 values as the shortest decimal numbers that give the same float32 back: a step can be replayed."""
    return [float(str(x)) for x in values]


@dataclass(frozen=True, slots=True)
class RolloutLine:
    """What the rollouts file says of a response; its tokens are added where they lie."""

    said: dict[str, Any]
    payload: PayloadRef

    def complete(self, payload: Payload, tokenizer: Tokenizer) -> dict[str, Any]:
        return self.said | {
            "prompt": tokenizer.decode(payload.prompt_tokens, skip_special_tokens=False),
            "text": tokenizer.decode(payload.tokens, skip_special_tokens=False),
            "prompt_tokens": payload.prompt_tokens.tolist(),
            "tokens": payload.tokens.tolist(),
            "logprobs": exact(payload.logprobs),
        }


def rollout_lines(batch: Batch, scored: Scored, reward: float) -> Iterator[RolloutLine]:
    """A line for each response, group by group. `group` is the place in the batch; dropped groups come last."""
    advantages = {(sample.group, sample.index): sample.advantage for sample in scored.samples}
    for position, (group, verdicts) in enumerate(batch.everything()):
        for rollout, verdict in zip(group.rollouts, verdicts, strict=True):
            said = {
                "uid": rollout.uid,
                "draw": rollout.draw,
                "group": position,
                "sample": rollout.sample_index,
                "finish_reason": rollout.finish_reason,
                "versions": rollout.versions,
                "label": verdict.label,
                "extracted": verdict.extracted,
                "why": verdict.why,
                "gold": group.problem.gold,
                "reward": None if verdict.label == "fault" else reward_of(verdict, reward),
                "advantage": advantages.get((position, rollout.sample_index)),
            }
            yield RolloutLine(said, rollout.payload)
