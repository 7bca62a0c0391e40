"""The decoder against transformers: logits, greedy tokens, gradients; and packing against one document at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pekoe.model import Decoder, PackedAttention, load_model
from pekoe.model.decoder import RMSNorm

MakeReference = Callable[..., PreTrainedModel]
MakeDecoder = Callable[..., Decoder]
SaveReference = Callable[..., Path]
DrawDocuments = Callable[..., list[Tensor]]
PackedLogits = Callable[[Decoder, Sequence[Tensor]], list[Tensor]]

LENGTHS = [5, 1, 41, 17, 64, 8, 5]


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 2_000.0, "rope_type": kind, **fields}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3_FIELDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-mha": ("qwen2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "qwen2-mqa": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1}),
    "qwen2-linear": ("qwen2", rope("linear", factor=4.0)),
    "qwen2-dynamic": ("qwen2", rope("dynamic", factor=2.0)),
    "qwen2-yarn": ("qwen2", YARN),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 8}),
    "qwen3-yarn": ("qwen3", rope("yarn", factor=2.0, original_max_position_embeddings=32, truncate=False)),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 8}),
    "llama-head-dim": ("llama", {"head_dim": 20, "tie_word_embeddings": True}),
    "llama-llama3": ("llama", rope("llama3", factor=8.0, **LLAMA3_FIELDS)),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def reference_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
    return [model(document[None]).logits[0] for document in documents]


@each_config
@torch.no_grad()
def test_packed_logits_are_those_of_transformers(
    name: str,
    make_reference: MakeReference,
    save_reference: SaveReference,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
) -> None:
    family, overrides = CONFIGS[name]
    reference = make_reference(family, **overrides)
    model = load_model(save_reference(reference))
    documents = draw_documents(LENGTHS)
    for got, expected in zip(packed_logits(model, documents), reference_logits(reference, documents), strict=True):
        assert expected.std() > 0.3  # or the tolerance would say nothing
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-yarn", "qwen3-tied-bias", "llama-llama3"])
@torch.no_grad()
def test_greedy_decoding_gives_the_same_tokens(
    name: str,
    make_reference: MakeReference,
    save_reference: SaveReference,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
) -> None:
    family, overrides = CONFIGS[name]
    reference = make_reference(family, **overrides)
    model = load_model(save_reference(reference))
    prompts = draw_documents([3, 20, 9])
    documents = prompts
    for _ in range(16):
        tokens = [logits[-1].argmax() for logits in packed_logits(model, documents)]
        documents = [torch.cat((d, t[None])) for d, t in zip(documents, tokens, strict=True)]
    for prompt, document in zip(prompts, documents, strict=True):
        whole = torch.ones_like(prompt[None])  # or it would take tokens equal to the padding id for padding
        generate: Any = reference.generate
        expected = generate(prompt[None], attention_mask=whole, max_new_tokens=16, do_sample=False)
        assert document.tolist() == expected[0].tolist()


def _norm_in_float64(self: Any, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-yarn", "qwen3-tied-bias", "llama-biases"])
def test_gradients_are_those_of_transformers_in_float64(
    name: str,
    make_reference: MakeReference,
    save_reference: SaveReference,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):  # theirs rounds to float32 whatever the model's dtype
        monkeypatch.setattr(norm, "forward", _norm_in_float64)
    family, overrides = CONFIGS[name]
    reference = make_reference(family, **overrides).double()
    model = load_model(save_reference(reference), dtype=torch.float64)
    documents = draw_documents(LENGTHS)
    weights = torch.randn(sum(LENGTHS), 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    (torch.cat(packed_logits(model, documents)) * weights).sum().backward()
    (torch.cat(reference_logits(reference, documents)) * weights).sum().backward()
    expected = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    for key, parameter in ours.items():
        got, want = parameter.grad, expected[key].grad
        assert got is not None
        assert want is not None
        # A key bias moves every score of a query alike, so its true gradient is near 0: hence the absolute term.
        assert (got - want).norm() <= 1e-9 * want.norm() + 1e-11, key


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from(["qwen2", "qwen3"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing_changes_nothing(
    make_decoder: MakeDecoder,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
    lengths: list[int],
    family: str,
) -> None:
    model = make_decoder(torch.float64, family=family, qk_norm=family == "qwen3", qkv_bias=family == "qwen2")
    documents = draw_documents(lengths)
    with torch.no_grad():
        together = packed_logits(model, documents)
        alone = [packed_logits(model, [document])[0] for document in documents]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_packing_changes_no_gradient(
    make_decoder: MakeDecoder, draw_documents: DrawDocuments, packed_logits: PackedLogits
) -> None:
    packed, single = make_decoder(torch.float64), make_decoder(torch.float64)
    documents = draw_documents(LENGTHS)
    torch.cat(packed_logits(packed, documents)).square().sum().backward()
    for document in documents:
        packed_logits(single, [document])[0].square().sum().backward()
    for (name, a), (_, b) in zip(packed.named_parameters(), single.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-9 * b.grad.norm() + 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(64, 1e-6).to(dtype), Qwen2RMSNorm(64, 1e-6).to(dtype)
    weight = torch.randn(64, generator=generator)
    x = (5 * torch.randn(100, 64, generator=generator)).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    assert torch.equal(ours(x), theirs(x))


@torch.no_grad()
def test_bfloat16_logits_are_as_close_as_those_of_transformers(
    make_reference: MakeReference,
    save_reference: SaveReference,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
) -> None:
    reference = make_reference("qwen3")
    path = save_reference(reference)
    documents = draw_documents(LENGTHS)
    exact = torch.cat(reference_logits(reference, documents))
    ours = torch.cat(packed_logits(load_model(path, dtype=torch.bfloat16), documents)).float()
    theirs = torch.cat(reference_logits(reference.bfloat16(), documents)).float()
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_autocast_gives_attention_one_dtype(
    family: str, make_decoder: MakeDecoder, draw_documents: DrawDocuments, packed_logits: PackedLogits
) -> None:
    model = make_decoder(family=family, qk_norm=family == "qwen3")
    documents = draw_documents([9, 4])
    exact = torch.cat(packed_logits(model, documents))
    seen: set[torch.dtype] = set()

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        return PackedAttention([0, 9, 13])(layer, q, k, v)

    with torch.autocast("cpu", torch.bfloat16):
        positions = torch.cat((torch.arange(9), torch.arange(4)))
        logits = model.logits(model(torch.cat(documents), positions, attention))
    assert seen == {torch.bfloat16}
    assert (logits.float() - exact).abs().mean() <= 0.05 * exact.std()


def test_attention_is_called_once_a_layer_in_order(make_decoder: MakeDecoder) -> None:
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((layer, tuple(q.shape), tuple(k.shape)))
        return torch.zeros_like(q)

    model = make_decoder(num_layers=3)
    model(torch.zeros(5, dtype=torch.long), torch.arange(5), attention)
    assert calls == [(i, (5, 4, 8), (5, 2, 8)) for i in range(3)]


def test_parameters_are_as_many_as_the_spec_says(make_decoder: MakeDecoder) -> None:
    biases = {"out_bias": True, "mlp_bias": True, "family": "llama"}
    for overrides in ({}, {"tied_embeddings": False}, biases, {"family": "qwen3", "qk_norm": True, "qkv_bias": False}):
        model = make_decoder(**overrides)
        assert sum(p.numel() for p in model.parameters()) == model.spec.num_parameters


def test_init_is_reproducible_and_scaled(make_decoder: MakeDecoder) -> None:
    models = [make_decoder(seed=seed, hidden_size=128, tied_embeddings=False) for seed in (1, 2, 3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        model.init_weights(seed)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert first["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert first["model.layers.0.self_attn.o_proj.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert (first["model.layers.0.input_layernorm.weight"] == 1).all()
    assert (first["model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_tied_head_is_the_embeddings(make_decoder: MakeDecoder) -> None:
    assert "lm_head.weight" not in make_decoder().state_dict()
    model = make_decoder(tied_embeddings=False)
    assert isinstance(model.lm_head, nn.Linear)
    assert model.head_weight is model.lm_head.weight
    tied = make_decoder()
    assert tied.head_weight is tied.model.embed_tokens.weight
