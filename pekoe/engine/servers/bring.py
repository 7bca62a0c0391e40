"""Ways to bring weights, as a version, to one server that is paused."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from pekoe.core.errors import RunError
from pekoe.engine import transfer
from pekoe.engine.async_thread import both, in_thread
from pekoe.engine.servers.client import Backend, Server, TransportError
from pekoe.engine.servers.process import free_ports
from pekoe.engine.transfer import Group, Tensors
from pekoe.model import Decoder

Bring = Callable[[Backend, Server, int], Coroutine[Any, Any, None]]


def from_disk(directory: Path) -> Bring:
    """From a Hugging Face directory that the server can read."""

    async def bring(backend: Backend, server: Server, version: int) -> None:
        await backend.load_from_disk(server, directory, version)

    return bring


def by_broadcast(model: Decoder) -> Bring:
    """From this process, rank 0 of a group with each server."""

    async def bring(backend: Backend, server: Server, version: int) -> None:
        if server.group is None:
            server.group = await _open(backend, server)
        group, handle = server.group
        await backend.begin_update(server)
        parts = transfer.buckets(model, dtype=getattr(torch, backend.setup.dtype))
        while tensors := await in_thread(partial(next, parts, None)):
            sending = asyncio.ensure_future(in_thread(backend.broadcast, handle, tensors))
            await both(sending, backend.receive(server, group, tensors))
        await backend.finish_update(server, version)

    return bring


def from_group(parts: Iterable[Tensors]) -> Bring:
    """From another process, rank 0 of the group that the server has joined (`join`), which broadcasts these. Of the
    tensors, only names, shapes and dtypes are used."""

    async def bring(backend: Backend, server: Server, version: int) -> None:
        if server.group is None:
            raise RunError(f"{server.url}: expected a server in a weight-update group, got one in none")
        await backend.begin_update(server)
        for tensors in parts:
            await backend.receive(server, server.group[0], tensors)
        await backend.finish_update(server, version)

    return bring


async def join(backend: Backend, servers: list[Server], group: Group) -> None:
    """Make the workers of all servers members of a group that another process leads, from `group.first_rank` on."""
    joining: list[Coroutine[Any, Any, None]] = []
    for server in servers:
        if server.group is not None:
            with contextlib.suppress(RunError, TransportError):  # one that broke off may be gone
                await backend.part(server, server.group[0])
        server.group = group, None
        joining.append(backend.join_group(server, group))
        group = replace(group, first_rank=group.first_rank + await backend.num_workers(server))
    await asyncio.gather(*joining)


async def _open(backend: Backend, server: Server) -> tuple[Group, Any]:
    group = Group(
        name=f"pekoe-{os.urandom(6).hex()}",  # a new name each time: a broken group's may still be taken
        host="127.0.0.1" if server.is_local else transfer.own_address(httpx.URL(server.url).host),
        port=free_ports(1)[0],
        world_size=1 + await backend.num_workers(server),
        backend="nccl" if backend.setup.device == "cuda" else "gloo",
        limit_s=backend.setup.config.update_limit_s,
    )
    opening = asyncio.ensure_future(in_thread(backend.open_group, group))
    await both(opening, backend.join_group(server, group))
    return group, opening.result()
