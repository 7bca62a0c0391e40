"""FLOP/s of a forward and backward (counted as `pekoe.core.roofline` does), and what the machine's matrix product makes
of the same shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pekoe.algo.packing import pack
from pekoe.core.roofline import training_flops
from pekoe.core.types import Sample
from pekoe.model import Decoder
from pekoe.train import Trainer
from pekoe.train.trainer import Objective

_MOST_HEAD_ROWS = 4096


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


class Ceiling:
    """torch.matmul on the shapes of a model's forward and backward: with the model's own weights, layer after layer, so
    that caches are as they are there (where `dtype` is not theirs, with a copy of one for all its shape). Outputs are
    allocated by each product, as they are there.

    Args:
        num_tokens, num_targets: rows of the layers' products, and of the head's (of which as many as memory bears are
            taken, and counted for all).
    """

    def __init__(self, model: Decoder, num_tokens: int, num_targets: int, dtype: torch.dtype) -> None:
        self.device = next(model.parameters()).device
        layers = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        self._inputs: dict[tuple[int, int], Tensor] = {}  # (rows, columns)
        self._shapes: dict[tuple[int, int, int], list[Tensor]] = {}  # (rows, in, out) -> weights
        taken = min(num_targets, _MOST_HEAD_ROWS)
        self._times = {(taken, *reversed(model.head_weight.shape)): num_targets / taken}
        for weight, rows in [*((w, num_tokens) for w in layers), (model.head_weight, taken)]:
            out, inner = weight.shape
            weights = self._shapes.setdefault((rows, inner, out), [])
            weights.append(weights[0] if weights and weight.dtype != dtype else weight.detach().to(dtype))
            for columns in (inner, out):
                if (rows, columns) not in self._inputs:
                    self._inputs[rows, columns] = torch.randn(rows, columns, device=self.device, dtype=dtype)
        self.flops = sum(
            6.0 * r * i * o * len(w) * self._times.get((r, i, o), 1) for (r, i, o), w in self._shapes.items()
        )
        self._taken: dict[str, list[float]] = {}

    def measure(self) -> float:
        """Seconds of all products once over."""
        whole = 0.0
        for shape, weights in self._shapes.items():
            rows, inner, out = shape
            x, g = self._inputs[rows, inner], self._inputs[rows, out]
            for kind, product in (
                ("forward", lambda w, x=x: x @ w.T),
                ("input's gradient", lambda w, g=g: g @ w),
                ("weight's gradient", lambda w, x=x, g=g: g.T @ x),
            ):
                taken = seconds(lambda product=product, weights=weights: _all(product, weights), self.device)
                whole += taken * self._times.get(shape, 1)
                self._taken.setdefault(f"{rows} x {inner} x {out}, {kind}", []).append(taken / len(weights))
        return whole

    def shapes(self) -> dict[str, float]:
        """FLOP/s of each product, from its median."""
        found: dict[str, float] = {}
        for name, taken in self._taken.items():
            rows, inner, out = map(int, name.split(",")[0].split(" x "))
            found[name] = 2.0 * rows * inner * out / statistics.median(taken)
        return found


def _all(product: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> None:
    for weight in weights:
        product(weight)


def reached(trainer: Trainer, objective: Objective, samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    """FLOP/s of a micro-batch's forward and backward beside those of torch.matmul at the same shapes, in turns.

    `samples`: cut where the token budget is full. One round comes before and is not counted.
    """
    lengths: list[int] = []
    for sample in samples:
        if sum(lengths) + len(sample) > trainer._token_budget:
            break
        lengths.append(len(sample))
    batch = pack(samples[: len(lengths)]).to(trainer.device)
    count = training_flops(trainer.model.spec, lengths, len(batch.targets))
    ceiling = Ceiling(trainer.model, len(batch.tokens), len(batch.targets), trainer.compute_dtype)
    assert abs(ceiling.flops / count.matmul - 1) < 1e-9, "both count the same products"
    forwards: list[float] = []
    backwards: list[float] = []
    products: list[float] = []
    for _ in range(rounds + 1):
        losses: list[Any] = []
        forward = lambda losses=losses: losses.append(objective(*trainer._logprobs(batch, None), batch)[0])  # noqa: E731
        forwards.append(seconds(forward, trainer.device))
        backwards.append(seconds(losses[0].backward, trainer.device))
        trainer.optimizer.zero_grad(set_to_none=True)
        products.append(ceiling.measure())
    both = [f + b for f, b in zip(forwards, backwards, strict=True)][1:]
    return {
        "num_tokens": len(batch.tokens),
        "num_targets": len(batch.targets),
        "flops": {"linear": count.linear, "head": count.head, "attention": count.attention},
        "forward_s": statistics.median(forwards[1:]),
        "backward_s": statistics.median(backwards[1:]),
        "matmul_s": statistics.median(products[1:]),
        "flop_s": count.total / statistics.median(both),
        "matmul_flop_s": count.matmul / statistics.median(products[1:]),
        "share": statistics.median(
            (count.total / b) / (count.matmul / p) for b, p in zip(both, products[1:], strict=True)
        ),
        "rounds": {"forward_backward_s": both, "matmul_s": products[1:]},
        "shapes_flop_s": ceiling.shapes(),
    }
