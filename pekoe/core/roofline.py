"""Floating-point operations and bytes that a phase cannot do without, and how near to a machine's ceilings it came.

Counts after the mathematics: 2 operations for each multiply-add of each matrix product, twice as many backward,
attention within each sequence's causal triangle alone; whatever is computed again is not counted again. Bytes are a
least: weights once a pass, KV as often as attention reads it, activations not at all. The idea is Williams, Waterman
and Patterson's (Roofline, 2009): what is done cannot take less time than either its operations or its bytes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pekoe.core.spec import ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_OPTIMIZER_BYTES = 7 * 4  # of a parameter: itself, its gradient and two moments read, all but the gradient written


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one forward, or of a forward and backward."""

    linear: float  # of the layers' weights
    head: float  # of the output embedding
    attention: float

    @property
    def matmul(self) -> float:
        return self.linear + self.head

    @property
    def total(self) -> float:
        return self.matmul + self.attention


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine was measured to do: operations of a matrix product, and bytes of memory, in a second."""

    flop_s: float
    byte_s: float

    def reached(self, flops: float, num_bytes: float, seconds: float) -> tuple[float, str]:
        """The least time that this can take, as a share of `seconds`, and which of the two bounds it."""
        arithmetic, memory = flops / self.flop_s, num_bytes / self.byte_s
        return max(arithmetic, memory) / seconds, "arithmetic" if arithmetic >= memory else "memory"


def training_flops(spec: ModelSpec, lengths: Iterable[int], num_targets: int) -> Flops:
    """Of a forward and backward over sequences of `lengths` tokens, of which `num_targets` are predicted."""
    return _flops(spec, list(lengths), num_targets, 3)


def training_bytes(spec: ModelSpec, num_microbatches: int, num_steps: int, dtype: str) -> float:
    """Weights forward and backward and the gradient for each micro-batch, and AdamW in float32 for each step."""
    each = 3 * ITEM_BYTES[dtype] * num_microbatches + _OPTIMIZER_BYTES * num_steps
    return float(each * spec.num_parameters)


def sampling_flops(spec: ModelSpec, groups: Sequence[tuple[int, Sequence[int]]]) -> Flops:
    """Of groups, each a prompt's length with those of its responses: the prompt once, then a pass for each token."""
    found = Flops(0.0, 0.0, 0.0)
    for prompt, lengths in groups:
        whole = _flops(spec, [prompt + max(0, n - 1) for n in lengths], sum(lengths), 1)  # the last is only chosen
        again, saved = max(0, len(lengths) - 1), _flops(spec, [prompt], 0, 1)  # the others share the first's
        found = Flops(
            found.linear + whole.linear - again * saved.linear,
            found.head + whole.head,
            found.attention + whole.attention - again * saved.attention,
        )
    return found


def sampling_bytes(
    spec: ModelSpec, groups: Sequence[tuple[int, Sequence[int]]], num_forwards: int, dtype: str
) -> float:
    """Weights for each forward, and KV: a response's own at each of its tokens, its prompt's once for a whole group."""
    embedding = spec.vocab_size * spec.hidden_size  # a row a token is read where it is not the head too
    weights = spec.num_parameters - (0 if spec.tied_embeddings else embedding)
    kv = sum(prompt * max(lengths, default=0) + sum(n * (n + 1) // 2 for n in lengths) for prompt, lengths in groups)
    return float((weights * num_forwards + spec.kv_values_per_token * kv) * ITEM_BYTES[dtype])


def _flops(spec: ModelSpec, lengths: Sequence[int], num_targets: int, passes: int) -> Flops:
    c, d, m = spec.hidden_size, spec.head_dim, spec.intermediate_size
    weights = c * d * (2 * spec.num_heads + 2 * spec.num_kv_heads) + 3 * c * m
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Flops(
        linear=2.0 * passes * spec.num_layers * weights * sum(lengths),
        head=2.0 * passes * c * spec.vocab_size * num_targets,
        attention=4.0 * passes * spec.num_layers * spec.num_heads * d * pairs,  # scores and values
    )
