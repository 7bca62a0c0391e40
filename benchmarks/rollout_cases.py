"""What `bench_rollout.py` measures: models, prompts, lengths. No torch, nothing random but by a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["equal", "ragged"]
SIGMA = 0.7  # of the logarithm of ragged lengths


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the Qwen2 family (biases on q, k, v), and how much of it one measurement takes."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    sequences: dict[int, int]  # prompt length -> responses at once
    median: int  # of response lengths; equal lengths are all this
    clip: tuple[int, int]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim

    def spec(self, max_positions: int) -> dict[str, Any]:
        """The arguments of `pekoe.core.spec.ModelSpec`."""
        return {
            "family": "qwen2",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "max_positions": max_positions,
            "tied_embeddings": True,
            "qkv_bias": True,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        # For tests and for trying the benchmark itself.
        Shape("nano", 96, 64, 2, 2, 1, 96, {64: 8, 512: 8}, 4, (2, 8)),
        Shape("tiny", 512, 128, 4, 4, 2, 384, {64: 512, 512: 128}, 64, (8, 256)),
        Shape("small", 4096, 512, 8, 8, 2, 1536, {64: 256, 512: 64}, 64, (8, 256)),
        # So few and so short that a measurement stays below a minute on two cores.
        Shape("q0.5b", 151936, 896, 24, 14, 2, 4864, {64: 16, 512: 4}, 16, (4, 64)),
        Shape("q1.5b", 151936, 1536, 28, 12, 2, 8960, {64: 2048, 512: 2048}, 2048, (32, 8192)),
    )
}


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure, for every system alike."""

    shape: Shape
    n: int  # responses a prompt
    prompt_tokens: int
    kind: Kind

    @property
    def num_prompts(self) -> int:
        return max(1, self.shape.sequences[self.prompt_tokens] // self.n)

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.n

    @property
    def is_headline(self) -> bool:
        """The cases that claims are made of."""
        return self.n == 16 and self.prompt_tokens == 64

    @property
    def name(self) -> str:
        return f"{self.shape.name}, n {self.n}, prompt {self.prompt_tokens}, {self.kind}"

    def lengths(self) -> list[list[int]]:
        """Tokens of each response [prompts][n], the same in every round."""
        shape, rng = self.shape, random.Random(0)
        if self.kind == "equal":
            return [[shape.median] * self.n for _ in range(self.num_prompts)]
        low, high = shape.clip
        drawn = (round(rng.lognormvariate(math.log(shape.median), SIGMA)) for _ in range(self.num_sequences))
        flat = [min(max(length, low), high) for length in drawn]
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]

    def prompts(self, seed: int) -> list[list[int]]:
        """Random token ids [prompts][prompt_tokens]; other ones for each seed, or caches would answer."""
        rng = random.Random(f"{self.name} {seed}")
        return [rng.choices(range(self.shape.vocab), k=self.prompt_tokens) for _ in range(self.num_prompts)]

    def request(self, seed: int) -> dict[str, Any]:
        """What a worker is asked; see `rollout_worker`."""
        return {"do": "generate", "prompts": self.prompts(seed), "lengths": self.lengths(), "seed": seed}

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths()))


def cases_of(shape: Shape, ns: Sequence[int], prompts: Sequence[int], kinds: Sequence[Kind]) -> list[Case]:
    """All cases of a model, headline ones first."""
    cases = [Case(shape, n, length, kind) for length in prompts for n in sorted(ns, reverse=True) for kind in kinds]
    return sorted(cases, key=lambda case: not case.is_headline)


def unrelated(request: dict[str, Any], vocab: int) -> dict[str, Any]:
    """The same sequences as `request`, each a prompt of its own whose first token nobody else's begins with (as far as
    the vocabulary goes), so that no block of KV can be shared."""
    prompts: list[list[int]] = []
    lengths: list[list[int]] = []
    for prompt, wanted in zip(request["prompts"], request["lengths"], strict=True):
        for length in wanted:
            prompts.append([(len(prompts) + request["seed"]) % vocab, *prompt[1:]])
            lengths.append([length])
    return request | {"prompts": prompts, "lengths": lengths}


@dataclass(frozen=True, slots=True)
class Room:
    """What a model's cases need of an engine, the same for every system."""

    sequences: int
    longest: int  # prompt and response
    kv_tokens: int

    def options(self, shape: Shape, itemsize: int) -> dict[str, Any]:
        return {
            "max_running": self.sequences,
            "max_tokens": self.longest,
            "kv_tokens": self.kv_tokens,
            "kv_bytes": self.kv_tokens * shape.kv_values_per_token * itemsize,
        }


_BLOCK = 32  # vLLM's on CPU: the largest


def room_for(cases: Sequence[Case]) -> Room:
    """Enough for all of the cases, nothing shared."""

    def kv_tokens(case: Case) -> int:
        whole = (-(-(case.prompt_tokens + length) // _BLOCK) * _BLOCK for row in case.lengths() for length in row)
        return sum(whole) + 2 * _BLOCK

    longest = max(case.prompt_tokens + max(map(max, case.lengths())) for case in cases)
    return Room(max(case.num_sequences for case in cases), longest, max(map(kv_tokens, cases)))


def seeds(first: int = 0) -> Iterator[int]:
    """Seeds that have not been used before."""
    while True:
        first += 1
        yield first
