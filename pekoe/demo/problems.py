"""Arithmetic problems from reasoning-gym's generator, with worked solutions, for the demo."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data.rows import question

ARITHMETIC_ALPHABET = "0123456789+-=\n\\{}boxed"
_SEED_STRIDE = 1_000_000_007  # the generator's item i is keyed by seed + i: neighbouring seeds would share their items


def make_arithmetic(
    num: int,
    seed: int,
    exclude: Collection[str] = frozenset(),
    *,
    num_terms: tuple[int, int] = (3, 5),
    num_digits: tuple[int, int] = (1, 2),
    operators: Collection[str] = ("+", "-"),
    negative_totals: bool = True,
) -> list[tuple[Problem, str]]:
    r"""`num` chains of sums such as `7+25-3+12=`, each with its worked solution, from reasoning-gym's `chain_sum`.

    A solution keeps a running total, one line a step: `7+25=32\n32-3=29\n29+12=41\n\boxed{41}`. Prompts differ from
    one another and from those in `exclude`; the same arguments give the same problems. The terms of one problem all
    have the same number of digits. `operators` and `negative_totals=False` drop problems with another operator, or
    whose running total falls below zero. Prompts are bare: a small model would spend its time on English.

    Raises UserError when reasoning-gym is absent, or when the limits leave fewer than `num` problems.
    """
    if not (2 <= num_terms[0] <= num_terms[1] and 1 <= num_digits[0] <= num_digits[1]):
        raise UserError(
            f"arithmetic: expected 2 <= terms and 1 <= digits, ranges rising, got {num_terms}, {num_digits}"
        )
    if not operators or set(operators) - {"+", "-"}:
        raise UserError(f"arithmetic operators: expected some of '+', '-', got {sorted(operators)}")
    if num == 0:
        return []
    try:
        import reasoning_gym  # 4 to 5 seconds, and only the demo needs it
    except ImportError:
        raise UserError("reasoning-gym makes these problems and is not installed: pip install 'pekoe[demo]'") from None
    limits = {"min_terms": num_terms[0], "max_terms": num_terms[1]}
    limits |= {"min_digits": num_digits[0], "max_digits": num_digits[1], "size": 200 * num + 10_000}
    dataset = reasoning_gym.create_dataset("chain_sum", seed=seed * _SEED_STRIDE, **limits)
    seen = set(exclude)
    made: list[tuple[Problem, str]] = []
    for index in range(limits["size"]):
        item: dict[str, Any] = dataset[index]
        expression: str = item["metadata"]["expression"].replace(" ", "")
        prompt = f"{expression}="
        if prompt in seen or set(re.findall(r"[+-]", expression)) - set(operators):
            continue
        seen.add(prompt)
        solution, totals = _work_out(expression)
        assert str(totals[-1]) == item["answer"], f"{prompt} {totals[-1]} but the generator says {item['answer']}"
        if negative_totals or min(totals) >= 0:
            made.append((Problem(f"chain_sum/{expression}", question(prompt), item["answer"]), solution))
        if len(made) == num:
            return made
    raise UserError(f"arithmetic: expected {num} different problems, got {len(made)}: widen num_terms or num_digits")


def _work_out(expression: str) -> tuple[str, list[int]]:
    """The worked solution of a chain of sums, and its running totals."""
    first, *rest = re.findall(r"[+-]?\d+", expression)
    totals, lines = [int(first)], []
    for term in rest:
        total = totals[-1] + int(term)
        lines.append(f"{totals[-1]}{term}={total}")
        totals.append(total)
    return "\n".join([*lines, f"\\boxed{{{totals[-1]}}}"]), totals
