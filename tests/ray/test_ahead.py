"""Log-probs ahead: which groups are computed together, and what it counts as saved."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import pytest

from pekoe.core.types import Payload, SampleRef
from pekoe.ray.logprob_prefetch import LogprobPrefetcher


class Ranks:
    """Takes what it is asked for; each chunk was `busy_s` of work, of which `left_s` is not done yet."""

    def __init__(self, busy_s: float = 0.0, left_s: float = 0.0) -> None:
        self.chunks: list[list[int]] = []
        self._busy_s, self._left_s = busy_s, left_s
        self.least = 1

    def can_share(self, samples: list[SampleRef]) -> bool:
        return len(samples) >= self.least

    def ask_ahead(self, samples: list[SampleRef]) -> Any:
        self.chunks.append([sample.group for sample in samples])
        return len(self.chunks)

    def keep_ahead(self, asked: Any) -> float:
        time.sleep(self._left_s)
        return self._busy_s


def samples(row: int) -> list[SampleRef]:
    """Two of 8 tokens each."""
    payload = Payload(np.arange(3), np.arange(5), np.zeros(5, np.float32))
    return [SampleRef(3, 5, payload, 0.0, row, i) for i in range(2)]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 4, 3, 2]])
def test_chunks_are_the_same_whatever_is_finished_first(order: list[int]):
    ranks = Ranks()
    ahead = LogprobPrefetcher(cast(Any, ranks), chunk_tokens=32)
    for row in order:
        ahead.add(row, samples(row))
    ahead.end()
    assert ranks.chunks == [[0, 0, 1, 1], [2, 2, 3, 3]]  # the last group fills no chunk: it is left to the others


def test_a_batch_begins_empty():
    ranks = Ranks()
    ahead = LogprobPrefetcher(cast(Any, ranks), chunk_tokens=32)
    ahead.add(0, samples(0))
    ahead.begin()
    ahead.add(0, samples(0))
    ahead.add(1, samples(1))
    assert ranks.chunks == [[0, 0, 1, 1]]


def test_work_that_is_waited_for_is_not_saved():
    for left_s, saved in ((0.0, 0.6), (0.1, 0.4)):
        ahead = LogprobPrefetcher(cast(Any, Ranks(busy_s=0.3, left_s=left_s)), chunk_tokens=16)
        ahead.add(0, samples(0))
        ahead.add(1, samples(1))
        ahead.end()
        assert ahead.saved_s == pytest.approx(saved, abs=0.05)


def test_a_chunk_that_cannot_go_round_waits_for_more():
    ranks = Ranks()
    ranks.least = 5
    ahead = LogprobPrefetcher(cast(Any, ranks), chunk_tokens=32)
    for row in range(4):
        ahead.add(row, samples(row))
    assert ranks.chunks == [[0, 0, 1, 1, 2, 2]]
