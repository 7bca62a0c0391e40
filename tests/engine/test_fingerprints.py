"""Fingerprints of parameters: what differs is named, and looking at a tensor changes nothing about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pekoe.engine.fingerprints import Kind, differing, prints_for, prints_of
from pekoe.model import Decoder

SIZES = {"vocab_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("kind", ["embedded", "sglang", "vllm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_parameter_is_named(make_model: Callable[..., Decoder], kind: Kind, dtype: torch.dtype):
    model = make_model(**SIZES)

    def found():
        prints = prints_for(kind, model.spec, dtype, "cpu")
        assert prints is not None
        return prints_of(model, prints)

    before = found()
    assert not differing(before, found())
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 2] += 1
    assert differing(before, found()) == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("kind", ["embedded", "sglang", "vllm"])
def test_memory_that_was_looked_at_can_be_given_back(make_model: Callable[..., Decoder], kind: Kind):
    """As FSDP does between two forwards."""
    prints = prints_for(kind, make_model(**SIZES).spec, torch.float32, "cpu")
    assert prints is not None
    tensor = torch.zeros(64)
    prints.see("model.norm.weight", tensor)
    tensor.untyped_storage().resize_(0)


def test_sglang_cannot_be_foretold_where_it_pads_or_on_a_gpu(make_model: Callable[..., Decoder]):
    spec = make_model(**SIZES).spec
    assert prints_for("sglang", spec, torch.float32, "cuda") is None
    assert prints_for("sglang", make_model(**SIZES | {"vocab_size": 63}).spec, torch.float32, "cpu") is None
