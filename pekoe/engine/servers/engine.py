"""One inference server as one engine: SGLang or vLLM, launched here or attached to.

An event loop in the engine's own thread talks to the server through a `client.ServerClient`; the public methods are
called from any other thread. A server that fails raises EngineLost; `engine.pool` decides what to do about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch

from pekoe.config.engine import EngineSection, ServerSection
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Completion, Record, Request, RoutingArray, SamplingParams
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import (
    Broadcast,
    BroadcastGroup,
    Checksums,
    Engine,
    EngineKind,
    EngineLost,
    EngineStats,
    WeightSource,
    end_tokens,
    validate,
    with_stops,
)
from pekoe.engine.buckets import buckets
from pekoe.engine.servers.client import (
    ABORTED,
    Answer,
    BusyError,
    ServerClient,
    ServerOptions,
    SilenceError,
    TransportError,
    shown,
)
from pekoe.engine.servers.process import ServerProcess, allow_open_files, check_python, free_port, wait_ready
from pekoe.model import LanguageModel, is_adapter, model_on_meta, save_model
from pekoe.model.routing import routing_of_all_layers

_BACKOFF_S = 0.2  # before the first retry; each further one waits twice as long
_BUSY_S, _MOST_BUSY_S = 1.0, 30.0  # likewise, where the server answered 429 or 5xx and did not say when
_ABORT_AGAIN_S = 0.2
_LEAVE_LIMIT_S = 5.0  # for the last calls to an attached server

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Group:
    """The requests of one (uid, draw) in one call, which share a prefill."""

    size: int
    prefill: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class _Flight:
    """A request without a response yet."""

    request: Request
    group: _Group
    future: Future[Completion]
    rid: str = ""  # its id at the server; empty while it waits here
    version: int = 0  # of the weights when it was sent
    aborted: bool = False
    error: Exception | None = None  # why its task was cancelled, unless it is aborted


def key_of(config: ServerSection) -> str:
    """The key of servers that run already; empty: they have none. UserError where its variable is not set."""
    key = os.environ.get(config.key_env, "") if config.key_env else ""
    if config.key_env and not (key.isascii() and key.isprintable() and key.strip()):
        raise UserError(
            f"engine.server.key_env: expected the environment variable {config.key_env} with the servers' key, got "
            f"{'none' if not key else 'one that is no printable ASCII'}"
        )
    return key


class ServerEngine(Engine):
    """An Engine (see `engine.base`) on one server. Kinds differ in `client_class`.

    Args:
        model: the Hugging Face directory of version 0. An attached server is assumed to hold it.
        config: `config.server` has the limits.
        spec: the model's shape.
        max_sequence_tokens: the longest prompt with response that will be requested.
        log_dir: for the server's log, and weights of `update_weights` from a model in this process.
        dtype: "float32" or "bfloat16", of the server's weights.
        device: "cpu" or "cuda", where a launched server runs.
        threads: CPU threads of a launched server.
        number: this server's index in the run: part of its name and its log's, and its index in `config.server.gpus`.
        url: of a running server; None: launch one.
        offloads: whether `offload` will be called.
        lora_rank: of the adapter that updates bring; 0: they bring whole weights.
        routing: whether requests will ask for the experts of their tokens.

    Blocks until the server is ready. UserError for settings that cannot work, RunError if the server does not start.
    """

    client_class: ClassVar[type[ServerClient]]
    name: ClassVar[str]
    kind: EngineKind

    def __init__(
        self,
        model: Path,
        config: EngineSection,
        spec: ModelSpec,
        max_sequence_tokens: int,
        log_dir: Path,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
        number: int = 0,
        url: str | None = None,
        offloads: bool = False,
        lora_rank: int = 0,
        routing: bool = False,
    ) -> None:
        server = self._config = config.server
        self._spec, self._limit = spec, min(max_sequence_tokens, spec.max_positions)
        self._model_dir, self._log_dir, self._dtype = model, log_dir, dtype
        kv_tokens = config.server_kv(self._limit, spec.kv_values_per_token, dtype, device)
        self._limit = min(self._limit, kv_tokens or self._limit)
        limits = self._limit, kv_tokens, config.max_running
        options = ServerOptions(model, server, spec, *limits, dtype, device, offloads, lora_rank, routing)
        self.label = f"{self.name} server {number}" if url is None else f"{self.name} at {without_secrets(url)}"
        if url is None:
            check_python(self.name, server.python)
        elif server.sync == "shm" and urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"engine.server.sync: expected servers on this host (a loopback address) for 'shm', got "
                f"{without_secrets(url)}; nearest: 'disk', 'broadcast'"
            )
        allow_open_files(len(server.urls) or server.count, server.max_requests)
        port = free_port()
        self.url = url.rstrip("/") if url else f"http://127.0.0.1:{port}"
        self.key = secrets.token_hex(32) if url is None else key_of(server)
        self._client = self.client_class(options, self.url, self.key)
        command = self._client.command(port) if url is None else None
        self.process: ServerProcess | None = None  # of a launched server
        self._version, self._stats, self._num_workers = 0, EngineStats(), 0
        self._busy_since: float | None = None
        self._flights: dict[asyncio.Task[Completion], _Flight] = {}
        self._helpers: set[asyncio.Task[Any]] = set()  # a task without a reference may be garbage-collected
        self._places = asyncio.Semaphore(server.max_requests)
        self._changing = asyncio.Lock()  # one update or flush at a time
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._unusable = ""  # why nothing may be sampled, after a failed update
        self._group: BroadcastGroup | None = None
        self._rid, self._rids = f"pekoe-{uuid.uuid4().hex[:12]}", itertools.count()
        self._closed, self._closing = False, threading.Lock()
        self._thread = AsyncThread(f"pekoe {self.label}")
        try:
            if command is not None:
                gpus = {"CUDA_VISIBLE_DEVICES": server.gpus[number]} if server.gpus else {}
                omp = {"OMP_NUM_THREADS": str(threads)} if threads else {}
                log = log_dir / f"{self.label.lower().replace(' ', '-')}.log"
                own = {"PYTHONSAFEPATH": "1"}  # its `-m` would import from the current directory first
                env = os.environ | own | omp | command[1] | server.env | gpus
                self.process = ServerProcess(self.label, command[0], env, log)
            self._thread.run(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        client, limit = self._client, self._config.start_limit_s
        try:
            if self.process is None:
                await wait_ready(self.label, None, client.reachable, limit)
                await client.check_attached()
                await client.resume()  # its last user may have left it paused
            await wait_ready(self.label, self.process, client.ready, limit)
            await client.set_version(0)
        except TransportError as error:
            raise RunError(f"{self.label}: {error}") from None

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_sequence_tokens(self) -> int:
        return self._limit

    @property
    def max_requests(self) -> int:
        return self._config.max_requests

    @property
    def num_workers(self) -> int:
        if not self._num_workers:
            self._num_workers = self._run(self._client.num_workers())
        return self._num_workers

    # Sampling

    @classmethod
    def check_params(cls, params: SamplingParams) -> None:
        """As `check`, without a server."""
        cls.client_class.check_params(params)

    def check(self, params: SamplingParams) -> None:
        self.check_params(params)
        if params.routing and not self._client.options.routing:
            raise UserError("sampling routing: expected False of an engine that was made without it, got True")

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        return end_tokens(self._model_dir)

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. At most `max_requests` are at the server at once, plus those of a priority above 0; the
        others wait here. Requests submitted during an update are sampled after it. A future that its caller cancels
        ends its request."""
        self._check_open()
        requests = with_stops(requests, lambda: self._end_tokens)
        validate(requests, self._spec.vocab_size, self._limit, "the server's context")
        for params in {request.params for request in requests}:
            self.check(params)
        sizes = Counter((request.uid, request.draw) for request in requests)
        groups = {key: _Group(size) for key, size in sizes.items()}
        flights = [_Flight(request, groups[request.uid, request.draw], Future()) for request in requests]
        for flight in flights:
            flight.future.add_done_callback(partial(self._drop, flight))
        self._thread.soon(self._send, flights)
        return [flight.future for flight in flights]

    def _send(self, flights: list[_Flight]) -> None:
        if flights and self._busy_since is None:
            self._busy_since = time.monotonic()
        for flight in flights:
            task = asyncio.get_running_loop().create_task(self._complete(flight))
            self._flights[task] = flight
            task.add_done_callback(self._settle)

    def _drop(self, flight: _Flight, future: Future[Completion]) -> None:
        if future.cancelled():
            with contextlib.suppress(RunError):  # closed: all requests have ended
                self._thread.soon(self._begin_abort, {flight})

    def _settle(self, task: asyncio.Task[Completion]) -> None:
        """Settle a request's future. A callback runs for every outcome, including cancellation before the task's first
        line, which a `finally` in the task would miss."""
        flight = self._flights.pop(task)
        if not self._flights and self._busy_since is not None:
            self._stats = self._stats.plus(busy_s=time.monotonic() - self._busy_since)
            self._busy_since = None
        error = None if task.cancelled() else task.exception()
        if flight.future.cancelled() or not flight.future.set_running_or_notify_cancel():
            return  # its caller has cancelled it
        if error is not None:
            flight.future.set_exception(error)
        elif not task.cancelled():
            flight.future.set_result(task.result())
        elif flight.aborted:
            flight.future.set_result(self._checked(flight, ABORTED))
        else:
            flight.future.set_exception(flight.error or RunError("the engine is closed"))

    async def _complete(self, flight: _Flight) -> Completion:
        async with contextlib.nullcontext() if flight.request.priority > 0 else self._places:
            if flight.group.size > 1:
                await self._until_usable()
                if flight.group.prefill is None:
                    flight.group.prefill = self._spawn(self._prefill(flight.request))
                await asyncio.wait([flight.group.prefill])
            answer = await self._answer(flight)
        completion, cached = self._checked(flight, answer), answer.num_cached_tokens
        computed = max(0, len(flight.request.tokens) - cached) if answer.tokens else 0
        self._stats = self._stats.plus(
            num_prefill_tokens=computed, num_cached_tokens=cached, num_decode_tokens=len(answer.tokens)
        )
        return completion

    async def _prefill(self, request: Request) -> None:
        with contextlib.suppress(TransportError, RunError):  # the samples themselves will fail
            computed = await self._client.prefill(request)
            self._stats = self._stats.plus(num_prefill_tokens=computed)

    async def _answer(self, flight: _Flight) -> Answer:
        """Send the request, again after a TransportError or a BusyError. EngineLost if the server is dead or its update
        failed. A 429 says "later", not "never": it may come until `request_limit_s` has passed."""
        end = time.monotonic() + self._config.request_limit_s
        num_sent = failures = 0
        while True:
            await self._until_usable()
            if flight.aborted:
                return ABORTED
            # A new id each time: the old request may still run. Equal lengths: SGLang aborts all ids with a prefix.
            flight.rid = f"{self._rid}-{next(self._rids):012d}"
            flight.version = self._version
            num_sent += 1
            try:
                return await self._client.sample(flight.request, flight.rid)
            except TransportError as error:
                pause, failures = _BACKOFF_S * 2**failures, failures + 1
                if failures > self._config.retries or (self.process is not None and self.process.exit_code is not None):
                    raise self._lost(f"{error} ({num_sent} attempts)") from None
            except BusyError as error:
                pause = min(_BUSY_S * 2 ** min(num_sent - 1, 9), _MOST_BUSY_S)
                if error.pause_s is not None:
                    pause = max(_BUSY_S, error.pause_s)  # "0" is no leave to flood it
                failures += error.status != 429
                if failures > self._config.retries or time.monotonic() + pause > end:
                    raise RunError(f"{error} ({num_sent} attempts)") from None
            except SilenceError as error:
                paused = not self._may_send.is_set()  # a paused server may fail its health check
                if paused or await self._client.ready() or not self._may_send.is_set():
                    raise
                raise self._lost(f"{error}, and its health check fails") from None
            flight.rid = ""  # not at the server: an abort ends it here
            if flight.aborted:
                return ABORTED
            self._stats = self._stats.plus(num_retries=1)
            await asyncio.sleep(pause)

    async def _until_usable(self) -> None:
        """Wait for the end of an update. EngineLost if it failed and no later one succeeded."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self._config.update_limit_s):
                await self._may_send.wait()
        if self._unusable:
            raise EngineLost(f"{self.label}: {self._unusable}")

    def _lost(self, why: str) -> EngineLost:
        if self.process is not None and self.process.exit_code is not None:
            why += f"\n{self.process.describe()}"
        return EngineLost(f"{self.label}: {why}")

    def _checked(self, flight: _Flight, answer: Answer) -> Completion:
        """Check an answer and convert it. RunError if it is invalid; EngineLost for tokens of versions that the server
        did not have meanwhile (somebody restarted it, or it is a router)."""
        tokens = np.array(answer.tokens, np.int64)
        with np.errstate(over="ignore"):  # what float32 does not hold is -inf, and refused
            logprobs = np.array(answer.logprobs, np.float64).astype(np.float32)
        request, params, size, vocab = flight.request, flight.request.params, len(tokens), self._spec.vocab_size
        versions = tuple(answer.versions) if size else ()
        starts, end = [start for _, start in versions], answer.tokens[-1:]
        for holds, expected in (
            (len(logprobs) == size, f"{size} log-probs, got {len(logprobs)}"),
            (np.isfinite(logprobs).all() and (logprobs <= 1e-3).all(), "log-probs that are finite and <= 0"),
            (((tokens >= 0) & (tokens < vocab)).all(), f"token ids in [0, {vocab})"),
            (size <= params.max_new_tokens, f"at most {params.max_new_tokens} tokens, got {size}"),
            (size or answer.finish == "abort", "at least one token"),
            (
                answer.finish != "stop" or set(end) <= set(params.stops),
                f"a stop at one of {params.stops}, got {end}",
            ),
            (answer.finish != "length" or size == params.max_new_tokens, f"{params.max_new_tokens} tokens, got {size}"),
            (
                not size or (starts[:1] == [0] and starts == sorted(set(starts)) and starts[-1] < size),
                f"versions that cover {size} tokens, got {shown(versions)}",
            ),
        ):
            if not holds:
                raise RunError(
                    f"{self._client.url}: prompt {request.uid}, sample {request.sample}: expected {expected}"
                )
        first, last, got = flight.version, self._version, [version for version, _ in versions]
        if not all(first <= version <= last for version in got):
            raise EngineLost(f"{self.label}: expected tokens of versions {first} to {last}, got {shown(got)}")
        record = Record.of(request.tokens, tokens, logprobs, self._routing(flight, answer))
        return Completion(size, answer.finish, versions, record, answer.num_cached_tokens)

    def _routing(self, flight: _Flight, answer: Answer) -> RoutingArray | None:
        """The experts of all tokens but the last, where they were asked for. An aborted response may lack them."""
        request, size = flight.request, len(answer.tokens)
        if not (request.params.routing and size) or (answer.experts is None and answer.finish == "abort"):
            return None
        try:
            given = np.empty(0, np.int64) if answer.experts is None else answer.experts
            return routing_of_all_layers(self._spec, given, len(request.tokens) + size - 1)
        except ValueError as error:
            raise RunError(f"{self._client.url}: prompt {request.uid}, sample {request.sample}: {error}") from None

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """See `Engine.abort`. Does not wait."""
        with contextlib.suppress(RunError):  # closed: all requests have ended
            self._thread.soon(self._begin_abort, None if uids is None else set(uids))

    def _begin_abort(self, chosen: set[str] | set[_Flight] | None) -> None:
        """Of these uids, or these requests."""
        for task, flight in self._flights.items():
            if chosen is None or flight.request.uid in chosen or flight in chosen:
                flight.aborted = True
                if not flight.rid:
                    task.cancel()
        self._spawn(self._abort_until_ended())

    async def _abort_until_ended(self) -> None:
        """A request may reach the server after its abort: repeat until all have ended."""
        while rids := [flight.rid for flight in self._flights.values() if flight.aborted and flight.rid]:
            with contextlib.suppress(TransportError, RunError):  # the request's own task raises the error
                await self._client.abort(rids)
            await asyncio.sleep(_ABORT_AGAIN_S)

    # Weights

    @cached_property
    def _shapes(self) -> LanguageModel:
        """The model without values: names in files, and shapes."""
        return model_on_meta(self._model_dir, self._spec)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine.update_weights`. After a failure of a living server, requests wait for another update."""
        self._check_open()
        if isinstance(source, Broadcast):
            _ = self._shapes  # before the server is paused: reading a family takes seconds
        if isinstance(source, LanguageModel):
            if source.spec != self._spec:
                raise UserError(f"weight update: expected a model of shape {self._spec}, got {source.spec}")
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="weights-", dir=self._log_dir) as place:
                save_model(source, Path(place), dtype=getattr(torch, self._dtype))
                self._run(self._update(Path(place).resolve(), version))
        elif isinstance(source, Path) and not is_adapter(source) and not (source / "config.json").is_file():
            raise UserError(f"weight update: expected a Hugging Face model directory, got {source}")
        else:
            self._run(self._update(source.resolve() if isinstance(source, Path) else source, version))

    async def _update(self, source: Path | Broadcast, version: int) -> None:
        client, limit = self._client, self._config.update_limit_s
        async with self._changing:
            self._may_send.clear()
            try:
                async with asyncio.timeout(limit):
                    if isinstance(source, Broadcast):
                        await self._join(source.group)
                    await client.pause(self._config.during_update)
                    if isinstance(source, Path):
                        await client.load(source, version)
                    else:
                        parts = buckets(self._shapes, source.bucket_bytes, getattr(torch, self._dtype), files=True)
                        await client.receive(source.group, parts, version)
                    await client.flush()
                    tag = await client.version()
                    if tag != str(version):
                        raise RunError(f"{self._client.url}: expected weights tagged {version}, got {shown(tag)}")
                    self._version, self._unusable = version, ""  # before any further token is sampled
                    await client.resume()
                self._may_send.set()
            except (TransportError, SilenceError, TimeoutError) as error:
                why = f"expected an answer within {limit:g} s" if isinstance(error, TimeoutError) else str(error)
                self._unusable = f"its update to version {version} failed: {why}"
                lost = self._lost(self._unusable)
                for task, flight in self._flights.items():
                    flight.error = lost
                    task.cancel()
                self._may_send.set()
                raise lost from None
            except BaseException as error:
                self._unusable = f"its update to version {version} failed: {error}"
                if isinstance(error, RunError):
                    raise RunError(f"{self.label}: {self._unusable}") from None
                raise

    async def _join(self, group: BroadcastGroup) -> None:
        if self._group == group:
            return
        await self._leave()
        await self._client.join_group(group)
        self._group = group

    async def _leave(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None
            with contextlib.suppress(RunError, TransportError):  # a broken group may be gone
                await self._client.leave_group(group)

    def flush_cache(self) -> None:
        self._run(self._flush())

    async def _flush(self) -> None:
        async with self._changing:
            if self._unusable:
                raise EngineLost(f"{self.label}: {self._unusable}")
            self._may_send.clear()
            busy = any(flight.rid for flight in self._flights.values())
            try:
                if busy:  # servers do not flush KV in use: paused, it is recomputed
                    await self._client.pause("keep")
                await self._client.flush()
            finally:
                if busy:
                    await self._client.resume()
                self._may_send.set()

    def checksums(self) -> Checksums | None:
        return self._run(self._client.checksums())

    def offload(self) -> None:
        self._run(self._client.offload())

    def onload(self) -> None:
        self._run(self._client.onload())

    # The rest

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("the engine is closed")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.run(work)
        except (TransportError, SilenceError) as error:
            raise self._lost(str(error)) from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)
        return task

    def health(self) -> bool:
        """Whether its health check passes; during an update, whether it responds."""
        if self._closed or (self.process is not None and self.process.exit_code is not None):
            return False
        with contextlib.suppress(RunError):  # closed meanwhile
            return self._thread.run(self._client.ready() if self._may_send.is_set() else self._client.reachable())
        return False

    def stats(self) -> EngineStats:
        """Counters; servers do not report forwards and preemptions, which stay 0."""
        stats, since = self._stats, self._busy_since
        return stats if since is None else stats.plus(busy_s=time.monotonic() - since)

    def close(self) -> None:
        with self._closing:  # a second call waits for the first
            if self._closed:
                return
            self._closed = True
            try:
                self._thread.run(self._shut())
            finally:
                self._thread.stop()
                if self.process is not None:
                    self.process.stop()

    async def _shut(self) -> None:
        rids = [flight.rid for flight in self._flights.values() if flight.rid]
        tasks = [*self._flights, *self._helpers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.process is None:  # leave an attached server idle, not paused, and in no group
            with contextlib.suppress(TransportError, RunError, TimeoutError):
                async with asyncio.timeout(_LEAVE_LIMIT_S):
                    await self._client.abort(rids)
                    await self._client.resume()
                    await self._leave()
        await self._client.close()
