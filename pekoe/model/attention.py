"""Causal attention within each packed document.

Shapes: [T] packed tokens, [B] documents, [L] one document's padded length, [H] query heads, [K] key/value heads,
[D] head dimension of queries and keys, [E] that of values.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from pekoe.model.protocol import Scores

# Documents are padded to a multiple of this and batched with others of that length. A larger multiple wastes work,
# a smaller one makes more calls. As the padded length depends on the document's length alone, the CPU kernel computes
# the same bits whatever is packed beside it.
_LENGTH_STEP = 8

_ROWS = 512  # queries whose scores are held at once, where no kernel of torch computes them

# Later versions of varlen_attn than torch 2.11's need this flag for fewer key/value heads.
_VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class PackedAttention:
    """Causal attention within each of the B documents that `cu_seqlens` [B + 1] delimits in a packed row.

    Query head h reads key/value head h // (H / K). `kernel_of` chooses the kernel: torch's variable-length flash
    kernel, or SDPA with one call for all documents of similar length. One object serves all layers of a micro-batch,
    forward and backward. Raises ValueError unless `cu_seqlens` starts with 0 and increases.
    """

    def __init__(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        lengths = [end - start for start, end in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or min(lengths) < 1:
            raise ValueError(f"cu_seqlens: expected 0 followed by increasing numbers, got {bounds[:9]}")
        self.num_tokens: int = bounds[-1]
        self.max_length: int = max(lengths)
        self._bounds = bounds
        self._batches, self._slots = _plan_batches(lengths)  # [(B, L)], [T]
        self._cu_seqlens: Tensor | None = None  # [B + 1] int32, on the device of the last flash call

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores | None = None) -> Tensor:
        """q [T, H, D], k [T, K, D], v [T, K, E] -> [T, H, E]."""
        if q.shape[0] != self.num_tokens:
            raise ValueError(f"attention: expected {self.num_tokens} tokens (cu_seqlens[-1]), got {q.shape[0]}")
        if scores is not None:
            return self._other(q, k, v, scores)
        kernel = kernel_of(q.device.type, q.dtype)
        if kernel == "flash":
            return self._flash(q, k, v)
        if kernel == "sdpa_without_gqa":
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        return self._sdpa(q, k, v, enable_gqa=kernel == "sdpa")

    def _other(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """As `attend` computes them, documents of similar length at once."""
        self._slots = self._slots.to(q.device)
        sizes = [num_docs * length for num_docs, length in self._batches]

        def padded(x: Tensor) -> tuple[Tensor, ...]:
            return x.new_zeros(sum(sizes), *x.shape[1:]).index_copy_(0, self._slots, x).split(sizes)

        outs: list[Tensor] = []
        for shape, *qkv in zip(self._batches, padded(q), padded(k), padded(v), strict=True):
            qs, ks, vs = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)  # [B, H or K, L, D or E]
            outs.append(attend(qs, ks, vs, scores).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self._slots)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._cu_seqlens is None or self._cu_seqlens.device != q.device:
            self._cu_seqlens = torch.tensor(self._bounds, dtype=torch.int32, device=q.device)
        cu, longest = self._cu_seqlens, self.max_length
        out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **_VARLEN_GQA)
        assert isinstance(out, Tensor)  # a pair only where return_aux asks for one
        return out

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
        # Padding goes to the right, where causality hides it from every real token: no mask, and no gradient from it.
        self._slots = self._slots.to(q.device)
        sizes = [num_docs * length for num_docs, length in self._batches]
        total = sum(sizes)

        def padded(x: Tensor) -> tuple[Tensor, ...]:
            return x.new_zeros(total, *x.shape[1:]).index_copy_(0, self._slots, x).split(sizes)

        outs: list[Tensor] = []
        for shape, *qkv in zip(self._batches, padded(q), padded(k), padded(v), strict=True):
            qs, ks, vs = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)  # [B, H or K, L, D]
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=enable_gqa)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self._slots)


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Causal attention with such scores: q [B, H, L, D], k [B, K, L, D], v [B, K, L, E] -> [B, H, L, E].

    A window, a soft cap and sinks are computed for `_ROWS` queries at a time, over the keys that these see; what is
    held for backward is the queries, keys and values alone.
    """
    length, window = q.shape[2], scores.window
    windowed = window is not None and window < length
    if not windowed and scores.softcap is None and scores.sinks is None:
        times = q.shape[1] // k.shape[1]
        if q.device.type == "cuda" and times > 1:  # as `kernel_of` says of float32
            k, v, times = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=times > 1)
    again = torch.is_grad_enabled() and length > _ROWS
    outs: list[Tensor] = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        first = max(0, start - window + 1) if windowed and window is not None else 0
        at, seen = torch.arange(start, stop, device=q.device), torch.arange(first, stop, device=q.device)
        mask = seen <= at[:, None]  # [rows, keys]
        if windowed and window is not None:
            mask &= seen > at[:, None] - window
        piece = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask, scores)
        outs.append(checkpoint(masked, *piece, use_reentrant=False) if again else masked(*piece))
    return torch.cat(outs, dim=2)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention of queries over the keys that `mask` allows, softmax in float32 or wider.

    q [B, H, R, D], k [B, K, L, D], v [B, K, L, E]; mask broadcasts to [B, 1, R, L], with a key for each query.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(-1, -2)).to(wide) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if scores.sinks is not None:
        sinks = scores.sinks.to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return weights.to(v.dtype) @ v


def kernel_of(device: str, dtype: torch.dtype) -> Literal["flash", "sdpa", "sdpa_without_gqa"]:
    """The kernel for q, k and v of this dtype on a device of this type.

    float32 on CUDA repeats key/value heads (sdpa_without_gqa): SDPA's memory-efficient kernel takes no fewer than query
    heads, and its math kernel holds all scores, 4 H L^2 bytes a document. float64 has the math kernel alone.
    """
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "flash"
    return "sdpa_without_gqa" if device == "cuda" and dtype == torch.float32 else "sdpa"


def _plan_batches(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the padded batches as (B, L) pairs, and each packed token's row [T] when they lie one after another."""
    by_padded: dict[int, list[int]] = defaultdict(list)
    for doc, length in enumerate(lengths):
        by_padded[-(-length // _LENGTH_STEP) * _LENGTH_STEP].append(doc)

    first_slot = [0] * len(lengths)
    batches: list[tuple[int, int]] = []
    sizes, offset = np.array(lengths, np.int64), 0
    for padded, docs in sorted(by_padded.items()):
        for row, doc in enumerate(docs):
            first_slot[doc] = offset + row * padded
        batches.append((len(docs), padded))
        offset += len(docs) * padded

    shift = np.array(first_slot, np.int64) - (sizes.cumsum() - sizes)  # [B] from packed place to padded place
    return batches, torch.from_numpy(np.arange(sizes.sum()) + shift.repeat(sizes))
