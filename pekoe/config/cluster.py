"""The sections of a recipe that say how work is shared between processes: `parallel` (torchrun), `cluster` (Ray)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pekoe.config.base import ConfigSection, Seconds, check_multiple

Peers = Annotated[int, Field(ge=1, le=65_536)]  # processes of a cluster


class ParallelSection(ConfigSection):
    """How the processes that torchrun started share the work. What is left of them shards the weights (FSDP)."""

    tp: Peers = 1
    """Processes that share each layer's heads and channels (tensor parallelism)."""
    cp: Peers = 1
    """Processes that share each micro-batch's tokens (context parallelism); it may then have cp times as many."""
    replicas: Peers = 1
    """Groups of processes that each hold all weights (HSDP): one for each node."""


class GenerationSection(ConfigSection):
    """The engines of a cluster. Each is one actor, on one node, with weights of its own."""

    engines: Peers = 1
    """How many, of the kind that engine.backend says."""
    servers: int | None = Field(default=None, ge=0)
    """How many of them are servers, where engine.backend names one: the last ones; the others are embedded engines.
    Absent: all."""
    gpus_per_engine: int = Field(default=0, ge=0, le=1024)
    """GPUs of each; 0: it samples on a CPU. An embedded engine uses one; engine.server.args tells a server how many."""
    cpus_per_engine: float = Field(default=1.0, gt=0, le=1024)
    """CPU cores of each: Ray's measure for placement, and the threads of its torch."""

    @property
    def num_servers(self) -> int:
        """Where engine.backend names one: `servers`; absent: all."""
        return self.engines if self.servers is None else self.servers


class TrainingSection(ParallelSection):
    """The processes that train, called ranks."""

    ranks: Peers = 1
    """How many; what tp, cp and replicas leave of them shards the weights (FSDP)."""
    gpus_per_rank: int = Field(default=0, ge=0, le=1)
    """0: it trains on a CPU."""
    cpus_per_rank: float = Field(default=1.0, gt=0, le=1024)
    """CPU cores of each: Ray's measure for placement, and the threads of its torch."""


class ClusterSection(ConfigSection):
    """Generation and training on processes of their own, placed by Ray. Paths must be the same on all nodes."""

    address: str | None = None
    """A Ray cluster that runs: "auto" (the one of this machine), or host:port. Absent: Ray is started here."""
    generation: GenerationSection = GenerationSection()
    training: TrainingSection = TrainingSection()
    colocate: bool = False
    """Engines and ranks take turns on the same devices: an engine gives back the memory of its weights and KV while
    the ranks train. As many ranks on each engine's devices."""
    sync: Literal["broadcast", "disk"] = "broadcast"
    """How weights reach engines: a torch.distributed group of the first rank and the engines (NCCL on GPU; gloo on
    CPU, and with `colocate`), or a checkpoint in the run directory."""
    bucket_mib: int = Field(default=256, ge=1)
    """Weights are gathered, sent and loaded in pieces of this size, which overlap."""
    max_restarts: int = Field(default=3, ge=0)
    """How often training is begun again from the last checkpoint, by itself, when one of its processes is lost."""
    start_limit_s: Seconds = 900
    """How long a process may take to start."""
    silence_limit_s: Seconds = 120
    """An engine that neither answers nor samples for so long is taken for dead."""
    step_limit_s: Seconds = 3600
    """How long an optimizer step, or a checkpoint, may take."""
    sync_limit_s: Seconds = 600
    """How long a weight sync may take."""

    @model_validator(mode="after")
    def _possible(self) -> ClusterSection:
        ranks, split = self.training.ranks, self.training.tp * self.training.cp * self.training.replicas
        check_multiple("cluster.training.ranks", ranks, split, f"tp x cp x replicas = {split}")
        engines, servers = self.generation.engines, self.generation.num_servers
        if servers > engines:
            raise ValueError(
                f"cluster.generation.servers: expected at most cluster.generation.engines = {engines}, got {servers}; "
                f"nearest: {engines}"
            )
        if self.colocate:
            same = f"cluster.generation.engines = {engines} with colocate (as many ranks on each engine's devices)"
            check_multiple("cluster.training.ranks", ranks, engines, same)
            gpus = ranks // engines * self.training.gpus_per_rank
            if gpus != self.generation.gpus_per_engine:
                raise ValueError(
                    f"cluster.generation.gpus_per_engine: expected the {gpus} GPUs of the {ranks // engines} ranks "
                    f"that take turns with an engine (colocate), got {self.generation.gpus_per_engine}; nearest: {gpus}"
                )
        return self
