"""Kernels for CPUs, compiled at run time by numba: what torch's CPU ops have no fused form of.

A kernel releases the GIL and takes the range of work it is to do first, `kernel(first, last, ...)`, so that `run` can
give each of torch's CPU threads a share. Compiled code is kept beside the source or in the user's cache directory.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import torch

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning.
_FASTMATH = {"contract", "reassoc", "nsz", "arcp", "afn"}
_pool: ThreadPoolExecutor | None = None
_num_workers = 0
_lock = threading.Lock()
_here = threading.local()  # .worker is set on the pool's threads


def kernel(function: F) -> F:
    """Compile `function` at its first call."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    function.__qualname__ += f"_{_compiled_in()}"  # which the name of the file is made of
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no directory can be written: it is compiled in each process
        return cast(F, numba.njit(**options)(function))


@functools.cache
def _compiled_in() -> str:
    """Hash of the helpers of every kernel, which numba's cache key ignores: stale code must not be used."""
    sources = (Path(__file__), Path(__file__).with_name("simd.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def run(function: Callable[..., Any], bounds: Sequence[int], *args: Any) -> None:
    """Call `function(first, last, *args)` for each neighbouring pair of `bounds`, on a thread each."""
    shares = [(a, b, *args) for a, b in pairwise(bounds) if b > a]
    if hasattr(_here, "worker"):  # it may not wait for its own pool
        for share in shares:
            function(*share)
        return
    waiting = [_threads().submit(function, *share) for share in shares[1:]]
    try:
        if shares:
            function(*shares[0])
    finally:
        wait(waiting)  # also after Ctrl-C: nobody may still write when this returns
    for future in waiting:
        future.result()


def each(function: Callable[..., T], shares: Sequence[tuple[Any, ...]]) -> list[T]:
    """`function(*share)` of every share, each on a thread whose torch operations stay on it."""
    futures = [_threads().submit(function, *share) for share in shares]
    try:
        wait(futures)
    finally:
        wait(futures)  # also after Ctrl-C: nobody may still be at work when this returns
    return [future.result() for future in futures]


def num_threads() -> int:
    """Threads that `run` may use here."""
    return 1 if hasattr(_here, "worker") else torch.get_num_threads()


def adopt_num_threads() -> None:
    """To be called first in a thread that is to compute: its torch operations use as many threads as the process's."""
    with _lock:  # while workers start, the process's setting is theirs
        torch.get_num_threads()


def even(num_items: int, at_least: int) -> list[int]:
    """Bounds that split items evenly among torch's threads, none with fewer than `at_least`."""
    num_shares = max(1, min(num_threads(), num_items // at_least))
    return [num_items * i // num_shares for i in range(num_shares + 1)]


def _threads() -> ThreadPoolExecutor:
    """As many threads as torch has, kept; torch and its libraries stay on one thread within each."""
    global _pool, _num_workers
    with _lock:
        wanted = torch.get_num_threads()
        if _pool is None or _num_workers < wanted:
            pool, start = ThreadPoolExecutor(wanted, "pekoe-kernel", _become_worker), threading.Barrier(wanted)
            try:
                for future in [pool.submit(start.wait) for _ in range(wanted)]:
                    future.result()
            except BaseException:
                start.abort()  # a thread could not be started: the others must not wait for it for ever
                raise
            _pool, _num_workers = pool, wanted
            torch.set_num_threads(wanted)  # the workers' setting is also what threads made later would begin with
        return _pool


def _become_worker() -> None:
    _here.worker = True
    torch.get_num_threads()  # the first look in a thread takes over the process's setting; later ones keep this:
    torch.set_num_threads(1)
