"""Weights laid out for oneDNN: the same numbers, and only those that are worth it."""

from collections.abc import Callable

import pytest
import torch

from pekoe.kernels.packed_linear import PackedLinear, available, intact, pack
from pekoe.model import Decoder, PackedAttention

pytestmark = pytest.mark.skipif(not available(), reason="needs oneDNN on x86-64")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Decoder]) -> Decoder:
    return make_model(vocab_size=640, hidden_size=256, intermediate_size=640, tied_embeddings=request.param)


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 7, 33, 300])
def test_logits_are_the_models(model: Decoder, rows: int):
    twin = pack(model)
    assert sum(isinstance(module, PackedLinear) for module in twin.modules()) > 3
    tokens, positions = torch.randint(0, 640, (rows,)), torch.arange(rows) % 64
    if not rows:  # a forward none of whose rows wants logits
        hidden = torch.empty(0, 256)
        assert twin.logits(hidden).shape == model.logits(hidden).shape == (0, 640)
        return
    cuts = [*range(0, rows, 64), rows]
    ours, theirs = (m.logits(m(tokens, positions, PackedAttention(cuts))) for m in (twin, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_twin_has_the_models_parameters(model: Decoder):
    twin = pack(model)
    theirs = {id(p) for p in model.parameters()}
    assert {id(p) for p in twin.parameters()} == theirs
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@torch.no_grad()
def test_a_changed_parameter_is_seen(model: Decoder):
    twin = pack(model)
    assert intact(twin)
    model.model.layers[-1].mlp.down_proj.weight[3, 5] += 1e-3  # type: ignore[index, operator, union-attr]
    assert not intact(twin)
    assert intact(pack(model))
