"""What `pekoe plan` reads of a family's config.json is what transformers makes of it: total and active parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.spec import FamilySpec
from pekoe.model import read_spec
from pekoe.plan.recipe import read_shape
from pekoe.run.doctor import forecast
from tests.families.configs import QWEN3_30B_A3B, config_of

BIG = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_hidden_layers": 4, "head_dim": 128}
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 256},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "glm4_moe": {"moe_intermediate_size": 256},
    "dots1": {"moe_intermediate_size": 256, "layer_types": ["full_attention"] * 4},
    "deepseek_v3": {"moe_intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 64, "head_dim": None},
    "ernie4_5_moe": {"moe_intermediate_size": 256},
    "olmoe": {"moe_intermediate_size": None},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
OTHERS = ["mixtral", "minimax_m2", "granitemoeshared", "hunyuan_v1_moe", "mistral", "qwen2", "phi3", "nemotron"]


@pytest.mark.parametrize("family", [*MORE, *OTHERS])
def test_total_and_active_parameters_of_a_config_json(family: str, tmp_path: Path):
    changes = {k: v for k, v in (BIG | MORE.get(family, {})).items() if v is not None}
    config_of(family, **changes).save_pretrained(tmp_path)
    values: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    if family == "olmoe":  # of its own it has none: its experts are of intermediate_size
        del values["moe_intermediate_size"]
        (tmp_path / "config.json").write_text(json.dumps(values))
    spec, _ = read_spec(tmp_path, "transformers")
    shape, _ = read_shape(str(tmp_path))
    assert isinstance(spec, FamilySpec)
    head = shape.head_parameters * (1 if shape.tied else 2)
    assert shape.num_parameters == pytest.approx(spec.total, rel=0.02)
    assert shape.layer_active + head == pytest.approx(spec.active, rel=0.02)
    assert (shape.num_experts, shape.top_k) == (spec.num_experts, spec.experts_per_token)


@pytest.fixture
def qwen3_30b_a3b(tmp_path: Path) -> Path:
    place = tmp_path / "Qwen3-30B-A3B"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    return place


def test_a_mixture_of_30b_parameters_of_which_a_token_uses_3b(qwen3_30b_a3b: Path):
    """Its makers say 30.5 billion, and 3.3 billion for a token."""
    spec, _ = read_spec(qwen3_30b_a3b)
    assert isinstance(spec, FamilySpec)
    assert spec.total / 1e9 == pytest.approx(30.5, abs=0.05)
    assert spec.active / 1e9 == pytest.approx(3.35, abs=0.05)
    by_file, by_name = (read_shape(place)[0] for place in (str(qwen3_30b_a3b), "models/Qwen3-30B-A3B"))
    assert by_file.num_parameters == by_name.num_parameters == pytest.approx(spec.total, rel=0.002)
    assert by_file.layer_active == by_name.layer_active
    assert spec.kv_values_per_token == by_file.kv_per_token == 2 * 48 * 4 * 128


SHORT = ["rollout.max_new_tokens=96", "data.max_prompt_tokens=32", "train.token_budget=128"]


def test_weights_gradients_and_moments_are_of_all_parameters(qwen3_30b_a3b: Path):
    """In float32: 16 bytes of each, over eight ranks, whatever a token uses."""
    changes = [f"model.path={qwen3_30b_a3b}", "model.dtype='bfloat16'", *SHORT]
    parts = forecast(load_config("eight-gpu-7b", changes, RLConfig), 8, 141 * 10**9, refine=False).parts
    state = sum(parts[name] for name in ("weights", "gradients", "Adam's moments"))
    assert state == pytest.approx(16 * 30.53e9 / 8, rel=0.001)
