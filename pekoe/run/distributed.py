"""Processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pekoe.config.recipes import ParallelSection
from pekoe.core.errors import UserError
from pekoe.core.spec import ModelSpec
from pekoe.train import Layout
from pekoe.weights.groups import open_store, use_interface

WAIT_LIMIT = timedelta(minutes=30)  # of one process for another


@contextmanager
def process_group(name: str = "pekoe") -> Iterator[int]:
    """Join the processes that the environment names, as torchrun sets it; gives this one's rank. A process of its own
    has rank 0. `name`: of their keys in the store; all must know it."""
    if (size := num_processes()) == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and "GLOO_SOCKET_IFNAME" not in os.environ:
        use_interface("127.0.0.1", "GLOO")  # all are on this machine
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself keeps the store
        dist.init_process_group(backend, timeout=WAIT_LIMIT)
    else:
        rank, place = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = dist.PrefixStore(name, open_store(*place, size, rank, WAIT_LIMIT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT_LIMIT)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_single_process(command: str) -> None:
    """UserError under torchrun, for commands that do not share their work."""
    if num_processes() > 1:
        raise UserError(f"{command}: expected one process, got torchrun with {num_processes()}; torchrun is for sft")


def make_layout(spec: ModelSpec, parallel: ParallelSection, device: torch.device, apart: bool = False) -> Layout | None:
    """The layout that the recipe asks for; None for one process. `apart`: see `Layout`."""
    if num_processes() > 1:
        return Layout(spec, parallel.tp, parallel.cp, parallel.replicas, device.type, apart)
    asked = parallel.tp * parallel.cp * parallel.replicas
    if asked > 1:
        raise UserError(
            f"parallel: expected {asked} processes or a multiple, got one; start them with "
            f"torchrun --nproc-per-node {asked} -m pekoe.cli sft RECIPE.toml"
        )
    return None
