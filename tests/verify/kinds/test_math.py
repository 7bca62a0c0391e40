"""What equals what, without a process in between; the limits and the audit hook are tested elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.core.errors import UserError
from pekoe.core.types import Verdict
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_verifier
from pekoe.verify.kinds.math import MAX_ANSWER_CHARS, prepare

VERDICTS: list[tuple[Any, str, str]] = [
    # gold, content of the box, label
    ("7", "7", "correct"),
    ("7", " 7 ", "correct"),
    ("7", "07", "correct"),
    ("7", "8", "wrong"),
    ("-7", "7", "wrong"),
    ("1234", "1,234", "correct"),
    ("12345", "12 345", "correct"),
    ("10000", "10001", "wrong"),
    ("50", "0.5", "wrong"),
    ("50", "5000", "wrong"),
    (r"50\%", "0.5", "correct"),
    ("2025", "2025.1", "wrong"),
    (r"\frac{1}{2}", "0.5", "correct"),
    (r"\frac{1}{2}", r"\dfrac12", "correct"),
    (r"\frac{7}{4}", "1 3/4", "correct"),
    (r"\frac{1}{3}", "0.333", "wrong"),
    (r"\pi", "3.14", "wrong"),
    (r"\pi", "π", "correct"),
    (r"8\pi", "8pi", "correct"),
    (r"\sqrt{10}", "√10", "correct"),
    ("-5", "−5", "correct"),
    (r"(-\infty,2]", "(-∞, 2]", "correct"),
    (r"(-\infty,2]", r"(-\infty, 2)", "wrong"),
    (r"(2,\infty)", r"(2,+\infty)", "correct"),
    ("(1,2)", "(2,1)", "wrong"),
    (r"\{1,2\}", r"\{2,1\}", "correct"),
    ("(x+1)^2", "x^2+2x+1", "correct"),
    ("(x+1)^2", "x^2+2x+2", "wrong"),
    (r"\text{Monday}", "Monday", "correct"),
    (r"\text{Monday}", "Sunday", "wrong"),
    ("1500", "1.5e3", "correct"),
    ("7", "x = 7", "correct"),
    ("x = 7", "7", "correct"),
    # a hedge is not an answer
    ("7", "5, 7", "wrong"),
    ("7", r"\pm 7", "wrong"),
    ("7", r"7 \text{ or } 8 \text{ cm}", "wrong"),
    ("7", r"7 \text{ or so } \frac{8}{1}", "wrong"),
    ("5,7", "7", "wrong"),
    # what math-verify alone would accept
    ("7", "5 = 7", "wrong"),
    ("7", "5 = 6 = 7", "wrong"),
    ("5", "2 + 3 = 5", "correct"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "wrong"),
    ("0.0000001", "0", "wrong"),
    ("204_5", "204_6", "wrong"),
    ("204_5", "204_{5}", "correct"),
    (r"10\text{ cm}", r"10\text{ m}", "wrong"),
    (r"10\text{ cm}", "10", "correct"),
    ("10", "10 cm", "correct"),
    ("12h", "12g", "wrong"),
    ("2t", "2", "wrong"),
    ("2", "2t", "wrong"),
    # what cannot be read
    ("7", "x +", "unparsed"),
    ("7", "", "unparsed"),
    ("7", " ", "unparsed"),
    ("7", r"\frac{0}{0}", "wrong"),
    ("x + }{", "7", "fault"),
    ("x + }{", "y + ", "fault"),
    (r"\frac{0}{0}", "7", "fault"),
    # several references
    (["7", "8"], "8", "correct"),
    ([r"\frac{1}{2}", "3"], "0.5", "correct"),
    (["7", "8"], "9", "wrong"),
    (["x + }{", "8"], "8.0", "correct"),
    (["x + }{", "8"], "9.5", "wrong"),
    (["x + }{", "}{ + y"], "9", "fault"),
    ([r"\frac{0}{0}", "8"], "9.5", "wrong"),
    # references that are none
    ([], "7", "fault"),
    ("", "7", "fault"),
    (["7", ""], "7", "fault"),
    (7, "7", "correct"),
    (7.5, "15/2", "correct"),
    (True, "1", "fault"),
    (["7", None], "7", "fault"),
]


@pytest.mark.parametrize(("gold", "answer", "label"), VERDICTS, ids=str)
def test_verdict(pool: JudgePool, gold: Any, answer: str, label: str):
    response = f"The answer is $\\boxed{{{answer}}}$."
    verdict = pool.submit(response, gold).result()
    assert verdict.label == label
    assert verdict.why or label in ("correct", "wrong")
    # A verdict on text that was judged before is the same: nothing depends on what the worker saw in between.
    assert pool.submit(response, gold).result() == verdict


def test_text_equal_to_the_reference_is_correct_even_where_nothing_parses(pool: JudgePool):
    assert prepare(r"\boxed{x + )(}", " x + )( ") == Verdict("correct", "x + )(")
    assert pool.submit(r"\boxed{x + )(}", "x  +  )(").result().label == "correct"


def test_plain_integers_and_equal_text_need_no_worker():
    for gold, answer in [("7", "8"), ("7", "7"), ("-1,234", "-1234"), ("x^2", "x^2"), (["1", "2"], "3")]:
        assert isinstance(prepare(f"\\boxed{{{answer}}}", gold), Verdict)
    assert prepare(r"\boxed{8}", "7.0") == "8"
    assert prepare(r"\boxed{8}", ["7", "x"]) == "8"
    assert prepare(r"\boxed{1,23}", "123") == "1,23"


def test_no_box():
    verdict = prepare("The answer is 7.", "7")
    assert isinstance(verdict, Verdict)
    assert (verdict.label, verdict.extracted) == ("unparsed", None)
    assert "box" in verdict.why


def test_a_huge_box_is_not_parsed():
    verdict = prepare(r"\boxed{" + "1+" * MAX_ANSWER_CHARS + "1}", "7")
    assert isinstance(verdict, Verdict)
    assert verdict.label == "unparsed"
    assert "20,001 characters" in verdict.why
    assert len(verdict.extracted or "") < 300


def test_unknown_kind():
    with pytest.raises(UserError, match=r"unknown kind 'xxx") as caught:
        find_verifier("x" * 10_000)
    assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match=r"unknown kind 'maths'\. Did you mean 'math'"):
        find_verifier("maths")
