"""AdamW with moments that take less of the device's memory: in bfloat16, or in the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 1 << 24  # numbers updated at a time: what is on the device in float32 beside the weights
MAX_BETA2 = 0.995
"""Above it bfloat16, whose numbers lie up to 2^-8 apart, rounds (1 - beta2) times the square of a gradient away."""


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), computed as the weights are: dtype and device.

    Args:
        groups: parameters, as of every optimizer; their `weight_decay`.
        dtype: of the moments; they are rounded to it after each step. None: the weights'.
        on_host: whether the moments are in the host's memory, from where they come for each step in pieces.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype | None = None,
        on_host: bool = False,
    ) -> None:
        self._dtype, self._on_host = dtype, on_host
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = {name: self._placed(torch.zeros_like(parameter)) for name in MOMENTS}
                self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch gives moments the dtype and the device of their weights, which loses nothing."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = self._placed(state[name])

    def _placed(self, moment: Tensor) -> Tensor:
        return moment.to(torch.device("cpu") if self._on_host else moment.device, self._dtype or moment.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    tensors = parameter, parameter.grad, *(state[name] for name in MOMENTS)
                    weights, grads, *moments = (_local(tensor).view(-1).split(_CHUNK) for tensor in tensors)
                    for weight, grad, first, second in zip(weights, grads, *moments, strict=True):
                        _update(weight, grad, first, second, int(state["step"]), group)


def _update(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]) -> None:
    """One step of some numbers [N]; the moments are those of the step before, and become those of this one."""
    beta1, beta2 = group["betas"]
    mean, square = (moment.to(weight.device, weight.dtype, non_blocking=True) for moment in (first, second))
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
    for moment, new in ((first, mean), (second, square)):
        if new is not moment:
            moment.copy_(new)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
