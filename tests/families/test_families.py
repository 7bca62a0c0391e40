"""Families of transformers on packed rows: logits, gradients and files are those of transformers' own module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import UserError
from pekoe.model import LanguageModel, LoRA, PackedAttention, Scores, check_model, load_model, save_model
from pekoe.model import families as seam
from pekoe.model.attention import attend
from pekoe.model.families import FamilyModel
from pekoe.model.lora import add_lora
from pekoe.train import Trainer
from pekoe.train.trainer import expert_balance
from tests.families.configs import FAMILIES, RECURRENT, VOCAB, config_of, make, save
from tests.train.test_trainer import make_samples

USUAL = """llama qwen2 qwen3_moe mistral mixtral gemma2 gemma3_text glm4_moe deepseek_v3 phi3 olmo2 gpt_oss granite
cohere2 starcoder2 smollm3 ernie4_5 exaone4 gpt_neox gpt2 diffllama"""
LENGTHS = (13, 5, 21)  # the first and the last are longer than the windows


def is_slow(family: str) -> Any:
    return family if family in USUAL.split() else pytest.param(family, marks=pytest.mark.slow)


def documents(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


def packed(model: LanguageModel, docs: list[Tensor]) -> Tensor:
    """Logits [T, V] of one packed row."""
    positions = torch.cat([torch.arange(len(d)) for d in docs])
    bounds = torch.tensor([0, *map(len, docs)]).cumsum(0)
    return model.logits(model(torch.cat(docs), positions, PackedAttention(bounds)))


def rewrite(place: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = place / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def reconfigure(place: Path, **changes: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", [is_slow(family) for family in FAMILIES])
def test_a_packed_row_is_its_documents_one_by_one(family: str, tmp_path: Path):
    """Against transformers' own model, attention and backward; then out to files, and into transformers."""
    own = make(family)
    own.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", implementation="transformers")
    check_model(model)
    docs = documents()
    weights = torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(1))
    logits = packed(model, docs)
    expected = torch.cat([own(doc[None], use_cache=False).logits[0] for doc in docs])
    assert (logits - expected).abs().max() <= 3e-5 * expected.abs().max()
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name

    save_model(model, tmp_path / "ours")
    theirs, written = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], written[name]) for name in theirs)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    again, found = loaded
    assert not any(found.values())
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), again.parameters(), strict=True))


def test_the_table_has_what_makes_families_differ(tmp_path: Path):
    specs = {f: load_model(save(f, tmp_path / f)).spec for f in ("gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe")}
    gemma, gpt, deepseek, qwen = specs.values()
    assert [shape.window for shape in gemma.attention_layers] == [6, None]
    assert [shape.window for shape in gpt.attention_layers] == [6, None]
    assert not gpt.attention_layers[1].plain  # sinks
    assert (qwen.num_experts, qwen.experts_per_token) == (4, 2)
    assert qwen.active < qwen.num_parameters == sum(p.numel() for p in make("qwen3_moe").parameters())
    assert deepseek.kv_values_per_token == 2 * 4 * (12 + 12)
    assert gemma.tied_embeddings
    assert not qwen.tied_embeddings


def test_both_implementations_give_the_same(tmp_path: Path):
    place = save("qwen3", tmp_path / "qwen3")
    ours, theirs = load_model(place), load_model(place, implementation="transformers")
    assert not isinstance(ours, FamilyModel)
    assert (packed(ours, documents()) - packed(theirs, documents())).abs().max() <= 2e-5
    assert ours.spec.num_parameters == theirs.spec.num_parameters
    assert ours.spec.kv_values_per_token == theirs.spec.kv_values_per_token


# Attention


@pytest.mark.parametrize("scores", [Scores(window=7), Scores(softcap=1.5), Scores(0.1, 5, 2.0, torch.randn(4))])
def test_scores_in_pieces_are_scores_at_once(scores: Scores, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, d, generator=generator, requires_grad=True) for h, d in ((4, 8), (2, 8), (2, 6)))
    whole = attend(q, k, v, scores)
    expected = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr("pekoe.model.attention._ROWS", 16)
    pieces = attend(q, k, v, scores)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces.square().sum(), (q, k, v)), expected)


def test_what_attention_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = seam._attention
    monkeypatch.setattr(seam, "_attention", lambda *args, **others: plain(*args, **others, position_bias=0.5))
    with pytest.raises(UserError, match="llama: LlamaAttention asks attention for position_bias"):
        load_model(save("llama", tmp_path / "llama"), implementation="transformers")


def test_a_family_that_mixes_documents_is_refused_with_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(save("mistral", tmp_path / "mistral"))
    check_model(model)
    init = PackedAttention.__init__
    monkeypatch.setattr(PackedAttention, "__init__", lambda self, bounds: init(self, [0, int(bounds[-1])]))
    with pytest.raises(
        UserError, match=r"mistral: expected the log-probs of three packed documents .* difference of \d"
    ):
        check_model(model)


# Refusals


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_layers_are_refused(family: str, tmp_path: Path):
    config_of(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"from one\s+packed document into the next"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen9", "auto_map": {"AutoModelForCausalLM": "modeling.M"}}, "its own code .* is never run"),
        ({"model_type": "qwen3_mo"}, "is not a family of this transformers.* Did you mean 'qwen3_moe'"),
        ({"model_type": "vit"}, "expected a causal language model, got vit"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures: expected Qwen3MoeForCausalLM"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 1 to 1000"),
        ({"hidden_size": "wide"}, "not a config of qwen3_moe"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "expected unquantized weights"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention' is not supported"),
    ],
)
def test_a_config_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    reconfigure(place, **changes)
    with pytest.raises(UserError, match=f"(?i){message}"):
        load_model(place)


@pytest.mark.parametrize("family", ["bloom", "cpmant"])
def test_a_family_without_the_seam_is_refused(family: str, tmp_path: Path):
    small = {"n_layer": 2, "n_head": 4} if family == "bloom" else {"dim_head": 8, "num_hidden_layers": 2}
    transformers.AutoConfig.for_model(family, vocab_size=VOCAB, hidden_size=32, **small).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"{family}: its (layers could not be followed|attention does not go)"):
        load_model(tmp_path)


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: expected [32], got nothing"),
        (lambda t: t.pop(EXPERT), f"{EXPERT}: expected [24, 32], got nothing"),
        (lambda t: t.update({"model.layers.0.self_attn.g_proj.weight": torch.ones(2)}), "g_proj.weight: unexpected"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), "norm.weight: expected [32], got [5]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[..., Any], named: str, tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    rewrite(place, change)
    with pytest.raises(UserError, match=r"its tensors do not fit its config\.json") as refused:
        load_model(place)
    assert named in str(refused.value)


def test_pickled_weights_are_refused(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(UserError, match="Pickled weights can run code"):
        load_model(place)


# Training

OPTIM = OptimSection(lr=1e-3, warmup_fraction=0.0, grad_clip=1e9)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_trainer_trains_it_whatever_the_split(family: str, tmp_path: Path):
    place = save(family, tmp_path / "model")
    results: list[tuple[list[float], dict[str, Tensor]]] = []
    for budget, again in ((1000, False), (40, False), (40, True)):
        model = load_model(place)
        trainer = Trainer(model, OPTIM, budget, 10, activation_checkpointing=again)
        losses = [trainer.step(make_samples(seed), cross_entropy).loss for seed in range(3)]
        results.append((losses, {n: p.detach().clone() for n, p in model.named_parameters()}))
    (whole, _), (split, weights), (recomputed, same) = results
    assert whole == pytest.approx(split, rel=1e-4)
    assert split == recomputed
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_how_evenly_experts_were_used_is_of_all_tokens(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    found = []
    for budget, again in ((1000, False), (40, True)):
        trainer = Trainer(load_model(place), OPTIM, budget, 10, activation_checkpointing=again)
        trainer.logprobs(make_samples())  # without gradient: not counted
        found.append({n: v for n, v in trainer.step(make_samples(), cross_entropy).means.items() if "expert" in n})
    assert found[0] == pytest.approx(found[1])
    assert 0.5 < found[0]["expert_entropy"] < 1
    assert 0 < found[0]["expert_load_min"] < 1 < found[0]["expert_load_max"] < 4
    assert expert_balance(torch.tensor([[1.0, 1.0], [3.0, 1.0]])) == pytest.approx(
        {"expert_entropy": (1 + 0.811278) / 2, "expert_load_min": 0.75, "expert_load_max": 1.25}
    )
    dense = Trainer(load_model(save("mistral", tmp_path / "dense")), OPTIM, 40, 10)
    assert "expert_entropy" not in dense.step(make_samples(), cross_entropy).means


def test_a_state_resumes_to_the_bit(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    first = Trainer(load_model(place), OPTIM, 40, 10)
    first.step(make_samples(0), cross_entropy)
    second = Trainer(load_model(place), OPTIM, 40, 10)
    snapshot = first.snapshot()
    snapshot.write(tmp_path / "state")
    snapshot.export(tmp_path / "exported")
    second.load(tmp_path / "state")
    for trainer in (first, second):
        trainer.step(make_samples(1), cross_entropy)
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))
    exported = load_model(tmp_path / "exported")
    assert not all(torch.equal(p, q) for p, q in zip(exported.parameters(), first.model.parameters(), strict=True))


def test_layers_of_a_family_take_adapters(tmp_path: Path):
    model = load_model(save("qwen3_moe", tmp_path / "model"))
    before = packed(model, documents())
    model.lora = add_lora(model, LoRA(2, 4.0, ("q_proj", "o_proj")), 0)
    torch.testing.assert_close(packed(model, documents()), before)
    trainer = Trainer(model, OPTIM, 40, 10)
    trainer.step(make_samples(0), cross_entropy)
    assert not torch.allclose(packed(model, documents()), before)
    assert {
        name.rpartition(".lora")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    } == {
        "q_proj",
        "o_proj",
    }
