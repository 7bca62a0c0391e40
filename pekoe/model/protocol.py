"""What the house knows of a model, for training and for decoding: our decoder and transformers' modules alike.

Shapes: [T] packed tokens, [C] hidden size, [H] query heads, [V] vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from pekoe.core.spec import ModelSpec
from pekoe.model.lora import LoRA

Implementation = Literal["pekoe", "transformers"]
Head = Tensor | Callable[[Tensor], Tensor]
"""The weight [V, C] that hidden states are multiplied by, or a function of hidden states [N, C] to logits [N, V]."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a layer's scores have beside q k / sqrt(D). Example: Scores(scale=0.0625, window=4096, softcap=50.0)."""

    scale: float | None = None  # in place of 1 / sqrt(D)
    window: int | None = None  # tokens that a token sees, itself the last of them
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    sinks: Tensor | None = None  # [H] scores of one more key, whose value is 0


class Attention(Protocol):
    """The attention of one forward, called once per layer, in order. It may keep a cache (an engine's paged KV)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores | None = None) -> Tensor:
        """Attend with q [T, H, D], already rotated, over k [T, K, D] and v [T, K, E]. Returns [T, H, E]."""
        ...


class Routing(Protocol):
    """Which experts the tokens of one forward go to. `layer` counts the layers that have experts."""

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        """The experts [T, k] that tokens go to, where the router chose `chosen` [T, k]."""
        ...

    def routed(self, layer: int, logits: Tensor | None, experts: Tensor) -> None:
        """Told that tokens went to `experts` [T, k], by the router's `logits` [T, E]; None: it is not known which."""
        ...


class LanguageModel(nn.Module, ABC):
    """A decoder-only language model on packed rows of tokens.

    `hf_config` is the checkpoint's config.json, `assets` its tokenizer and generation files by name; `save_model`
    writes both back. Parameters have their names in memory; `file_tensors` gives those of files.
    """

    implementation: Implementation
    spec: ModelSpec
    hf_config: dict[str, Any]
    assets: dict[str, bytes]
    lora: LoRA | None  # where layers have adapters (`model.lora`)

    @abstractmethod
    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routing: Routing | None = None
    ) -> Tensor:
        """Hidden states [T, C] after the final norm, of int64 tokens [T] at positions [T] in their documents.

        `routing` of a mixture of experts may choose other experts than its routers do. The weights by which experts'
        outputs are summed are the routers' own for those experts, and gradients flow through them.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities [T, V] of the next token, from hidden states [T, C] (any T rows of them)."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """How hidden states become logits."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The layers, each of which FSDP shards alone."""

    @abstractmethod
    def wrap_blocks(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace each layer's forward where gradients are enabled: by its compiled or recomputed version."""

    def take_expert_loads(self) -> Tensor | None:
        """Tokens [layers, experts] that each expert was given in forwards with gradient since the last call; None for a
        model without experts. No token is dropped: each has the experts that its router chose."""
        return None

    @abstractmethod
    def file_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters by their names in memory -> tensors by their names in files."""
