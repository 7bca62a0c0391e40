"""Copies of weights for inference: laid out for oneDNN, in which a CPU's matrix products of few rows take half the
time; or cast once, where autocast would cast them in every forward.

A copy does not follow later changes of its parameter: whoever changes weights packs or refreshes them.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
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


class CastLinear(nn.Linear):
    """x [T, C] times a copy of a weight [O, C] in another dtype. Under autocast to it, it gives `nn.Linear`'s bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.weight, self.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        self.low = weight.detach().to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.low, self.bias)


def pack(model: M) -> M:
    """The same decoder on the same parameters, its large linear layers on copies for oneDNN as well."""
    return _twin(model, _WORTHWHILE, PackedLinear)


def cast_once(model: M, dtype: torch.dtype) -> M:
    """The same decoder on the same parameters, its linear layers on copies in `dtype` as well."""
    return _twin(model, 0, lambda weight, bias: CastLinear(weight, bias, dtype))


@torch.no_grad()
def refresh(twin: nn.Module) -> None:
    """Cast again, into the same memory: the parameters' values have changed."""
    for module in twin.modules():
        if isinstance(module, CastLinear):
            module.low.copy_(module.weight)


def intact(twin: nn.Module) -> bool:
    """Whether every copy equals its parameter, bit by bit."""
    for module in twin.modules():
        if isinstance(module, PackedLinear) and not torch.equal(module.packed.to_dense(), module.weight):
            return False
        if isinstance(module, CastLinear) and not torch.equal(module.low, module.weight.to(module.low.dtype)):
            return False
    return True


@torch.no_grad()
def _twin(model: M, least: int, make: Callable[[Tensor, Tensor | None], nn.Linear]) -> M:
    """The same decoder on the same parameters, with linear layers of at least so many numbers made anew."""
    decoder: Any = model
    twin: Any = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= least:
                setattr(module, name, make(child.weight, child.bias))
    if getattr(twin, "lm_head", twin) is None and decoder.head_weight.numel() >= least:
        twin.lm_head = make(twin.model.embed_tokens.weight, None)
    return twin
