"""The trainer's state on disk, by torch.distributed.checkpoint: saved on N processes, loaded on M.

A snapshot is a copy in host memory, so training goes on while it is written. A checkpoint is not trusted: checksums
tell whether its files are those that were written, and nothing in it that is unpickled can run code.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata, ReadItem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pekoe.core.errors import UserError
from pekoe.core.io import SUMS, check_sums, read_sums, sha256, write_sums
from pekoe.model import LanguageModel, save_adapter, save_model

T = TypeVar("T")
_PLAIN_COPY = (False, False, False, False)  # no pinned, no shared memory, no thread, no stream


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Implements `core.loop.Snapshot`. All processes of `group` call `write` together; the first alone can `export`."""

    state: dict[str, Any]  # this process's part of `Trainer.state_dict`
    weights: Mapping[str, Tensor]  # as `whole_weights`, of those that are trained
    model: LanguageModel  # for its shape and its files beside the weights
    group: dist.ProcessGroup | None  # of all processes that train

    def write(self, path: Path) -> None:
        write(self.state, path, self.group)

    def export(self, path: Path) -> None:
        (save_model if self.model.lora is None else save_adapter)(self.model, path, weights=self.weights)


def snapshot(model: LanguageModel, state: dict[str, Any], group: dist.ProcessGroup | None) -> Snapshot:
    """Copy `Trainer.state_dict` to host memory. All processes call it together."""
    stager = DefaultStager(StagingOptions(*_PLAIN_COPY))
    copied = cast(dict[str, Any], stager.stage(state))
    stager.close()
    return Snapshot(copied, copied["model"] if group is None else whole_weights(model, trained=True), model, group)


def whole_weights(model: LanguageModel, trained: bool = False) -> Mapping[str, Tensor]:
    """A copy of the weights in host memory, or of those that are trained, by their names in the model; empty on all
    processes but the first, which all call it together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    state = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    names = {name for name, _ in model.named_parameters()}  # tied ones once, no fixed tensors
    return {name: tensor for name, tensor in state.items() if name in names}


def write(state: dict[str, Any], path: Path, group: dist.ProcessGroup | None) -> None:
    """Write `state` to the directory `path`, with checksums. Raises OSError where a file cannot be written."""
    rank = 0 if group is None else dist.get_rank(group)
    try:
        _ignore_warning()
        dcp.save(state, checkpoint_id=str(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # the failures of all processes; its message is a traceback
        raise _cause_of(error) from None

    def own_sums() -> dict[str, str]:
        """Of the files that this process wrote; the first one also wrote the metadata."""
        names = [file.name for file in path.iterdir() if file.name != SUMS]
        own = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]
        return {name: sha256(path / name) for name in own}

    sums = _of_all(own_sums, group)
    if rank == 0:
        write_sums(path, {name: digest for each in sums for name, digest in each.items()})


def read(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill `state` with what `write` wrote, on any number of processes, which call it together.

    UserError, with the file's name, where that is not what is there. Checkpoints of older versions have no checksums.
    """
    rank, number = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def check() -> None:
        """This process's share of the files."""
        if (path / SUMS).exists():
            sums = read_sums(path)
            check_sums(path, sums, sorted(sums)[rank::number])
        try:
            _Reader(path).read_metadata()  # DCP would log a traceback, and look for metadata elsewhere
        except Exception as error:
            raise _not_readable(path, error) from None

    _of_all(check, group)
    _ignore_warning()
    try:
        dcp.load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=group is None)
    except (Exception, CheckpointException) as error:
        cause = _cause_of(error) if isinstance(error, CheckpointException) else error
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError, dist.DistError)):
            raise cause from None
        raise _not_readable(path, cause) from None


def _not_readable(path: Path, error: BaseException) -> UserError:
    first = [*str(error).strip().splitlines(), ""][0]
    return UserError(
        f"{path}: expected the state of this model, got what cannot be read: {type(error).__name__}: {first}"
    )


def _cause_of(error: CheckpointException) -> BaseException:
    """The first OSError of the processes' failures, else the first failure."""
    causes: list[BaseException | None] = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch's writer raises an error of its own while it handles the system's
        if cause is not None:
            return cause
    first = causes[0]
    assert first is not None
    if isinstance(first, RuntimeError):  # of another process: only the writer's own error comes from there
        return OSError(str(first).strip().splitlines()[0])
    return first


def _of_all(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `work` gives on each process, which call this together; all raise what the first that failed raised."""
    try:
        own: T | OSError | UserError = work()
    except (OSError, UserError) as error:
        own = error
    results: list[Any] = [own]
    if group is not None:
        results = [None] * dist.get_world_size(group)
        dist.all_gather_object(results, own, group=group)
    for result in results:
        if isinstance(result, (OSError, UserError)):
            raise result
    return results


class _Reader(FileSystemReader):
    """Reads metadata with the classes of metadata alone, and no file beside the checkpoint's."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        for place in found.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"expected the name of a file in the checkpoint, got {place.relative_path!r}")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Numbers and texts. The method of the base class unpickles anything: it is given what was read, saved anew."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


_KINDS = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
)
_ALLOWED = {
    *((metadata.__name__, kind) for kind in _KINDS),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    """Unpickles `Metadata`, and no class that is not part of it: a pickle can call whatever it can name."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name == "PosixPath" and module_name.startswith("pathlib"):  # the place that it was written to
            return PurePosixPath
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or (module_name, global_name) in _ALLOWED:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"metadata may not name {module_name}.{global_name}, which could run code")


def _ignore_warning() -> None:
    """DCP warns where there is no process group. `catch_warnings` is not thread-safe."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
