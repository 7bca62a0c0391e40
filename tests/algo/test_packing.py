"""Packing: every sequence once, within the budget, balanced, and laid out as the decoder expects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.algo.packing import allocate, pack, split_minibatches
from pekoe.core.errors import UserError
from pekoe.core.types import Sample


def sample(length: int, prompt: int, group: int = 0) -> Sample:
    tokens = np.arange(length) + 100 * group
    mask = np.arange(length) >= prompt
    return Sample(tokens, mask, np.where(mask, -1.0, 0).astype(np.float32), mask.astype(np.float32), group)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 400), st.integers(1, 4))
def test_every_sequence_once_within_the_budget(lengths: list[int], budget: int, multiple: int):
    if len(lengths) // multiple * multiple < -(-sum(lengths) // budget) or len(lengths) < multiple:
        with pytest.raises(UserError):
            allocate(lengths, budget, multiple)
        return
    try:
        bins = allocate(lengths, budget, multiple)
    except UserError:
        assert len(lengths) // multiple * multiple < len(allocate(lengths, budget))  # no multiple has room
        return
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(members for members in bins)
    assert max(sum(lengths[i] for i in members) for members in bins) <= budget
    assert len(bins) % multiple == 0
    assert bins == allocate(lengths, budget, multiple)


def test_fewest_then_balanced():
    assert [sum([6, 5, 4, 3, 2][i] for i in b) for b in allocate([6, 5, 4, 3, 2], 10)] == [10, 10]
    lengths = [50, 50, 30, 30, 20, 20]
    assert sorted(sum(lengths[i] for i in b) for b in allocate(lengths, 150)) == [100, 100]


def test_a_sequence_over_the_budget_is_the_users_mistake():
    with pytest.raises(UserError, match=r"\[1, 10\], got 11; nearest budget: 11"):
        allocate([3, 11], 10)


def test_a_multiple_that_no_number_of_bins_can_reach_is_refused():
    with pytest.raises(UserError, match="cannot fill the next multiple; raise token_budget"):
        allocate([10] * 5, 10, 4)
    assert len(allocate([6, 6, 6, 1, 1, 1, 1, 1], 7, 4)) == 4


def test_pack_points_at_the_trained_tokens():
    batch = pack([sample(5, 2), sample(3, 1, group=1)])
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.targets.tolist() == [2, 3, 4, 6, 7]
    assert batch.tokens[batch.targets].tolist() == [2, 3, 4, 101, 102]
    assert batch.behaviour_logprobs.tolist() == [-1.0] * 5


def test_the_first_token_cannot_be_trained_on():
    with pytest.raises(AssertionError, match="nothing predicts it"):
        pack([sample(3, 1), sample(3, 0)])


def test_minibatches_keep_groups_whole_and_even():
    samples = [sample(4, 2, group) for group in range(10) for _ in range(3)]
    parts = split_minibatches(samples, 4, np.random.default_rng(0))
    assert sorted(len(part) for part in parts) == [6, 6, 9, 9]
    assert all(len([s for s in part if s.group == g]) in (0, 3) for part in parts for g in range(10))
    again = split_minibatches(samples, 4, np.random.default_rng(0))
    assert [[s.group for s in p] for p in parts] == [[s.group for s in p] for p in again]
    other = split_minibatches(samples, 4, np.random.default_rng(1))
    assert [[s.group for s in p] for p in parts] != [[s.group for s in p] for p in other]
