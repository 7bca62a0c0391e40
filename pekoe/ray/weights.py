"""Weights from the ranks to the engines: gathered, sent and loaded in buckets, all three at once.

No process holds a full copy beside its model: a rank holds two buckets, an engine what is small of two. This is
`run.sync`'s bridge for trainers and engines in different processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Named = list[tuple[str, Tensor]]
_LARGE_BYTES = 1 << 20


def send(
    handle: Any | None,
    parts: Iterator[Named],
    look: Callable[[str, Tensor], None] | None = None,
    one_by_one: bool = False,
) -> tuple[int, str]:
    """Gather the buckets, at every rank, and broadcast them from the one that has `handle`.

    While one is on its way the next is gathered. A rank that cannot send goes on to gather: the others wait for it.

    Args:
        look: sees each whole parameter, at the rank that has `handle`.
        one_by_one: each tensor by itself, as servers take them; else as `receive` does.

    Returns:
        bytes sent, and what went wrong (nothing: an empty text).
    """
    sent, wrong = 0, ""
    on_its_way: list[tuple[Any, Tensor]] = []

    def arrived() -> None:
        while on_its_way:
            on_its_way.pop()[0].wait()

    for part in parts:
        whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for _, tensor in part]
        if handle is None or wrong:
            continue
        large, small = (whole, []) if one_by_one else _by_size(whole)
        pieces = [*large, torch.cat([tensor.reshape(-1) for tensor in small])] if small else large
        try:
            arrived()
            on_its_way += [(dist.broadcast(piece, src=0, group=handle, async_op=True), piece) for piece in pieces]
        except RuntimeError as error:  # an engine is gone
            wrong = str(error)
        sent += sum(piece.nbytes for piece in pieces)
        if look is not None:
            for (name, _), tensor in zip(part, whole, strict=True):
                look(name, tensor)
    try:
        arrived()
    except RuntimeError as error:
        wrong = wrong or str(error)
    return sent, wrong


def receive(handle: Any, parts: Iterator[Named]) -> None:
    """Take what `send` sends, of the same buckets: large tensors come into their place, the others into a buffer from
    which they are loaded while the next bucket comes."""
    coming: list[tuple[list[Any], Tensor, list[Tensor]]] = []

    def load() -> None:
        while coming:
            works, flat, small = coming.pop()
            for work in works:
                work.wait()
            for tensor, piece in zip(small, flat.split([tensor.numel() for tensor in small]), strict=True):
                tensor.copy_(piece.view_as(tensor))

    for part in parts:
        large, small = _by_size([tensor for _, tensor in part])
        flat = part[0][1].new_empty(sum(tensor.numel() for tensor in small))
        pieces = [*large, flat] if small else large
        works = [dist.broadcast(piece, src=0, group=handle, async_op=True) for piece in pieces]
        load()
        coming.append((works, flat, small))
    load()


def _by_size(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that are sent as they lie, and those that are cheaper to send together."""
    large = [t for t in tensors if t.nbytes >= _LARGE_BYTES and t.is_contiguous()]
    return large, [t for t in tensors if t.nbytes < _LARGE_BYTES or not t.is_contiguous()]


def use_interface(address: str) -> None:
    """Let torch.distributed use the network interface that has this IPv4 address: left to itself it asks for the host's
    name, which may say another."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
