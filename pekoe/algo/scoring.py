"""From verdicts to samples: reward, advantage, loss mask. The only place where a label becomes a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pekoe.algo.advantage import ADVANTAGES
from pekoe.config.recipes import AlgoSection
from pekoe.core.types import Group, Rollout, SampleRef, Verdict


@dataclass(frozen=True, slots=True)
class Scored:
    """A batch ready for training, and what became of each group."""

    samples: tuple[SampleRef, ...]
    dropped: dict[int, str]  # position of a dropped group -> reason
    advantage_std: float  # 0: every advantage is 0, so the step teaches nothing and is skipped


def reward_of(verdict: Verdict, reward: float) -> float:
    """+reward for CORRECT, -reward for WRONG and UNPARSED. A FAULT has no reward: it never gets here (I9)."""
    assert verdict.label != "fault", "a FAULT has no reward"
    return reward if verdict.label == "correct" else -reward


def all_alike(verdicts: Sequence[Verdict]) -> bool:
    """True if the verdicts of a group are all CORRECT or all not: with a group baseline it teaches nothing (DAPO)."""
    return len({verdict.label == "correct" for verdict in verdicts if verdict.label != "fault"}) < 2


def score(groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]], algo: AlgoSection) -> Scored:
    """Make the training samples of a rollout batch.

    FAULT and aborted rollouts leave their group before advantages; a group left with fewer than two rollouts of
    more than one is dropped, with the reason. Truncated ones leave after advantages where `mask_truncated` is on.
    """
    kept: list[tuple[int, Rollout, float]] = []
    dropped: dict[int, str] = {}
    for position, (group, labels) in enumerate(zip(groups, verdicts, strict=True)):
        good = [
            (position, rollout, reward_of(verdict, algo.reward))
            for rollout, verdict in zip(group.rollouts, labels, strict=True)
            if verdict.label != "fault" and rollout.finish_reason != "abort" and rollout.num_tokens
        ]
        if len(good) < min(2, len(group.rollouts)):
            dropped[position] = (
                f"{len(group.rollouts) - len(good)} of {len(group.rollouts)} rollouts faulted or aborted"
            )
        else:
            kept.extend(good)
    if not kept:
        return Scored((), dropped, 0.0)
    rewards = np.array([reward for _, _, reward in kept], np.float64)
    lengths = np.array([rollout.num_tokens for _, rollout, _ in kept], np.int64)
    positions = np.array([position for position, _, _ in kept], np.int64)
    advantages = ADVANTAGES[algo.advantage](rewards, lengths, positions)
    samples = tuple(
        SampleRef(
            rollout.num_prompt_tokens,
            rollout.num_tokens,
            rollout.payload,
            float(np.float32(advantage)),
            position,
            rollout.sample_index,
        )
        for (position, rollout, _), advantage in zip(kept, advantages, strict=True)
        if not (algo.mask_truncated and rollout.finish_reason == "length")
    )
    for position in set(positions.tolist()) - {sample.group for sample in samples}:
        dropped[position] = "all responses truncated, and algo.mask_truncated is on"
    return Scored(samples, dropped, float(advantages.std()))
