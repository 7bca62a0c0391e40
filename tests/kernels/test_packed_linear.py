"""Copies of weights for inference: the same numbers, and only where they are worth it."""

from collections.abc import Callable

import pytest
import torch

from pekoe.kernels.packed_linear import CastLinear, PackedLinear, available, cast_once, intact, pack, refresh
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


def test_weights_cast_once_give_the_bits_of_autocast(make_model: Callable[..., Decoder]):
    for tied in (True, False):
        model = make_model(hidden_size=64, head_dim=16, tied_embeddings=tied).requires_grad_(False)
        twin = cast_once(model, torch.bfloat16)
        tokens, positions = torch.arange(20) % 32, torch.arange(20)

        def logits(decoder: Decoder, tokens: torch.Tensor = tokens, positions: torch.Tensor = positions):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return decoder.logits(decoder(tokens, positions, PackedAttention([0, 20])))

        assert torch.equal(logits(twin), logits(model))
        assert intact(twin)
        places = [module.low.data_ptr() for module in twin.modules() if isinstance(module, CastLinear)]
        assert len(places) == 2 * 7 + 1
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert not intact(twin)
        refresh(twin)
        assert intact(twin)
        assert torch.equal(logits(twin), logits(model))
        assert places == [module.low.data_ptr() for module in twin.modules() if isinstance(module, CastLinear)]
