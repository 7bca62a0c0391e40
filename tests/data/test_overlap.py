from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pekoe.core.types import Problem
from pekoe.data.overlap import Contamination, gold_key, near_duplicates, prompt_key, tokens_of

STORY = (
    "A train leaves the old station at noon and travels north along the river at 60 miles an hour until it reaches the "
    "mill, where it waits for 15 minutes before it goes on to the harbour. How far has it come by two o'clock?"
)


def problem(text: str, gold: Any = "1", uid: str = "a", kind: str = "math") -> Problem:
    return Problem(uid, ({"role": "user", "content": text},), gold, kind)


def words(seed: int, num: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(num))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is  $1 + 2$?", "What is $1+2$?", True),
        ("What is 1+2?", "What is 1-2?", False),
        ("What is 1+2?", "what is 1+2?", False),
        (
            "<｜User｜>1+2?\nPlease reason step by step, and put your final answer within \\boxed{}."
            "<｜Assistant｜><think>\n",
            "1+2?",
            True,
        ),
        ("<|im_start|>user\n1+2?<|im_end|>", "1+2?", True),
        ("Is |x|<|y|>3?", "Is |x|3?", False),
    ],
)
def test_prompts_are_the_same(one: str, other: str, same: bool):
    assert (prompt_key(problem(one)) == prompt_key(problem(other))) is same


def test_kind_tells_prompts_apart():
    assert prompt_key(problem("q")) != prompt_key(problem("q", kind="code"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("\\dfrac{1}{2}", "$\\frac{1}{2}$", True),
        ("5.0", "5", True),
        ("5.01", "5", False),
        ("10", "1", False),
        (["1", "2"], ["2", "1"], True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        (["1"], "1", True),
    ],
)
def test_golds_are_the_same(one: Any, other: Any, same: bool):
    assert (gold_key(one) == gold_key(other)) is same


def test_tokens():
    assert tokens_of(problem("Let $x_{12} \\le 3.5$, 若a=b?")) == [
        "let",
        "x",
        "12",
        "le",
        "3",
        "5",
        "若",
        "a",
        "=",
        "b",
    ]


class TestNear:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("datasketch", reason="pip install 'pekoe[data]'")

    def test_a_reworded_problem_is_found(self):
        again = STORY.replace("the old station", "the old Station,").replace("far", "much far")
        assert near_duplicates([problem(STORY), problem(words(0, 60)), problem(again)], 0.8) == {2: 0}

    def test_another_number_or_answer_is_another_problem(self):
        others = [problem(STORY.replace("60", "70")), problem(STORY, "2"), problem(STORY, kind="choice")]
        assert near_duplicates([problem(STORY), *others], 0.5) == {}

    def test_short_prompts(self):
        assert near_duplicates([problem("go"), problem("go."), problem("come"), problem("?")], 0.8) == {1: 0}

    @pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
    def test_agrees_with_comparing_all_pairs(self, threshold: float):
        """Of 300 texts, each changed in some words of another: every pair found is near, and nearly none is missed."""
        rng = random.Random(1)
        texts: list[list[str]] = []
        for _ in range(300):
            text = list(rng.choice(texts)) if texts and rng.random() < 0.7 else words(rng.randrange(10**6), 40).split()
            for place in rng.sample(range(40), rng.randrange(4)):
                text[place] = words(rng.randrange(10**6), 1)
            texts.append(text)
        runs = [{tuple(text[i : i + 3]) for i in range(38)} for text in texts]
        expected: set[int] = set()
        for i in range(300):
            near = [len(runs[i] & runs[j]) / len(runs[i] | runs[j]) >= threshold for j in range(i) if j not in expected]
            expected |= {i} if any(near) else set()
        found = near_duplicates([problem(" ".join(text)) for text in texts], threshold)
        for i, j in found.items():
            assert len(runs[i] & runs[j]) / len(runs[i] | runs[j]) >= threshold
        assert len(expected) > 50
        assert len(expected.symmetric_difference(found)) <= 0.03 * len(expected) + 1


class TestContamination:
    def test_a_shared_run_is_named(self):
        known = Contamination({"aime": [problem(STORY, uid="3")]}, 13)
        hit = known.find(problem(f"Consider this. {STORY[:110]} Then what?"))
        assert hit is not None
        assert hit[0] == "aime: 3"
        assert hit[1].startswith("a train leaves the old station")
        assert len(hit[1].split()) == 13
        assert known.find(problem("A train leaves the old station at noon.")) is None
        assert known.find(problem(words(0, 50))) is None

    @given(st.integers(0, 39), st.integers(0, 20))
    @example(0, 13)
    @example(27, 13)
    def test_exactly_n_in_a_row(self, start: int, num: int):
        text = words(5, 40).split()
        known = Contamination({"e": [problem(" ".join(text))]}, 13)
        part = text[start : start + num]
        mixed = problem(" ".join([words(6, 5), *part, words(7, 5)]))
        assert (known.find(mixed) is not None) is (len(part) >= 13)

    def test_a_short_problem_is_matched_whole(self):
        known = Contamination({"e": [problem("Compute $1+2$.")]}, 13)
        assert known.find(problem("compute 1 + 2")) == ("e: a", "compute 1 + 2")
        assert known.find(problem("Compute 1+2 and then 5.")) is None

    def test_stock_phrases_do_not_count(self):
        phrase = words(1, 15)
        sets = {"e": [problem(f"{words(i, 20)} {phrase}", uid=str(i)) for i in range(10, 13)]}
        assert Contamination(sets, 13).find(problem(f"{words(99, 20)} {phrase}")) is None
        sets["e"].pop()
        assert Contamination(sets, 13).find(problem(f"{words(99, 20)} {phrase}")) is not None

    def test_a_set_listed_twice_does_not_make_stock_phrases(self):
        sets = {name: [problem(STORY)] for name in "abcd"}
        hit = Contamination(sets, 13).find(problem(f"So: {STORY}"))
        assert hit is not None
        assert hit[0] == "a: a"
