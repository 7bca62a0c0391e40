"""LoRA (Hu et al. 2021, arXiv:2106.09685): frozen linear layers with trained factors of low rank beside them.

y = base(x) + alpha / rank * B(A(x)), with A [rank, in] random and B [out, rank] zero, so that the model before the
first update is the base. Layers are found by their names in any module; names and scale are those of PEFT, whose
directories `peft.py` reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pekoe.core.errors import UserError, nearest

_HEAD = "lm_head"  # its weight is used without its module
BASE, A, B = "base_layer", "lora_A", "lora_B"  # PEFT's names of the parts of an adapted layer


@dataclass(frozen=True, slots=True)
class LoRA:
    """Which layers are adapted, and the base that they belong to.

    Example: LoRA(32, 32.0, ("q_proj", "v_proj"), "/models/base", "9f86d0…").
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]  # as in PEFT: the ends of layers' names, from a dot on
    base: str = ""  # the base's directory
    digest: str = ""  # of its weights; empty: not known

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """A linear layer with an adapter: [..., in] -> [..., out]. The base is frozen; factors are in float32 or wider."""

    def __init__(self, base: nn.Linear, lora: LoRA) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        factor = partial(nn.Linear, bias=False, device=base.weight.device, dtype=dtype)
        self.lora_A, self.lora_B = factor(base.in_features, lora.rank), factor(lora.rank, base.out_features)
        self.scale, self.active = lora.scale, True

    @property
    def weight(self) -> Tensor:
        """The sum, for families that multiply by a layer's weight themselves (routers)."""
        weight = self.base_layer.weight
        return _sum(weight, self.lora_A.weight, self.lora_B.weight, self.scale).to(weight) if self.active else weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if not self.active:
            return out
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        return out + (self.scale * self.lora_B(self.lora_A(x))).to(out.dtype)


def add_lora(model: nn.Module, lora: LoRA, seed: int) -> LoRA:
    """Freeze `model` and give its layers adapters, in place; A is random by `seed`, the same on any device.

    Args:
        lora: its `targets` are the ends of layers' names; none: every linear layer but the head.

    Returns `lora` with the targets that were meant. UserError for a target that is no layer, and for a rank above a
    dimension of a layer.
    """
    # Not of a class derived from it: some routers are, and return more than a product.
    layers = {n: module for n, module in model.named_modules() if type(module) is nn.Linear}
    layers = {name: module for name, module in layers.items() if name.rpartition(".")[2] != _HEAD}
    leaves = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    targets = lora.targets or leaves
    for target in targets:
        if not any(_meant(name, [target]) for name in layers):
            raise UserError(
                f"model.lora.targets: expected names of linear layers (not the head), or their ends, got {target!r}."
                f"{nearest(target, leaves if '.' not in target else layers)}"
            )
    chosen = {name: module for name, module in layers.items() if _meant(name, targets)}
    if not chosen:
        raise UserError("model.lora: expected a model with linear layers, got one that has none of torch's")
    least, narrow = min((min(module.in_features, module.out_features), name) for name, module in chosen.items())
    if lora.rank > least:
        raise UserError(
            f"model.lora.rank: expected at most the smaller dimension of each layer, {least} of {narrow}, got "
            f"{lora.rank}; nearest: {least}, or model.lora.targets without it"
        )
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, module in chosen.items():
        adapted = LoRALinear(module, lora)
        bound = module.in_features**-0.5  # as PEFT: kaiming_uniform_ with a = sqrt(5)
        with torch.no_grad():
            values = torch.empty(adapted.lora_A.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            adapted.lora_A.weight.copy_(values)
            adapted.lora_B.weight.zero_()
        _replace(model, name, adapted)
    return LoRA(lora.rank, lora.alpha, tuple(targets), lora.base, lora.digest)


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model is its base, as long as the context lasts."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Add every adapter to its base, and remove it: the model has plain linear layers again, which are not frozen."""
    for name, layer in adapted_layers(model).items():
        weight = layer.base_layer.weight
        weight.copy_(_sum(weight, layer.lora_A.weight, layer.lora_B.weight, layer.scale))
        _replace(model, name, layer.base_layer)
    model.requires_grad_(True)


@torch.no_grad()
def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict as it is without adapters: their sums with their bases, in float32, under the bases' plain names."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(f".{BASE}.")
        if rest == "weight":
            tensor = _sum(tensor, state[f"{layer}.{A}.weight"], state[f"{layer}.{B}.weight"], scale)
        if not is_factor(name):
            weights[f"{layer}.{rest}" if rest else name] = tensor
    return weights


def is_factor(name: str) -> bool:
    """Whether a parameter's name is of an adapter."""
    return name.endswith((f".{A}.weight", f".{B}.weight"))


def base_name(name: str) -> str:
    """A parameter's name in the base."""
    return name.replace(f".{BASE}.", ".")


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return weight.to(a.dtype) + scale * (b @ a)


def _meant(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
