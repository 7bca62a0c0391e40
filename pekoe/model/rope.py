"""Rotary position embedding: the frequencies of each kind of context extension, and the rotation.

Everything is computed in float32, whatever the model's dtype, and in the order of `transformers`: at position 32,768
one last bit of a frequency is 0.002 radian.

Shapes: [T] packed tokens, [H] heads, [D] head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pekoe.core.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Return the angle per position of each rotated pair [D / 2] (float32, CPU), and the factor on cos and sin.

    `max_positions` replaces a `rope.original_max_positions` of None.

    default: Su et al. 2021, "RoFormer", section 3.4.2. linear: Chen et al. 2023, "Position Interpolation".
    dynamic (NTK-aware): equal to default within the original length, the longest that the decoder takes.
    llama3: Meta's Llama 3.1 reference code. yarn: Peng et al. 2023, "YaRN", sections 3.2 to 3.4.
    """
    # The device is named because models are built under torch.device("meta").
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    base = 1.0 / (rope.theta**exponents)
    original = rope.original_max_positions or max_positions
    match rope.kind:
        case "default" | "dynamic":
            return base, 1.0
        case "linear":
            return base / rope.factor, 1.0
        case "llama3":
            return _llama3(base, rope, original), 1.0
        case "yarn":
            return _yarn(rope, exponents, original), _yarn_attention_factor(rope)


def cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every token's angles, each [T, 1, D], for positions [T] and frequencies [D / 2]."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((sin, sin), -1)[:, None].to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D]: component i pairs with component i + D / 2 (the Hugging Face layout)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _llama3(base: Tensor, rope: RopeSpec, original: int) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended by how often they turn in training."""
    turns = original / (2 * math.pi / base)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * base / rope.factor + keep * base


def _yarn(rope: RopeSpec, exponents: Tensor, original: int) -> Tensor:
    """As `_llama3`, but the blend is linear in the dimension between `beta_fast` and `beta_slow` turns."""
    head_dim = 2 * len(exponents)

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the reference; the ramp becomes a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    periods = rope.theta**exponents
    return 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_attention_factor(rope: RopeSpec) -> float:
    """The factor on cos and sin: YaRN's 0.1 ln(s) + 1, or a quotient of two such where DeepSeek's mscale is set."""

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
