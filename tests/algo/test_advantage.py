"""Advantages against their formulas, in exact values."""

import numpy as np
import pytest

from pekoe.algo.advantage import ADVANTAGES, dr_grpo, global_normalised, grpo, rloo
from pekoe.config.recipes import GROUP_ADVANTAGES

REWARDS = np.array([5.0, -5.0, -5.0, 5.0])
LENGTHS = np.array([10, 30, 20, 40])
GROUPS = np.array([0, 0, 1, 1])


def test_global_is_normalised_over_tokens_not_sequences():
    advantages = global_normalised(REWARDS, LENGTHS, GROUPS)
    per_token = np.repeat(advantages, LENGTHS)
    assert per_token.mean() == pytest.approx(0, abs=1e-12)
    assert per_token.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("reward", [1.0, 5.0])
def test_global_has_the_closed_form_of_the_release(reward: float):
    """p = the share of tokens in correct responses: correct = sqrt((1-p)/p), wrong = -sqrt(p/(1-p))."""
    advantages = global_normalised(np.sign(REWARDS) * reward, LENGTHS, GROUPS)
    p = 50 / 100
    assert advantages[0] == pytest.approx(np.sqrt((1 - p) / p), rel=1e-4)
    skewed = global_normalised(REWARDS * reward, np.array([1, 30, 20, 9]), GROUPS)
    p = 10 / 60
    np.testing.assert_allclose(skewed[[0, 1]], [np.sqrt((1 - p) / p), -np.sqrt(p / (1 - p))], rtol=1e-4)


def test_group_baselines_do_not_mix_groups():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    groups = np.array([7, 7, 7, 3, 3, 3])
    lengths = np.ones(6, np.int64)
    np.testing.assert_allclose(dr_grpo(rewards, lengths, groups), [2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    np.testing.assert_allclose(rloo(rewards, lengths, groups), [1, -0.5, -0.5, 0, 0, 0])
    std = np.std([1, 0, 0], ddof=1)
    np.testing.assert_allclose(grpo(rewards, lengths, groups)[:3], np.array([2, -1, -1]) / 3 / (std + 1e-4))
    np.testing.assert_allclose(grpo(rewards, lengths, groups)[3:], 0)


def test_the_recipes_names_are_those_of_the_table():
    assert list(ADVANTAGES) == ["global", *GROUP_ADVANTAGES]


def test_equal_rewards_give_no_advantage():
    for advantage in (global_normalised, grpo, dr_grpo, rloo):
        assert not advantage(np.full(4, 5.0), LENGTHS, GROUPS).any()
