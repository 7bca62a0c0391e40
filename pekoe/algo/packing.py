"""Packing: sequences that share a micro-batch laid end to end in 1-D tensors. No padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pekoe.algo.allocation import allocate as allocate
from pekoe.core.types import AnySample, Sample

S = TypeVar("S", bound=AnySample)


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


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples end to end."""
    lengths = [len(sample) for sample in samples]
    mask = np.concatenate([sample.loss_mask for sample in samples])
    targets = np.flatnonzero(mask)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    assert not mask[cu_seqlens[:-1]].any(), "the first token of a sequence cannot be trained on: nothing predicts it"

    def pick(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)[targets])

    proximal = [s.proximal_logprobs for s in samples if s.proximal_logprobs is not None]
    reference = [s.reference_logprobs for s in samples if s.reference_logprobs is not None]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        targets=torch.from_numpy(targets),
        behaviour_logprobs=pick([sample.behaviour_logprobs for sample in samples]),
        advantages=pick([sample.advantages for sample in samples]),
        proximal_logprobs=pick(proximal) if proximal else None,
        reference_logprobs=pick(reference) if reference else None,
    )


def split_minibatches(samples: Sequence[S], num: int, rng: np.random.Generator) -> list[list[S]]:
    """Split a batch into at most `num` minibatches: a seeded shuffle of whole groups, sizes differing by at most one.

    Made before ranks are assigned, so that it does not depend on how many there are.
    """
    by_group: dict[int, list[S]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)
    groups = [by_group[key] for key in sorted(by_group)]
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    parts = [shuffled[i::num] for i in range(min(num, len(shuffled)))]
    return [[sample for group in part for sample in group] for part in parts]
