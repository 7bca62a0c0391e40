"""PackedAttention against the definition of attention, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pekoe.model import PackedAttention
from pekoe.model.attention import kernel_of

LENGTHS = [1, 7, 8, 9, 30, 8, 2, 16]


def draw_qkv(
    num_tokens: int, heads: int, kv_heads: int, dim: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def defined(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(D) where key and query share a document and key <= query) v, over the whole row at once."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(document))
    visible = (document[:, None] == document[None, :]) & (place[:, None] >= place[None, :])  # [T, T]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [T, H, D]
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_values_and_gradients_are_the_definition(heads: int, kv_heads: int) -> None:
    inputs = draw_qkv(sum(LENGTHS), heads, kv_heads)
    weights = torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    got, expected = PackedAttention(bounds_of(LENGTHS))(0, *inputs), defined(LENGTHS, *inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_any_lengths(lengths: list[int]) -> None:
    inputs = [x.detach() for x in draw_qkv(sum(lengths), 4, 2)]
    got = PackedAttention(bounds_of(lengths))(0, *inputs)
    torch.testing.assert_close(got, defined(lengths, *inputs), rtol=0, atol=1e-12)


def test_neighbours_do_not_change_a_bit_on_cpu() -> None:
    q, k, v = (x.detach() for x in draw_qkv(sum(LENGTHS), 4, 2, dtype=torch.float32))
    packed = PackedAttention(bounds_of(LENGTHS))(0, q, k, v)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        assert torch.equal(packed[rows], PackedAttention([0, length])(0, q[rows], k[rows], v[rows]))
        start += length


def test_later_tokens_are_not_seen() -> None:
    q, k, v = (x.detach() for x in draw_qkv(12, 4, 2))
    attention = PackedAttention([0, 12])
    before = attention(0, q, k, v)
    k[7], v[7] = 100.0, -100.0
    after = attention(0, q, k, v)
    assert torch.equal(before[:7], after[:7])
    assert not torch.isclose(before[7:], after[7:]).all(-1).any()


@pytest.mark.parametrize("bounds", [[], [0], [1, 3], [0, 2, 2], [0, 3, 2]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        PackedAttention(bounds)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 9 tokens"):
        PackedAttention([0, 4, 9])(0, *draw_qkv(8, 2, 2))


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        ("cuda", torch.bfloat16, "flash"),
        ("cuda", torch.float16, "flash"),
        ("cuda", torch.float32, "sdpa_without_gqa"),
        ("cuda", torch.float64, "sdpa"),
        ("cpu", torch.float32, "sdpa"),
        ("cpu", torch.bfloat16, "sdpa"),
    ],
)
def test_the_kernel_of_a_device_and_dtype(device: str, dtype: torch.dtype, kernel: str) -> None:
    assert kernel_of(device, dtype) == kernel


def test_repeated_heads_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pekoe.model.attention.kernel_of", lambda *_: "sdpa_without_gqa")
    q, k, v = (x.detach() for x in draw_qkv(sum(LENGTHS), 6, 2))
    got = PackedAttention(bounds_of(LENGTHS))(0, q, k, v)
    torch.testing.assert_close(got, defined(LENGTHS, q, k, v), rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_float32_takes_the_memory_efficient_kernel() -> None:
    length, heads = 8192, 8
    q, k, v = (x.detach().cuda().requires_grad_() for x in draw_qkv(length, heads, 2, 64, torch.float32))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PackedAttention([0, length])(0, q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length**2  # a quarter of the scores


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (14, 2, 64), (8, 8, 128)])
def test_flash_equals_sdpa_per_document(heads: int, kv_heads: int, dim: int) -> None:
    lengths = [1, 7, 300, 64, 1025, 2]
    inputs = [x.detach().cuda() for x in draw_qkv(sum(lengths), heads, kv_heads, dim, torch.float32)]
    half = [x.bfloat16().requires_grad_() for x in inputs]
    wide = [x.detach().float().requires_grad_() for x in half]
    attention = PackedAttention(bounds_of(lengths))
    flash, sdpa = attention(0, *half), attention(0, *wide)
    assert flash.dtype == torch.bfloat16
    torch.testing.assert_close(flash.float(), sdpa, rtol=0.02, atol=0.02)

    weights = torch.randn(sdpa.shape, generator=torch.Generator().manual_seed(1)).cuda()
    got = torch.autograd.grad((flash.float() * weights).sum(), half)
    expected = torch.autograd.grad((sdpa * weights).sum(), wide)
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).norm() <= 0.02 * b.norm()
