"""KV memory by blocks, and attention that reads it, in plain torch: any device, any dtype.

T tokens of a forward; H query heads, K key/value heads; D head dimension of queries and keys, E of values; S =
num_blocks x block_tokens slots of KV memory. Token p of a sequence lies in slot `table[p // block_tokens] *
block_tokens + p % block_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.spec import LayerShape, ModelSpec
from pekoe.core.types import IntArray
from pekoe.model import Attention, PackedAttention, Scores
from pekoe.model.attention import masked


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


def heads_of(spec: ModelSpec) -> LayerShape | None:
    """The heads that all layers have, if their values are as wide as their keys; None for other models."""
    layers = {(s.num_heads, s.num_kv_heads, s.key_dim, s.value_dim) for s in spec.attention_layers}
    if len(layers) != 1:
        return None
    heads = LayerShape(*layers.pop())
    return heads if heads.key_dim == heads.value_dim else None


def paged_attention(
    fresh: list[int],
    write: Callable[[int, Tensor, Tensor], None],
    attend: Callable[[int, Tensor, Scores | None], Tensor],
) -> Attention:
    """Attention of one forward: writes the new tokens' keys and values, then lets every row see its sequence.

    Args:
        fresh: bounds of the fresh chunks. They need no cache: `PackedAttention` attends them.
        write: puts k [T, K, D] and v [T, K, E] of a layer into the cache.
        attend: attention of a layer for q of the rows before the fresh chunks.
    """
    num_paged = fresh[0]
    packed = PackedAttention([bound - num_paged for bound in fresh]) if len(fresh) > 1 else None

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores | None = None) -> Tensor:
        write(layer, k, v)
        if packed is None:
            return attend(layer, q, scores)
        out = packed(layer, q[num_paged:], k[num_paged:], v[num_paged:], scores)
        return torch.cat([attend(layer, q[:num_paged], scores), out]) if num_paged else out

    return attention


class KVCache:
    """Keys and values of every layer, and attention that reads them. Memory is taken once, here."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_slots, shapes = num_blocks * block_tokens, spec.attention_layers
        if len({(s.num_kv_heads, s.key_dim, s.value_dim) for s in shapes}) == 1:
            sizes = (len(shapes), num_slots, shapes[0].num_kv_heads)
            self.keys = torch.zeros(*sizes, shapes[0].key_dim, dtype=dtype, device=device)  # [layers, S, K, D]
            self.values = torch.zeros(*sizes, shapes[0].value_dim, dtype=dtype, device=device)  # [layers, S, K, E]
            self._layers = list(zip(self.keys, self.values, strict=True))  # [S, K, D], [S, K, E]
        else:  # the layers have tensors of their own
            self.keys = self.values = torch.empty(0)
            self._layers = [
                tuple(
                    torch.zeros(num_slots, s.num_kv_heads, d, dtype=dtype, device=device)
                    for d in (s.key_dim, s.value_dim)
                )
                for s in shapes
            ]
        self.block_tokens, self.device = block_tokens, device

    @property
    def num_bytes(self) -> int:
        return sum(memory.nbytes for layer in self._layers for memory in layer)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block into another, in every layer."""
        size = self.block_tokens
        for memory in chain.from_iterable(self._layers):
            memory[target * size : (target + 1) * size] = memory[source * size : (source + 1) * size]

    def attention(self, batch: ForwardBatch) -> Attention:
        """Attention of one forward, see `paged_attention`. Decoding rows are padded to the longest."""
        size, positions = self.block_tokens, batch.positions
        new_slots = batch.tables[batch.table_of, positions // size] * size + positions % size
        new = torch.from_numpy(new_slots).to(self.device)
        pieces: list[tuple[int, int, Tensor, Tensor]] = []  # rows a to b; slots [B, L] that they read; mask [b - a, L]
        for a, b in pairwise(batch.continued if not batch.num_decode else [0, *batch.continued]):
            decoding = b <= batch.num_decode  # B = b - a sequences; else B = 1
            length = int(positions[a:b].max()) + 1
            mask = np.arange(length) <= positions[a:b, None]
            tables = batch.tables[batch.table_of[a : b if decoding else a + 1], : -(-length // size)].astype(np.int64)
            slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(tables), -1)[:, :length]
            slots = np.where(mask, slots, 0) if decoding else slots
            pieces.append((a, b, torch.from_numpy(slots).to(self.device), torch.from_numpy(mask).to(self.device)))

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            for memory, x in zip(self._layers[layer], (k, v), strict=True):
                memory.index_copy_(0, new, x.to(memory.dtype))

        def attend(layer: int, q: Tensor, scores: Scores | None) -> Tensor:
            out = q.new_empty(*q.shape[:2], self._layers[layer][1].shape[-1])
            for a, b, slots, mask in pieces:
                key, value = (
                    memory.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2).to(q.dtype)
                    for memory in self._layers[layer]
                )  # [B, K, L, D], [B, K, L, E]
                if scores is not None:
                    if scores.window is not None:
                        near = torch.from_numpy(positions[a:b, None] - scores.window).to(self.device)
                        mask = mask & (torch.arange(mask.shape[1], device=self.device) > near)
                    one = b <= batch.num_decode
                    query = q[a:b, :, None] if one else q[a:b].transpose(0, 1)[None]  # [B, H, 1, D], [1, H, b - a, D]
                    attended = masked(query, key, value, mask[:, None, None] if one else mask, scores)
                    out[a:b] = attended[:, :, 0] if one else attended[0].transpose(0, 1)
                    continue
                if b <= batch.num_decode:  # the heads of a group are rows of one query [B, K, H / K, D]
                    query = q[a:b].unflatten(1, (key.shape[1], -1))
                    out[a:b] = F.scaled_dot_product_attention(query, key, value, mask[:, None, None]).flatten(1, 2)
                else:
                    query = q[a:b].transpose(0, 1)[None]  # [1, H, b - a, D]
                    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
                    out[a:b] = attended[0].transpose(0, 1)
            return out

        return paged_attention(batch.fresh, write, attend)
