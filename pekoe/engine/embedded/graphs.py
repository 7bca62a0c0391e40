"""Decoding forwards as CUDA graphs: hundreds of small kernels, launched as one.

A graph replays the same kernels on the same memory. What changes from forward to forward (the plan of `attention_cuda`,
and the tokens) is one row of int32 per graph, which each forward overwrites. Rows, blocks and items are rounded up to
few sizes; each size has its graph, recorded when it first occurs. Rows that pad a batch are at position -1: they write
and read nothing.

No GPU has run this yet (`pytest -m gpu`); rounding and padding are tested with the recording left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pekoe.core.types import IntArray
from pekoe.engine.embedded.attention import ForwardBatch
from pekoe.engine.embedded.attention_cuda import CUDACache, PlanShape, next_power_of_2, to_buffer
from pekoe.model import LanguageModel

_MAX_GRAPHS = 64  # graphs kept: the earliest recorded goes first


@dataclass(frozen=True, slots=True)
class _Graph:
    buffer: Tensor  # int32: the plan, then tokens [rows]
    hidden: Tensor  # [rows, C]
    replay: Callable[[], None]


class DecodeGraphs:
    """Hidden states of decoding forwards, by replayed graphs that read `model`'s weights where they lie now."""

    def __init__(self, model: LanguageModel, cache: CUDACache, compute_dtype: torch.dtype) -> None:
        self._cache, self._dtype = cache, compute_dtype
        self._graphs: dict[PlanShape, _Graph] = {}
        self._pool: object = None  # memory that all graphs share: they never run at the same time
        self._model, self._addresses = model, list[int]()
        self.follow(model)

    def __len__(self) -> int:
        return len(self._graphs)

    def follow(self, model: LanguageModel) -> None:
        """Use this model from now on. Graphs are kept where its weights lie in the same memory as before."""
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        if model is not self._model or addresses != self._addresses:
            self._graphs.clear()
            self._model, self._addresses = model, addresses

    @torch.no_grad()
    def hidden(self, tokens: IntArray, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, C] of one token [T] for each decoding row. The next call overwrites them."""
        assert len(tokens) == batch.num_decode == len(batch.positions), "chunks of prompts are no part of a graph"
        plan = self._cache.plan(batch)
        shape = _round_up(plan.shape)
        padded = np.zeros(shape.rows, np.int32)
        padded[: len(tokens)] = tokens
        buffer = torch.from_numpy(np.concatenate([to_buffer(plan, shape), padded]))
        graph = self._graphs.get(shape)
        if graph is None:
            if len(self._graphs) == _MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[shape] = self._make(shape, buffer.to(self._cache.device))
        else:
            graph.buffer.copy_(buffer)
        graph.replay()
        return graph.hidden[: len(tokens)]

    def _make(self, shape: PlanShape, buffer: Tensor) -> _Graph:
        attention = self._cache.attention_of(shape, buffer, [shape.rows])

        def forward() -> Tensor:
            tokens = buffer[-shape.rows :].long()
            positions = buffer[shape.slices["positions"]].clamp_min(0).long()
            # No cache of weights in another dtype: a graph would go on reading the copies made while it was recorded.
            low = self._dtype is not torch.float32
            with torch.autocast(buffer.device.type, self._dtype, enabled=low, cache_enabled=False):
                return self._model(tokens, positions, attention)

        return _Graph(buffer, *self._record(forward))

    def _record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `forward` returns, and a function that computes it anew in the same memory."""
        current, side = torch.cuda.current_stream(self._cache.device), torch.cuda.Stream(self._cache.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up here, which a graph may not hold
            forward()
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile (NCCL's watchdog asks after events) is theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # pyright: ignore[reportArgumentType]
            hidden = forward()
        return hidden, graph.replay


def _round_up(shape: PlanShape) -> PlanShape:
    """The shape of a graph: powers of two, rows beyond 64 in steps of 64."""
    rows = next_power_of_2(shape.rows) if shape.rows <= 64 else -(-shape.rows // 64) * 64
    parts = next_power_of_2(shape.parts)  # an item makes a part at least: there are no more items than parts
    return PlanShape(rows, rows, rows, next_power_of_2(shape.width), parts, parts, parts)
