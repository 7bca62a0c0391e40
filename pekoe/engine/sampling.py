"""Sampling tokens from logits, with random numbers that depend on nothing but who asks (I8).

Each sequence has a 64-bit key made of (seed, stream, problem uid, draw, sample index). The number that decides its
token at response position i is a hash of (key, i). So a token depends on its logits and its key alone, not on what
shared the batch, nor on how often the sequence was preempted.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.types import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sequence_key(params: SamplingParams, uid: str, draw: int, sample_index: int) -> int:
    """The 64-bit key of one sequence."""
    text = f"{params.seed}\0{params.stream}\0{draw}\0{sample_index}\0{uid}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position), by splitmix64 (Steele, Lea, Flood 2014). Shapes [B]."""
    x = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN  # wraps around, as it should
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits: Tensor, uniform: Tensor, params: SamplingParams, ban: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose a token in each row.

    Args:
        logits: [B, V].
        uniform: [B] float64 in [0, 1), one number a row.
        params: temperature, top_p, top_k.
        ban: [B] bool, rows in which no stop token may be chosen yet (min_new_tokens).

    Returns:
        tokens [B] int64; log-probs [B] float32 of the distribution at the sampling temperature (at 1 for greedy),
        before top-k, top-p and bans.
    """
    scaled = logits.float() / (params.temperature or 1.0)
    allowed = scaled
    if ban is not None and params.stop_token_ids and bool(ban.any()):
        allowed = scaled.clone()
        stops = torch.tensor(params.stop_token_ids, device=logits.device)
        allowed[ban.nonzero(), stops] = -torch.inf
    if params.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        tokens = _inverse_cdf(_truncated(torch.softmax(allowed, -1), params), uniform)
    chosen = scaled.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen - torch.logsumexp(scaled, -1)


def _truncated(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero what top-k, then top-p, leave out (not renormalised). Ties at the k-th place go to the lower token id."""
    if params.top_k or params.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        if params.top_k:
            ordered[:, params.top_k :] = 0
        if params.top_p < 1:
            before = ordered.double().cumsum(-1) - ordered
            ordered[before >= params.top_p * ordered.double().sum(-1, keepdim=True)] = 0
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    return probs


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability is above `uniform` of the total: never one of probability 0."""
    cdf = probs.double().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0]
