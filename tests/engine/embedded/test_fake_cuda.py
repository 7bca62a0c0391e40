"""The engine on a GPU that is not there: in every forward devices, dtypes and shapes fit (`make test-fake-cuda`).

Of the Triton kernels it is checked what they are given; their numbers are `test_attention_cuda.py`'s.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.core.types import SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.base import requests_of
from pekoe.engine.embedded import attention_cuda
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.engine.sampling import sample
from pekoe.model import Decoder
from tests.fake_cuda import fake_cuda, missing

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

        self.write, self.attend, self.merge = (Kernel(each, dtype) for each in (real.write, real.attend, real.merge))


class NoThread:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def start(self) -> None: ...

    def join(self, *_: Any) -> None: ...


def record(_: DecodeGraphs, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
    """A replayed graph is the forward, called again."""
    return forward(), forward


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PARAMS = {
    "plain": SamplingParams(n=4, max_new_tokens=5, stop_token_ids=(7,)),
    "greedy": SamplingParams(n=2, max_new_tokens=5, stop_token_ids=(7,), temperature=0.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PARAMS)
def test_requests_are_answered(repository: Path, dtype: str, name: str):
    """In a process of its own: after some hundred forwards of several engines such tensors end in a fault of memory,
    with or without threads, in torch 2.14.1."""
    if why := missing():
        pytest.skip(why)
    argv = [sys.executable, "-m", __spec__.name, dtype, name]
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


def test_truncated_samples(monkeypatch: pytest.MonkeyPatch):
    """Of which some may not end yet."""
    params = SamplingParams(stop_token_ids=(7,), top_p=0.9, top_k=20, min_new_tokens=2)
    ban = np.array([True, False, True])
    with fake_cuda(monkeypatch):
        logits = torch.randn((2, SPEC.vocab_size), device="cuda", dtype=torch.bfloat16)
        tokens, logprobs = sample(logits, np.full(3, 0.5), params, np.array([0, 1, 1]), ban)
    assert (tokens.shape, tokens.dtype) == ((3,), np.int64)
    assert (logprobs.shape, logprobs.dtype) == ((3,), np.float32)


def answer(dtype: torch.dtype, params: SamplingParams, patch: pytest.MonkeyPatch) -> None:
    """Chunks of prompts, decoding by graphs, copied blocks, each way to sample; then other weights, and again. The
    engine's thread does nothing: what it would is called here."""
    kernels = Kernels(dtype)
    patch.setattr(attention_cuda, "_kernels", lambda: kernels)
    patch.setattr("pekoe.engine.embedded.engine.threading.Thread", NoThread)
    patch.setattr(DecodeGraphs, "_record", record)
    with torch.device("cuda"):
        model = Decoder(SPEC)
    engine = EmbeddedEngine(
        model, EngineSection(kv_tokens=4096, block_tokens=32, prefill_tokens=128), compute_dtype=dtype
    )
    prompts = {f"p{length}": np.arange(length) for length in (1, 33, 300)}
    requests = [request for uid, tokens in prompts.items() for request in requests_of(uid, 0, tokens, params)]
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


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch):
        answer(DTYPES[sys.argv[1]], PARAMS[sys.argv[2]], patch)
