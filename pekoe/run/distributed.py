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

WAIT_LIMIT = timedelta(minutes=30)  # of one process for another


@contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that torchrun started; gives this one's rank. A process of its own has rank 0."""
    if num_processes() == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT_LIMIT)
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


def make_layout(spec: ModelSpec, parallel: ParallelSection, device: torch.device) -> Layout | None:
    """The layout that the recipe asks for; None for one process."""
    if num_processes() > 1:
        return Layout(spec, parallel.tp, parallel.cp, parallel.replicas, device.type)
    asked = parallel.tp * parallel.cp * parallel.replicas
    if asked > 1:
        raise UserError(
            f"parallel: expected {asked} processes or a multiple, got one; start them with "
            f"torchrun --nproc-per-node {asked} -m pekoe.cli sft RECIPE.toml"
        )
    return None
