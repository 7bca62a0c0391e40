"""Packing: laid out as the decoder expects."""

import numpy as np
import pytest

from pekoe.algo.packing import pack, split_minibatches
from pekoe.core.types import Sample


def sample(length: int, prompt: int, group: int = 0) -> Sample:
    tokens = np.arange(length) + 100 * group
    mask = np.arange(length) >= prompt
    return Sample(tokens, mask, np.where(mask, -1.0, 0).astype(np.float32), mask.astype(np.float32), group)


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
