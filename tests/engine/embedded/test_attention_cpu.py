"""The CPU's attention kernels against plain torch: the same forwards, every kind of row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pekoe.core.spec import ModelSpec
from pekoe.engine.embedded.attention import ForwardBatch, KVCache
from pekoe.engine.embedded.attention_cpu import CPUCache, groups
from pekoe.model import Scores


def spec(heads: int, kv_heads: int, dim: int) -> ModelSpec:
    return ModelSpec("qwen2", 32, heads * dim, 1, heads, kv_heads, dim, 16, 4096)


class Script:
    """Forwards over one cache: contexts in chunks, then tokens of several samples that share their prompt's blocks."""

    def __init__(
        self, model: ModelSpec, size: int, prompts: list[int], n: int, scores: Scores | None = None, seed: int = 0
    ) -> None:
        self.rng, self.size, self.model, self.scores = np.random.default_rng(seed), size, model, scores
        num_blocks = sum(-(-p // size) + n * -(-30 // size) for p in prompts) + -(-40 // size)
        device = torch.device("cpu")
        self.fast = CPUCache(model, num_blocks, size)
        self.plain = KVCache(model, num_blocks, size, torch.float32, device)
        self.free = self.rng.permutation(num_blocks).tolist()
        self.prompts, self.n = prompts, n

    def take(self, num_tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-num_tokens // self.size))]

    def run(self, rows: list[tuple[list[int], np.ndarray, int]], num_decode: int) -> float:
        """Largest difference of the two, of one forward. rows: (table, positions, prompt) for each piece."""
        pieces = rows[:num_decode] + sorted(rows[num_decode:], key=lambda row: row[1][0] == 0)
        sizes = [len(positions) for _, positions, _ in pieces]
        width = max(len(table) for table, _, _ in pieces)
        tables = np.zeros((len(pieces), width), np.int32)
        for i, (table, _, _) in enumerate(pieces):
            tables[i, : len(table)] = table
        bounds = np.cumsum([0, *sizes])[num_decode:].tolist()
        continued = sum(positions[0] > 0 for _, positions, _ in pieces[num_decode:])
        batch = ForwardBatch(
            positions=np.concatenate([positions for _, positions, _ in pieces]),
            tables=tables,
            table_of=np.repeat(np.arange(len(pieces)), sizes),
            num_decode=num_decode,
            group_of=np.array([prompt for _, _, prompt in pieces[:num_decode]], np.int64),
            continued=bounds[: continued + 1],
            fresh=bounds[continued:],
        )
        first, shared = groups(batch, self.size)
        assert first[-1] == batch.fresh[0]
        assert len(first) == len(shared) + 1
        total, m = sum(sizes), self.model
        q = torch.from_numpy(self.rng.standard_normal((total, m.num_heads, m.head_dim), np.float32))
        k, v = (
            torch.from_numpy(self.rng.standard_normal((total, m.num_kv_heads, m.head_dim), np.float32)) for _ in "kv"
        )
        with torch.no_grad():
            fast, plain = (cache.attention(batch)(0, q, k, v, self.scores) for cache in (self.fast, self.plain))
        return float((fast - plain).abs().max())


def worst(heads: int, kv_heads: int, dim: int, size: int, scores: Scores | None = None) -> float:
    """The largest difference of eight forwards, which have every kind of row."""
    script = Script(spec(heads, kv_heads, dim), size, [5, 37, 150, 64], 5, scores)
    tables = [script.take(p) for p in script.prompts]
    half = [(t, np.arange(0, p // 2), i) for i, (t, p) in enumerate(zip(tables, script.prompts, strict=True))]
    rest = [(t, np.arange(p // 2, p), i) for i, (t, p) in enumerate(zip(tables, script.prompts, strict=True))]
    found = [script.run(half, 0)]
    found.append(script.run([*rest[1:], half[0]], 0))  # some continue, one begins
    found.append(script.run(rest[:1], 0))
    samples: list[tuple[list[int], int, int]] = []  # table, prompt, tokens so far
    for i, (table, p) in enumerate(zip(tables, script.prompts, strict=True)):
        for j in range(script.n):
            own = [*table[: p // size], *script.take(30)] if j else [*table, *script.take(30)]
            if j and p % size:
                for cache in (script.fast, script.plain):
                    cache.copy_block(table[-1], own[p // size])
            samples.append((own, i, p))
    late = script.take(40)
    for step in range(4):
        decode = [(table, np.array([p + step * 1]), i) for table, i, p in samples]
        extra = [(late, np.arange(10 * step, 10 * step + 10), 9)]  # a prompt's chunk in the same forward
        found.append(script.run(decode + extra, len(decode)))
    uneven = [(table, np.array([p + 4]), i) for k, (table, i, p) in enumerate(samples) if k % 3]
    found.append(script.run(uneven, len(uneven)))
    return max(found)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize(("dim", "size"), [(32, 16), (8, 8), (64, 32), (80, 16), (24, 24)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_equal_plain_torch(heads: int, kv_heads: int, dim: int, size: int, threads: int):
    torch.set_num_threads(threads)
    assert worst(heads, kv_heads, dim, size) < 2e-6


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(8, 2, 32, 16), (3, 1, 8, 8), (4, 4, 64, 32)])
@pytest.mark.parametrize("scores", [
    Scores(scale=0.3), Scores(softcap=5.0), Scores(window=1), Scores(window=20), Scores(window=64),
    Scores(sinks=torch.tensor([2.0, -1.0, 0.5, 30.0, 0.0, 0.0, 1.0, -30.0])),
    Scores(0.2, 37, 8.0, torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, 0.0, 1.0, -3.0])),
], ids=["scale", "cap", "window 1", "window 20", "window 64", "sinks", "all"])  # fmt: skip
def test_scores_that_are_not_plain(scores: Scores, heads: int, kv_heads: int, dim: int, size: int):
    torch.set_num_threads(2)
    own = scores if scores.sinks is None else replace(scores, sinks=scores.sinks[:heads])
    assert worst(heads, kv_heads, dim, size, own) < 1e-5


def test_a_groups_shared_blocks_are_found():
    """Three samples of one prompt share two blocks; a fourth row of another prompt begins with the same block."""
    tables = np.array([[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 5, 6], [1, 7, 0, 0]], np.int32)
    positions = np.array([40, 41, 50, 20])
    batch = ForwardBatch(positions, tables, np.arange(4), 4, np.array([8, 8, 8, 9]), [4], [4])
    first, shared = groups(batch, 16)
    assert first.tolist() == [0, 3, 4]
    assert shared.tolist() == [2, 0]
    early = ForwardBatch(np.array([40, 20, 50, 20]), tables, np.arange(4), 4, np.array([8, 8, 8, 9]), [4], [4])
    assert groups(early, 16)[1].tolist() == [1, 0]  # row 1 sees only one whole block


@pytest.mark.parametrize(("dim", "size", "dtype", "takes"), [
    (32, 16, torch.float32, True), (12, 16, torch.float32, False), (32, 4, torch.float32, False),
    (32, 16, torch.float64, False),
])  # fmt: skip
def test_what_the_kernels_take(dim: int, size: int, dtype: torch.dtype, takes: bool):
    assert CPUCache.takes(spec(2, 1, dim), size, dtype, torch.device("cpu")) is takes
