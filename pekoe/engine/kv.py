"""KV memory by blocks, and attention that reads it.

B sequences; T tokens of this forward; H query heads, K key/value heads, G = H / K; D head dimension;
S = num_blocks x block_tokens slots of KV memory. Token p of a sequence lies in slot
`table[p // block_tokens] * block_tokens + p % block_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray
from pekoe.model import PackedAttention


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

    def slots(self, table: Sequence[int] | IntArray, start: int, stop: int) -> IntArray:
        """Slots of a sequence's tokens start..stop."""
        positions = np.arange(start, stop)
        return np.asarray(table)[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[layer].index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values[layer].index_copy_(0, slots, values.to(self.values.dtype))

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a block's first tokens into another block, in every layer."""
        a, b = source * self.block_tokens, target * self.block_tokens
        for memory in (self.keys, self.values):
            memory[:, b : b + num_tokens] = memory[:, a : a + num_tokens]


class PrefillAttention:
    """Attention of new context tokens, several sequences packed: writes their KV, then attends causally.

    Args:
        cache: where KV lies.
        tables: each sequence's blocks.
        starts: how many tokens of each sequence are in the cache already.
        stops: each sequence's length after this forward.
    """

    def __init__(self, cache: KVCache, tables: list[list[int]], starts: list[int], stops: list[int]) -> None:
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        self._cache = cache
        self._bounds = np.cumsum([0, *lengths])
        slots = [cache.slots(t, a, b) for t, a, b in zip(tables, starts, stops, strict=True)]
        self._slots = torch.from_numpy(np.concatenate(slots)).to(cache.device)
        self._packed: PackedAttention | None = None
        if not any(starts):
            cu_seqlens = torch.from_numpy(self._bounds.astype(np.int32)).to(cache.device)
            self._packed = PackedAttention(cu_seqlens)
            return
        contexts = [cache.slots(t, 0, b) for t, b in zip(tables, stops, strict=True)]
        self._contexts = [torch.from_numpy(c).to(cache.device) for c in contexts]
        self._masks = [
            (torch.arange(b)[None, :] <= torch.arange(a, b)[:, None]).to(cache.device)
            for a, b in zip(starts, stops, strict=True)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._slots, k, v)
        if self._packed is not None:
            return self._packed(layer, q, k, v)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = torch.empty_like(q)
        pieces = zip(self._bounds[:-1], self._bounds[1:], self._contexts, self._masks, strict=True)
        for start, stop, context, mask in pieces:
            query = q[start:stop].transpose(0, 1)[None]  # [1, H, t, D]
            key, value = (m[context].to(q.dtype).transpose(0, 1)[None] for m in (keys, values))  # [1, K, context, D]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            out[start:stop] = attended[0].transpose(0, 1)
        return out


class DecodeAttention:
    """Attention of one new token in each of B sequences: writes its KV, then attends to all of its sequence.

    Args:
        cache: where KV lies.
        tables: [B, most blocks a sequence has], blocks; entries past a sequence's end are not used.
        positions: [B] the new token's position.
    """

    def __init__(self, cache: KVCache, tables: IntArray, positions: IntArray) -> None:
        size = cache.block_tokens
        rows = np.arange(len(positions))
        slots = tables[rows, positions // size] * size + positions % size
        longest = int(positions.max()) + 1
        blocks = tables[:, : -(-longest // size)]
        context = (blocks[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)[:, :longest]
        mask = np.arange(longest) <= positions[:, None]
        self._cache = cache
        self._slots = torch.from_numpy(slots).to(cache.device)
        self._context = torch.from_numpy(np.where(mask, context, 0).reshape(-1)).to(cache.device)  # [B * longest]
        self._mask = torch.from_numpy(mask[:, None, None, :]).to(cache.device)  # [B, 1, 1, longest]
        self._shape = (len(rows), longest)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._slots, k, v)
        kv_heads, dim = k.shape[1:]
        query = q.view(len(q), kv_heads, -1, dim)  # [B, K, G, D]: the heads of a group are the rows of one query
        key, value = (
            memory[layer].index_select(0, self._context).view(*self._shape, kv_heads, dim).transpose(1, 2).to(q.dtype)
            for memory in (self._cache.keys, self._cache.values)
        )  # [B, K, longest, D]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self._mask).reshape(q.shape)
