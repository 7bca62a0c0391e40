"""Forwards of the embedded engine: the model on its KV memory, split among a CPU's threads where that is faster."""

from __future__ import annotations

import numpy as np
import torch

from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import ForwardBatch, KVCache
from pekoe.engine.embedded.attention_cpu import CPUCache
from pekoe.engine.embedded.attention_cuda import CUDACache
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.engine.embedded.routing import RoutingMemory
from pekoe.engine.embedded.scheduler import Chunk, RequestTable
from pekoe.kernels.jit import each
from pekoe.kernels.packed_linear import available, cast_once, intact, pack, refresh
from pekoe.model import LanguageModel

_SHARE_ROWS = 16  # rows worth a thread of their own
_LITTLE = 8e7  # multiplications of a forward that are faster on one thread than waking another up

Share = tuple[IntArray, list[Chunk]]
"""Decoding rows of the table, and chunks, that are computed together."""


class ModelRunner:
    """Computes logits. Its caller excludes forwards while weights or memory change.

    The model is not copied, but for linear layers where a copy is faster: on CPUs, and where `compute_dtype` (of the
    matrix products, by autocast) is lower. `use` makes these copies anew (see `kernels.packed_linear`). `routing`:
    whether the experts of tokens are recorded.
    """

    def __init__(
        self,
        model: LanguageModel,
        num_blocks: int,
        block_tokens: int,
        kv_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        routing: bool = False,
    ) -> None:
        self._num_blocks, self._block_tokens, self._kv_dtype = num_blocks, block_tokens, kv_dtype
        self._records_routing = routing
        self._dtype, self.device = compute_dtype, next(model.parameters()).device
        self.model = self.sampled = model
        self.take_memory()
        self.use(model)

    def take_memory(self) -> None:
        """Allocate KV. `use` must follow."""
        spec, size, dtype, device = self.model.spec, self._block_tokens, self._kv_dtype, self.device
        self._graphs: DecodeGraphs | None = None  # of decoding forwards, on a GPU
        self.routing = RoutingMemory(spec, self._num_blocks, size, device) if self._records_routing else None
        if CPUCache.takes(spec, size, dtype, device):
            self.cache: CPUCache | KVCache | None = CPUCache(spec, self._num_blocks, size)
        elif CUDACache.takes(spec, size, dtype, device):
            self.cache = cache = CUDACache(spec, self._num_blocks, size, dtype, device)
            if self.model.implementation == "pekoe":  # what a family computes may wait for the device
                self._graphs = DecodeGraphs(self.model, cache, self._dtype)
        else:
            self.cache = KVCache(spec, self._num_blocks, size, dtype, device)

    def free_memory(self) -> None:
        """Give up KV, graphs and copies of weights."""
        self._graphs, self.sampled, self.cache, self.routing = None, self.model, None, None

    def use(self, model: LanguageModel) -> None:
        """Compute with this model from now on, whose parameters may have changed."""
        cast = next(model.parameters()).dtype is torch.float32 and self._dtype is not torch.float32
        if cast and model is self.model and self.sampled is not model:
            refresh(self.sampled)  # in place, where graphs of decoding forwards read
        else:
            self.model = self.sampled = model  # the copies of before are given up first
            if cast:  # autocast would do it in every forward
                self.sampled = cast_once(model, self._dtype)
            elif isinstance(self.cache, CPUCache) and available():
                self.sampled = pack(model)
        if self._graphs is not None:
            self._graphs.follow(self.sampled)

    def holds(self, model: LanguageModel) -> bool:
        """Whether every parameter sampled from equals that of `model`, bit by bit."""
        ours, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        same = ours.keys() == theirs.keys() and all(
            p is ours[name] or p.equal(ours[name]) for name, p in theirs.items()
        )
        return same and intact(self.sampled)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy the KV of blocks: pairs (source, target)."""
        assert self.cache is not None
        for source, target in copies:
            self.cache.copy_block(source, target)
            if self.routing is not None:
                self.routing.copy_block(source, target)

    def forward(self, table: RequestTable, decoding: IntArray, chunks: list[Chunk]) -> list[tuple[Share, torch.Tensor]]:
        """Logits [R, V] of each share of the work: after its decoding rows' last tokens, then after those of its
        chunks that complete their context. The shares' decoding rows are `decoding`, in order; the last has `chunks`.
        """
        shares, alone = self.shares(table, decoding, chunks)
        work = [(table, *share) for share in shares]
        logits = each(self._logits, work) if alone else [self._logits(*work[0])]
        return list(zip(shares, logits, strict=True))

    def shares(self, table: RequestTable, decoding: IntArray, chunks: list[Chunk]) -> tuple[list[Share], bool]:
        """Split a forward's rows among the CPU's threads; the chunks, which may read one another, stay together.

        Threads that each take some rows through all layers do not wait for one another after every operation. Where
        chunks are most of the work, torch spreads each operation over its threads instead. Returns the shares, and
        whether each is computed by one thread alone.
        """
        num_threads, num_chunk = torch.get_num_threads(), sum(chunk.stop - chunk.start for chunk in chunks)
        num_rows = len(decoding) + num_chunk
        if self.device.type != "cpu" or num_threads == 1:
            return [(decoding, chunks)], False
        spec, seen = self.model.spec, int(table.computed[decoding].sum())
        seen += sum((chunk.stop - chunk.start) * chunk.stop for chunk in chunks)
        attention = 2 * seen * spec.num_layers * spec.num_heads * spec.head_dim
        if num_rows * spec.num_parameters + attention < _LITTLE:
            return [(decoding, chunks)], True
        size = -(-num_rows // num_threads)
        if size < _SHARE_ROWS or num_chunk > size:
            return [(decoding, chunks)], False
        pieces: list[Share] = [(decoding[i : i + size], []) for i in range(0, len(decoding), size)]
        if chunks and len(pieces) < num_threads:
            pieces.append((decoding[:0], []))
        pieces[-1][1].extend(chunks)
        return pieces, True

    @torch.no_grad()
    def _logits(self, table: RequestTable, decoding: IntArray, chunks: list[Chunk]) -> torch.Tensor:
        tokens, batch, lasts = _batch_of(table, decoding, chunks)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            if self._graphs is not None and not chunks:
                return self.sampled.logits(self._graphs.hidden(tokens, batch))
            assert self.cache is not None
            on_device = (torch.from_numpy(a).to(self.device) for a in (tokens, batch.positions))
            routing = None if self.routing is None else self.routing.recorder(batch)
            hidden = self.sampled(*on_device, self.cache.attention(batch), routing)
            if chunks:
                hidden = hidden[torch.from_numpy(np.append(np.arange(len(decoding)), lasts)).to(self.device)]
            return self.sampled.logits(hidden)


def _batch_of(table: RequestTable, decoding: IntArray, chunks: list[Chunk]) -> tuple[IntArray, ForwardBatch, IntArray]:
    """Tokens [T] of a forward, where they belong, and the last token of each chunk that completes its context."""
    num_decode = len(decoding)
    tokens, positions = [table.last[decoding]], [table.computed[decoding]]
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    width = max([int(table.num_blocks[decoding].max(initial=1)), *(len(c.work.blocks) for c in chunks)])
    tables = np.zeros((num_decode + len(chunks), width), np.int32)
    tables[:num_decode] = table.tables[decoding, :width]
    for row, chunk in enumerate(chunks, num_decode):
        tokens.append(chunk.work.context[chunk.start : chunk.stop])
        positions.append(np.arange(chunk.start, chunk.stop))
        tables[row, : len(chunk.work.blocks)] = chunk.work.blocks
    bounds = (num_decode + np.cumsum([0, *sizes])).tolist()
    num_continued = sum(chunk.start > 0 for chunk in chunks)
    batch = ForwardBatch(
        positions=np.concatenate(positions),
        tables=tables,
        table_of=np.concatenate([np.arange(num_decode), np.repeat(num_decode + np.arange(len(chunks)), sizes)]),
        num_decode=num_decode,
        group_of=table.group[decoding],
        continued=bounds[: num_continued + 1],
        fresh=bounds[num_continued:],
    )
    lasts = [end - 1 for chunk, end in zip(chunks, bounds[1:], strict=True) if chunk.completes]
    return np.concatenate(tokens), batch, np.array(lasts, np.int64)
