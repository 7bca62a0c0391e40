"""From rewards to advantages. With gamma = lambda = 1 and no critic, every token of a response has one advantage.

Everything is float64 in host memory: N responses, each with a reward, a length in tokens and a group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pekoe.core.errors import UserError
from pekoe.core.functions import load_function

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def global_normalised(rewards: Floats, lengths: Ints, groups: Ints) -> Floats:
    """AReaL v0.2 (PPO `adv_norm`): (R - mean) / (std + 1e-5) over all response tokens of the batch. Returns [N].

    The mean and the (biased) variance weigh each response by its tokens. Groups are ignored.
    """
    weights = lengths / lengths.sum()
    mean = (weights * rewards).sum()
    std = np.sqrt((weights * (rewards - mean) ** 2).sum())
    return (rewards - mean) / (std + 1e-5)


def grpo(rewards: Floats, lengths: Ints, groups: Ints) -> Floats:
    """GRPO (DeepSeekMath, arXiv:2402.03300, section 4.1.2): (R - group mean) / (group std + 1e-4). Returns [N]."""
    mean, std, _ = _group_moments(rewards, groups)
    return (rewards - mean) / (std + 1e-4)


def dr_grpo(rewards: Floats, lengths: Ints, groups: Ints) -> Floats:
    """Dr. GRPO (arXiv:2503.20783): R - group mean, without the division that favours easy and hard problems."""
    mean, _, _ = _group_moments(rewards, groups)
    return rewards - mean


def rloo(rewards: Floats, lengths: Ints, groups: Ints) -> Floats:
    """RLOO (arXiv:2402.14740): R - the mean of the group's other responses. Groups of one get 0. Returns [N]."""
    mean, _, size = _group_moments(rewards, groups)
    return (rewards - mean) * size / np.maximum(size - 1, 1)


Advantage = Callable[[Floats, Ints, Ints], Floats]
ADVANTAGES: dict[str, Advantage] = {
    "global": global_normalised,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
}


def find_advantage(name: str) -> Advantage:
    """One of ours, or a function of the user's, "MODULE:NAME". UserError where there is none."""
    return ADVANTAGES[name] if name in ADVANTAGES else load_function(name, "algo.advantage")


def advantages_of(name: str, rewards: Floats, lengths: Ints, groups: Ints) -> Floats:
    """The advantages [N] of N responses, from their rewards, lengths in tokens, and groups, each [N]."""
    found = np.asarray(find_advantage(name)(rewards, lengths, groups), np.float64)
    if found.shape != rewards.shape or not np.isfinite(found).all():
        got = f"shape {list(found.shape)}" if found.shape != rewards.shape else "some that are not finite"
        raise UserError(f"algo.advantage: expected {name} to return {len(rewards)} finite numbers, got {got}")
    return found


def _group_moments(rewards: Floats, groups: Ints) -> tuple[Floats, Floats, Floats]:
    """Mean, sample standard deviation (0 for a group of one) and size of each response's group, each [N]."""
    _, index = np.unique(groups, return_inverse=True)
    size = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, rewards) / size
    squares = np.bincount(index, (rewards - mean[index]) ** 2)
    std = np.sqrt(squares / np.maximum(size - 1, 1))
    return mean[index], std[index], size[index]
