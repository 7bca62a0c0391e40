"""From verdicts to samples: reward and advantage. The only place where a label becomes a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pekoe.algo.advantage import ADVANTAGES, advantages_of
from pekoe.config.recipes import AlgoSection
from pekoe.core.types import JudgedGroup, SampleRef, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Scored:
    """A batch ready for training, and the groups that were dropped."""

    samples: tuple[SampleRef, ...]
    dropped: dict[int, str]  # position of a dropped group -> reason
    no_signal: str = ""  # why the step is skipped though there are samples


def verdict_reward(verdict: Verdict, algo: AlgoSection) -> float:
    """The reward of a verdict alone, by `algo.reward_formula`. A FAULT has no reward (I9)."""
    assert verdict.label != "fault", "a FAULT has no reward"
    wrong = -algo.reward if algo.reward_wrong is None else algo.reward_wrong
    if verdict.score is None or algo.reward_formula == "label":
        return algo.reward if verdict.label == "correct" else wrong
    return algo.reward * verdict.score + wrong * (1 - verdict.score)  # exact at both ends


def reward_of(verdict: Verdict, algo: AlgoSection, num_tokens: int, max_new_tokens: int) -> float:
    """`verdict_reward`, less the soft penalty of a long response (DAPO, arXiv:2503.14476, eq. 13).

    Args:
        num_tokens: of the response; `max_new_tokens` is where responses are cut.
    """
    reward = verdict_reward(verdict, algo)
    if not algo.overlong_tokens:
        return reward
    assert max_new_tokens, "a penalty of length needs to know where responses are cut"
    over = (num_tokens - max_new_tokens) / algo.overlong_tokens + 1
    return reward - min(1.0, max(0.0, over)) * (algo.overlong_penalty or algo.reward)


def uninformative(verdicts: Sequence[Verdict], algo: AlgoSection) -> str | None:
    """Why dynamic sampling (DAPO) drops a group, or None: its rewards are equal, lengths and FAULTs left out."""
    judged = [verdict for verdict in verdicts if verdict.label != "fault"]
    if len({verdict_reward(verdict, algo) for verdict in judged}) != 1:
        return None
    right = {verdict.label == "correct" for verdict in judged}
    what = "all scores equal" if len(right) > 1 else "all right" if True in right else "none right"
    return f"dynamic sampling: {what}"


def score(
    groups: Sequence[JudgedGroup], algo: AlgoSection, version: int | None = None, max_new_tokens: int = 0
) -> Scored:
    """Make the training samples of a rollout batch. `version`: the trainer's, where samples may be of older ones;
    `max_new_tokens`: where responses are cut.

    FAULT and aborted trajectories leave their group before advantages, truncated ones after it where `mask_truncated`
    is on. A group with fewer than two trajectories left, of more than one, is dropped.
    """
    kept: list[tuple[int, Trajectory, float]] = []
    dropped: dict[int, str] = {}
    for position, group in enumerate(groups):
        size = len(group.trajectories)
        good = [
            (position, trajectory, reward_of(verdict, algo, trajectory.num_tokens, max_new_tokens))
            for trajectory, verdict in zip(group.trajectories, group.verdicts, strict=True)
            if verdict.label != "fault" and trajectory.finish != "abort" and trajectory.num_tokens
        ]
        if len(good) < min(2, size):
            dropped[position] = f"{size - len(good)} of {size} rollouts faulted or aborted"
        else:
            kept.extend(good)
    if not kept:
        return Scored((), dropped)
    rewards = np.array([reward for _, _, reward in kept], np.float64)
    lengths = np.array([trajectory.num_tokens for _, trajectory, _ in kept], np.int64)
    positions = np.array([position for position, _, _ in kept], np.int64)
    advantages = advantages_of(algo.advantage, rewards, lengths, positions)
    samples = tuple(
        SampleRef(
            num_tokens=branch.num_prompt_tokens + branch.num_tokens,
            num_targets=branch.num_tokens,
            handle=branch.handle,
            advantage=float(np.float32(advantage)),
            group=position,
            index=trajectory.sample,
            lags=() if version is None else tuple((version - older, start) for older, start in branch.versions),
        )
        for (position, trajectory, _), advantage in zip(kept, advantages, strict=True)
        if not (algo.mask_truncated and trajectory.finish == "length")
        for branch in trajectory.branches
    )
    for position in set(positions.tolist()) - {sample.group for sample in samples}:
        dropped[position] = "all responses truncated, and algo.mask_truncated is on"
    if algo.advantage not in ADVANTAGES:  # the user's own: it alone says what teaches
        return Scored(samples, dropped, "" if advantages.any() else "all advantages are 0")
    # Compare rewards, as the advantages of equal rewards may be rounding errors and not 0.
    whole_batch = algo.advantage == "global"
    pools = [0 if whole_batch else position for position, _, _ in kept]
    if len(set(zip(pools, rewards.tolist(), strict=True))) > len(set(pools)):
        return Scored(samples, dropped)
    return Scored(samples, dropped, f"all rewards {'' if whole_batch else 'of each group '}are equal")
