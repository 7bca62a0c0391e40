"""A model's dimensions, and the parameters, FLOPs and bytes that follow from them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["qwen2", "qwen3", "llama"]  # of our own decoder
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. Fields beyond `theta` are used by the kinds that name them (see `model.rope`)."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one call of attention has. Example: LayerShape(32, 4, 128, 128, window=4096)."""

    num_heads: int  # H
    num_kv_heads: int  # K
    key_dim: int  # D of queries and keys
    value_dim: int  # D of values
    window: int | None = None
    """Tokens that a token sees, itself the last of them; None: its whole document."""
    plain: bool = True
    """No window, no soft cap, no sinks, and scores divided by sqrt(D)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder. Letters beside shapes: V vocabulary, C hidden, H heads, K key/value heads, D head."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    intermediate_size: int
    max_positions: int
    rope: RopeSpec = RopeSpec()
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary pairs), got {self.head_dim}")

    @property
    def num_layer_parameters(self) -> int:
        c, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = c * (q + 2 * kv) + q * c + 3 * c * self.intermediate_size
        biases = (q + 2 * kv) * self.qkv_bias + c * self.out_bias + (2 * self.intermediate_size + c) * self.mlp_bias
        return matrices + biases + 2 * c + 2 * self.head_dim * self.qk_norm

    @property
    def num_matrix_values(self) -> int:
        """Numbers that a token is multiplied by in all layers."""
        c, d = self.hidden_size, self.head_dim
        return self.num_layers * (c * d * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * c * self.intermediate_size)

    @property
    def attention_layers(self) -> tuple[LayerShape, ...]:
        """One for each call of attention in a forward, in order."""
        return (LayerShape(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim),) * self.num_layers

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_parameters + self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers (not bytes) that one token leaves in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class FamilySpec(ModelSpec):
    """The shape of a model that `transformers` computes. Fields of `ModelSpec` are as near as its config has them."""

    total: int = 0  # parameters
    active: int = 0  # of them, what a token meets: experts that its router leaves out are not among them
    num_experts: int = 0
    experts_per_token: int = 0
    mixtures: tuple[str, ...] = field(default=(), repr=False)
    """Names of the modules that have a router and its experts, one for each layer that has some."""
    routers: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """Names of their routers, with the place of the logits in what these return; empty where that is not known."""
    shapes: tuple[LayerShape, ...] = field(default=(), repr=False)
    linears: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """Names of linear layers but the head, with the sum of their two dimensions."""
    plan: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """How transformers splits it over processes: names of modules, and a style for each. Example:
    (("layers.*.self_attn.q_proj", "colwise"),)."""

    def __post_init__(self) -> None:
        """Heads are as the family has them."""

    @property
    def num_parameters(self) -> int:
        return self.total

    @property
    def num_layer_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return max(1, (self.total - embeddings) // self.num_layers)

    @property
    def num_matrix_values(self) -> int:
        return max(1, self.active - self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2))

    def dense(self) -> ModelSpec:
        """A dense decoder of about its active size and activations, for estimates."""
        c, d = self.hidden_size, self.head_dim + self.head_dim % 2
        rest = self.num_matrix_values // self.num_layers - c * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        kv_heads = self.num_kv_heads if self.num_heads % self.num_kv_heads == 0 else self.num_heads
        sizes = self.vocab_size, c, self.num_layers, self.num_heads, kv_heads, d, max(1, rest // (3 * c))
        return ModelSpec("llama", *sizes, self.max_positions, tied_embeddings=self.tied_embeddings)

    @property
    def attention_layers(self) -> tuple[LayerShape, ...]:
        return self.shapes

    @property
    def kv_values_per_token(self) -> int:
        return sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in self.shapes)
