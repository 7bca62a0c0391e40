"""Intervals of pass rates, and whether a change of them is beyond chance. The unit is the problem."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from typing import Any

import numpy as np

Interval = tuple[float, float]
PERMUTATIONS = 10_000
_Z = 1.96  # quantile of the standard normal distribution: 95 %, two-sided


def interval(rates: Sequence[float], num_samples: float = inf) -> Interval:
    """The 95 % interval of a mean of rates in [0, 1], one for each problem, of `num_samples` responses in all.

    Wilson's score interval (Wilson 1927, JASA 22, p. 209) with an effective sample size in place of the number of
    responses, since those to one problem are not independent: p (1 - p) / se^2, where se is the standard error over
    problems (Miller 2024, arXiv:2411.00640, section 2.2; Korn & Graubard 1998, Survey Methodology 24, p. 193), at most
    `num_samples`; the number of problems where they do not differ. Unlike p +- 1.96 se, which is [0, 0] where no
    response is right, it says at 0 and at 1 what so many problems can show; between, with many problems, they agree.
    """
    number, p = len(rates), float(np.mean(rates))
    error2 = float(np.var(rates, ddof=1)) / number if number > 1 else 0.0
    n = min(num_samples, p * (1 - p) / error2) if error2 > 1e-18 else number
    centre, half = p + _Z**2 / (2 * n), _Z * sqrt(max(0.0, p * (1 - p)) / n + (_Z / (2 * n)) ** 2)
    low, high = ((centre + side * half) / (1 + _Z**2 / n) for side in (-1, 1))
    return (0.0 if p == 0 else max(0.0, low), 1.0 if p == 1 else min(1.0, high))


def difference_interval(
    means: tuple[float, float], intervals: tuple[Interval, Interval], correlation: float = 0.0
) -> Interval:
    """The 95 % interval of the second mean less the first, from those of both and their correlation over problems
    (Newcombe 1998, Statistics in Medicine 17, p. 2635, method 10): two models that got nothing right are not said to be
    equal for certain."""
    (low, high), (later_low, later_high) = intervals

    def reach(one: float, other: float) -> float:
        return sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))

    first, second = means
    down, up = reach(second - later_low, high - first), reach(later_high - second, first - low)
    return second - first - down, second - first + up


def paired(
    before: Sequence[float], after: Sequence[float], num_samples: tuple[float, float] = (inf, inf)
) -> dict[str, Any]:
    """The mean difference of pass rates on the same problems, its 95 % interval (over problems), and how likely chance
    alone makes one as large: a two-sided sign-flip permutation test with 10,000 seeded flips.

    The interval is `difference_interval`'s; `num_samples`: responses of each, see `interval`.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    differences, number = second - first, len(first)
    mean, varies = float(differences.mean()), bool(first.std() > 1e-9 and second.std() > 1e-9)
    correlation = float(np.corrcoef(first, second)[0, 1]) if varies else 0.0
    means = float(first.mean()), float(second.mean())
    rng = np.random.default_rng(0)
    flipped = (abs(float(np.mean(differences * rng.choice((-1.0, 1.0), number)))) for _ in range(PERMUTATIONS))
    as_large = sum(one >= abs(mean) - 1e-12 for one in flipped)
    return {
        "difference": mean,
        "ci95": difference_interval(
            means, (interval(before, num_samples[0]), interval(after, num_samples[1])), correlation
        ),
        "p_value": (as_large + 1) / (PERMUTATIONS + 1),
        "num_problems": number,
        "num_better": int((differences > 0).sum()),
        "num_worse": int((differences < 0).sum()),
    }
