"""Decoding steps as CUDA graphs: hundreds of small kernels, launched as one.

A graph replays the same kernels on the same memory. So what changes from step to step lies in one row of int32 per
graph (the plan of `engine.cuda`, and the tokens), which each step overwrites; and rows, blocks and pieces are rounded
up to few sizes, each of which has its graph, recorded when it is first met. Rows that pad a batch are at position -1:
they write and read nothing.

A graph reads the weights where they were when it was recorded. Values may change there; whoever puts other tensors in
their place says so by `follow`.

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
from pekoe.engine.embedded.attention_cuda import CUDACache, PagedAttention, Room, pack, power
from pekoe.model import Decoder

_MOST = 64  # graphs kept: the earliest recorded goes first


@dataclass(frozen=True, slots=True)
class _Graph:
    numbers: Tensor  # the plan in its room, then tokens [rows]; int32
    hidden: Tensor  # [rows, C]
    replay: Callable[[], None]


class DecodeGraphs:
    """Hidden states of decoding steps, by replayed graphs.

    Args:
        model: its weights, where they lie now, are what graphs read.
        cache: the KV that its attention reads and writes.
        compute_dtype: dtype of the matrix products (autocast).
    """

    def __init__(self, model: Decoder, cache: CUDACache, compute_dtype: torch.dtype) -> None:
        self._model, self._cache, self._dtype = model, cache, compute_dtype
        self._places = _places(model)
        self._graphs: dict[Room, _Graph] = {}
        self._pool: object = None  # memory that all graphs share: they never run at the same time

    def __len__(self) -> int:
        return len(self._graphs)

    def follow(self, model: Decoder) -> None:
        """Use this model from now on. Graphs are kept where its weights lie in the same memory as before."""
        places = _places(model)
        if model is not self._model or places != self._places:
            self._graphs.clear()
            self._model, self._places = model, places

    @torch.no_grad()
    def hidden(self, tokens: IntArray, step: ForwardBatch) -> Tensor:
        """Hidden states [T, C] of one token [T] for each decoding row. The next call overwrites them."""
        assert len(tokens) == step.num_decode == len(step.positions), "chunks of prompts are no part of a graph"
        plan = self._cache.plan(step)
        room = _round_up(plan.room)
        padded = np.zeros(room.rows, np.int32)
        padded[: len(tokens)] = tokens
        numbers = torch.from_numpy(np.concatenate([pack(plan, room), padded]))
        graph = self._graphs.get(room)
        if graph is None:
            if len(self._graphs) == _MOST:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[room] = self._make(room, numbers.to(self._cache.device))
        else:
            graph.numbers.copy_(numbers)
        graph.replay()
        return graph.hidden[: len(tokens)]

    def _make(self, room: Room, numbers: Tensor) -> _Graph:
        device = self._cache.device.type

        def forward() -> Tensor:
            tokens = numbers[-room.rows :].long()
            positions = numbers[room.slices["positions"]].clamp_min(0).long()
            # No cache of weights in another dtype: a graph would go on reading the copies made while it was recorded.
            low = self._dtype is not torch.float32
            with torch.autocast(device, self._dtype, enabled=low, cache_enabled=False):
                return self._model(tokens, positions, PagedAttention(self._cache, room, numbers, None))

        return _Graph(numbers, *self._record(forward))

    def _record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `forward` returns, and a function that computes it anew in the same memory."""
        side = torch.cuda.Stream(self._cache.device)
        side.wait_stream(torch.cuda.current_stream(self._cache.device))
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up here, which a graph may not hold
            forward()
        torch.cuda.current_stream(self._cache.device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile (NCCL's watchdog asks after events) is theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # pyright: ignore[reportArgumentType]
            hidden = forward()
        return hidden, graph.replay


def _places(model: Decoder) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _round_up(room: Room) -> Room:
    """The room of a graph: powers of two, rows beyond 64 in steps of 64."""
    rows = power(room.rows) if room.rows <= 64 else -(-room.rows // 64) * 64
    parts = power(room.parts)  # an item makes a part at least: there are no more items than parts
    return Room(rows, rows, rows, power(room.width), parts, parts, parts)
