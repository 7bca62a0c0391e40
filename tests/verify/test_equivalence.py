"""The second judgement by itself: what it calls equal, different, and what it leaves to the other."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.verify import equivalence
from pekoe.verify.latex_parser import MAX_CHARS, Unreadable, read
from pekoe.verify.normalize import normalized


def compare(gold: str, answer: str) -> bool | None:
    return equivalence.compare(normalized(gold), normalized(answer))


EQUAL = [
    ("1/2", r"\frac12"),
    (r"\frac16", r"0.1\overline{6}"),
    (r"1 \frac{3}{4}", "7/4"),
    ("617", "1,234/2"),
    (r"10,\!000", "10000"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    ("10!", "3628800"),
    (r"\lfloor 7/2 \rfloor", "3"),
    (r"50\%", "1/2"),
    (r"12.5\%", "12.5"),
    (r"33\frac{1}{3}\%", r"\frac13"),
    (r".\overline{36}", r"\frac{4}{11}"),
    ("0.\\bar{3}", "1/3"),
    ("(10110)_2", "10110_2"),
    (r"\mathbb{Z}/6\mathbb{Z}", r"\mathbb{Z}/6\mathbb{Z}"),
    (r"AB \parallel CD", r"AB\parallel CD"),
    (r"\mathbb{R}", r"(-\infty, \infty)"),
    ("[1,3]", r"\{x \in \mathbb{R} : 1 \le x \le 3\}"),
    ("]1, 2[", "(1, 2)"),
    ("f(x) = 2x", "f(z) = 2z"),
    ("(P(x), Q(x)) = (x, 2x)", "(x, 2x)"),
    ("b = 3 or b = -4", "b_1 = 3, b_2 = -4"),
    ("p=5, q=2; p=7, q=3", "(5,2), (7,3)"),
    (r"\frac{22}{7}", r"\frac{22}{7} \approx 3.14"),
    ("11", r"x \approx 11"),
    ("2^{10}", "2¹⁰"),
    ("ab + 1", "1 + ba"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\tan^{-1} x", r"\arctan x"),
    (r"2 \arcsin \sqrt{a}", r"\arccos\left(1 - 2a\right)"),
    (r"x = k\pi", r"n\pi"),
    ("5", "x = 5"),
    ("7", "x = 3 + 4 = 7"),
    ("f(x) = x + 1", "x + 1"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    (r"\pm 2", "2, -2"),
    ("1, 2", "2, 1"),
    (r"\{1, 2\}", "2 and 1"),
    ("x_1 = 2, x_2 = 3", "2, 3"),
    (r"(\sqrt{2}, 0), (-\sqrt{2}, 0)", r"(\pm\sqrt{2}, 0)"),
    (r"(-\infty, -1) \cup (1, \infty)", "|x| > 1"),
    ("(3, 4]", r"3 < \lambda \leq 4"),
    (r"x \neq 3", r"(-\infty, 3) \cup (3, \infty)"),
    (r"a \leqslant -2 \text{ or } a = 1", r"(-\infty, -2] \cup \{1\}"),
    (r"\{x | x < \frac{3}{2}\} - \{-6\}", r"(-\infty, -6) \cup (-6, 1.5)"),
    (r"x \in (1, 2)", "(1, 2)"),
    (r"\emptyset", r"\text{no solution}"),
    (r"\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix}", r"\left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right]"),
]
DIFFERENT = [
    ("10000", "10001"),
    ("1/3", "0.3333333333"),
    ("2^{-99}", "2^{-98}"),
    ("204_5", "204_6"),
    ("a + b", "A + B"),
    ("2", "2, -1"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2]", "[1, 2]"),
    ("[1, 2)", "1 < x < 2"),
    ("|x| > 1", "|x| < 1"),
    (r"\{1, 2\}", r"\{1, 2, 3\}"),
    ("(1,234)", "1234"),
    (r"\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\4 & 3\end{pmatrix}"),
    ("1/0.5", "3"),
    ("x^{12}α", "x_{1}^{2}α"),
    ("5", "5 \\approx 6"),
    ("f(x) = x", "f(z) = z + 1"),
    (r"\mathbb{Z}", r"\mathbb{N}"),
]
UNSURE = [
    ("x", r"\sqrt{x^2}"),  # for some x
    ("0.333333", "1/3"),  # the reference may be rounded
    (r"0.5\%", "0.5"),
    (r"5 \text{ cm}", "5"),
    ("10", "10 cm"),
    ("9^{9^{9^9}}", "1"),
    (r"\pi + 1", "9**9**9**9"),
    (r"\pi", "10^{4000}"),
    ("10^{4000}", r"\sqrt{10^{4000} + 1}"),
    ("((((" * 30 + "1", "1"),
    ("1" * (MAX_CHARS + 1), "1"),
    ("Zoe", "zoe and Ann"),
    ("1/0", "1/0"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str):
    assert compare(gold, answer) is True


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str):
    assert compare(gold, answer) is False
    assert compare(answer, gold) is not True


@pytest.mark.parametrize(("gold", "answer"), UNSURE)
def test_unsure(gold: str, answer: str):
    assert compare(gold, answer) is None


def test_powers_beyond_all_values_are_told_apart_at_once():
    start = time.monotonic()
    for other in ("7", "0", r"\sqrt{2}", r"3 \cdot 10^{8}", "-1/3"):
        for beyond in ("10^{10000000}", "9^{9^9}", r"2.5 \times 10^{-10000000}"):
            assert (compare(beyond, other), compare(other, beyond), compare(beyond, beyond)) == (False, False, True)
    for left, right in (("1^{1000000000}", "1"), (r"0 \cdot 10^{10000000}", "0"), ("2^{12000}", "4^{6000}")):
        assert compare(left, right) is not False
    assert compare("10^{10000000}", "10000000^{10000000}") is None
    assert time.monotonic() - start < 2


def test_a_ratio_has_a_value_but_a_number_is_no_ratio():
    assert compare("2:1", "2") is True
    assert compare("2", "2:1") is False


def test_contradictory_chains_are_not_their_last_side():
    assert compare("7", "x = 5 = 7") is not True


@given(st.text(alphabet=r"0123456789.,;+-*/^_(){}[]|\abxfrcsqtpi!%=<> ", max_size=60))
def test_any_text_is_judged_or_left_and_quickly(text: str):
    start = time.perf_counter()
    assert compare(text, text) is not False
    assert compare("1", text) in (True, False, None)
    assert time.perf_counter() - start < 1


PIECES = re.findall(
    r"\S+",
    r"""9 10 0 1 2.5 x y \pi e i \infty + - * / ^ ! ( ) [ ] \{ \} { } | , ; = < \leq \cup \frac \sqrt \log \ln \sin
    \binom _ \pm % or and \lfloor \rfloor \gcd 10^{400} 1000! \overline{3} 0.1 \begin{pmatrix} & \\ \end{pmatrix} \in
    x= \arcsin""",
)


@given(st.lists(st.sampled_from(PIECES), max_size=9), st.lists(st.sampled_from(PIECES), max_size=9))
def test_any_expressions_are_judged_or_left(gold: list[str], answer: list[str]):
    assert compare("".join(gold), "".join(answer)) in (True, False, None)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**15))
def test_fractions_are_exact(numerator: int, denominator: int):
    gold = rf"\frac{{{numerator}}}{{{denominator}}}"
    assert compare(gold, f"{2 * numerator}/{2 * denominator}") is True
    assert compare(gold, f"{numerator + 1}/{denominator}") is False


@pytest.mark.parametrize(
    "text", [r"\unknown{3}", "(1", "x_", r"\binom{5}", r"\frac-i_", r"\frac{1}", "3 apples 4", "x'"]
)
def test_what_is_not_known_is_refused(text: str):
    with pytest.raises(Unreadable):
        read(text)
