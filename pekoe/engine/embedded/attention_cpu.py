"""Paged attention on a CPU in float32, by the kernels of `kernels.attention`."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import ForwardBatch, heads_of, paged_attention
from pekoe.kernels import attention as kernels
from pekoe.kernels.jit import num_threads, run
from pekoe.model import Attention, Scores

_PLAIN = Scores()
_NO_SINKS = np.zeros(0, np.float32)


class CPUCache:
    """Keys and values of every layer by blocks, and attention that reads them. Memory is taken once, here."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_tokens: int) -> None:
        heads = heads_of(spec)
        assert heads is not None, "a model of several kinds of heads has another cache"
        shape = (len(spec.attention_layers), num_blocks, 2, heads.num_kv_heads, heads.key_dim * block_tokens)
        self._memory = np.zeros(shape, np.float32)  # numpy asks Linux for huge pages; torch does not
        self._layers = [layer.reshape(-1) for layer in self._memory]
        self._heads, self._size = heads, block_tokens

    @staticmethod
    def takes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels here can serve such a model."""
        heads = heads_of(spec)
        fits = heads is not None and heads.key_dim % 8 == 0 and block_tokens % 8 == 0
        return device.type == "cpu" and dtype is torch.float32 and fits

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def copy_block(self, source: int, target: int) -> None:
        self._memory[:, target] = self._memory[:, source]

    def attention(self, batch: ForwardBatch) -> Attention:
        """Attention of one forward, see `paged_attention`."""
        size, threads, rows = self._size, num_threads(), len(batch.positions)
        shape = (self._heads.num_heads, self._heads.num_kv_heads, self._heads.key_dim, size)
        place = (batch.tables, batch.table_of, batch.positions)
        first_rows, shared = groups(batch, size)
        num_paged = batch.fresh[0]
        usual = np.float32(1.0 / math.sqrt(self._heads.key_dim))
        bounds_of: dict[int, list[int]] = {}  # by window
        write_bounds = [rows * i // threads for i in range(threads + 1)] if rows >= 128 else [0, rows]

        def bounds(window: int) -> list[int]:
            """Groups, dealt out to threads by the tokens that their rows see."""
            seen = batch.positions[:num_paged]
            seen = np.minimum(seen, window) if window else seen
            work = np.add.reduceat(seen, first_rows[:-1]) + 64 if num_paged else np.zeros(0)
            done = np.concatenate([[0.0], work.cumsum()])
            return [int(np.searchsorted(done, done[-1] * i / threads)) for i in range(threads + 1)]

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            keys, values = (x.contiguous().numpy().reshape(-1) for x in (k, v))
            run(kernels.write_kv, write_bounds, keys, values, self._layers[layer], *place, *shape[1:])

        def attend(layer: int, q: Tensor, scores: Scores | None) -> Tensor:
            scores, q = scores or _PLAIN, q.contiguous()
            window = scores.window or 0
            if window not in bounds_of:
                bounds_of[window] = bounds(window)
            scale = usual if scores.scale is None else np.float32(scores.scale)
            sinks = _NO_SINKS if scores.sinks is None else scores.sinks.detach().float().numpy()
            special = scale, np.float32(scores.softcap or 0), window, sinks
            out = torch.empty_like(q)
            arrays = q.numpy().reshape(-1), self._layers[layer], *place, first_rows, shared, out.numpy().reshape(-1)
            run(kernels.attend, bounds_of[window], *arrays, *shape, *special)
            return out

        return paged_attention(batch.fresh, write, attend)


_GROUP_ROWS = 32  # rows of a group: more would push a group's queries and scores out of the nearest cache


def groups(batch: ForwardBatch, size: int) -> tuple[IntArray, IntArray]:
    """Groups of the rows before the fresh chunks: first row of each [number + 1], and blocks shared [number].

    Decoding rows of one prompt that begin with the same full blocks; and the tokens of a chunk that continues.
    """
    starts: list[int] = []
    shared: list[int] = []
    if batch.num_decode:
        positions = batch.positions[: batch.num_decode]
        tables = batch.tables[: batch.num_decode]
        full = np.minimum(positions[1:], positions[:-1]) // size
        columns = np.arange(tables.shape[1])
        same = (tables[1:] == tables[:-1]) & (columns < full[:, None])
        common = np.logical_and.accumulate(same, axis=1).sum(1)  # [B - 1] blocks shared with the row before
        apart = np.flatnonzero(np.append((batch.group_of[1:] != batch.group_of[:-1]) | (common == 0), True)) + 1
        first = 0
        for stop in apart.tolist():
            for low in range(first, stop, _GROUP_ROWS):
                high = min(low + _GROUP_ROWS, stop)
                starts.append(low)
                shared.append(int(common[low : high - 1].min()) if high - low > 1 else 0)
            first = stop
    for a, b in pairwise(batch.continued):
        for low in range(a, b, _GROUP_ROWS):
            starts.append(low)
            shared.append(int(batch.positions[low]) // size)
    return np.array([*starts, batch.continued[-1]], np.int64), np.array(shared, np.int64)
