"""Who runs, who waits, and which KV blocks they have. No tensors: the engine does the arithmetic.

Work waits in a queue. Each piece is a context (a prompt, or a preempted sequence's prompt and response so far) and
the sequences that are to continue it: the n samples of a prompt are one piece, so its context is computed once. Full
blocks of the context are shared by all of them; the last, partly filled block is copied for each but the first.

When KV blocks run out the sequence admitted last is preempted: it gives up its blocks and waits again, keeping what
it has sampled; its KV is recomputed when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pekoe.core.types import FinishReason, IntArray, Payload, Prompt, Rollout
from pekoe.engine.blocks import BlockPool, OutOfBlocks
from pekoe.engine.radix import PrefixTree


@dataclass(slots=True, eq=False)
class Sequence:
    """One response being sampled."""

    prompt: Prompt
    sample_index: int
    key: int  # decides its random numbers, see `sampling`
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # while running

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the cache while running: all but the last sampled."""
        return len(self.prompt.tokens) + len(self.tokens) - 1

    def append(self, token: int, logprob: float, version: int) -> None:
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.tokens)))
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def rollout(self, reason: FinishReason) -> Rollout:
        tokens = np.array(self.tokens, np.int64)
        payload = Payload(self.prompt.tokens, tokens, np.array(self.logprobs, np.float32))
        prompt = self.prompt
        return Rollout(
            prompt.uid,
            prompt.draw,
            self.sample_index,
            len(prompt.tokens),
            len(tokens),
            reason,
            tuple(self.versions),
            payload,
        )


@dataclass(slots=True, eq=False)
class Work:
    """A context to compute, and the sequences that continue it."""

    context: IntArray
    sequences: list[Sequence]


@dataclass(slots=True, eq=False)
class Admission:
    """Work now starting: `blocks` hold the context, of which the first `num_cached` tokens are computed already."""

    context: IntArray
    sequences: list[Sequence]
    blocks: list[int]
    num_cached: int
    copies: list[tuple[int, int]]  # (block, its copy), for the partly filled last block


class Scheduler:
    """Admission by free blocks, sharing by prefix, preemption of the latest."""

    def __init__(self, num_blocks: int, block_tokens: int, max_running: int, prefill_tokens: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_tokens)
        self.waiting: deque[Work] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._block_tokens, self._max_running, self._prefill_tokens = block_tokens, max_running, prefill_tokens

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + sum(len(work.sequences) for work in self.waiting)

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def admit(self) -> list[Admission]:
        """Start what fits: in order, within the running places, the free blocks and one forward's tokens.

        The sequences join `running` at once; the caller computes their contexts and appends their first token.
        """
        admitted: list[Admission] = []
        budget = self._prefill_tokens
        while self.waiting and len(self.running) < self._max_running:
            work = self.waiting[0]
            if admitted and len(work.context) > budget:
                break
            admission = self._start(work)
            if admission is None:
                break
            admitted.append(admission)
            budget -= len(work.context) - admission.num_cached
            self.running.extend(admission.sequences)
            if not work.sequences:
                self.waiting.popleft()
            if budget <= 0:
                break
        for admission in admitted:
            self.tree.insert(admission.context, admission.blocks)
        return admitted

    def _start(self, work: Work) -> Admission | None:
        """Take blocks for a piece of work and as many of its sequences as fit; None where not even one does."""
        context = work.context
        cached = self.tree.match(context[:-1])  # the last token is computed always: its logits are wanted
        rest = self.num_blocks_of(len(context)) - len(cached)
        partial = len(context) % self._block_tokens != 0
        # One block a running sequence stays in reserve, so that admission does not cause preemption at once.
        spare = self.pool.num_available - rest - (len(self.running) if self.running else 0)
        count = min(len(work.sequences), self._max_running - len(self.running))
        count = min(count, 1 + max(0, spare) // (1 + partial)) if spare >= 0 else 0
        if count == 0:
            self.pool.release(cached)
            return None
        try:
            fresh = self.pool.take(rest + partial * (count - 1))
        except OutOfBlocks:
            self.pool.release(cached)
            return None
        blocks, extra = cached + fresh[:rest], fresh[rest:]
        started, work.sequences = work.sequences[:count], work.sequences[count:]
        full = blocks[:-1] if partial else blocks
        started[0].blocks = list(blocks)
        for position, sequence in enumerate(started[1:]):
            self.pool.retain(full)
            sequence.blocks = [*full, extra[position]] if partial else list(full)
        copies = [(blocks[-1], copy) for copy in extra]
        return Admission(context, started, blocks, len(cached) * self._block_tokens, copies)

    def reserve(self) -> None:
        """Give every running sequence room for the KV of its next token, preempting the latest where it must."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            if sequence.num_computed < len(sequence.blocks) * self._block_tokens:
                position += 1
                continue
            try:
                sequence.blocks += self.pool.take(1)
            except OutOfBlocks:
                assert len(self.running) > 1, "one sequence must always fit: the engine checks it at the call"
                self.preempt(self.running[-1])
        assert self.running or not self.num_unfinished

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away; it waits first in line and keeps what it has sampled."""
        self._leave(sequence)
        context = np.concatenate([sequence.prompt.tokens, np.array(sequence.tokens, np.int64)])
        self.waiting.appendleft(Work(context, [sequence]))
        self.num_preemptions += 1

    def preempt_all(self) -> None:
        for sequence in reversed(list(self.running)):
            self.preempt(sequence)

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Give up finished sequences' blocks."""
        gone = set(sequences)
        if gone:
            self.running = [s for s in self.running if s not in gone]
            for sequence in gone:
                self.pool.release(sequence.blocks)
                sequence.blocks = []

    def abort(self, uids: set[str] | None) -> list[Sequence]:
        """Remove unfinished sequences of these problems (None: all), and return them."""

        def hit(sequence: Sequence) -> bool:
            return uids is None or sequence.prompt.uid in uids

        gone = [s for s in self.running if hit(s)]
        self.finish(gone)
        for work in self.waiting:
            gone += [s for s in work.sequences if hit(s)]
            work.sequences = [s for s in work.sequences if not hit(s)]
        self.waiting = deque(work for work in self.waiting if work.sequences)
        return gone

    def check_integrity(self) -> None:
        """Prove I7: every block is free, cached or in use, as the running sequences and the tree say."""
        users: dict[int, int] = {}
        for sequence in self.running:
            for block in sequence.blocks:
                users[block] = users.get(block, 0) + 1
        self.pool.check_integrity(users, self.tree.blocks())

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
