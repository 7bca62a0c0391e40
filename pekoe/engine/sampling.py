"""Sampling tokens from logits, with random numbers that depend on the request alone (I8).

The number that decides a sequence's token at response position i is a hash of i and of the sequence's key. So a token
depends on its logits and its key, not on what shared the batch, nor on how often the sequence was preempted.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.types import BoolArray, FloatArray, IntArray, Request, SamplingParams
from pekoe.kernels.jit import even, run
from pekoe.kernels.sampling import draw

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sequence_key(params: SamplingParams, uid: str, draw: int, sample_index: int, turn: int = 0) -> int:
    """The 64-bit key of one sequence: a hash of (seed, stream, problem uid, draw, sample index, turn)."""
    text = f"{params.seed}\0{params.stream}\0{draw}\0{sample_index}\0{uid}" + (f"\0{turn}" if turn else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key_of(request: Request) -> int:
    """The key of the sequence that answers a request."""
    return sequence_key(request.params, request.uid, request.draw, request.sample, request.turn)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position), by splitmix64 (Steele, Lea, Flood 2014). Shapes [B]."""
    x = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN  # wraps around, as it should
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: Tensor,
    uniform: NDArray[np.float64],
    params: SamplingParams,
    rows: IntArray | None = None,
    ban: BoolArray | None = None,
) -> tuple[IntArray, FloatArray]:
    """Choose B tokens.

    Args:
        logits: [R, V].
        uniform: [B] in [0, 1), one number a token.
        params: temperature, top_p, top_k.
        rows: [B] the row of logits that each token is drawn from; None: B = R, each its own.
        ban: [B] where no stop token may be chosen yet (min_new_tokens).

    Returns:
        tokens [B] int64; log-probs [B] float32 of the distribution at the sampling temperature (at 1 for greedy),
        before top-k, top-p and bans.
    """
    rows = np.arange(len(logits)) if rows is None else rows
    ban = np.zeros(len(rows), np.bool_) if ban is None else ban
    # By the parameters alone, not by who is banned: what shares the batch must not decide which code runs (I8).
    bans = params.min_new_tokens > 0 and len(params.stops) > 0
    plain = params.temperature > 0 and params.top_p == 1 and not params.top_k and not bans
    if plain and logits.device.type == "cpu" and logits.dtype is torch.float32:
        return _sample_fused(logits, uniform, params, rows)
    return _sample_torch(logits, uniform, params, rows, ban)


def _sample_torch(
    logits: Tensor, uniform: NDArray[np.float64], params: SamplingParams, rows: IntArray, ban: BoolArray
) -> tuple[IntArray, FloatArray]:
    device = logits.device
    scaled = logits.float() / (params.temperature or 1.0)
    if not np.array_equal(rows, np.arange(len(logits))):
        scaled = scaled[torch.from_numpy(rows).to(device)]
    allowed = scaled
    if params.stops and ban.any():
        allowed = scaled.clone()
        stops = torch.tensor(params.stops, device=device)
        allowed[torch.from_numpy(np.flatnonzero(ban)).to(device)[:, None], stops] = -torch.inf
    if params.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        tokens = _inverse_cdf(_truncated(torch.softmax(allowed, -1), params), torch.from_numpy(uniform).to(device))
    tokens = tokens.clamp_max(logits.shape[1] - 1)  # beyond where probabilities are NaN; the log-prob shows it
    chosen = scaled.gather(-1, tokens[:, None])[:, 0]
    return tokens.cpu().numpy(), (chosen - torch.logsumexp(scaled, -1)).cpu().numpy()


def _sample_fused(
    logits: Tensor, uniform: NDArray[np.float64], params: SamplingParams, rows: IntArray
) -> tuple[IntArray, FloatArray]:
    tokens, logprobs, size = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32), logits.shape[1]
    flat = logits.detach().contiguous().numpy().reshape(-1)
    bounds = even(len(rows), 32_768 // size + 1)
    run(draw, bounds, flat, size, rows, uniform, 1.0 / params.temperature, tokens, logprobs)
    return tokens, logprobs


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
