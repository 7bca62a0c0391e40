"""Context parallelism: several processes share the tokens of a micro-batch, for sequences too long for one.

Ulysses (Jacobs et al., arXiv:2309.14509, section 3.1): each process computes everything but attention for its shard of
the tokens. Around attention an all-to-all exchanges shards of tokens for shards of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pekoe.algo.packing import MicroBatch
from pekoe.model import Attention, PackedAttention, Scores


@dataclass(frozen=True, slots=True)
class CPShard:
    """One process's shard of a micro-batch: t of its T tokens, and n of its N targets."""

    tokens: Tensor  # [t]
    positions: Tensor  # [t]
    attention: Attention
    rows: Tensor  # [n] the positions, among the t, that predict a target
    targets: Tensor  # [n] the tokens predicted there
    start: int  # index of the first of these targets among the micro-batch's N
    num_targets: int  # N
    group: dist.ProcessGroup

    @staticmethod
    def of(batch: MicroBatch, group: dist.ProcessGroup) -> CPShard:
        """This process's shard: the tokens are cut into as many equal pieces as `group` has processes."""
        size = group.size()
        rows, targets, num = batch.targets - 1, batch.tokens[batch.targets], len(batch.targets)
        bounds, missing = batch.bounds, -len(batch.tokens) % size
        if missing:  # a padding document, on which nothing is trained, makes the pieces equal
            bounds.append(bounds[-1] + missing)
        piece = bounds[-1] // size
        first = group.rank() * piece
        start, stop = torch.searchsorted(rows, torch.tensor([first, first + piece], device=rows.device)).tolist()
        return CPShard(
            tokens=F.pad(batch.tokens, (0, missing))[first : first + piece],
            positions=F.pad(batch.positions, (0, missing))[first : first + piece],
            attention=_Ulysses(PackedAttention(bounds), group),
            rows=rows[start:stop] - first,
            targets=targets[start:stop],
            start=start,
            num_targets=num,
            group=group,
        )

    def gather(self, values: Tensor) -> Tensor:
        """[n] of each process -> [N], the same on all. Each process gets the gradient of its own values."""
        return cast(Tensor, _Gather.apply(values, self.start, self.num_targets, self.group))


class _Ulysses:
    """Attention over all tokens, of which each process holds a piece, for a shard of the heads."""

    def __init__(self, whole: PackedAttention, group: dist.ProcessGroup) -> None:
        self._whole, self._group, self._size = whole, group, group.size()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores | None = None) -> Tensor:
        """q [t, H, D], k [t, K, D], v [t, K, E] -> [t, H, E]."""
        assert scores is None or scores.sinks is None, "sinks are of heads, which are exchanged here"
        if k.shape[1] % self._size:  # fewer key/value heads than processes: each has a copy of the one it needs
            times = self._size // k.shape[1]
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        out = self._whole(layer, self._to_heads(q), self._to_heads(k), self._to_heads(v), scores)
        return self._to_tokens(out)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[t, H, D] -> [T, H / size, D]."""
        by_owner = x.unflatten(1, (self._size, -1)).movedim(1, 0).contiguous()
        return cast(Tensor, _AllToAll.apply(by_owner, self._group)).flatten(0, 1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[T, H / size, D] -> [t, H, D]."""
        by_owner = x.unflatten(0, (self._size, -1)).contiguous()
        return cast(Tensor, _AllToAll.apply(by_owner, self._group)).movedim(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """x[i] goes to process i, and the result has at i what process i sent. Its gradient is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _AllToAll.apply(grads[0].contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    """All processes compute the same loss of the gathered values, so gradients are not summed."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, start: int, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.bounds = (start, start + len(part))
        whole = part.new_zeros(total)
        whole[slice(*ctx.bounds)] = part
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][slice(*ctx.bounds)], None, None, None
