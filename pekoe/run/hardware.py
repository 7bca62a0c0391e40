"""The machine as a run journals it: versions, the device, and the rates that it reaches."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from pekoe.core.roofline import Ceilings

_AT_LEAST, _LONG_S = 4, 0.15  # measurements of a rate, and seconds; the best one is least disturbed by other work


def describe(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The `machine` event of a journal: versions and, of the device that is given, its name and measured ceilings."""
    event: dict[str, Any] = {
        "versions": {"pekoe": version("pekoe"), "python": platform.python_version(), "torch": torch.__version__},
        "host": platform.node(),
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device is None:
        return event
    ceilings = measure_ceilings(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    event |= {"device": f"{device.type} ({name})", "dtype": str(dtype).removeprefix("torch.")}
    return event | {"flop_s": ceilings.flop_s, "byte_s": ceilings.byte_s}


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rates of a square matrix product and of a copy in memory: each the best of several measurements."""
    ceilings = _measure(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the operands are not needed again
    return ceilings


def _measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    width, size = 8192 if device.type == "cuda" else 1024, 2**26  # 256 MiB: more than caches hold
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)  # written once before: a page's first use is not memory's speed
    return Ceilings(
        flop_s=2 * width**3 / _fastest(lambda: torch.mm(a, b), device),
        byte_s=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < _AT_LEAST or time.perf_counter() - begun < _LONG_S:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
