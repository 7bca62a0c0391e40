"""Log-probs of what is sampled already, computed by the ranks while the last responses are still being sampled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from pekoe.core.types import FloatArray, SampleRef, Trajectory
from pekoe.ray.store import Key, StoreRef

LogprobRefs = dict[Key, StoreRef[FloatArray]]
"""Where log-probs are, by the key of the record that they belong to."""


class PendingLogprobs(Protocol):
    """Log-probs that the ranks were asked for."""

    def wait(self) -> tuple[LogprobRefs, float]:
        """Also returns for how long a rank worked on them, on average."""
        ...


class Ranks(Protocol):
    def begin_logprobs(self, samples: Sequence[SampleRef], reference: bool) -> PendingLogprobs: ...


class LogprobPrefetcher:
    """For `algo.proximal = "recompute"`. Its `add` is the `on_group` of `run.rollouts.Rollouts`.

    Groups come in the order in which they were put, and are computed in chunks that fill a micro-batch of each rank:
    what is computed together does not depend on which group was finished first.

    Args:
        ranks: compute.
        chunk_tokens: of a chunk, at least.
    """

    def __init__(self, ranks: Ranks, chunk_tokens: int) -> None:
        self._ranks, self._chunk_tokens = ranks, chunk_tokens
        self.saved_s = 0.0
        """Seconds of the ranks' work that took place while there was still sampling to do."""
        self.reset()

    def reset(self) -> None:
        """Forget the batch in hand: its records are of no use any more."""
        self._chunk: list[SampleRef] = []
        self._pending: list[PendingLogprobs] = []

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """All trajectories of a group."""
        self._chunk += [_sample_of(trajectory) for trajectory in trajectories if trajectory.num_tokens]
        if sum(map(len, self._chunk)) >= self._chunk_tokens:
            self._pending.append(self._ranks.begin_logprobs(self._chunk, False))
            self._chunk = []

    def collect(self) -> LogprobRefs:
        """Everything is sampled: wait for what was begun. The rest of the last chunk is not computed here."""
        start, worked = time.perf_counter(), 0.0
        refs: LogprobRefs = {}
        for pending in self._pending:
            some, busy_s = pending.wait()
            refs |= some
            worked += busy_s
        self.saved_s += max(0.0, worked - (time.perf_counter() - start))
        self.reset()
        return refs


def _sample_of(trajectory: Trajectory) -> SampleRef:
    """A sample for its log-probs, which do not depend on the reward."""
    t = trajectory
    return SampleRef(t.num_prompt_tokens + t.num_tokens, t.num_tokens, t.handle, 0.0, 0, t.sample)
