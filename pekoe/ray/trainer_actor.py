"""A rank: one process of those that train. It fetches the tokens of its own micro-batches, and nobody else's."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.loop import Snapshot, StepStats
from pekoe.core.types import AnySample, FloatArray, Sample, SampleRef
from pekoe.engine.base import BroadcastGroup, Checksums, EngineKind
from pekoe.ray.placement import ray_get
from pekoe.ray.store import Key, StoreRef, bytes_of, fetch
from pekoe.run.build import make_trainer, open_model
from pekoe.run.distributed import joined, make_layout
from pekoe.run.hardware import describe
from pekoe.train.trainer import RankBatch, pack_minibatch
from pekoe.weights import LocalSender
from pekoe.weights.groups import free_port, use_interface


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank fetched from stores, and how long it worked. Sums over ranks and calls."""

    seconds: float = 0.0
    num_bytes: int = 0
    busy_s: float = 0.0  # of the whole call

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.seconds + other.seconds, self.num_bytes + other.num_bytes, self.busy_s + other.busy_s)


class RankActor:
    """The actor. All ranks are called together, with the same arguments but for their shares.

    Args:
        config: the recipe.
        rank: which.
        node: the number of this node's store.
        store: this node's store.
    """

    def __init__(self, config: RLConfig, rank: int, node: int, store: Any) -> None:
        assert config.cluster is not None
        self._config, self._rank, self._node, self._store = config, rank, node, store
        self._section, self._limit_s = config.cluster.training, config.cluster.step_limit_s
        torch.set_num_threads(max(1, int(self._section.cpus_per_rank)))
        self._address = ray.util.get_node_ip_address()
        self._snapshot: Snapshot | None = None

    def address(self) -> tuple[str, int]:
        """An address of this node with a port that is free."""
        return self._address, free_port(self._address)

    def devices(self) -> str:
        """Its GPUs, as CUDA_VISIBLE_DEVICES names them."""
        return ",".join(map(str, ray.get_gpu_ids()))

    def start(self, host: str, port: int) -> int:
        """Join the other ranks, load the model. Returns the process id."""
        use_interface(self._address)
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(self._rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(self._section.ranks)}
        self._joined = joined()
        self._joined.__enter__()
        model, _, dtype = open_model(self._config.model.model_copy(update={"device": device_of(self._config)}))
        layout = make_layout(model.spec, self._section, next(model.parameters()).device)
        self._trainer = make_trainer(self._config, model, dtype, layout)
        self._sender = LocalSender(model, dtype, self._canary_logprobs, self._address)
        return os.getpid()

    def measure(self) -> dict[str, Any]:
        """What its device reaches while all ranks measure theirs; see `describe`."""
        return describe(self._trainer.device, getattr(torch, self._config.model.dtype))

    # Training

    def step(self, packed: bytes) -> bytes:
        """`Trainer.step` of (share, objective, denominator, max_mean_ratio); returns (StepStats, Traffic)."""
        start = time.perf_counter()
        share, *rest = pickle.loads(packed)
        share, traffic = _fetched(share)
        stats: StepStats = self._trainer.step(share, *rest)
        return pickle.dumps((stats, replace(traffic, busy_s=time.perf_counter() - start)))

    def logprobs(self, packed: bytes) -> bytes:
        """Log-probs of (share, whether by the reference model) go to this node's store.

        Returns (for each micro-batch references to those of its samples, Traffic).
        """
        start = time.perf_counter()
        share, reference = pickle.loads(packed)
        local, traffic = _fetched(share)
        arrays = self._trainer.logprobs_packed(local, reference)
        name = "reference" if reference else "proximal"
        values: dict[Key, FloatArray] = {}
        refs: list[list[StoreRef[FloatArray]]] = []
        for members, some in zip(share.bins, arrays, strict=True):
            keys = [(*record_of(sample).key, name) for sample in members]
            values |= dict(zip(keys, some, strict=True))
            refs.append([StoreRef(self._node, key) for key in keys])
        ray_get(self._store.put.remote(values), self._limit_s, "the store to take log-probs")
        return pickle.dumps((refs, replace(traffic, busy_s=time.perf_counter() - start)))

    def skip(self, num_updates: int) -> None:
        self._trainer.skip(num_updates)

    def counts(self) -> tuple[int, int]:
        return self._trainer.num_updates, self._trainer.num_not_finite

    def empty_cache(self) -> None:
        """Give back what the allocator keeps: engines take their turn on this device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Weights: see `weights.LocalSender`

    def open(self, kind: EngineKind, group: BroadcastGroup) -> None:
        """The first rank alone."""
        self._sender.open(kind, group)

    def broadcast(self, kind: EngineKind, bucket_bytes: int, checksum: bool) -> int:
        """All ranks gather; the first sends."""
        return self._sender.broadcast(kind, bucket_bytes, checksum)

    def write_weights(self, place: Path, kinds: Sequence[EngineKind], checksum: bool) -> int:
        """All ranks gather; the first writes."""
        return self._sender.write(place, kinds, checksum)

    def checksums(self, kind: EngineKind) -> Checksums | None:
        return self._sender.checksums(kind)

    def canary_logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        return self._canary_logprobs(samples)

    def _canary_logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        """Every rank computes all: too few to share out."""
        budget = max(self._config.train.token_budget * self._section.cp, *map(len, samples))
        (share,) = pack_minibatch(samples, budget, self._trainer.model.spec, 1)
        places = [place for members in share.indices for place in members]
        arrays = [array for some in self._trainer.logprobs_packed(share) for array in some]
        return [array for _, array in sorted(zip(places, arrays, strict=True), key=lambda pair: pair[0])]

    # Checkpoints

    def snapshot(self) -> None:
        self._snapshot = self._trainer.snapshot()

    def write(self, path: Path) -> None:
        """Runs beside training."""
        assert self._snapshot is not None
        self._snapshot.write(path)

    def export(self, path: Path) -> None:
        """The first rank alone."""
        assert self._snapshot is not None
        self._snapshot.export(path)

    def load(self, path: Path) -> None:
        self._trainer.load(path)


def device_of(config: RLConfig) -> str:
    """The device that each rank trains on. Never "auto": a rank without a GPU of its own may see those of others."""
    assert config.cluster is not None
    return "cuda" if config.cluster.training.gpus_per_rank else "cpu"


def record_of(sample: AnySample) -> StoreRef[Any]:
    """Where the tokens of a cluster's sample are."""
    assert isinstance(sample, SampleRef)
    assert isinstance(sample.handle, StoreRef)
    return sample.handle


def _fetched(share: RankBatch) -> tuple[RankBatch, Traffic]:
    """The share with its tokens here."""
    start = time.perf_counter()
    samples = [sample for members in share.bins for sample in members if isinstance(sample, SampleRef)]
    parts = (part for s in samples for part in (s.handle, s.proximal_logprobs, s.reference_logprobs))
    values = fetch(part for part in parts if isinstance(part, StoreRef))

    def local(sample: AnySample) -> Sample:
        if isinstance(sample, Sample):
            return sample
        handle, *more = (
            values[part] if isinstance(part, StoreRef) else part
            for part in (sample.handle, sample.proximal_logprobs, sample.reference_logprobs)
        )
        here = replace(sample, handle=handle, proximal_logprobs=more[0], reference_logprobs=more[1])
        return here.resolve()

    bins = tuple(tuple(local(sample) for sample in members) for members in share.bins)
    size = sum(map(bytes_of, values.values()))
    return replace(share, bins=bins), Traffic(time.perf_counter() - start, size)
