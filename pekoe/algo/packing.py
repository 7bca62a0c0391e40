"""Packing: which sequences share a micro-batch, and the 1-D tensors that result. No padding anywhere."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.core.types import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end: T tokens, B sequences, N tokens that are trained on.

    The token at `targets[i]` is predicted from position `targets[i] - 1`, which lies in the same sequence.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1] int32, cumulative lengths from 0 to T
    targets: Tensor  # [N] int64, indices into tokens
    behaviour_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    proximal_logprobs: Tensor | None = None  # [N]
    reference_logprobs: Tensor | None = None  # [N]

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})


def allocate(lengths: Sequence[int], token_budget: int, num_bins_multiple_of: int = 1) -> list[list[int]]:
    """Share sequences out to the fewest micro-batches under a token budget, then balance them.

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
    longest = max(lengths)
    if min(lengths) < 1 or longest > token_budget:
        bad = longest if longest > token_budget else min(lengths)
        raise UserError(f"token budget: expected lengths in [1, {token_budget}], got {bad}; nearest budget: {longest}")
    if len(lengths) < num_bins_multiple_of:
        raise UserError(f"packing: expected at least {num_bins_multiple_of} sequences (one a rank), got {len(lengths)}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fewest = _best_fit(order, lengths, token_budget)
    bound = -(-sum(lengths) // token_budget)
    for count in range(
        -(-bound // num_bins_multiple_of) * num_bins_multiple_of, len(lengths) + 1, num_bins_multiple_of
    ):
        bins = _balanced(order, lengths, token_budget, count)
        if bins is None and len(fewest) <= count:
            bins = _split(fewest, count)
        if bins is not None:
            return [sorted(members) for members in bins]
    raise UserError(
        f"packing: expected a multiple of {num_bins_multiple_of} micro-batches of {token_budget} tokens, but "
        f"{len(lengths)} sequences need at least {len(fewest)} and cannot fill the next multiple; raise token_budget"
    )


def _balanced(order: list[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest of `count` bins (LPT); None where one would overflow."""
    if count > len(order):
        return None
    heap = [(0, position) for position in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        load, position = heapq.heappop(heap)
        if load + lengths[index] > budget:
            return None
        bins[position].append(index)
        heapq.heappush(heap, (load + lengths[index], position))
    return bins


def _best_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that still takes it; a new bin where none does."""
    loads: list[int] = []
    bins: list[list[int]] = []
    for index in order:
        fits = [i for i, load in enumerate(loads) if load + lengths[index] <= budget]
        if fits:
            best = max(fits, key=loads.__getitem__)
        else:
            best = len(bins)
            bins.append([])
            loads.append(0)
        bins[best].append(index)
        loads[best] += lengths[index]
    return bins


def _split(bins: list[list[int]], count: int) -> list[list[int]]:
    """Split bins, those of most sequences first, until there are `count`; none becomes empty."""
    bins = [list(members) for members in bins]
    while len(bins) < count:
        largest = max(bins, key=len)
        half = len(largest) // 2
        bins.append(largest[half:])
        del largest[half:]
    return bins


def pack(samples: Sequence[Sample], references: Sequence[np.ndarray] | None = None) -> MicroBatch:
    """Lay samples end to end. `references[i]` are the reference model's log-probs [L_i], for the KL term."""
    lengths = [len(sample) for sample in samples]
    mask = np.concatenate([sample.loss_mask for sample in samples])
    targets = np.flatnonzero(mask)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    assert not mask[cu_seqlens[:-1]].any(), "the first token of a sequence cannot be trained on: nothing predicts it"

    def pick(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)[targets])

    proximal = [s.proximal_logprobs for s in samples if s.proximal_logprobs is not None]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        targets=torch.from_numpy(targets),
        behaviour_logprobs=pick([sample.behaviour_logprobs for sample in samples]),
        advantages=pick([sample.advantages for sample in samples]),
        proximal_logprobs=pick(proximal) if proximal else None,
        reference_logprobs=pick(references) if references else None,
    )


def split_minibatches(samples: Sequence[Sample], num: int, rng: np.random.Generator) -> list[list[Sample]]:
    """Split a batch into at most `num` minibatches: a seeded shuffle of whole groups, sizes differing by at most one.

    Made before ranks are assigned, so that it does not depend on how many there are.
    """
    by_group: dict[int, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)
    groups = [by_group[key] for key in sorted(by_group)]
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    parts = [shuffled[i::num] for i in range(min(num, len(shuffled)))]
    return [[sample for group in part for sample in group] for part in parts]
