"""Which sequences run, which wait, and which KV blocks they have. No tensors: the engine does the arithmetic.

Work waits in a queue, higher priorities first. A piece of work is a context (a prompt, or a preempted sequence's prompt
and response so far) and the sequences that continue it: the requests of one group are one piece, so their prompt is
computed once. They share the full blocks of the context; the last, partly filled one is copied for each but the first.

A forward takes one token of every running sequence and, with the rest of its token budget, chunks of contexts. Work
whose context is not complete yet is in `prefilling`.

Where every layer of the model has a window, a block of a response that fell out of the widest is given back.

When KV blocks run out, the work admitted last is preempted: it gives up its blocks and waits again, first of its
priority, keeping the tokens sampled so far; its KV is recomputed when it is admitted again.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from pekoe.core.types import (
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    Record,
    Request,
    RoutingArray,
    SamplingParams,
)
from pekoe.engine.embedded.cache_manager import KVCacheManager


@dataclass(slots=True, eq=False)
class Sequence:
    """One response being sampled. While it runs, its newest tokens are in the `RequestTable`."""

    request: Request
    key: int  # decides its random numbers, see `engine.sampling`
    group: int  # equal for sequences that were submitted as one piece of work
    future: Future[Completion] = field(default_factory=Future)
    tokens: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    logprobs: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # while it runs or its context is being computed
    num_kept: int = 0  # the first of these, of its context: the prefix tree may hold them
    num_given_back: int = 0  # of the blocks after them
    num_cached: int = 0  # tokens of its prompt found in the prefix tree
    row: int = -1  # in the table, while it runs
    num_told: int = 0  # tokens that its listener has heard of
    routing: RoutingArray | None = None  # of all its tokens but the last, when it is finished

    def completion(self, finish: FinishReason) -> Completion:
        record = Record.of(self.request.tokens, self.tokens, self.logprobs, self.routing)
        return Completion(len(self.tokens), finish, tuple(self.versions), record, self.num_cached)


class RequestTable:
    """The decoding state of running sequences as arrays, a row each: preparing and storing a forward is vectorised."""

    def __init__(self, num_rows: int, num_blocks: int) -> None:
        self.tables = np.zeros((num_rows, num_blocks), np.int32)
        self.computed = np.zeros(num_rows, np.int64)  # tokens whose KV is in the cache: all but the last sampled
        self.num_blocks = np.zeros(num_rows, np.int64)
        self.last = np.zeros(num_rows, np.int64)  # the last sampled token
        self.keys = np.zeros(num_rows, np.uint64)
        self.sampled = np.zeros(num_rows, np.int64)  # response tokens
        self.most = np.zeros(num_rows, np.int64)  # response tokens at which it ends
        self.group = np.zeros(num_rows, np.int64)
        self.params: list[SamplingParams] = []  # those that differ in how a row is sampled
        self.params_index = np.zeros(num_rows, np.int64)  # into `params`
        self._tokens = np.zeros((num_rows, 64), np.int64)
        self._logprobs = np.zeros((num_rows, 64), np.float32)
        self._free = list(range(num_rows - 1, -1, -1))

    def join(self, sequence: Sequence, version: int) -> None:
        """Give a sequence a row. Its context is computed, its next token not yet sampled."""
        if len(self._free) == len(self.last):
            self.params.clear()
        row = sequence.row = self._free.pop()
        request, size = sequence.request, len(sequence.tokens)
        if not sequence.versions or sequence.versions[-1][0] != version:
            sequence.versions.append((version, size))
        self.num_blocks[row] = 0
        self.extend(sequence, sequence.blocks)
        self.computed[row] = len(request.tokens) + size - 1
        self.keys[row], self.sampled[row], self.group[row] = sequence.key, size, sequence.group
        self.most[row] = request.params.max_new_tokens
        params = request.params
        params = replace(params, n=1, seed=0, stream="train", max_new_tokens=max(1, params.min_new_tokens))
        if params not in self.params:
            self.params.append(params)
        self.params_index[row] = self.params.index(params)
        self._grow(size)
        self._tokens[row, :size], self._logprobs[row, :size] = sequence.tokens, sequence.logprobs

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        """Enter blocks that a sequence was given."""
        row = sequence.row
        count = self.num_blocks[row]
        self.tables[row, count : count + len(blocks)] = blocks
        self.num_blocks[row] += len(blocks)

    def append(self, rows: IntArray, tokens: IntArray, logprobs: FloatArray) -> None:
        """Store one sampled token for each of these rows."""
        places = self.sampled[rows]
        self._grow(int(places.max(initial=0)) + 1)
        self._tokens[rows, places] = tokens
        self._logprobs[rows, places] = logprobs
        self.last[rows] = tokens
        self.sampled[rows] += 1
        self.computed[rows] += 1

    def sampled_since(self, sequence: Sequence, start: int) -> IntArray:
        """The tokens of a sequence that runs, from its token `start` on."""
        return self._tokens[sequence.row, start : self.sampled[sequence.row]].copy()

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's row away; it keeps what was sampled."""
        row, size = sequence.row, int(self.sampled[sequence.row])
        sequence.tokens, sequence.logprobs = self._tokens[row, :size].copy(), self._logprobs[row, :size].copy()
        sequence.row = -1
        self._free.append(row)

    def _grow(self, size: int) -> None:
        width = self._tokens.shape[1]
        if size > width:
            more = ((0, 0), (0, max(size, 2 * width) - width))
            self._tokens, self._logprobs = np.pad(self._tokens, more), np.pad(self._logprobs, more)


@dataclass(slots=True, eq=False)
class Work:
    """A context to compute, and the sequences that continue it. While it is computed it holds `blocks`."""

    context: IntArray
    sequences: list[Sequence]
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens found in the prefix tree
    num_computed: int = 0  # tokens in the cache by now


def _urgency(work: Work) -> int:
    """Work waits in rising order of it."""
    return -work.sequences[0].request.priority


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..stop of a context, computed in one forward."""

    work: Work
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        return self.stop == len(self.work.context)


class Scheduler:
    """Admission by free blocks, sharing by prefix, preemption of the latest."""

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        max_running: int,
        prefill_tokens: int,
        max_sequence_tokens: int,
        window: int | None = None,
    ) -> None:
        """`window`: tokens that a token sees in the layer that sees most, itself the last of them; None: all."""
        self._window = window
        self.cache = KVCacheManager(num_blocks, block_tokens)
        self.waiting: deque[Work] = deque()
        self.prefilling: list[Work] = []  # in order of admission
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._block_tokens, self._max_running, self._prefill_tokens = block_tokens, max_running, prefill_tokens
        self.table = RequestTable(max_running, self.num_blocks_of(max_sequence_tokens) + 1)

    @property
    def order(self) -> IntArray:
        """Rows of `running` in the table."""
        return np.array([s.row for s in self.running], np.int64)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.prefilling or self.waiting)

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def enqueue(self, work: Work) -> None:
        """Let work wait behind all of its priority and above."""
        insort_right(self.waiting, work, key=_urgency)

    def plan(self) -> list[Chunk]:
        """Make room for the next token of every running sequence, and choose the chunks that are computed with them
        before `advance`."""
        self._reserve()
        budget = max(self._prefill_tokens - len(self.running), self._block_tokens)
        chunks: list[Chunk] = []
        while budget > 0:
            if len(chunks) == len(self.prefilling) and not self._admit():
                break
            work = self.prefilling[len(chunks)]
            start = work.num_computed
            stop = min(len(work.context), start + budget)
            chunks.append(Chunk(work, start, stop))
            # Work that is planned after this, in the same forward too, reads these blocks after they are written.
            self.cache.insert_prefix(work.context[:stop], work.blocks)
            budget -= stop - start
        assert chunks or self.running or not self.waiting, "work waits that can never be admitted"
        return chunks

    def _admit(self) -> bool:
        """Start as many sequences of the first waiting work as have a place and free blocks; False where none has."""
        num_started = len(self.running) + sum(len(work.sequences) for work in self.prefilling)
        places = self._max_running - num_started
        if not self.waiting or places <= 0:
            return False
        work = self.waiting[0]
        cached = self.cache.match_prefix(work.context[:-1])  # the last token is computed always, for its logits
        rest = self.num_blocks_of(len(work.context)) - len(cached)
        partial = len(work.context) % self._block_tokens != 0
        # One block a started sequence stays in reserve, so that admission does not cause preemption at once.
        spare = self.cache.num_available - rest - num_started
        if spare < 0:
            self.cache.release(cached)
            return False
        count = min(len(work.sequences), places, 1 + spare // (1 + partial))
        fresh = self.cache.allocate(rest + partial * (count - 1))  # as many as `spare` says there are
        blocks = cached + fresh[:rest]
        full, lasts = (blocks[:-1], [blocks[-1], *fresh[rest:]]) if partial else (blocks, [])
        num_cached = len(cached) * self._block_tokens
        started, work.sequences = work.sequences[:count], work.sequences[count:]
        self.cache.retain(lasts[:1])  # the first sequence's and the work's own
        for i, sequence in enumerate(started):
            self.cache.retain(full)
            sequence.blocks = full + lasts[i : i + 1]
            if not sequence.versions:  # its first start: the context is its prompt
                sequence.num_cached = num_cached
        if not work.sequences:
            self.waiting.popleft()
        self.prefilling.append(Work(work.context, started, blocks, num_cached, num_cached))
        return True

    def advance(self, chunks: list[Chunk], version: int) -> list[tuple[int, int]]:
        """These chunks are computed. Sequences whose context is complete run from now on; their first token is next.

        Returns (block, its copy) for partly filled last blocks, to be copied before anything else is computed.
        """
        copies: list[tuple[int, int]] = []
        for chunk in chunks:
            work = chunk.work
            work.num_computed = chunk.stop
            if chunk.completes:
                last = work.blocks[-1]
                copies += [(last, s.blocks[-1]) for s in work.sequences if s.blocks[-1] != last]
                for sequence in work.sequences:
                    sequence.num_kept, sequence.num_given_back = len(sequence.blocks), 0
                    self.table.join(sequence, version)
                self.running += work.sequences
                self.prefilling.remove(work)
                self.cache.release(work.blocks)
        return copies

    def _reserve(self) -> None:
        """Give every running sequence room for the KV of its next token, preempting the latest where it must."""
        if self._window is not None:
            self._give_back(self._window)
        table, order = self.table, self.order
        short = table.computed[order] >= table.num_blocks[order] * self._block_tokens
        for sequence in [self.running[i] for i in np.flatnonzero(short)]:
            while sequence.row >= 0 and not self.cache.num_available:  # it may itself be the latest
                assert len(self.running) > 1 or self.prefilling, "one sequence must always fit: checked at the call"
                self._preempt_latest()
            if sequence.row >= 0:
                block = self.cache.allocate(1)
                sequence.blocks += block
                table.extend(sequence, block)

    def _give_back(self, window: int) -> None:
        """Free the blocks of responses that no later token sees."""
        for sequence in self.running:
            unseen = max(0, int(self.table.computed[sequence.row]) + 1 - window) // self._block_tokens
            first = sequence.num_kept
            number = unseen - first - sequence.num_given_back
            if number > 0:
                self.cache.release(sequence.blocks[first : first + number])
                del sequence.blocks[first : first + number]
                sequence.num_given_back += number

    def _preempt_latest(self) -> None:
        """What was admitted last gives up its blocks, and waits before all of its priority and below."""
        if self.prefilling:
            work = self.prefilling.pop()
            self.cache.release(work.blocks)
            self._release(work.sequences)
            work = Work(work.context, work.sequences)
        else:
            sequence = self.running.pop()
            self._release([sequence])
            work = Work(np.concatenate([sequence.request.tokens, sequence.tokens]), [sequence])
        insort_left(self.waiting, work, key=_urgency)
        self.num_preemptions += len(work.sequences)

    def preempt_all(self) -> None:
        while self.prefilling or self.running:
            self._preempt_latest()

    def finish(self, sequences: list[Sequence]) -> None:
        """Remove running sequences that are finished."""
        self._release(sequences)
        self.running = [s for s in self.running if s.row >= 0]

    def remove(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Remove the unfinished sequences that are chosen, and return them."""
        removed = [s for s in self.running if chosen(s)]
        self.finish(removed)
        for work in (*self.prefilling, *self.waiting):
            gone = dict.fromkeys(s for s in work.sequences if chosen(s))  # asked once: a future may be cancelled now
            self._release(gone)
            work.sequences = [s for s in work.sequences if s not in gone]
            if not work.sequences:
                self.cache.release(work.blocks)
            removed += gone
        self.prefilling = [work for work in self.prefilling if work.sequences]
        self.waiting = deque(work for work in self.waiting if work.sequences)
        return removed

    def check_integrity(self) -> None:
        """Prove I7: every block is free, cached or in use, as the sequences and the tree say."""
        holders = [*self.running, *self.prefilling, *(s for work in self.prefilling for s in work.sequences)]
        self.cache.check_integrity(Counter(chain.from_iterable(holder.blocks for holder in holders)))

    def _release(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.row >= 0:
                self.table.leave(sequence)
            self.cache.release(sequence.blocks)
            sequence.blocks = []
