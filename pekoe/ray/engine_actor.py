"""An engine in a Ray actor: the actor, its proxy in the controller, and what starts it.

What is sampled goes to the store of the actor's node before the controller hears of it, with its length alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import (
    Checksums,
    Engine,
    EngineKind,
    EngineLost,
    EngineStats,
    NoPlace,
    WeightSource,
    validate,
)
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import load_model, read_spec
from pekoe.ray.placement import ByteCount, WorkerLost, first_line, node_of, ray_get, within
from pekoe.ray.store import StoreRef, StoreRegistry
from pekoe.run.build import ServerStarter
from pekoe.weights import Receiver
from pekoe.weights.groups import use_interface

_ANSWER_LIMIT_S = 10.0  # of what an engine answers at once
_CALL_LIMIT_S = 120.0  # of what may take an engine a moment
_CLOSE_LIMIT_S = 20.0  # then it is killed


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What of an engine does not change."""

    pid: int
    max_sequence_tokens: int
    max_requests: int | None
    num_workers: int
    vocab_size: int


class EngineActor:
    """The actor: one engine, embedded with weights of its own, or one server.

    Args:
        config: the recipe.
        number: of the engine among the run's.
        incarnation: of this process, for the keys of its records.
        node: the number of this node's store.
        store: this node's store.
        max_sequence_tokens: of the longest prompt with its response.
    """

    def __init__(
        self, config: RLConfig, number: int, incarnation: int, node: int, store: Any, max_sequence_tokens: int
    ) -> None:
        assert config.cluster is not None
        generation = config.cluster.generation
        threads = max(1, int(generation.cpus_per_engine))
        torch.set_num_threads(threads)
        use_interface(ray.util.get_node_ip_address())
        self._incarnation, self._node, self._store = incarnation, node, store
        self._numbers = count()  # of the requests
        spec, _ = read_spec(Path(config.model.path))
        self._vocab_size = spec.vocab_size
        device = "cuda" if generation.gpus_per_engine else "cpu"
        colocate, config = config.cluster.colocate, config.engine_config(number)
        if config.engine.backend == "embedded":
            self._engine: Engine = self._open_embedded(config, device, max_sequence_tokens)
        else:
            logs = Path(config.run.dir).resolve() / "logs" / f"engine-{number}"
            self._engine = ServerStarter(
                config, spec, device, threads, max_sequence_tokens, logs, offloads=colocate
            ).start()

    @staticmethod
    def _open_embedded(config: RLConfig, device: str, max_sequence_tokens: int) -> EmbeddedEngine:
        model = load_model(config.model.path, torch.float32, device).requires_grad_(False)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        # One group more than runs at once, so that room which comes free is taken without a word to the controller.
        most = config.engine.max_running + config.rollout.samples_per_prompt
        return EmbeddedEngine(
            model, config.engine, max_sequence_tokens, dtype, owns_model=True, max_requests=most, receive=Receiver()
        )

    async def info(self) -> EngineInfo:
        engine = self._engine
        limits = engine.max_sequence_tokens, engine.max_requests, engine.num_workers
        return EngineInfo(os.getpid(), *limits, self._vocab_size)

    async def sample(self, packed: bytes) -> AsyncIterator[bytes]:
        """Sample these requests, which are scheduled together; gives (index, Completion or RunError) as they end."""
        requests: list[Request] = pickle.loads(packed)
        futures = self._engine.submit(requests)
        tasks = [
            asyncio.ensure_future(self._keep(index, request, future))
            for index, (request, future) in enumerate(zip(requests, futures, strict=True))
        ]
        for task in asyncio.as_completed(tasks):
            yield pickle.dumps(await task)

    async def _keep(
        self, index: int, request: Request, future: Future[Completion]
    ) -> tuple[int, Completion | RunError]:
        """Put a completion's record into the store."""
        try:
            completion = await asyncio.wrap_future(future)
        except RunError as error:
            return index, RunError(str(error))
        key = request.uid, request.draw, request.sample, self._incarnation, next(self._numbers)
        await self._store.put.remote({key: completion.handle.resolve()})
        return index, replace(completion, handle=StoreRef(self._node, key))

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine in a thread of its own, so that others are answered meanwhile."""
        return await asyncio.to_thread(getattr(self._engine, method), *args)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)


class RayEngine(Engine):
    """The proxy of an EngineActor. One remote call carries the requests of a `submit`, and streams completions.

    Args:
        actor: the EngineActor.
        info: as the actor gave it.
        update_limit_s: of an update of the weights.
    """

    def __init__(
        self, actor: Any, kind: EngineKind, info: EngineInfo, update_limit_s: float, bytes_passed: ByteCount
    ) -> None:
        self.kind: EngineKind = kind
        self.info = info
        self._actor, self._update_limit_s, self._bytes = actor, update_limit_s, bytes_passed
        self._version, self._closed, self._stats = 0, False, EngineStats()
        self._following: set[asyncio.Task[None]] = set()
        self._thread = AsyncThread("engine proxy")  # Ray calls back in a thread that must not block; here it may

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_sequence_tokens(self) -> int:
        return self.info.max_sequence_tokens

    @property
    def max_requests(self) -> int | None:
        return self.info.max_requests

    @property
    def num_workers(self) -> int:
        return self.info.num_workers

    def check(self, params: SamplingParams) -> None:
        self._call("check", _ANSWER_LIMIT_S, params)

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. Whatever fails in the actor is EngineLost: another process may do better."""
        validate(requests, self.info.vocab_size, self.info.max_sequence_tokens, "the engine's room")
        if self._closed:
            raise RunError("the engine is closed")
        futures: list[Future[Completion]] = [Future() for _ in requests]
        if requests:
            stream = self._actor.sample.options(num_returns="streaming").remote(self._bytes.pack(list(requests)))
            self._thread.soon(self._follow_soon, stream, futures)
        return futures

    def _follow_soon(self, stream: Any, futures: list[Future[Completion]]) -> None:
        task = self._thread.loop.create_task(self._follow(stream, futures))
        self._following.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._following.discard)

    async def _follow(self, stream: Any, futures: list[Future[Completion]]) -> None:
        """Resolve futures as the stream gives completions; those that are left when it breaks off are lost."""
        error: Exception = EngineLost("it left requests unanswered")
        try:
            async for ref in stream:
                index, outcome = self._bytes.unpack(await ref)
                if isinstance(outcome, RunError):
                    futures[index].set_exception(EngineLost(str(outcome)))
                else:
                    futures[index].set_result(outcome)
        except RayError as broken:
            error = EngineLost(first_line(broken))
        finally:
            if self._closed:
                error = RunError("the engine was closed while requests were unfinished")
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def abort(self, uids: Iterable[str] | None = None) -> None:
        self._call("abort", _CALL_LIMIT_S, None if uids is None else list(uids))

    def update_weights(self, source: WeightSource, version: int) -> None:
        self._call("update_weights", self._update_limit_s, source, version)
        self._version = version

    def flush_cache(self) -> None:
        self._call("flush_cache", _CALL_LIMIT_S)

    def checksums(self) -> Checksums | None:
        return self._call("checksums", self._update_limit_s)

    def offload(self) -> None:
        self._call("offload", self._update_limit_s)

    def onload(self) -> None:
        self._call("onload", self._update_limit_s)

    def health(self) -> bool:
        try:
            return self._call("health", _ANSWER_LIMIT_S)
        except RunError:
            return False

    def stats(self) -> EngineStats:
        """As the engine counted, or as it last could tell."""
        with contextlib.suppress(RunError):
            self._stats = self._call("stats", _ANSWER_LIMIT_S)
        return self._stats

    def _call(self, method: str, limit_s: float, *args: Any) -> Any:
        """EngineLost where the actor died or does not answer; other errors as the engine raised them."""
        try:
            return ray_get(self._actor.call.remote(method, *args), limit_s, f"the engine's {method}")
        except WorkerLost as error:
            raise EngineLost(str(error)) from None

    def close(self) -> None:
        closed, self._closed = self._closed, True
        if closed:
            return
        ray.wait([self._actor.close.remote()], timeout=_CLOSE_LIMIT_S)
        ray.kill(self._actor)
        self._thread.stop()


@dataclass(frozen=True, slots=True)
class RayStarter:
    """Places and starts one engine of a cluster (implements `engine.pool.Starter`).

    Example: RayStarter(config, 0, group, 0, stores, bytes_passed, max_sequence_tokens=8192).
    """

    config: RLConfig
    number: int
    group: PlacementGroup
    bundle: int  # of the placement group
    stores: StoreRegistry
    bytes_passed: ByteCount
    max_sequence_tokens: int
    devices: str | None = None  # CUDA_VISIBLE_DEVICES, where its ranks have the same in turn (colocate)

    @property
    def name(self) -> str:
        return f"engine {self.number}"

    @property
    def kind(self) -> EngineKind:
        return self.config.kind_of_engine(self.number)

    def start(self) -> RayEngine:
        """See `Starter`; NoPlace while its node is lost and no other has room."""
        cluster = self.config.cluster
        assert cluster is not None
        node_id = node_of(self.group, self.bundle)
        if node_id is None:
            raise NoPlace(f"the node of {self.name} is lost, and no other has room for it yet")
        one = cluster.generation
        node, store = self.stores.on(node_id)
        env = {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        actor: Any = (
            ray.remote(EngineActor)
            .options(
                num_cpus=one.cpus_per_engine,
                num_gpus=0 if self.devices is not None else one.gpus_per_engine,
                runtime_env={"env_vars": env},
                scheduling_strategy=within(self.group, self.bundle),
                max_concurrency=10_000,
            )
            .remote(self.config, self.number, self.stores.new_incarnation(), node, store, self.max_sequence_tokens)
        )
        try:
            info = ray_get(actor.info.remote(), cluster.start_limit_s, f"{self.name} to start")
        except (RunError, UserError):
            ray.kill(actor)
            raise
        return RayEngine(actor, self.kind, info, cluster.sync_limit_s, self.bytes_passed)
