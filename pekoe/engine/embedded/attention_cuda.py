"""Paged attention on a GPU: what of a forward is computed in which piece, and the kernels' (`engine.paged`) launch.

Decoding rows that share blocks (the samples of a prompt) read them once, as tiles of many rows; what a row has alone
is read by a tile of its own; both are cut along the context, so that few rows too fill the device, and merged. Chunks
that continue a prompt are tiles of neighbouring tokens. Chunks that begin one need no cache: torch's variable-length
kernel attends them.

All that the kernels need to know of a step is one row of int32, which goes to the device in one copy. Nothing waits
for the device. Which pieces a row is cut into depends on what shares the batch, so the last bits of its output do.

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

_PROGRAMS = 1024  # (item, key/value head) pairs that fill a large device; beyond it, pieces grow longer
_SHORTEST, _LONGEST = 64, 512  # tokens of a piece; those of tiles may be longer


class CUDACache(KVCache):
    """Keys and values of every layer by blocks, and kernels that read them. Memory is taken once, here."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_tokens, dtype, device)
        self.spec = spec
        # Queries of a tile of several rows. On tensor cores a tall tile is nearly free, until its registers spill.
        tall = 32 if dtype.itemsize > 2 else 128 if spec.head_dim <= 128 else 64
        self.tall = max(tall, power(self.heads_per_kv))
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

    def plan(self, step: ForwardBatch) -> Plan:
        """Cut a step's attention into pieces."""
        spec = self.spec
        return make_plan(step, self.block_tokens, spec.num_kv_heads, max(1, self.tall // self.heads_per_kv))

    def attention(self, step: ForwardBatch) -> PagedAttention:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = self.plan(step)
        room = plan.room
        numbers = torch.from_numpy(pack(plan, room)).to(self.device)
        num_paged = step.fresh[0]
        packed = PackedAttention([bound - num_paged for bound in step.fresh]) if len(step.fresh) > 1 else None
        return PagedAttention(self, room, numbers, packed)


@dataclass(frozen=True, slots=True)
class Room:
    """How large the arrays of a plan are on the device. A graph's are larger than a plan that it replays."""

    rows: int  # T
    paged: int  # rows that read the cache
    tables: int  # R
    width: int  # W
    alone: int
    shared: int
    parts: int  # P

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "counts": (2,),
            "positions": (self.rows,),
            "table_of": (self.rows,),
            "base": (self.paged + 1,),
            "tables": (self.tables, self.width),
            "alone": (self.alone, 5),
            "shared": (self.shared, 5),
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
class Plan:
    """A step in pieces. An item is (first row, rows, low, high, part), see `engine.paged`."""

    step: ForwardBatch
    alone: NDArray[np.int64]  # [., 5] items of one row
    shared: NDArray[np.int64]  # [., 5] items of several rows
    base: IntArray  # [paged + 1] the first part of each row

    @property
    def room(self) -> Room:
        num_tables, width = self.step.tables.shape
        rows, paged = len(self.step.positions), len(self.base) - 1
        return Room(rows, paged, num_tables, width, len(self.alone), len(self.shared), int(self.base[-1]))


def make_plan(step: ForwardBatch, size: int, kv_heads: int, tile_rows: int) -> Plan:
    """Cut a step into items, for blocks of `size` tokens and tiles of at most `tile_rows` rows."""
    seen = step.positions + 1
    num_decode, num_paged = step.num_decode, step.fresh[0]
    first, blocks = groups(replace(step, continued=[num_decode]), size)  # of the decoding rows
    spans = [(int(a), int(b), int(end) * size) for (a, b), end in zip(pairwise(first), blocks, strict=True) if end]
    spans += [(a, b, 0) for a, b in pairwise(step.continued)]
    tiles: list[tuple[int, int, int, int, int]] = []
    for a, b, end in spans:
        for low in range(a, b, tile_rows):
            high = min(low + tile_rows, b)
            tiles.append((low, high - low, 0, end or int(seen[high - 1]), 0))
    together = np.array(tiles, np.int64).reshape(-1, 5)
    shared, counts = _cut(together, kv_heads, None)
    parts = np.zeros(num_paged, np.int64)
    for (row, num_rows, *_), count in zip(tiles, counts.tolist(), strict=True):
        parts[row : row + num_rows] = count
    rows = np.arange(num_decode)
    begin = np.repeat(blocks, np.diff(first)) * size
    alone, counts = _cut(
        np.stack([rows, np.ones_like(rows), begin, seen[:num_decode], parts[:num_decode]], 1), kv_heads, _LONGEST
    )
    parts[:num_decode] += counts
    return Plan(step, alone, shared, np.append(0, parts.cumsum()))


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


def pack(plan: Plan, room: Room) -> NDArray[np.int32]:
    """All that the kernels read of a plan, in one row. Where there is more room than rows, those are none."""
    step, shapes, slices = plan.step, room.shapes, room.slices
    packed = np.zeros(list(slices.values())[-1].stop, np.int32)
    array = {name: packed[at].reshape(shapes[name]) for name, at in slices.items()}
    num_tables, width = step.tables.shape
    array["counts"][:] = len(plan.alone), len(plan.shared)
    array["positions"][:] = -1
    array["positions"][: len(step.positions)] = step.positions
    array["table_of"][: len(step.table_of)] = step.table_of
    array["base"][:] = plan.base[-1]
    array["base"][: len(plan.base)] = plan.base
    array["tables"][:num_tables, :width] = step.tables
    array["alone"][: len(plan.alone)] = plan.alone
    array["shared"][: len(plan.shared)] = plan.shared
    return packed


class PagedAttention:
    """Attention of one forward: writes the new tokens' keys and values, then lets every row see its sequence.

    numbers: what `pack` made for `room`, on the device. packed: attends the rows behind room.paged.
    """

    def __init__(self, cache: CUDACache, room: Room, numbers: Tensor, packed: PackedAttention | None) -> None:
        self._cache, self._room, self._packed = cache, room, packed
        self._array = {name: numbers[at].view(room.shapes[name]) for name, at in room.slices.items()}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_paged, (q, k, v) = self._room.paged, (x.contiguous() for x in (q, k, v))
        self._write(layer, k, v)
        if self._packed is None:
            return self._attend(layer, q)
        fresh = self._packed(layer, q[num_paged:], k[num_paged:], v[num_paged:])
        return torch.cat([self._attend(layer, q[:num_paged]), fresh]) if num_paged else fresh

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        cache, array = self._cache, self._array
        size = k[0].numel()
        memory = (cache.keys[layer], cache.values[layer])
        place = (array["positions"], array["table_of"], array["tables"], self._room.width, cache.block_tokens)
        _kernels().write[(len(k),)](k, v, *memory, *place, size, power(size))

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        cache, array, room, spec = self._cache, self._array, self._room, self._cache.spec
        heads, kv_heads, dim, per = spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.heads_per_kv
        outs = q.new_empty((room.parts, heads, dim), dtype=torch.float32)
        maxima, sums = (q.new_empty((room.parts, heads), dtype=torch.float32) for _ in range(2))
        wide = max(16, power(dim))
        tokens = 64 if wide <= 128 and q.dtype.itemsize == 2 else 32
        where = (array["positions"], array["table_of"], array["tables"], array["base"])
        scale = 1 / math.sqrt(dim) / math.log(2)
        for i, (name, queries) in enumerate((("alone", max(16, power(per))), ("shared", cache.tall))):
            num_items = len(array[name])
            if num_items:
                _kernels().attend[(min(num_items * kv_heads, cache.num_programs),)](
                    q, cache.keys[layer], cache.values[layer], *where, array[name], array["counts"][i:],
                    outs, maxima, sums, room.width, scale, kv_heads, cache.block_tokens, per, dim, queries, tokens,
                    wide, num_warps=8 if queries > 64 else 4,
                )  # fmt: skip
        result = torch.empty_like(q)
        _kernels().merge[(room.paged, kv_heads)](outs, maxima, sums, array["base"], result, kv_heads, per, dim,
                                            power(per), wide)  # fmt: skip
        return result


def _kernels() -> Any:
    """Not before they are wanted: triton comes with CUDA builds of torch only."""
    from pekoe.engine.embedded import triton_kernels

    return triton_kernels


def power(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
