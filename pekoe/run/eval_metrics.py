"""The figures of an evaluation, from how many of each problem's responses were right. FAULT is left out of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

from pekoe.core.statistics import interval
from pekoe.run.sample_store import ProblemResult

MAJORITY_DRAWS = 64


def pass_at_1(rows: Sequence[ProblemResult]) -> tuple[float, tuple[float, float]]:
    """pass@1 and its 95 % interval: the mean over problems of each problem's share of correct samples (FAULT left
    out), and `interval` over these shares."""
    judged = [row for row in rows if row.num_judged]
    if not judged:
        return float("nan"), (float("nan"), float("nan"))
    rates = [row.num_correct / row.num_judged for row in judged]
    return float(np.mean(rates)), interval(rates, sum(row.num_judged for row in judged))


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
    that tie share. A problem with a right response in which no answer was found is left out. 1 < k < n: the
    mean of 64 seeded draws without replacement."""
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
            shares = [_majority([vote]) for vote in votes] if k == 1 else shares  # every draw there is
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
