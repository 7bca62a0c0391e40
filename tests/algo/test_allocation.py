"""Allocation: every sequence once, the fewest bins, the most even, the same for everyone, and quickly."""

import math
import random
import statistics
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.algo.allocation import allocate, assign, lower_bound
from pekoe.core.errors import UserError


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


def is_optimal(lengths: Sequence[int], budget: int, bins: list[list[int]]) -> bool:
    """No packing has fewer bins, and none of as many has a smaller largest."""
    count, largest = len(bins), max(loads(lengths, bins))
    if count > -(-sum(lengths) // budget) and fewest(lengths, budget) < count:
        return False
    if largest == max(-(-sum(lengths) // count), max(lengths)):
        return True
    return fewest(lengths, largest - 1) > count


def random_case(rng: random.Random, low: int, high: int) -> tuple[list[int], int]:
    kind = rng.random()
    n = rng.randint(low, high)
    if kind < 0.5:
        lengths = [round(min(8192, max(32, rng.lognormvariate(math.log(1024), 0.9)))) for _ in range(n)]
    else:
        lengths = [rng.randint(1, 100) for _ in range(n)]
    return lengths, rng.randint(max(lengths), max(max(lengths), sum(lengths)))


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


def test_the_reference_counts_right():
    assert fewest([6, 5, 4, 3, 2], 10) == 2
    assert fewest([6, 5, 4, 3, 2], 9) == 3
    assert fewest([7, 7, 7], 10) == 3


def test_optimal_for_up_to_12():
    rng = random.Random(0)
    for _ in range(1000):
        lengths, budget = random_case(rng, 1, 12)
        assert is_optimal(lengths, budget, allocate(lengths, budget)), (lengths, budget)


@pytest.mark.slow
def test_nearly_always_optimal_for_up_to_20():
    rng = random.Random(1)
    cases = [random_case(rng, 13, 20) for _ in range(300)]
    optimal = [is_optimal(*case, allocate(*case)) for case in cases]
    assert sum(optimal) >= 0.99 * len(cases)


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


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(100, 400))
def test_no_packing_has_fewer_than_the_lower_bound(lengths: list[int], budget: int):
    assert -(-sum(lengths) // budget) <= lower_bound(lengths, budget) <= len(allocate(lengths, budget))
    assert lower_bound([60, 60, 60, 40, 40, 30], 100) == 3
    assert lower_bound([60, 60, 60, 50], 100) == 4  # by volume 3
    assert lower_bound([60, 60, 41, 41], 100) == 3  # by volume 3; by L2 the 41s cannot lie beside a 60


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
