"""torch.distributed groups for weights, beside a default group: rank 0 sends, engines receive."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from pekoe.core.errors import RunError
from pekoe.engine.base import BroadcastGroup

_LOOK_S = 0.002  # between looks at a transfer that does not block


def open_group(group: BroadcastGroup, rank: int = 0) -> Any:
    """Join `group` as `rank`; blocks until all have joined.

    torch makes further default-less groups only by this private function; servers do the same (OpenRLHF's recipe).
    """
    limit, size = timedelta(seconds=group.limit_s), group.world_size
    store = open_store(group.host, group.port, size, rank, limit)
    make: Any = c10d._new_process_group_helper  # pyright: ignore[reportPrivateUsage]
    prefixed = c10d.PrefixStore(group.name, store)
    handle, _ = make(size, rank, [], group.backend, prefixed, group_name=group.name, timeout=limit)
    c10d._world.pg_group_ranks[handle] = {i: i for i in range(size)}  # pyright: ignore[reportPrivateUsage]
    return handle


def open_store(host: str, port: int, size: int, rank: int, limit: timedelta) -> dist.TCPStore:
    """The store where the members of a group find one another; rank 0 keeps it. It listens at `host` alone: left to
    itself it listens on every address, and torch lets whoever connects read and write."""
    if rank:
        return dist.TCPStore(host, port, size, False, limit)
    with socket.create_server((host, port)) as listener:
        fd = listener.detach()
    return dist.TCPStore(host, port, size, True, limit, wait_for_workers=False, master_listen_fd=fd)


def close_group(handle: Any | None) -> None:
    if handle is not None:
        dist.destroy_process_group(handle)


def wait_for(works: list[Any], handle: Any, limit_s: float) -> None:
    """Wait for broadcasts. RuntimeError where a member is gone or the limit has passed.

    gloo's `wait` raises by itself. NCCL's does not block the host, and its watchdog would end this process when a
    member dies: so completion is polled, and the communicator is aborted in time.
    """
    if works and dist.get_backend(handle) == "nccl":
        poll(works, limit_s, handle.abort)
    else:
        for work in works:
            work.wait()


def poll(works: list[Any], limit_s: float, abort: Callable[[], object]) -> None:
    """Look at `works` until all are completed; after `limit_s`, `abort()` and RunError."""
    end = time.monotonic() + limit_s
    while not all(work.is_completed() for work in works):
        if time.monotonic() > end:
            abort()
            raise RunError(f"weights: expected a broadcast to end within {limit_s:g} s: an engine is gone")
        time.sleep(_LOOK_S)


def new_group(host: str, port: int, world_size: int, backend: Any, limit_s: float) -> BroadcastGroup:
    """A name that was never used: that of a broken group may still be taken."""
    return BroadcastGroup(f"pekoe-{os.urandom(6).hex()}", host, port, world_size, backend, limit_s)


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()[1]


def use_interface(address: str, *users: str) -> None:
    """Let torch.distributed use the network interface that has this IPv4 address: by itself it takes that of the host's
    name, which may be another. `users`: "GLOO", "NCCL"; by default both."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            os.environ |= {f"{user}_SOCKET_IFNAME": name for user in users or ("GLOO", "NCCL")}
