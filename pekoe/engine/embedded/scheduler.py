"""Who runs, who waits, and which KV blocks they have. No tensors: the engine does the arithmetic.

Work waits in a queue. Each piece is a context (a prompt, or a preempted sequence's prompt and response so far) and
the sequences that are to continue it: the n samples of a prompt are one piece, so its context is computed once. Full
blocks of the context are shared by all of them; the last, partly filled block is copied for each but the first.

A forward takes one token of every running sequence and, with what its token budget leaves, chunks of contexts. Work
whose context is not complete yet is in `prefilling`.

When KV blocks run out what was admitted last is preempted: it gives up its blocks and waits again, keeping what it
has sampled; its KV is recomputed when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pekoe.core.types import IntArray
from pekoe.engine.embedded.blocks import BlockPool, OutOfBlocks
from pekoe.engine.embedded.radix import PrefixTree
from pekoe.engine.embedded.slots import Sequence, Slots


@dataclass(slots=True, eq=False)
class Work:
    """A context to compute, and the sequences that continue it."""

    context: IntArray
    sequences: list[Sequence]


@dataclass(slots=True, eq=False)
class Prefill:
    """Work whose context is being computed into `blocks`, which it holds, as its sequences hold theirs."""

    context: IntArray
    sequences: list[Sequence]
    blocks: list[int]
    num_cached: int  # tokens found in the prefix tree
    num_computed: int  # tokens in the cache by now


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..stop of a context, computed in one forward."""

    prefill: Prefill
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        return self.stop == len(self.prefill.context)


class Scheduler:
    """Admission by free blocks, sharing by prefix, preemption of the latest."""

    def __init__(
        self, num_blocks: int, block_tokens: int, max_running: int, prefill_tokens: int, max_sequence_tokens: int
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_tokens)
        self.waiting: deque[Work] = deque()
        self.prefilling: list[Prefill] = []  # in order of admission
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._block_tokens, self._max_running, self._prefill_tokens = block_tokens, max_running, prefill_tokens
        self.slots = Slots(max_running, self.num_blocks_of(max_sequence_tokens) + 1)
        self.order = np.empty(0, np.int64)  # slots of `running`

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + sum(len(w.sequences) for w in (*self.prefilling, *self.waiting))

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def plan(self) -> list[Chunk]:
        """Make room for the next token of every running sequence, and choose the chunks that are computed with them.

        The caller computes both, then calls `advance`.
        """
        self._reserve()
        budget = max(self._prefill_tokens - len(self.running), self._block_tokens)
        chunks: list[Chunk] = []
        while budget > 0:
            if len(chunks) == len(self.prefilling) and not self._admit():
                break
            prefill = self.prefilling[len(chunks)]
            start = prefill.num_computed
            stop = min(len(prefill.context), start + budget)
            chunks.append(Chunk(prefill, start, stop))
            # Whoever is planned after this, in the same forward too, reads these blocks after they are written.
            self.tree.insert(prefill.context[:stop], prefill.blocks)
            budget -= stop - start
        assert chunks or self.running or not self.waiting, "work waits that can never be admitted"
        return chunks

    def _admit(self) -> bool:
        """Start the first piece of waiting work, if it fits the places and the free blocks."""
        prefilling = sum(len(p.sequences) for p in self.prefilling)
        places = self._max_running - len(self.running) - prefilling
        if not self.waiting or places <= 0:
            return False
        work = self.waiting[0]
        prefill = self._start(work, places, len(self.running) + prefilling)
        if prefill is not None:
            self.prefilling.append(prefill)
            if not work.sequences:
                self.waiting.popleft()
        return prefill is not None

    def _start(self, work: Work, places: int, num_started: int) -> Prefill | None:
        """Take blocks for a piece of work and as many of its sequences as fit; None where not even one does."""
        context = work.context
        cached = self.tree.match(context[:-1])  # the last token is computed always: its logits are wanted
        rest = self.num_blocks_of(len(context)) - len(cached)
        partial = len(context) % self._block_tokens != 0
        # One block a started sequence stays in reserve, so that admission does not cause preemption at once.
        spare = self.pool.num_available - rest - num_started
        count = min(len(work.sequences), places)
        count = min(count, 1 + max(0, spare) // (1 + partial)) if spare >= 0 else 0
        if count == 0:
            self.pool.release(cached)
            return None
        fresh = self.pool.take(rest + partial * (count - 1))  # as many as `spare` says there are
        blocks, extra = cached + fresh[:rest], fresh[rest:]
        started, work.sequences = work.sequences[:count], work.sequences[count:]
        full = blocks[:-1] if partial else blocks
        self.pool.retain(blocks)  # the first sequence's; those above are the prefill's own
        started[0].blocks = list(blocks)
        for position, sequence in enumerate(started[1:]):
            self.pool.retain(full)
            sequence.blocks = [*full, extra[position]] if partial else list(full)
        num_cached = len(cached) * self._block_tokens
        return Prefill(context, started, blocks, num_cached, num_cached)

    def advance(self, chunks: list[Chunk], version: int) -> list[tuple[int, int]]:
        """These chunks are computed. Sequences whose context is complete run from now on; their first token is next.

        Returns (block, its copy) for partly filled last blocks, to be copied before anything else is computed.
        """
        copies: list[tuple[int, int]] = []
        for chunk in chunks:
            prefill = chunk.prefill
            prefill.num_computed = chunk.stop
            if chunk.completes:
                last = prefill.blocks[-1]
                copies += [(last, s.blocks[-1]) for s in prefill.sequences if s.blocks[-1] != last]
                for sequence in prefill.sequences:
                    self.slots.join(sequence, version)
                self.running += prefill.sequences
                self.prefilling.remove(prefill)
                self.pool.release(prefill.blocks)
        self._reorder()
        return copies

    def _reserve(self) -> None:
        """Give every running sequence room for the KV of its next token, preempting the latest where it must."""
        slots = self.slots
        short = slots.computed[self.order] >= slots.num_blocks[self.order] * self._block_tokens
        for sequence in [self.running[i] for i in np.flatnonzero(short)]:
            while sequence.slot >= 0:  # it may itself be the latest
                try:
                    block = self.pool.take(1)
                except OutOfBlocks:
                    assert len(self.running) > 1 or self.prefilling, "one sequence must always fit: checked at the call"
                    self._preempt_latest()
                else:
                    sequence.blocks += block
                    slots.extend(sequence, block)
                    break
        self._reorder()

    def _preempt_latest(self) -> None:
        """Take away the blocks of what was admitted last; it waits first in line and keeps what it has sampled."""
        if self.prefilling:
            prefill = self.prefilling.pop()
            self.pool.release(prefill.blocks)
            for sequence in prefill.sequences:
                self._release(sequence)
            self.waiting.appendleft(Work(prefill.context, prefill.sequences))
            self.num_preemptions += len(prefill.sequences)
            return
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(Work(np.concatenate([sequence.prompt.tokens, sequence.tokens]), [sequence]))
        self.num_preemptions += 1

    def preempt_all(self) -> None:
        while self.prefilling or self.running:
            self._preempt_latest()
        self._reorder()

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Give up finished sequences' blocks."""
        gone = set(sequences)
        if gone:
            self.running = [s for s in self.running if s not in gone]
            for sequence in gone:
                self._release(sequence)
            self._reorder()

    def abort(self, uids: set[str] | None) -> list[Sequence]:
        """Remove unfinished sequences of these problems (None: all), and return them."""

        def hit(sequence: Sequence) -> bool:
            return uids is None or sequence.prompt.uid in uids

        gone = [s for s in self.running if hit(s)]
        self.finish(gone)
        for prefill in self.prefilling:
            out = [s for s in prefill.sequences if hit(s)]
            for sequence in out:
                self._release(sequence)
            prefill.sequences = [s for s in prefill.sequences if not hit(s)]
            if not prefill.sequences:
                self.pool.release(prefill.blocks)
            gone += out
        self.prefilling = [p for p in self.prefilling if p.sequences]
        for work in self.waiting:
            gone += [s for s in work.sequences if hit(s)]
            work.sequences = [s for s in work.sequences if not hit(s)]
        self.waiting = deque(work for work in self.waiting if work.sequences)
        return gone

    def check_integrity(self) -> None:
        """Prove I7: every block is free, cached or in use, as the sequences and the tree say."""
        users: dict[int, int] = {}
        holders = [s.blocks for s in self.running]
        for prefill in self.prefilling:
            holders += [prefill.blocks, *(s.blocks for s in prefill.sequences)]
        for blocks in holders:
            for block in blocks:
                users[block] = users.get(block, 0) + 1
        self.pool.check_integrity(users, self.tree.blocks())

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self.slots.leave(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _reorder(self) -> None:
        self.order = np.array([s.slot for s in self.running], np.int64)
