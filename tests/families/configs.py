"""Tiny random models of many families, each with what makes the family different from Llama.

Windows are shorter than documents, soft caps are low enough to matter, experts are few, heads are of unequal numbers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

VOCAB = 61
WINDOW = 6

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_HEAD = {"head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": _HEAD,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_moe": {**_MOE, **_HEAD, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": WINDOW, **_HEAD},
    "ministral": {**_MIXED, **_HEAD},
    "ministral3": _HEAD,
    "mixtral": {**_LOCAL, "sliding_window": None},
    "gemma": {**_HEAD, "tie_word_embeddings": True},
    "gemma2": {
        **_MIXED,
        **_HEAD,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {**_MIXED, **_HEAD, "query_pre_attn_scalar": 9, "tie_word_embeddings": True},
    "vaultgemma": {**_MIXED, **_HEAD, "attn_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "glm": {**_HEAD, "partial_rotary_factor": 0.5},
    "glm4": {**_HEAD, "partial_rotary_factor": 0.5},
    "glm4_moe": {**_ROUTED, **_GROUPS, **_HEAD, "use_qk_norm": True},
    "glm4_moe_lite": {**_ROUTED, "n_group": 1, "topk_group": 1, **_MLA},
    "deepseek_v2": {
        **_ROUTED,
        **_MLA,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": {**_ROUTED, **_MLA, **_GROUPS},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {**_LOCAL, "sliding_window": WINDOW},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmoe": {**_MOE, "norm_topk_prob": True},
    "flex_olmo": _MOE,
    "gpt_oss": {**_MIXED, **_HEAD, **_LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
    },
    "granitemoe": {**_LOCAL, "logits_scaling": 3.0, "attention_multiplier": 0.5},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 24},
    "cohere": {"logit_scale": 2.0, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": {**_MIXED, "logit_scale": 2.0, "tie_word_embeddings": True},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "ernie4_5": {**_HEAD, "use_bias": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone4": {**_MIXED, **_HEAD, "sliding_window_pattern": 2},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": {**_HEAD, "num_experts": 4, "moe_topk": 2},
    "helium": {"head_dim": 8},
    "stablelm": {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_inner": 48},
    "seed_oss": _HEAD,
    "apertus": {},
    "arcee": {"tie_word_embeddings": True},
    "minimax_m2": {**_HEAD, **_LOCAL, "rotary_dim": 8},
    "bitnet": {},
    "diffllama": {},
    "persimmon": {"partial_rotary_factor": 0.5},
    "dots1": {**_ROUTED, **_GROUPS, **_HEAD, "layer_types": ["full_attention"] * 2},
    "cwm": {**_MIXED, **_HEAD},
    "afmoe": {**_MIXED, **_HEAD, **_MOE, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "solar_open": {**_ROUTED, **_GROUPS, **_HEAD},
    "nanochat": {"num_key_value_heads": 4, "final_logit_softcapping": 3.0},
    "youtu": {**_MLA, "num_key_value_heads": 4},
    "gemma4_text": {
        **_MIXED,
        **_HEAD,
        "global_head_dim": 24,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "exaone": {},
    "iquestcoder": _HEAD,
    "gpt_bigcode": {},
    "internlm3": _HEAD,
    "exaone_moe": {**_MIXED, **_HEAD, **_MOE, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}

RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_MOE, **_HEAD, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
    "qwen3_5_text": {**_HEAD, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "minimax": {**_LOCAL, **_HEAD},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def config_of(family: str, **overrides: Any) -> transformers.PretrainedConfig:
    settings = {**_BASE, **(FAMILIES | RECURRENT)[family], **overrides}
    return transformers.AutoConfig.for_model(family, **settings)


def make(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model by transformers alone, biases and norms included, with attention far from uniform."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith("norm.weight") and not family.startswith("gemma")
            parameter.copy_(1 + 0.3 * noise if around_one else 0.2 * noise)
    return model


def save(family: str, place: Path, seed: int = 0, **overrides: Any) -> Path:
    """The directory that transformers writes of such a model."""
    make(family, seed, **overrides).save_pretrained(place)
    return place


QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151_936,
}
"""Of https://huggingface.co/Qwen/Qwen3-30B-A3B: its sizes."""
