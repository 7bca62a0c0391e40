"""A `Shape` from a model's config.json, by whatever names its family gives to sizes. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError
from pekoe.plan.shapes import Shape

# What families call a size; the first that is there counts.
_NAMES = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_k", "moe_topk"),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_width": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "dense_layers": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
}
_HEAD_128 = ("qwen3", "qwen3_moe")  # where head_dim is not said
_TWO_MATRICES = (
    *("apertus", "arcee", "gpt2", "gpt_bigcode", "gpt_neox", "nanochat", "nemotron", "persimmon", "phi", "starcoder2"),
)
_ONE_SHARED = ("hunyuan_v1_moe",)  # an expert that every token uses, which the file does not mention


def shape_of(file: Path, name: str) -> Shape:
    """UserError where it is no config.json of a model, or does not say how many experts a token uses."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        values = values | (values.get("text_config") or {})
        hidden, heads = _integer(values, "hidden"), _integer(values, "heads")
        family = values.get("model_type")
        head_dim = values.get("head_dim") or (128 if family in _HEAD_128 else hidden // heads)
        kv_heads = 1 if values.get("multi_query") else int(values.get("num_key_value_heads") or heads)
        width = int(values.get("intermediate_size") or values.get("n_inner") or 4 * hidden)
        sizes = _integer(values, "layers"), hidden, heads, kv_heads, int(head_dim), width, int(values["vocab_size"])
        shape = Shape(name, *sizes, bool(values.get("tie_word_embeddings")), gated=family not in _TWO_MATRICES)
        if values.get("kv_lora_rank"):
            shape = replace(shape, **_latent(values, hidden, heads))
        return replace(shape, **_experts(values, width)) if _integer(values, "experts", 0) else shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: expected the config.json of a model, got {type(error).__name__}: {error}") from None


def _integer(values: Mapping[str, Any], size: str, default: int | None = None) -> int:
    """The first of a size's names that says more than 0; KeyError where none does, unless there is a default."""
    for name in _NAMES[size]:
        if found := values.get(name):
            return int(found[0] if isinstance(found, list) else found)
    if default is None:
        raise KeyError(_NAMES[size][0])
    return default


def _experts(values: Mapping[str, Any], width: int) -> dict[str, int]:
    """What a config.json says of its experts. KeyError where it does not say how many a token uses."""
    each = int(values.get("moe_intermediate_size") or width)  # Mixtral's experts have the model's own width
    others = 1 if values.get("model_type") in _ONE_SHARED else 0
    shared = _integer(values, "shared_width", each * _integer(values, "shared", others))
    dense = _integer(values, "dense_layers", len(values.get("mlp_only_layers") or ()))
    found = {"num_experts": _integer(values, "experts"), "top_k": _integer(values, "top_k"), "expert_width": each}
    return found | {"shared_width": shared, "dense_layers": dense, "dense_width": width if dense else 0}


def _latent(values: Mapping[str, Any], hidden: int, heads: int) -> dict[str, int]:
    """Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): what a token leaves, and a layer's parameters."""
    rank, rope = int(values["kv_lora_rank"]), int(values["qk_rope_head_dim"])
    key, value = int(values["qk_nope_head_dim"]) + rope, int(values["v_head_dim"])
    low = values.get("q_lora_rank")
    queries = int(low) * (hidden + heads * key) if low else hidden * heads * key
    others = hidden * (rank + rope) + rank * heads * (key - rope + value) + heads * value * hidden
    return {"kv_width": rank + rope, "attention": queries + others}
