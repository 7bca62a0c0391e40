"""Paged attention on a CPU in float32: writes new keys and values into KV blocks, and attends over them.

A row is one query token. Rows that lie side by side and begin with the same blocks (the samples of a prompt, the
tokens of a prompt's chunk) make a group: each block they share is read from memory once, and stays in the nearest
cache while every query of the group meets it (cascade). What a row has for itself follows. The softmax is computed
chunk by chunk with a running maximum (Milakov and Gimelshein 2018), so no row is padded to another's length.

A layer may have a window (each row sees its last tokens alone; blocks that no row of a group sees are not read), a soft
cap of its scores (Gemma 2), and a sink for each head: the score of one more key, whose value is 0 (gpt-oss).

T rows; H query heads, K key/value heads, G = H / K; D head dimension; N blocks of S tokens; W blocks a table.
Arrays are flat where an offset is named "at": offsets count floats. The reference in plain torch is
`engine.embedded.attention`.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import numpy as np

from pekoe.kernels.jit import kernel
from pekoe.kernels.simd import add, div, exp, fma, larger, largest_of, load, mul, smaller, splat, spread, store, sum_of


@kernel
def write_kv(first, last, k, v, memory, tables, table_of, positions, num_kv, dim, size):
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
def _cap(scores, at, count, scale, cap):
    """Replace scores[at : at + count], up to the next multiple of 8, by cap * tanh(scale * score / cap)."""
    inner, most, one = splat(np.float32(2) * scale / cap), splat(np.float32(40)), splat(np.float32(1))
    for t in range(at, at + count, 8):
        power = exp(smaller(mul(load(scores, t), inner), most))  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        store(scores, t, mul(splat(cap), add(one, div(splat(np.float32(-2)), add(power, one)))))


@kernel
def _softmax(scores, at, unseen, count, scale, cap, old):
    """Replace scores[at : at + count] by exp(scale * score - maximum), the maximum being over them and `old`.

    The first `unseen` of them count for nothing. cap: where above 0, of scale * score (`_cap`). Returns the maximum and
    the sum. Room up to the next multiple of 8 is overwritten.
    """
    if unseen >= count:
        for t in range(count):
            scores[at + t] = np.float32(0)
        return old, np.float32(0)
    if cap > 0:
        _cap(scores, at, count, scale, cap)
        scale = np.float32(1)
    for t in range(unseen):
        scores[at + t] = np.float32(-np.inf)
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
def _store16(array, at, low, high):
    store(array, at, low)
    store(array, at + 8, high)


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
        _store16(scores, to + t, a0, a1)
        _store16(scores, to + width + t, b0, b1)
        _store16(scores, to + 2 * width + t, c0, c1)
        _store16(scores, to + 3 * width + t, e0, e1)


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
        _store16(scores, to + t, add(s0, s2), add(s1, s3))
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
        _store16(out, a + d, a0, a1)
        _store16(out, b + d, b0, b1)
        _store16(out, c + d, c0, c1)
        _store16(out, e + d, e0, e1)


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
        _store16(out, a + d, add(s0, s2), add(s1, s3))
    for d in range(wide, dim, 8):
        s0 = load(out, a + d)
        for t in range(count):
            s0 = fma(spread(weights, at + t), load(values, block + t * dim + d), s0)
        store(out, a + d, s0)


@kernel
def _chunk(
    q, out, memory, table, low, count, where, nearest, first, num, kv, num_kv, dim, size, scale, cap, scores, width,
    maxima, sums,
):  # fmt: skip
    """Let the queries first..first + num see `count` tokens from block `low` of a table on.

    where [num] the queries' offsets in q and out; nearest [num] the first token that each sees; scores [num, width],
    maxima and sums [num] their running softmax.
    """
    quads = num - num % 4 if dim % 16 == 0 and size % 16 == 0 else 0
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
        largest, total = _softmax(scores, i * width, nearest[i] - low * size, count, scale, cap, maxima[i])
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
def attend(
    first, last, q, memory, tables, table_of, positions, groups, shared, out, heads, num_kv, dim, size, scale, cap,
    window, sinks,
):  # fmt: skip
    """Attention of the groups first..last.

    q, out [T, H, D] and memory [N, 2, K, D * S], flat: of a block first each head's keys [D, S], then each head's
    values [S, D]; tables [R, W] blocks; table_of [T] each row's table; positions [T] each row's place in its
    sequence, up to which it sees; groups [number + 1] first row of each group; shared [number] blocks that all of a
    group's rows begin with and see whole, but for what is out of their window. scale: what scores are multiplied by;
    cap: of the product, 0 for none; window: tokens that a row sees, itself the last of them, 0 for all; sinks [H], or
    [0] where there are none.
    """
    per, step = heads // num_kv, max(1, 128 // size)
    width, widest = step * size, 1
    for group in range(first, last):
        widest = max(widest, (groups[group + 1] - groups[group]) * per)
    scores = np.empty(widest * width, np.float32)
    where, nearest = np.empty(widest, np.int64), np.empty(widest, np.int64)
    maxima, sums = np.empty(widest, np.float32), np.empty(widest, np.float32)
    for i in range(groups[first] * heads * dim, groups[last] * heads * dim):
        out[i] = np.float32(0)
    for group in range(first, last):
        start, stop, begin = groups[group], groups[group + 1], shared[group]
        num = (stop - start) * per
        for kv in range(num_kv):
            for row in range(start, stop):
                for i in range(per):
                    at = (row - start) * per + i
                    where[at] = (row * heads + kv * per + i) * dim
                    nearest[at] = max(0, positions[row] - window + 1) if window > 0 else 0
                    maxima[at] = sinks[kv * per + i] if len(sinks) > 0 else np.float32(-np.inf)
                    sums[at] = np.float32(1 if len(sinks) > 0 else 0)
            for low in range(nearest[:num].min() // size, begin, step):
                count = (min(low + step, begin) - low) * size
                _chunk(
                    q, out, memory, tables[table_of[start]], low, count, where, nearest, 0, num,
                    kv, num_kv, dim, size, scale, cap, scores, width, maxima, sums,
                )  # fmt: skip
            for row in range(start, stop):
                for low in range(max(begin, nearest[(row - start) * per] // size), positions[row] // size + 1, step):
                    count = min(positions[row] + 1 - low * size, width)
                    _chunk(
                        q, out, memory, tables[table_of[row]], low, count, where, nearest, (row - start) * per, per,
                        kv, num_kv, dim, size, scale, cap, scores, width, maxima, sums,
                    )  # fmt: skip
            for i in range(num):
                factor = splat(np.float32(1) / sums[i])
                for d in range(where[i], where[i] + dim, 8):
                    store(out, d, mul(load(out, d), factor))
