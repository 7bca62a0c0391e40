"""Checksums of parameters: those that differ are named, and reading a tensor changes nothing about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pekoe.engine.base import Checksums, EngineKind
from pekoe.model import Decoder
from pekoe.weights.checksums import checksum_builder_for, checksums_of, differing

SIZES = {"vocab_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("kind", ["embedded", "sglang", "vllm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_parameter_is_named(make_model: Callable[..., Decoder], kind: EngineKind, dtype: torch.dtype):
    model = make_model(**SIZES)

    def sums() -> Checksums:
        builder = checksum_builder_for(kind, model.spec, dtype, "cpu")
        assert builder is not None
        return checksums_of(model, builder)

    before = sums()
    assert not differing(before, sums())
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 2] += 1
    assert differing(before, sums()) == ["model.layers.1.mlp.down_proj.weight"]


def test_a_missing_parameter_differs():
    assert differing({"a": 1, "b": 2}, {"a": 1}) == ["b"]


@pytest.mark.parametrize("kind", ["embedded", "sglang", "vllm"])
def test_memory_that_was_read_can_be_given_back(make_model: Callable[..., Decoder], kind: EngineKind):
    """As FSDP does between two forwards."""
    builder = checksum_builder_for(kind, make_model(**SIZES).spec, torch.float32, "cpu")
    assert builder is not None
    tensor = torch.zeros(64)
    builder.add("model.norm.weight", tensor)
    tensor.untyped_storage().resize_(0)


def test_sglangs_are_unknown_where_it_pads_or_on_a_gpu(make_model: Callable[..., Decoder]):
    spec = make_model(**SIZES).spec
    assert checksum_builder_for("sglang", spec, torch.float32, "cuda") is None
    assert checksum_builder_for("sglang", make_model(**SIZES | {"vocab_size": 63}).spec, torch.float32, "cpu") is None
