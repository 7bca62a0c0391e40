"""config.json in both dialects, to a spec and back; and everything that must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pekoe.core.errors import UserError
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.model.hf_config import hf_config_to_spec, spec_to_hf_config

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("linear", {"factor": 2.0}),
    ("dynamic", {"factor": 2.0}),
    ("llama3", LLAMA3),
    ("yarn", YARN),
    ("yarn", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0}),
    ("yarn", {**YARN, "attention_factor": 1.3}),
]
SPEC = ModelSpec("llama", 100, 64, 3, 8, 2, 8, 96, 4096, RopeSpec(theta=5e5), 1e-5)
SPECS = [
    SPEC,
    replace(SPEC, qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True),
    replace(SPEC, head_dim=20, rope=RopeSpec(1e4, "llama3", 8.0, 512, 1.0, 4.0)),
    replace(SPEC, family="qwen2", qkv_bias=True, rope=RopeSpec(1e6, "linear", 2.0)),
    replace(SPEC, family="qwen3", qk_norm=True, head_dim=16, rope=RopeSpec(1e6, "yarn", 4.0, 1024, truncate=False)),
    replace(SPEC, family="qwen3", qk_norm=True, qkv_bias=True, out_bias=True, rope=RopeSpec(1e6, "dynamic", 2.0)),
]


def read(**changes: Any) -> ModelSpec:
    return hf_config_to_spec({**BASE, **changes}, "config.json")


@pytest.mark.parametrize(("kind", "fields"), SCALINGS)
def test_both_dialects_say_the_same(kind: str, fields: dict[str, Any]) -> None:
    old = {} if kind == "default" else {"rope_scaling": {"rope_type": kind, **fields}}
    older = {} if kind == "default" else {"rope_scaling": {"type": kind, **fields}}
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **fields}}
    spec = read(**new)
    assert spec.rope.kind == kind
    assert spec.rope.theta == 5e5
    if kind in ("llama3", "yarn"):
        assert spec.rope.original_max_positions == fields["original_max_position_embeddings"]
    for name, value in fields.items():
        if name != "original_max_position_embeddings":
            assert getattr(spec.rope, name) == value
    assert read(rope_theta=5e5, **old) == spec
    assert read(rope_theta=5e5, **older) == spec


def test_precedence_where_both_dialects_are_present() -> None:
    assert read(rope_theta=7.0, rope_parameters={"rope_theta": 9.0}).rope.theta == 9
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 9.0}}
    assert read(rope_theta=7.0, **both).rope == RopeSpec(7.0, "linear", 2.0)
    assert read(original_max_position_embeddings=64, rope_scaling={"type": "yarn", **YARN}).rope == RopeSpec(
        10_000.0, "yarn", 4.0, 64
    )


def test_defaults_of_absent_and_null_keys() -> None:
    bare = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "hidden_act", "rms_norm_eps")}
    spec = hf_config_to_spec({**bare, "head_dim": None, "rope_scaling": None}, "config.json")
    assert (spec.num_kv_heads, spec.head_dim, spec.norm_eps, spec.rope) == (8, 8, 1e-6, RopeSpec())
    assert not spec.tied_embeddings
    assert read(model_type="qwen3").head_dim == 128
    assert read(model_type="qwen2").qkv_bias


def test_yarn_on_an_unextended_config_extends_the_context() -> None:
    """Qwen2.5's documented recipe: `rope_scaling` is added and max_position_embeddings left as it was."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert read(rope_scaling=scaling).max_positions == 16_384
    assert read(rope_scaling={"type": "yarn", "original_max_position_embeddings": 512}).rope.factor == 8.0
    assert read(rope_scaling={"type": "yarn", **YARN}).max_positions == 4096


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(spec_to_hf_config(spec)))
    assert hf_config_to_spec(config, "config.json") == spec
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    assert hf_config_to_spec(old, "config.json") == spec
    assert hf_config_to_spec(new, "config.json") == spec


@pytest.mark.parametrize("spec", SPECS)
def test_transformers_reads_what_we_write(spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(spec_to_hf_config(spec)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.head_dim == spec.head_dim
    assert config.rope_parameters["rope_type"] == spec.rope.kind
    assert hf_config_to_spec(config.to_dict(), "transformers") == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_moe"}, "model_type: 'qwen2_moe' is not supported. Did you mean 'qwen2'"),
        ({"model_type": "gpt2"}, "Valid: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer below 2.31, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer below 2.31, got 0"),
        ({"num_attention_heads": True}, "num_attention_heads: expected a positive integer below 2.31, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number below 1e30, got nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        ({"num_key_value_heads": 3}, "num_heads: expected a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window: expected false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window: expected false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 .*got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor: expected 1 .*got 0.25"),
        ({"rope_scaling": {"type": "yarm", "factor": 2}}, "rope_scaling: type: 'yarm' .* Did you mean 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "high_freq_factor": 1}}, "more than low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": -1}},
            "factor: expected a positive number below 1e30, got -1",
        ),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"rope_theta": "big"}, "rope_theta: expected a positive number"),
        ({"rope_theta": 1e31}, "rope_theta: expected a positive number below 1e30, got 1e.31"),
        ({"vocab_size": 2**70}, "vocab_size: expected a positive integer below 2.31, got 1180591620717411303424"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings: expected a positive integer below 2.31"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number below 1e30, got 1000"),
        ({"hidden_size": 2**30, "intermediate_size": 2**30}, "expected at most 1e.14 parameters"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e29}}, "expected at most .* 2147483647 positions"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 128},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["full_attention"] * 3},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {}},
    ],
)
def test_harmless_mentions_are_accepted(changes: dict[str, Any]) -> None:
    assert read(**changes) == read()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"family": "qwen2"}, "qkv_bias"), ({"family": "qwen3"}, "qk_norm"), ({"out_bias": True}, "qkv_bias")],
)
def test_a_spec_that_no_config_can_say_is_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        spec_to_hf_config(replace(SPEC, **changes))
