"""The running sequences as rows of arrays, so that a forward is prepared, and its tokens taken in, without a loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pekoe.core.types import FinishReason, FloatArray, IntArray, Payload, Prompt, Rollout


@dataclass(slots=True, eq=False)
class Sequence:
    """One response being sampled. While it runs its newest tokens are in its slot; `Slots.leave` brings them back."""

    prompt: Prompt
    sample_index: int
    key: int  # decides its random numbers, see `sampling`
    most: int  # response tokens at which it ends
    tokens: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    logprobs: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # while it runs or its context is being computed
    slot: int = -1  # while it runs

    def rollout(self, reason: FinishReason) -> Rollout:
        prompt, size = self.prompt, len(self.tokens)
        payload = Payload(prompt.tokens, self.tokens, self.logprobs)
        place = (prompt.uid, prompt.draw, self.sample_index, len(prompt.tokens))
        return Rollout(*place, size, reason, tuple(self.versions), payload)


class Slots:
    """What the forward needs of each running sequence, by slot."""

    def __init__(self, num_slots: int, num_blocks: int) -> None:
        self.tables = np.zeros((num_slots, num_blocks), np.int32)
        self.computed = np.zeros(num_slots, np.int64)  # tokens whose KV is in the cache: all but the last sampled
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.last = np.zeros(num_slots, np.int64)  # the last sampled token
        self.keys = np.zeros(num_slots, np.uint64)
        self.sampled = np.zeros(num_slots, np.int64)  # response tokens
        self.most = np.zeros(num_slots, np.int64)  # response tokens at which it ends
        self.prompt = np.zeros(num_slots, np.int64)  # equal for samples of one prompt
        self._tokens = np.zeros((num_slots, 64), np.int64)
        self._logprobs = np.zeros((num_slots, 64), np.float32)
        self._free = list(range(num_slots - 1, -1, -1))

    def join(self, sequence: Sequence, version: int) -> None:
        """Give a sequence a slot. Its context is computed, its next token not yet sampled."""
        slot = sequence.slot = self._free.pop()
        size = len(sequence.tokens)
        if not sequence.versions or sequence.versions[-1][0] != version:
            sequence.versions.append((version, size))
        self.num_blocks[slot] = 0
        self.extend(sequence, sequence.blocks)
        self.computed[slot] = len(sequence.prompt.tokens) + size - 1
        self.keys[slot], self.sampled[slot], self.prompt[slot] = sequence.key, size, id(sequence.prompt)
        self.most[slot] = sequence.most
        self._grow(size)
        self._tokens[slot, :size], self._logprobs[slot, :size] = sequence.tokens, sequence.logprobs

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        """Enter blocks that a sequence got."""
        slot = sequence.slot
        count = self.num_blocks[slot]
        self.tables[slot, count : count + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def append(self, slots: IntArray, tokens: IntArray, logprobs: FloatArray) -> None:
        """Take in one sampled token for each of these slots."""
        places = self.sampled[slots]
        self._grow(int(places.max()) + 1)
        self._tokens[slots, places] = tokens
        self._logprobs[slots, places] = logprobs
        self.last[slots] = tokens
        self.sampled[slots] += 1
        self.computed[slots] += 1

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's slot away; it keeps what was sampled."""
        slot, size = sequence.slot, int(self.sampled[sequence.slot])
        sequence.tokens, sequence.logprobs = self._tokens[slot, :size].copy(), self._logprobs[slot, :size].copy()
        sequence.slot = -1
        self._free.append(slot)

    def _grow(self, size: int) -> None:
        width = self._tokens.shape[1]
        if size > width:
            more = ((0, 0), (0, max(size, 2 * width) - width))
            self._tokens, self._logprobs = np.pad(self._tokens, more), np.pad(self._logprobs, more)
