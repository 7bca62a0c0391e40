"""Families of transformers are published by the names of files, whatever their memory looks like."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.engine.buckets import buckets
from pekoe.model import LoRA, file_stream, load_model, model_on_meta, read_spec
from pekoe.model.lora import add_lora
from pekoe.weights import LocalSender
from pekoe.weights.checksums import PlainChecksums, SGLangChecksums, checksum_builder_for, checksums_of, differing
from tests.families.configs import save
from tests.families.test_families import is_slow

STORED = ["qwen3_moe", "mixtral", "gpt_oss", "gemma3_text", "deepseek_v3", "phimoe", "ernie4_5_moe", "gpt_neox", "gpt2"]
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def files_of(place: Path) -> dict[str, Tensor]:
    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("family", [is_slow(family) for family in STORED])
def test_buckets_for_servers_are_the_files(family: str, tmp_path: Path):
    """Names, shapes and values; a model without values gives a receiver the same buckets."""
    place = save(family, tmp_path / "model")
    model, stored = load_model(place, implementation="transformers"), files_of(place)
    sent = list(buckets(model, 20_000, files=True))
    assert len(sent) > 2
    streamed = {name: tensor for part in sent for name, tensor in part}
    assert streamed.keys() == stored.keys()
    assert all(torch.equal(streamed[name], stored[name]) for name in stored)
    assert all(tensor.is_contiguous() for tensor in streamed.values())
    shapes = model_on_meta(place, read_spec(place, "transformers")[0])
    expected = list(buckets(shapes, 20_000, files=True))
    assert [[(n, t.shape, t.dtype) for n, t in part] for part in sent] == [
        [(n, t.shape, t.dtype) for n, t in part] for part in expected
    ]
    assert {t.device.type for part in expected for _, t in part} == {"meta"}


def test_between_embedded_engines_they_go_as_they_lie_in_memory(tmp_path: Path):
    model = load_model(save("qwen3_moe", tmp_path / "model"))
    names = [name for part in buckets(model) for name, _ in part]
    assert names == [name for name, _ in model.named_parameters()]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names


def test_checksums_of_servers_name_the_files(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model")
    model = load_model(place)
    before = checksums_of(model, PlainChecksums(torch.float32, server=True))
    assert before.keys() == files_of(place).keys()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, 24 + 3, 5] += 1  # 24 rows are the gate's
    assert differing(checksums_of(model, PlainChecksums(torch.float32, server=True)), before) == [EXPERT]


def test_a_written_directory_has_the_checksums_of_a_broadcast(tmp_path: Path):
    model = load_model(save("qwen3", tmp_path / "model"), implementation="transformers")
    sender = LocalSender(model, torch.float32, lambda _: [])
    nothing_sent = dict(sender.checksums("vllm") or {})
    sender.write(tmp_path / "written", ["vllm"], checksum=True)
    assert sender.checksums("vllm") == nothing_sent
    assert files_of(tmp_path / "written").keys() == nothing_sent.keys()


def test_sglang_holds_all_experts_of_a_layer_as_one(tmp_path: Path):
    """Each expert's gate above its up; experts one after another."""
    place = save("qwen3_moe", tmp_path / "model")
    found = checksums_of(load_model(place), SGLangChecksums(torch.float32))
    files = files_of(place)
    parts = [files[f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"] for e in range(4) for part in ("gate", "up")]
    digest = hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16]
    assert found["model.layers.0.mlp.experts.w13_weight"] == digest
    assert "model.layers.0.mlp.experts.w2_weight" in found
    assert not any(".experts.0." in name for name in found)


def test_checksums_of_a_family_that_was_not_compared_are_unknown(tmp_path: Path):
    spec = load_model(save("gpt_oss", tmp_path / "model")).spec
    assert checksum_builder_for("vllm", spec, torch.float32, "cpu") is None
    assert checksum_builder_for("sglang", spec, torch.float32, "cpu") is None
    assert checksum_builder_for("embedded", spec, torch.float32, "cpu") is not None


def test_an_adapters_sum_is_written_by_the_names_of_files(tmp_path: Path):
    """As SGLang is given it."""
    place = save("qwen3_moe", tmp_path / "model")
    model = load_model(place)
    model.lora = add_lora(model, LoRA(2, 4.0, ("q_proj",)), 0)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.lora_B.weight").fill_(0.5)
    LocalSender(model, torch.float32, lambda _: []).write(tmp_path / "sum", ["sglang"], checksum=False)
    written, before = files_of(tmp_path / "sum"), files_of(place)
    assert written.keys() == before.keys()
    changed = [name for name in before if not torch.equal(written[name], before[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_a_model_without_values_reads_config_json_alone(tmp_path: Path):
    place = save("gemma3_text", tmp_path / "model")
    (place / "model.safetensors").unlink()
    shapes = model_on_meta(place, read_spec(place)[0])
    assert ("model.layers.0.self_attn.q_norm.weight", (16,)) in [(n, tuple(t.shape)) for n, t in file_stream(shapes)]
    config: dict[str, Any] = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="not a config of gemma3_text"):
        model_on_meta(place, shapes.spec)
