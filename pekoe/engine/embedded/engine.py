"""The embedded engine: in this process, with continuous batching over paged KV.

A driver thread runs one forward after another while requests are unfinished. Everything else that touches the
scheduler, the weights or the memory takes its turn between two forwards, ahead of the next one; `submit` only leaves
requests in an inbox, which the next turn empties. So what one `submit` to an idle engine samples does not depend on
threads.
"""

from __future__ import annotations

import threading
import time
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import count, groupby
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.hardware import USABLE
from pekoe.core.spec import ModelSpec
from pekoe.core.types import BoolArray, Completion, FinishReason, IntArray, Request, SamplingParams
from pekoe.engine.base import (
    Broadcast,
    Checksums,
    Engine,
    EngineKind,
    EngineStats,
    WeightSource,
    end_tokens,
    validate,
    with_stops,
)
from pekoe.engine.checksum import checksum
from pekoe.engine.embedded.model_runner import ModelRunner
from pekoe.engine.embedded.scheduler import Scheduler, Sequence, Work
from pekoe.engine.sampling import key_of, sample, uniforms
from pekoe.kernels.jit import adopt_num_threads
from pekoe.kernels.packed_linear import intact
from pekoe.model import LanguageModel, check_routing, is_adapter, load_model
from pekoe.model.hf import with_adapter

Receive = Callable[[LanguageModel, Broadcast], None]
"""Overwrites a model's parameters with those that rank 0 of the group sends."""
_Ended = list[tuple[Sequence, FinishReason | RunError]]

_UNUSABLE = {
    "offloaded": "the engine's memory is offloaded: call onload() and update_weights() before going on",
    "stale": "the engine has no valid weights: call update_weights() before going on",
    "closed": "the engine is closed",
}


class EmbeddedEngine(Engine):
    """An engine in this process.

    Args:
        model: the decoder to sample from. It is not copied: where it is the trainer's, a publish sends nothing.
        config: KV memory and batch limits.
        max_sequence_tokens: the longest prompt with response that will be asked for; by default the model's context.
        compute_dtype: dtype of the matrix products (autocast) and of KV.
        owns_model: nobody else uses `model`: a broadcast may overwrite it, and `offload` frees its memory too.
        max_requests: see `Engine.max_requests`.
        receive: how to take a `Broadcast`.
        reserve_bytes: of a GPU, for others while KV is held. With it, where the config has no size, KV takes what else
            is left; None: 2 GiB.
        routing: record the experts of each token, for requests that ask for them.
    """

    kind: EngineKind = "embedded"

    def __init__(
        self,
        model: LanguageModel,
        config: EngineSection | None = None,
        max_sequence_tokens: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
        *,
        owns_model: bool = False,
        max_requests: int | None = None,
        receive: Receive | None = None,
        reserve_bytes: int | None = None,
        routing: bool = False,
    ) -> None:
        if routing:
            check_routing(model)
        config, spec = config or EngineSection(), model.spec
        self._longest = min(max_sequence_tokens or spec.max_positions, spec.max_positions)
        weights = next(model.parameters()).dtype
        kv_dtype = compute_dtype if compute_dtype is not torch.float32 else weights
        size = config.block_tokens
        if config.kv_tokens:
            num_blocks = max(1, config.kv_tokens // size)
        else:
            cast = weights is torch.float32 and compute_dtype is not torch.float32
            copies = spec.num_parameters * compute_dtype.itemsize if cast else 0  # of weights, see `ModelRunner`
            left = _left(next(model.parameters()).device, reserve_bytes, copies)
            affordable = config.kv_bytes(left) // (spec.kv_values_per_token * kv_dtype.itemsize * size)
            num_blocks = max(1, min(config.max_running * -(-self._longest // size), affordable))
        self.num_kv_tokens = num_blocks * size  # that the KV cache holds
        row_bytes = 1_000 + 4 * -(-self._longest // size)  # of the scheduler's table
        _check_memory("max_running", config.max_running * row_bytes, torch.device("cpu"))
        kv_bytes = self.num_kv_tokens * spec.kv_values_per_token * kv_dtype.itemsize
        _check_memory("kv_tokens" if config.kv_tokens else "kv_gib", kv_bytes, next(model.parameters()).device)
        self._make_scheduler = partial(
            Scheduler,
            *(num_blocks, size, config.max_running, config.prefill_tokens, self._longest),
            None if routing else _widest(spec),  # experts are read from the blocks of a whole sequence
        )
        self._scheduler = self._make_scheduler()
        self._runner = ModelRunner(model, num_blocks, size, kv_dtype, compute_dtype, routing)
        self._owns_model, self._max_requests, self._receive = owns_model, max_requests, receive
        self._routing = routing
        self._version = 0
        self._group_numbers = count()
        self._stats = EngineStats()
        # Guarded by the condition. Whoever has set `_in_turn` may use the scheduler and the runner.
        self._condition = threading.Condition()
        self._state: Literal["ready", "offloaded", "stale", "closed"] = "ready"
        self._in_turn = False
        self._num_waiting = 0  # for a turn, ahead of the driver
        self._inbox: list[Work] = []
        self._unfinished: set[Sequence] = set()
        self._listening: set[Sequence] = set()  # unfinished, with a listener
        self._busy_since = 0.0
        self._driver: threading.Thread | None = None
        self._cancelled = threading.Event()  # some future has been

    @property
    def model(self) -> LanguageModel:
        """The model whose parameters are sampled from."""
        return self._runner.model

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        return end_tokens(self.model)

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_sequence_tokens(self) -> int:
        return min(self._longest, self.num_kv_tokens)

    @property
    def max_requests(self) -> int | None:
        return self._max_requests

    @property
    def num_workers(self) -> int:
        return 1

    @property
    def kv_bytes(self) -> int:
        """Memory of the KV cache."""
        return self._runner.cache.num_bytes if self._runner.cache is not None else 0

    def check(self, params: SamplingParams) -> None:
        """UserError where the experts of tokens are asked for, and it was not made to record them."""
        if params.routing and not self._routing:
            raise UserError("sampling routing: expected False of an engine that was made without it, got True")

    def health(self) -> bool:
        return self._state != "closed"

    def stats(self) -> EngineStats:
        with self._condition:
            return self._stats.plus(busy_s=time.monotonic() - self._busy_since) if self._unfinished else self._stats

    def check_integrity(self) -> None:
        """Prove I7 now."""
        with self._turn():
            self._scheduler.check_integrity()

    # Requests

    def submit(self, requests: abc.Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. Neighbours of one (uid, draw) with the same tokens have their context computed once.

        A future that its caller cancels ends its request before the next forward.
        """
        requests = with_stops(requests, lambda: self._end_tokens)
        source = "engine.kv_tokens, engine.kv_gib" if self.num_kv_tokens < self._longest else "the context"
        validate(requests, self.model.spec.vocab_size, self.max_sequence_tokens, source)
        for params in {request.params for request in requests}:
            self.check(params)
        works: list[Work] = []
        for _, group in groupby(requests, lambda r: (r.uid, r.draw, r.priority, r.tokens.tobytes())):
            number = next(self._group_numbers)
            sequences = [Sequence(r, key_of(r), number) for r in group]
            works.append(Work(sequences[0].request.tokens, sequences))
        futures = [sequence.future for work in works for sequence in work.sequences]
        if not futures:
            return []
        for future in futures:
            future.add_done_callback(partial(_note_cancelled, self._cancelled))
        with self._condition:
            self._require_ready()
            if self._driver is None:  # before anything is queued: a thread may not be had
                driver = threading.Thread(target=self._drive, name="pekoe-engine", daemon=True)
                driver.start()
                self._driver = driver
            if not self._unfinished:
                self._busy_since = time.monotonic()
            self._inbox += works
            self._unfinished.update(*(work.sequences for work in works))
            self._listening.update(s for work in works for s in work.sequences if s.request.listener is not None)
        return futures

    def abort(self, uids: Iterable[str] | None = None) -> None:
        chosen = None if uids is None else set(uids)
        with self._turn() as ended:
            removed = self._scheduler.remove(lambda s: chosen is None or s.request.uid in chosen)
            ended += [(sequence, "abort") for sequence in removed]

    def flush_cache(self) -> None:
        with self._turn():
            self._scheduler.cache.flush()

    # Weights and memory

    def update_weights(self, source: WeightSource, version: int) -> None:
        """A model is sampled from without a copy; a directory is loaded while requests run; a broadcast is received
        between two forwards, into the model that the engine owns."""
        if isinstance(source, Broadcast):
            self._take_broadcast(source, version)
            return
        owns = isinstance(source, Path) or (self._owns_model and source is self.model)
        if isinstance(source, Path):
            if self.model.lora is not None and is_adapter(source):
                source = with_adapter(self.model, source)
            else:
                dtype = next(self.model.parameters()).dtype
                source = load_model(source, dtype, str(self._runner.device), self.model.implementation).requires_grad_(
                    False
                )
        if source.spec != self.model.spec:
            raise UserError(f"weight update: expected a model of shape {self.model.spec}, got {source.spec}")
        with self._turn():
            self._require_ready("stale")
            self._use(source, version)
            self._owns_model = owns

    def _take_broadcast(self, source: Broadcast, version: int) -> None:
        assert self._owns_model, "a broadcast would overwrite somebody else's model"
        assert self._receive is not None, "the engine was made without `receive`"
        with self._turn():
            self._require_ready("stale")
            self._state = "stale"  # until it is whole; what is in flight waits if it breaks off
            try:
                self._receive(self.model, source)
            except (RuntimeError, OSError) as error:  # what torch.distributed raises
                raise RunError(f"weight update: the broadcast broke off: {error}") from error
            self._use(self.model, version)

    def _use(self, model: LanguageModel, version: int) -> None:
        """Within a turn: sample from this model, whose parameters may have changed."""
        self._scheduler.preempt_all()
        self._scheduler.cache.flush()
        self._runner.use(model)
        self._version, self._state = version, "ready"

    def checksums(self) -> Checksums:
        """RunError where packed copies, which the engine computes with, differ from the parameters."""
        if not intact(self._runner.sampled):
            raise RunError("the engine's packed copies of the weights differ from them")
        return {name: checksum(parameter) for name, parameter in self.model.named_parameters()}

    def holds(self, model: LanguageModel) -> bool:
        """Whether every parameter sampled from equals that of `model`, bit by bit."""
        with self._turn():
            return self._runner.holds(model)

    def offload(self) -> None:
        """The weights' memory goes too, where the engine owns the model."""
        with self._turn():
            with self._condition:
                self._require_ready("stale", "offloaded")
                if self._state == "offloaded":
                    return
                if self._unfinished:
                    raise RunError(f"{len(self._unfinished)} requests are unfinished: memory cannot be offloaded")
                self._state = "offloaded"
            self._scheduler.cache.flush()
            self._runner.free_memory()
            if self._owns_model:
                _resize(self.model, whole=False)

    def onload(self) -> None:
        with self._turn():
            self._require_ready("stale", "offloaded")
            if self._state == "offloaded":
                if self._owns_model:
                    _resize(self.model, whole=True)
                self._runner.take_memory()
                self._state = "stale"

    def close(self) -> None:
        with self._turn() as ended:
            self._state = "closed"
            ended += self._fail_all(RunError("the engine was closed while requests were unfinished"))
            self._runner.free_memory()
        driver = self._driver
        if driver is not None and driver is not threading.current_thread():
            driver.join()

    def _require_ready(self, *also: str) -> None:
        """RunError unless the engine is ready, or in one of these states."""
        if self._state != "ready" and self._state not in also:
            raise RunError(_UNUSABLE[self._state])

    # Turns and forwards

    @contextmanager
    def _turn(self, driver: bool = False) -> Iterator[_Ended]:
        """Exclude all others from the scheduler and the runner. Sequences put into the list end with the turn."""
        with self._condition:
            self._num_waiting += not driver
            try:
                self._condition.wait_for(self._may_compute if driver else lambda: not self._in_turn)
                self._in_turn = True
            finally:
                self._num_waiting -= not driver
                self._condition.notify_all()
            self._take_inbox()
        ended: _Ended = []
        try:
            yield ended
        finally:
            with self._condition:
                self._in_turn = False
                self._finished(sequence for sequence, _ in ended)
                self._condition.notify_all()
            for sequence, how in ended:
                _resolve(sequence, how)

    def _may_compute(self) -> bool:
        return not self._in_turn and not self._num_waiting and self._state != "stale"

    def _take_inbox(self) -> None:
        """Queue new work, and drop what was cancelled."""
        for work in self._inbox:
            self._scheduler.enqueue(work)
        self._inbox.clear()
        if self._cancelled.is_set():
            self._cancelled.clear()
            dropped = self._scheduler.remove(lambda sequence: sequence.future.cancelled())
            self._finished(dropped)
            for sequence in dropped:
                sequence.future.set_running_or_notify_cancel()

    def _finished(self, sequences: Iterable[Sequence]) -> None:
        before = len(self._unfinished)
        ended = set(sequences)
        self._unfinished -= ended
        self._listening -= ended
        if before and not self._unfinished:
            self._stats = self._stats.plus(busy_s=time.monotonic() - self._busy_since)

    def _fail_all(self, error: RunError) -> _Ended:
        """Within a turn: give up all requests. The scheduler is made anew: an error may have left it half changed."""
        with self._condition:
            failed, self._inbox = list(self._unfinished), []
        self._scheduler = self._make_scheduler()
        return [(sequence, error) for sequence in failed]

    def _drive(self) -> None:
        """Run forwards until nothing is unfinished."""
        adopt_num_threads()
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)
        while True:
            with self._turn(driver=True) as ended:
                if self._scheduler.has_work:
                    try:
                        ended += self._step()
                    except Exception as error:
                        failure = error if isinstance(error, RunError) else RunError(f"the engine failed: {error!r}")
                        failure.__cause__ = None if failure is error else error
                        ended += self._fail_all(failure)
            with self._condition:
                if not self._unfinished:
                    self._driver = None
                    return

    def _step(self) -> list[tuple[Sequence, FinishReason]]:
        """One forward: a token more for every running sequence, and chunks of contexts. Returns the finished."""
        scheduler, table = self._scheduler, self._scheduler.table
        chunks = sorted(scheduler.plan(), key=lambda chunk: chunk.start == 0)  # in the order of a ForwardBatch
        shares = self._runner.forward(table, scheduler.order, chunks)
        self._runner.copy_blocks(scheduler.advance(chunks, self._version))
        touched = scheduler.order  # those decoding, then those whose context is complete
        first, stopped = 0, np.zeros(len(touched), np.bool_)
        for (decoding, share_chunks), logits in shares:
            continuing = [len(chunk.work.sequences) for chunk in share_chunks if chunk.completes]
            rows = np.repeat(np.arange(len(logits)), [1] * len(decoding) + continuing)
            last = first + len(rows)
            stopped[first:last] = self._sample(touched[first:last], logits, rows)
            first = last
        assert first == len(touched)
        works = [chunk.work for chunk in chunks if chunk.completes]
        with self._condition:
            self._stats = self._stats.plus(
                num_prefill_tokens=sum(chunk.stop - chunk.start for chunk in chunks),
                num_cached_tokens=sum(work.num_cached for work in works),
                num_shared_tokens=sum(len(work.context) * (len(work.sequences) - 1) for work in works),
                num_decode_tokens=len(touched),
                num_forwards=1,
                num_preemptions=scheduler.num_preemptions,
            )
        scheduler.num_preemptions = 0
        ended = np.flatnonzero(stopped | (table.sampled[touched] >= table.most[touched]))
        finished: list[tuple[Sequence, FinishReason]] = [
            (scheduler.running[i], "stop" if stopped[i] else "length") for i in ended
        ]
        if ending := self._tell():
            ending -= {sequence for sequence, _ in finished}
            finished.extend((sequence, "stop") for sequence in scheduler.running if sequence in ending)
        if self._runner.routing is not None:
            for sequence, _ in finished:
                if sequence.request.params.routing:
                    num_computed = int(table.computed[sequence.row])
                    sequence.routing = self._runner.routing.read(sequence.blocks, num_computed)
        scheduler.finish([sequence for sequence, _ in finished])
        return finished

    def _tell(self) -> set[Sequence]:
        """Tell listeners of new tokens; what they raise is theirs. Returns the sequences that they end."""
        with self._condition:
            listening = [(s, s.request.listener) for s in self._listening if s.row >= 0]
        ending: set[Sequence] = set()
        for sequence, listener in listening:
            start, tokens = sequence.num_told, self._scheduler.table.sampled_since(sequence, sequence.num_told)
            sequence.num_told += len(tokens)
            if listener is not None:
                with suppress(Exception):
                    if listener(start, tokens):
                        ending.add(sequence)
        return ending

    def _sample(self, touched: IntArray, logits: torch.Tensor, rows: IntArray) -> BoolArray:
        """Sample a token for each of these rows of the table from its row of logits. Returns which are stop tokens."""
        table = self._scheduler.table
        places, which = table.sampled[touched], table.params_index[touched]
        uniform = uniforms(table.keys[touched], places)
        tokens, logprobs = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        stopped = np.zeros(len(rows), np.bool_)
        for index in np.unique(which):  # rows of equal params at once
            params, at = table.params[index], np.flatnonzero(which == index)
            ban = places[at] < params.min_new_tokens if params.min_new_tokens else None
            tokens[at], logprobs[at] = sample(logits, uniform[at], params, rows[at], ban)
            stopped[at] = np.isin(tokens[at], params.stops)
        if not np.isfinite(logprobs).all():
            raise RunError(f"the model's logits are not finite (version {self._version}): the weights are damaged")
        table.append(touched, tokens, logprobs)
        return stopped


def _note_cancelled(event: threading.Event, future: Future[Completion]) -> None:
    """A future's callback, which must not keep the engine alive."""
    if future.cancelled():
        event.set()


def _resolve(sequence: Sequence, how: FinishReason | RunError) -> None:
    if not sequence.future.set_running_or_notify_cancel():
        return
    try:
        outcome = how if isinstance(how, RunError) else sequence.completion(how)
    except Exception as error:  # memory is short: the driver goes on, and the future ends
        outcome = error
    if isinstance(outcome, Exception):
        sequence.future.set_exception(outcome)
    else:
        sequence.future.set_result(outcome)


def _resize(model: LanguageModel, whole: bool) -> None:
    """The parameters stay, and get or lose their memory."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(parameter.nbytes if whole else 0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # to the other processes of this GPU


def _left(device: torch.device, reserve: int | None, copies: int) -> int | None:
    """Bytes of a GPU that KV may take beside `copies` of weights and what others take; None where nobody asks."""
    if device.type != "cuda" or reserve is None:
        return None
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # that torch keeps for later
    return int(free + idle - (1 - USABLE) * total) - copies - reserve


def _widest(spec: ModelSpec) -> int | None:
    """The widest window of a model's layers; None where one sees everything."""
    windows = [shape.window for shape in spec.attention_layers]
    return None if None in windows else max(window for window in windows if window is not None)


def _check_memory(key: str, num_bytes: int, device: torch.device) -> None:
    """Raises UserError for more than the device has, before any is taken."""
    is_cuda = device.type == "cuda"
    most = torch.cuda.get_device_properties(device).total_memory if is_cuda else psutil.virtual_memory().total
    if num_bytes > most:
        raise UserError(
            f"engine.{key}: expected what the memory of {device} holds, {most / 2**30:.1f} GiB, got one that takes "
            f"{num_bytes / 2**30:,.1f} GiB"
        )
