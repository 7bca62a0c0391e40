"""One decoder for training and decoding: Qwen2, Qwen3 and Llama, on packed rows of tokens.

There is no batch dimension and no padding: many documents form one row [T], and only attention knows where each ends.
Attention is an argument, so the trainer's packed kernel and an engine's paged cache share this code (invariant I1).
Modules have the names of Hugging Face checkpoints, so that `state_dict()` is the file format.

Shapes: [T] packed tokens, [C] hidden size, [H] query heads, [K] key/value heads, [D] head dimension, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pekoe.core.spec import ModelSpec
from pekoe.kernels import decoder_ops
from pekoe.model.lora import LoRA
from pekoe.model.protocol import Attention, Implementation, LanguageModel, Routing
from pekoe.model.rope import apply_rope, cos_sin, inverse_frequencies

_INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. Half precision is normalised in float32, float64 in itself."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if decoder_ops.usable(x):
            return decoder_ops.rms_norm(x, self.weight, self.eps)
        # Not F.rms_norm: it multiplies by the weight before rounding to bf16, transformers and the engines after.
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        c, h, k, d = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(c, h * d, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(c, k * d, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(c, k * d, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(h * d, c, bias=spec.out_bias)
        self.q_norm = RMSNorm(d, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(d, spec.norm_eps) if spec.qk_norm else None

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        # [T, H, D], [T, K, D], [T, K, D]
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if decoder_ops.usable(q):
            decoder_ops.rope_(q, k, cos, sin)
        else:  # under autocast the norms and the rotation are in float32; the kernels want one dtype
            q, k = apply_rope(q, cos, sin).to(v.dtype), apply_rope(k, cos, sin).to(v.dtype)
        return self.o_proj(attention(layer, q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        c, m = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(c, m, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(c, m, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(m, c, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(decoder_ops.silu_mul(gate, up) if decoder_ops.usable(gate) else F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = SelfAttention(spec)
        self.mlp = MLP(spec)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.with_gradient: Callable[..., Tensor] = self.compute
        """Replaces `compute` where gradients are enabled: the trainer's compiled or recomputed version."""

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        compute = self.with_gradient if torch.is_grad_enabled() else self.compute
        return compute(layer, x, cos, sin, attention)

    def compute(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + self.self_attn(layer, self.input_layernorm(x), cos, sin, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the language-model head; `Decoder.forward` runs it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


class Decoder(LanguageModel):
    """Our own model. `load_model` makes one from a checkpoint; `init_weights` fills a fresh one."""

    implementation: Implementation = "pekoe"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.hf_config: dict[str, Any] = {}
        self.assets: dict[str, bytes] = {}
        self.lora: LoRA | None = None
        self.model = Backbone(spec)
        self.lm_head = None if spec.tied_embeddings else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        # Plain attributes, not buffers: `.to(torch.bfloat16)` must not round the frequencies.
        self._inv_freq, self._rope_scaling = inverse_frequencies(spec.rope, spec.head_dim, spec.max_positions)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routing: Routing | None = None
    ) -> Tensor:
        """Hidden states [T, C] after the final norm, of int64 tokens [T] at positions [T] in their documents.

        Raises ValueError for a position at or beyond `spec.max_positions`, on CPU: on CUDA the check would wait for
        the device.
        """
        on_host = positions.device.type == "cpu" and type(positions) is Tensor  # fake tensors have no values
        if on_host and len(positions) and int(positions.max()) >= self.spec.max_positions:
            raise ValueError(f"position: expected < {self.spec.max_positions}, got {int(positions.max())}")
        assert routing is None, "a dense decoder has no experts"
        x = self.model.embed_tokens(tokens)
        self._inv_freq = self._inv_freq.to(x.device)
        cos, sin = cos_sin(positions, self._inv_freq, self._rope_scaling, x.dtype)  # once, for all layers
        for i, layer in enumerate(self.model.layers):
            x = layer(i, x, cos, sin, attention)
        return self.model.norm(x)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def wrap_blocks(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.with_gradient = wrap(layer.with_gradient)

    def file_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(weights)

    @property
    def head(self) -> Tensor:
        return self.head_weight

    @property
    def head_weight(self) -> Tensor:
        """The language-model head [V, C]: the embeddings themselves where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities [T, V] of the next token, from hidden states [T, C] (any T rows of them)."""
        return F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter: matrices normal, norms 1, biases 0. The same seed gives the same values anywhere.

        Projections into the residual stream are scaled by 1 / sqrt(2 * num_layers) (GPT-2, section 2.3).
        """
        generator = torch.Generator("cpu").manual_seed(seed)  # on CPU, wherever the parameters are
        residual_std = _INIT_STD / (2 * self.spec.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
                parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
