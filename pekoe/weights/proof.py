"""The proof that an engine samples from the weights that it was given (I4).

Every publish asks each engine for a short response to a canary prompt, also beside traffic. Its tokens must be tagged
with the version, and its log-probs must be the trainer's: this sees wrong weights and stale KV. Checksums over all
parameters see what some tokens do not show.

Where numerics are coarse (bfloat16), an engine that kept the weights of the version before would pass: one optimizer
step moves log-probs by less than rounding does. `moved_along` tells the two apart: the canary's random numbers are the
same at each publish, so its tokens are the same up to the first that differs. Over these tokens the engine's log-probs
must have moved from the trainer's old ones towards its new ones. Rounding errors of different tokens do not add up;
the movement does, so some dozen tokens tell what one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pekoe.algo.loss import chosen_logprobs
from pekoe.algo.packing import pack
from pekoe.core.types import Completion, FloatArray, IntArray, Sample, SamplingParams
from pekoe.model import Decoder, PackedAttention

CANARY_TOKENS, CANARY_TOKENS_BF16 = 8, 64
TOLERANCE, TOLERANCE_BF16 = 1e-3, 0.5  # max abs difference of log-probs; a stale cache is off by 0.7 to 2 nats
_CERTAIN = 6.0  # the trainer's movement in units of the rounding error, from which on `moved_along` decides


def canary_params(canary: IntArray, temperature: float, bf16: bool, room: int) -> SamplingParams:
    """How the canary is sampled, by an engine with room for `room` tokens."""
    tokens = min(CANARY_TOKENS_BF16 if bf16 else CANARY_TOKENS, room - len(canary))
    return SamplingParams(max_new_tokens=tokens, temperature=temperature, stream="eval")


def sample_of(completion: Completion) -> Sample:
    """A canary's response, as the trainer computes its log-probs."""
    record = completion.handle.resolve()
    return Sample(record.tokens, record.loss_mask, record.logprobs, np.zeros(len(record.tokens), np.float32))


@dataclass(frozen=True, slots=True)
class Canary:
    """A canary's response with its log-probs by the engine and by the trainer. Shapes [R]."""

    tokens: IntArray
    engine: FloatArray
    trainer: FloatArray

    @classmethod
    def of(cls, sample: Sample, trainer: FloatArray) -> Canary:
        mask = sample.loss_mask
        return cls(sample.tokens[mask], sample.behaviour_logprobs[mask], trainer[mask])

    @property
    def difference(self) -> float:
        """The largest between engine and trainer; NaN where one is."""
        return float(np.max(np.abs(self.engine - self.trainer), initial=0.0))


def moved_along(before: Canary, after: Canary) -> bool | None:
    """Whether the engine's log-probs moved with the trainer's between two publishes.

    With d the trainer's movement over the tokens that both responses begin with, the engine's position between the
    trainer's old log-probs (0) and its new ones (1) is the projection <engine - old, d> / <d, d>; an engine that kept
    the old weights is at 0, up to its rounding error, whose size is measured at both publishes.

    Returns None where the trainer moved too little to tell.
    """
    size = min(len(before.tokens), len(after.tokens))
    same = np.cumprod(before.tokens[:size] == after.tokens[:size]).astype(bool)
    if not same.any():
        return None
    old, new, engine = (x[:size][same].astype(np.float64) for x in (before.trainer, after.trainer, after.engine))
    earlier = before.engine[:size][same].astype(np.float64)
    moved = new - old
    noise = float(np.sqrt(np.mean((earlier - old) ** 2)))
    length = float(np.linalg.norm(moved))
    if length <= max(_CERTAIN * noise, 1e-6):
        return None
    return float((engine - old) @ moved) / length**2 > 0.5


@torch.no_grad()
def forward_logprobs(
    model: Decoder, temperature: float, dtype: torch.dtype, samples: Sequence[Sample]
) -> list[FloatArray]:
    """As `Trainer.logprobs`, of a model that nobody trains."""
    device = next(model.parameters()).device
    batch = pack(samples).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        hidden = model(batch.tokens, batch.positions, PackedAttention(batch.cu_seqlens))
        logprobs, _ = chosen_logprobs(
            hidden[batch.targets - 1], model.head_weight, batch.tokens[batch.targets], temperature
        )
    flat = np.zeros(len(batch.tokens), np.float32)
    flat[batch.targets.cpu().numpy()] = logprobs.float().cpu().numpy()
    return np.split(flat, np.cumsum([len(sample) for sample in samples])[:-1])
