"""`train.Trainer` of a cluster, as the loop sees it: each minibatch is shared out, and each rank sent its own share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import ray

from pekoe.core.config import RLConfig
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample
from pekoe.run.cluster.depot import Stored
from pekoe.run.cluster.nodes import Depots, get, node_of, place, rank_bundles, within
from pekoe.run.cluster.trainer_worker import Traffic, TrainerWorker
from pekoe.train import StepStats
from pekoe.train.trainer import Objective, Share, share_out


class ClusterTrainer:
    """The ranks. Whatever is lost of them raises `Lost`: what they hold is worth nothing without all.

    Args:
        config: the recipe.
        spec: the model's shape.
        depots: of the nodes.
    """

    group = None  # of torch.distributed: this process is in none

    def __init__(self, config: RLConfig, spec: ModelSpec, depots: Depots, stack: ExitStack) -> None:
        assert config.cluster is not None
        self._config, self._cluster, self._section = config, config.cluster, config.cluster.training
        self._spec, self._depots = spec, depots
        limit = self._cluster.start_limit_s
        self._place = place(rank_bundles(self._cluster), "SPREAD", "the training ranks", limit, stack)
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self.traffic = Traffic()
        self._counts = (0, 0)
        stack.callback(self.stop)

    def start(self) -> None:
        """Start all ranks, anew where there were some."""
        self.stop()
        limit, one = self._cluster.start_limit_s, self._section
        worker: Any = cast(Any, ray.remote)(concurrency_groups={"beside": 1})(TrainerWorker)
        for rank in range(one.ranks):
            self.ranks.append(
                worker.options(
                    num_cpus=one.cpus_per_rank,
                    num_gpus=self._place.bundle_specs[rank].get("GPU", 0),
                    scheduling_strategy=within(self._place, rank),
                ).remote(self._config, rank, *self._depots.on(node_of(self._place, rank)))
            )
        host, port = get(self.ranks[0].meeting_point.remote(), limit, "the first rank to start")
        self.pids = self.call("start", limit, "the ranks to start", host, port)
        self._counts = (0, 0)

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def call(self, method: str, limit_s: float, what: str, *args: Any) -> list[Any]:
        """Call all ranks with the same arguments."""
        return get([getattr(rank, method).remote(*args) for rank in self.ranks], limit_s, what)

    # As `Trainer`

    @property
    def num_updates(self) -> int:
        return self._counts[0]

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self.call("count", self._cluster.step_limit_s, "the ranks to count", value)
        self._counts = value, self._counts[1]

    def learn_counts(self) -> None:
        """After a checkpoint was loaded."""
        self._counts = self.call("counts", self._cluster.step_limit_s, "the ranks to count")[0]

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
        more = self._depots.handles, objective, denominator, max_mean_ratio
        answers = self._each("step", self._shares(samples), "an optimizer step", *more)
        skipped = answers[0][0].skipped
        not_finite = self.num_not_finite + 1 if skipped and skipped.startswith("not finite") else 0
        self._counts = self._counts[0] + 1, not_finite
        return answers[0][0]

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[Stored]:
        """See `Trainer.logprobs`; where they lie."""
        shares = self._shares(samples)
        out: dict[int, Stored] = {}
        answers = self._each("logprobs", shares, "log-probs", self._depots.handles, reference)
        for share, (places, _) in zip(shares, answers, strict=True):
            for members, stored in zip(share.indices, places, strict=True):
                out |= dict(zip(members, stored, strict=True))
        return [out[i] for i in range(len(samples))]

    def _shares(self, samples: Sequence[AnySample]) -> list[Share]:
        one = self._section
        data_ranks = one.ranks // (one.tp * one.cp)
        budget = self._config.train.token_budget * one.cp
        return share_out(samples, budget, self._spec, data_ranks)

    def _each(self, method: str, shares: list[Share], what: str, *args: Any) -> list[Any]:
        """Call each rank with its share; the mesh is [replicas, shards, cp, tp], so neighbours have the same."""
        alike = self._section.tp * self._section.cp
        refs = [getattr(rank, method).remote(shares[i // alike], *args) for i, rank in enumerate(self.ranks)]
        self._depots.count(*(share for share in shares for _ in range(alike)))
        answers = get(refs, self._cluster.step_limit_s, what)
        self._depots.count(*answers)
        self.traffic = sum((traffic for _, traffic in answers), self.traffic)
        return answers[::alike]


class ClusterStore:
    """`train.checkpoint` of a cluster: the ranks copy, write and load, each its part."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def snapshot(self, trainer: ClusterTrainer) -> ClusterTrainer:
        trainer.call("snapshot", self._limit_s, "the ranks to copy their state")
        return trainer

    def write(self, state: ClusterTrainer, path: Path, group: None = None) -> None:
        get([_beside(rank, "write").remote(str(path)) for rank in state.ranks], self._limit_s, "a checkpoint")

    def export(self, state: ClusterTrainer, path: Path, trainer: ClusterTrainer) -> None:
        get(_beside(trainer.ranks[0], "export").remote(str(path)), self._limit_s, "the model to be written")

    def load(self, path: Path, trainer: ClusterTrainer) -> None:
        trainer.call("load", self._limit_s, "a checkpoint to be loaded", str(path))
        trainer.learn_counts()


def _beside(rank: Any, method: str) -> Any:
    return getattr(rank, method).options(concurrency_group="beside")
