"""Paged attention on a GPU: splits a forward's attention into work items and launches the Triton kernels on them.

Decoding rows that share blocks (the samples of a prompt) read this prefix once, as tiles of many rows; the suffix that
a row has alone is read by a tile of its own. Chunks that continue a prompt are tiles of neighbouring tokens. All are
cut along the context, so that few rows too fill the device, and merged: which items a row is cut into depends on what
shares the batch, so the last bits of its output do. The kernels read their items from one row of int32, which goes to
the device in one copy. Nothing waits for the device.

Numerics are tested in Triton's interpreter; `make test-kernels` compiles the kernels for each generation of devices,
where no tile spills more than 16 bytes of registers. No GPU has run this yet (`pytest -m gpu`).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import ForwardBatch, KVCache, heads_of, paged_attention
from pekoe.engine.embedded.attention_cpu import groups
from pekoe.model import Attention, Scores

_PROGRAMS = 1024  # (item, key/value head) pairs that fill a large device; beyond it, items grow longer
_SHORTEST, _LONGEST = 64, 512  # tokens of an item; those of prefixes may be longer


def tile_queries(dim: int, itemsize: int) -> int:
    """Queries of a tile of several rows: as many as leave the registers room on every device (`make test-kernels`)."""
    return 64 if itemsize == 2 and dim <= 128 else 32


def launch(queries: int, dim: int, itemsize: int, capped: bool = False) -> dict[str, int]:
    """What the kernel `attend` is compiled with, for tiles of `queries` queries [D] in numbers of `itemsize` bytes.

    capped: with a soft cap, which takes registers: `benchmarks/compile_kernels.py` says whether they suffice.
    """
    wide = max(16, next_power_of_2(dim))
    half = itemsize == 2
    tokens = 64 if half and wide <= 128 and not (capped and queries > 32) else 16 if not half and queries > 16 else 32
    return {"M": queries, "N": tokens, "ROOM": wide, "num_warps": 8 if queries > 32 else 4}


class CUDACache(KVCache):
    """As `KVCache`, read and written by the Triton kernels."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_tokens, dtype, device)
        heads = heads_of(spec)
        assert heads is not None, "a model of several kinds of heads has another cache"
        self.heads, self.heads_per_kv = heads, heads.num_heads // heads.num_kv_heads
        self.tile_queries = tile_queries(heads.key_dim, dtype.itemsize)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.num_programs = 4 * processors

    @staticmethod
    def takes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels here can serve such a model."""
        heads = heads_of(spec)
        if heads is None:
            return False
        # Larger heads were not compiled for all devices (`make test-kernels`).
        queries = tile_queries(heads.key_dim, dtype.itemsize)
        fits = heads.key_dim * dtype.itemsize <= 512 and heads.num_heads // heads.num_kv_heads <= queries
        known = dtype in (torch.bfloat16, torch.float16, torch.float32)
        return device.type == "cuda" and known and fits and importlib.util.find_spec("triton") is not None

    def attention(self, batch: ForwardBatch) -> Attention:
        plan = self.plan(batch)
        return self.attention_of(plan.shape, torch.from_numpy(to_buffer(plan, plan.shape)).to(self.device), batch.fresh)

    def plan(self, batch: ForwardBatch) -> AttentionPlan:
        """Cut a forward's attention into items."""
        tile_rows = max(1, self.tile_queries // self.heads_per_kv)
        return make_plan(batch, self.block_tokens, self.heads.num_kv_heads, tile_rows)

    def attention_of(self, shape: PlanShape, buffer: Tensor, fresh: list[int]) -> Attention:
        """Attention by a plan: `buffer` on the device is what `to_buffer` made for `shape`."""
        array = {name: buffer[at].view(shape.shapes[name]) for name, at in shape.slices.items()}

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            size, memory = k[0].numel(), (self.keys[layer], self.values[layer])
            place = (array["positions"], array["table_of"], array["tables"], shape.width, self.block_tokens)
            new = (k.contiguous(), v.contiguous())
            _kernels().write[(len(k),)](*new, *memory, *place, size, next_power_of_2(size))

        def attend(layer: int, q: Tensor, scores: Scores | None) -> Tensor:
            return self._attend(shape, array, layer, q.contiguous(), scores or Scores())

        return paged_attention(fresh, write, attend)

    def _attend(self, shape: PlanShape, array: dict[str, Tensor], layer: int, q: Tensor, scores: Scores) -> Tensor:
        kv_heads, dim, per = self.heads.num_kv_heads, self.heads.key_dim, self.heads_per_kv
        outs = q.new_empty((shape.parts, q.shape[1], dim), dtype=torch.float32)
        maxima, sums = (q.new_empty((shape.parts, q.shape[1]), dtype=torch.float32) for _ in range(2))
        where = (array["positions"], array["table_of"], array["tables"], array["base"])
        cap, sinks = float(scores.softcap or 0), scores.sinks
        scale = (1 / math.sqrt(dim) if scores.scale is None else scores.scale) / (1 if cap else math.log(2))
        tiles = {"suffix": max(16, next_power_of_2(per)), "prefix": self.tile_queries}
        for i, (name, queries) in enumerate(tiles.items()):
            num_items = len(array[name])
            if num_items:
                _kernels().attend[(min(num_items * kv_heads, self.num_programs),)](
                    q, self.keys[layer], self.values[layer], *where, array[name], array["counts"][i:],
                    outs, maxima, sums, shape.width, scale, kv_heads, self.block_tokens, per, dim,
                    **launch(queries, dim, q.dtype.itemsize, cap > 0), WINDOW=scores.window or 0, CAP=cap,
                )  # fmt: skip
        result = torch.empty_like(q)
        sizes = kv_heads, per, dim, next_power_of_2(per), max(16, next_power_of_2(dim))
        parts = outs, maxima, sums, array["base"], sums if sinks is None else sinks.contiguous()
        _kernels().merge[(shape.paged, kv_heads)](*parts, result, *sizes, SINKS=sinks is not None)
        return result


class PlanShape(NamedTuple):
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
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        starts = accumulate((-(-size // 4) * 4 for size in sizes.values()), initial=0)
        return {name: slice(start, start + size) for start, (name, size) in zip(starts, sizes.items(), strict=False)}


class AttentionPlan(NamedTuple):
    """A forward's attention as items: (first row, rows, low, high, part), see `triton_kernels`."""

    batch: ForwardBatch
    suffix: IntArray  # [., 5] items of one row
    prefix: IntArray  # [., 5] items of several rows
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
    spans = [(a, b, end * size) for (a, b), end in zip(pairwise(first.tolist()), blocks.tolist(), strict=True) if end]
    spans += [(a, b, 0) for a, b in pairwise(batch.continued)]
    tiles: list[tuple[int, int, int, int, int]] = []
    for a, b, end in spans:
        for low in range(a, b, tile_rows):
            high = min(low + tile_rows, b)
            tiles.append((low, high - low, 0, end or int(seen[high - 1]), 0))
    prefix, counts = _cut(np.array(tiles, np.int64).reshape(-1, 5), kv_heads, None)
    parts = np.zeros(num_paged, np.int64)
    for (row, num_rows, *_), count in zip(tiles, counts.tolist(), strict=True):
        parts[row : row + num_rows] = count
    rows, begin = np.arange(num_decode), np.repeat(blocks, np.diff(first)) * size
    alone = np.stack([rows, np.ones_like(rows), begin, seen[:num_decode], parts[:num_decode]], 1)
    suffix, counts = _cut(alone, kv_heads, _LONGEST)
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


def _kernels() -> Any:
    """The Triton kernels; without triton, which comes with CUDA builds of torch only, they cannot be imported."""
    from pekoe.engine.embedded import triton_kernels

    return triton_kernels


def next_power_of_2(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
