"""A rank: one process of those that train. It fetches the tokens of its own micro-batches, and nobody else's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.types import AnySample, Rollout, Sample, SampleRef
from pekoe.engine.fingerprints import Kind, Prints, prints_for
from pekoe.engine.transfer import Group, buckets, close_group, open_group
from pekoe.model import save_model
from pekoe.ray.store import StoreRef, fetch
from pekoe.ray.weights import send, use_interface
from pekoe.run.build import make_trainer, open_model
from pekoe.run.distributed import joined, make_layout
from pekoe.run.hardware import describe
from pekoe.train import StepStats
from pekoe.train.checkpoint import whole_weights
from pekoe.train.trainer import Objective, RankBatch


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank fetched from depots, and how long it worked."""

    seconds: float = 0.0
    num_bytes: int = 0
    busy_s: float = 0.0  # of the whole call

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.seconds + other.seconds, self.num_bytes + other.num_bytes, self.busy_s + other.busy_s)


class TrainerWorker:
    """The actor. All ranks are called together, with the same arguments but for their shares.

    Args:
        config: the recipe.
        rank: which.
        node: of the depot.
        depot: of this node.
    """

    def __init__(self, config: RLConfig, rank: int, node: int, depot: Any) -> None:
        assert config.cluster is not None
        self._config, self._rank, self._node, self._depot = config, rank, node, depot
        self._section = config.cluster.training
        torch.set_num_threads(max(1, int(self._section.cpus_per_rank)))
        self._address = ray.util.get_node_ip_address()
        self._snapshot: Any = None
        self._groups: dict[Kind, Any] = {}  # our ends of those by which weights go
        self._prints: dict[Kind, Prints] = {}

    def meeting_point(self) -> tuple[str, int]:
        """An address of this node with a port that is free."""
        import socket

        with socket.create_server((self._address, 0)) as probe:
            return self._address, probe.getsockname()[1]

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
        model, _, dtype = open_model(self._config.model)
        layout = make_layout(model.spec, self._section, next(model.parameters()).device)
        self._trainer = make_trainer(self._config, model, dtype, layout)
        return os.getpid()

    def measure(self) -> dict[str, Any]:
        """What its device reaches while all ranks measure theirs; see `describe`."""
        return describe(self._trainer.device, getattr(torch, self._config.model.dtype))

    # Training

    def step(
        self,
        share: RankBatch,
        depots: Mapping[int, Any],
        objective: Objective,
        denominator: float | None,
        max_mean_ratio: float | None,
    ) -> tuple[StepStats, Traffic]:
        start = time.perf_counter()
        fetched, traffic = self._fetched(share, depots)
        stats = self._trainer.step_packed(fetched, objective, denominator, max_mean_ratio)
        return stats, replace(traffic, busy_s=time.perf_counter() - start)

    def logprobs(
        self, share: RankBatch, depots: Mapping[int, Any], reference: bool
    ) -> tuple[list[list[StoreRef]], Traffic]:
        """Log-probs of its share go to its depot; returns where they lie."""
        start = time.perf_counter()
        fetched, traffic = self._fetched(share, depots)
        found = self._trainer.logprobs_packed(fetched, reference)
        name = "reference" if reference else "proximal"
        places: list[list[StoreRef]] = []
        values: dict[Any, Any] = {}
        for members, arrays in zip(share.bins, found, strict=True):
            keys = [(*_payload(sample).key, name) for sample in members]
            values |= dict(zip(keys, arrays, strict=True))
            places.append([StoreRef(self._node, key) for key in keys])
        ray.get(self._depot.put.remote(values), timeout=self._limit_s)
        return places, replace(traffic, busy_s=time.perf_counter() - start)

    @property
    def _limit_s(self) -> float:
        assert self._config.cluster is not None
        return self._config.cluster.step_limit_s

    def _fetched(self, share: RankBatch, depots: Mapping[int, Any]) -> tuple[RankBatch, Traffic]:
        """The share with its tokens here."""
        start = time.perf_counter()
        samples = [sample for members in share.bins for sample in members]
        found = fetch((place for sample in samples for place in _places(sample)), depots, self._limit_s)
        bins = tuple(tuple(_resolved(sample, found) for sample in members) for members in share.bins)
        size = sum(_bytes_of(value) for value in found.values())
        return replace(share, bins=bins), Traffic(time.perf_counter() - start, size)

    def skip(self, num_updates: int) -> None:
        self._trainer.skip(num_updates)

    def counts(self) -> tuple[int, int]:
        return self._trainer.num_updates, self._trainer.num_not_finite

    # Weights

    def join(self, kind: Kind, group: Group) -> None:
        """Open the group by which weights go to engines of this kind. The first rank alone."""
        close_group(self._groups.pop(kind, None))
        self._groups[kind] = open_group(group)

    def send(self, kind: Kind, max_bytes: int, look: bool) -> tuple[int, str]:
        """Bring the weights to the group, whose engines are of one kind. All ranks call it: each has a part. Returns
        the bytes that were sent, and what went wrong on the way to the engines."""
        self._show([kind] if look else [])
        server = kind != "embedded"
        parts = buckets(self._trainer.model, max_bytes, self._dtype(kind) if server else None)
        return send(self._groups.get(kind), parts, self._see if look else None, one_by_one=server)

    def save(self, path: str, kinds: Sequence[Kind]) -> None:
        """Write the weights as a Hugging Face directory. All ranks call it; the first one writes, and looks at them
        as these kinds of engines would."""
        whole = whole_weights(self._trainer.model)
        self._show(kinds)
        if self._rank == 0:
            for name, tensor in whole.items():
                self._see(name, tensor)
            save_model(self._trainer.model, Path(path), weights=whole)

    def prints(self, kind: Kind) -> dict[str, str | int] | None:
        """What engines of this kind should say of what `send` sent, or `save` wrote. None: they would speak of
        something else."""
        return self._prints[kind].values() if kind in self._prints else None

    def _show(self, kinds: Sequence[Kind]) -> None:
        device, spec = self._trainer.device.type, self._trainer.model.spec
        self._prints = {}
        for kind in kinds:
            if (prints := prints_for(kind, spec, self._dtype(kind), device)) is not None:
                self._prints[kind] = prints

    def _see(self, name: str, tensor: torch.Tensor) -> None:
        for prints in self._prints.values():
            prints.see(name, tensor)

    def _dtype(self, kind: Kind) -> torch.dtype:
        """Of the weights that an engine holds."""
        return torch.float32 if kind == "embedded" else self._trainer.compute_dtype

    def idle(self) -> None:
        """Answered when all that was asked before is done."""

    def spare(self) -> None:
        """Give back what the allocator keeps: engines take their turn on this device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def difference(self, canaries: Sequence[Rollout]) -> list[float]:
        """For each response, the largest difference between its log-probs and the trainer's."""
        found: list[float] = []
        for rollout in canaries:
            sample = SampleRef(rollout.num_prompt_tokens, rollout.num_tokens, rollout.payload, 0.0, 0, 0).resolve()
            ours = self._trainer.logprobs_packed(RankBatch(((sample,),), ((0,),), len(sample), sample.num_targets, 1))[
                0
            ][0]
            found.append(float(np.abs(ours - sample.behaviour_logprobs)[sample.loss_mask].max()))
        return found

    # Checkpoints

    def snapshot(self) -> None:
        self._snapshot = self._trainer.snapshot()

    def write(self, path: str) -> None:
        """Runs beside training."""
        self._snapshot.write(Path(path))

    def export(self, path: str) -> None:
        """The first rank alone."""
        self._snapshot.export(Path(path))

    def load(self, path: str) -> None:
        self._trainer.load(Path(path))


def _payload(sample: AnySample) -> StoreRef:
    assert isinstance(sample, SampleRef)
    assert isinstance(sample.payload, StoreRef)
    return sample.payload


def _places(sample: AnySample) -> Iterable[StoreRef]:
    assert isinstance(sample, SampleRef)
    all_of_it = sample.payload, sample.proximal_logprobs, sample.reference_logprobs
    return (at for at in all_of_it if isinstance(at, StoreRef))


def _resolved(sample: AnySample, found: Mapping[StoreRef, Any]) -> Sample:
    assert isinstance(sample, SampleRef)
    here = {
        name: found[at]
        for name in ("payload", "proximal_logprobs", "reference_logprobs")
        if isinstance(at := getattr(sample, name), StoreRef)
    }
    return replace(sample, **here).resolve()


def _bytes_of(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return value.prompt_tokens.nbytes + value.tokens.nbytes + value.logprobs.nbytes
