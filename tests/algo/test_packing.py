"""Packing: every sequence once, few bins and even ones, the same for everyone, and quickly; laid out as the decoder
expects."""

import math
import random
import statistics
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.algo.packing import allocate, assign, pack, split_minibatches
from pekoe.core.errors import UserError
from pekoe.core.types import Sample


def loads(lengths: Sequence[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in members) for members in bins]


def fewest(lengths: Sequence[int], capacity: int) -> int:
    """Bins that the best packing needs, by the best way to fill every subset, one sequence more at a time."""
    n, step = len(lengths), capacity + 1
    best = np.full(1 << n, np.iinfo(np.int64).max)  # bins * step + tokens in the last, the least there is
    best[0] = capacity  # no bins yet, and the last takes nothing
    subsets = np.arange(1 << n)
    for size in range(1, n + 1):
        of_size = subsets[np.bitwise_count(subsets) == size]
        for i, length in enumerate(lengths):
            with_i = of_size[of_size >> i & 1 == 1]
            before = best[with_i ^ (1 << i)]
            fits = before % step + length <= capacity
            after = np.where(fits, before + length, (before // step + 1) * step + length)
            best[with_i] = np.minimum(best[with_i], after)
    return int(best[-1] // step)


def random_case(rng: random.Random, low: int, high: int) -> tuple[list[int], int]:
    kind = rng.random()
    n = rng.randint(low, high)
    if kind < 0.5:
        lengths = [round(min(8192, max(32, rng.lognormvariate(math.log(1024), 0.9)))) for _ in range(n)]
    else:
        lengths = [rng.randint(1, 100) for _ in range(n)]
    return lengths, rng.randint(max(lengths), max(max(lengths), sum(lengths)))


def test_fewest_then_balanced():
    assert [sum([6, 5, 4, 3, 2][i] for i in b) for b in allocate([6, 5, 4, 3, 2], 10)] == [10, 10]
    lengths = [50, 50, 30, 30, 20, 20]
    assert sorted(sum(lengths[i] for i in b) for b in allocate(lengths, 150)) == [100, 100]


def test_a_sequence_over_the_budget_is_the_users_mistake():
    with pytest.raises(UserError, match=r"\[1, 10\], got 11; nearest budget: 11"):
        allocate([3, 11], 10)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 400), st.integers(1, 4))
def test_every_sequence_once_within_the_budget(lengths: list[int], budget: int, multiple: int):
    bins = allocate(lengths, budget, multiple)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert sum(not members for members in bins) == max(0, len(bins) - len(lengths)), "empty only beyond the sequences"
    assert max(loads(lengths, bins)) <= budget
    assert len(bins) % multiple == 0
    assert bins == allocate(lengths, budget, multiple)


def test_a_multiple_with_too_few_sequences_has_empty_bins():
    assert sorted(allocate([10] * 5, 10, 4)) == [[], [], [], [0], [1], [2], [3], [4]]
    assert sorted(allocate([7], 10, 2)) == [[], [0]]
    assert all(allocate([6, 6, 6, 1, 1, 1, 1, 1], 7, 4))


def test_the_reference_counts_right():
    assert fewest([6, 5, 4, 3, 2], 10) == 2
    assert fewest([6, 5, 4, 3, 2], 9) == 3
    assert fewest([7, 7, 7], 10) == 3


def test_close_to_the_optimum_for_up_to_12():
    """Best-fit-decreasing needs at most 11/9 of the fewest bins, LPT makes the largest at most 4/3 of the smallest."""
    rng, optimal = random.Random(0), 0
    for _ in range(300):
        lengths, budget = random_case(rng, 1, 12)
        bins, least = allocate(lengths, budget), fewest(lengths, budget)
        optimal += len(bins) == least
        assert len(bins) <= 11 / 9 * least + 6 / 9
        largest = max(loads(lengths, bins))
        assert largest == max(lengths) or fewest(lengths, math.ceil(largest * 3 / 4) - 1) > len(bins)
    assert optimal >= 0.99 * 300


def long_tailed(rng: random.Random, number: int) -> list[int]:
    return [round(min(8192, max(32, rng.lognormvariate(math.log(1024), 0.9)))) for _ in range(number)]


@pytest.mark.parametrize(("number", "draws"), [(64, 700), (512, 200), (2048, 85), (8192, 15)])
def test_long_tailed_lengths_come_within_one_of_the_bound(number: int, draws: int):
    rng, within, uneven = random.Random(2), 0, 0
    for _ in range(draws):
        lengths = long_tailed(rng, number)
        bins = allocate(lengths, 8192)
        bound = -(-sum(lengths) // 8192)
        within += len(bins) <= bound + 1
        mean, largest = sum(lengths) / len(bins), max(loads(lengths, bins))
        uneven += largest > 1.02 * mean and max(lengths) <= 1.02 * mean
    assert within >= 0.99 * draws
    assert uneven == 0


def test_quick():
    lengths = long_tailed(random.Random(3), 8192)
    assert statistics.median(seconds_of(lengths) for _ in range(5)) <= 0.1


def test_time_grows_hardly_faster_than_their_number():
    few, many = (long_tailed(random.Random(4), number) for number in (8192, 131_072))
    ratios = [seconds_of(many) / seconds_of(few) for _ in range(3)]
    assert statistics.median(ratios) <= 16 * 17 / 13 * 3  # n log n, and caches that hold less of it


def seconds_of(lengths: list[int]) -> float:
    """Of one core's time."""
    start = time.process_time()
    allocate(lengths, 16_384)
    return time.process_time() - start


def test_ranks_get_as_many_micro_batches_and_even_compute():
    rng = random.Random(5)
    for _ in range(50):
        num_ranks = rng.choice([1, 2, 3, 8])
        costs = [rng.uniform(1, 2) ** 2 for _ in range(num_ranks * rng.randint(1, 9))]
        shares = assign(costs, num_ranks)
        assert sorted(i for share in shares for i in share) == list(range(len(costs)))
        assert {len(share) for share in shares} == {len(costs) // num_ranks}
        totals = [sum(costs[i] for i in share) for share in shares]
        assert max(totals) - min(totals) <= max(costs) - min(costs) + 1e-9  # no worse than a single exchange


def sample(length: int, prompt: int, group: int = 0) -> Sample:
    tokens = np.arange(length) + 100 * group
    mask = np.arange(length) >= prompt
    return Sample(tokens, mask, np.where(mask, -1.0, 0).astype(np.float32), mask.astype(np.float32), group)


def test_pack_points_at_the_trained_tokens():
    batch = pack([sample(5, 2), sample(3, 1, group=1)])
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.bounds == [0, 5, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.targets.tolist() == [2, 3, 4, 6, 7]
    assert batch.tokens[batch.targets].tolist() == [2, 3, 4, 101, 102]
    assert batch.behaviour_logprobs.tolist() == [-1.0] * 5


def test_no_samples_make_one_padding_token():
    batch = pack([])
    assert batch.bounds == batch.cu_seqlens.tolist() == [0, 1]
    assert batch.tokens.shape == batch.positions.shape == (1,)
    assert len(batch.targets) == len(batch.behaviour_logprobs) == len(batch.advantages) == 0


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
