"""All ranks as one trainer: each mini-batch is shared out, and each rank is sent its own share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.loop import Counters, StepStats
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, FloatArray, Sample
from pekoe.engine.base import BroadcastGroup, Checksums, EngineKind
from pekoe.model import Decoder
from pekoe.ray.logprob_prefetch import LogprobPrefetcher, LogprobRefs
from pekoe.ray.placement import (
    ByteCount,
    WorkerLost,
    nodes_of,
    place,
    rank_bundles,
    ray_get,
    shared_bundles,
    within,
)
from pekoe.ray.store import StoreRef, StoreRegistry
from pekoe.ray.trainer_actor import RankActor, Traffic, device_of, record_of
from pekoe.run.hardware import describe
from pekoe.train.trainer import Objective, RankBatch, pack_minibatch

_ADDRESS_LIMIT_S = 60.0


class RayTrainer:
    """The ranks (implements `core.loop.Trainer`). Losing any of them raises WorkerLost, from then on at every call
    until `start`: a part of the weights is useless without the others.

    Args:
        config: the recipe.
        spec: the model's shape.
        stores: of the nodes.
        prefetch: whether log-probs are computed while sampling goes on.
    """

    def __init__(
        self,
        config: RLConfig,
        spec: ModelSpec,
        stores: StoreRegistry,
        bytes_passed: ByteCount,
        prefetch: bool,
        stack: ExitStack,
    ) -> None:
        assert config.cluster is not None
        self._config, self._cluster, self._section = config, config.cluster, config.cluster.training
        self._spec, self._stores, self._bytes = spec, stores, bytes_passed
        limit, colocate = self._cluster.start_limit_s, self._cluster.colocate
        bundles = (shared_bundles if colocate else rank_bundles)(self._cluster)
        self.place = place(bundles, "SPREAD", "the training ranks", limit, stack)
        self._ranks_each = self._section.ranks // len(bundles)
        self._alike = self._section.tp * self._section.cp  # neighbours in the mesh with the same share
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self._lost: WorkerLost | None = None
        self._traffic = Traffic()
        self._num_updates = self._num_not_finite = 0
        chunk_tokens = config.train.token_budget * self._section.ranks // self._section.tp
        self.prefetcher = LogprobPrefetcher(self, chunk_tokens) if prefetch else None
        stack.callback(self.stop)

    def start(self) -> None:
        """Start all ranks, anew where there were some."""
        self.stop()
        limit, one = self._cluster.start_limit_s, self._section
        nodes = nodes_of(self.place, limit, "the training ranks")
        # A rank without a GPU of its own must not see those of others.
        env = {} if device_of(self._config) == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        make: Any = ray.remote
        actor = make(concurrency_groups={"beside": 1})(RankActor)
        for rank in range(one.ranks):
            bundle = rank // self._ranks_each
            self.ranks.append(
                actor.options(
                    num_cpus=one.cpus_per_rank,
                    num_gpus=one.gpus_per_rank,
                    runtime_env={"env_vars": env},
                    scheduling_strategy=within(self.place, bundle),
                ).remote(self._config, rank, *self._stores.on(nodes[bundle]))
            )
        host, port = self.get(self.ranks[0].address.remote(), limit, "the first rank to start")
        self.pids = self.call("start", limit, "the ranks to start", host, port)
        self._num_updates = self._num_not_finite = 0

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks, self._lost = [], None
        self._reset_prefetch()

    def devices(self) -> list[str]:
        """Of each bundle, the GPUs of its ranks, as CUDA_VISIBLE_DEVICES names them."""
        devices = self.call("devices", self._cluster.start_limit_s, "the ranks to report their devices")
        each = self._ranks_each
        return [",".join(filter(None, devices[i : i + each])) for i in range(0, len(devices), each)]

    def machine(self) -> dict[str, Any]:
        """The `machine` event of a journal; its ceilings are those of all ranks together, as a step's work is."""
        ranks = self.call("measure", self._cluster.start_limit_s, "the ranks to measure their devices")
        total = {name: sum(rank[name] for rank in ranks) for name in ("flop_s", "byte_s")}
        return describe() | {"device": f"{len(ranks)} x {ranks[0]['device']}", "dtype": ranks[0]["dtype"], **total}

    def empty_cache(self) -> None:
        self.call("empty_cache", self._cluster.step_limit_s, "the ranks to give memory back")

    def call(self, method: str, limit_s: float, what: str, *args: Any) -> list[Any]:
        """Call all ranks with the same arguments."""
        return self.get([getattr(rank, method).remote(*args) for rank in self.ranks], limit_s, what)

    def get(self, refs: Any, limit_s: float, what: str) -> Any:
        """`ray_get` of what ranks were asked."""
        if self._lost is not None:
            raise self._lost
        try:
            return ray_get(refs, limit_s, what)
        except WorkerLost as error:
            self._lost = error
            for rank in self.ranks:  # now, so that engines in a group with the first do not wait for it
                ray.kill(rank)
            raise

    # As `core.loop.Trainer`

    @property
    def num_updates(self) -> int:
        return self._num_updates

    @property
    def num_not_finite(self) -> int:
        return self._num_not_finite

    def skip(self, num_updates: int) -> None:
        self._reset_prefetch()
        self.call("skip", self._cluster.step_limit_s, "the ranks to skip an optimizer step", num_updates)
        self._num_updates += num_updates

    def step(
        self,
        samples: Sequence[AnySample],
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """See `train.Trainer.step`."""
        self._reset_prefetch()
        shares = self._shares(samples)
        refs = self._send("step", shares, objective, denominator, max_mean_ratio)
        stats: StepStats = self._receive(refs, "an optimizer step")[0][0]
        not_finite = stats.skipped is not None and stats.skipped.startswith("not finite")
        self._num_updates, self._num_not_finite = self._num_updates + 1, self._num_not_finite + 1 if not_finite else 0
        return stats

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[StoreRef[FloatArray]]:
        """See `train.Trainer.logprobs`; they stay in stores. What was prefetched is not computed again."""
        known = {} if reference or self.prefetcher is None else self.prefetcher.collect()
        if rest := [sample for sample in samples if record_of(sample).key not in known]:
            known |= self.begin_logprobs(rest, reference).wait()[0]
        return [known[record_of(sample).key] for sample in samples]

    def begin_logprobs(self, samples: Sequence[AnySample], reference: bool) -> _Pending:
        """Returns at once."""
        shares = self._shares(samples)
        return _Pending(self, shares, self._send("logprobs", shares, reference))

    def snapshot(self) -> RaySnapshot:
        self.call("snapshot", self._cluster.step_limit_s, "the ranks to copy their state")
        return RaySnapshot(self.ranks, self._cluster.step_limit_s)

    def load(self, path: Path) -> None:
        limit_s = self._cluster.step_limit_s
        self.call("load", limit_s, "a checkpoint to be loaded", path)
        self._num_updates, self._num_not_finite = self.call("counts", limit_s, "the ranks to count")[0]

    def counters(self) -> Counters:
        traffic, prefetcher = self._traffic, self.prefetcher
        return {
            "transfer_bytes": traffic.num_bytes,
            "transfer_s": traffic.seconds,
            "ranks_busy_s": traffic.busy_s,
            "num_ranks": self._section.ranks,
            **({"overlap_saved_s": prefetcher.saved_s} if prefetcher is not None else {}),
        }

    def _reset_prefetch(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.reset()

    def _shares(self, samples: Sequence[AnySample]) -> list[RankBatch]:
        budget = self._config.train.token_budget * self._section.cp
        return pack_minibatch(samples, budget, self._spec, self._section.ranks // self._alike)

    def _send(self, method: str, shares: list[RankBatch], *args: Any) -> list[Any]:
        """Call each rank with its share; the mesh is [replicas, shards, cp, tp], so neighbours have the same."""
        packed = [self._bytes.pack((share, *args)) for share in shares]
        return [getattr(rank, method).remote(packed[i // self._alike]) for i, rank in enumerate(self.ranks)]

    def _receive(self, refs: list[Any], what: str) -> list[tuple[Any, Traffic]]:
        """The answer of each rank."""
        answers = [self._bytes.unpack(answer) for answer in self.get(refs, self._cluster.step_limit_s, what)]
        self._traffic = sum((traffic for _, traffic in answers), self._traffic)
        return answers

    def receive_logprobs(self, shares: list[RankBatch], refs: list[Any]) -> tuple[LogprobRefs, float]:
        """See `PendingLogprobs.wait`."""
        answers = self._receive(refs, "log-probs")
        logprobs: LogprobRefs = {}
        for share, (stored, _) in zip(shares, answers[:: self._alike], strict=True):
            for members, some in zip(share.bins, stored, strict=True):
                logprobs |= {record_of(sample).key: ref for sample, ref in zip(members, some, strict=True)}
        return logprobs, sum(traffic.busy_s for _, traffic in answers) / len(answers)


@dataclass(frozen=True, slots=True)
class _Pending:
    """Implements `PendingLogprobs`."""

    trainer: RayTrainer
    shares: list[RankBatch]
    refs: list[Any]

    def wait(self) -> tuple[LogprobRefs, float]:
        return self.trainer.receive_logprobs(self.shares, self.refs)


@dataclass(frozen=True, slots=True)
class RaySnapshot:
    """Each rank's copy of its part of the state (implements `core.loop.Snapshot`)."""

    ranks: list[Any]
    limit_s: float

    def write(self, path: Path) -> None:
        """See `Snapshot`. Runs beside training."""
        refs = [rank.write.options(concurrency_group="beside").remote(path.resolve()) for rank in self.ranks]
        ray_get(refs, self.limit_s, "a checkpoint to be written")

    def export(self, path: Path) -> None:
        ref = self.ranks[0].export.options(concurrency_group="beside").remote(path.resolve())
        ray_get(ref, self.limit_s, "the model to be written")


class RaySender:
    """The ranks' side of the weight channel (implements `weights.Sender`): the first sends what all gather."""

    model: Decoder | None = None  # it is in other processes

    def __init__(self, trainer: RayTrainer, config: RLConfig) -> None:
        assert config.cluster is not None
        self._trainer, self._cluster = trainer, config.cluster
        self.compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._limit_s = config.cluster.sync_limit_s + _ADDRESS_LIMIT_S

    def address(self) -> tuple[str, int]:
        """Answered when the ranks are done with log-probs that they were asked for before."""
        limit_s = self._cluster.step_limit_s
        return self._trainer.get(self._trainer.ranks[0].address.remote(), limit_s, "the first rank's address")

    def open(self, kind: EngineKind, group: BroadcastGroup) -> None:
        self._trainer.get(self._trainer.ranks[0].open.remote(kind, group), self._limit_s, "engines to join a group")

    def broadcast(self, kind: EngineKind, bucket_bytes: int, checksum: bool) -> int:
        what = "the ranks to send their weights"
        return self._trainer.call("broadcast", self._limit_s, what, kind, bucket_bytes, checksum)[0]

    def write(self, place: Path, kinds: Sequence[EngineKind], checksum: bool) -> int:
        what = "the ranks to write their weights"
        return self._trainer.call("write_weights", self._limit_s, what, place, kinds, checksum)[0]

    def checksums(self, kind: EngineKind) -> Checksums | None:
        return self._trainer.get(self._trainer.ranks[0].checksums.remote(kind), self._limit_s, "checksums of weights")

    def logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        return self._trainer.call("canary_logprobs", self._limit_s, "the canary's log-probs", list(samples))[0]
