"""A model's dimensions against a real model's parameters."""

from collections.abc import Callable
from typing import Any

import pytest

from pekoe.core.spec import ModelSpec
from pekoe.model import Decoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False},
        {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
        {"family": "llama", "out_bias": True, "mlp_bias": True},
    ],
)
def test_parameters_are_counted_right(make_model: Callable[..., Decoder], changes: dict[str, Any]):
    model = make_model(**changes)
    assert model.spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_impossible_shapes_are_refused():
    shape: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 2,
        "intermediate_size": 8,
        "max_positions": 8,
    }
    with pytest.raises(ValueError, match=r"multiple of num_kv_heads \(3\), got 4"):
        ModelSpec(**shape | {"num_kv_heads": 3})
    with pytest.raises(ValueError, match="even"):
        ModelSpec(**shape | {"head_dim": 3})
