"""The shape of a model as costs need it: parameters (all, and those a token uses), KV, attention. No torch.

A `ModelSpec` describes what Pekoe trains; a `Shape` also covers mixtures of experts, latent and linear attention, whose
published figures the planner is measured against.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Shape:
    """Letters as in `core.spec`: V vocabulary, C hidden, H heads, K key/value heads, D head."""

    name: str
    num_layers: int
    hidden: int  # C
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    dense_width: int  # intermediate size of dense layers
    vocab: int  # V
    tied: bool = False
    num_experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0  # of experts that every token uses
    dense_layers: int = 0  # leading layers without experts, in a mixture
    full_layers: int | None = None  # those whose attention sees everything; None: all. Others keep a bounded state
    kv_width: int | None = None  # numbers a token leaves in a layer; None: 2 K D (latent attention stores fewer)
    attention: int | None = None  # parameters of a layer's attention; None: C D (2 H + 2 K)
    gated: bool = True  # three matrices in the MLP, else two

    @property
    def attention_parameters(self) -> int:
        return self.attention or self.hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def _matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def expert_layers(self) -> int:
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.hidden * self.expert_width

    @property
    def common_parameters(self) -> int:
        """Of all layers, without routed experts: every token uses them."""
        dense = self._matrices * self.hidden * self.dense_width * (self.num_layers - self.expert_layers)
        shared = 3 * self.hidden * self.shared_width * self.expert_layers
        return self.num_layers * self.attention_parameters + dense + shared

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        experts = self.expert_layers * self.num_experts * self.expert_parameters
        return self.common_parameters + experts + self.head_parameters * (1 if self.tied else 2)

    @property
    def layer_active(self) -> int:
        """Parameters of all layers that one token is multiplied with."""
        return self.common_parameters + self.expert_layers * self.top_k * self.expert_parameters

    def touched(self, num_tokens: float) -> float:
        """Parameters that a forward of so many tokens reads: of experts, as many as independent choices hit."""
        hit = 1 - (1 - self.top_k / self.num_experts) ** num_tokens if self.num_experts else 0.0
        experts = self.expert_layers * self.num_experts * self.expert_parameters * hit
        return self.common_parameters + self.head_parameters + experts

    @property
    def attending_layers(self) -> int:
        return self.num_layers if self.full_layers is None else self.full_layers

    @property
    def kv_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache."""
        return self.attending_layers * (self.kv_width or 2 * self.num_kv_heads * self.head_dim)


def _qwen(name: str, *sizes: int, tied: bool = False, head: int = 128) -> Shape:
    layers, hidden, heads, kv, width = sizes
    return Shape(name, layers, hidden, heads, kv, head, width, 151_936, tied)


_KNOWN = (
    _qwen("qwen2.5-0.5b", 24, 896, 14, 2, 4864, tied=True, head=64),
    _qwen("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, tied=True),
    _qwen("qwen2.5-3b", 36, 2048, 16, 2, 11008, tied=True),
    _qwen("qwen2.5-7b", 28, 3584, 28, 4, 18944),
    _qwen("qwen2.5-14b", 48, 5120, 40, 8, 13824),
    _qwen("qwen2.5-32b", 64, 5120, 40, 8, 27648),
    _qwen("qwen2.5-72b", 80, 8192, 64, 8, 29568),
    _qwen("qwen3-0.6b", 28, 1024, 16, 8, 3072, tied=True),
    _qwen("qwen3-1.7b", 28, 2048, 16, 8, 6144, tied=True),
    _qwen("qwen3-4b", 36, 2560, 32, 8, 9728, tied=True),
    _qwen("qwen3-8b", 36, 4096, 32, 8, 12288),
    _qwen("qwen3-14b", 40, 5120, 40, 8, 17408),
    _qwen("qwen3-32b", 64, 5120, 64, 8, 25600),
    Shape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 0, 151_936, num_experts=128, top_k=8, expert_width=768),
    Shape("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 0, 151_936, num_experts=128, top_k=8, expert_width=1536),
    Shape("qwen3.5-9b", 32, 4096, 16, 4, 256, 12288, 248_320, full_layers=8),
    Shape("qwen3.5-35b-a3b", 40, 2048, 16, 2, 256, 0, 248_320, False, 256, 8, 512, 512, full_layers=10),
    Shape("llama-7b", 32, 4096, 32, 32, 128, 11008, 32_000),
    Shape("llama-13b", 40, 5120, 40, 40, 128, 13824, 32_000),
    Shape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32_000),
    Shape("llama-3-1b", 16, 2048, 32, 8, 64, 8192, 128_256, True),
    Shape("llama-3-3b", 28, 3072, 24, 8, 128, 8192, 128_256, True),
    Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128_256),
    Shape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128_256),
    Shape("llama-3-405b", 126, 16384, 128, 8, 128, 53248, 128_256),
    Shape("mixtral-8x7b", 32, 4096, 32, 8, 128, 0, 32_000, False, 8, 2, 14336),
    Shape("mixtral-8x22b", 56, 6144, 48, 8, 128, 0, 32_768, False, 8, 2, 16384),
    Shape("gpt-oss-20b", 24, 2880, 64, 8, 64, 0, 201_088, False, 32, 4, 2880, full_layers=12),
    Shape("gpt-oss-120b", 36, 2880, 64, 8, 64, 0, 201_088, False, 128, 4, 2880, full_layers=18),
    Shape("deepseek-v3", 61, 7168, 128, 128, 128, 18432, 129_280, False, 256, 8, 2048, 2048, 3, None, 576, 187_000_000),
    Shape("kimi-k2", 61, 7168, 64, 64, 128, 18432, 163_840, False, 384, 8, 2048, 2048, 1, None, 576, 101_000_000),
    Shape("glm-4.5-air", 46, 4096, 96, 8, 128, 10944, 151_552, False, 128, 8, 1408, 1408, 1),
    Shape("glm-4.5", 92, 5120, 96, 8, 128, 12288, 151_552, False, 160, 8, 1536, 1536, 3),
    Shape("megatron-22b", 48, 6144, 64, 64, 96, 24576, 51_200, True, gated=False),
    Shape("gpt3-175b", 96, 12288, 96, 96, 128, 49152, 51_200, True, gated=False),
    Shape("turing-530b", 105, 20480, 128, 128, 160, 81920, 51_200, True, gated=False),
    Shape("megatron-1t", 128, 25600, 160, 160, 160, 102400, 51_200, True, gated=False),
)
SHAPES = {shape.name: shape for shape in _KNOWN}
# Other names of the same shapes, as a regular expression on the lower-case name.
_ALIASES = (
    (r"r1-distill-qwen[- ]?1\.5b|qwen2(\.5)?(-math)?-1\.5b|distill 1\.5b", "qwen2.5-1.5b"),
    (r"r1-distill-qwen[- ]?7b|qwen2(\.5)?(-math|-coder)?-7b|distill 7b", "qwen2.5-7b"),
    (r"r1-distill-qwen[- ]?14b|qwen2(\.5)?-14b", "qwen2.5-14b"),
    (r"r1-distill-qwen[- ]?32b|qwen2(\.5)?-32b|distill 32b|qwq-32b", "qwen2.5-32b"),
    (r"qwen2(\.5)?(-math)?-72b", "qwen2.5-72b"),
    (r"qwen3-30b", "qwen3-30b-a3b"), (r"qwen3-235b", "qwen3-235b-a22b"), (r"qwen3\.5-35b", "qwen3.5-35b-a3b"),
    (r"llama-?3(\.\d)?-8b|r1-distill-llama-8b", "llama-3-8b"), (r"llama-?3(\.\d)?-70b", "llama-3-70b"),
    (r"llama-?3(\.\d)?-405b", "llama-3-405b"), (r"llama-?3\.2-1b", "llama-3-1b"), (r"llama-?3\.2-3b", "llama-3-3b"),
    (r"llama-?2?-7b|^7b \(llama", "llama-7b"), (r"llama-?2?-13b|^13b \(llama", "llama-13b"),
    (r"deepseek[- ]?(v3|r1)", "deepseek-v3"), (r"kimi[- ]?k2", "kimi-k2"),
    (r"glm-4\.5-air|intellect-3", "glm-4.5-air"), (r"glm-4\.[567](-355b)?(?!-9b|v)", "glm-4.5"),
)  # fmt: skip


def recognise_model(text: str, parameters: float | None = None) -> Shape | None:
    """The shape of a model that a source names; by its parameters, a dense model between known ones, where it is not.

    Returns None where neither is known.
    """
    name = text.lower()
    for key in sorted(SHAPES, key=len, reverse=True):
        if key in name:
            return SHAPES[key]
    for pattern, key in _ALIASES:
        if re.search(pattern, name):
            return SHAPES[key]
    mixture = re.search(r"-a\d+(\.\d+)?b|moe|v3|v4|ultra|glm|\d\s?t\b", name)
    return None if mixture or not parameters else dense_of(parameters, text)


def dense_of(parameters: float, name: str = "dense") -> Shape:
    """A dense model of about so many parameters: the known Qwen nearest to it, its layers scaled."""
    known = [shape for shape in _KNOWN if shape.name.startswith("qwen") and not shape.num_experts]
    near = min(known, key=lambda shape: abs(shape.num_parameters / parameters - 1))
    per_layer = near.common_parameters / near.num_layers
    layers = max(1, round(near.num_layers + (parameters - near.num_parameters) / per_layer))
    return replace(near, name=name, num_layers=layers)
