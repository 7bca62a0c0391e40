"""Paged attention on a GPU: splits a forward's attention into work items and launches the Triton kernels on them.

Decoding rows that share blocks (the samples of a prompt) read this prefix once, as tiles of many rows; the suffix that
a row has alone is read by a tile of its own; both are cut along the context, so that few rows too fill the device, and
merged. Chunks that continue a prompt are tiles of neighbouring tokens. Chunks that begin one need no cache: torch's
variable-length kernel attends them.

All that the kernels need to know of a forward is one row of int32, which goes to the device in one copy. Nothing waits
for the device. Which items a row is cut into depends on what shares the batch, so the last bits of its output do.

Numerics are tested in Triton's interpreter, and that the kernels compile for sm_80 and sm_90; the tiles' sizes are
reasoned, not measured: no GPU has run this yet (`pytest -m gpu`).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import ForwardBatch, KVCache
from pekoe.engine.embedded.attention_cpu import groups
from pekoe.model import PackedAttention

_PROGRAMS = 1024  # (item, key/value head) pairs that fill a large device; beyond it, items grow longer
_SHORTEST, _LONGEST = 64, 512  # tokens of an item; those of prefixes may be longer


class CUDACache(KVCache):
    """Keys and values of every layer by blocks, and kernels that read them. Memory is taken once, here."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_tokens, dtype, device)
        self.spec = spec
        # Queries of a tile of several rows. On tensor cores a large tile is nearly free, until its registers spill.
        tile_queries = 32 if dtype.itemsize > 2 else 128 if spec.head_dim <= 128 else 64
        self.tile_queries = max(tile_queries, next_power_of_2(self.heads_per_kv))
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.num_programs = 4 * processors

    @staticmethod
    def takes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels here can serve such a model."""
        # Shared memory: 103 KB for head_dim 256 in float32 would be too much for most devices, half of it is not.
        fits = spec.head_dim * dtype.itemsize <= 512 and spec.num_heads // spec.num_kv_heads <= 64
        known = dtype in (torch.bfloat16, torch.float16, torch.float32)
        return device.type == "cuda" and known and fits and importlib.util.find_spec("triton") is not None

    @property
    def heads_per_kv(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    def plan(self, batch: ForwardBatch) -> AttentionPlan:
        """Cut a forward's attention into items."""
        spec = self.spec
        return make_plan(batch, self.block_tokens, spec.num_kv_heads, max(1, self.tile_queries // self.heads_per_kv))

    def attention(self, batch: ForwardBatch) -> PagedAttention:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = self.plan(batch)
        shape = plan.shape
        buffer = torch.from_numpy(to_buffer(plan, shape)).to(self.device)
        num_paged = batch.fresh[0]
        packed = PackedAttention([bound - num_paged for bound in batch.fresh]) if len(batch.fresh) > 1 else None
        return PagedAttention(self, shape, buffer, packed)


@dataclass(frozen=True, slots=True)
class PlanShape:
    """Sizes of a plan's arrays on the device. A graph's are larger than those of a plan that it replays."""

    rows: int  # T
    paged: int  # rows that read the cache
    tables: int  # R
    width: int  # W
    suffix: int
    prefix: int
    parts: int  # P

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "counts": (2,),
            "positions": (self.rows,),
            "table_of": (self.rows,),
            "base": (self.paged + 1,),
            "tables": (self.tables, self.width),
            "suffix": (self.suffix, 5),
            "prefix": (self.prefix, 5),
        }

    @property
    def slices(self) -> dict[str, slice]:
        """Where each array lies in a row of int32: at multiples of 16 bytes, as kernels are compiled by alignment."""
        found: dict[str, slice] = {}
        at = 0
        for name, shape in self.shapes.items():
            found[name] = slice(at, at + math.prod(shape))
            at += -(-math.prod(shape) // 4) * 4
        return found


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A forward's attention as items: (first row, rows, low, high, part), see `triton_kernels`."""

    batch: ForwardBatch
    suffix: NDArray[np.int64]  # [., 5] items of one row
    prefix: NDArray[np.int64]  # [., 5] items of several rows
    base: IntArray  # [paged + 1] the first part of each row

    @property
    def shape(self) -> PlanShape:
        num_tables, width = self.batch.tables.shape
        rows, paged = len(self.batch.positions), len(self.base) - 1
        return PlanShape(rows, paged, num_tables, width, len(self.suffix), len(self.prefix), int(self.base[-1]))


def make_plan(batch: ForwardBatch, size: int, kv_heads: int, tile_rows: int) -> AttentionPlan:
    """Cut a batch into items, for blocks of `size` tokens and tiles of at most `tile_rows` rows."""
    seen = batch.positions + 1
    num_decode, num_paged = batch.num_decode, batch.fresh[0]
    first, blocks = groups(replace(batch, continued=[num_decode]), size)  # of the decoding rows
    spans = [(int(a), int(b), int(end) * size) for (a, b), end in zip(pairwise(first), blocks, strict=True) if end]
    spans += [(a, b, 0) for a, b in pairwise(batch.continued)]
    tiles: list[tuple[int, int, int, int, int]] = []
    for a, b, end in spans:
        for low in range(a, b, tile_rows):
            high = min(low + tile_rows, b)
            tiles.append((low, high - low, 0, end or int(seen[high - 1]), 0))
    together = np.array(tiles, np.int64).reshape(-1, 5)
    prefix, counts = _cut(together, kv_heads, None)
    parts = np.zeros(num_paged, np.int64)
    for (row, num_rows, *_), count in zip(tiles, counts.tolist(), strict=True):
        parts[row : row + num_rows] = count
    rows = np.arange(num_decode)
    begin = np.repeat(blocks, np.diff(first)) * size
    suffix, counts = _cut(
        np.stack([rows, np.ones_like(rows), begin, seen[:num_decode], parts[:num_decode]], 1), kv_heads, _LONGEST
    )
    parts[:num_decode] += counts
    return AttentionPlan(batch, suffix, prefix, np.append(0, parts.cumsum()))


def _cut(items: IntArray, kv_heads: int, longest: int | None) -> tuple[IntArray, IntArray]:
    """Cut items [n, 5] along the context, into pieces of one length that fill the device. Also pieces an item [n]."""
    lengths = items[:, 3] - items[:, 2]
    assert lengths.min(initial=1) > 0, "an item without tokens"
    size = _SHORTEST
    while size < (longest or lengths.max(initial=1)) and kv_heads * (-(-lengths // size)).sum() > _PROGRAMS:
        size *= 2
    counts = -(-lengths // size)
    pieces = items.repeat(counts, 0)
    number = np.arange(len(pieces)) - (counts.cumsum() - counts).repeat(counts)
    pieces[:, 2] += number * size
    pieces[:, 3] = np.minimum(pieces[:, 2] + size, pieces[:, 3])
    pieces[:, 4] += number
    return pieces, counts


def to_buffer(plan: AttentionPlan, shape: PlanShape) -> NDArray[np.int32]:
    """All that the kernels read of a plan, in one row. Rows that a shape has beyond the plan's are at position -1."""
    batch, shapes, slices = plan.batch, shape.shapes, shape.slices
    packed = np.zeros(list(slices.values())[-1].stop, np.int32)
    array = {name: packed[at].reshape(shapes[name]) for name, at in slices.items()}
    num_tables, width = batch.tables.shape
    array["counts"][:] = len(plan.suffix), len(plan.prefix)
    array["positions"][:], array["base"][:] = -1, plan.base[-1]
    array["tables"][:num_tables, :width] = batch.tables
    rows = {"positions": batch.positions, "table_of": batch.table_of, "base": plan.base}
    for name, values in (rows | {"suffix": plan.suffix, "prefix": plan.prefix}).items():
        array[name][: len(values)] = values
    return packed


class PagedAttention:
    """Attention of one forward: writes the new tokens' keys and values, then lets every row see its sequence.

    buffer: what `to_buffer` made for `shape`, on the device. packed: attends the rows behind shape.paged.
    """

    def __init__(self, cache: CUDACache, shape: PlanShape, buffer: Tensor, packed: PackedAttention | None) -> None:
        self._cache, self._shape, self._packed = cache, shape, packed
        self._array = {name: buffer[at].view(shape.shapes[name]) for name, at in shape.slices.items()}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_paged, (q, k, v) = self._shape.paged, (x.contiguous() for x in (q, k, v))
        self._write(layer, k, v)
        if self._packed is None:
            return self._attend(layer, q)
        fresh = self._packed(layer, q[num_paged:], k[num_paged:], v[num_paged:])
        return torch.cat([self._attend(layer, q[:num_paged]), fresh]) if num_paged else fresh

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        cache, array = self._cache, self._array
        size = k[0].numel()
        memory = (cache.keys[layer], cache.values[layer])
        place = (array["positions"], array["table_of"], array["tables"], self._shape.width, cache.block_tokens)
        _kernels().write[(len(k),)](k, v, *memory, *place, size, next_power_of_2(size))

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        cache, array, shape, spec = self._cache, self._array, self._shape, self._cache.spec
        heads, kv_heads, dim, per = spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.heads_per_kv
        outs = q.new_empty((shape.parts, heads, dim), dtype=torch.float32)
        maxima, sums = (q.new_empty((shape.parts, heads), dtype=torch.float32) for _ in range(2))
        wide = max(16, next_power_of_2(dim))
        tokens = 64 if wide <= 128 and q.dtype.itemsize == 2 else 32
        where = (array["positions"], array["table_of"], array["tables"], array["base"])
        scale = 1 / math.sqrt(dim) / math.log(2)
        for i, (name, queries) in enumerate(
            (("suffix", max(16, next_power_of_2(per))), ("prefix", cache.tile_queries))
        ):
            num_items = len(array[name])
            if num_items:
                _kernels().attend[(min(num_items * kv_heads, cache.num_programs),)](
                    q, cache.keys[layer], cache.values[layer], *where, array[name], array["counts"][i:],
                    outs, maxima, sums, shape.width, scale, kv_heads, cache.block_tokens, per, dim, queries, tokens,
                    wide, num_warps=8 if queries > 64 else 4,
                )  # fmt: skip
        result = torch.empty_like(q)
        _kernels().merge[(shape.paged, kv_heads)](outs, maxima, sums, array["base"], result, kv_heads, per, dim,
                                            next_power_of_2(per), wide)  # fmt: skip
        return result


def _kernels() -> Any:
    """Not before they are wanted: triton comes with CUDA builds of torch only."""
    from pekoe.engine.embedded import triton_kernels

    return triton_kernels


def next_power_of_2(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
