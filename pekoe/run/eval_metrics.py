"""The figures of an evaluation, from how many of each problem's responses were right. FAULT is left out of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from pekoe.run.sample_store import ProblemResult

MAJORITY_DRAWS, PERMUTATIONS = 64, 10_000


def pass_at_1(rows: Sequence[ProblemResult]) -> tuple[float, tuple[float, float]]:
    """pass@1 and its 95 % interval.

    The mean over problems of each problem's share of correct samples (FAULT left out); the interval is +-1.96
    standard errors over problems, since the samples of one problem are not independent (Miller 2024,
    arXiv:2411.00640, section 2.2), cut to [0, 1].
    """
    rates = [row.pass_rate for row in rows if row.pass_rate is not None]
    if not rates:
        return float("nan"), (float("nan"), float("nan"))
    mean = float(np.mean(rates))
    error = float(np.std(rates, ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else 1.0
    return mean, (max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error))


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({n, *(2**i for i in range(n.bit_length()))}) if n else []


def pass_at_k(rows: Sequence[ProblemResult], k: int) -> float:
    """The chance that one of k responses is right, unbiased: 1 - C(n-c, k) / C(n, k), the mean over the problems with
    at least k judged responses (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    rates = [
        1 - comb(row.num_judged - row.num_correct, k) / comb(row.num_judged, k) for row in rows if row.num_judged >= k
    ]
    return float(np.mean(rates)) if rates else float("nan")


def majority_at_k(rows: Sequence[ProblemResult], k: int) -> float:
    """How often the commonest answer among k responses is right (Wang et al. 2022, arXiv:2203.11171), the mean over
    problems. Answers are one where their texts are, spaces aside; a response without an answer has no vote; answers
    that tie share. A problem with a right response in which no answer was found is left out. k < n: the mean of 64
    seeded draws without replacement."""
    rng = np.random.default_rng(0)
    rates: list[float] = []
    for row in rows:
        votes = [
            ("".join(answer.split()) if answer else None, label == "correct")
            for answer, label in zip(row.answers, row.labels, strict=True)
            if label != "fault"
        ]
        if any(right and answer is None for answer, right in votes):  # judged by something else than an answer
            continue
        if len(votes) >= k:
            draws = 1 if len(votes) == k else MAJORITY_DRAWS
            shares = [_majority([votes[i] for i in rng.permutation(len(votes))[:k]]) for _ in range(draws)]
            rates.append(float(np.mean(shares)))
    return float(np.mean(rates)) if rates else float("nan")


def _majority(votes: Sequence[tuple[str | None, bool]]) -> float:
    counts = Counter(answer for answer, _ in votes if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    right = {answer for answer, correct in votes if correct}
    winners = [answer for answer, number in counts.items() if number == most]
    return sum(answer in right for answer in winners) / len(winners)


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The mean difference of pass rates on the same problems, its 95 % interval (over problems), and how likely chance
    alone makes one as large: a two-sided sign-flip permutation test with 10,000 seeded flips."""
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    mean, number = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1) / np.sqrt(number)) if number > 1 else 1.0
    rng = np.random.default_rng(0)
    flipped = (abs(float(np.mean(differences * rng.choice((-1.0, 1.0), number)))) for _ in range(PERMUTATIONS))
    as_large = sum(one >= abs(mean) - 1e-12 for one in flipped)
    return {
        "difference": mean,
        "ci95": (mean - 1.96 * error, mean + 1.96 * error),
        "p_value": (as_large + 1) / (PERMUTATIONS + 1),
        "num_problems": number,
        "num_better": int((differences > 0).sum()),
        "num_worse": int((differences < 0).sum()),
    }
