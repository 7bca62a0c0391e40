"""Fingerprints of parameters: what an engine says of those that it holds, and what it should say of the trainer's."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.engine.checksum import checksum
from pekoe.model import Decoder

_PADDED_TO = 64  # SGLang, on a CPU
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}

Fingerprints = Mapping[str, str | int]
"""Of each parameter, by its name. Equal ones mean equal parameters."""
Kind = Literal["embedded", "sglang", "vllm"]


class Prints(ABC):
    """What an engine should say of weights that are shown here one after the other, in the model's order."""

    @abstractmethod
    def see(self, name: str, tensor: Tensor) -> None:
        """`tensor` is whole, on any device, in any dtype."""

    @abstractmethod
    def values(self) -> dict[str, str | int]: ...


class PlainPrints(Prints):
    """Each parameter's `checksum`, by its name in a checkpoint: the embedded engine's, and vLLM's."""

    def __init__(self, dtype: torch.dtype, names_head: bool) -> None:
        self._dtype, self._names_head = dtype, names_head
        self._found: dict[str, str | int] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        self._found[name] = checksum(tensor.detach().to(self._dtype))
        if self._names_head and name == "model.embed_tokens.weight":
            self._found["lm_head.weight"] = self._found[name]

    def values(self) -> dict[str, str | int]:
        return self._found


class SGLangPrints(Prints):
    """The first 8 bytes of SHA-256; SGLang keeps q, k, v and gate, up as one parameter each."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._hashers: dict[str, Any] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        parts = [_FUSED.get(part, part) for part in name.split(".")]  # q before k before v, as they are joined
        # A copy: numpy would pin the memory that FSDP gives back between two forwards.
        values = tensor.detach().to("cpu", self._dtype, copy=True).contiguous().view(-1).view(torch.uint8)
        self._hashers.setdefault(".".join(parts), hashlib.sha256()).update(values.numpy())

    def values(self) -> dict[str, str | int]:
        return {name: hasher.hexdigest()[:16] for name, hasher in self._hashers.items()}


def prints_for(kind: Kind, spec: ModelSpec, dtype: torch.dtype, device: str) -> Prints | None:
    """For engines of this kind that hold weights in `dtype`.

    None where they would speak of something else: SGLang on a GPU (another hash), and where it pads (a vocabulary or
    intermediate size that is no multiple of 64).
    """
    if kind != "sglang":
        return PlainPrints(dtype, kind == "vllm" and spec.tied_embeddings)
    padded = spec.vocab_size % _PADDED_TO or spec.intermediate_size % _PADDED_TO
    return None if device != "cpu" or padded else SGLangPrints(dtype)


def prints_of(model: Decoder, prints: Prints) -> Fingerprints:
    """All of a model that is whole in this process."""
    for name, parameter in model.named_parameters():
        prints.see(name, parameter)
    return prints.values()


def differing(expected: Fingerprints, held: Fingerprints) -> list[str]:
    """Names of parameters that an engine should hold, and does not."""
    return sorted(name for name, value in expected.items() if held.get(name) != value)
