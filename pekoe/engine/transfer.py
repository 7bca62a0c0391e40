"""Ways for weights from this process to a server: a directory (on disk or in shared memory), or a broadcast."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from pekoe.core.errors import RunError
from pekoe.model import Decoder, save_model

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 512 * 2**20
_PREFIX = "pekoe-weights-"

Tensors = Sequence[tuple[str, Tensor]]
"""Named as in a Hugging Face checkpoint, in the order in which they are broadcast."""


@dataclass(frozen=True, slots=True)
class Group:
    """A torch.distributed group for weights: the trainer is rank 0, those that sample are 1 to world_size - 1."""

    name: str
    host: str  # where rank 0 listens
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    limit_s: float
    first_rank: int = 1  # of those that whoever is asked to join brings with it


@contextmanager
def written(model: Decoder, parent: Path, dtype: torch.dtype) -> Generator[Path]:
    """`model` in `dtype` as a Hugging Face directory under `parent`, for as long as the context lasts."""
    parent.mkdir(parents=True, exist_ok=True)
    if parent == SHARED_MEMORY:
        _remove_orphans()
    place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    try:
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # says that we live, in any container that shares this memory
            save_model(model, place / "model", dtype=dtype)
            yield place / "model"
    except (OSError, SafetensorError) as error:  # a full disk, mostly
        raise RunError(f"weight update: cannot write {place}: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove_orphans() -> None:
    """What processes of this host left in shared memory when they were killed."""
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def buckets(
    model: Decoder, max_bytes: int = BUCKET_BYTES, dtype: torch.dtype | None = None
) -> Iterator[list[tuple[str, Tensor]]]:
    """Its parameters by name, in order, in lists of about `max_bytes`: what a server holds beside its weights.

    Each is converted to `dtype` when its list is made (None: as it is; its bytes are those of the whole where it is
    sharded). Tied embeddings have one name, and come once.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach() if dtype is None else parameter.detach().to(dtype).contiguous()
        more = tensor.numel() * tensor.element_size()
        if bucket and size + more > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += more
    yield bucket


def own_address(server_host: str) -> str:
    """The address under which `server_host` reaches this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server_host, 9))  # nothing is sent: it asks the routing table
        return probe.getsockname()[0]


def open_group(group: Group, rank: int = 0) -> Any:
    """This process's end of `group`. Blocks until all have joined; beside, not in place of, a default group.

    torch makes further default-less groups only by this private function; servers do the same (OpenRLHF's recipe).
    """
    limit = timedelta(seconds=group.limit_s)
    size, place = group.world_size, (group.host, group.port)
    if rank == 0:
        with socket.create_server(place) as listener:  # left to itself it listens on every address
            fd = listener.detach()
        store: Any = dist.TCPStore(*place, size, True, limit, wait_for_workers=False, master_listen_fd=fd)
    else:
        store = dist.TCPStore(*place, size, False, limit)
    store = c10d.PrefixStore(group.name, store)
    make: Any = c10d._new_process_group_helper  # pyright: ignore[reportPrivateUsage]
    handle, _ = make(size, rank, [], group.backend, store, group_name=group.name, timeout=limit)
    c10d._world.pg_group_ranks[handle] = {i: i for i in range(size)}  # pyright: ignore[reportPrivateUsage]
    return handle


def broadcast(handle: Any, tensors: Tensors) -> None:
    """Send each tensor from rank 0."""
    for _, tensor in tensors:
        dist.broadcast(tensor, src=0, group=handle)
    if tensors and tensors[0][1].is_cuda:
        torch.cuda.synchronize()


def close_group(handle: Any | None) -> None:
    """None: the trainer's end is in another process."""
    if handle is not None:
        dist.destroy_process_group(handle)
