"""Pekoe's trainer in a process of its own, which answers JSON lines: packed, or padded.

    python train_worker.py packed|padded|padded-sorted MODEL_DIRECTORY OPTIONS_JSON

The padded ones are the same trainer, model, objective and optimizer on rows filled up to the longest of their
micro-batch, whose rectangle keeps to the token budget: as the tokens were sampled, or sorted by length first. The filling is computed and
not trained on. To their favour it is no part of the loss (most trainers make logits of it too) and needs no mask, as
it lies to the right.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from train_cases import CLIP, OPTIM, Case, Row
from train_flops import Ceiling, flops, seconds
from train_memory import Peak

from pekoe.algo.loss import ppo
from pekoe.algo.packing import pack
from pekoe.core.config import AlgoSection, OptimSection
from pekoe.core.types import Sample
from pekoe.model import Decoder, load_model
from pekoe.train import StepStats, Trainer

OBJECTIVE = partial(ppo, algo=AlgoSection(clip_low=CLIP, clip_high=CLIP))
Bins = list[list[int]]


def make_trainer(
    model: Decoder, budget: int, dtype: torch.dtype = torch.float32, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """The trainer that all of the benchmark uses. `options`: more of its constructor's arguments."""
    optim = OptimSection(warmup_fraction=0.0, **OPTIM)
    return kind(model, optim, token_budget=budget, total_updates=1, compute_dtype=dtype, **options)


def sample_of(row: Row) -> Sample:
    before = [0] * len(row.prompt)
    return Sample(
        tokens=np.array(row.prompt + row.response, np.int64),
        loss_mask=np.array(before + [1] * len(row.response), np.bool_),
        behaviour_logprobs=np.array(before + row.logprobs, np.float32),
        advantages=np.array(before + [row.advantage] * len(row.response), np.float32),
    )


class Padded(Trainer):
    """Computes rectangles. `step` answers as if the padding were not there."""

    in_order = True

    def step(self, samples: Sequence[Sample], *args: Any, **kwargs: Any) -> StepStats:
        order = list(range(len(samples))) if self.in_order else sorted(range(len(samples)), key=lambda i: len(samples[i]))
        self._rectangles = rectangles([len(samples[i]) for i in order], self._token_budget)
        filled = list(samples)
        for members in self._rectangles:
            members[:] = [order[i] for i in members]
            longest = max(len(samples[i]) for i in members)
            for i in members:
                filled[i] = fill(samples[i], longest)
        return super().step(filled, *args, **kwargs)

    def _bins(self, samples: Sequence[Sample]) -> tuple[Bins, int]:
        return self._rectangles, len(self._rectangles)


class PaddedSorted(Padded):
    in_order = False


def rectangles(lengths: Sequence[int], budget: int) -> Bins:
    """Sequences in the order given, as many to a micro-batch as keep rows x longest row within the budget."""
    bins: Bins = []
    longest = budget
    for i, length in enumerate(lengths):
        if bins and (len(bins[-1]) + 1) * max(longest, length) <= budget:
            bins[-1].append(i)
            longest = max(longest, length)
        else:
            bins.append([i])
            longest = length
    return bins


def fill(sample: Sample, length: int) -> Sample:
    def filled(array: Any) -> Any:
        return np.pad(array, (0, length - len(array)))

    return Sample(
        filled(sample.tokens), filled(sample.loss_mask), filled(sample.behaviour_logprobs), filled(sample.advantages)
    )


TRAINERS: dict[str, type[Trainer]] = {"packed": Trainer, "padded": Padded, "padded-sorted": PaddedSorted}


class Worker:
    def __init__(self, system: str, directory: str, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self.case = Case.of(options["case"])
        self.model = load_model(directory)
        self.trainer = make_trainer(self.model, self.case.budget, kind=TRAINERS[system], **options["trainer"])
        self.minibatches = [[sample_of(row) for row in rows] for rows in self.case.rows()]
        self.done = 0
        self.peak = Peak()

    def about(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def steps(self, number: int) -> dict[str, Any]:
        """Optimizer steps on the next minibatches."""
        found: list[dict[str, float]] = []
        for _ in range(number):
            samples = self.minibatches[self.done % len(self.minibatches)]
            self.done += 1
            stats: list[StepStats] = []
            taken = seconds(lambda samples=samples, s=stats: s.append(self.trainer.step(samples, OBJECTIVE)), self.trainer.device)
            found.append(
                {
                    "seconds": taken,
                    "loss": stats[0].loss,
                    "grad_norm": stats[0].grad_norm,
                    "tokens": sum(map(len, samples)),
                    "computed": stats[0].num_tokens,
                    "microbatches": stats[0].num_microbatches,
                }
            )
        return {"steps": found, **self.peak.about()}

    def reached(self, rounds: int) -> dict[str, Any]:
        return reached(self.trainer, self.minibatches[0], rounds)


def reached(trainer: Trainer, samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    """FLOP/s of a micro-batch's forward and backward beside those of torch.matmul at the same shapes, in turns.

    `samples`: cut where the token budget is full. One round comes before and is not counted.
    """
    lengths: list[int] = []
    for sample in samples:
        if sum(lengths) + len(sample) > trainer._token_budget:
            break
        lengths.append(len(sample))
    batch = pack(samples[: len(lengths)]).to(trainer.device)
    count = flops(trainer.model.spec, lengths, len(batch.targets))
    ceiling = Ceiling(trainer.model, len(batch.tokens), len(batch.targets), trainer.compute_dtype)
    assert abs(ceiling.flops / count.matmul - 1) < 1e-9, "both count the same products"
    forwards: list[float] = []
    backwards: list[float] = []
    products: list[float] = []
    for _ in range(rounds + 1):
        losses: list[Any] = []
        forward = lambda losses=losses: losses.append(OBJECTIVE(*trainer._logprobs(batch), batch)[0])  # noqa: E731
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


def main() -> None:
    system, directory, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def answer(work: Callable[[], Any]) -> None:
        try:
            print(json.dumps({"ok": work()}), file=answers, flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            raise

    made: list[Worker] = []
    answer(lambda: made.append(Worker(system, directory, options)) or made[0].about())
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: getattr(made[0], request.pop("do"))(**request))


if __name__ == "__main__":
    main()
