"""The trainer's state on disk, by torch.distributed.checkpoint: saved on N processes, loaded on M.

A snapshot is a copy in host memory, so training goes on while it is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pekoe.model import save_model
from pekoe.train.trainer import Trainer

_PLAIN_COPY = (False, False, False, False)  # no pinned, no shared memory, no thread, no stream


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a trainer held at one moment."""

    state: dict[str, Any]  # this process's part of `Trainer.state_dict`
    weights: Mapping[str, Tensor]  # whole, by their Hugging Face names; empty but on the first process


def snapshot(trainer: Trainer) -> Snapshot:
    """Copy the trainer's state to host memory. All processes call it together."""
    stager = DefaultStager(StagingOptions(*_PLAIN_COPY))
    state = cast(dict[str, Any], stager.stage(trainer.state_dict()))
    stager.close()
    if trainer.group is None:
        return Snapshot(state, state["model"])
    return Snapshot(state, whole_weights(trainer))


def whole_weights(trainer: Trainer) -> Mapping[str, Tensor]:
    """A copy of the weights in host memory, by their Hugging Face names; empty but on the first process. All processes
    call it together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(trainer.model, options=options))


def write(state: Snapshot, path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write a snapshot to the directory `path`; all processes of `group` call it together.

    Raises OSError where a file could not be written.
    """
    try:
        _one_process_is_meant()
        dcp.save(state.state, checkpoint_id=str(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # what failed at each process; its message is a traceback
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from None


def export(state: Snapshot, path: Path, trainer: Trainer) -> None:
    """Write a snapshot's model as a Hugging Face directory. The first process alone can."""
    save_model(trainer.model, path, weights=state.weights)


def load(path: Path, trainer: Trainer) -> None:
    """Give the trainer the state that `write` wrote, on however many processes. All of them call it together."""
    tensors = trainer.state_dict()
    _one_process_is_meant()
    dcp.load(tensors, checkpoint_id=str(path), no_dist=trainer.group is None)
    trainer.load_state_dict(tensors)


def _one_process_is_meant() -> None:
    """Not a forgotten process group, of which DCP warns. For good, as a block of its own would not be thread-safe."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
