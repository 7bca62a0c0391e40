"""Packing: which sequences share a micro-batch, which rank gets which, and how they lie end to end in 1-D tensors.

Tokens, which take the memory, decide the micro-batches. Estimated compute assigns them to ranks. There is no padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.core.types import AnySample, Sample, missing_expert

S = TypeVar("S", bound=AnySample)
Bins = list[list[int]]

_HALVINGS = 8  # of the range of capacities
_EVEN = 1.01  # largest bin over the lowest possible, from which capacities are not halved any further


def allocate(lengths: Sequence[int], token_budget: int, num_bins_multiple_of: int = 1) -> Bins:
    """Divide sequences among few micro-batches within a token budget, the largest of them as small as possible.

    Both aims are NP-hard. Best-fit-decreasing gives the number of bins. They are filled longest first, each sequence
    into the emptiest bin (LPT: Graham 1969); where that is uneven or too much, by best-fit-decreasing at the smallest
    capacity that suffices (MULTIFIT: Coffman, Garey, Johnson 1978). n log n for n sequences. Deterministic.

    Args:
        lengths: tokens of each sequence, each >= 1.
        token_budget: no bin's lengths sum to more.
        num_bins_multiple_of: the number of bins is a multiple of this (data-parallel ranks need equal counts).

    Returns:
        Bins of indices into `lengths`, each index in exactly one bin. Bins are empty only where there are fewer
        sequences than bins.

    Raises:
        UserError: a length that the budget cannot hold.
    """
    if not len(lengths):
        return []
    longest, shortest = max(lengths), min(lengths)
    if shortest < 1 or longest > token_budget:
        bad = longest if longest > token_budget else shortest
        raise UserError(f"token budget: expected lengths in [1, {token_budget}], got {bad}; nearest budget: {longest}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [int(lengths[i]) for i in order]
    best = _best_fit(sizes, token_budget, len(sizes))
    assert best is not None, "each sequence fits a bin of its own"
    count = -(-len(best) // num_bins_multiple_of) * num_bins_multiple_of
    even = _longest_first(sizes, count)
    if _largest(sizes, even) <= token_budget:
        best = even
    low, high = max(-(-sum(sizes) // count), sizes[0]), _largest(sizes, best) - 1
    floor = low
    for _ in range(_HALVINGS):
        if low > high or high + 1 <= floor * _EVEN:
            break
        middle = (low + high) // 2
        fitted = _best_fit(sizes, middle, count)
        if fitted is None:
            low = middle + 1
        else:
            best, high = fitted, _largest(sizes, fitted) - 1
    while len(best) < count:
        largest = max((members for members in best if len(members) > 1), key=lambda b: sum(sizes[i] for i in b))
        best.append([largest.pop()])
    return [sorted(order[i] for i in members) for members in best]


def assign(costs: Sequence[float], num_ranks: int) -> Bins:
    """Divide micro-batches among ranks, the same number for each, with even costs.

    In each round the heaviest that are left, one a rank, go to the ranks in ascending order of load.

    Args:
        costs: estimated compute of each micro-batch; their number is a multiple of `num_ranks`.

    Returns:
        For each rank, the indices of its micro-batches, ascending.
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

    `by_room` maps free room to bins, and `rooms` has a bit for each room in it: the lowest bit from `size` on is the
    smallest room that suffices.
    """
    bins: Bins = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for i, size in enumerate(sizes):
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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end: T tokens, B sequences, N tokens that are trained on.

    Example: two sequences trained on all but their first tokens: tokens [9, 4, 7, 9, 5], positions [0, 1, 2, 0, 1],
    lengths (3, 2), cu_seqlens [0, 3, 5], targets [1, 2, 4]. Position `targets[i] - 1` predicts the token `targets[i]`.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1] int32, cumulative lengths from 0 to T
    lengths: tuple[int, ...]  # [B], on the host: kernels plan by them without waiting for the device
    targets: Tensor  # [N] int64, indices into tokens
    behaviour_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    proximal_logprobs: Tensor | None = None  # [N]
    reference_logprobs: Tensor | None = None  # [N]
    lags: Tensor | None = None  # [N] int64
    routing: Tensor | None = None  # [T, layers, k] the experts that tokens go to, where recorded (`RoutingArray`)

    @property
    def bounds(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return [0, *accumulate(self.lengths)]

    def to(self, device: torch.device | str) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples end to end. Without samples: one padding token that is not trained on (N = 0), as a rank without
    work must take part in each forward and backward."""
    if not samples:  # with all log-probs, so that its statistics have the names of every other rank's
        zero = np.zeros(1, np.float32)
        none = np.zeros(1, np.int64)
        samples = [Sample(none, np.zeros(1, np.bool_), zero, zero, 0, zero, zero, none)]
    lengths = [len(sample) for sample in samples]
    mask = np.concatenate([sample.loss_mask for sample in samples])
    targets = np.flatnonzero(mask)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    assert not mask[cu_seqlens[:-1]].any(), "the first token of a sequence cannot be trained on: nothing predicts it"

    def pick(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)[targets])

    proximal = [s.proximal_logprobs for s in samples if s.proximal_logprobs is not None]
    reference = [s.reference_logprobs for s in samples if s.reference_logprobs is not None]
    lags = [s.lags for s in samples if s.lags is not None]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=tuple(lengths),
        targets=torch.from_numpy(targets),
        behaviour_logprobs=pick([sample.behaviour_logprobs for sample in samples]),
        advantages=pick([sample.advantages for sample in samples]),
        proximal_logprobs=pick(proximal) if proximal else None,
        reference_logprobs=pick(reference) if reference else None,
        lags=pick(lags) if lags else None,
        routing=_routing_of(samples),
    )


def _routing_of(samples: Sequence[Sample]) -> Tensor | None:
    known = next((s.routing for s in samples if s.routing is not None), None)
    if known is None:
        return None
    missing = missing_expert(known.itemsize)
    parts = [
        np.full((len(s), *known.shape[1:]), missing, known.dtype) if s.routing is None else s.routing for s in samples
    ]
    return torch.from_numpy(np.concatenate(parts))


def split_minibatches(samples: Sequence[S], num: int, rng: np.random.Generator) -> list[list[S]]:
    """Split a batch into at most `num` mini-batches: a seeded shuffle of whole groups, sizes differing by at most one.

    The split does not depend on the number of ranks.
    """
    by_group: dict[int, list[S]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)
    groups = [by_group[key] for key in sorted(by_group)]
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    parts = [shuffled[i::num] for i in range(min(num, len(shuffled)))]
    return [[sample for group in part for sample in group] for part in parts]
