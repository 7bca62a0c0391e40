"""Weights laid out for oneDNN, in which a CPU's matrix products of few rows take half the time.

A packed copy does not follow later changes of its parameter: whoever changes weights packs them again.
"""

from __future__ import annotations

import copy
import platform
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_WORTHWHILE = 2**17  # numbers of a weight; below, a call of oneDNN costs more than the packing saves
_ROWS = 32  # for which oneDNN lays weights out; it is as good for any number but one
_ops = torch.ops.mkldnn  # what inductor compiles linear layers to on CPUs

M = TypeVar("M", bound=nn.Module)


def available() -> bool:
    """Whether this CPU and build of torch have the packed product."""
    return torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


class PackedLinear(nn.Linear):
    """x [T, C] times a float32 weight [O, C], for inference; results differ from `nn.Linear`'s in the last bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.weight, self.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        self.packed = _ops._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(self, input: Tensor) -> Tensor:
        return _ops._linear_pointwise(input, self.packed, self.bias, "none", [], "")


@torch.no_grad()
def pack(model: M) -> M:
    """The same decoder on the same parameters, its large linear layers on packed copies as well."""
    decoder: Any = model
    twin: Any = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= _WORTHWHILE:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    if twin.lm_head is None and decoder.head_weight.numel() >= _WORTHWHILE:
        twin.lm_head = PackedLinear(twin.model.embed_tokens.weight, None)
    return twin


def intact(twin: nn.Module) -> bool:
    """Whether every packed copy equals its parameter, bit by bit."""
    packed = (module for module in twin.modules() if isinstance(module, PackedLinear))
    return all(torch.equal(module.packed.to_dense(), module.weight) for module in packed)
