"""The measured peak memory of a training step, and a setting that makes malloc return freed memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_LARGE = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h


def limit_malloc_cache(least: int = _LARGE) -> None:
    """Make glibc allocate blocks of `least` bytes and more by mmap: they return to the system when they are freed.

    By default glibc keeps freed blocks of up to 32 MiB, whose gaps fit no request: a step of 8,192 tokens with
    activation checkpointing held twice the memory in use. Allocation gets slower. Does nothing but on Linux.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, least)


class PeakMemory:
    """The peak since this was made of the memory allocated by torch on a GPU, or resident in the process (Linux).

    On other systems, which cannot reset a process's peak, `bytes` is None.
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
    """Resident memory of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
