"""The order in which problems are drawn: shuffled again each epoch, endless, and resumable from five numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pekoe.core.errors import UserError
from pekoe.core.types import IntArray


class DataOrder:
    """Draws problem indices. Each epoch gives every problem once, in an order keyed by (seed, epoch) alone.

    The permutation sorts raw Philox words, whose stream numpy promises never to change; `Generator.permutation`
    makes no such promise. State is a few integers, whatever the number of problems.
    """

    def __init__(self, uids: Sequence[str], seed: int) -> None:
        """`uids` are the problems' names in file order: a resumed run must find the same ones."""
        assert uids, "an order over no problems"
        self._num = len(uids)
        self._seed = seed
        digest = int.from_bytes(hashlib.sha256("\0".join(uids).encode()).digest()[:7], "big")
        self._identity = {"seed": seed, "num_problems": self._num, "uids_digest": digest}
        self._epoch = self._position = 0
        self._permutation = self._permute(0)

    def draw(self, k: int) -> list[tuple[int, int]]:
        """The next `k` pairs (index into uids, epoch). They may straddle epochs; no pair comes twice."""
        drawn: list[tuple[int, int]] = []
        while len(drawn) < k:
            if self._position == self._num:
                self._epoch, self._position = self._epoch + 1, 0
                self._permutation = self._permute(self._epoch)
            stop = min(self._position + k - len(drawn), self._num)
            drawn.extend((int(index), self._epoch) for index in self._permutation[self._position : stop])
            self._position = stop
        return drawn

    def state(self) -> dict[str, int]:
        """The position in the order, for a checkpoint."""
        return self._identity | {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from `state`. Raises UserError where it is of another seed or of other problems, or no state."""
        if not all(type(state.get(key)) is int for key in self.state()) or not 0 <= state["position"] <= self._num:
            raise UserError(f"data order: expected whole numbers {', '.join(self.state())}, got {dict(state)}")
        for (key, own), what in zip(
            self._identity.items(), ("the seed", "problems", "the problems' uids"), strict=True
        ):
            if state[key] != own:
                raise UserError(f"data order: expected {what} of the checkpoint ({state[key]}), got {own}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._permutation = self._permute(self._epoch)

    def _permute(self, epoch: int) -> IntArray:  # [num]
        bits = np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch]))
        return np.argsort(bits.random_raw(self._num), kind="stable").astype(np.int64)
