"""CUDA tensors without numbers, on a machine without a GPU: the CUDA build of torch says which device, dtype and shape
each operation takes and gives; nothing is computed. What the host reads of one is a 1.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY = 80 << 30  # bytes of the GPU that is not there


@cache
def missing() -> str | None:
    """Why there are no such tensors here; None where there are."""
    if os.environ.get("PEKOE_FAKE_CUDA") != "1":
        return "run by make test-fake-cuda: torch's CUDA build, and backwards of fake tensors before any others"
    if torch.version.cuda is None:
        return "needs a CUDA build of torch: make test-fake-cuda"
    if torch.cuda.is_available():
        return "needs a machine without a GPU (with one: pytest -m gpu)"
    if shutil.which("g++") is None:
        return "needs g++"
    folder = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp()) / "fake_cuda.so"
    argv = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{folder / 'include'}", "-o", str(library), str(SOURCE)]
    subprocess.run(argv, check=True)
    ctypes.CDLL(str(folder / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    return None


class Stream:
    """Of a device that computes nothing; an event of it, too."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def record_event(self, *_: Any) -> Stream:
        return self

    def nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = wait = record = synchronize = nothing


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, tensors have no numbers, and torch.cuda answers for one device."""
    answer_for_it(patch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def answer_for_it(patch: pytest.MonkeyPatch) -> None:
    """What torch.cuda is asked, and what the host reads."""
    if why := missing():
        pytest.skip(why)
    for name, kind in {"__float__": float, "__int__": int, "__bool__": bool, "__index__": int}.items():
        patch.setattr(Tensor, name, lambda _, kind=kind: kind(1))
    patch.setattr(Tensor, "item", lambda self: 1.0 if self.is_floating_point() else 1)
    patch.setattr(Tensor, "numpy", _numpy)
    patch.setattr(Tensor, "data_ptr", lambda self: id(self))  # where it is, if nowhere
    patch.setattr(Tensor, "tolist", lambda self: _numpy(self).tolist())
    about = SimpleNamespace(multi_processor_count=132, total_memory=MEMORY)
    answers: dict[str, Any] = {"get_device_properties": about, "mem_get_info": (MEMORY, MEMORY)}
    answers |= dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), 0)
    answers |= dict.fromkeys(("reset_peak_memory_stats", "set_device", "synchronize"))
    answers |= {"is_available": False, "is_bf16_supported": True, "current_device": 0, "device_count": 1}
    answers |= {"current_stream": Stream(), "stream": nullcontext()}
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # autocast asks
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._ensureCUDADeviceGuardSet()  # ends with the thread that asks: not one of the engine's, which would
    patch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)
    for name in ("Stream", "Event"):
        patch.setattr(torch.cuda, name, Stream)


_own_numpy = Tensor.numpy


def _numpy(self: Tensor, **options: Any) -> np.ndarray:
    if not isinstance(self, FakeTensor):
        return _own_numpy(self, **options)
    assert self.device.type == "cpu", "numpy reads what is on the host alone"
    dtype = torch.empty(0, dtype=self.dtype, device="meta").dtype
    return np.ones(tuple(self.shape), str(dtype).removeprefix("torch."))
