"""Pekoe's trainer in a process of its own, which answers as `rollout_worker.py` does: packed, or padded.

    python train_worker.py packed|padded|padded-sorted MODEL_DIRECTORY OPTIONS_JSON

The padded ones are the same trainer, model, objective and optimizer on rows filled up to the longest of their
micro-batch, whose rectangle keeps to the token budget: in the order in which they were sampled, or sorted by length
first. The filling is computed and not trained on. To their favour it gets no logits (most trainers make them) and
needs no mask, as it lies to the right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import rollout_worker
import torch
from train_cases import CLIP, OPTIM, Case, Row
from train_flops import reached
from train_memory import PeakMemory

from pekoe.algo.loss import ppo
from pekoe.config.recipes import AlgoSection, OptimSection
from pekoe.core.loop import StepStats
from pekoe.core.types import Sample
from pekoe.model import Decoder, load_model
from pekoe.train import Trainer

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
        order = (
            list(range(len(samples))) if self.in_order else sorted(range(len(samples)), key=lambda i: len(samples[i]))
        )
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
    names = ("tokens", "loss_mask", "behaviour_logprobs", "advantages")
    return Sample(**{name: np.pad(getattr(sample, name), (0, length - len(sample))) for name in names})


TRAINERS: dict[str, type[Trainer]] = {"packed": Trainer, "padded": Padded, "padded-sorted": PaddedSorted}


class Worker:
    def __init__(self, system: str, directory: str, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self.case = Case.of(options["case"])
        self.model = load_model(directory)
        dtype = torch.bfloat16 if options.get("bf16") else torch.float32
        self.trainer = make_trainer(self.model, self.case.budget, dtype, TRAINERS[system], **options["trainer"])
        self.minibatches = [[sample_of(row) for row in rows] for rows in self.case.rows()]
        self.done = 0
        self.peak = PeakMemory()

    def about(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def steps(self, number: int) -> dict[str, Any]:
        """Optimizer steps on the next minibatches."""
        found: list[dict[str, float]] = []
        for _ in range(number):
            samples = self.minibatches[self.done % len(self.minibatches)]
            self.done += 1
            start = time.perf_counter()
            stats = self.trainer.step(samples, OBJECTIVE)
            taken = time.perf_counter() - start
            found.append(
                {
                    "seconds": taken,
                    "loss": stats.loss,
                    "grad_norm": stats.grad_norm,
                    "tokens": sum(map(len, samples)),
                    "computed": stats.num_tokens,
                    "microbatches": stats.num_microbatches,
                }
            )
        return {"steps": found, **self.peak.about()}

    def reached(self, rounds: int) -> dict[str, Any]:
        """What the forward and backward of a micro-batch reach of torch.matmul's FLOP/s."""
        return reached(self.trainer, OBJECTIVE, self.minibatches[0], rounds)


if __name__ == "__main__":
    rollout_worker.main({name: partial(Worker, name) for name in TRAINERS})
