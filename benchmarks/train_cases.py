"""What `bench_train.py` trains on: models, lengths, minibatches. No torch, nothing random but by a seed: every system,
in whatever environment, makes the same for itself."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from rollout_cases import SHAPES, SIGMA, Shape


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout: its tokens, and what training is told of its response."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]  # of each response token, by the policy that sampled it
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class Case:
    """Minibatches, an optimizer step each, that a system goes through again and again."""

    shape: Shape
    samples: int  # a minibatch
    minibatches: int
    budget: int  # tokens of a micro-batch
    prompt_tokens: int = 16
    median: int = 64  # of response lengths, which are log-normal
    sigma: float = SIGMA
    clip: tuple[int, int] = (8, 256)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Case:
        """From what `options` made and JSON carried."""
        return cls(**options | {"shape": SHAPES[options["shape"]], "clip": tuple(options["clip"])})

    def options(self) -> dict[str, Any]:
        return asdict(self) | {"shape": self.shape.name}

    def lengths(self) -> list[list[int]]:
        """Response tokens [minibatches][samples]."""
        rng, (low, high) = random.Random(0), self.clip
        count = self.minibatches * self.samples
        flat = [min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), low), high) for _ in range(count)]
        return [flat[i : i + self.samples] for i in range(0, count, self.samples)]

    def rows(self) -> list[list[Row]]:
        """Random tokens; log-probs near those of random weights, so that ratios lie around 1 and some are clipped."""
        rng, vocab = random.Random(1), self.shape.vocab
        return [
            [
                Row(
                    rng.choices(range(vocab), k=self.prompt_tokens),
                    rng.choices(range(vocab), k=length),
                    [rng.gauss(-math.log(vocab), 0.2) for _ in range(length)],
                    rng.gauss(0, 1),
                )
                for length in each
            ]
            for each in self.lengths()
        ]


def packed_case(name: str, quick: bool) -> Case:
    """Packed beside padded: more than one micro-batch to a minibatch."""
    return Case(SHAPES[name], {"nano": 32, "tiny": 256}.get(name, 64), 1, 512 if quick else 2048)


def trl_case(name: str, quick: bool) -> Case:
    """One prompt's 16 responses to an optimizer step, which all go into one micro-batch."""
    return Case(SHAPES[name], 16, 2 if quick else 4 if name == "small" else 8, 4096)


# Optimizer and clipping, the same for every system; so small a rate that all go on seeing the same losses.
OPTIM = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.05, "grad_clip": 1.0}
CLIP = 0.2
