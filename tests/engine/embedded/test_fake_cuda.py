"""The engine on a GPU that is not there: in every forward devices, dtypes and shapes fit (`make test-fake-cuda`).

Of the Triton kernels it is checked what they are given; their numbers are `test_attention_cuda.py`'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pekoe.config.engine import EngineSection
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.core.types import Request, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.embedded import attention_cuda
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.model import Decoder
from tests.fake_cuda import fake_cuda

# Two layers of Qwen2.5-7B.
SPEC = ModelSpec("qwen2", 152064, 3584, 2, 28, 4, 128, 18944, 32768, rope=RopeSpec(1e6), qkv_bias=True)
NUMBERS = {"q", "keys", "values", "k", "v"}  # arguments of kernels in the dtype of the products
FLOATS = {"outs", "maxima", "sums"}


class Kernel:
    """In a Triton kernel's place: takes what it is called with, and keeps how often it was."""

    def __init__(self, kernel: Any, dtype: torch.dtype) -> None:
        self.num_calls, self._signature, self._dtype = 0, inspect.signature(kernel.fn), dtype

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 1 <= len(grid) <= 3
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self._call

    def _call(self, *args: Any, num_warps: int = 4, **named: Any) -> None:
        self.num_calls += 1
        for name, value in self._signature.bind(*args, **named).arguments.items():
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cuda", name
                assert value.is_contiguous(), name
                expected = self._dtype if name in NUMBERS else torch.float32 if name in FLOATS else value.dtype
                assert value.dtype is expected, name
            else:
                assert isinstance(value, int | float | bool), name


class Kernels:
    def __init__(self, dtype: torch.dtype) -> None:
        from pekoe.engine.embedded import triton_kernels as real

        self.write, self.attend, self.merge = (
            Kernel(each, dtype) for each in (real.write, real.attend, real.merge)
        )  # fmt: skip


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A replayed graph is the forward, called again. The engine's thread does nothing: the test calls what it would,
    as fake tensors that pass from thread to thread end in a fault of the process."""

    def record(_: DecodeGraphs, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        return forward(), forward

    with fake_cuda(monkeypatch) as mode:
        monkeypatch.setattr("pekoe.engine.embedded.engine.threading.Thread", NoThread)
        monkeypatch.setattr(DecodeGraphs, "_record", record)
        yield mode


class NoThread:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def start(self) -> None: ...

    def join(self, *_: Any) -> None: ...


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=4, max_new_tokens=5, stop_token_ids=(7,)),
        SamplingParams(n=2, max_new_tokens=5, stop_token_ids=(7,), temperature=0.0),
        SamplingParams(n=2, max_new_tokens=5, stop_token_ids=(7,), top_p=0.9, top_k=20, min_new_tokens=2),
    ],
)
def test_requests_are_answered(
    mode: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
    make_requests: Callable[..., list[Request]],
    dtype: torch.dtype,
    params: SamplingParams,
):
    """Chunks of prompts, decoding by graphs, copied blocks, every way to sample; then other weights, and again."""
    kernels = Kernels(dtype)
    monkeypatch.setattr(attention_cuda, "_kernels", lambda: kernels)
    with torch.device("cuda"):
        model = Decoder(SPEC)
    engine = EmbeddedEngine(
        model, EngineSection(kv_tokens=4096, block_tokens=32, prefill_tokens=128), compute_dtype=dtype
    )
    requests = [r for i, length in enumerate((1, 33, 300)) for r in make_requests(f"p{i}", length, params, vocab=99)]
    for _ in range(2):
        futures = engine.submit(requests)
        engine._drive()
        for future in futures:
            assert future.result(0).num_tokens == params.max_new_tokens
        engine.offload()
        engine.onload()
        engine.update_weights(model, engine.version + 1)
    assert kernels.write.num_calls
    assert kernels.attend.num_calls > kernels.merge.num_calls > 0
    engine.close()
