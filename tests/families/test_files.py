"""Checkpoints of families in several files, and code beside them: whatever does not fit is one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.model import load_model
from tests.families.configs import make
from tests.families.test_families import documents, packed, reconfigure

INDEX = "model.safetensors.index.json"
EXPERT, NORM = "model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"


class Shards:
    """The files of a model, to be damaged. `of(name)` is the file of a tensor."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.map: dict[str, str] = json.loads((place / INDEX).read_text())["weight_map"]

    def of(self, name: str) -> str:
        return self.map[name]

    def change(self, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(self.place / file)
        change(tensors)
        save_file(tensors, self.place / file, metadata={"format": "pt"})

    def write_index(self, **changes: str | None) -> None:
        self.map = {n: f for n, f in {**self.map, **changes}.items() if f is not None}
        (self.place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.map}))

    def move(self, name: str) -> None:
        """A copy of a tensor in another file."""
        other = next(file for file in sorted(set(self.map.values())) if file != self.of(name))
        self.change(other, lambda tensors: tensors.update({name: load_file(self.place / self.of(name))[name]}))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    make("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    found = Shards(tmp_path / "model")
    assert len(set(found.map.values())) > 3
    return found


def test_files_that_fit_are_read(shards: Shards):
    expected = torch.cat([make("qwen3_moe")(doc[None]).logits[0] for doc in documents()])
    torch.testing.assert_close(packed(load_model(shards.place), documents()), expected, rtol=1e-4, atol=1e-4)


def drop(name: str, index: bool) -> Callable[[Shards], None]:
    def damage(shards: Shards) -> None:
        shards.change(shards.of(name), lambda tensors: tensors.pop(name))
        if index:
            shards.write_index(**{name: None})

    return damage


def add(index: bool) -> Callable[[Shards], None]:
    def damage(shards: Shards) -> None:
        name = "model.layers.0.self_attn.g_proj.weight"
        shards.change(shards.of(NORM), lambda tensors: tensors.update({name: torch.ones(2)}))
        if index:
            shards.write_index(**{name: shards.of(NORM)})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(NORM, index=True), f"{NORM}: expected [32], got nothing"),
        (drop(NORM, index=False), f"{NORM}: expected [32], got nothing"),
        (drop(EXPERT, index=True), f"{EXPERT}: expected [24, 32], got nothing"),
        (drop(EXPERT, index=False), f"{EXPERT}: expected [24, 32], got nothing"),
        (add(index=True), "model.layers.0.self_attn.g_proj.weight: unexpected, [2]"),
        (add(index=False), "model.layers.0.self_attn.g_proj.weight: unexpected, [2]"),
        (lambda shards: (shards.place / shards.of(EXPERT)).unlink(), "which is missing (an unfinished download?)"),
        (lambda shards: shards.move(NORM), f"tensor {NORM} is also in model-0"),
        (lambda shards: shards.write_index(**{NORM: "../model.safetensors"}), "file beside it, got '../model"),
        (lambda shards: (shards.place / shards.of(NORM)).write_bytes(b"{}"), "not a readable safetensors file"),
    ],
)
def test_files_that_do_not_fit_are_refused(damage: Callable[[Shards], Any], message: str, shards: Shards):
    damage(shards)
    with pytest.raises(UserError) as refused:
        load_model(shards.place)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen9"])
def test_code_of_the_directory_is_never_run(family: str, tmp_path: Path):
    """Of a family that transformers has, its own class is used; of another, nothing."""
    place = tmp_path / "model"
    make("qwen3_moe").save_pretrained(place)
    ran = tmp_path / "ran"
    (place / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    (place / "configuration_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnConfig: ...\n")
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    reconfigure(place, model_type=family, auto_map=code)
    if family == "qwen9":
        with pytest.raises(UserError, match=r"'qwen9' is not a family of this transformers. Its own code \(auto_map\)"):
            load_model(place)
    else:
        assert load_model(place).spec.family == "qwen3_moe"
    assert not ran.exists()
