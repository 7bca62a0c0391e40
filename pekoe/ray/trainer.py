"""The ranks, which train: the actor of one, and all of them as one trainer and one sender of weights.

Each mini-batch is shared out. A rank is sent its own share, and fetches the tokens of that from stores.
"""

from __future__ import annotations

import os
import pickle
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pekoe.config.recipes import RLConfig
from pekoe.core.loop import Counters, Snapshot, StepStats
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, FloatArray, Sample
from pekoe.engine.base import BroadcastGroup, Checksums, EngineKind
from pekoe.model import LanguageModel
from pekoe.ray.engine_actor import weights_dtype
from pekoe.ray.logprob_prefetch import LogprobPrefetcher, LogprobRefs, PendingLogprobs
from pekoe.ray.placement import WorkerLost, bundles, nodes_of, place, ray_get
from pekoe.ray.store import StoreRef, StoreRegistry, bytes_of, fetch, ref_of
from pekoe.run.build import make_trainer, open_model
from pekoe.run.distributed import make_layout, process_group
from pekoe.run.hardware import describe
from pekoe.train.trainer import Objective, RankBatch, pack_minibatch
from pekoe.weights import LocalSender, StagedSender
from pekoe.weights.groups import free_port, use_interface

_ADDRESS_LIMIT_S = 60.0
Thread = Literal["write", "publish"]  # of a rank, beside that in which it trains


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank fetched from stores, and how long it worked. Sums over ranks and calls."""

    seconds: float = 0.0
    num_bytes: int = 0
    busy_s: float = 0.0  # of the whole call

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.seconds + other.seconds, self.num_bytes + other.num_bytes, self.busy_s + other.busy_s)


class RankActor:
    """The actor. All ranks are called together, with the same arguments but for their shares. `node` is the number of
    `store`, which is on this node."""

    snapshot: Snapshot  # the last one

    def __init__(self, config: RLConfig, rank: int, node: int, store: Any) -> None:
        assert config.cluster is not None
        self._config, self._rank, self._node, self._store = config, rank, node, store
        self._section, self._limit_s = config.cluster.training, config.cluster.step_limit_s
        torch.set_num_threads(max(1, int(self._section.cpus_per_rank)))
        self._address = ray.util.get_node_ip_address()

    def address(self) -> tuple[str, int]:
        """The address of this node, with a port that is free."""
        return self._address, free_port(self._address)

    def start(self, host: str, port: int, name: str) -> tuple[int, str]:
        """Join the other ranks, load the model. Returns the process id, and the GPUs as in CUDA_VISIBLE_DEVICES.

        The first rank keeps the store at `host` alone; `name`, which nobody else knows, begins all keys in it.
        """
        use_interface(self._address)
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(self._rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(self._section.ranks)}
        self._process_group = process_group(name)
        self._process_group.__enter__()
        section = self._config.model.model_copy(update={"device": device_of(self._config)})
        model, _, dtype = open_model(section, self._config.run.seed)
        device, staged, engine_dtype = next(model.parameters()).device, None, weights_dtype(self._config, model.spec)
        if stages(self._config):  # before the trainer prepares the model
            apart = make_layout(model.spec, self._section, device, apart=True)
            temperature = self._config.rollout.temperature
            staged = StagedSender(model, dtype, temperature, False, self._address, apart, engine_dtype)
        layout = make_layout(model.spec, self._section, device)
        self.trainer = make_trainer(self._config, model, dtype, layout)
        self.sender = staged or LocalSender(model, dtype, self._canary_logprobs, self._address, engine_dtype)
        return os.getpid(), ",".join(map(str, ray.get_gpu_ids()))

    def call(self, path: str, *args: Any) -> Any:
        """Call a method of this actor, or of what it has: "trainer.skip", "sender.open", "snapshot.write"."""
        return attrgetter(path)(self)(*args)

    def measure(self) -> dict[str, Any]:
        """What the device reaches while all ranks measure theirs; see `describe`."""
        return describe(self.trainer.device, self.trainer.compute_dtype)

    def empty_cache(self) -> None:
        """Give back what the allocator keeps: engines take their turn on this device."""
        torch.cuda.empty_cache()

    def take_snapshot(self) -> None:
        self.snapshot = self.trainer.snapshot()

    def counts(self) -> tuple[int, int]:
        return self.trainer.num_updates, self.trainer.num_not_finite

    def step(self, packed: bytes) -> bytes:
        """`Trainer.step` of (share, objective, denominator, max_mean_ratio); returns (StepStats, Traffic)."""
        start = time.perf_counter()
        share, *rest = pickle.loads(packed)
        share, traffic = _fetched(share)
        stats = self.trainer.step(share, *rest)
        return pickle.dumps((stats, replace(traffic, busy_s=time.perf_counter() - start)))

    def logprobs(self, packed: bytes) -> bytes:
        """Log-probs of (share, whether by the reference model) go to this node's store; returns (refs, Traffic)."""
        start = time.perf_counter()
        share, reference = pickle.loads(packed)
        local, traffic = _fetched(share)
        arrays = chain.from_iterable(self.trainer.logprobs_packed(local, reference))
        name = "reference" if reference else "proximal"
        samples = chain.from_iterable(share.bins)
        refs: list[StoreRef[FloatArray]] = [StoreRef(self._node, (*ref_of(s).key, name)) for s in samples]
        values = {ref.key: array for ref, array in zip(refs, arrays, strict=True)}
        ray_get(self._store.put.remote(values), self._limit_s, "the store to take log-probs")
        return pickle.dumps((refs, replace(traffic, busy_s=time.perf_counter() - start)))

    def _canary_logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        """Every rank computes all: too few to share out."""
        budget = max(self._config.train.token_budget * self._section.cp, *map(len, samples))
        (share,) = pack_minibatch(samples, budget, self.trainer.model.spec, 1)
        places = [place for members in share.indices for place in members]
        arrays = [array for members in self.trainer.logprobs_packed(share) for array in members]
        return [array for _, array in sorted(zip(places, arrays, strict=True), key=lambda pair: pair[0])]


class RayTrainer:
    """All ranks (implements `core.loop.Trainer`). Losing any of them raises WorkerLost, from then on at every call
    until `start`: a part of the weights is useless without the others."""

    def __init__(self, config: RLConfig, spec: ModelSpec, stores: StoreRegistry, stack: ExitStack) -> None:
        assert config.cluster is not None
        self._config, self._cluster, self._section = config, config.cluster, config.cluster.training
        self._spec, self._stores, self._passed = spec, stores, stores.passed
        *_, needed = bundles(self._cluster).values()
        self.place = place(needed, "SPREAD", "the training ranks", self._cluster.start_limit_s, stack)
        self._ranks_each = self._section.ranks // len(needed)
        self._alike = self._section.tp * self._section.cp  # neighbours in the mesh with the same share
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self.devices: list[str] = []  # of each bundle, the GPUs of its ranks as in CUDA_VISIBLE_DEVICES
        self.num_updates = self.num_not_finite = 0
        self._lost: WorkerLost | None = None
        self._traffic = Traffic()
        chunk_tokens = config.train.token_budget * self._section.ranks // self._section.tp
        self.prefetcher = LogprobPrefetcher(partial(self._begin_logprobs, reference=False), chunk_tokens)
        stack.callback(self.stop)

    def start(self) -> None:
        """Start all ranks, anew where there were some."""
        self.stop()
        limit_s, section, each = self._cluster.start_limit_s, self._section, self._ranks_each
        nodes = nodes_of(self.place, limit_s, "the training ranks")
        # A rank without a GPU of its own must not see those of others.
        env = {} if device_of(self._config) == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        make: Any = ray.remote
        actor = make(concurrency_groups={"write": 1, "publish": 1})(RankActor)
        for rank in range(section.ranks):
            bundle = rank // each
            options = actor.options(
                num_cpus=section.cpus_per_rank,
                num_gpus=section.gpus_per_rank,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, bundle),
            )
            self.ranks.append(options.remote(self._config, rank, *self._stores.on(nodes[bundle])))
        host, port = self.first("address", "the first rank to start", limit_s=limit_s)
        started = self.call("start", "the ranks to start", host, port, secrets.token_hex(16), limit_s=limit_s)
        self.pids = [pid for pid, _ in started]
        gpus = [gpus for _, gpus in started]
        self.devices = [",".join(filter(None, gpus[i : i + each])) for i in range(0, len(gpus), each)]
        self.num_updates = self.num_not_finite = 0

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks, self._lost = [], None
        self.prefetcher.reset()

    def machine(self) -> dict[str, Any]:
        """The `machine` event of a journal; its ceilings are those of all ranks together, as a step's work is."""
        ranks = self.call("measure", "the ranks to measure their devices", limit_s=self._cluster.start_limit_s)
        total = {name: sum(rank[name] for rank in ranks) for name in ("flop_s", "byte_s")}
        return describe() | {"device": f"{len(ranks)} x {ranks[0]['device']}", "dtype": ranks[0]["dtype"], **total}

    def call(
        self, method: str, what: str, *args: Any, limit_s: float | None = None, thread: Thread | None = None
    ) -> list[Any]:
        """Call all ranks with the same arguments; `what` and `limit_s` (by default that of a step) as in `ray_get`.
        `thread`: beside training."""
        calls = [rank.call.options(concurrency_group=thread) for rank in self.ranks]
        return self._get([call.remote(method, *args) for call in calls], what, limit_s)

    def first(
        self, method: str, what: str, *args: Any, limit_s: float | None = None, thread: Thread | None = None
    ) -> Any:
        """Call the first rank alone."""
        call = self.ranks[0].call.options(concurrency_group=thread)
        return self._get(call.remote(method, *args), what, limit_s)

    def _get(self, refs: Any, what: str, limit_s: float | None = None) -> Any:
        if self._lost is not None:
            raise self._lost
        try:
            return ray_get(refs, limit_s or self._cluster.step_limit_s, what)
        except WorkerLost as error:
            self._lost = error
            for rank in self.ranks:  # now, so that engines in a group with the first do not wait for it
                ray.kill(rank)
            raise

    def skip(self, num_updates: int) -> None:
        self.prefetcher.reset()
        self.call("trainer.skip", "the ranks to skip an optimizer step", num_updates)
        self.num_updates += num_updates

    def step(
        self,
        samples: Sequence[AnySample],
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """See `train.Trainer.step`."""
        self.prefetcher.reset()
        refs = self._send("step", samples, objective, denominator, max_mean_ratio)
        stats: StepStats = self._receive(refs, "an optimizer step")[0][0]
        not_finite = stats.skipped is not None and stats.skipped.startswith("not finite")
        self.num_updates, self.num_not_finite = self.num_updates + 1, self.num_not_finite + 1 if not_finite else 0
        return stats

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[StoreRef[FloatArray]]:
        """See `train.Trainer.logprobs`; they stay in stores. What was prefetched is not computed again."""
        known = {} if reference else self.prefetcher.collect()
        if rest := [sample for sample in samples if ref_of(sample).key not in known]:
            known |= self._begin_logprobs(rest, reference)()[0]
        return [known[ref_of(sample).key] for sample in samples]

    def _begin_logprobs(self, samples: Sequence[AnySample], reference: bool) -> PendingLogprobs:
        return partial(self._receive_logprobs, self._send("logprobs", samples, reference))

    def _receive_logprobs(self, pending: list[Any]) -> tuple[LogprobRefs, float]:
        answers = self._receive(pending, "log-probs")
        stored: list[StoreRef[FloatArray]] = [ref for refs, _ in answers[:: self._alike] for ref in refs]
        return {ref.key[:-1]: ref for ref in stored}, sum(traffic.busy_s for _, traffic in answers) / len(answers)

    def _send(self, method: str, samples: Sequence[AnySample], *args: Any) -> list[Any]:
        """Call each rank with its share; the mesh is [replicas, shards, cp, tp], so neighbours have the same."""
        budget = self._config.train.token_budget * self._section.cp
        shares = pack_minibatch(samples, budget, self._spec, self._section.ranks // self._alike)
        packed = [self._passed.pack((share, *args)) for share in shares]
        return [rank.call.remote(method, packed[i // self._alike]) for i, rank in enumerate(self.ranks)]

    def _receive(self, refs: list[Any], what: str) -> list[tuple[Any, Traffic]]:
        """The answer of each rank."""
        answers = [self._passed.unpack(answer) for answer in self._get(refs, what)]
        self._traffic = sum((traffic for _, traffic in answers), self._traffic)
        return answers

    def snapshot(self) -> RaySnapshot:
        self.call("take_snapshot", "the ranks to copy their state")
        return RaySnapshot(self.ranks, self._cluster.step_limit_s)

    def load(self, path: Path) -> None:
        self.call("trainer.load", "a checkpoint to be loaded", path)
        self.num_updates, self.num_not_finite = self.first("counts", "the ranks to count")

    def counters(self) -> Counters:
        return {
            "transfer_bytes": self._traffic.num_bytes,
            "transfer_s": self._traffic.seconds,
            "ranks_busy_s": self._traffic.busy_s,
            "num_ranks": self._section.ranks,
            "overlap_saved_s": self.prefetcher.saved_s,
        }


@dataclass(frozen=True, slots=True)
class RaySnapshot:
    """Each rank's copy of its part of the state (implements `core.loop.Snapshot`)."""

    ranks: list[Any]
    limit_s: float

    def write(self, path: Path) -> None:
        self._call(self.ranks, "snapshot.write", path, "a checkpoint to be written")

    def export(self, path: Path) -> None:
        self._call(self.ranks[:1], "snapshot.export", path, "the model to be written")

    def _call(self, ranks: list[Any], method: str, path: Path, what: str) -> None:
        """Runs beside training."""
        beside = [rank.call.options(concurrency_group="write") for rank in ranks]
        ray_get([call.remote(method, path.resolve()) for call in beside], self.limit_s, what)


class RaySender:
    """The ranks' side of the weight channel (implements `weights.Sender`): the first sends what all gather."""

    model: LanguageModel | None = None  # it is in other processes

    def __init__(self, trainer: RayTrainer, config: RLConfig) -> None:
        assert config.cluster is not None
        self.compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        limit_s = config.cluster.sync_limit_s + _ADDRESS_LIMIT_S
        self._stages = stages(config)
        thread: Thread | None = "publish" if self._stages else None
        self._trainer, self._all = trainer, partial(trainer.call, limit_s=limit_s, thread=thread)
        self._first = partial(trainer.first, limit_s=limit_s, thread=thread)

    def stage(self) -> bool:
        return self._stages and all(self._trainer.call("sender.stage", "the ranks to copy their weights"))

    def address(self) -> tuple[str, int]:
        # Answered when the ranks are done with log-probs that they were asked for before: the limit is a step's.
        return self._trainer.first("address", "the first rank's address")

    def open(self, kind: EngineKind, group: BroadcastGroup) -> None:
        self._first("sender.open", "engines to join a group", kind, group)

    def broadcast(self, kind: EngineKind, bucket_bytes: int, checksum: bool) -> int:
        return self._all("sender.broadcast", "the ranks to send their weights", kind, bucket_bytes, checksum)[0]

    def write(self, place: Path, kinds: Sequence[EngineKind], checksum: bool) -> int:
        return self._all("sender.write", "the ranks to write their weights", place, kinds, checksum)[0]

    def checksums(self, kind: EngineKind) -> Checksums | None:
        return self._first("sender.checksums", "checksums of weights", kind)

    def logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        return self._all("sender.logprobs", "the canary's log-probs", list(samples))[0]


def stages(config: RLConfig) -> bool:
    """Whether the ranks send a copy of their weights while they train on. Not on GPUs: collectives of two NCCL groups
    at once, in an order that differs between ranks, may wait for one another without end."""
    return config.rollout.max_lag > 0 and device_of(config) == "cpu"


def device_of(config: RLConfig) -> str:
    """The device that each rank trains on. Never "auto": a rank without a GPU of its own may see those of others."""
    assert config.cluster is not None
    return "cuda" if config.cluster.training.gpus_per_rank else "cpu"


def _fetched(share: RankBatch) -> tuple[RankBatch, Traffic]:
    """The share with its tokens and log-probs here."""
    start = time.perf_counter()
    names = ("handle", "proximal_logprobs", "reference_logprobs")
    parts = (getattr(sample, name) for sample in chain.from_iterable(share.bins) for name in names)
    values = fetch(part for part in parts if part is not None)

    def local(sample: AnySample) -> AnySample:
        return replace(sample, **{name: values.get(getattr(sample, name)) for name in names})

    bins = tuple(tuple(local(sample) for sample in members) for members in share.bins)
    size = sum(map(bytes_of, values.values()))
    return replace(share, bins=bins), Traffic(time.perf_counter() - start, size)
