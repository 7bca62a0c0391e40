"""Log-probs of responses that are sampled already, computed by the ranks while others are still being sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pekoe.core.types import FloatArray, SampleRef, Trajectory
from pekoe.ray.store import Key, StoreRef

LogprobRefs = dict[Key, StoreRef[FloatArray]]
"""Where log-probs are, by the key of the record that they belong to."""
PendingLogprobs = Callable[[], tuple[LogprobRefs, float]]
"""Waits for log-probs; also returns for how long a rank worked on them, on average."""


class LogprobPrefetcher:
    """For `algo.proximal = "recompute"`. Its `add` is the `on_group` of `run.rollouts.Rollouts`.

    Groups come in the order in which they were put, and are computed in chunks that fill a micro-batch of each rank:
    which samples are computed together does not depend on which group was finished first.

    Args:
        begin: has the ranks compute log-probs; does not wait.
        chunk_tokens: of a chunk, at least.
    """

    def __init__(self, begin: Callable[[Sequence[SampleRef]], PendingLogprobs], chunk_tokens: int) -> None:
        self._begin, self._chunk_tokens = begin, chunk_tokens
        self.saved_s = 0.0  # of the ranks' work, that which took place while there was still sampling to do
        self.reset()

    def reset(self) -> None:
        """Forget the batch in hand: its records are of no use any more."""
        self._chunk: list[SampleRef] = []
        self._pending: list[PendingLogprobs] = []

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """All trajectories of a group."""
        for t in trajectories:
            for b in t.branches:
                if b.num_tokens:  # log-probs do not depend on the advantage, nor on the group's place
                    size = b.num_prompt_tokens + b.num_tokens
                    self._chunk.append(SampleRef(size, b.num_tokens, b.handle, 0, 0, t.sample))
        if sum(map(len, self._chunk)) >= self._chunk_tokens:
            self._pending.append(self._begin(self._chunk))
            self._chunk = []

    def collect(self) -> LogprobRefs:
        """Everything is sampled: wait for what was begun. The rest of the last chunk is not computed here."""
        start, worked = time.perf_counter(), 0.0
        refs: LogprobRefs = {}
        for wait in self._pending:
            more, busy_s = wait()
            refs |= more
            worked += busy_s
        self.saved_s += max(0.0, worked - (time.perf_counter() - start))
        self.reset()
        return refs
