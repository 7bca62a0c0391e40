"""Tiny random models, ours and transformers', for every test of the room."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.model import Decoder, PackedAttention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

torch.set_num_threads(1)

VOCAB = 61
Reference = transformers.PreTrainedModel


@pytest.fixture
def make_reference() -> Callable[..., Reference]:
    """make_reference(family, **config) -> a random transformers model, biases and norms included."""

    def make(family: str, seed: int = 0, **overrides: Any) -> Reference:
        settings: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": None,
            **overrides,
        }
        if family == "qwen3":
            settings.setdefault("head_dim", 16)
        config = transformers.AutoConfig.for_model(family, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        randomise(model, seed)
        return model

    return make


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Large enough that attention is far from uniform; transformers would leave biases at 0 and norms at 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise)


@pytest.fixture
def save_reference(tmp_path: Path) -> Callable[..., Path]:
    """save_reference(model, **save_pretrained arguments) -> its directory."""

    def save(model: Reference, name: str = "reference", **arguments: Any) -> Path:
        model.save_pretrained(tmp_path / name, **arguments)
        return tmp_path / name

    return save


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """make_decoder(dtype, **spec fields) -> a random tiny decoder."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Decoder:
        fields: dict[str, Any] = {
            "family": "qwen2",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_positions": 64,
            "rope": RopeSpec(theta=1_000.0),
            "qkv_bias": True,
            "tied_embeddings": True,
            **overrides,
        }
        model = Decoder(ModelSpec(**fields)).to(dtype)
        randomise(model, seed)
        return model

    return make


@pytest.fixture
def draw_documents() -> Callable[..., list[Tensor]]:
    """draw_documents(lengths, seed) -> random tokens [L] for each length."""

    def draw(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]

    return draw


@pytest.fixture
def packed_logits() -> Callable[[Decoder, Sequence[Tensor]], list[Tensor]]:
    """packed_logits(model, documents) -> logits [L, V] of each, from one packed forward."""

    def run(model: Decoder, documents: Sequence[Tensor]) -> list[Tensor]:
        lengths = [len(d) for d in documents]
        positions = torch.cat([torch.arange(n) for n in lengths])
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        hidden = model(torch.cat(list(documents)), positions, PackedAttention(bounds))
        return list(model.logits(hidden).split(lengths))

    return run
