"""The fewest floating-point operations and bytes that a phase needs, and how near to a machine's ceilings it came.

A multiply-add of a matrix product counts 2 operations, and twice as many backward; attention counts each sequence's
causal triangle; recomputation counts nothing. Bytes are a lower bound: weights once a pass, KV whenever attention reads
it, no activations. No phase is faster than its operations or its bytes allow (Williams et al. 2009, Roofline).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pekoe.core.spec import FamilySpec, ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_OPTIMIZER_BYTES = 7 * 4  # a parameter: itself, its gradient and two moments read, all but the gradient written


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
    """Measured rates of a machine, a second: operations of a matrix product, and bytes of memory."""

    flop_s: float
    byte_s: float

    def reached(self, flops: float, num_bytes: float, seconds: float) -> tuple[float, str]:
        """The least possible time as a share of `seconds`, and which of the two bounds it."""
        arithmetic, memory = flops / self.flop_s, num_bytes / self.byte_s
        return max(arithmetic, memory) / seconds, "arithmetic" if arithmetic >= memory else "memory"


def training_flops(spec: ModelSpec, lengths: Iterable[int], num_targets: int, adapter: int = 0) -> Flops:
    """FLOPs of a forward and backward over sequences of `lengths` tokens, of which `num_targets` are predicted.

    With an adapter of so many parameters the base's weights have no gradient: a third of their work is left out.
    """
    lengths = list(lengths)
    whole = _flops(spec, lengths, num_targets, 3)
    if not adapter:
        return whole
    return Flops(whole.linear * 2 / 3 + 6.0 * adapter * sum(lengths), whole.head * 2 / 3, whole.attention)


def training_bytes(spec: ModelSpec, num_microbatches: int, num_steps: int, dtype: str, adapter: int = 0) -> float:
    """Weights forward and backward and the gradient for each micro-batch, and AdamW in float32 for each step; of an
    adapter's base, the weights alone."""
    trained = adapter or spec.num_parameters
    frozen = spec.num_parameters if adapter else 0
    per_pass = ITEM_BYTES[dtype] * num_microbatches
    return float((3 * trained + 2 * frozen) * per_pass + _OPTIMIZER_BYTES * num_steps * trained)


def adapter_parameters(spec: ModelSpec, rank: int, targets: Sequence[str] = ()) -> int:
    """Parameters of an adapter (LoRA) on layers whose names end so; none: on all linear layers but the head."""
    if isinstance(spec, FamilySpec):
        ends = tuple(f".{target}" for target in targets)
        return rank * sum(size for name, size in spec.linears if not targets or f".{name}".endswith(ends))
    c, m, q, kv = spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads
    sizes = {
        "self_attn.q_proj": c + q * spec.head_dim,
        "self_attn.k_proj": c + kv * spec.head_dim,
        "self_attn.v_proj": c + kv * spec.head_dim,
        "self_attn.o_proj": q * spec.head_dim + c,
        "mlp.gate_proj": c + m,
        "mlp.up_proj": c + m,
        "mlp.down_proj": m + c,
    }
    names = [(f".model.layers.{i}.{name}", size) for i in range(spec.num_layers) for name, size in sizes.items()]
    return rank * sum(size for name, size in names if not targets or name.endswith(tuple(f".{t}" for t in targets)))


def sampling_flops(spec: ModelSpec, groups: Sequence[tuple[int, Sequence[int]]]) -> Flops:
    """FLOPs of groups (prompt length, response lengths): the prompt once, then a pass for each token."""
    total = Flops(0.0, 0.0, 0.0)
    for prompt, lengths in groups:
        whole = _flops(spec, [prompt + max(0, n - 1) for n in lengths], sum(lengths), 1)  # the last has no pass
        shared, saved = max(0, len(lengths) - 1), _flops(spec, [prompt], 0, 1)
        total = Flops(
            total.linear + whole.linear - shared * saved.linear,
            total.head + whole.head,
            total.attention + whole.attention - shared * saved.attention,
        )
    return total


def sampling_bytes(
    spec: ModelSpec, groups: Sequence[tuple[int, Sequence[int]]], num_forwards: int, dtype: str
) -> float:
    """Weights for each forward, and KV: a response's own at each of its tokens, its prompt's once for a whole group."""
    embedding = spec.vocab_size * spec.hidden_size  # a row a token is read where it is not the head too
    weights = spec.num_parameters - (0 if spec.tied_embeddings else embedding)
    kv = sum(prompt * max(lengths, default=0) + sum(n * (n + 1) // 2 for n in lengths) for prompt, lengths in groups)
    return float((weights * num_forwards + spec.kv_values_per_token * kv) * ITEM_BYTES[dtype])


def _flops(spec: ModelSpec, lengths: Sequence[int], num_targets: int, passes: int) -> Flops:
    c, d = spec.hidden_size, spec.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Flops(
        linear=2.0 * passes * spec.num_matrix_values * sum(lengths),
        head=2.0 * passes * c * spec.vocab_size * num_targets,
        attention=4.0 * passes * spec.num_layers * spec.num_heads * d * pairs,  # scores and values
    )
