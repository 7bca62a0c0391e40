"""Which experts tokens went to, recorded and replayed (R3, "Rollout Routing Replay": arXiv:2510.11370).

An engine and a trainer round otherwise, and where two experts' scores are near, each may choose its own: the log-probs
of such tokens differ by far more than rounding. With the experts that were sampled with the rounding alone is left.

A recorded routing is [T, layers, k] of uint8 (int16 from 256 experts on), where `layers` are those that have experts. A
token that no engine computed, as the last of a response, has MISSING there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.core.types import RoutingArray, missing_expert
from pekoe.model.attention import PackedAttention
from pekoe.model.protocol import LanguageModel, Routing

_CHECKED = 6  # tokens of the forward that shows whether a family's routing can be replayed


def routing_shape(spec: ModelSpec) -> tuple[int, int, torch.dtype]:
    """(layers that have experts, experts of a token, dtype) of a model's recorded routing."""
    assert isinstance(spec, FamilySpec), "checked by `check_routing`"
    dtype = torch.uint8 if spec.num_experts < 256 else torch.int16
    return len(spec.mixtures), spec.experts_per_token, dtype


def routing_of_all_layers(spec: ModelSpec, experts: NDArray[np.integer[Any]], num_tokens: int) -> RoutingArray:
    """A recorded routing from the experts [num_tokens * all layers * k] that a server gives, those of layers without
    any included. ValueError where these are not so many, or not k different experts for each token."""
    _, k, dtype = routing_shape(spec)
    assert isinstance(spec, FamilySpec)
    if experts.size != (expected := num_tokens * spec.num_layers * k):
        raise ValueError(f"expected {expected} experts of {num_tokens} tokens, got {experts.size}")
    places = [next(int(part) for part in name.split(".") if part.isdecimal()) for name in spec.mixtures]
    chosen = experts.reshape(num_tokens, spec.num_layers, k)[:, places]
    if spec.num_experts > 1 and not chosen.any():
        raise ValueError("got expert 0 for every token and layer, as from kernels for experts that record nothing")
    ordered = np.sort(chosen, -1)
    if ordered.min() < 0 or ordered.max() >= spec.num_experts or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"expected {k} different experts of {spec.num_experts} for each token and layer, got others")
    return chosen.astype(np.uint8 if dtype is torch.uint8 else np.int16)


class OwnRouting:
    """Tokens go to the experts that routers choose."""

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        return chosen

    def routed(self, layer: int, logits: Tensor | None, experts: Tensor) -> None:
        """Nothing is kept."""


class Replay(OwnRouting):
    """Tokens go to the experts of a recorded routing [T, layers, k]; where it has none, to those of their routers."""

    def __init__(self, recorded: Tensor) -> None:
        self._recorded = recorded
        self._missing = missing_expert(recorded.dtype.itemsize)

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        recorded = self._recorded[:, layer].to(chosen.dtype)
        return torch.where(recorded == self._missing, chosen, recorded)


class Balance:
    """How unevenly the tokens of each sequence went to experts, with the gradient of the routers' probabilities.

    Of a sequence s of T tokens, and a layer of E experts: E sum_e f_e P_e, where f_e is the number of tokens that went
    to expert e, by T, and P_e the mean of the router's softmax (Switch Transformer, arXiv:2101.03961, eq. 4 to 6); k,
    the experts of a token, where all is even. By sequence, as DeepSeek-V3 has it (arXiv:2412.19437, eq. 17 to 20), so
    that it does not depend on what shares a micro-batch (I2); the mean over layers.

    Args:
        routing: chooses the experts.
        sequence: [T] the sequence that each token is of, of `sizes` [B] tokens.
    """

    def __init__(self, routing: Routing, sequence: Tensor, sizes: Tensor) -> None:
        self._routing, self._sequence, self._sizes = routing, sequence, sizes
        self._losses: dict[int, Tensor] = {}

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        return self._routing.choose(layer, chosen)

    def routed(self, layer: int, logits: Tensor | None, experts: Tensor) -> None:
        assert logits is not None, "checked by `check_balance`"
        probabilities = logits.float().softmax(-1)
        went = torch.zeros_like(probabilities).scatter_(1, experts, 1.0)
        both = torch.stack([probabilities, went])  # [2, T, E]
        sums = both.new_zeros(2, len(self._sizes), both.shape[-1]).index_add_(1, self._sequence, both)
        means, shares = sums / self._sizes[:, None]
        self._losses[layer] = logits.shape[-1] * (means * shares).sum(-1)

    def losses(self) -> Tensor:
        """[B] of each sequence, when the forward is done."""
        return torch.stack(list(self._losses.values())).mean(0)


def check_balance(model: LanguageModel) -> None:
    """UserError for a model whose experts no loss can balance."""
    family, spec = model.spec.family, model.spec
    if not isinstance(spec, FamilySpec) or not spec.mixtures:
        why = "which has no experts"
    elif not spec.routers:
        why = "for whose routers transformers has no such loss"
    else:
        check_routing(model)
        return
    raise UserError(f"train.balance_loss: expected 0 for {family}, {why}, got more")


@torch.no_grad()
def check_routing(model: LanguageModel) -> None:
    """UserError for a model whose choice of experts cannot be recorded and replayed."""
    if not isinstance(model.spec, FamilySpec) or not model.spec.mixtures:
        raise UserError(
            f"rollout.replay_routing: expected false for {model.spec.family}, which has no experts, got true"
        )
    device = next(model.parameters()).device
    tokens = torch.zeros(_CHECKED, dtype=torch.int64, device=device)
    model(tokens, torch.arange(_CHECKED, device=device), PackedAttention([0, _CHECKED]), OwnRouting())
