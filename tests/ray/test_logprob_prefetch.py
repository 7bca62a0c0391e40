"""Log-probs while sampling: which groups are computed together, and what is counted as saved."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from pekoe.core.types import Branch, SampleRef, Trajectory
from pekoe.ray.logprob_prefetch import LogprobPrefetcher, LogprobRefs, PendingLogprobs
from pekoe.ray.store import StoreRef


class Ranks:
    """Each chunk is `busy_s` of work, of which `left_s` is not done yet when it is waited for."""

    def __init__(self, busy_s: float = 0.0, left_s: float = 0.0) -> None:
        self.chunks: list[list[str]] = []
        self._busy_s, self._left_s = busy_s, left_s

    def begin(self, samples: Sequence[SampleRef]) -> PendingLogprobs:
        handles = [sample.handle for sample in samples]
        self.chunks.append([str(handle.key[0]) for handle in handles if isinstance(handle, StoreRef)])
        return self.wait

    def wait(self) -> tuple[LogprobRefs, float]:
        time.sleep(self._left_s)
        return {("key",): StoreRef(0, ("key", "proximal"))}, self._busy_s


def group(uid: str, num_tokens: int = 5) -> list[Trajectory]:
    """Two of 3 tokens of prompt and 5 of response each."""
    branches = [Branch(3, num_tokens, ((0, 0),), StoreRef(0, (uid, 0, i, 0))) for i in range(2)]
    return [Trajectory(uid, 0, i, "stop", (branch,)) for i, branch in enumerate(branches)]


def test_groups_are_computed_in_chunks():
    ranks = Ranks()
    prefetcher = LogprobPrefetcher(ranks.begin, chunk_tokens=32)
    for uid in "abcde":
        prefetcher.add(group(uid))
    assert prefetcher.collect() == {("key",): StoreRef(0, ("key", "proximal"))}
    assert ranks.chunks == [["a", "a", "b", "b"], ["c", "c", "d", "d"]]  # the last group fills no chunk


def test_a_batch_begins_empty():
    ranks = Ranks()
    prefetcher = LogprobPrefetcher(ranks.begin, chunk_tokens=32)
    prefetcher.add(group("a"))
    prefetcher.reset()
    prefetcher.add(group("b"))
    prefetcher.add(group("c"))
    assert ranks.chunks == [["b", "b", "c", "c"]]


def test_empty_responses_have_no_logprobs():
    ranks = Ranks()
    prefetcher = LogprobPrefetcher(ranks.begin, chunk_tokens=16)
    prefetcher.add(group("a", num_tokens=0))
    prefetcher.add(group("b"))
    assert ranks.chunks == [["b", "b"]]


@pytest.mark.parametrize(("left_s", "saved"), [(0.0, 0.6), (0.1, 0.4)])
def test_work_that_is_waited_for_is_not_saved(left_s: float, saved: float):
    prefetcher = LogprobPrefetcher(Ranks(busy_s=0.3, left_s=left_s).begin, chunk_tokens=16)
    prefetcher.add(group("a"))
    prefetcher.add(group("b"))
    prefetcher.collect()
    assert prefetcher.saved_s == pytest.approx(saved, abs=0.05)
