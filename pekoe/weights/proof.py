"""The proof that an engine samples from the weights that it was given (I4).

Every publish asks each engine for a short response to a canary prompt, also beside traffic. Its tokens must be tagged
with the version, and its log-probs must be the trainer's: this detects wrong weights and stale KV. Checksums over all
parameters detect what some tokens do not show.

In bfloat16 one optimizer step moves log-probs by less than rounding does: an engine that kept the weights of the
version before would pass. So the canary's log-probs are compared with those of publishes before, wherever the response
up to a token is the same (its random numbers are): the engine's must have moved as the trainer's did. Engines give no
log-probs of tokens that they did not sample; several short responses have more tokens in common than one long one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pekoe.algo.loss import chosen_logprobs
from pekoe.algo.packing import pack
from pekoe.core.types import Completion, FloatArray, IntArray, Sample, SamplingParams
from pekoe.model import LanguageModel, PackedAttention

CANARY_TOKENS, CANARIES_BF16 = 8, 8
TOLERANCE, TOLERANCE_BF16 = 1e-3, 0.5  # max abs difference of log-probs; a stale cache is off by 0.7 to 2 nats
_MIN_TOKENS = 4  # in common, to compare two canaries


def canary_params(canary: IntArray, temperature: float, bf16: bool, room: int) -> SamplingParams:
    """How the canary is sampled, by an engine with room for `room` tokens."""
    tokens = min(CANARY_TOKENS, room - len(canary))
    number = CANARIES_BF16 if bf16 else 1
    return SamplingParams(number, temperature, max_new_tokens=tokens, stop_token_ids=(), stream="eval")


def sample_of(completion: Completion) -> Sample:
    """A canary's response, as the trainer computes its log-probs."""
    record = completion.handle.resolve()
    return Sample(record.tokens, record.loss_mask, record.logprobs, np.zeros(len(record.tokens), np.float32))


@dataclass(frozen=True, slots=True)
class Canary:
    """Responses of one engine to the canary."""

    logprobs: dict[bytes, tuple[float, float]]  # by the response up to a token: the engine's and the trainer's of it
    difference: float  # the largest between the two; NaN where one is
    noise: float  # their root mean square
    num_sequences: int  # that the trainer computed together: with other ones it may round otherwise

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sample, FloatArray]], num_sequences: int) -> Canary:
        """`pairs`: a response, and the trainer's log-probs of it."""
        logprobs: dict[bytes, tuple[float, float]] = {}
        gaps: list[FloatArray] = []
        for sample, trainer in pairs:
            mask = sample.loss_mask
            tokens, pair = sample.tokens[mask], (sample.behaviour_logprobs[mask], trainer[mask])
            gaps.append(pair[0] - pair[1])
            logprobs |= {tokens[: i + 1].tobytes(): (float(pair[0][i]), float(pair[1][i])) for i in range(len(tokens))}
        gap = np.concatenate(gaps)
        return cls(logprobs, float(np.max(np.abs(gap), initial=0.0)), _rms(gap), num_sequences)


def kept_weights(before: Canary, after: Canary) -> bool | None:
    """Whether an engine that held the right weights at `before` holds the same ones still; None: it cannot be told.

    Let e and d be the movements of the engine's and of the trainer's log-probs over the N tokens in common, and s the
    noise, the root mean square between engine and trainer at `before`. Two cases can be told with certainty:

    - e is 0, bit by bit, and d is not. The same weights give the same bits where nothing else runs.
    - d is well above the noise: rms(d) >= 4 s and |d| >= 25 s. Then <e, d> / <d, d> is 0 for an engine that stayed,
      up to sqrt(2) s / |d| = 0.06, and above 7/8 for one that moved (the trainer's own noise is part of d).
    """
    common = sorted(before.logprobs.keys() & after.logprobs.keys())
    if len(common) < _MIN_TOKENS:
        return None
    values = np.array([after.logprobs[key] for key in common]) - np.array([before.logprobs[key] for key in common])
    engine, trainer = values.T
    size, noise = _rms(trainer), max(before.noise, 1e-6)
    if not engine.any() and size > noise / 4 and before.num_sequences == after.num_sequences:
        return True
    if size < 4 * noise or size * math.sqrt(len(common)) < 25 * noise:
        return None
    return float(engine @ trainer) < float(trainer @ trainer) / 3


class History:
    """An engine's canaries. Where one step moves the weights too little to tell, several together do not."""

    def __init__(self) -> None:
        self._first: Canary | None = None  # the last from which movement could be told
        self._last: Canary | None = None

    def stayed(self, canary: Canary) -> bool:
        """Whether the engine did not move with the trainer since a canary before."""
        first, last = self._first or canary, self._last or canary
        since_first, since_last = kept_weights(first, canary), kept_weights(last, canary)
        few = 2 * len(first.logprobs.keys() & canary.logprobs.keys()) < len(canary.logprobs)
        self._first = canary if few or since_first is not None else first
        self._last = canary
        return True in (since_first, since_last)


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if len(values) else 0.0


@torch.no_grad()
def forward_logprobs(
    model: LanguageModel, temperature: float, dtype: torch.dtype, samples: Sequence[Sample]
) -> list[FloatArray]:
    """As `Trainer.logprobs`, of a model that nobody trains."""
    device = next(model.parameters()).device
    batch = pack(samples).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        hidden = model(batch.tokens, batch.positions, PackedAttention(batch.cu_seqlens))
        logprobs, _ = chosen_logprobs(
            hidden[batch.targets - 1],
            model.head,
            batch.tokens[batch.targets],
            temperature,
            model.spec.vocab_size,
        )
    flat = np.zeros(len(batch.tokens), np.float32)
    flat[batch.targets.cpu().numpy()] = logprobs.float().cpu().numpy()
    return np.split(flat, np.cumsum([len(sample) for sample in samples])[:-1])
