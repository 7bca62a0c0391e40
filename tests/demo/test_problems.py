from __future__ import annotations

import builtins
import re

import pytest

from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.demo.problems import ARITHMETIC_ALPHABET, make_arithmetic


def prompt_of(problem: Problem) -> str:
    return problem.messages[0]["content"]


def check(problem: Problem, solution: str) -> None:
    """Work the problem out again, by other means than the source does."""
    prompt = prompt_of(problem)
    assert re.fullmatch(r"\d+([+-]\d+)+=", prompt)
    *lines, box = solution.split("\n")
    assert int(problem.gold) == sum(int(term) for term in re.findall(r"[+-]?\d+", prompt[:-1]))
    assert box == f"\\boxed{{{problem.gold}}}"
    terms = re.findall(r"[+-]\d+", prompt)
    assert len(lines) == len(terms)
    total = re.match(r"\d+", prompt).group()
    for line, term in zip(lines, terms, strict=True):
        left, _, right = line.partition("=")
        assert left == total + term
        assert int(right) == int(total) + int(term)
        total = right
    assert set(prompt + solution) <= set(ARITHMETIC_ALPHABET)


def test_worked_solutions_are_right():
    made = make_arithmetic(300, seed=0, num_terms=(2, 6), num_digits=(1, 3))
    assert len(made) == 300
    for problem, solution in made:
        check(problem, solution)
    assert any(re.search(r"^-\d+", solution, re.M) for _, solution in made), "no running total below zero was tried"
    assert {len(re.findall(r"\d+", prompt_of(p))) for p, _ in made} == {2, 3, 4, 5, 6}


@pytest.mark.slow
def test_many_worked_solutions_are_right():
    for problem, solution in make_arithmetic(50_000, seed=3, num_terms=(2, 8), num_digits=(1, 6)):
        check(problem, solution)


def test_same_seed_same_problems_and_no_two_seeds_share_a_stretch():
    first, again, other = (make_arithmetic(200, seed=seed, num_digits=(3, 3)) for seed in (0, 0, 1))
    assert first == again
    assert not {p.uid for p, _ in first} & {p.uid for p, _ in other}


def test_problems_are_distinct_and_disjoint_from_the_excluded():
    held_out = make_arithmetic(150, seed=1, num_terms=(2, 3), num_digits=(1, 1))
    prompts = {prompt_of(p) for p, _ in held_out}
    train = make_arithmetic(1000, seed=1, exclude=prompts, num_terms=(2, 3), num_digits=(1, 1))
    names = [p.uid for p, _ in train]
    assert len(prompts) == 150
    assert len(set(names)) == 1000
    assert not prompts & {prompt_of(p) for p, _ in train}


def test_operators_and_negative_totals_can_be_left_out():
    sums = make_arithmetic(50, seed=0, operators=("+",))
    assert not any("-" in prompt_of(p) for p, _ in sums)
    positive = make_arithmetic(200, seed=0, negative_totals=False)
    assert not any(re.search(r"=-", solution) for _, solution in positive)
    assert any("-" in prompt_of(p) for p, _ in positive)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_terms": (1, 3)}, "2 <= terms"),
        ({"num_terms": (4, 3)}, "ranges rising"),
        ({"num_digits": (0, 1)}, "1 <= digits"),
        ({"operators": ("*",)}, r"expected some of '\+', '-', got \['\*'\]"),
        ({"operators": ()}, "expected some"),
        ({"num_terms": (2, 2), "num_digits": (1, 1)}, "expected 500 different problems, got 200"),
    ],
)
def test_impossible_wishes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_arithmetic(500, seed=0, **options)


def test_says_how_to_install_the_generators(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'pekoe\[demo\]'"):
        make_arithmetic(1, seed=0)
