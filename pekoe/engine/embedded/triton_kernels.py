"""Paged attention for GPUs: the Triton kernels. `attention_cuda` plans what they do.

Importing this needs triton, which comes with CUDA builds of torch.

A row is one query token. An item is a tile of neighbouring rows of one table, and the tokens low..high of it that they
see; a row sees no token behind its own position. All G query heads of one key/value head lie in one tile, so that each
key and value is read once for all of them. An item's result is a part: the softmax's running maximum and sum and the
unscaled output, in float32. `merge` joins the parts of a row (split-KV, "flash-decoding", Dao et al. 2023). What rows
share is one item, what each has alone is another (cascade: Ye et al. 2024, "FlashInfer", section 3.1.2).

T rows; H query heads, K key/value heads, G = H / K; D head dimension; S tokens a block; W blocks a table; P parts.
keys and values [slots, K, D]; token p of a table lies in slot table[p // S] * S + p % S.
"""

# pyright: reportMissingImports=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["width"])
def write(
    k, v, keys, values, positions, table_of, tables, width, S: tl.constexpr, KD: tl.constexpr, ROOM: tl.constexpr
):
    """Put k and v [T, K, D] of one row where its table says. Grid: T rows; a row at position -1 is none."""
    row = tl.program_id(0)
    position = tl.load(positions + row)
    if position >= 0:
        table = tl.load(table_of + row).to(tl.int64)
        slot = tl.load(tables + table * width + position // S).to(tl.int64) * S + position % S
        at = tl.arange(0, ROOM)
        live = at < KD
        source = row.to(tl.int64) * KD + at
        tl.store(keys + slot * KD + at, tl.load(k + source, mask=live), mask=live)
        tl.store(values + slot * KD + at, tl.load(v + source, mask=live), mask=live)


@triton.jit(do_not_specialize=["width"])
def attend(
    q, keys, values, positions, table_of, tables, base, items, count, outs, maxima, sums,
    width, scale, K, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROOM: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The parts outs [P, H, D], maxima and sums [P, H] of items [.., 5]: first row, rows, low, high, part.

    count: a pointer to the number of items. Part i of a row goes to base[row] + i. scale: 1 / sqrt(D) / ln 2, for
    the softmax is in powers of two; with CAP above 0 without ln 2: scores become CAP * tanh(score / CAP) first. WINDOW:
    tokens that a row sees, itself the last of them; 0 for all. Tiles are M queries by N tokens by ROOM >= D. Grid: any
    number of programs.
    """
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, ROOM)
    for work in range(tl.program_id(0), tl.load(count) * K, tl.num_programs(0)):
        item, kv = items + work // K * 5, work % K
        row, low, high = tl.load(item), tl.load(item + 2), tl.load(item + 3)
        live = m < tl.load(item + 1) * G
        rows, head = row + m // G, kv * G + m % G
        query_at = (rows.to(tl.int64) * (K * G) + head) * D
        query = tl.load(q + query_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        seen = tl.load(positions + rows, mask=live, other=0)
        table = tables + tl.load(table_of + row).to(tl.int64) * width
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        out = tl.zeros([M, ROOM], tl.float32)
        if WINDOW > 0:  # what no row of the item sees is not read
            low = tl.maximum(low, tl.min(tl.where(live, seen, 2147483647)) - WINDOW + 1)
        for start in range(low, high, N):
            t = start + n
            inside = t < high
            slot = tl.load(table + t // S, mask=inside, other=0).to(tl.int64) * S + t % S
            at = (slot * K + kv) * D
            key = tl.load(keys + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
            value = tl.load(values + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
            if CAP > 0:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                scores = CAP * 1.4426950408889634 * (1 - 2 / (tl.exp2(scores * (2.8853900817779268 / CAP)) + 1))
            visible = inside[None, :] & (t[None, :] <= seen[:, None])
            if WINDOW > 0:
                visible = visible & (t[None, :] > seen[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
            larger = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see nothing of this range
            shrink = tl.exp2(top - shift)
            weights = tl.exp2(scores - shift[:, None])
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None]
            out += tl.dot(weights.to(query.dtype), value.to(query.dtype), input_precision="ieee")
            top = larger
        part = (tl.load(base + rows, mask=live, other=0) + tl.load(item + 4)).to(tl.int64) * (K * G) + head
        tl.store(maxima + part, top, mask=live)
        tl.store(sums + part, total, mask=live)
        tl.store(outs + part[:, None] * D + d[None, :], out, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def merge(
    outs, maxima, sums, base, sinks, result, K, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    ROOM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Join the parts base[row]..base[row + 1] of each row into result [T, H, D]; a row without parts gets zeros.

    sinks: with SINKS, the score of one more key for each head [H], whose value is 0. HEADS >= G, ROOM >= D: powers of
    two. Grid: T rows, K.
    """
    row, kv = tl.program_id(0), tl.program_id(1)
    g, d = tl.arange(0, HEADS), tl.arange(0, ROOM)
    live = g < G
    both = live[:, None] & (d < D)[None, :]
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if SINKS:
        top = tl.load(sinks + kv * G + g, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    out = tl.zeros([HEADS, ROOM], tl.float32)
    for part in range(tl.load(base + row), tl.load(base + row + 1)):
        at = (part * K + kv).to(tl.int64) * G + g
        maximum = tl.load(maxima + at, mask=live, other=float("-inf"))
        larger = tl.maximum(top, maximum)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        old, new = tl.exp2(top - shift), tl.exp2(maximum - shift)
        total = total * old + tl.load(sums + at, mask=live, other=0.0) * new
        part_out = tl.load(outs + at[:, None] * D + d[None, :], mask=both, other=0.0)
        out = out * old[:, None] + part_out * new[:, None]
        top = larger
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    at = (row * K + kv).to(tl.int64) * G + g
    tl.store(result + at[:, None] * D + d[None, :], out.to(result.dtype.element_ty), mask=both)
