"""References checked before a run, kind by kind: in the parent by their texts, in workers where that is not enough."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress
from pekoe.verify import JudgePool
from pekoe.verify.kinds import math
from pekoe.verify.references import judge_references, read_references

SLOW = "9^{9^{9^9}}"  # never comes back
ZEBRA = {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Ann"]]}
SUM = {"numbers": [1, 2], "target": 3}


def check(pool: JudgePool, *references: tuple[Any, str], functions: tuple[str, ...] = ()) -> dict[int, str]:
    reading = read_references(references, functions, NoProgress())
    return reading.refused | judge_references(reading.unsure, pool, NoProgress())


@pytest.mark.parametrize(
    ("gold", "kind", "why"),
    [
        (r"\lim_{x \to 0}", "math", r"the reference '\\lim_{x \\to 0}' cannot be parsed"),
        ("0/0", "math", "the reference '0/0' cannot be compared"),
        (r"\frac{1}{2", "math", r"given as the answer, is UNPARSED: no complete \boxed{...}"),
        (["", "1"], "math", "the reference must be text, or a list of texts, got"),
        (["(1, 2", "3 + * 4"], "math", "cannot be parsed; the reference"),
        ({"tests": []}, "code", "the reference must have tests or asserts"),
        ({"tests": [{"stdin": "1"}]}, "code", "the reference must have tests or asserts"),
        ("C or D", "choice", "the reference must be a letter, got 'C or D'"),
        (["Zoey"], "logic", "the reference must be an object, name to value"),
        ({"numbers": [1], "target": "x"}, "countdown", "the reference must have numbers and a target"),
        ("7", "gym:prime_factorization", "the reference must be an entry of reasoning-gym, got '7'"),
    ],
    ids=str,
)
def test_a_reference_that_is_refused_says_why(pool: JudgePool, gold: Any, kind: str, why: str):
    refused = check(pool, ("7", "math"), (gold, kind), ("8", "math"), (gold, kind))
    assert refused.keys() == {1, 3}
    assert refused[1] == refused[3]
    assert why in refused[1]


def test_references_that_are_accepted(pool: JudgePool):
    golds: list[tuple[Any, str]] = [
        *[
            (text, "math")
            for text in (
                "-1,000",
                "0.5",
                r"\frac{1}{2}",
                "$x^2 + 1$",
                "(1, 2]",
                "2^{70}",
                r"\boxed{5}",
                r"\boxed{1}\boxed{2}",
            )
        ],
        (["(1, 2", r"\frac{11}{3}"], "math"),  # one that can be read is enough
        ("(C)", "choice"),
        (ZEBRA, "logic"),
        ({"Zoey": "knight"}, "logic"),
        (SUM, "countdown"),
        ({"tests": [{"stdin": "1", "stdout": "2"}]}, "code"),
        ({"anything": 1}, "function:nowhere:reward"),  # not imported, not run
    ]
    assert check(pool, *golds, functions=("nowhere:reward",)) == {}
    with pytest.raises(UserError, match="unknown kind 'meths'"):
        check(pool, ("1", "meths"))


def test_a_reference_that_hits_a_limit_is_refused_and_the_pool_goes_on():
    with JudgePool(num_workers=1, time_limit_s=1.0) as pool:
        refused = check(pool, (SLOW, "math"), (r"\sin^2 x + \log_{3} 10", "math"))
        assert refused == {0: f"the reference '{SLOW}': limit on the reference against itself: time (1 s)"}
        assert pool.stats().num_limits == 2
        assert pool.submit(r"\boxed{9^{9^{9^9}}}", SLOW).result().label == "correct"  # another question


def test_ten_thousand_plain_references_take_seconds_and_no_worker():
    texts = ["{0}", "{0}.5", r"\frac{{1}}{{{0}}}", r"{0}\sqrt{{3}}", "${0}x^2+1$", "({0}, 1)"]
    golds = [(texts[number % len(texts)].format(number + 1), "math") for number in range(10_000)]
    start = time.process_time()
    reading = read_references(golds, (), NoProgress())
    assert reading.refused == {}
    assert reading.unsure == []
    assert time.process_time() - start < 20  # 3 s alone


@pytest.mark.parametrize(
    "text", [SLOW, "9^9^9", "9^{99}", "100!", r"\sum_{k=0}^9 k", r"\binom{9}{3}", "((9^9)^9)^9^{9}", "1+" * 40 + "1"]
)
def test_what_could_cost_something_is_left_to_workers(text: str):
    assert not math.is_plain(text)
    assert not math.is_plain(["1", text])
