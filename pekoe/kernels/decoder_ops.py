"""The decoder's small operations as one pass over memory each, where no gradient is asked for on a CPU in float32.

Same formulas as the torch code beside each call; results differ in the last bits. `usable` says where they apply.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportCallIssue=false
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pekoe.kernels.jit import even, kernel, run
from pekoe.kernels.simd import LANES, add, div, exp, fma, load, mul, smaller, splat, store, sum_of

_SHARE = 65_536  # floats worth a thread of their own


def usable(x: Tensor) -> bool:
    """Whether the kernels here may take x [..., C]: no gradient, CPU, float32, contiguous, C a multiple of 8."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and x.is_contiguous()
        and x.shape[-1] % (2 * LANES) == 0
        and not torch.is_autocast_enabled("cpu")
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] / rms(x) * weight [C]."""
    out, size = torch.empty_like(x), x.shape[-1]
    own = _flat(weight.detach().clone())  # numpy pins what it looks at, and FSDP frees whole weights after their use
    run(_rms_norm, _shares(x), _flat(x), own, np.float32(eps), _flat(out), size)
    return out


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q [T, H, D] and k [T, K, D] in place by cos and sin [T, 1, D]; see `model.rope.apply_rope`."""
    num, heads, dim = q.shape
    bounds = even(num, _SHARE // (heads * dim) + 1)
    run(_rope, bounds, _flat(q), _flat(k), _flat(cos), _flat(sin), heads, k.shape[1], dim)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, into `gate`'s memory."""
    run(_silu_mul, _shares(gate), _flat(gate), _flat(up), gate.shape[-1])
    return gate


def _flat(x: Tensor) -> np.ndarray:
    return x.numpy().reshape(-1)


def _shares(x: Tensor) -> list[int]:
    return even(x.numel() // x.shape[-1], _SHARE // x.shape[-1] + 1)


@kernel
def _rms_norm(first, last, x, weight, eps, out, size):
    for row in range(first, last):
        at, total = row * size, splat(np.float32(0))
        for i in range(at, at + size, 8):
            v = load(x, i)
            total = fma(v, v, total)
        scale = splat(np.float32(1) / np.sqrt(sum_of(total) / np.float32(size) + eps))
        for i in range(0, size, 8):
            store(out, at + i, mul(mul(load(x, at + i), scale), load(weight, i)))


@kernel
def _turn(x, at, cos, sin, angle, half):
    for d in range(0, half, 8):
        a, b = load(x, at + d), load(x, at + half + d)
        low = fma(mul(b, splat(np.float32(-1))), load(sin, angle + d), mul(a, load(cos, angle + d)))
        high = fma(a, load(sin, angle + half + d), mul(b, load(cos, angle + half + d)))
        store(x, at + d, low)
        store(x, at + half + d, high)


@kernel
def _rope(first, last, q, k, cos, sin, heads, num_kv, dim):
    for t in range(first, last):
        for head in range(heads):
            _turn(q, (t * heads + head) * dim, cos, sin, t * dim, dim // 2)
        for head in range(num_kv):
            _turn(k, (t * num_kv + head) * dim, cos, sin, t * dim, dim // 2)


@kernel
def _silu_mul(first, last, gate, up, size):
    one, minus, top = splat(np.float32(1)), splat(np.float32(-1)), splat(np.float32(87))
    for i in range(first * size, last * size, 8):
        x = load(gate, i)
        # exp(-x) for x < -87 would overflow; there silu(x) is 0 to float32's precision either way.
        y = exp(smaller(mul(x, minus), top))
        store(gate, i, mul(div(x, add(one, y)), load(up, i)))
