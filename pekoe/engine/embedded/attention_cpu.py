"""Paged attention on a CPU in float32: kernels that read a group's shared prefix once for all its samples.

A row is one query token. Rows that lie side by side and begin with the same blocks (the samples of a prompt, the
tokens of a prompt's chunk) make a group: each block they share is read from memory once, and stays in the nearest
cache while every query of the group meets it (cascade). What a row has for itself follows. The softmax is computed
chunk by chunk with a running maximum (Milakov and Gimelshein 2018), so no row is padded to another's length.

T rows; H query heads, K key/value heads, G = H / K; D head dimension; N blocks of S tokens; W blocks a table.
Arrays are flat where an offset is named "at": offsets count floats.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import Step
from pekoe.kernels.jit import kernel, num_threads, run
from pekoe.kernels.simd import add, exp, fma, larger, largest_of, load, mul, splat, spread, store, sum_of
from pekoe.model import PackedAttention


class CPUCache:
    """Keys and values of every layer by blocks, and attention that reads them. Memory is taken once, here."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_tokens: int) -> None:
        shape = (spec.num_layers, num_blocks, 2, spec.num_kv_heads, spec.head_dim * block_tokens)
        self._memory = np.zeros(shape, np.float32)  # numpy asks Linux for huge pages; torch does not
        self._layers = [layer.reshape(-1) for layer in self._memory]
        self._spec, self._size = spec, block_tokens

    @staticmethod
    def takes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels here can serve such a model."""
        fits = spec.head_dim % 8 == 0 and block_tokens % 8 == 0
        return device.type == "cpu" and dtype is torch.float32 and fits

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def copy_block(self, source: int, target: int) -> None:
        self._memory[:, target] = self._memory[:, source]

    def attention(self, step: Step) -> PagedAttention:
        return PagedAttention(self._layers, self._spec, self._size, step)


class PagedAttention:
    """Attention of one forward: writes the new tokens' keys and values, then lets every row see its sequence."""

    def __init__(self, layers: list[Any], spec: ModelSpec, size: int, step: Step) -> None:
        self._layers, self._shape, self._step = layers, (spec.num_heads, spec.num_kv_heads, spec.head_dim, size), step
        self._groups, self._shared = groups(step, size)
        num_paged = self._groups[-1]
        work = np.add.reduceat(step.positions[:num_paged], self._groups[:-1]) + 64 if num_paged else np.zeros(0)
        done, threads = np.concatenate([[0.0], work.cumsum()]), num_threads()
        self._bounds = [int(np.searchsorted(done, done[-1] * i / threads)) for i in range(threads + 1)]
        rows = len(step.positions)
        self._write_bounds = [rows * i // threads for i in range(threads + 1)] if rows >= 128 else [0, rows]
        self._packed = PackedAttention([b - num_paged for b in step.fresh]) if len(step.fresh) > 1 else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step, memory, num_paged = self._step, self._layers[layer], int(self._groups[-1])
        keys, values, queries = (x.contiguous().numpy().reshape(-1) for x in (k, v, q))
        place = (step.tables, step.table_of, step.positions)
        run(_write, self._write_bounds, keys, values, memory, *place, *self._shape[1:])
        if self._packed is not None and num_paged == 0:
            return self._packed(layer, q, k, v)
        out = torch.empty_like(q)
        results = out.numpy().reshape(-1)
        run(attend, self._bounds, queries, memory, *place, self._groups, self._shared, results, *self._shape)
        if self._packed is not None:
            out[num_paged:] = self._packed(layer, q[num_paged:], k[num_paged:], v[num_paged:])
        return out


_GROUP_ROWS = 32  # rows of a group: more would push a group's queries and scores out of the nearest cache


def groups(step: Step, size: int) -> tuple[IntArray, IntArray]:
    """Groups of the rows before the fresh chunks: first row of each [number + 1], and blocks shared [number].

    Decoding rows of one prompt that begin with the same full blocks; and the tokens of a chunk that continues.
    """
    starts: list[int] = []
    shared: list[int] = []
    if step.num_decode:
        positions = step.positions[: step.num_decode]
        tables = step.tables[: step.num_decode]
        full = np.minimum(positions[1:], positions[:-1]) // size
        columns = np.arange(tables.shape[1])
        same = (tables[1:] == tables[:-1]) & (columns < full[:, None])
        common = np.logical_and.accumulate(same, axis=1).sum(1)  # [B - 1] blocks shared with the row before
        apart = np.flatnonzero(np.append((step.prompt_of[1:] != step.prompt_of[:-1]) | (common == 0), True)) + 1
        first = 0
        for stop in apart.tolist():
            for low in range(first, stop, _GROUP_ROWS):
                high = min(low + _GROUP_ROWS, stop)
                starts.append(low)
                shared.append(int(common[low : high - 1].min()) if high - low > 1 else 0)
            first = stop
    for a, b in pairwise(step.continued):
        for low in range(a, b, _GROUP_ROWS):
            starts.append(low)
            shared.append(int(step.positions[low]) // size)
    return np.array([*starts, step.continued[-1]], np.int64), np.array(shared, np.int64)


@kernel
def _write(first, last, k, v, memory, tables, table_of, positions, num_kv, dim, size):
    """Put the keys and values [T, K, D] of rows first..last where their tables say."""
    for row in range(first, last):
        block, slot = tables[table_of[row], positions[row] // size], positions[row] % size
        for kv in range(num_kv):
            at = (row * num_kv + kv) * dim
            keys = (block * 2 * num_kv + kv) * dim * size + slot
            values = ((block * 2 + 1) * num_kv + kv) * dim * size + slot * dim
            for d in range(dim):
                memory[keys + d * size] = k[at + d]
                memory[values + d] = v[at + d]


@kernel
def _softmax(scores, at, count, scale, old):
    """Replace scores[at : at + count] by exp(scale * score - maximum), the maximum being over them and `old`.

    Returns the maximum and the sum. Room up to the next multiple of 8 is overwritten.
    """
    for t in range(count, (count + 7) // 8 * 8):
        scores[at + t] = np.float32(-np.inf)
    scales, top = splat(scale), splat(old)
    for t in range(at, at + count, 8):
        x = mul(load(scores, t), scales)
        store(scores, t, x)
        top = larger(x, top)
    largest = largest_of(top)
    shift, total = splat(-largest), splat(np.float32(0))
    for t in range(at, at + count, 8):
        x = exp(add(load(scores, t), shift))
        store(scores, t, x)
        total = add(total, x)
    return largest, sum_of(total)


@kernel
def _scores4(q, a, b, c, e, keys, at, dim, size, scores, to, width):
    """Products of four queries (in q at a, b, c, e) with a block of keys [D, S], to four neighbouring rows."""
    for t in range(0, size, 16):
        zero = splat(np.float32(0))
        a0 = a1 = b0 = b1 = c0 = c1 = e0 = e1 = zero
        for d in range(dim):
            k0, k1 = load(keys, at + d * size + t), load(keys, at + d * size + t + 8)
            x = spread(q, a + d)
            a0, a1 = fma(x, k0, a0), fma(x, k1, a1)
            x = spread(q, b + d)
            b0, b1 = fma(x, k0, b0), fma(x, k1, b1)
            x = spread(q, c + d)
            c0, c1 = fma(x, k0, c0), fma(x, k1, c1)
            x = spread(q, e + d)
            e0, e1 = fma(x, k0, e0), fma(x, k1, e1)
        store(scores, to + t, a0)
        store(scores, to + t + 8, a1)
        store(scores, to + width + t, b0)
        store(scores, to + width + t + 8, b1)
        store(scores, to + 2 * width + t, c0)
        store(scores, to + 2 * width + t + 8, c1)
        store(scores, to + 3 * width + t, e0)
        store(scores, to + 3 * width + t + 8, e1)


@kernel
def _scores1(q, a, keys, at, dim, size, scores, to):
    """As `_scores4`, of one query."""
    wide = size - size % 16
    for t in range(0, wide, 16):
        s0 = s1 = s2 = s3 = splat(np.float32(0))
        for d in range(0, dim, 2):
            x, y, k = spread(q, a + d), spread(q, a + d + 1), at + d * size + t
            s0, s1 = fma(x, load(keys, k), s0), fma(x, load(keys, k + 8), s1)
            s2, s3 = fma(y, load(keys, k + size), s2), fma(y, load(keys, k + size + 8), s3)
        store(scores, to + t, add(s0, s2))
        store(scores, to + t + 8, add(s1, s3))
    for t in range(wide, size, 8):
        s0 = s1 = splat(np.float32(0))
        for d in range(0, dim, 2):
            s0 = fma(spread(q, a + d), load(keys, at + d * size + t), s0)
            s1 = fma(spread(q, a + d + 1), load(keys, at + (d + 1) * size + t), s1)
        store(scores, to + t, add(s0, s1))


@kernel
def _values4(weights, at, width, count, values, block, dim, out, a, b, c, e):
    """Add four rows of weights times a block of values [S, D] to out at a, b, c, e."""
    for d in range(0, dim, 16):
        a0, b0, c0, e0 = load(out, a + d), load(out, b + d), load(out, c + d), load(out, e + d)
        a1, b1, c1, e1 = load(out, a + d + 8), load(out, b + d + 8), load(out, c + d + 8), load(out, e + d + 8)
        for t in range(count):
            v0, v1 = load(values, block + t * dim + d), load(values, block + t * dim + d + 8)
            x = spread(weights, at + t)
            a0, a1 = fma(x, v0, a0), fma(x, v1, a1)
            x = spread(weights, at + width + t)
            b0, b1 = fma(x, v0, b0), fma(x, v1, b1)
            x = spread(weights, at + 2 * width + t)
            c0, c1 = fma(x, v0, c0), fma(x, v1, c1)
            x = spread(weights, at + 3 * width + t)
            e0, e1 = fma(x, v0, e0), fma(x, v1, e1)
        store(out, a + d, a0)
        store(out, a + d + 8, a1)
        store(out, b + d, b0)
        store(out, b + d + 8, b1)
        store(out, c + d, c0)
        store(out, c + d + 8, c1)
        store(out, e + d, e0)
        store(out, e + d + 8, e1)


@kernel
def _values1(weights, at, count, values, block, dim, out, a):
    """As `_values4`, of one query."""
    wide = dim - dim % 16
    for d in range(0, wide, 16):
        s0, s1 = load(out, a + d), load(out, a + d + 8)
        s2 = s3 = splat(np.float32(0))
        for t in range(0, count - 1, 2):
            x, y, v = spread(weights, at + t), spread(weights, at + t + 1), block + t * dim + d
            s0, s1 = fma(x, load(values, v), s0), fma(x, load(values, v + 8), s1)
            s2, s3 = fma(y, load(values, v + dim), s2), fma(y, load(values, v + dim + 8), s3)
        if count % 2:
            x, v = spread(weights, at + count - 1), block + (count - 1) * dim + d
            s0, s1 = fma(x, load(values, v), s0), fma(x, load(values, v + 8), s1)
        store(out, a + d, add(s0, s2))
        store(out, a + d + 8, add(s1, s3))
    for d in range(wide, dim, 8):
        s0 = load(out, a + d)
        for t in range(count):
            s0 = fma(spread(weights, at + t), load(values, block + t * dim + d), s0)
        store(out, a + d, s0)


@kernel
def _chunk(q, out, memory, table, low, count, where, first, num, kv, num_kv, dim, size, scores, width, maxima, sums):
    """Let the queries first..first + num see `count` tokens from block `low` of a table on.

    where [num] the queries' offsets in q and out; scores [num, width], maxima and sums [num] their running softmax.
    """
    quads = num - num % 4 if dim % 16 == 0 and size % 16 == 0 else 0
    scale = np.float32(1.0 / np.sqrt(dim))
    blocks = (count + size - 1) // size
    for b in range(blocks):
        at, to = (table[low + b] * 2 * num_kv + kv) * dim * size, b * size
        for i in range(first, first + quads, 4):
            _scores4(
                q, where[i], where[i + 1], where[i + 2], where[i + 3],
                memory, at, dim, size, scores, i * width + to, width,
            )  # fmt: skip
        for i in range(first + quads, first + num):
            _scores1(q, where[i], memory, at, dim, size, scores, i * width + to)
    for i in range(first, first + num):
        largest, total = _softmax(scores, i * width, count, scale, maxima[i])
        if largest > maxima[i]:
            shrink = np.exp(maxima[i] - largest)
            sums[i] *= shrink
            factor = splat(shrink)
            for d in range(where[i], where[i] + dim, 8):
                store(out, d, mul(load(out, d), factor))
            maxima[i] = largest
        sums[i] += total
    for b in range(blocks):
        at, to = ((table[low + b] * 2 + 1) * num_kv + kv) * dim * size, b * size
        n = min(size, count - to)
        for i in range(first, first + quads, 4):
            _values4(
                scores, i * width + to, width, n, memory, at, dim,
                out, where[i], where[i + 1], where[i + 2], where[i + 3],
            )  # fmt: skip
        for i in range(first + quads, first + num):
            _values1(scores, i * width + to, n, memory, at, dim, out, where[i])


@kernel
def attend(first, last, q, memory, tables, table_of, positions, groups, shared, out, heads, num_kv, dim, size):
    """Attention of the groups first..last.

    q, out [T, H, D] and memory [N, 2, K, D * S], flat: of a block first each head's keys [D, S], then each head's
    values [S, D]; tables [R, W] blocks; table_of [T] each row's table; positions [T] each row's place in its
    sequence, up to which it sees; groups [number + 1] first row of each group; shared [number] blocks that all of a
    group's rows begin with and see whole.
    """
    per, step = heads // num_kv, max(1, 128 // size)
    width, widest = step * size, 1
    for group in range(first, last):
        widest = max(widest, (groups[group + 1] - groups[group]) * per)
    scores, where = np.empty(widest * width, np.float32), np.empty(widest, np.int64)
    maxima, sums = np.empty(widest, np.float32), np.empty(widest, np.float32)
    for i in range(groups[first] * heads * dim, groups[last] * heads * dim):
        out[i] = np.float32(0)
    for group in range(first, last):
        start, stop, begin = groups[group], groups[group + 1], shared[group]
        num = (stop - start) * per
        for kv in range(num_kv):
            for row in range(start, stop):
                for i in range(per):
                    where[(row - start) * per + i] = (row * heads + kv * per + i) * dim
            maxima[:num] = -np.inf
            sums[:num] = 0
            for low in range(0, begin, step):
                count = (min(low + step, begin) - low) * size
                _chunk(
                    q, out, memory, tables[table_of[start]], low, count, where, 0, num,
                    kv, num_kv, dim, size, scores, width, maxima, sums,
                )  # fmt: skip
            for row in range(start, stop):
                for low in range(begin, positions[row] // size + 1, step):
                    count = min(positions[row] + 1 - low * size, width)
                    _chunk(
                        q, out, memory, tables[table_of[row]], low, count, where, (row - start) * per, per,
                        kv, num_kv, dim, size, scores, width, maxima, sums,
                    )  # fmt: skip
            for i in range(num):
                factor = splat(np.float32(1) / sums[i])
                for d in range(where[i], where[i] + dim, 8):
                    store(out, d, mul(load(out, d), factor))
