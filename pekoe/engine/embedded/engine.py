"""The embedded engine: in this process, on the trainer's own parameters, with continuous batching over paged KV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import FinishReason, IntArray, Prompt, Rollout, SamplingParams
from pekoe.engine.base import EngineStats, WeightSource, validate
from pekoe.engine.embedded.attention import KVCache, Step
from pekoe.engine.embedded.attention_cpu import CPUCache
from pekoe.engine.embedded.attention_cuda import CUDACache
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.engine.embedded.scheduler import Chunk, Scheduler, Work
from pekoe.engine.embedded.slots import Sequence
from pekoe.engine.sampling import sample, sequence_key, uniforms
from pekoe.kernels.jit import each
from pekoe.kernels.packed_linear import available, intact, pack
from pekoe.model import Decoder, load_model

_SHARE_ROWS = 16  # rows worth a thread of their own
_LITTLE = 8e7  # multiplications of a forward that are faster on one thread than waking another up


class EmbeddedEngine:
    """A Generator (see `engine.base`) in process.

    Args:
        model: the decoder to sample from. It is not copied: where it is the trainer's, a weight sync sends nothing.
            (On CPUs large weights have packed copies, made anew by `update_weights`; see `model.packed`.)
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
        self._version = 0
        self._longest = min(max_sequence_tokens or spec.max_positions, spec.max_positions)
        self._dtype, self._device = compute_dtype, next(model.parameters()).device
        weights = next(model.parameters()).dtype
        kv_dtype = compute_dtype if compute_dtype is not torch.float32 else weights
        size = config.block_tokens
        self._kv = spec, kv_dtype, size
        if config.kv_tokens:
            num_blocks = max(1, config.kv_tokens // size)
        else:
            affordable = int(config.kv_gib * 2**30 / (spec.kv_values_per_token * kv_dtype.itemsize * size))
            num_blocks = max(1, min(config.max_running * -(-self._longest // size), affordable))
        self._capacity = num_blocks * size
        self._scheduler = Scheduler(num_blocks, size, config.max_running, config.prefill_tokens, self._longest)
        self._take_memory(model)
        self._take(model)
        self._stats = EngineStats()
        self._generating = self._paused = self._closed = self._released = False
        self._aborted: list[Sequence] = []
        self._lost = 0  # responses that closing ended

    def _take_memory(self, model: Decoder) -> None:
        spec, dtype, size = self._kv
        num_blocks = self._capacity // size
        self._graphs: DecodeGraphs | None = None  # of decoding forwards, on a GPU
        if CPUCache.takes(spec, size, dtype, self._device):
            self._cache: CPUCache | KVCache = CPUCache(spec, num_blocks, size)
        elif CUDACache.takes(spec, size, dtype, self._device):
            cache = CUDACache(spec, num_blocks, size, dtype, self._device)
            self._cache, self._graphs = cache, DecodeGraphs(model, cache, self._dtype)
        else:
            self._cache = KVCache(spec, num_blocks, size, dtype, self._device)

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

    def generate(
        self, prompts: list[Prompt], params: SamplingParams, lengths: Callable[[str, int], int] | None = None
    ) -> Iterator[Rollout]:
        """Sample; see `Generator.generate`. One call at a time: the iterator must end or be closed first.

        `stats().num_shared_tokens` counts what sharing saved. For benchmarks, `lengths(uid, sample index)` gives a
        response's most tokens where that is below `params.max_new_tokens`.
        """
        self._check_open()
        source = "engine.kv_tokens, engine.kv_gib" if self._capacity < self._longest else "the context"
        validate(prompts, params, self.model.spec.vocab_size, self.max_sequence_tokens, source)
        return self._run(prompts, params, lengths)

    def _run(
        self, prompts: list[Prompt], params: SamplingParams, lengths: Callable[[str, int], int] | None
    ) -> Iterator[Rollout]:
        if self._generating:
            raise RunError("the engine is generating already: exhaust or close the earlier iterator first")
        self._check_open()
        if self._released:
            raise RunError("the engine's memory is released: call restore() and update_weights() before going on")
        scheduler = self._scheduler
        self._generating = True
        try:
            for prompt in prompts:
                sequences: list[Sequence] = []
                for i in range(params.n):
                    most = params.max_new_tokens
                    if lengths is not None:
                        most = max(1, min(most, lengths(prompt.uid, i)))
                    sequences.append(Sequence(prompt, i, sequence_key(params, prompt.uid, prompt.draw, i), most))
                scheduler.waiting.append(Work(prompt.tokens, sequences))
            while scheduler.num_unfinished or self._aborted:
                aborted, self._aborted = self._aborted, []
                yield from (sequence.rollout("abort") for sequence in aborted)
                if not scheduler.num_unfinished:
                    continue
                if self._paused:
                    raise RunError("the engine is paused: call resume() before going on")
                finished = self._step(params)
                scheduler.finish(s for s, _ in finished)
                for sequence, reason in finished:
                    yield sequence.rollout(reason)
            if self._lost:
                raise RunError(f"the engine was closed while {self._lost} responses were unfinished")
        finally:  # also where the caller closes the iterator, or an exception passes through
            scheduler.abort(None)
            self._aborted = []
            self._generating = False

    @torch.no_grad()
    def _step(self, params: SamplingParams) -> list[tuple[Sequence, FinishReason]]:
        """One forward: a token more for every running sequence, and contexts of others. Returns who is finished."""
        scheduler, slots = self._scheduler, self._scheduler.slots
        try:
            chunks = scheduler.plan()
            chunks.sort(key=lambda chunk: chunk.start == 0)  # those that continue come first, see kv.Step
            decoding = scheduler.order
            shares, alone = self._shares(decoding, chunks)
            logits = each(self._forward, shares) if alone else [self._forward(*shares[0])]
        except BaseException:
            scheduler.tree.flush()  # it knows blocks that were not computed
            raise
        for source, target in scheduler.advance(chunks, self._version):
            self._cache.copy_block(source, target)
        complete = [chunk for chunk in chunks if chunk.completes]
        continuing = [len(chunk.prefill.sequences) for chunk in complete]
        touched = scheduler.order  # those decoding, then those whose context is complete
        first = 0
        for number, (some, _) in enumerate(shares, 1):
            rows = np.arange(len(some))
            if number == len(shares):  # the last has the chunks
                rows = np.append(rows, len(some) + np.repeat(np.arange(len(complete)), continuing))
            if len(rows):
                self._sample(touched[first : first + len(rows)], logits[number - 1], rows, params)
            first += len(rows)
        assert first == len(touched)
        self._stats = self._stats.plus(
            num_prefill_tokens=sum(chunk.stop - chunk.start for chunk in chunks),
            num_cached_tokens=sum(chunk.prefill.num_cached for chunk in complete),
            num_shared_tokens=sum(len(c.prefill.context) * (n - 1) for c, n in zip(complete, continuing, strict=True)),
            num_decode_tokens=len(touched),
            num_forwards=1,
        )
        stopped = np.isin(slots.last[touched], params.stop_token_ids)
        ended = stopped | (slots.sampled[touched] >= slots.most[touched])
        return [(scheduler.running[i], "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]

    def _shares(self, decoding: IntArray, chunks: list[Chunk]) -> tuple[list[tuple[IntArray, list[Chunk]]], bool]:
        """Split a forward's rows among the CPU's threads; the chunks, which may read one another, stay together.

        Threads that each take some rows through all layers do not wait for one another after every operation. Where
        chunks are most of the work, torch spreads each operation over its threads instead.

        Returns (decoding slots, chunks) of each share, and whether each is computed by one thread alone.
        """
        num_threads, num_chunk = torch.get_num_threads(), sum(chunk.stop - chunk.start for chunk in chunks)
        num_rows = len(decoding) + num_chunk
        if self._device.type != "cpu" or num_threads == 1:
            return [(decoding, chunks)], False
        spec, seen = self.model.spec, int(self._scheduler.slots.computed[decoding].sum())
        seen += sum((chunk.stop - chunk.start) * chunk.stop for chunk in chunks)
        attention = 2 * seen * spec.num_layers * spec.num_heads * spec.head_dim
        if num_rows * spec.num_parameters + attention < _LITTLE:
            return [(decoding, chunks)], True
        size = -(-num_rows // num_threads)
        if size < _SHARE_ROWS or num_chunk > size:
            return [(decoding, chunks)], False
        pieces: list[tuple[IntArray, list[Chunk]]] = [
            (decoding[i : i + size], []) for i in range(0, len(decoding), size)
        ]
        if chunks and len(pieces) < num_threads:
            pieces.append((decoding[:0], []))
        pieces[-1][1].extend(chunks)
        return pieces, True

    @torch.no_grad()
    def _forward(self, decoding: IntArray, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [R, V] after the decoding slots' last tokens, then after the chunks that complete their context."""
        slots, num_decode = self._scheduler.slots, len(decoding)
        tokens, positions = [slots.last[decoding]], [slots.computed[decoding]]
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        width = max([int(slots.num_blocks[decoding].max(initial=1)), *(len(c.prefill.blocks) for c in chunks)])
        tables = np.zeros((num_decode + len(chunks), width), np.int32)
        shown = min(width, slots.tables.shape[1])
        tables[:num_decode, :shown] = slots.tables[decoding, :shown]
        for row, chunk in enumerate(chunks, num_decode):
            tokens.append(chunk.prefill.context[chunk.start : chunk.stop])
            positions.append(np.arange(chunk.start, chunk.stop))
            tables[row, : len(chunk.prefill.blocks)] = chunk.prefill.blocks
        bounds = (num_decode + np.cumsum([0, *sizes])).tolist()
        num_continued = sum(chunk.start > 0 for chunk in chunks)
        step = Step(
            positions=np.concatenate(positions),
            tables=tables,
            table_of=np.concatenate([np.arange(num_decode), np.repeat(num_decode + np.arange(len(chunks)), sizes)]),
            num_decode=num_decode,
            prompt_of=slots.prompt[decoding],
            continued=bounds[: num_continued + 1],
            fresh=bounds[num_continued:],
        )
        if self._graphs is not None and not chunks:
            with self._autocast():
                return self._sampled.logits(self._graphs.hidden(np.concatenate(tokens), step))
        on_device = (torch.from_numpy(a).to(self._device) for a in (np.concatenate(tokens), step.positions))
        lasts = [end - 1 for chunk, end in zip(chunks, bounds[1:], strict=True) if chunk.completes]
        with self._autocast():
            hidden = self._sampled(*on_device, self._cache.attention(step))
            if chunks:
                wanted = np.concatenate([np.arange(num_decode), np.array(lasts, np.int64)])
                hidden = hidden[torch.from_numpy(wanted).to(self._device)]
            return self._sampled.logits(hidden)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not torch.float32)

    def _sample(self, touched: IntArray, logits: torch.Tensor, rows: IntArray, params: SamplingParams) -> None:
        """Sample a token for each of these slots from its row of logits."""
        slots = self._scheduler.slots
        places = slots.sampled[touched]
        uniform = uniforms(slots.keys[touched], places)
        ban = places < params.min_new_tokens if params.min_new_tokens else None
        tokens, logprobs = sample(logits, uniform, params, rows, ban)
        if not np.isfinite(logprobs).all():
            raise RunError(f"the model's logits are not finite (version {self._version}): the weights are damaged")
        slots.append(touched, tokens, logprobs)

    def abort(self, uids: Iterable[str] | None = None) -> None:
        self._aborted += self._scheduler.abort(None if uids is None else set(uids))

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Sample from `source` from now on, without a copy where it is a model. All cached KV is flushed; responses
        in flight have theirs recomputed."""
        self._check_open()
        if not isinstance(source, Decoder):
            source = load_model(source, next(self.model.parameters()).dtype, str(self._device))
        if source.spec != self.model.spec:
            raise UserError(f"weight update: expected a model of shape {self.model.spec}, got {source.spec}")
        self._scheduler.preempt_all()
        self._scheduler.tree.flush()
        self._take(source)
        if self._graphs is not None:
            self._graphs.follow(source)
        self._version = version

    def _take(self, model: Decoder) -> None:
        self.model = self._sampled = model  # the packed copies of before are given up first
        on_kernels = isinstance(self._cache, CPUCache) and self._dtype is torch.float32
        self._sampled = pack(model) if on_kernels and available() else model

    def holds(self, model: Decoder) -> bool:
        """Whether every parameter sampled from equals that of `model`, bit by bit."""
        ours, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        same = ours.keys() == theirs.keys() and all(
            ours[name] is p or torch.equal(ours[name], p) for name, p in theirs.items()
        )
        return same and intact(self._sampled)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def release(self) -> None:
        """See `Generator.release`; the weights are whoever's the model is."""
        self._check_open()
        if self._generating:
            raise RunError("the engine is generating: its memory cannot be released")
        self._scheduler.tree.flush()
        self._graphs, self._sampled = None, self.model
        self._released = True
        del self._cache

    def restore(self) -> None:
        self._check_open()
        if self._released:
            self._released = False
            self._take_memory(self.model)

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
            self._lost = len(self._scheduler.abort(None))
            self._graphs = None
            self._sampled = self.model
            if not self._released:
                del self._cache

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("the engine is closed")
