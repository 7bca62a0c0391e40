"""The fused kernels against the torch code that they stand for."""

# pyright: reportCallIssue=false
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pekoe.kernels import decoder_ops, jit
from pekoe.kernels.jit import even, kernel, run
from pekoe.kernels.simd import exp, load, store
from pekoe.model.decoder import RMSNorm
from pekoe.model.rope import apply_rope


@kernel
def _exp_all(first, last, x):
    for i in range(first, last, 8):
        store(x, i, exp(load(x, i)))


def test_exp_is_as_exact_as_it_says():
    x = np.concatenate([np.linspace(-86, 0, 40_000), np.linspace(0, 87, 40_000)]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    run(_exp_all, [0, len(x)], x)
    assert (np.abs(x / expected - 1) < 3e-7 + np.abs(np.log(expected)) / 2**23).all()


def test_exp_keeps_what_is_not_finite():
    x = np.array([np.nan, np.inf, -np.inf, -1000, 0, 0, 0, 0], np.float32)
    run(_exp_all, [0, 8], x)
    assert not np.isfinite(x[:2]).any()
    assert (x[2:4] < 2e-38).all()


@pytest.mark.parametrize("rows", [1, 5, 3000])
@torch.no_grad()
def test_rms_norm(rows: int):
    norm, x = RMSNorm(48, 1e-6), 5 * torch.randn(rows, 3, 48)
    norm.weight.copy_(torch.randn(48))
    assert decoder_ops.usable(x)
    with torch.enable_grad():
        torch.testing.assert_close(decoder_ops.rms_norm(x, norm.weight, 1e-6), norm(x).detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 5, 3000])
@torch.no_grad()
def test_rope_and_silu(rows: int):
    q, k, angles = torch.randn(rows, 6, 16), torch.randn(rows, 3, 16), torch.randn(rows, 1, 16)
    expected = [apply_rope(x, angles.cos(), angles.sin()) for x in (q, k)]
    decoder_ops.rope_(q, k, angles.cos(), angles.sin())
    torch.testing.assert_close([q, k], expected, rtol=1e-6, atol=1e-6)
    gate, up = 30 * torch.randn(rows, 80), torch.randn(rows, 80)
    gate[0, :4] = torch.tensor([-500.0, 500.0, 0.0, -88.0])
    torch.testing.assert_close(decoder_ops.silu_mul(gate.clone(), up), F.silu(gate) * up, rtol=2e-6, atol=1e-6)


def test_where_they_are_not_used():
    x = torch.randn(2, 16)
    assert not decoder_ops.usable(x)  # a gradient may be wanted
    with torch.no_grad():
        assert decoder_ops.usable(x)
        assert not decoder_ops.usable(x.double())
        assert not decoder_ops.usable(torch.randn(2, 20))
        assert not decoder_ops.usable(torch.randn(16, 4).T)
        with torch.autocast("cpu", torch.bfloat16):
            assert not decoder_ops.usable(x)


def test_shares_cover_everything():
    torch.set_num_threads(2)
    assert even(10, 100) == [0, 10]
    assert even(1000, 100) == [0, 500, 1000]
    assert even(0, 100) == [0, 0]


def test_kernels_are_kept_under_a_name_that_changes_with_what_is_compiled_into_them(monkeypatch: pytest.MonkeyPatch):
    def nothing(first: int, last: int) -> None: ...

    jit._compiled_in.cache_clear()
    names: list[str] = []
    for source in (b"one", b"two"):
        monkeypatch.setattr(jit.Path, "read_bytes", lambda _, source=source: source)
        nothing.__qualname__ = "nothing"
        jit.kernel(nothing)
        names.append(nothing.__qualname__)
        jit._compiled_in.cache_clear()
    assert names[0] != names[1]


def test_where_no_code_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch):
    compile_, asked = jit.numba.njit, list[bool]()

    def njit(cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    def ones(first: Any, last: Any, x: Any) -> None:
        for i in range(first, last):
            x[i] = 1

    monkeypatch.setattr(jit.numba, "njit", njit)
    x = np.zeros(4, np.float32)
    run(jit.kernel(ones), [0, 4], x)
    assert asked == [True, False]
    assert x.tolist() == [1, 1, 1, 1]
