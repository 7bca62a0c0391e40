"""Checkpoint directories: what comes in goes out, transformers reads it, and bad ones are refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pekoe.core.errors import UserError
from pekoe.model import Decoder, load_model, save_model
from pekoe.model import hf as hf_module

MakeReference = Callable[..., PreTrainedModel]
MakeDecoder = Callable[..., Decoder]
SaveReference = Callable[..., Path]
DrawDocuments = Callable[..., list[Tensor]]
PackedLogits = Callable[[Decoder, Sequence[Tensor]], list[Tensor]]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def same_weights(a: Decoder, b: Decoder) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {
        name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()
    }  # the file is about to change
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def reconfigure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def saved(tmp_path: Path, make_decoder: MakeDecoder) -> Path:
    save_model(make_decoder(tied_embeddings=False), tmp_path / "mine")
    return tmp_path / "mine"


# In and out


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_transformers_loads_what_we_save(
    family: str,
    tied: bool,
    tmp_path: Path,
    make_reference: MakeReference,
    save_reference: SaveReference,
    draw_documents: DrawDocuments,
    packed_logits: PackedLogits,
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    reference = make_reference(family, tie_word_embeddings=tied, rope_parameters=rope, eos_token_id=[3, 5])
    model = load_model(save_reference(reference))
    save_model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(reference)
    assert again.dtype == torch.float32
    assert again.config.eos_token_id == [3, 5]
    assert again.config.rope_parameters == reference.config.rope_parameters
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    (document,) = draw_documents([40])
    torch.testing.assert_close(packed_logits(model, [document])[0], again(document[None]).logits[0], rtol=0, atol=1e-4)


def test_transformers_4_dialect_alone_is_read(saved: Path) -> None:
    before = load_model(saved)
    config = json.loads((saved / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    (saved / "config.json").write_text(json.dumps(config))
    assert load_model(saved).spec == before.spec


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoints_of_transformers(
    tied: bool, make_reference: MakeReference, save_reference: SaveReference
) -> None:
    reference = make_reference("qwen2", tie_word_embeddings=tied)
    whole = save_reference(reference, "whole")
    sharded = save_reference(reference, "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert same_weights(load_model(whole), load_model(sharded))


def test_our_shards(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    save_model(model, tmp_path / "m", max_shard_bytes=10_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "m" / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert name in handle.keys()  # noqa: SIM118
    assert same_weights(model, load_model(tmp_path / "m"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(reference.state_dict()[EMBED], model.state_dict()[EMBED])


def test_dtype_is_converted_and_recorded(tmp_path: Path, saved: Path) -> None:
    exact = load_model(saved).state_dict()
    half = load_model(saved, dtype=torch.bfloat16)
    assert all(torch.equal(t, exact[name].bfloat16()) for name, t in half.state_dict().items())
    save_model(half, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert same_weights(half, load_model(tmp_path / "half", dtype=torch.bfloat16))
    save_model(load_model(saved), tmp_path / "too", dtype=torch.bfloat16)
    assert {p.name: p.read_bytes() for p in (tmp_path / "too").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "half").iterdir()
    }
    assert next(load_model(tmp_path / "half").parameters()).dtype == torch.float32


def test_config_and_assets_are_kept(tmp_path: Path, saved: Path) -> None:
    reconfigure(saved, eos_token_id=[7, 9], bos_token_id=1, my_note="kept")
    assets = {
        "tokenizer.json": b"{}",
        "merges.txt": b"a b\n",
        "tokenizer.model": b"\x00\xff",
        "chat_template.jinja": b"{{x}}",
    }
    for name, content in assets.items():
        (saved / name).write_bytes(content)
    (saved / "notes.md").write_text("not ours")
    model = load_model(saved)
    assert model.assets == assets
    save_model(model, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert again.assets == assets
    assert again.hf_config["eos_token_id"] == [7, 9]
    assert again.hf_config["my_note"] == "kept"
    assert again.hf_config["architectures"] == ["Qwen2ForCausalLM"]
    assert not (tmp_path / "copy" / "notes.md").exists()


# Tied heads


def test_tied_checkpoints_may_store_either_name_or_both(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    model, path = make_decoder(), tmp_path / "m"
    save_model(model, path)
    rewrite(path, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert same_weights(model, load_model(path))
    rewrite(path, lambda tensors: tensors.pop(EMBED))
    assert same_weights(model, load_model(path))
    rewrite(path, lambda tensors: tensors.update({EMBED: tensors[HEAD] + 1}))
    with pytest.raises(UserError, match=f"tie_word_embeddings is true, but {HEAD} and {EMBED} differ"):
        load_model(path)


def test_old_llama_frequencies_are_ignored(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(saved)


# Refusals


def change_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), r"lm_head.weight: expected \[61, 32\], got nothing"),
        (lambda t: t.update({"model.extra": torch.ones(3)}), r"model.extra: unexpected, \[3\]"),
        (change_shape, r"model.norm.weight: expected \[32\], got \[31\]"),
        (lambda t: t.update({HEAD: t[HEAD].to(torch.int8)}), "lm_head.weight: expected one of F64, .*got I8"),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(UserError, match=message):
        load_model(saved)


def test_many_misfits_are_summed_up(saved: Path) -> None:
    reconfigure(saved, hidden_size=64, head_dim=8)
    with pytest.raises(UserError, match=r"and \d+ more"):
        load_model(saved)


def test_absurd_depth_is_refused_before_it_costs_memory(saved: Path) -> None:
    reconfigure(saved, num_hidden_layers=10**9)
    with pytest.raises(UserError, match=r"lacks tensor model.layers.999999999"):
        load_model(saved)


def test_missing_directory_names_the_nearest(saved: Path) -> None:
    with pytest.raises(UserError, match=r"expected a model directory, got nothing there. Did you mean 'mine'"):
        load_model(saved.parent / "mime")
    with pytest.raises(UserError, match="got a file"):
        load_model(saved / "config.json")
    with pytest.raises(UserError, match="expected a model directory"):
        load_model("Qwen/never-downloaded")
    with pytest.raises(UserError, match=r"on the hub: hf download Qwen/Qwen3-0\.6B --local-dir Qwen/Qwen3-0\.6B"):
        load_model("Qwen/Qwen3-0.6B")


def test_bad_config_files(saved: Path) -> None:
    for content, message in [("{", "expected JSON"), ("[" * 100_000, "expected JSON"), ("[]", "got list")]:
        (saved / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_model(saved)
    (saved / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="expected JSON"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: missing"):
        load_model(saved)


def test_pickles_are_never_loaded(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(saved / "exploded"),))

    (saved / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"got pytorch_model.bin.*convert them to safetensors"):
        load_model(saved)
    assert not (saved / "exploded").exists()
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="got neither"):
        load_model(saved)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "weights.bin"])
def test_an_index_cannot_reach_out_of_its_directory(saved: Path, name: str) -> None:
    (saved / WEIGHTS).rename(saved.parent / "outside.safetensors")
    (saved / INDEX).write_text(json.dumps({"weight_map": {EMBED: name}}))
    with pytest.raises(UserError, match=r"expected the name of a .safetensors file beside it"):
        load_model(saved)


def test_bad_indices(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "a.safetensors")
    for index, message in [
        ({}, "weight_map"),
        ({"weight_map": {EMBED: "b.safetensors"}}, "b.safetensors, which is miss"),
    ]:
        (saved / INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            load_model(saved)
    (saved / "b.safetensors").write_bytes((saved / "a.safetensors").read_bytes())
    (saved / INDEX).write_text(json.dumps({"weight_map": {EMBED: "b.safetensors", HEAD: "a.safetensors"}}))
    with pytest.raises(UserError, match=r"is also in a.safetensors"):
        load_model(saved)


def test_corrupt_weights(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        (saved / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_model(saved)
    header = json.dumps({"a": {"dtype": "x" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (saved / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        load_model(saved)
    assert len(str(caught.value)) < 1000


def test_links_into_the_hub_cache_are_followed(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved.parent / "blob")
    (saved / WEIGHTS).symlink_to(saved.parent / "blob")
    load_model(saved)


# Replacing


def test_saving_replaces_a_model_directory_and_nothing_else(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    target, (first, second) = tmp_path / "deep" / "m", (make_decoder(seed=s) for s in (1, 2))
    save_model(first, target, max_shard_bytes=10_000)
    save_model(second, target)
    assert same_weights(second, load_model(target))
    assert sorted(p.name for p in target.iterdir()) == ["config.json", WEIGHTS]
    assert [p.name for p in target.parent.iterdir()] == ["m"]

    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"got a directory with thesis.tex"):
        save_model(first, target)
    assert (target / "thesis.tex").exists()
    assert same_weights(second, load_model(target))

    plain = tmp_path / "file"
    plain.write_text("x")
    (tmp_path / "link").symlink_to(target)
    for other in (plain, tmp_path / "link"):
        with pytest.raises(UserError, match="got a file or link"):
            save_model(first, other)
    (tmp_path / "empty").mkdir()
    save_model(first, tmp_path / "empty")
    assert same_weights(first, load_model(tmp_path / "empty"))


def test_a_failed_save_leaves_the_old_model(
    tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, target = make_decoder(seed=1), tmp_path / "m"
    save_model(first, target)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hf_module, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(make_decoder(seed=2), target)
    assert same_weights(first, load_model(target))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    for name in (".m.partial", ".m.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_bytes(b"x")
    save_model(make_decoder(), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_every_written_file_is_synced_before_the_rename(
    tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    model = make_decoder()
    model.assets["tokenizer.json"] = b"{}"
    save_model(model, tmp_path / "m")
    partial = tmp_path / ".m.partial"
    assert set(synced) == {partial / f for f in ("config.json", WEIGHTS, "tokenizer.json")} | {partial, tmp_path}
    assert synced[-2:] == [partial, tmp_path]
