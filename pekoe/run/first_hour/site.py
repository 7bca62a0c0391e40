"""What the parts of `pekoe doctor --gpu` share: the device, figures, and models of random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekoe.core.spec import ModelSpec
from pekoe.core.types import Completion, Sample
from pekoe.model import Decoder
from pekoe.weights.proof import sample_of


class Skip(Exception):
    """This machine lacks what a part needs."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that was measured. Example: Figure("bf16 mean", 0.004, "<= 0.02", True)."""

    name: str
    value: float | int | str
    expected: str = ""
    ok: bool = True  # False: the part fails


def at_most(name: str, value: float, limit: float) -> Figure:
    return Figure(name, value, f"<= {limit:g}", value <= limit)  # not NaN


def at_least(name: str, value: float, limit: float) -> Figure:
    return Figure(name, value, f">= {limit:g}", value >= limit)


def is_true(name: str, value: bool) -> Figure:
    return Figure(name, "yes" if value else "no", "yes", value)


def aim(name: str, value: float, share: float) -> Figure:
    """What is hoped for: below it the part does not fail."""
    return Figure(name, value, f"aim: >= {share:g}")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a part runs."""

    device: torch.device
    folder: Path  # for its files

    @classmethod
    def of(cls, device: str, folder: Path) -> Site:
        if device == "cuda":
            torch.cuda.set_device(0)
        return cls(torch.device(device, 0) if device == "cuda" else torch.device(device), folder)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products where speed is measured."""
        return torch.bfloat16 if self.cuda else torch.float32

    def wait(self) -> None:
        """For the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def model(self, spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.1) -> Decoder:
        """Random weights, made where they live. Biases and norms are random too: a bug in them must show."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a model is made in float32 else, twice what it will take
        try:
            with torch.device(self.device):
                model = Decoder(spec)
        finally:
            torch.set_default_dtype(before)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = std if parameter.ndim > 1 else 0.1
                parameter.normal_(float(name.endswith("norm.weight")), scale, generator=generator)
        return model


def small_spec(site: Site, **changes: Any) -> ModelSpec:
    """A model that every part of the kernels' shapes occurs in: groups of query heads, biases, tied embeddings."""
    sizes = (256, 128, 2, 4, 2, 32, 192)
    if site.cuda:  # as wide as real heads, and as deep as rounding takes to show
        sizes = (4096, 512, 8, 8, 2, 64, 1024)
    return replace(ModelSpec("qwen2", *sizes, 1024, tied_embeddings=True, qkv_bias=True), **changes)


def tokens_of(number: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens."""
    return np.random.default_rng(seed).integers(0, vocab, (number, length)).tolist()


def training_samples(lengths: Sequence[int], vocab: int, prompt: int = 1, seed: int = 0) -> list[Sample]:
    """Sequences of random tokens, trained on from token `prompt` on."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for group, length in enumerate(lengths):
        mask = np.arange(length) >= prompt
        zeros = np.zeros(length, np.float32)
        samples.append(Sample(rng.integers(0, vocab, length), mask, zeros, mask.astype(np.float32), group))
    return samples


def differences(completions: Sequence[Completion], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """|sampling - training| log-probs of all sampled tokens."""
    pairs = [(sample_of(c), ours) for c, ours in zip(completions, logprobs, strict=True)]
    return np.concatenate([np.abs(s.behaviour_logprobs[s.loss_mask] - ours[s.loss_mask]) for s, ours in pairs])


def relative(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest |difference| / |theirs| of pairs of tensors, by their norms."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
