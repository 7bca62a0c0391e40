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

from pekoe.model import Decoder, save_model

_PLAIN_COPY = (False, False, False, False)  # no pinned, no shared memory, no thread, no stream


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Implements `core.loop.Snapshot`. All processes of `group` call `write` together; the first alone can `export`."""

    state: dict[str, Any]  # this process's part of `Trainer.state_dict`
    weights: Mapping[str, Tensor]  # as `whole_weights`
    model: Decoder  # for its shape and its files beside the weights
    group: dist.ProcessGroup | None  # of all processes that train

    def write(self, path: Path) -> None:
        write(self.state, path, self.group)

    def export(self, path: Path) -> None:
        save_model(self.model, path, weights=self.weights)


def snapshot(model: Decoder, state: dict[str, Any], group: dist.ProcessGroup | None) -> Snapshot:
    """Copy `Trainer.state_dict` to host memory. All processes call it together."""
    stager = DefaultStager(StagingOptions(*_PLAIN_COPY))
    copied = cast(dict[str, Any], stager.stage(state))
    stager.close()
    return Snapshot(copied, copied["model"] if group is None else whole_weights(model), model, group)


def whole_weights(model: Decoder) -> Mapping[str, Tensor]:
    """A copy of the weights in host memory, by Hugging Face names; empty on all processes but the first, which all call
    it together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def write(state: dict[str, Any], path: Path, group: dist.ProcessGroup | None) -> None:
    """Write `state` to the directory `path`. Raises OSError where a file cannot be written."""
    try:
        _ignore_warning()
        dcp.save(state, checkpoint_id=str(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # the failures of all processes; its message is a traceback
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from None


def read(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill `state` with what `write` wrote, on any number of processes, which call it together."""
    _ignore_warning()
    dcp.load(state, checkpoint_id=str(path), no_dist=group is None)


def _ignore_warning() -> None:
    """DCP warns where there is no process group. `catch_warnings` is not thread-safe."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
