"""LoRA: equal to full training where its rank is, PEFT's directories both ways, and the user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pekoe.core.errors import UserError
from pekoe.model import Decoder, LoRA, load_model, save_adapter, save_model
from pekoe.model.hf import base_of
from pekoe.model.lora import LoRALinear, adapted_layers, adapters_off, add_lora, fold, merged
from pekoe.model.peft import read_weights

MakeDecoder = Callable[..., Decoder]
DrawDocuments = Callable[..., list[Tensor]]
PackedLogits = Callable[[Decoder, Sequence[Tensor]], list[Tensor]]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model: Decoder, lora: LoRA, seed: int = 0) -> Decoder:
    """The model with an adapter that does something."""
    model.lora = add_lora(model, lora, seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture
def base(tmp_path: Path, make_decoder: MakeDecoder) -> Path:
    save_model(make_decoder(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base: Path) -> Decoder:
    """A loaded base with an adapter."""
    return adapted(load_model(base), LoRA(4, 8.0, (), *base_of(base)))


# The layer


def test_full_rank_lora_is_full_training_of_its_layer():
    """One step of SGD. With B = 0 only B learns: dB = s G A^T, so that s B A = -lr s^2 G A^T A for the full gradient G
    [out, in], and A^T A is the identity where A is orthogonal: full training's update at a rate of lr s^2. And the
    product's own gradient for any A and B: dA = s B^T G, dB = s G A^T."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, target, weight = draw(20, 6), draw(20, 8), draw(8, 6)

    def loss_of(layer: nn.Module) -> Tensor:
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss

    full = nn.Linear(6, 8, bias=False, dtype=torch.float64)
    full.weight.data.copy_(weight)
    loss = loss_of(full)
    assert full.weight.grad is not None
    gradient = full.weight.grad

    holder = nn.ModuleDict({"layer": nn.Linear(6, 8, bias=False, dtype=torch.float64)})
    layer = holder["layer"]
    layer.weight.data.copy_(weight)  # pyright: ignore
    add_lora(holder, LoRA(6, 12.0, ()), seed=0)
    low = holder["layer"]
    assert isinstance(low, LoRALinear)
    low.lora_A.weight.data.copy_(torch.linalg.qr(draw(6, 6))[0])
    assert loss_of(low) == loss
    torch.optim.SGD([p for p in low.parameters() if p.requires_grad], lr=0.1).step()
    update = merged(dict(holder.state_dict()), low.scale)["layer.weight"] - weight
    torch.testing.assert_close(update, -0.1 * 2.0**2 * gradient, rtol=1e-12, atol=1e-14)

    low.lora_B.weight.data.copy_(draw(8, 6))
    moved = nn.Linear(6, 8, bias=False, dtype=torch.float64)
    moved.weight.data.copy_(merged(dict(holder.state_dict()), low.scale)["layer.weight"])
    low.zero_grad()
    torch.testing.assert_close(loss_of(low), loss_of(moved))
    whole, a, b = moved.weight.grad, low.lora_A.weight, low.lora_B.weight
    assert whole is not None
    assert low.base_layer.weight.grad is None
    torch.testing.assert_close(a.grad, 2.0 * b.T @ whole)
    torch.testing.assert_close(b.grad, 2.0 * whole @ a.T)


def test_a_new_adapter_is_its_base_and_seeded(
    make_decoder: MakeDecoder, draw_documents: DrawDocuments, packed_logits: PackedLogits
):
    docs, plain = draw_documents([5, 9]), make_decoder()
    before = packed_logits(plain, docs)
    lora = add_lora(plain, LoRA(4, 8.0, ()), seed=3)
    assert lora.targets == ALL
    assert all(torch.equal(a, b) for a, b in zip(packed_logits(plain, docs), before, strict=True))
    names = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * len(ALL)
    assert all(".lora_" in name for name in names)
    again, other = make_decoder(), make_decoder()
    add_lora(again, LoRA(4, 8.0, ()), seed=3)
    add_lora(other, LoRA(4, 8.0, ()), seed=4)
    a, b, c = (next(iter(adapted_layers(m).values())).lora_A.weight for m in (plain, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert float(a.detach().abs().max()) <= 32**-0.5


def test_merged_and_switched_off(
    model: Decoder, base: Path, draw_documents: DrawDocuments, packed_logits: PackedLogits
):
    docs = draw_documents([5, 9])
    acting, plain = packed_logits(model, docs), packed_logits(load_model(base), docs)
    assert float((acting[0] - plain[0]).detach().abs().max()) > 0.01
    with adapters_off(model):
        assert all(torch.equal(a, b) for a, b in zip(packed_logits(model, docs), plain, strict=True))
    folded = load_model(base)
    assert model.lora is not None
    folded.load_state_dict(merged(model.state_dict(), model.lora.scale))
    fold(model)
    for found in (folded, model):
        assert all(isinstance(m, LoRALinear) is False for m in found.modules())
        for a, b in zip(packed_logits(found, docs), acting, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_plain_reference(
    dtype: torch.dtype, model: Decoder, base: Path, draw_documents: DrawDocuments
):
    """Of factors: from the full gradient of the merged weights, of the same forward without adapters."""
    from pekoe.model import PackedAttention

    low = adapted(load_model(base, dtype), LoRA(4, 8.0, ()))
    tokens = torch.cat(draw_documents([7, 12]))
    positions, bounds = torch.cat([torch.arange(7), torch.arange(12)]), [0, 7, 19]

    def backward(decoder: Decoder) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = decoder.logits(decoder(tokens, positions, PackedAttention(bounds)))
            loss = nn.functional.cross_entropy(logits.float(), tokens)
        loss.backward()
        return loss.item()

    whole = load_model(base)
    whole.load_state_dict(merged({k: v.float() for k, v in low.state_dict().items()}, 2.0))
    error = 1e-4 if dtype is torch.float32 else 1e-1
    assert backward(low) == pytest.approx(backward(whole), rel=error)
    gradients = dict(whole.named_parameters())
    for name, layer in adapted_layers(low).items():
        full = gradients[f"{name}.weight"].grad
        assert full is not None
        for factor, expected in (
            (layer.lora_A.weight, 2.0 * layer.lora_B.weight.T @ full),
            (layer.lora_B.weight, 2.0 * full @ layer.lora_A.weight.T),
        ):
            assert factor.dtype is torch.float32
            assert factor.grad is not None
            assert float((factor.grad - expected).detach().norm() / expected.detach().norm()) < error, name


# Directories


def test_an_adapter_goes_round(
    model: Decoder, tmp_path: Path, draw_documents: DrawDocuments, packed_logits: PackedLogits
):
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # replaces it
    again, docs = load_model(tmp_path / "adapter"), draw_documents([5, 9])
    for a, b in zip(packed_logits(again, docs), packed_logits(model, docs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, list(ALL))


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_we_write_and_we_what_peft_writes(
    model: Decoder, base: Path, tmp_path: Path, draw_documents: DrawDocuments, packed_logits: PackedLogits
):
    peft: Any = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    save_adapter(model, tmp_path / "ours")
    docs = draw_documents([5, 9])

    def close(theirs: Any, ours: Decoder) -> None:
        for doc, logits in zip(docs, packed_logits(ours, docs), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(theirs(doc[None]).logits[0], logits, rtol=0, atol=1e-5)

    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "ours")
    close(loaded, model)
    loaded.save_pretrained(tmp_path / "theirs")
    close(loaded.merge_and_unload(), load_model(tmp_path / "theirs"))
    fresh = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    fresh.save_pretrained(tmp_path / "fresh")
    close(fresh, load_model(tmp_path / "fresh"))


# Mistakes


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (4, ("q_prj",), "got 'q_prj'. Did you mean 'q_proj'?"),
        (4, ("lm_head",), r"\(not the head\).*got 'lm_head'"),
        (4, ("layers.9.self_attn.q_proj",), "Did you mean 'model.layers."),
        (17, (), "expected at most the smaller dimension of each layer, 16 of .*k_proj, got 17; nearest: 16"),
    ],
)
def test_targets_and_ranks_that_cannot_be(make_decoder: MakeDecoder, rank: int, targets: tuple[str, ...], message: str):
    plain = make_decoder(tied_embeddings=False)
    with pytest.raises(UserError, match=message):
        add_lora(plain, LoRA(rank, 8.0, targets), seed=0)
    assert all(p.requires_grad for p in plain.parameters())


def test_targets_are_ends_of_names(make_decoder: MakeDecoder):
    plain = make_decoder()
    add_lora(plain, LoRA(4, 8.0, ("self_attn.q_proj", "layers.1.mlp.up_proj")), seed=0)
    expected = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert sorted(adapted_layers(plain)) == sorted(expected)


def test_a_base_that_changed_is_refused(model: Decoder, base: Path, tmp_path: Path):
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="expected the base that the adapter was trained on"):
        load_model(tmp_path / "adapter")
    with pytest.raises(UserError, match="got an adapter; make one of it first: pekoe merge"):
        base_of(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora: expected False, as of plain LoRA, got True"),
        ("r", 0, "r: expected at least 1"),
        ("r", "x", "expected PEFT's settings of an adapter"),
        ("r", 3, "do not fit its base, .*, and rank 3"),
        ("base_model_name_or_path", "itself", "where there is an adapter"),
        ("base_model_name_or_path", "nowhere", "expected the directory of the adapter's base, got 'nowhere'"),
    ],
)
def test_other_adapters_are_refused(model: Decoder, tmp_path: Path, key: str, value: Any, message: str):
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    value = str(file.parent) if value == "itself" else value
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "adapter")


def test_tensors_that_are_not_there_or_too_many(model: Decoder, tmp_path: Path):
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights, _ = read_weights(tmp_path / "adapter")
    name = next(iter(weights))
    rest = {f"base_model.model.{other}": tensor for other, tensor in weights.items() if other != name}
    for tensors in (rest, {"base_model.model.other.lora_A.weight": weights[name]}):
        save_file(tensors, file)
        with pytest.raises(UserError, match="its tensors do not fit its base"):
            load_model(tmp_path / "adapter")
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_model(tmp_path / "adapter")
