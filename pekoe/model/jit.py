"""Kernels for CPUs, compiled at run time by numba: what torch's CPU ops have no fused form of.

A kernel releases the GIL and takes the range of work it is to do first, `kernel(first, last, ...)`, so that `run` can
give each of torch's CPU threads a share. Compiled code is kept beside the source or in the user's cache directory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numba
import torch

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning.
_FASTMATH = {"contract", "reassoc", "nsz", "arcp", "afn"}
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def kernel(function: F) -> F:
    """Compile `function` at its first call."""
    compiled: Any = numba.njit(nogil=True, cache=True, fastmath=_FASTMATH, error_model="numpy")(function)
    return compiled


def run(function: Callable[..., Any], bounds: Sequence[int], *args: Any) -> None:
    """Call `function(first, last, *args)` for each neighbouring pair of `bounds`, on a thread each."""
    shares = [(a, b) for a, b in pairwise(bounds) if b > a]
    waiting = [_threads().submit(function, a, b, *args) for a, b in shares[1:]]
    if shares:
        function(*shares[0], *args)
    for future in waiting:
        future.result()


def even(num_items: int, at_least: int) -> list[int]:
    """Bounds that split items evenly among torch's threads, none with fewer than `at_least`."""
    num_shares = max(1, min(torch.get_num_threads(), num_items // at_least))
    return [num_items * i // num_shares for i in range(num_shares + 1)]


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(torch.get_num_threads(), "pekoe-kernel")
        return _pool
