"""The only bridge from trainer to engine: bring the weights over as a numbered version, and prove it (I4)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from pekoe.core.errors import RunError
from pekoe.core.types import Prompt, Sample, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.train import Trainer

CANARY_TOKENS = 8
TOLERANCE, TOLERANCE_BF16 = 1e-3, 0.5  # max abs difference of log-probs; a stale cache is off by 0.7 to 2 nats


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync cost and proved."""

    version: int
    seconds: float
    copied_bytes: int
    canary_diff: float


class InProcessSync:
    """Trainer and engine share their parameters: nothing is copied, caches are flushed.

    A canary prompt is sampled after each sync and its log-probs compared with the trainer's forward.
    """

    def __init__(self, trainer: Trainer, engine: EmbeddedEngine, canary: Prompt) -> None:
        self._trainer, self._engine, self._canary = trainer, engine, canary

    def __call__(self, version: int) -> SyncReport:
        """Make the engine sample at `version`; RunError if it does not hold the trainer's weights."""
        start = time.perf_counter()
        self._engine.update_weights(self._trainer.model, version)
        diff = self._probe()
        limit = TOLERANCE_BF16 if self._trainer.compute_dtype is torch.bfloat16 else TOLERANCE
        if self._engine.version != version or not diff <= limit:
            raise RunError(
                f"weight sync: expected the engine at version {version} with log-probs within {limit} of the "
                f"trainer's, got version {self._engine.version} and {diff}"
            )
        return SyncReport(version, time.perf_counter() - start, 0, diff)

    def _probe(self) -> float:
        """Max abs difference between the engine's log-probs of a short response and the trainer's."""
        room = self._engine.max_sequence_tokens - len(self._canary.tokens)
        params = SamplingParams(
            max_new_tokens=min(CANARY_TOKENS, room), temperature=self._trainer.temperature, stream="eval"
        )
        (rollout,) = self._engine.generate([self._canary], params)
        payload = rollout.payload.resolve()
        tokens = np.concatenate([payload.prompt_tokens, payload.tokens])
        mask = np.arange(len(tokens)) >= len(payload.prompt_tokens)
        blank = np.zeros(len(tokens), np.float32)
        trained = self._trainer.logprobs([Sample(tokens, mask, blank, blank)])[0][mask]
        return float(np.abs(trained - payload.logprobs).max())
