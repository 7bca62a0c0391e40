"""An engine in a Ray actor: the actor, its proxy in the controller, and its starter.

Samples go to the store of the actor's node before the controller hears of them; the controller gets their lengths.
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
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.core.types import Completion, Record, Request, SamplingParams
from pekoe.engine.base import Checksums, EngineKind, EngineLost, EngineStats, NoPlace, Sampler, WeightSource, validate
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import read_spec
from pekoe.ray.placement import ByteCount, WorkerLost, first_line, node_of, ray_get
from pekoe.ray.store import Key, StoreRef, StoreRegistry
from pekoe.ray.streams import StreamFollower, as_they_end
from pekoe.run.build import ServerStarter, load_trained
from pekoe.weights import Receiver
from pekoe.weights.groups import use_interface

_ANSWER_LIMIT_S = 10.0  # of methods that answer at once
_CALL_LIMIT_S = 120.0  # of methods that may take a moment
_CLOSE_LIMIT_S = 20.0  # then the actor is killed

_incarnations = count()  # a number for each process that samples, for the keys of its records


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The properties of an engine that do not change."""

    pid: int
    max_sequence_tokens: int
    max_requests: int | None
    num_workers: int
    vocab_size: int


class EngineActor:
    """The actor: one engine, embedded with weights of its own, or one server.

    Args:
        number: of the engine among the run's.
        incarnation: number of this process, for the keys of its records.
        node: number of `store`, which is on this node.
        max_sequence_tokens: of the longest prompt with its response.
    """

    def __init__(
        self, config: RLConfig, number: int, incarnation: int, node: int, store: Any, max_sequence_tokens: int
    ) -> None:
        assert config.cluster is not None
        generation, colocate = config.cluster.generation, config.cluster.colocate
        threads = max(1, int(generation.cpus_per_engine))
        torch.set_num_threads(threads)
        use_interface(ray.util.get_node_ip_address())
        self._incarnation, self._node, self._store = incarnation, node, store
        self._numbers = count()  # of the requests
        spec, _ = read_spec(Path(config.model.path), config.model.implementation)
        self._vocab_size = spec.vocab_size
        device = "cuda" if generation.gpus_per_engine else "cpu"
        config = config.engine_config(number)
        if config.engine.backend != "embedded":
            logs = Path(config.run.dir).resolve() / "logs" / f"engine-{number}"
            starter = ServerStarter(config, spec, device, threads, max_sequence_tokens, logs, offloads=colocate)
            self._engine = starter.start()
            return
        own = weights_dtype(config, spec)
        model = load_trained(config.model, device, config.run.seed, own).requires_grad_(False)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        # One group more than runs at once: free room is taken without asking the controller.
        most = config.engine.max_running + config.rollout.samples_per_prompt
        self._engine = EmbeddedEngine(
            model,
            config.engine,
            max_sequence_tokens,
            dtype,
            owns_model=True,
            max_requests=most,
            receive=Receiver(),
            reserve_bytes=None if colocate else 0,  # ranks that take turns with it may not be there yet
            routing=config.rollout.replay_routing,
        )

    async def info(self) -> EngineInfo:
        limits = self._engine.max_sequence_tokens, self._engine.max_requests, self._engine.num_workers
        return EngineInfo(os.getpid(), *limits, self._vocab_size)

    async def sample(self, packed: bytes) -> AsyncIterator[bytes]:
        """Sample these requests, scheduled together; yields completions, or errors, as `streams.StreamFollower` has it.

        Records are in the store before the controller hears of them."""
        requests: list[Request] = pickle.loads(packed)
        futures = self._engine.submit(requests)
        async for ended in as_they_end(futures):
            records: dict[Key, Record] = {}
            outcomes: list[tuple[int, Completion | Exception]] = []
            for index, outcome in ended:
                if not isinstance(outcome, Exception):
                    request = requests[index]
                    key = request.uid, request.draw, request.sample, self._incarnation, next(self._numbers)
                    records[key] = outcome.handle.resolve()
                    outcome = replace(outcome, handle=StoreRef(self._node, key))
                outcomes.append((index, outcome))
            await self._store.put.remote(records)
            yield pickle.dumps(outcomes)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine in a thread of its own, so that other calls are answered meanwhile."""
        return await asyncio.to_thread(getattr(self._engine, method), *args)


def weights_dtype(config: RLConfig, spec: ModelSpec) -> torch.dtype:
    """Of the weights of a cluster's embedded engine: that of the products, as ranks gather theirs (see `Trainer`). A
    family that transformers computes has float32 weights here and there: it may compute more in them than products."""
    return torch.float32 if isinstance(spec, FamilySpec) else getattr(torch, config.model.dtype)


class RayEngine(Sampler):
    """The proxy of an EngineActor (implements `Engine`). One remote call carries the requests of a `submit`, and
    streams completions."""

    def __init__(
        self, actor: Any, kind: EngineKind, info: EngineInfo, update_limit_s: float, passed: ByteCount
    ) -> None:
        self.kind: EngineKind = kind
        self.info, self._actor, self._update_limit_s, self._passed = info, actor, update_limit_s, passed
        self.max_sequence_tokens, self.max_requests = info.max_sequence_tokens, info.max_requests
        self.version, self.num_workers = 0, info.num_workers
        self._stats = EngineStats()
        self._follower = StreamFollower(
            "engine proxy", passed, _lost, "the engine was closed while requests were unfinished"
        )

    def check(self, params: SamplingParams) -> None:
        self._call("check", _ANSWER_LIMIT_S, params)

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """See `Engine.submit`. Every failure in the actor is EngineLost: another process may do better."""
        validate(requests, self.info.vocab_size, self.info.max_sequence_tokens, "the engine's room")
        if self._follower.closing:
            raise RunError("the engine is closed")
        futures: list[Future[Completion]] = [Future() for _ in requests]
        if requests:
            packed = self._passed.pack([replace(request, listener=None) for request in requests])
            stream = self._actor.sample.options(num_returns="streaming").remote(packed)
            self._follower.follow(stream, futures)
        return futures

    def abort(self, uids: Iterable[str] | None = None) -> None:
        self._call("abort", _CALL_LIMIT_S, None if uids is None else list(uids))

    def update_weights(self, source: WeightSource, version: int) -> None:
        self._call("update_weights", self._update_limit_s, source, version)
        self.version = version

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
        """The engine's last answer, where it does not answer now."""
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
        closed, self._follower.closing = self._follower.closing, True
        if not closed:
            ray.wait([self._actor.call.remote("close")], timeout=_CLOSE_LIMIT_S)
            ray.kill(self._actor)
            self._follower.close()


def _lost(error: Exception) -> EngineLost:
    return EngineLost(str(error) if isinstance(error, RunError) else first_line(error))


@dataclass(frozen=True, slots=True)
class RayStarter:
    """Places and starts one engine of a cluster (implements `engine.pool.Starter`).

    Example: RayStarter(config, 0, group, 0, stores, max_sequence_tokens=8192).
    """

    config: RLConfig
    number: int
    group: PlacementGroup
    bundle: int  # of the placement group
    stores: StoreRegistry
    max_sequence_tokens: int
    devices: str | None = None  # CUDA_VISIBLE_DEVICES, where the engine and its ranks take turns (colocate)

    @property
    def name(self) -> str:
        return f"engine {self.number}"

    @property
    def kind(self) -> EngineKind:
        return self.config.kind_of_engine(self.number)

    def start(self) -> RayEngine:
        """See `Starter`; NoPlace while the engine's node is lost and no other has room."""
        cluster = self.config.cluster
        assert cluster is not None
        node_id = node_of(self.group, self.bundle)
        if node_id is None:
            raise NoPlace(f"the node of {self.name} is lost, and no other has room for it yet")
        generation, shared = cluster.generation, self.devices is not None
        actor: Any = ray.remote(EngineActor).options(
            num_cpus=generation.cpus_per_engine,
            num_gpus=0 if shared else generation.gpus_per_engine,
            runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": self.devices} if shared else {}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, self.bundle),
            max_concurrency=10_000,
        )
        process = self.config, self.number, next(_incarnations), *self.stores.on(node_id)
        engine = actor.remote(*process, self.max_sequence_tokens)
        try:
            info = ray_get(engine.info.remote(), cluster.start_limit_s, f"{self.name} to start")
        except (RunError, UserError):
            ray.kill(engine)
            raise
        except SystemExit:  # what Ray raises in a thread that waits while it is shut down; the engine ends with it
            raise NoPlace(f"Ray was shut down while {self.name} started") from None
        return RayEngine(engine, self.kind, info, cluster.sync_limit_s, self.stores.passed)
