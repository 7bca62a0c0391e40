"""An engine made of inference servers, launched here or attached to. `backend.Backend` says what one kind can do.

An event loop in a thread of its own talks to them; the public methods are called from any other thread.
What `SGLangEngine` and `VLLMEngine` add is their `backend_class`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import transfer
from pekoe.engine.async_thread import AsyncThread, in_thread
from pekoe.engine.base import EngineStats, WeightSource, validate
from pekoe.engine.fingerprints import Fingerprints
from pekoe.engine.servers import bring
from pekoe.engine.servers.batch import Batch, Taken
from pekoe.engine.servers.bring import Bring
from pekoe.engine.servers.client import Backend, Server, Setup, TransportError, compare
from pekoe.engine.servers.process import ServerProcess, check_open_files, check_python, free_ports, wait_ready
from pekoe.engine.transfer import Group, Tensors
from pekoe.model import Decoder

_KEEP_ALIVE_S = 2.0  # shorter than any server's (uvicorn: 5 s), so that no request meets a closing connection
_BYE_LIMIT_S = 5.0


class RemoteEngine:
    """A Generator (see `engine.base`) on servers.

    Args:
        model: the Hugging Face directory that launched servers start from, as version 0. Attached servers are taken to
            hold the same.
        config: `config.server` says which servers, and every limit.
        spec: the model's shape.
        max_sequence_tokens: the longest prompt with response that will be asked for.
        log_dir: server logs, and `weights/` for updates by disk.
        dtype: "float32" or "bfloat16", of the servers' weights.
        device: "cpu" or "cuda", where launched servers run.
        threads: CPU threads of each launched server.
        on_event: told, in the event loop's thread, of every server that is lost or comes back. Must not block.
        asked: sampling that will be asked for; what servers cannot do raises UserError before any is started.
        releases: whether `release` will be called.
    """

    backend_class: ClassVar[type[Backend]]

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
        on_event: Callable[[str], None] = lambda _: None,
        asked: Sequence[SamplingParams] = (),
        releases: bool = False,
    ) -> None:
        self._config = config.server
        self._spec, self._limit = spec, min(max_sequence_tokens, spec.max_positions)
        self._log_dir, self._dtype, self._device, self._threads = log_dir, dtype, device, threads
        self._on_event = on_event
        kv_tokens = config.server_kv(self._limit, spec.kv_values_per_token, dtype, device)
        self._limit = min(self._limit, kv_tokens or self._limit)
        limits = self._limit, kv_tokens, config.max_running
        setup = Setup(model, config.server, spec, *limits, dtype=dtype, device=device, releases=releases)
        self._backend = self.backend_class(setup)
        for params in asked:
            self._backend.check_params(params)
        self._servers = [Server(url.rstrip("/")) for url in config.server.urls]
        if not self._servers:
            check_python(self._backend.name, config.server.python)
            self._servers = [Server(f"http://127.0.0.1:{port}") for port in free_ports(config.server.count)]
        check_open_files(len(self._servers), config.server.max_requests)
        if config.server.sync == "shm" and not all(server.is_local for server in self._servers):
            raise UserError(
                f"engine.server.sync: expected servers on this host (a loopback address) for 'shm', got "
                f"{', '.join(s.url for s in self._servers if not s.is_local)}; nearest: 'disk', 'broadcast'"
            )
        self.events: list[str] = []
        self._version = 0
        self._stats = EngineStats()
        self._batch: Batch | None = None
        self._paused = self._updating = self._closed = False
        self._kept: set[asyncio.Task[Any]] = set()  # a task that nobody refers to may be collected
        self._tasks: dict[Server, asyncio.Task[None]] = {}  # servers that are being brought back
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._loop = AsyncThread(f"pekoe {self._backend.name}")
        try:
            self._loop.run(self._start())
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with response that fits."""
        return self._limit

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers and their states; not to be changed."""
        return tuple(self._servers)

    # Starting, losing, bringing back

    async def _start(self) -> None:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        self._backend.client = httpx.AsyncClient(limits=limits, trust_env=False)
        tasks = [asyncio.ensure_future(self._open(server)) for server in self._servers]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _open(self, server: Server) -> None:
        """Make it ready, at version 0."""
        if not self._config.urls:
            self._launch(server)
        else:
            await self._wait_ready(server, self._backend.reachable)
        try:
            if self._config.urls:  # whoever used it before may have left it paused
                await self._backend.check(server)
                await self._backend.resume(server)
            await self._wait_ready(server, self._backend.ready)
            await self._backend.set_version(server, 0)
        except TransportError as error:
            raise RunError(f"{self._backend.name}: {error}") from None
        server.state, server.version, server.why = "serving", 0, ""

    def _launch(self, server: Server) -> None:
        port = int(server.url.rpartition(":")[2])
        argv, more = self._backend.command(port)
        threads = {"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}
        number = self._servers.index(server)
        gpus = {"CUDA_VISIBLE_DEVICES": self._config.gpus[number]} if self._config.gpus else {}
        name = f"{self._backend.name} server {number}"
        log = self._log_dir / f"{name.lower().replace(' ', '-')}.log"
        server.process = ServerProcess(name, argv, os.environ | threads | more | self._config.env | gpus, log)

    async def _wait_ready(self, server: Server, check: Callable[[Server], Coroutine[Any, Any, bool]]) -> None:
        name = server.process.name if server.process is not None else f"{self._backend.name} at {server.url}"
        await wait_ready(name, server.process, lambda: check(server), self._config.start_limit_s)

    def _lose(self, server: Server, why: str, dead: bool = True) -> None:
        """It serves no longer; what it was asked for goes elsewhere."""
        if server.state == "dead":
            return
        server.state, server.why = ("dead" if dead else "stale"), why
        self._event(f"{server.url} is {server.state}: {why}")
        if dead and server.process is not None:
            code = server.process.exit_code
            server.why = f"{why}\n{server.process.describe()}" if code is not None else why
            self._background(in_thread(server.process.stop, 2.0))
        if server.group is not None:
            self._background(in_thread(self._backend.close_group, server.group[1]))
            server.group = None
        if self._batch is not None:
            self._batch.leave(server)

    def _background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return task

    def _event(self, text: str) -> None:
        self.events.append(text)
        self._on_event(text)

    def _obituary(self) -> str:
        lines = "\n".join(f"{server.url} is {server.state}: {server.why}" for server in self._servers)
        return f"{self._backend.name}: expected a server that serves at version {self._version}, got none.\n{lines}"

    async def _revive(self, server: Server) -> None:
        """From dead to stale: launched ones anew, in the background; attached ones if they answer again."""
        try:
            if server.process is not None:
                await in_thread(server.process.stop)
                server.url = f"http://127.0.0.1:{free_ports(1)[0]}"
                self._launch(server)
                await self._wait_ready(server, self._backend.ready)
            elif not await self._backend.reachable(server):
                return
        except (RunError, OSError) as error:
            server.why = str(error)
            self._event(f"{server.url} did not come back: {error}")
            return
        server.state, server.version, server.why = "stale", None, "came back; holds no current weights yet"
        self._event(f"{server.url} came back")

    async def _find_dead(self) -> None:
        """Servers that died while nothing was asked of them are lost as any others: the update goes on without them."""
        servers = [server for server in self._servers if server.state != "dead"]
        answers = await asyncio.gather(*(self._backend.reachable(server) for server in servers))
        for server, answer in zip(servers, answers, strict=True):
            if not answer and (server.process is None or server.process.exit_code is not None):
                self._lose(server, "it could not be reached")

    async def _revive_dead(self) -> None:
        """Begin to bring back what is dead; wait for it only if nothing else is alive."""
        dead = [server for server in self._servers if server.state == "dead"]
        for server in dead:
            if server not in self._tasks or self._tasks[server].done():
                self._tasks[server] = asyncio.ensure_future(self._revive(server))
        quick = [self._tasks[s] for s in dead if s.process is None or len(dead) == len(self._servers)]
        if quick:
            await asyncio.wait(quick)

    # Sampling

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> Iterator[Rollout]:
        """Sample; see `Generator.generate`. One call at a time: the iterator must end or be closed first."""
        self._check_open()
        validate(prompts, params, self._spec.vocab_size, self._limit, "the servers' context")
        self._backend.check_params(params)
        return self._run(list(prompts), params, self._servers)

    def probe(self, prompt: Prompt, params: SamplingParams) -> list[Rollout]:
        """Responses of every server that serves, `params.n` each. One that is lost meanwhile is left out."""
        self.generate([prompt], params)  # only its checks: nothing runs before it is iterated
        found: list[Rollout] = []
        for server in self._servers:
            if server.state == "serving":
                try:
                    found += self._run([prompt], params, [server])
                except RunError:
                    if server.state == "serving":
                        raise
        if not found:
            raise RunError(self._obituary())
        return found

    def _run(self, prompts: list[Prompt], params: SamplingParams, servers: list[Server]) -> Iterator[Rollout]:
        self._check_open()
        with self._lock:
            if self._batch is not None:
                raise RunError("the engine is generating already: exhaust or close the earlier iterator first")
            batch = self._batch = Batch(
                self._backend,
                servers,
                prompts,
                params,
                lose=self._lose,
                blocked=lambda: self._paused or self._updating,
                nobody=self._obituary,
            )
        try:
            self._loop.soon(batch.start)
            for _ in range(len(prompts) * params.n):
                taken = self._take(batch)
                rollout, cached = taken.rollout, taken.num_cached_tokens
                computed = max(0, rollout.num_prompt_tokens - cached) if rollout.num_tokens else 0
                self._stats = self._stats.plus(
                    num_prefill_tokens=computed, num_cached_tokens=cached, num_decode_tokens=rollout.num_tokens
                )
                self._loop.soon(batch.release, taken)
                yield rollout
        finally:  # also where the caller closes the iterator, or an exception passes through
            if not self._closed:
                self._loop.run(batch.close())
            self._batch = None
            self._stats = self._stats.plus(num_prefill_tokens=batch.num_prefilled_tokens)

    def _take(self, batch: Batch) -> Taken:
        """Wait for the next response. A pause may be ended by another thread, but not wait for ever."""
        paused_since = None
        while True:
            self._check_open()  # also where responses that nobody has taken are there still
            taken = batch.take(0.5)
            if isinstance(taken, BaseException):
                raise taken
            if taken is not None:
                return taken
            paused_since = (paused_since or time.monotonic()) if self._paused else None
            if paused_since and time.monotonic() - paused_since > self._config.update_limit_s:
                limit = self._config.update_limit_s
                raise RunError(f"the engine is paused: call resume() before going on (waited {limit:g} s)")

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """See `Generator.abort`. Returns when the servers were told; one that cannot be told is found out later."""
        batch = self._batch
        if batch is not None and not self._closed:
            self._loop.run(batch.abort(None if uids is None else set(uids)))

    def pause(self) -> None:
        """Stop sampling until `resume`; what is in flight stays. The iterator waits, at most `update_limit_s`."""
        self._check_open()
        self._loop.run(self._switch(True))

    def resume(self) -> None:
        self._check_open()
        self._loop.run(self._switch(False))

    async def _switch(self, paused: bool) -> None:
        self._paused = paused
        serving = [server for server in self._servers if server.state == "serving"]
        calls = [self._backend.pause(s, "keep") if paused else self._backend.resume(s) for s in serving]
        for server, outcome in zip(serving, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, TransportError):
                self._lose(server, str(outcome))
            elif outcome is not None:
                raise outcome
        if self._batch is not None:
            self._batch.wake()

    # Weights

    def update_weights(self, source: WeightSource, version: int) -> None:
        """See `Generator.update_weights`; by `config.server.sync`, and from disk where `source` is a directory.

        Dead servers are begun to be brought back, and take part once they answer. One that dies meanwhile is told
        as an event, and the others go on. RunError names every server that lives and did not take the weights: it is
        stale and does not serve; the others do, at `version`.
        """
        self._check_open()
        if isinstance(source, Path):
            if not (source / "config.json").is_file():
                raise UserError(f"weight update: expected a Hugging Face model directory, got {source}")
            self._loop.run(self._update(bring.from_disk(source.resolve()), version))
            return
        if source.spec != self._spec:
            raise UserError(f"weight update: expected a model of shape {self._spec}, got {source.spec}")
        if self._config.sync == "broadcast":
            self._loop.run(self._update(bring.by_broadcast(source), version))
            return
        parent = transfer.SHARED_MEMORY if self._config.sync == "shm" else self._log_dir.resolve() / "weights"
        with transfer.written(source, parent, getattr(torch, self._dtype)) as directory:
            self._loop.run(self._update(bring.from_disk(directory), version))

    def join(self, group: Group) -> None:
        """Make the servers that serve, or may, members of a group whose rank 0 is another process; see `receive`."""
        alive = [server for server in self._servers if server.state != "dead"]
        self._loop.run(bring.join(self._backend, alive, group))

    def receive(self, parts: Iterable[Tensors], version: int) -> None:
        """As `update_weights`, of what rank 0 of the joined group broadcasts: these tensors, of which names, shapes and
        dtypes are used."""
        self._check_open()
        self._loop.run(self._update(bring.from_group(parts), version))

    @property
    def num_workers(self) -> int:
        """Processes of all servers that join a group."""
        return sum(self._loop.run(self._backend.num_workers(server)) for server in self._servers)

    def prove(self) -> Fingerprints | None:
        """Fingerprints of what the one server holds. None: it cannot tell."""
        (server,) = self._servers
        return self._loop.run(self._backend.fingerprints(server))

    def release(self) -> None:
        """See `Generator.release`."""
        self._each(self._backend.release)

    def restore(self) -> None:
        self._each(self._backend.restore)

    def _each(self, call: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        self._check_open()
        for server in self._servers:
            self._loop.run(call(server))

    async def _update(self, bring: Bring, version: int) -> None:
        self._updating = True
        try:
            await self._find_dead()
            await self._revive_dead()
            alive = [server for server in self._servers if server.state != "dead"]
            if not alive:
                raise RunError(self._obituary())
            failures = await asyncio.gather(*(self._update_one(server, bring, version) for server in alive))
        finally:
            self._updating = False
            if self._batch is not None:
                self._batch.wake()
        if any(server.state == "serving" for server in alive):
            self._version = version
        if stale := [why for server, why in zip(alive, failures, strict=True) if server.state == "stale"]:
            reasons = "\n".join(stale)
            raise RunError(f"weight update to version {version} failed on {len(stale)} server(s):\n{reasons}")
        if self._version != version:
            raise RunError(self._obituary())

    async def _update_one(self, server: Server, bring: Bring, version: int) -> str:
        """Returns what went wrong, or an empty string: then it serves at `version`."""
        backend, limit = self._backend, self._config.update_limit_s
        server.state, server.why = "stale", f"its update to version {version} is not done"
        try:
            async with asyncio.timeout(limit):
                await backend.pause(server, self._config.during_update)
                await bring(backend, server, version)
                await backend.flush(server)
                tag = await backend.version_of(server)
                if tag != str(version):
                    raise RunError(f"{server.url}: expected weights tagged {version}, got {tag!r}")
                server.version = version  # before any further token is sampled
                if not self._paused:
                    await backend.resume(server)
        except TransportError as error:
            self._lose(server, str(error))
        except TimeoutError:
            self._lose(server, f"expected its update within {limit:g} s", dead=False)
        except RunError as error:
            self._lose(server, str(error), dead=False)
        except Exception as error:  # torch.distributed raises what it likes
            self._lose(server, f"{type(error).__name__}: {error}", dead=False)
        else:
            server.state, server.why = "serving", ""
            return ""
        return f"{server.url} is {server.state}: {server.why}"

    def holds(self, model: Decoder) -> bool | None:
        """See `Generator.holds`; of every server that serves. What differs is told as an event."""
        expected = self._backend.expected(model)
        if expected is None:
            return None
        return self._loop.run(compare(self._backend, self._servers, expected, self._lose, self._event))

    # The rest

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("the engine is closed")

    def alive(self) -> bool:
        """Whether a server answers, be it one that serves or not. Those that died are lost."""
        self._loop.run(self._find_dead())
        return any(server.state != "dead" for server in self._servers)

    def health(self) -> bool:
        """True when a server serves, and all that serve answer their health check."""
        if self._closed:
            return False
        return self._loop.run(self._healthy())

    async def _healthy(self) -> bool:
        serving = [server for server in self._servers if server.state == "serving"]
        check = self._backend.reachable if self._paused else self._backend.ready
        return bool(serving) and all(await asyncio.gather(*map(check, serving)))

    def stats(self) -> EngineStats:
        """Counters as far as servers tell: forwards and preemptions stay 0."""
        return self._stats

    def close(self) -> None:
        with self._closing:  # a second call waits for the first
            if not self._closed:
                self._closed = True
                try:
                    self._loop.run(self._shut())
                finally:
                    self._loop.stop()

    async def _shut(self) -> None:
        if self._batch is not None:
            self._batch.fail(RunError("the engine is closed"))
            await self._batch.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for server in self._servers:
            if server.process is None and server.state != "dead":  # it goes on without us
                with contextlib.suppress(TransportError, RunError, TimeoutError):
                    async with asyncio.timeout(_BYE_LIMIT_S):
                        await self._backend.part(server, server.group[0] if server.group else None)
            if server.group is not None:
                self._background(in_thread(self._backend.close_group, server.group[1]))
        stops = [in_thread(server.process.stop) for server in self._servers if server.process is not None]
        await asyncio.gather(*stops, return_exceptions=True)
        if self._kept:  # a group whose other end is gone may not close
            await asyncio.wait(self._kept, timeout=_BYE_LIMIT_S)
        if self._backend.client is not None:
            await self._backend.client.aclose()
