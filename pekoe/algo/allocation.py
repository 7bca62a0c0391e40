"""Which sequences share a micro-batch: the fewest that a token budget allows, then the most even; and which rank gets
which.

Tokens fix the micro-batches, for memory is what a budget bounds. Estimated compute, in which attention is quadratic,
assigns them to ranks.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Sequence

from pekoe.core.errors import UserError

Bins = list[list[int]]

_EXACT = 20  # sequences up to which all ways to share them out are tried
_STEPS = 200_000  # of that search, at most
_HALVINGS = 8  # of the range of capacities
_EVEN = 1.01  # largest over lowest possible, at which capacities are not halved any further
_EXCHANGES, _EXCHANGE_STEPS = 500, 200_000  # exchanges, and looks at a bin for them, at most
_PARTNERS = 16  # bins that the largest tries to exchange with


def allocate(lengths: Sequence[int], token_budget: int, num_bins_multiple_of: int = 1) -> Bins:
    """Share sequences out to the fewest micro-batches under a token budget, the largest of them as small as can be.

    Both are NP-hard. Up to 20 sequences all ways are tried, within a bound of steps. Beyond, it takes the best of
    longest-first (LPT: Graham 1969) and best-fit-decreasing at the smallest capacity that does (MULTIFIT: Coffman,
    Garey, Johnson 1978), then exchanges sequences between the fullest bin and others. n log n for n sequences.

    Args:
        lengths: tokens of each sequence, each >= 1.
        token_budget: no bin's lengths sum to more.
        num_bins_multiple_of: the number of bins is a multiple of this (data-parallel ranks need equal counts);
            needs at least as many sequences as this.

    Returns:
        Bins of indices into `lengths`, each index in exactly one bin, no bin empty. Deterministic.

    Raises:
        UserError: a length that the budget cannot hold, or fewer sequences than bins must be.
    """
    if not len(lengths):
        return []
    longest, shortest, multiple = max(lengths), min(lengths), num_bins_multiple_of
    if shortest < 1 or longest > token_budget:
        bad = longest if longest > token_budget else shortest
        raise UserError(f"token budget: expected lengths in [1, {token_budget}], got {bad}; nearest budget: {longest}")
    if len(lengths) < multiple:
        raise UserError(f"packing: expected at least {multiple} sequences (one a rank), got {len(lengths)}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [int(lengths[i]) for i in order]
    fitted = _best_fit(sizes, token_budget, len(sizes))
    assert fitted is not None, "each sequence fits a bin of its own"
    fewest = lower_bound(sizes, token_budget) if len(sizes) <= _EXACT else len(fitted)
    count = -(-fewest // multiple) * multiple
    while count <= len(sizes):
        bins = _share_out(sizes, count, token_budget, fitted)
        if bins is not None:
            return [sorted(order[i] for i in members) for members in bins]
        count += multiple
    raise UserError(
        f"packing: expected a multiple of {multiple} micro-batches of {token_budget} tokens, but {len(sizes)} "
        f"sequences need at least {len(fitted)} and cannot fill the next multiple; raise token_budget"
    )


def assign(costs: Sequence[float], num_ranks: int) -> Bins:
    """Share micro-batches out to ranks, as many to each, so that their costs are even.

    Rank by rank, the heaviest that are left go to the ranks that have least so far.

    Args:
        costs: estimated compute of each micro-batch; their number is a multiple of `num_ranks`.

    Returns:
        for each rank, the indices of its micro-batches, ascending.
    """
    assert len(costs) % num_ranks == 0, f"{len(costs)} micro-batches for {num_ranks} ranks"
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    loads, shares = [0.0] * num_ranks, [[] for _ in range(num_ranks)]
    for first in range(0, len(order), num_ranks):
        least = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, i in zip(least, order[first : first + num_ranks], strict=True):
            loads[rank] += costs[i]
            shares[rank].append(i)
    return [sorted(share) for share in shares]


def lower_bound(sizes: Sequence[int], budget: int) -> int:
    """Bins that any packing needs: bound L2 of Martello and Toth (1990).

    For a threshold t: a size above budget - t has a bin to itself; others above half the budget have one each too, and
    what these leave free is all that sizes from t up to half find without further bins.
    """
    rising = sorted(sizes)
    sums = [0, *itertools.accumulate(rising)]
    half = bisect_right(rising, budget // 2)  # sizes from here on are above half
    best = max(-(-sums[-1] // budget), len(rising) - half)
    first = 0
    while first < half:
        threshold = rising[first]
        alone = bisect_right(rising, budget - threshold)  # sizes from here on
        beside = (alone - half) * budget - (sums[alone] - sums[half])
        best = max(best, len(rising) - half + max(0, -(-(sums[half] - sums[first] - beside) // budget)))
        first = bisect_right(rising, threshold)
    return best


def _share_out(sizes: list[int], count: int, budget: int, fitted: Bins) -> Bins | None:
    """`sizes`, in descending order, in `count` bins, the largest as small as it gets; None if above the budget."""
    floor = max(-(-sum(sizes) // count), sizes[0], sum(sizes[count - 1 : count + 1]) if len(sizes) > count else 0)
    if floor > budget:
        return None
    best = _longest_first(sizes, count)
    if _largest(sizes, best) > budget and len(fitted) <= count:
        best = _filled_up(sizes, fitted, count)
    low, high = floor, min(budget, _largest(sizes, best) - 1)
    for _ in range(_HALVINGS):
        if low > high or _largest(sizes, best) <= floor * _EVEN:
            break
        middle = (low + high) // 2
        bins = _best_fit(sizes, middle, count)
        if bins is None:
            low = middle + 1
        else:
            best = _filled_up(sizes, bins, count)
            high = _largest(sizes, best) - 1
    _exchange(sizes, best, floor)
    if len(sizes) <= _EXACT:
        best = _Search(sizes, count, floor).better_than(best, budget)
    return best if _largest(sizes, best) <= budget else None


def _largest(sizes: list[int], bins: Bins) -> int:
    return max(sum(sizes[i] for i in members) for members in bins)


def _longest_first(sizes: list[int], count: int) -> Bins:
    """Each size into the emptiest bin."""
    heap = [(0, b) for b in range(count)]
    bins: Bins = [[] for _ in range(count)]
    for i, size in enumerate(sizes):
        load, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (load + size, b))
    return bins


def _best_fit(sizes: list[int], capacity: int, most: int) -> Bins | None:
    """Each size into the fullest bin that still takes it, else into a new one; None where that needs more than `most`.

    Bins by the room they have left, and a bit for each room that some bin has: the next larger one is the lowest bit.
    """
    bins: Bins = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for i, size in enumerate(sizes):
        if size > capacity:
            return None
        if fits := rooms >> size:
            room = size + (fits & -fits).bit_length() - 1
            b = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            if len(bins) == most:
                return None
            room, b = capacity, len(bins)
            bins.append([])
        bins[b].append(i)
        if room > size:
            by_room.setdefault(room - size, []).append(b)
            rooms |= 1 << (room - size)
    return bins


def _filled_up(sizes: list[int], bins: Bins, count: int) -> Bins:
    """Split the largest bins until there are `count`."""
    heap = [(-sum(sizes[i] for i in members), b) for b, members in enumerate(bins) if len(members) > 1]
    heapq.heapify(heap)
    bins = [list(members) for members in bins]
    while len(bins) < count:
        _, b = heapq.heappop(heap)
        members = bins[b]
        bins[b], other = ([members[i] for i in part] for part in _longest_first([sizes[i] for i in members], 2))
        bins.append(other)
        for place in (b, len(bins) - 1):
            if len(bins[place]) > 1:
                heapq.heappush(heap, (-sum(sizes[i] for i in bins[place]), place))
    return bins


def _exchange(sizes: list[int], bins: Bins, floor: int) -> None:
    """Move a sequence out of the largest bin, or exchange it for a shorter one, while that makes it smaller."""
    loads = [sum(sizes[i] for i in members) for members in bins]
    for _ in range(min(_EXCHANGES, _EXCHANGE_STEPS // len(bins))):
        full = max(range(len(bins)), key=loads.__getitem__)
        if loads[full] <= floor:
            return
        swap = _best_swap(sizes, bins, loads, full)
        if swap is None:
            return
        other, mine, theirs = swap
        bins[full].remove(mine)
        bins[other].append(mine)
        if theirs is not None:
            bins[other].remove(theirs)
            bins[full].append(theirs)
        moved = sizes[mine] - (0 if theirs is None else sizes[theirs])
        loads[full] -= moved
        loads[other] += moved


def _best_swap(sizes: list[int], bins: Bins, loads: list[int], full: int) -> tuple[int, int, int | None] | None:
    """(other bin, what goes there, what comes back) that leaves the larger of the two smallest; None: none helps."""
    best, found = loads[full], None
    emptiest = heapq.nsmallest(_PARTNERS + 1, range(len(bins)), key=loads.__getitem__)
    for other in emptiest:
        if other == full or loads[other] >= loads[full]:
            continue
        for mine in bins[full]:
            if len(bins[full]) > 1 and (larger := max(loads[full] - sizes[mine], loads[other] + sizes[mine])) < best:
                best, found = larger, (other, mine, None)
            for theirs in bins[other]:
                moved = sizes[mine] - sizes[theirs]
                if moved > 0 and (larger := max(loads[full] - moved, loads[other] + moved)) < best:
                    best, found = larger, (other, mine, theirs)
    return found


class _Search:
    """All ways to share out a few sizes, but for those that cannot be better (branch and bound)."""

    def __init__(self, sizes: list[int], count: int, floor: int) -> None:
        self._sizes, self._count, self._floor = sizes, count, floor
        self._rest = [*itertools.accumulate(reversed(sizes))][::-1]  # what is left from each place on
        self._loads, self._bin_of = [0] * count, [0] * len(sizes)
        self._steps = 0

    def better_than(self, bins: Bins, budget: int) -> Bins:
        """The best there is, or that the bound of steps lets it find."""
        self._best, self._limit = bins, min(_largest(self._sizes, bins) - 1, budget)
        if self._limit >= self._floor:
            self._place(0)
        return self._best

    def _place(self, i: int) -> bool:
        """Try all bins for size `i` and those after it; true to stop."""
        self._steps += 1
        sizes, loads, limit = self._sizes, self._loads, self._limit
        if i == len(sizes):
            bins: Bins = [[] for _ in range(self._count)]
            for j, b in enumerate(self._bin_of):
                bins[b].append(j)
            self._best = _filled_up(sizes, [members for members in bins if members], self._count)
            self._limit = max(loads) - 1
            return self._limit < self._floor
        free = sum(limit - load for load in loads if limit - load >= sizes[-1])
        if free < self._rest[i]:
            return False
        tried = -1
        for b in sorted(range(self._count), key=loads.__getitem__):
            load = loads[b]
            if load + sizes[i] > self._limit:
                break
            if load == tried:  # as good as the one before
                continue
            tried = load
            loads[b], self._bin_of[i] = load + sizes[i], b
            stop = self._place(i + 1)
            loads[b] = load
            if stop:
                return True
        return self._steps > _STEPS
