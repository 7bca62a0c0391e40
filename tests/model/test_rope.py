"""Frequencies against transformers', bit by bit; the rotation against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pekoe.core.spec import RopeSpec
from pekoe.model import Decoder, PackedAttention
from pekoe.model.hf_config import hf_config_to_spec
from pekoe.model.rope import apply_rope, cos_sin, inverse_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    {**LLAMA3, "original_max_position_embeddings": 300, "high_freq_factor": 2.5},
    YARN,
    {**YARN, "truncate": False},
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 4096},
    {**YARN, "attention_factor": 1.25, "beta_fast": 20, "beta_slow": 2},
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 8},  # the ramp has no width
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items())[:60])
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (1_000_000.0, 128), (500_000.0, 8)])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    spec = hf_config_to_spec(config.to_dict(), "test")
    got, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.max_positions)
    if scaling["rope_type"] == "dynamic":  # theirs raises the base by exactly 1, with a last bit of rounding
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    else:
        assert torch.equal(got, expected)
    assert factor == expected_factor


def test_rotation_is_a_turn_of_each_pair_by_position_times_frequency() -> None:
    inv_freq, scaling = inverse_frequencies(RopeSpec(theta=100.0), 6, 64)
    assert inv_freq.tolist() == pytest.approx([100 ** (-2 * i / 6) for i in range(3)], rel=1e-6)
    x = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 40, 7])
    got = apply_rope(x, *cos_sin(positions, inv_freq, scaling, torch.float32))
    pairs = torch.complex(x[..., :3], x[..., 3:])
    turned = pairs * torch.exp(1j * positions[:, None, None] * inv_freq)
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-5)


def test_frequencies_stay_in_float32_when_the_model_is_rounded(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder(rope=RopeSpec(theta=777.0))
    exact = model._inv_freq.clone()
    model.to(torch.bfloat16)
    assert model._inv_freq.dtype == torch.float32
    assert torch.equal(model._inv_freq, exact)


def test_positions_beyond_the_context_are_refused(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder(max_positions=8)
    model(torch.zeros(8, dtype=torch.long), torch.arange(8), PackedAttention([0, 8]))
    with pytest.raises(ValueError, match="position: expected < 8, got 8"):
        model(torch.zeros(9, dtype=torch.long), torch.arange(9), PackedAttention([0, 9]))
