"""What engines should report of the trainer's weights: a checksum of each parameter."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor

from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.engine.base import Checksums, EngineKind
from pekoe.engine.checksum import checksum
from pekoe.model import LanguageModel, file_stream
from pekoe.model.lora import base_name, is_factor

_PADDED_TO = 64  # by SGLang, on a CPU
_FUSED = {
    **{f"{part}_proj": ("qkv_proj", place, 3) for place, part in enumerate("qkv")},
    **{f"{part}_proj": ("gate_up_proj", place, 2) for place, part in enumerate(("gate", "up"))},
}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_AS_IN_FILES = ("llama", "qwen2", "qwen3")
"""Families of transformers whose parameters servers are known to hold as files do: those of our own decoder."""


class PlainChecksums:
    """Each parameter's `checksum`, by its name in a checkpoint: the embedded engine's, and vLLM's.

    Parameters are added whole, in the model's order, on any device. `dtype`: the engine's; None: as added. `server`: of
    an adapter it has the base alone, under its own names; the canary tells one adapter from another.
    """

    def __init__(self, dtype: torch.dtype | None, server: bool = False, names_head: bool = False) -> None:
        self._dtype, self._server, self._names_head = dtype, server, names_head
        self.files = server  # whether names are those of files
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
    """As `PlainChecksums`. The first 8 bytes of SHA-256; SGLang holds q, k, v and gate, up as one parameter each, and
    those of all experts."""

    files = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums: dict[str, str | int] = {}
        self._held: dict[str, dict[tuple[int, int], Any]] = {}  # parts of fused parameters, in whatever order they come

    def add(self, name: str, tensor: Tensor) -> None:
        if is_factor(name):
            return
        fused, place, number = _place_of(base_name(name))
        # A copy: numpy would pin the memory that FSDP gives back between two forwards.
        values = tensor.detach().to("cpu", self._dtype, copy=True).contiguous().view(-1).view(torch.uint8).numpy()
        held = self._held.setdefault(fused, {})
        held[place] = values
        if len(held) == number:
            self._sums[fused] = _sha256(self._held.pop(fused))

    def checksums(self) -> Checksums:
        return self._sums | {name: _sha256(parts) for name, parts in self._held.items()}


def _place_of(name: str) -> tuple[str, tuple[int, int], int]:
    """A parameter's name at SGLang, its place there (expert, part), and of how many parts; 0: not known."""
    if found := _EXPERT.fullmatch(name):
        fused = "w2_weight" if found[3] == "down" else "w13_weight"
        return f"{found[1]}.{fused}", (int(found[2]), int(found[3] == "up")), 0
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in _FUSED:
            parts[i], place, number = _FUSED[part]
            return ".".join(parts), (0, place), number
    return name, (0, 0), 1


def _sha256(parts: dict[tuple[int, int], Any]) -> str:
    hasher = hashlib.sha256()
    for place in sorted(parts):
        hasher.update(parts[place])
    return hasher.hexdigest()[:16]


ChecksumBuilder = PlainChecksums | SGLangChecksums


def checksum_builder_for(
    kind: EngineKind, spec: ModelSpec, dtype: torch.dtype | None, device: str
) -> ChecksumBuilder | None:
    """For engines of this kind that hold weights in `dtype` on `device`.

    None where theirs are not comparable: SGLang on a GPU (another hash), and where it pads (a vocabulary or
    intermediate size that is no multiple of 64); servers with a family of transformers whose layers they may join in
    ways of their own.
    """
    if kind != "embedded" and isinstance(spec, FamilySpec) and spec.family not in _AS_IN_FILES:
        return None
    if kind != "sglang":
        return PlainChecksums(dtype, kind == "vllm", kind == "vllm" and spec.tied_embeddings)
    padded = spec.vocab_size % _PADDED_TO or spec.intermediate_size % _PADDED_TO
    return None if dtype is None or device != "cpu" or padded else SGLangChecksums(dtype)


def checksums_of(model: LanguageModel, builder: ChecksumBuilder) -> Checksums:
    """All of a model that is whole in this process."""
    for name, parameter in file_stream(model) if builder.files else model.named_parameters():
        builder.add(name, parameter)
    return builder.checksums()


def differing(expected: Checksums, held: Checksums) -> list[str]:
    """Names of parameters that an engine should hold, and does not."""
    return sorted(name for name, value in expected.items() if held.get(name) != value)
