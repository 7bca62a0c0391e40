"""Log-probs of what is sampled already, computed by the ranks while the last responses are still being sampled."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pekoe.core.types import SampleRef
from pekoe.ray.trainer_proxy import Asked, ClusterTrainer


class LogprobPrefetcher:
    """For `algo.proximal = "recompute"`.

    Groups are taken in their order in the batch, in chunks that fill a micro-batch of each rank: what is computed
    together does not depend on which group was finished first.

    Args:
        trainer: the ranks; it keeps what is found, and does not compute it again.
        chunk_tokens: of a chunk, at least.
    """

    def __init__(self, trainer: ClusterTrainer, chunk_tokens: int) -> None:
        self._trainer, self._chunk_tokens = trainer, chunk_tokens
        self.saved_s = 0.0
        """Seconds of the ranks' work that took place while there was still sampling to do; whoever tells resets it."""
        self.begin()

    def begin(self) -> None:
        """A batch begins."""
        self._whole: dict[int, Sequence[SampleRef]] = {}
        self._next, self._chunk, self._size = 0, list[SampleRef](), 0
        self._asked: list[Asked] = []

    def add(self, row: int, samples: Sequence[SampleRef]) -> None:
        """All samples of the batch's group `row`."""
        self._whole[row] = samples
        while self._next in self._whole:
            samples = self._whole.pop(self._next)
            self._next += 1
            self._chunk += samples
            self._size += sum(len(sample) for sample in samples)
            if self._size >= self._chunk_tokens and self._trainer.can_share(self._chunk):
                self._asked.append(self._trainer.ask_ahead(self._chunk))
                self._chunk, self._size = [], 0

    def end(self) -> None:
        """All is sampled. What is left of the last chunk is computed with the others that are missing."""
        start = time.perf_counter()
        worked = sum(self._trainer.keep_ahead(asked) for asked in self._asked)
        self.saved_s += max(0.0, worked - (time.perf_counter() - start))
        self.begin()
