"""What a training step takes of a process's memory, measured; and an allocator that gives back what is freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_LARGE = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h


def limit_malloc_cache() -> None:
    """Have glibc map what is larger than 1 MiB for itself, so that it goes back to the system when it is freed.

    By default glibc learns to keep up to 32 MiB at a time, whose holes then fit nothing: a step of 8,192 tokens with
    activation checkpointing had twice what it had in use. It is slower, as every page is new each time. Elsewhere than
    on Linux nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


class PeakMemory:
    """The most memory since this was made: that torch allocated on a GPU, or that the process had (Linux).

    Elsewhere `bytes` is None: a process's peak cannot be told apart from earlier ones.
    """

    _clear, _status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self._clear.exists():
            self._clear.write_text("5")  # VmHWM starts again, see proc_pid_clear_refs(5)

    @property
    def bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resident("VmHWM") if self._clear.exists() else None


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
