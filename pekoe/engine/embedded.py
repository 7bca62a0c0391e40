"""The embedded engine: in this process, on the trainer's own parameters, with continuous batching over paged KV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from pekoe.core.config import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import FinishReason, IntArray, Prompt, Rollout, SamplingParams
from pekoe.engine.base import EngineStats
from pekoe.engine.kv import DecodeAttention, KVCache, PrefillAttention
from pekoe.engine.sampling import sample, sequence_key, uniforms
from pekoe.engine.scheduler import Admission, Scheduler, Sequence, Work
from pekoe.model import Attention, Decoder


class EmbeddedEngine:
    """A Generator (see `engine.base`) in process.

    Args:
        model: the decoder to sample from. It is not copied: where it is the trainer's, a weight sync copies nothing.
        config: KV memory and batch limits.
        max_sequence_tokens: the longest prompt with response that will be asked for; by default the model's context.
        compute_dtype: dtype of the matrix products (autocast) and of KV.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineSection | None = None,
        max_sequence_tokens: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        config = config or EngineSection()
        spec = model.spec
        self.model = model
        self._version = 0
        self._longest = min(max_sequence_tokens or spec.max_positions, spec.max_positions)
        self._dtype, self._device = compute_dtype, next(model.parameters()).device
        weights = next(model.parameters()).dtype
        kv_dtype = compute_dtype if compute_dtype is not torch.float32 else weights
        size = config.block_tokens
        if config.kv_tokens:
            num_blocks = max(1, config.kv_tokens // size)
        else:
            affordable = int(config.kv_gib * 2**30 / (spec.kv_values_per_token * kv_dtype.itemsize * size))
            num_blocks = max(1, min(config.max_running * -(-self._longest // size), affordable))
        self._capacity = num_blocks * size
        self._scheduler = Scheduler(num_blocks, size, config.max_running, config.prefill_tokens)
        self._cache = KVCache(spec, num_blocks, size, kv_dtype, self._device)
        self._stats = EngineStats()
        self._generating = self._paused = self._closed = False
        self._aborted: list[Sequence] = []

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with response that fits."""
        return min(self._longest, self._capacity)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._capacity

    @property
    def kv_bytes(self) -> int:
        """Memory that the KV cache takes."""
        return self._cache.num_bytes

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> Iterator[Rollout]:
        """Sample; see `Generator.generate`. One call at a time: the iterator must end or be closed first.

        `stats().num_shared_tokens` counts what sharing saved.
        """
        if self._closed:
            raise RunError("the engine is closed")
        self._validate(prompts, params)
        return self._run(prompts, params)

    def _validate(self, prompts: list[Prompt], params: SamplingParams) -> None:
        limit = self.max_sequence_tokens
        source = "engine.kv_tokens, engine.kv_gib" if self._capacity < self._longest else "the context"
        vocab = self.model.spec.vocab_size
        for token in params.stop_token_ids:
            if not 0 <= token < vocab:
                raise UserError(f"stop token: expected an id in [0, {vocab}), got {token}")
        for prompt in prompts:
            size = len(prompt.tokens)
            if not size:
                raise UserError(f"prompt {prompt.uid}: expected at least one token, got none")
            if size + params.max_new_tokens > limit:
                raise UserError(
                    f"prompt {prompt.uid}: expected at most {limit} tokens with its response ({source}), got "
                    f"{size} + {params.max_new_tokens} new; most new tokens that fit: {max(0, limit - size)}"
                )
            low, high = int(prompt.tokens.min()), int(prompt.tokens.max())
            if low < 0 or high >= vocab:
                bad = low if low < 0 else high
                raise UserError(f"prompt {prompt.uid}: expected token ids in [0, {vocab}), got {bad}")

    def _run(self, prompts: list[Prompt], params: SamplingParams) -> Iterator[Rollout]:
        if self._generating:
            raise RunError("the engine is generating already: exhaust or close the earlier iterator first")
        scheduler = self._scheduler
        for prompt in prompts:
            keys = [sequence_key(params, prompt.uid, prompt.draw, i) for i in range(params.n)]
            scheduler.waiting.append(Work(prompt.tokens, [Sequence(prompt, i, key) for i, key in enumerate(keys)]))
        self._generating = True
        try:
            while scheduler.num_unfinished or self._aborted:
                aborted, self._aborted = self._aborted, []
                yield from (sequence.rollout("abort") for sequence in aborted)
                if self._paused:
                    raise RunError("the engine is paused: call resume() before going on")
                admissions = scheduler.admit()
                if admissions:
                    touched = self._prefill(admissions, params)
                else:
                    scheduler.reserve()
                    assert scheduler.running or not scheduler.waiting, "work waits that can never be admitted"
                    touched = self._decode(params) if scheduler.running else []
                finished: list[tuple[Sequence, FinishReason]] = []
                for sequence in touched:
                    reason = self._finish_reason(sequence, params)
                    if reason is not None:
                        finished.append((sequence, reason))
                scheduler.finish(s for s, _ in finished)
                for sequence, reason in finished:
                    yield sequence.rollout(reason)
        finally:  # also where the caller closes the iterator, or an exception passes through
            scheduler.abort(None)
            self._aborted = []
            self._generating = False

    @staticmethod
    def _finish_reason(sequence: Sequence, params: SamplingParams) -> FinishReason | None:
        if sequence.tokens[-1] in params.stop_token_ids:
            return "stop"
        return "length" if len(sequence.tokens) >= params.max_new_tokens else None

    @torch.no_grad()
    def _prefill(self, admissions: list[Admission], params: SamplingParams) -> list[Sequence]:
        """Compute contexts, once each, and sample the first token of all sequences that continue them."""
        starts = [a.num_cached for a in admissions]
        stops = [len(a.context) for a in admissions]
        tokens = np.concatenate([a.context[start:] for a, start in zip(admissions, starts, strict=True)])
        positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        attention = PrefillAttention(self._cache, [a.blocks for a in admissions], starts, stops)
        lasts = np.cumsum([b - a for a, b in zip(starts, stops, strict=True)]) - 1
        logits = self._logits(tokens, positions, attention, lasts)
        size = self._cache.block_tokens
        for admission, stop in zip(admissions, stops, strict=True):
            for source, target in admission.copies:
                self._cache.copy_block(source, target, stop % size)
        rows = [row for row, a in enumerate(admissions) for _ in a.sequences]
        sequences = [s for a in admissions for s in a.sequences]
        self._append(sequences, logits[torch.tensor(rows, device=self._device)], params)
        shared = sum(stop * (len(a.sequences) - 1) for a, stop in zip(admissions, stops, strict=True))
        self._count(num_prefill_tokens=len(tokens), num_cached_tokens=sum(starts), num_shared_tokens=shared)
        return sequences

    @torch.no_grad()
    def _decode(self, params: SamplingParams) -> list[Sequence]:
        """One token more for every running sequence."""
        running = list(self._scheduler.running)
        positions = np.array([s.num_computed for s in running])
        width = max(len(s.blocks) for s in running)
        tables = np.zeros((len(running), width), np.int64)
        for row, sequence in enumerate(running):
            tables[row, : len(sequence.blocks)] = sequence.blocks
        tokens = np.array([s.tokens[-1] for s in running])
        logits = self._logits(tokens, positions, DecodeAttention(self._cache, tables, positions), None)
        self._append(running, logits, params)
        return running

    def _logits(
        self, tokens: IntArray, positions: IntArray, attention: Attention, rows: IntArray | None
    ) -> torch.Tensor:
        """Logits [len(rows), V] after the tokens [T] at those rows (None: all)."""
        mixed = self._dtype is not torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=mixed):
            on_device = (torch.from_numpy(a).to(self._device) for a in (tokens, positions))
            hidden = self.model(*on_device, attention)
            if rows is not None:
                hidden = hidden[torch.from_numpy(rows).to(self._device)]
            return self.model.logits(hidden)

    def _append(self, sequences: list[Sequence], logits: torch.Tensor, params: SamplingParams) -> None:
        """Sample a token for each sequence from its row of logits."""
        keys = np.array([s.key for s in sequences], np.uint64)
        places = np.array([len(s.tokens) for s in sequences], np.int64)
        uniform = torch.from_numpy(uniforms(keys, places)).to(self._device)
        ban = torch.from_numpy(places < params.min_new_tokens).to(self._device) if params.min_new_tokens else None
        tokens, logprobs = sample(logits, uniform, params, ban)
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.append(token, logprob, self._version)
        self._count(num_decode_tokens=len(sequences), num_forwards=1)

    def _count(self, **more: int) -> None:
        self._stats = replace(self._stats, **{k: getattr(self._stats, k) + v for k, v in more.items()})

    def abort(self, uids: Iterable[str] | None = None) -> None:
        self._aborted += self._scheduler.abort(None if uids is None else set(uids))

    def update_weights(self, source: Decoder, version: int) -> None:
        """Sample from `source` from now on, without a copy. All cached KV is flushed; responses in flight have
        theirs recomputed."""
        if source.spec != self.model.spec:
            raise UserError(f"weight update: expected a model of shape {self.model.spec}, got {source.spec}")
        self._scheduler.preempt_all()
        self._scheduler.tree.flush()
        self.model = source
        self._version = version

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def health(self) -> bool:
        return not self._closed

    def stats(self) -> EngineStats:
        return replace(self._stats, num_preemptions=self._scheduler.num_preemptions)

    def check_integrity(self) -> None:
        """Prove I7 now."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._scheduler.abort(None)
            del self._cache
