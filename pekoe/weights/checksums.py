"""What engines should report of the trainer's weights: a checksum of each parameter."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.engine.base import Checksums, EngineKind
from pekoe.engine.checksum import checksum
from pekoe.model import LanguageModel
from pekoe.model.lora import base_name, is_factor

_PADDED_TO = 64  # by SGLang, on a CPU
_FUSED = {f"{part}_proj": "qkv_proj" for part in "qkv"} | {f"{part}_proj": "gate_up_proj" for part in ("gate", "up")}


class PlainChecksums:
    """Each parameter's `checksum`, by its name in a checkpoint: the embedded engine's, and vLLM's.

    Parameters are added whole, in the model's order, on any device. `dtype`: the engine's; None: as added. `server`: of
    an adapter it has the base alone, under its own names; the canary tells one adapter from another.
    """

    def __init__(self, dtype: torch.dtype | None, server: bool = False, names_head: bool = False) -> None:
        self._dtype, self._server, self._names_head = dtype, server, names_head
        self._sums: dict[str, str | int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if self._server:
            if is_factor(name):
                return
            name = base_name(name)
        self._sums[name] = checksum(tensor.detach().to(self._dtype) if self._dtype else tensor)
        if self._names_head and name == "model.embed_tokens.weight":
            self._sums["lm_head.weight"] = self._sums[name]

    def checksums(self) -> Checksums:
        return self._sums


class SGLangChecksums:
    """As `PlainChecksums`. The first 8 bytes of SHA-256; SGLang holds q, k, v and gate, up as one parameter each."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._hashers: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if is_factor(name):
            return
        name = base_name(name)
        parts = [_FUSED.get(part, part) for part in name.split(".")]  # q before k before v, as they are joined
        # A copy: numpy would pin the memory that FSDP gives back between two forwards.
        values = tensor.detach().to("cpu", self._dtype, copy=True).contiguous().view(-1).view(torch.uint8)
        self._hashers.setdefault(".".join(parts), hashlib.sha256()).update(values.numpy())

    def checksums(self) -> Checksums:
        return {name: hasher.hexdigest()[:16] for name, hasher in self._hashers.items()}


ChecksumBuilder = PlainChecksums | SGLangChecksums


def checksum_builder_for(
    kind: EngineKind, spec: ModelSpec, dtype: torch.dtype | None, device: str
) -> ChecksumBuilder | None:
    """For engines of this kind that hold weights in `dtype` on `device`.

    None where theirs are not comparable: SGLang on a GPU (another hash), and where it pads (a vocabulary or
    intermediate size that is no multiple of 64); servers with a family of transformers, whose layers they join in ways
    of their own.
    """
    if kind != "embedded" and isinstance(spec, FamilySpec):
        return None
    if kind != "sglang":
        return PlainChecksums(dtype, kind == "vllm", kind == "vllm" and spec.tied_embeddings)
    padded = spec.vocab_size % _PADDED_TO or spec.intermediate_size % _PADDED_TO
    return None if dtype is None or device != "cpu" or padded else SGLangChecksums(dtype)


def checksums_of(model: LanguageModel, builder: ChecksumBuilder) -> Checksums:
    """All of a model that is whole in this process."""
    for name, parameter in model.named_parameters():
        builder.add(name, parameter)
    return builder.checksums()


def differing(expected: Checksums, held: Checksums) -> list[str]:
    """Names of parameters that an engine should hold, and does not."""
    return sorted(name for name, value in expected.items() if held.get(name) != value)
