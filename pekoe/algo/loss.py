"""Losses over the N trained tokens of a micro-batch. Each returns sums, never means.

The trainer divides by one denominator for the whole optimizer step, summed over all micro-batches and ranks (I3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count, takewhile

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pekoe.algo.packing import MicroBatch
from pekoe.config.recipes import AlgoSection
from pekoe.core.loop import StepStats

Sums = dict[str, Tensor]  # statistic -> its sum over the N tokens (`*_max`: its maximum), detached scalars

CHUNK_VALUES = 1 << 24  # logits held at once: 64 MiB in float32
GPU_CHUNK_VALUES = 1 << 26  # each chunk reads the head anew, and adds to its gradient: docs/log.md counts the bytes


def chosen_logprobs(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    vocab_size: int | None = None,
    chunk_values: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at the sampling temperature, as engines return it (I1), and the entropy.

    Where the logits are too many to hold, they are computed in chunks of tokens and recomputed in backward.

    Args:
        hidden: [N, C] at the positions that predict.
        head: [V, C] the output embedding, or a function from hidden states to logits [N, V].
        targets: [N].
        vocab_size: V, where the head is a function.
        chunk_values: logits held at once; None: as many as suit the device.

    Returns:
        log-probs [N] in the head's dtype or float32, whichever is wider; entropies [N], without gradient.
    """

    def piece(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ head.T if isinstance(head, Tensor) else head(hidden)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    values = chunk_values or (GPU_CHUNK_VALUES if hidden.device.type == "cuda" else CHUNK_VALUES)
    chunk = max(1, values // (head.shape[0] if isinstance(head, Tensor) else vocab_size or 1))
    if len(targets) <= chunk:
        return piece(hidden, targets)
    parts = [
        checkpoint(piece, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def importance_weights(batch: MicroBatch, algo: AlgoSection) -> tuple[Tensor, Tensor]:
    """Weights that correct for sampling from the engine's policy in place of the proximal one.

    w = exp(log pi_proximal - log pi_behaviour): decoupled PPO (Hilton et al., arXiv:2110.00641, eq. 3; AReaL,
    arXiv:2505.24298, eq. 5). Bounds at a limit C: "truncate" min(w, C) (Ionides 2008; Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training"); "mask_token" 0 outside [1/C, C] (IcePop:
    arXiv:2510.18855); "mask_sequence" 0 for sequences whose geometric mean of w is outside it (Liu et al. 2025, "When
    speed kills stability").

    Returns weights [N], without gradient, and [N] whether a bound changed them. Masked tokens still count in the loss's
    denominator (I3).
    """
    unbounded = torch.zeros_like(batch.targets, dtype=torch.bool)
    if algo.correction == "off" or batch.proximal_logprobs is None:
        return torch.ones_like(batch.behaviour_logprobs), unbounded
    log_weights, limit = batch.proximal_logprobs - batch.behaviour_logprobs, math.log(algo.correction_limit)
    weights = log_weights.exp()
    if algo.correction == "weight":
        return weights, unbounded
    if algo.correction == "truncate":
        return weights.clamp(max=algo.correction_limit), log_weights > limit
    if algo.correction == "mask_sequence":
        sequence, sizes = _sequences(batch)
        sums = log_weights.new_zeros(len(sizes)).index_add_(0, sequence, log_weights)
        log_weights = (sums / sizes)[sequence]
    # Infinite or NaN weights are beyond any limit too; 0 times them would not be 0.
    beyond = ~(log_weights.abs() <= limit)
    return torch.where(beyond, torch.zeros_like(weights), weights), beyond


def _sequences(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Of each trained token the sequence that it is of [N], and of each sequence its trained tokens, at least 1."""
    sequence = torch.bucketize(batch.targets, batch.cu_seqlens, right=True) - 1
    sizes = torch.zeros_like(batch.cu_seqlens[1:], dtype=torch.int64)  # bincount would wait for the device
    return sequence, sizes.scatter_add_(0, sequence, torch.ones_like(sequence)).clamp(min=1)


def denominator(algo: AlgoSection, num_sequences: int, max_new_tokens: int) -> float | None:
    """What the trainer divides the sum of `ppo` by, over the whole mini-batch; None: its trained tokens."""
    return {"token": None, "sequence": float(num_sequences), "max_length": float(num_sequences * max_new_tokens)}[
        algo.normalise
    ]


def ppo(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch, algo: AlgoSection, num_lags: int = 0
) -> tuple[Tensor, Sums]:
    """Sum over tokens of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (+ kl x k3), with its statistics.

    r = exp(log pi - log pi_old), pi_old the engine's log-probs (AReaL v0.2), or the trainer's where the batch has them.
    PPO: arXiv:1707.06347, eq. 7. Asymmetric clip: DAPO, arXiv:2503.14476, eq. 8. w: see `importance_weights`. KL: the
    k3 estimator exp(d) - d - 1 with d = log pi_ref - log pi (Schulman 2020; GRPO eq. 4). With `normalise = "sequence"`
    each token counts 1 / its sequence's tokens (GRPO, eq. 3). `num_lags`: of as many lags, from 0 on, the statistics of
    `logprob_diffs_by_lag`.
    """
    old = batch.behaviour_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
    plain_loss, clipped_loss = -batch.advantages * ratio, -batch.advantages * clipped
    weights, bounded = importance_weights(batch, algo)
    losses = weights * torch.maximum(plain_loss, clipped_loss)
    loss = _total(losses, batch, algo)
    mismatch = (logprobs - batch.behaviour_logprobs).detach().abs()
    sums = {
        "entropy": entropy.sum(),
        "ratio": ratio.detach().sum(),
        "clip_fraction": (clipped_loss > plain_loss).sum(),
        "approx_kl": (ratio - 1 - log_ratio).detach().sum(),
        "logprob_diff": mismatch.sum(),
        "logprob_diff_max": mismatch.max() if len(mismatch) else mismatch.sum(),
    }
    if num_lags and batch.lags is not None:
        mismatch = mismatch if batch.proximal_logprobs is None else (old - batch.behaviour_logprobs).abs()
        for lag in range(num_lags):
            mine = torch.where(batch.lags == lag, mismatch, 0.0)
            sums |= {f"lag_{lag}_tokens": (batch.lags == lag).sum(), f"lag_{lag}_diff": mine.sum()}
            sums[f"lag_{lag}_diff_max"] = mine.max() if len(mine) else mine.sum()
    if algo.correction != "off":
        largest = weights.max() if len(weights) else weights.sum()
        sums |= {
            "correction_weight": weights.sum(),
            "correction_weight_max": largest,
            "correction_fraction": bounded.sum(),
        }
    if algo.kl and batch.reference_logprobs is not None:
        delta = batch.reference_logprobs - logprobs
        k3 = delta.exp() - delta - 1
        loss = loss + algo.kl * _total(k3, batch, algo)
        sums["reference_kl"] = k3.detach().sum()
    return loss, sums


def _total(losses: Tensor, batch: MicroBatch, algo: AlgoSection) -> Tensor:
    """The sum over tokens [N], or over sequences of each one's mean."""
    if algo.normalise != "sequence":
        return losses.sum()
    sequence, sizes = _sequences(batch)
    return (losses / sizes[sequence]).sum()


def logprob_diffs_by_lag(stats: Sequence[StepStats]) -> dict[str, dict[str, float]]:
    """Mean and largest |log pi_behaviour - log pi_proximal| of the tokens of each lag, over optimizer steps of `ppo`.

    At lag 0 both are of the same weights (I1); the more versions lie between them, the more they differ.
    """
    means: dict[str, float] = {}
    largest: dict[str, float] = {}
    for lag in takewhile(lambda lag: f"lag_{lag}_tokens" in stats[0].means, count()):
        tokens = sum(s.means[f"lag_{lag}_tokens"] * s.num_targets for s in stats)
        if tokens:
            means[str(lag)] = sum(s.means[f"lag_{lag}_diff"] * s.num_targets for s in stats) / tokens
            largest[str(lag)] = float(np.max([s.means[f"lag_{lag}_diff_max"] for s in stats]))  # NaN, where one is
    return {"lag_logprob_diff": means, "lag_logprob_diff_max": largest} if means else {}


def cross_entropy(logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, Sums]:
    """SFT: the sum of -log pi over the response tokens."""
    return -logprobs.sum(), {"entropy": entropy.sum()}
