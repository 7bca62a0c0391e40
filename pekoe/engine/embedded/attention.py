"""KV memory by blocks, and attention that reads it, in plain torch: any device, any dtype.

T tokens of a forward; H query heads, K key/value heads; D head dimension; S = num_blocks x block_tokens slots of KV
memory. Token p of a sequence lies in slot `table[p // block_tokens] * block_tokens + p % block_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.model import PackedAttention


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Where the tokens of one forward belong. T rows: first one of each decoding sequence, then chunks of prompts
    that continue what the cache holds, then chunks that begin their prompt."""

    positions: IntArray  # [T] place in the sequence
    tables: NDArray[np.int32]  # [R, W] blocks of a sequence; entries past its end are not used
    table_of: IntArray  # [T] row of `tables`
    num_decode: int
    group_of: IntArray  # [num_decode] equal for rows that begin with one prompt
    continued: list[int]  # bounds of the continuing chunks; the first is num_decode
    fresh: list[int]  # bounds of the fresh chunks; the last is T


class KVCache:
    """Keys and values of every layer. Memory is taken once, here."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, num_blocks * block_tokens, spec.num_kv_heads, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, S, K, D]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [layers, S, K, D]
        self.block_tokens = block_tokens
        self.device = device

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block into another, in every layer."""
        size = self.block_tokens
        for memory in (self.keys, self.values):
            memory[:, target * size : (target + 1) * size] = memory[:, source * size : (source + 1) * size]

    def attention(self, batch: ForwardBatch) -> TorchAttention:
        return TorchAttention(self, batch)


class TorchAttention:
    """Attention of one forward: writes the new tokens' KV, then attends. Decoding rows are padded to the longest."""

    def __init__(self, cache: KVCache, batch: ForwardBatch) -> None:
        size, positions, tables = cache.block_tokens, batch.positions, batch.tables
        device = cache.device
        self._cache, self._batch = cache, batch
        slots = tables[batch.table_of, positions // size] * size + positions % size
        self._slots = torch.from_numpy(slots).to(device)
        if batch.num_decode:
            seen = positions[: batch.num_decode]
            longest = int(seen.max()) + 1
            mask = np.arange(longest) <= seen[:, None]
            context = self._slots_of(batch.table_of[: batch.num_decode], longest)
            self._context = torch.from_numpy(np.where(mask, context, 0).reshape(-1)).to(device)  # [B * longest]
            self._mask = torch.from_numpy(mask[:, None, None, :]).to(device)  # [B, 1, 1, longest]
            self._shape = (batch.num_decode, longest)
        self._chunks: list[tuple[int, int, Tensor, Tensor]] = []
        for a, b in pairwise(batch.continued):
            stop = int(positions[b - 1]) + 1
            context = torch.from_numpy(self._slots_of(batch.table_of[a : a + 1], stop)[0]).to(device)
            mask = torch.from_numpy(np.arange(stop) <= positions[a:b, None]).to(device)
            self._chunks.append((a, b, context, mask))
        self._first_fresh = batch.fresh[0]
        self._packed: PackedAttention | None = None
        if len(batch.fresh) > 1:
            bounds = np.array(batch.fresh, np.int32) - self._first_fresh
            self._packed = PackedAttention(torch.from_numpy(bounds).to(device))

    def _slots_of(self, rows: IntArray, length: int) -> IntArray:
        """Slots [len(rows), length] of the first tokens of some tables."""
        size = self._cache.block_tokens
        blocks = self._batch.tables[rows, : -(-length // size)].astype(np.int64)
        return (blocks[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)[:, :length]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for memory, new in ((self._cache.keys, k), (self._cache.values, v)):
            memory[layer].index_copy_(0, self._slots, new.to(memory.dtype))
        first = self._first_fresh
        if self._packed is not None and first == 0:
            return self._packed(layer, q, k, v)
        out = torch.empty_like(q)
        if self._batch.num_decode:
            out[: self._batch.num_decode] = self._decode(layer, q[: self._batch.num_decode], k.shape[1])
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for a, b, context, mask in self._chunks:
            query = q[a:b].transpose(0, 1)[None]  # [1, H, t, D]
            key, value = (m[context].to(q.dtype).transpose(0, 1)[None] for m in (keys, values))  # [1, K, context, D]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            out[a:b] = attended[0].transpose(0, 1)
        if self._packed is not None:
            out[first:] = self._packed(layer, q[first:], k[first:], v[first:])
        return out

    def _decode(self, layer: int, q: Tensor, kv_heads: int) -> Tensor:
        dim = q.shape[-1]
        query = q.view(len(q), kv_heads, -1, dim)  # [B, K, H / K, D]: the heads of a group are rows of one query
        key, value = (
            memory[layer].index_select(0, self._context).view(*self._shape, kv_heads, dim).transpose(1, 2).to(q.dtype)
            for memory in (self._cache.keys, self._cache.values)
        )  # [B, K, longest, D]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self._mask).reshape(q.shape)
