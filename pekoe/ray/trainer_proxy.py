"""`train.Trainer` of a cluster, as the loop sees it: each minibatch is shared out, and each rank sent its own share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import ray

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import UserError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, SampleRef
from pekoe.ray.placement import StoreRegistry, get, nodes_of, place, rank_bundles, shared_bundles, within
from pekoe.ray.store import Key, StoreRef
from pekoe.ray.trainer_actor import Traffic, TrainerWorker
from pekoe.run.hardware import describe
from pekoe.train import StepStats
from pekoe.train.trainer import Objective, RankBatch, pack_minibatch

Asked = tuple[list[RankBatch], list[Any]]
"""Shares, and the references of what each rank will answer."""


def key_of(sample: AnySample) -> Key:
    """Of the rollout that a sample is made of."""
    assert isinstance(sample, SampleRef)
    assert isinstance(sample.payload, StoreRef)
    return sample.payload.key


class ClusterTrainer:
    """The ranks. Whatever is lost of them raises `Lost`: what they hold is worth nothing without all.

    Args:
        config: the recipe.
        spec: the model's shape.
        depots: of the nodes.
    """

    group = None  # of torch.distributed: this process is in none

    def __init__(self, config: RLConfig, spec: ModelSpec, depots: StoreRegistry, stack: ExitStack) -> None:
        assert config.cluster is not None
        self._config, self._cluster, self._section = config, config.cluster, config.cluster.training
        self._spec, self._depots = spec, depots
        limit, shared = self._cluster.start_limit_s, self._cluster.colocate
        bundles = (shared_bundles if shared else rank_bundles)(self._cluster)
        self.place = place(bundles, "SPREAD", "the training ranks", limit, stack)
        self._ranks_each = self._section.ranks // len(bundles)
        self.take_turn: Callable[[], None] = lambda: None  # called before the ranks compute
        self._ahead: dict[Key, StoreRef] = {}  # log-probs that are there already, by the rollout's key
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self.traffic = Traffic()
        self._counts = (0, 0)
        stack.callback(self.stop)

    def start(self) -> None:
        """Start all ranks, anew where there were some."""
        self.stop()
        limit, one = self._cluster.start_limit_s, self._section
        nodes = nodes_of(self.place, limit, "the training ranks")
        worker: Any = cast(Any, ray.remote)(concurrency_groups={"beside": 1})(TrainerWorker)
        for rank in range(one.ranks):
            self.ranks.append(
                worker.options(
                    num_cpus=one.cpus_per_rank,
                    num_gpus=one.gpus_per_rank,
                    scheduling_strategy=within(self.place, rank // self._ranks_each),
                ).remote(self._config, rank, *self._depots.on(nodes[rank // self._ranks_each]))
            )
        host, port = get(self.ranks[0].meeting_point.remote(), limit, "the first rank to start")
        self.pids = self.call("start", limit, "the ranks to start", host, port)
        self._counts = (0, 0)

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        self._ahead = {}

    def devices(self) -> list[str]:
        """Of each bundle, the GPUs of its ranks, as CUDA_VISIBLE_DEVICES names them."""
        found = self.call("devices", self._cluster.start_limit_s, "the ranks to tell their devices")
        each = self._ranks_each
        return [",".join(filter(None, found[i : i + each])) for i in range(0, len(found), each)]

    def machine(self) -> dict[str, Any]:
        """The `machine` event of a journal; its ceilings are those of all ranks together, as a step's work is."""
        found = self.call("measure", self._cluster.start_limit_s, "the ranks to measure their devices")
        total = {name: sum(each[name] for each in found) for name in ("flop_s", "byte_s")}
        return describe() | {"device": f"{len(found)} x {found[0]['device']}", "dtype": found[0]["dtype"], **total}

    def call(self, method: str, limit_s: float, what: str, *args: Any) -> list[Any]:
        """Call all ranks with the same arguments."""
        return get([getattr(rank, method).remote(*args) for rank in self.ranks], limit_s, what)

    # As `Trainer`

    @property
    def num_updates(self) -> int:
        return self._counts[0]

    def skip(self, num_updates: int) -> None:
        """See `Trainer.skip`."""
        self.call("skip", self._cluster.step_limit_s, "the ranks to count", num_updates)
        self._counts = self._counts[0] + num_updates, self._counts[1]

    @property
    def num_not_finite(self) -> int:
        return self._counts[1]

    def step(
        self,
        samples: Sequence[AnySample],
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """See `Trainer.step`."""
        self.take_turn()
        self._ahead = {}
        more = self._depots.handles, objective, denominator, max_mean_ratio
        answers = self._receive(self._send("step", self._shares(samples), *more), "an optimizer step")
        skipped = answers[0][0].skipped
        not_finite = self.num_not_finite + 1 if skipped and skipped.startswith("not finite") else 0
        self._counts = self._counts[0] + 1, not_finite
        return answers[0][0]

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[StoreRef]:
        """See `Trainer.logprobs`; where they lie. What `LogprobPrefetcher` computed is not computed again."""
        known = {} if reference else self._ahead
        rest = [sample for sample in samples if key_of(sample) not in known]
        if rest:
            self.take_turn()
            if not self.can_share(rest):  # too few to go round: those that are known are computed again with them
                known, rest = {}, list(samples)
            known = known | self._found(*self._ask_logprobs(rest, reference))
        return [known[key_of(sample)] for sample in samples]

    def snapshot(self) -> ClusterSnapshot:
        """See `Trainer.snapshot`."""
        self.call("snapshot", self._cluster.step_limit_s, "the ranks to copy their state")
        return ClusterSnapshot(self.ranks, self._cluster.step_limit_s)

    def load(self, path: Path) -> None:
        """See `Trainer.load`."""
        self.call("load", self._cluster.step_limit_s, "a checkpoint to be loaded", str(path))
        self._counts = self.call("counts", self._cluster.step_limit_s, "the ranks to count")[0]

    def can_share(self, samples: Sequence[AnySample]) -> bool:
        """Whether every rank would have something to do, within the token budget."""
        try:
            self._shares(samples)
        except UserError:
            return False
        return True

    def ask_ahead(self, samples: Sequence[AnySample]) -> Asked:
        """Begin to compute log-probs; returns at once."""
        return self._ask_logprobs(samples, False)

    def keep_ahead(self, asked: Asked) -> float:
        """Wait for what `ask_ahead` began; returns how long a rank worked on it, on average."""
        before = self.traffic.busy_s
        self._ahead |= self._found(*asked)
        return (self.traffic.busy_s - before) / len(self.ranks)

    def _ask_logprobs(self, samples: Sequence[AnySample], reference: bool) -> Asked:
        shares = self._shares(samples)
        return shares, self._send("logprobs", shares, self._depots.handles, reference)

    def _found(self, shares: list[RankBatch], refs: list[Any]) -> dict[Key, StoreRef]:
        found: dict[Key, StoreRef] = {}
        for share, (places, _) in zip(shares, self._receive(refs, "log-probs"), strict=True):
            for members, stored in zip(share.bins, places, strict=True):
                found |= {key_of(sample): at for sample, at in zip(members, stored, strict=True)}
        return found

    def _shares(self, samples: Sequence[AnySample]) -> list[RankBatch]:
        one = self._section
        data_ranks = one.ranks // (one.tp * one.cp)
        budget = self._config.train.token_budget * one.cp
        return pack_minibatch(samples, budget, self._spec, data_ranks)

    def _send(self, method: str, shares: list[RankBatch], *args: Any) -> list[Any]:
        """Call each rank with its share; the mesh is [replicas, shards, cp, tp], so neighbours have the same."""
        alike = self._section.tp * self._section.cp
        self._depots.count(*(share for share in shares for _ in range(alike)))
        return [getattr(rank, method).remote(shares[i // alike], *args) for i, rank in enumerate(self.ranks)]

    def _receive(self, refs: list[Any], what: str) -> list[Any]:
        """What each share came to."""
        answers = get(refs, self._cluster.step_limit_s, what)
        self._depots.count(*answers)
        self.traffic = sum((traffic for _, traffic in answers), self.traffic)
        return answers[:: self._section.tp * self._section.cp]


class ClusterSnapshot:
    """What `TrainerWorker.snapshot` copied at each rank."""

    def __init__(self, ranks: list[Any], limit_s: float) -> None:
        self._ranks, self._limit_s = ranks, limit_s

    def write(self, path: Path) -> None:
        """See `train.checkpoint.Snapshot.write`: each rank writes its part."""
        get([_beside(rank, "write").remote(str(path)) for rank in self._ranks], self._limit_s, "a checkpoint")

    def export(self, path: Path) -> None:
        """See `train.checkpoint.Snapshot.export`."""
        get(_beside(self._ranks[0], "export").remote(str(path)), self._limit_s, "the model to be written")


def _beside(rank: Any, method: str) -> Any:
    return getattr(rank, method).options(concurrency_group="beside")
